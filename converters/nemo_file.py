"""Reading this project's `.nemo`: a tar of `model_config.yaml` and the adapter's weights.

Nothing in a file from elsewhere is run: members are read in memory under fixed names, weights as plain tensors.
"""

import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.prompt import Prompt
from nemo_configs.command_line import UserError
from training.base_model import describe
from training.load_model import load_base

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"


@dataclass
class NemoFile:
    """What a `.nemo` holds.

    Attributes:
        base: `{"name", "source", "revision", "sha256"}` of the base model.
        peft: keys of a `peft.LoraConfig`.
        prompt: the wording it was trained with.
        adapter: peft's tensor names → float32 tensors, `lora_A` [r, in] and `lora_B` [out, r].
        dtype: the dtype of the base model in training, e.g. "bfloat16".
        quantization: BitsAndBytesConfig keys of a base that was in 4 bits in training, else None.
    """

    base: dict[str, str]
    peft: dict[str, Any]
    prompt: Prompt
    adapter: dict[str, Tensor]
    dtype: str
    quantization: dict[str, Any] | None = None

    def lora_config(self) -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", **self.peft)

    def load_onto(
        self, base_folder: Path, device: str | None = None, as_trained: bool = False
    ) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The adapted model, by plain transformers and peft, on `device` (default: the GPU if there is one).

        An adapter of QLoRA goes on the whole base, as its users will put it, or `as_trained`, on the base in 4 bits.

        Raises:
            UserError: `base_folder` holds other weights than the adapter was trained on.
        """
        found = describe(base_folder)
        if found["sha256"] != self.base["sha256"]:
            raise UserError(
                f"this adapter was trained on {self.base['name']} with weights {self.base['sha256'][:12]}; "
                f"{base_folder} holds {found['name']} with weights {found['sha256'][:12]}. Name the folder of the "
                f"right base: model.path=FOLDER, or --base FOLDER when converting"
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        quantization = self.quantization if as_trained else None
        base = load_base(base_folder, getattr(torch, self.dtype), quantization, torch.device(device))
        model = get_peft_model(base, self.lora_config())
        set_peft_model_state_dict(model, self.adapter)
        return model.to(device).eval(), AutoTokenizer.from_pretrained(base_folder)


def read_nemo(path: Path) -> NemoFile:
    """
    Raises:
        UserError: no such file, not a `.nemo`, damaged, or one of another kind of model.
    """
    try:
        with tarfile.open(path) as tar:
            members = {member.name.removeprefix("./"): member for member in tar.getmembers() if member.isfile()}
            parts = [tar.extractfile(members[name]).read() for name in (CONFIG, WEIGHTS)]  # type: ignore[union-attr]
        config = yaml.safe_load(parts[0])
        adapter = torch.load(io.BytesIO(parts[1]), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (
        tarfile.TarError,
        KeyError,
        EOFError,
        OSError,
        yaml.YAMLError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(f"{path} is not a whole .nemo of this project ({type(error).__name__}: {error})") from None
    missing = {"base", "peft", "prompt", "dtype"} - set(config or {})
    if missing:
        raise UserError(f"{path} is a .nemo of another kind: {CONFIG} has no {', '.join(sorted(missing))}")
    peft = {key: value for key, value in config["peft"].items() if key != "name"}
    prompt = Prompt(**config["prompt"])
    return NemoFile(config["base"], peft, prompt, adapter, config["dtype"], config.get("quantization"))
