#!/bin/sh
# The tensors of a LoRA on experts neither say which matrix they adapt nor go through the experts in the same order.
#
# A good engineer's guess: an adapter made with target_parameters names its tensors after the parameter, as in
# experts.down_proj.lora_A, and row i of lora_A belongs to column i of lora_B, as in every LoRA on a linear layer.
# Seen (peft 0.21.2, transformers 5.23.0): with one target the tensors are experts.lora_A and experts.lora_B, whichever
# of gate_up_proj and down_proj it is. With both, those names are down_proj's and gate_up_proj has
# experts.base_layer.lora_*, whichever was listed first. So experts.lora_A.weight is gate_up_proj's in one adapter and
# down_proj's in the next: only shapes and target_parameters tell. The rows of lora_A go expert by expert, the columns
# of lora_B rank by rank.
# Why it matters: a merge or converter that goes by the name takes the wrong matrix, which at least does not fit. One
# that pairs row i with column i fits everywhere and is wrong without an error.
# This project: converters/merge_lora.py goes by target_parameters and unflattens the two factors differently.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
venv/bin/python - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

EXPERTS, RANK = 4, 3
config = Gemma4TextConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    layer_types=["sliding_attention", "full_attention"], num_key_value_heads=2, head_dim=16, sliding_window=16,
    max_position_embeddings=512, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=EXPERTS,
    top_k_experts=2, moe_intermediate_size=24)
LAYER = "base_model.model.model.layers.0."


def weights(model):
    """The experts' two matrices in the first layer."""
    return {name: tensor.clone() for name, tensor in model.model.layers[0].experts.state_dict().items()}


def adapter(*targets):
    """What peft saves of a random LoRA on the first layer's experts, and what its own merge adds to them."""
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(config)
    before = weights(model)
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_parameters=[f"experts.{target}" for target in targets])
    model = get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # as if it had been trained
    model.save_pretrained("adapter")
    saved = load_file("adapter/adapter_model.safetensors")
    after = weights(model.merge_and_unload())
    changes = {name: after[name] - before[name] for name in before}
    return {name.removeprefix(LAYER): tensor for name, tensor in saved.items() if name.startswith(LAYER)}, changes


OUTER = {"experts.lora_A.weight", "experts.lora_B.weight"}
INNER = {"experts.base_layer.lora_A.weight", "experts.base_layer.lora_B.weight"}
INPUTS = {"gate_up_proj": 64, "down_proj": 24}  # hidden size and size of an expert
for targets in ("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj"):
    saved, changes = adapter(*targets)
    print("target_parameters", *targets)
    print("  saved:", {name: list(tensor.shape) for name, tensor in sorted(saved.items())})
    both = len(targets) == 2
    outer = "down_proj" if both else targets[0]
    assert set(saved) == (OUTER | INNER if both else OUTER), "changed"
    assert saved["experts.lora_A.weight"].shape[1] == INPUTS[outer], "changed"
    a, b = saved["experts.lora_A.weight"].unflatten(0, (EXPERTS, RANK)), saved["experts.lora_B.weight"]
    alike = b.unflatten(1, (EXPERTS, RANK)).permute(1, 0, 2) @ a
    rank_by_rank = b.unflatten(1, (RANK, EXPERTS)).permute(2, 0, 1) @ a
    off, exact = ((product - changes[outer]).abs().max().item() for product in (alike, rank_by_rank))
    print(f"  experts.lora_* change {outer}, by up to {changes[outer].abs().max():.2f}; with lora_B's columns", end="")
    print(f" expert by expert, BA is off by {off:.2f}; rank by rank, by {exact:.0e}")
    assert exact < 1e-5 and off > 0.05, "changed"
PYTHON
