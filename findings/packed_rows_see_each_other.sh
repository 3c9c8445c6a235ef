#!/bin/sh
# Rows packed by position_ids see each other in transformers unless use_cache=False is given.
#
# Guess, before it was run: where no attention mask and no cache are given, position_ids that start again at 0 keep packed
# rows apart; use_cache decides only whether a cache comes back.
# Seen (transformers 5.23.0): with use_cache left at its default (true) the second row attends to the first, without a
# warning: the new cache counts as a given one, and row borders are then not looked for. With use_cache=False the logits
# are those of the row alone. transformers' own Trainer sets it to False; a training loop of one's own has to.
# Why it matters: such a loop trains another model, and its loss still falls.
# This project: training/packing.py gives attention the borders of the rows itself; its tests compare the logits.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0
venv/bin/python - <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, sliding_window=16, max_position_embeddings=512)
first, second = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
packed = torch.cat([first, second])[None]
positions = torch.arange(40).repeat(2)[None]

for family in ("gemma2", "gemma3_text", "gemma4_text"):
    more = dict(hidden_size_per_layer_input=0, num_kv_shared_layers=0) if family == "gemma4_text" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **more)).train()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else 0.15)
    with torch.no_grad():
        alone = model(second[None]).logits[0]
        off = {}
        for options in ({}, {"use_cache": False}):
            logits = model(packed, position_ids=positions, **options).logits[0, 40:]
            off[str(options)] = (logits - alone).abs().max().item()
    largest = alone.abs().max().item()
    print(f"{family}: largest logit {largest:.2f}; packed, off by", {k: f"{v:.1e}" for k, v in off.items()})
    assert off["{}"] > 0.05 * largest and off["{'use_cache': False}"] < 1e-3 * largest, "changed"
PYTHON
