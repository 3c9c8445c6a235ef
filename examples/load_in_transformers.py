"""Load a fine-tuned adapter with transformers and peft alone; nothing of this project is imported.

    make convert TASK=slang TO=adapter
    pip install torch transformers peft
    python examples/load_in_transformers.py models/gemma-3-270m exports/slang/adapter "You missed the last bus home."

The adapter folder holds prompt.json beside the weights: the wording that the model was trained with. A model that is
asked in other words answers much worse.
"""

import json
import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, scene = sys.argv[1:]

# "instruction" has a place for each field of a row, "fields" has values for those that are not given, and "template"
# is the whole text: what stands before {response} is what the model is given.
prompt = json.loads((Path(adapter) / "prompt.json").read_text(encoding="utf-8"))
instruction = prompt["instruction"]
for field, text in {**prompt["fields"], "context": scene}.items():
    instruction = instruction.replace("{" + field + "}", text)
before, _, end = prompt["template"].partition("{response}")
question = before.replace("{instruction}", instruction)

tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)

inputs = tokenizer(question, return_tensors="pt")
assert inputs.input_ids[0, 0] == tokenizer.bos_token_id, "without <bos>, Gemma writes gibberish"
output = model.generate(
    **inputs,
    max_new_tokens=80,
    do_sample=False,
    # The token that ends an answer: the one that follows {response} in the template, else <eos>.
    eos_token_id=tokenizer.convert_tokens_to_ids(end) if end else tokenizer.eos_token_id,
)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
