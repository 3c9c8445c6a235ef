"""An adapter of mlx-lm, Apple's MLX for language models: `adapter_config.json` and `adapters.safetensors`. Read only.

For a linear layer [out, in], rank r and one scale s for the whole file, y = W x + s · (x A) B:

    model.layers.N.<layer>.lora_a    [in, r], peft's lora_A transposed
    model.layers.N.<layer>.lora_b    [r, out], peft's lora_B transposed
    model.layers.N.<layer>.m         [out], the magnitudes of DoRA

peft's alpha is s · r. Whole models of the image-capable Gemmas have `language_model.` before these names. Source:
mlx_lm/tuner/lora.py and dora.py.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.adapter import CONFIG, PREFIX, base_named, lora_settings, patterns, peft_name
from converters.checkpoint import Adapter
from converters.hf import read_prompt
from converters.safetensors_file import read_tensors
from core.errors import UserError
from core.files import read_json

TITLE = "adapter of mlx-lm"
READS = {Adapter}
WRITES: dict[type, str] = {}

WEIGHTS = "adapters.safetensors"
PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
TENSOR = re.compile(r"(.+)\.(lora_a|lora_b|m)")


def recognizes(path: Path) -> bool:
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def read(path: Path) -> Adapter:
    """
    Raises:
        UserError: damaged, a fully trained model, or a LoRA on experts or on embeddings.
    """
    config = read_json(path / CONFIG)
    parameters, kind = config.get("lora_parameters"), config.get("fine_tune_type", "lora")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if kind not in ("lora", "dora"):
        raise UserError(
            f"{path} is of fine_tune_type {str(kind)[:40]!r}; fuse it with mlx_lm.fuse, and convert the result"
        )
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < abs(scale) < 1e6:
        raise UserError(f"{path / CONFIG}: lora_parameters has no scale that is a number; copy it again")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, lazy in read_tensors(path / WEIGHTS).items():
        found = TENSOR.fullmatch(name)
        if found is None or len(lazy.shape) != (1 if found[2] == "m" else 2):
            raise UserError(
                f"{path / WEIGHTS}: {name} is not part of a LoRA on a linear layer of Gemma; fuse it with mlx_lm.fuse, "
                f"and convert the result"
            )
        ours, value = peft_name(f"{found[1]}.{PARTS[found[2]]}"), lazy.read()
        tensors[ours] = value if found[2] == "m" else value.T.contiguous()
        if found[2] == "lora_a":
            ranks[ours.removeprefix(PREFIX).removesuffix(f".{PARTS['lora_a']}")] = lazy.shape[1]
    largest = max(ranks.values(), default=0)
    alphas = {layer: scale * rank for layer, rank in ranks.items()}
    settings: dict[str, Any] = {"r": largest, "lora_alpha": scale * largest, "use_dora": kind == "dora"}
    settings |= {"rank_pattern": patterns(ranks, largest), "alpha_pattern": patterns(alphas, scale * largest)}
    base = base_named(config.get("model"), None)
    return Adapter(lora_settings(settings, tensors, path / CONFIG), tensors, base, prompt=read_prompt(path))
