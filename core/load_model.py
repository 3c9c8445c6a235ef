"""A base model in memory: frozen, whole or in 4 bits, with adapters on its linear layers."""

import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from core.errors import UserError

# Linear layers that stay whole in a base of 4 bits. The router takes 22 MB of Gemma 4 26B-A4B, and with 4 bits one
# token in seven was seen to go to other experts (github.com/huggingface/transformers/pull/48801). The projection of
# per-layer embeddings, 27 MB of E2B, feeds every layer; llama.cpp leaves it whole too. What is no linear layer,
# bitsandbytes leaves whole by itself: embeddings, per-layer ones too, and experts.
WHOLE_IN_4_BITS = ("lm_head", "router.proj", "per_layer_model_projection")
ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the output layer


@cache
def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """One for the whole process: of Gemma's 262,144 entries, each copy takes 3 seconds and a quarter of a gigabyte."""
    return AutoTokenizer.from_pretrained(folder)


def load_base(
    folder: Path, dtype: torch.dtype, quantization: dict[str, Any] | None, device: torch.device
) -> PreTrainedModel:
    """The base model in `dtype`; with `quantization` (BitsAndBytesConfig keys) its linear layers in 4 bits on `device`,
    but for WHOLE_IN_4_BITS.

    peft's `prepare_model_for_kbit_training` is left out. It turns all that is not 4-bit into float32, which for Gemma
    is mostly the embedding of 262,144 tokens, and with it every activation. What that is for holds here without it:
    Gemma's norms and our loss compute in float32 inside, adapters are float32, and the base is frozen by peft.

    Raises:
        UserError: unknown keys or values in `quantization`.
    """
    if not quantization:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if quantization.get("bnb_4bit_quant_type", "fp4") not in ("nf4", "fp4"):  # transformers finds out layer by layer
        raise UserError(f"peft.quantization.bnb_4bit_quant_type={quantization['bnb_4bit_quant_type']}. Known: nf4, fp4")
    try:
        settings = BitsAndBytesConfig(
            bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=list(WHOLE_IN_4_BITS), **quantization
        )
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=settings, device_map={"": device}
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"peft.quantization={quantization}: {error}") from None
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            # On a CPU, bitsandbytes repacks weights in the first validation for a kernel that has no backward pass.
            layer.support_avx512bf16_for_cpu = False
    return base


def per_layer_table(base: PreTrainedModel) -> nn.Module:
    """
    Raises:
        UserError: `base` has none.
    """
    if not hasattr(base.model, "embed_tokens_per_layer"):
        raise UserError("trainer.table_in_main_memory=true: this model has no table of per-layer embeddings")
    return base.model.embed_tokens_per_layer


def keep_in_main_memory(base: PreTrainedModel) -> None:
    """Keep the table of per-layer embeddings where it is when `base` moves to a GPU; the rows of a batch are copied.

    It is half of Gemma 4 E2B, 4.7 GB in bfloat16, and a token needs 18 kB of it. The other table, which is the output
    layer too, every target token needs whole.

    Raises:
        UserError: `base` has no such table.
    """
    table: Any = per_layer_table(base)

    def rows(self: nn.Module, ids: Tensor) -> Tensor:
        return type(self).forward(self, ids.cpu()).to(ids.device, non_blocking=True)

    table.to("cpu")
    table._apply = lambda *args, **kwargs: table  # what `to`, `cuda` and Lightning call
    table.forward = MethodType(rows, table)


def lora_settings(peft: Mapping[str, Any]) -> dict[str, Any]:
    """LoraConfig's keys of a `peft` section, which also has a name, a quantization and an optimizer."""
    return {key: value for key, value in peft.items() if key not in ("name", "quantization", "optimizer")}


def is_target(name: str, targets: str | Collection[str]) -> bool:
    """Whether peft adapts the layer or weight `name` (`model.layers.0.self_attn.q_proj`) with these `target_modules`
    or `target_parameters`: names, which are its last parts, or one pattern for all of it.

    ALL_LINEAR leaves out the router of experts: with an adapter there, a few steps send tokens to other experts than
    those that were trained on them. `router.proj` by name adapts it."""
    if targets == ALL_LINEAR:
        return not name.endswith("router.proj")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def add_lora(base: PreTrainedModel, settings: dict[str, Any]) -> PeftModel:
    """`base` frozen, with adapters of `settings` (LoraConfig keys) in float32, also where the base is bfloat16: an
    update is often smaller than bfloat16 can hold.

    Layers of one Gemma 4 differ: one that lacks a target (keys that it borrows, values that are keys) has no adapter
    there. Of a whole model, with towers for images and sound, the text model alone is adapted.

    Raises:
        UserError: a target that no layer of the model has, or a value that peft does not take.
    """
    whole = any(name.endswith("language_model") for name, _ in base.named_modules())
    text = [(name, part) for name, part in base.named_modules() if not whole or "language_model." in name]
    linear = [name for name, part in text if isinstance(part, nn.Linear) and "lm_head" not in name]
    experts = [name for name, part in text if name.endswith(".experts") and hasattr(part, "gate_up_proj")]
    matrices = [f"{name}.{weight}" for name in experts for weight in ("gate_up_proj", "down_proj")]
    modules, parameters = settings["target_modules"], settings.get("target_parameters") or []
    if not isinstance(modules, str):  # a text is a pattern, or ALL_LINEAR
        _check_targets("target_modules", modules, linear, "layer in []")
    if parameters:
        _check_targets("target_parameters", parameters, matrices, "")
        for key in ("lora_dropout", "use_dora"):
            if settings.get(key):
                raise UserError(f"peft.{key}={settings[key]} does not go with peft.target_parameters: leave one out")
    excluded = [r"(?!.*language_model\.).*"] if whole else []
    if modules == ALL_LINEAR and experts:
        excluded.append(r".*\.router\.proj")
    if excluded:
        settings = {**settings, "exclude_modules": "|".join(excluded)}
    try:
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"peft: {error}") from None


def _check_targets(key: str, targets: Collection[str], names: list[str], nothing: str) -> None:
    unknown = [target for target in targets if not any(is_target(name, [target]) for name in names)]
    if unknown or not targets:
        parts = (".".join(name.split(".")[-2:]) for name in names)
        short = (part if part.startswith(("router.", "experts.")) else part.rpartition(".")[2] for part in parts)
        known = ", ".join(dict.fromkeys(short)) or "none, as it has no experts"
        raise UserError(f"peft.{key}: this model has no {', '.join(unknown) or nothing}. Known: {known}")
