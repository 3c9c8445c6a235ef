"""A base model in memory: frozen, whole or in 4 bits, with adapters on its linear layers."""

import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from core.errors import UserError

ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the output layer


@cache
def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """One for the whole process: of Gemma's 262,144 entries, each copy takes 3 seconds and a quarter of a gigabyte."""
    return AutoTokenizer.from_pretrained(folder)


def load_base(
    folder: Path, dtype: torch.dtype, quantization: dict[str, Any] | None, device: torch.device
) -> PreTrainedModel:
    """The base model in `dtype`; with `quantization` (BitsAndBytesConfig keys) its linear layers in 4 bits on `device`.

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
        settings = BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **quantization)
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

    Raises:
        UserError: a target that the model does not have, or a value that peft does not take.
    """
    layers = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear) and "lm_head" not in name]
    targets = settings["target_modules"]
    if not isinstance(targets, str):  # a text is a pattern, or "all-linear"
        unknown = [name for name in targets if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
        if unknown or not targets:
            known = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            raise UserError(
                f"peft.target_modules: this model has no {', '.join(unknown) or 'layer in []'}. Known: {known}"
            )
    try:
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"peft: {error}") from None
