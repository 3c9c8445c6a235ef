#!/bin/sh
# A LoRA of a text-only Gemma 3, loaded onto the multimodal Gemma 3 of the same weights, changes nothing.
#
# Guess, before it was run: PeftModel.from_pretrained either maps the names (the layers are the same) or raises an error
# when not one weight of the adapter finds its place.
# Seen (peft 0.21.2, transformers 5.23.0): one Python warning that lists the missing keys, then a model with lora_B = 0,
# whose logits are the base's, bit for bit. And AutoModelForCausalLM gives the multimodal class for a multimodal folder.
# Why it matters: the adapter seems to be loaded, and a "fine-tuned" model is measured or served that is the base.
# This project: it trains the text model that it cuts out of such a folder (core/base_model.py). Load its adapters onto
# that text model, in models/.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
venv/bin/python - <<'PYTHON'
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

TEXT = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=16, max_position_embeddings=512)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
ids = torch.arange(3, 30)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


torch.manual_seed(0)
whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4))
whole.save_pretrained("multimodal")
text = Gemma3ForCausalLM(whole.config.text_config)
weights = {name.replace("model.language_model.", "model."): tensor for name, tensor in whole.state_dict().items()}
text.load_state_dict({name: weights[name] for name in text.state_dict()})
base = logits(whole)
print("text model and multimodal model agree:", torch.equal(base, logits(text)))
adapted = get_peft_model(text, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)  # as if it had been trained
adapted.save_pretrained("adapter")
print("the adapter changes the text model's logits by", f"{(logits(adapted) - base).abs().max():.2f}")

model = AutoModelForCausalLM.from_pretrained("multimodal")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(model, "adapter")
missing = [str(warning.message)[:55] for warning in caught if "missing adapter keys" in str(warning.message)]
print(type(model).__name__, "| warning:", *missing)
print("on the multimodal model the adapter changes them by", (logits(loaded) - base).abs().max().item())
assert torch.equal(logits(loaded), base) and len(missing) == 1, "changed"
PYTHON
