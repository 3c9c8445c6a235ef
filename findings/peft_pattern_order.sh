#!/bin/sh
# An adapter with overlapping alpha_pattern keys computes something else after it has been saved and loaded.
#
# A good engineer's guess, written down before the run: a PEFT adapter that is saved and loaded gives the logits that it
# gave before, to the bit; the patterns are part of its configuration and travel with it.
# Seen (peft 0.21.2): of several patterns that match a module, the first one in the dictionary decides. The configuration
# is written as JSON with sorted keys, so after loading another pattern may be the first. Nothing is said.
# Why it matters: "layers.1.*" before "q_proj" is how one says "but for these". Trained so, evaluated so, and another
# model is published.
# This project: converters/adapter.py looks patterns up as peft does, in the order of the file, which is what whoever
# loads the adapter gets.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
venv/bin/python - <<'PYTHON'
import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

torch.manual_seed(0)
base = Gemma3ForCausalLM(Gemma3TextConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128)).eval()
ids = torch.arange(5, 25)[None]


def changed_by_reloading(patterns):
    """The largest change of a logit when an adapter with these patterns is saved and loaded."""
    settings = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], alpha_pattern=patterns)
    model = get_peft_model(copy.deepcopy(base), settings).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)  # as if it had been trained
    model.save_pretrained("adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(base), "adapter").eval()
    with torch.no_grad():
        before, after = model(ids).logits, again(ids).logits
    q = [m.model.model.layers[1].self_attn.q_proj.scaling["default"] for m in (model.base_model, again.base_model)]
    print(patterns, "-> layer 1's q_proj is scaled by", *q, "before and after; logits change by",
          f"{(before - after).abs().max():.3f}")
    return (before - after).abs().max().item(), q


same, scales = changed_by_reloading({"q_proj": 64})
assert same == 0 and scales == [16, 16], "changed"
other, scales = changed_by_reloading({r"q_proj": 64, r"layers\.1\.self_attn\.q_proj": 1})
assert other > 0.01 and scales == [16, 0.25], "changed"
PYTHON
