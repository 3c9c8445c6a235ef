"""The intermediate representation of every conversion: a Gemma, or a LoRA for one, in Hugging Face's names and shapes.

Each format is a module of this folder that reads into these classes and writes from them, so that any source can be
converted to any target. Tensors are read on demand, one at a time: no model is ever completely in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.prompt import Prompt


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, read on demand.

    Attributes:
        shape: in Hugging Face's layout.
        dtype: of what `read` returns.
        read: reads the tensor from the file, again on each call.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_memory(tensor: Tensor) -> LazyTensor:
    """A tensor that is already in memory, as a `LazyTensor`."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def read_ahead(tensors: Iterable[LazyTensor]) -> Iterator[Tensor]:
    """The values of `tensors` in turn; the next one is read while the caller works on the one before."""
    with ThreadPoolExecutor(1) as beside:
        coming: Future[Tensor] | None = None
        for lazy in tensors:
            before, coming = coming, beside.submit(lazy.read)
            if before:
                yield before.result()
        if coming:
            yield coming.result()


@dataclass
class Checkpoint:
    """A full model.

    Attributes:
        config: transformers' `config.json` of a text model (Gemma 1, 2, 3 or 4).
        tensors: transformers' names of that text model (`model.embed_tokens.weight`, `model.layers.0.…`) → tensors.
            Without `lm_head.weight` where embeddings are tied.
        files: name → content or path of the files that are copied unchanged: tokenizer, generation config, chat
            template, licence.
        prompt: the template that it was fine-tuned with.
        origin: `{"name", "source", "revision", "sha256"}` as far as known; see `core.base_model.describe`.
        whole: the folder of the whole Gemma 4, with what sees and hears, that the tensors are put back into when they
            are written as a Hugging Face folder; None: the text model is written alone.
    """

    config: dict[str, Any]
    tensors: Mapping[str, LazyTensor]
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    prompt: Prompt | None = None
    origin: dict[str, str] = field(default_factory=dict)
    whole: Path | None = None


@dataclass
class Adapter:
    """A LoRA adapter.

    Attributes:
        peft: keys of a `peft.LoraConfig`: r, lora_alpha, target_modules, target_parameters, use_rslora, use_dora …
        tensors: peft's names (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`) → [r, in] or [out, r].
        base: origin of its base, as `Checkpoint.origin`; empty where the source does not name it.
        config: `config.json` of its base, which a format with fused layers needs; `conversion` sets it before writing.
        prompt: the template that it was trained with, if the source has it.
        dtype: of the base in training, e.g. "bfloat16", if the source has it.
        quantization: BitsAndBytesConfig keys, if the base was in 4 bits in training.
        whole: whether a PEFT folder is written for the class of the whole Gemma 4 that sees and hears, instead of for
            that of its text model. `tensors` have the text model's names either way.
        as_stored: the settings and the tensors under the names that a file for peft has, which the proof hands to peft
            as they are; None where the file is for another library.
    """

    peft: dict[str, Any]
    tensors: dict[str, Tensor]
    base: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    prompt: Prompt | None = None
    dtype: str | None = None
    quantization: dict[str, Any] | None = None
    whole: bool = False
    as_stored: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None
