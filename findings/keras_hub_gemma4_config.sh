#!/bin/sh
# KerasHub cannot read a Gemma 4 that the current transformers has saved.
#
# A good engineer's guess: Gemma4Backbone.from_preset(folder) of keras-hub 0.32.0 reads what save_pretrained of
# transformers 5.23.0 writes; both are current releases, and the names of the weights are Google's own.
# Seen: "cannot reshape array". transformers writes the head size of full-attention layers as per_layer_config and no
# longer as global_head_dim, the only key that KerasHub knows. With both keys in config.json, KerasHub's hidden states
# are those of transformers, which still reads the folder.
# Why it matters: a Gemma 4 that was fine-tuned, merged or cut with the current transformers is such a folder.
# This project: `to=keras` writes a Gemma 4 with both keys, and every config.json it writes has both dialects.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 keras==3.15.1 \
    kagglehub==1.0.2 kagglesdk==0.1.28 sentencepiece==0.2.1
venv/bin/pip install -q --no-deps keras-hub==0.32.0 # its other dependency, TensorFlow, is not needed with torch
KERAS_BACKEND=torch venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

import torch
from keras_hub.models import Gemma4Backbone
from transformers import AutoModelForCausalLM, Gemma4Config, Gemma4ForConditionalGeneration

S, F = "sliding_attention", "full_attention"
ROPE = {S: {"rope_type": "default", "rope_theta": 1e4},
        F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}}
TEXT = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=6, layer_types=[S, S, F] * 2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=32, rope_parameters=ROPE,
            hidden_size_per_layer_input=0, sliding_window=16, max_position_embeddings=512)
torch.manual_seed(0)
Gemma4ForConditionalGeneration(Gemma4Config(text_config=TEXT)).save_pretrained("gemma4")
config_file = Path("gemma4/config.json")
config = json.loads(config_file.read_text())
config = {name: value for name, value in config.items() if value is not None}  # the towers left out
text_config = config["text_config"]
print("saved:", {name: text_config.get(name) for name in ("head_dim", "per_layer_config", "global_head_dim")})

ids = torch.arange(3, 30)[None]
inputs = {"token_ids": ids, "padding_mask": torch.ones_like(ids), "position_ids": torch.arange(27)[None]}
error = ""
for keys in ({}, {"global_head_dim": 32}):
    config_file.write_text(json.dumps({**config, "text_config": {**text_config, **keys}}))
    try:
        found = Gemma4Backbone.from_preset("gemma4", dtype="float32")(inputs)
    except ValueError as refused:
        error = str(refused)
        print("as saved:", error)
expected = AutoModelForCausalLM.from_pretrained("gemma4").model(input_ids=ids).last_hidden_state
off = (found - expected).abs().max().item()
print(f"with global_head_dim beside it: hidden states up to {expected.abs().max():.2f}, off by {off:.1e}")
assert "cannot reshape" in error and off < 1e-3, "changed"
PYTHON
