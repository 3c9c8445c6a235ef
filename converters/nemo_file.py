"""A fine-tuned model, loaded from its `.nemo` by transformers and peft, for evaluation and generation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from converters import nemo
from converters.checkpoint import Adapter
from core.base_model import describe
from core.errors import UserError
from core.load_model import load_base, load_tokenizer
from core.prompt import Prompt


@dataclass
class NemoFile:
    """The adapter in a `.nemo`.

    Attributes:
        base: `{"name", "source", "revision", "sha256"}` of the base model.
        peft: keys of a `peft.LoraConfig`.
        prompt: the template that it was trained with.
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

    def load_onto(
        self, base_folder: Path, device: str | None = None, as_trained: bool = False
    ) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The adapted model, by plain transformers and peft, on `device` (default: the GPU if there is one).

        A QLoRA adapter is applied to the unquantized base, as it will be in use, or if `as_trained`, to the base in 4
        bits.

        Raises:
            UserError: `base_folder` holds other weights than the adapter was trained on.
        """
        found = describe(base_folder)
        if self.base["sha256"] and found["sha256"] != self.base["sha256"]:
            raise UserError(
                f"this adapter was trained on {self.base['name']} with weights {self.base['sha256'][:12]}; "
                f"{base_folder} holds {found['name']} with weights {found['sha256'][:12]}. Pass the right base: "
                f"model.path=FOLDER"
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        quantization = self.quantization if as_trained else None
        base = load_base(base_folder, getattr(torch, self.dtype), quantization, torch.device(device))
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **self.peft))
        if set_peft_model_state_dict(model, self.adapter).unexpected_keys:
            raise UserError(
                f"{base_folder} holds a {type(base).__name__}, onto which this adapter of a text model does not fit; "
                f"name the text model's folder: model.path=FOLDER"
            )
        return model.to(device).eval(), load_tokenizer(base_folder)


def read_nemo(path: Path) -> NemoFile:
    """Read the `.nemo` of an adapter.

    Raises:
        UserError: no such file, not a `.nemo`, damaged, or another kind of model.
    """
    found = nemo.read(path)
    if not isinstance(found, Adapter):
        raise UserError(f"{path} holds a whole model, not an adapter; python -m commands.convert source={path} to=hf")
    if found.prompt is None or found.dtype is None:
        raise UserError(f"{path} does not have the prompt that its adapter was trained with, which generation needs")
    return NemoFile(found.base, found.peft, found.prompt, found.tensors, found.dtype, found.quantization)
