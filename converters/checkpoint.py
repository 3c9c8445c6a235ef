"""The middle of every conversion: a Gemma, or a LoRA for one, under the names and in the shapes of Hugging Face.

Each format is a file of this folder that reads into these classes and writes from them, so that any source goes to any
target. Tensors are read when they are asked for, one at a time: no model is ever whole in memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.prompt import Prompt


@dataclass(frozen=True)
class Lazy:
    """A tensor that is still in its file.

    Attributes:
        shape: as Hugging Face has it.
        dtype: of what `read` returns.
        read: reads it, anew each time.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def of_memory(tensor: Tensor) -> Lazy:
    """A tensor that is in memory already."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass
class Checkpoint:
    """A whole Gemma.

    Attributes:
        config: transformers' `config.json` of a text model (Gemma 1, 2 or 3).
        tensors: transformers' names of that text model (`model.embed_tokens.weight`, `model.layers.0.…`) → tensors.
            `lm_head.weight` is not among them where it is the embedding.
        files: file name → its content, or where it lies, for what goes along unchanged: tokenizer, generation config,
            chat template, licence.
        prompt: the wording that it was fine-tuned with.
        origin: `{"name", "source", "revision", "sha256"}` as far as known, see core.base_model.describe.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Lazy]
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    prompt: Prompt | None = None
    origin: dict[str, str] = field(default_factory=dict)


@dataclass
class Adapter:
    """A LoRA.

    Attributes:
        peft: keys of a `peft.LoraConfig`: r, lora_alpha, target_modules, use_rslora, use_dora …
        tensors: peft's names (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`) → [r, in] or [out, r].
        base: of its base, as `Checkpoint.origin`; empty where the source does not say.
        config: `config.json` of its base, which a format that fuses layers needs. The command line fills it in before
            writing; a format that reads an adapter may leave it out.
        prompt: the wording that it was trained with, where the source says.
        dtype: of the base in training, e.g. "bfloat16", where the source says.
        quantization: BitsAndBytesConfig keys of a base that was in 4 bits in training.
    """

    peft: dict[str, Any]
    tensors: dict[str, Tensor]
    base: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    prompt: Prompt | None = None
    dtype: str | None = None
    quantization: dict[str, Any] | None = None
