"""`.nemo` → PEFT adapter folder, as `PeftModel.from_pretrained(base, folder)` reads it.

The archive keeps peft's own tensor names and float32 values, so this writes the same bytes under another roof.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from converters.nemo_file import NemoFile


def write_adapter(nemo: NemoFile, base_folder: Path, folder: Path) -> None:
    """Fill `folder` with `adapter_model.safetensors` (lora_A [r, in], lora_B [out, r], float32) and its config."""
    save_file(nemo.adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = nemo.lora_config()
    hub = "https://huggingface.co/"
    source = nemo.base["source"]
    # A hub id where there is one: peft then finds the base on any machine.
    config.base_model_name_or_path = source.removeprefix(hub) if source.startswith(hub) else str(base_folder)
    config.revision = nemo.base["revision"] if source.startswith(hub) else None
    config.inference_mode = True
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    nemo.prompt.save(folder)
