"""Triton's model repository with the adapters beside it, `exports/serve`, for the embedded engine or for vLLM.

    repository/gemma/     config.pbtxt, 1/model.py and what it imports; or, for NVIDIA's vLLM backend, 1/model.json and
                          1/multi_lora.json
    repository/adapters/  config.pbtxt, 1/model.py and base.json: the catalogue of what is served
    adapters/<name>/      a PEFT folder with prompt.json and serving.json; comes and goes while the server runs
    base                  a link to the base model's Hugging Face folder

Everything gets its final name only once it is complete.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from core.artifacts import ServedAdapter
from core.base_turns import in_turns, turns_of
from core.files import commit, read_json
from core.gemma_config import FAMILIES
from serving.client import BASE
from serving.vllm_adapter import name_for_vllm

HERE = Path(__file__).resolve().parent
MOUNT = "/serve"  # where this folder is mounted in NVIDIA's container
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM accepts as max_lora_rank
UNIFIED = FAMILIES["gemma4_unified_text"]
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "prompt.json")

# The inputs and outputs of NVIDIA's vLLM backend, except images, and `prompt_token_ids` beside.
GEMMA = """\
# {title}
name: "gemma"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "prompt_token_ids" data_type: TYPE_INT32 dims: [ -1 ] optional: true }},
{inputs}
]
output [
  {{ name: "text_output" data_type: TYPE_STRING dims: [ -1 ] }},
  {{ name: "finish_reason" data_type: TYPE_STRING dims: [ -1 ] }},
  {{ name: "cumulative_logprob" data_type: TYPE_FP32 dims: [ -1 ] }},
  {{ name: "logprobs" data_type: TYPE_STRING dims: [ -1 ] }},
  {{ name: "num_input_tokens" data_type: TYPE_UINT32 dims: [ 1 ] }},
  {{ name: "num_output_tokens" data_type: TYPE_UINT32 dims: [ -1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""
OPTIONAL = {
    "sampling_parameters": "STRING",
    "stream": "BOOL",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_cumulative_logprob": "BOOL",
    "return_logprobs": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
VLLM = """\
# The base and the adapters of this folder with NVIDIA's vLLM backend, which adds its inputs and outputs itself
name: "gemma"
backend: "vllm"
model_transaction_policy { decoupled: true }
instance_group [ { count: 1 kind: KIND_MODEL } ]
parameters { key: "REPORT_CUSTOM_METRICS" value: { string_value: "true" } }
"""
CATALOGUE = """\
# The catalogue of what is served
name: "adapters"
backend: "python"
max_batch_size: 0
input [ { name: "name" data_type: TYPE_STRING dims: [ 1 ] } ]
output [
  { name: "catalogue" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "engine" data_type: TYPE_STRING dims: [ 1 ] }
]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
KEEPS_LOADED = 'parameters { key: "keeps_loaded" value: { string_value: "gemma" } }\n'


def write_repository(folder: Path, base: Path) -> None:
    """Write `folder`/repository for the embedded engine, and the link to the base model."""
    inputs = ",\n".join(
        f'  {{ name: "{name}" data_type: TYPE_{kind} dims: [ 1 ] optional: true }}' for name, kind in OPTIONAL.items()
    )
    title = "The base and the adapters of this folder, served by an engine in a process of its own"
    _write(
        folder,
        base,
        {
            "gemma/config.pbtxt": GEMMA.format(title=title, inputs=inputs),
            "gemma/1/model.py": HERE / "triton_model.py",
            "gemma/1/serving/protocol.py": HERE / "protocol.py",
            "gemma/1/serving/sampling_parameters.py": HERE / "sampling_parameters.py",
            "gemma/1/record_file.py": HERE / "record_file.py",
            "adapters/config.pbtxt": CATALOGUE + KEEPS_LOADED,
            "adapters/1/model.py": HERE / "triton_catalogue.py",
            "adapters/1/base.json": json.dumps(base_entry(base), indent=2) + "\n",
        },
    )


def write_vllm_repository(folder: Path, base: Path) -> None:
    """Write `folder`/repository for NVIDIA's Triton container with vLLM, where `folder` is mounted at `MOUNT`."""
    ranks = {path.name: _rank(path) for path in sorted((folder / "adapters").iterdir())}
    model: dict[str, Any] = {
        "model": f"{MOUNT}/base",
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.9,
        "disable_log_stats": False,  # otherwise vLLM has no metrics to report
    }
    architecture = read_json(base / "config.json").get("architectures")
    if architecture == [UNIFIED.text]:
        # The text model of a "unified" Gemma 4 has no class of its own there; the one of the others computes the same.
        model["hf_overrides"] = {"architectures": [FAMILIES["gemma4_text"].text]}
    files: dict[str, str | Path] = {}
    if ranks:
        rank = next((known for known in RANKS if known >= max(ranks.values())), RANKS[-1])
        model |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": len(ranks)}
        loras = {name: f"{MOUNT}/adapters/{name}" for name in ranks}
        files["gemma/1/multi_lora.json"] = json.dumps(loras, indent=2) + "\n"
    _write(
        folder,
        base,
        {
            "gemma/config.pbtxt": VLLM,
            "gemma/1/model.json": json.dumps(model, indent=2) + "\n",
            **files,
            "adapters/config.pbtxt": CATALOGUE,
            "adapters/1/model.py": HERE / "triton_catalogue.py",
            "adapters/1/base.json": json.dumps(base_entry(base), indent=2) + "\n",
        },
    )


def base_entry(base: Path) -> dict[str, Any]:
    """The catalogue's entry for the base alone, which is asked with its own turns."""
    prompt = replace(BASE.prompt, template=in_turns(BASE.prompt.template, turns_of(base)))
    return {
        "name": BASE.name,
        "title": BASE.title,
        "prompt": asdict(prompt),
        "sampling": {**BASE.sampling, "stop": [prompt.end]},
        "has_turns": BASE.has_turns,
        "base": base.name,
        "field": BASE.field,
    }


def put_adapter(folder: Path, source: Path, serving: ServedAdapter, vllm_base: Mapping[str, Any] | None = None) -> bool:
    """Copy the PEFT folder `source` to `folder`/adapters, with `serving` as serving.json; False if it was there.

    Args:
        vllm_base: config.json of the base, where vLLM serves it, which has names of its own for some layers.
    """
    name = serving.name
    target, partial = folder / "adapters" / name, folder / f".{name}.partial"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in ADAPTER_FILES:
        shutil.copyfile(source / file, partial / file)
    if vllm_base:
        name_for_vllm(partial, vllm_base)
    serving.write(partial / "serving.json")
    if target.is_dir() and _content(target) == _content(partial):
        shutil.rmtree(partial)
        return False
    remove_adapter(target)
    commit(partial, target)
    return True


def remove_adapter(target: Path) -> None:
    """Remove an adapter: its folder at once, by renaming it, then its files."""
    if target.exists():
        gone = target.parent.parent / f".{target.name}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        target.rename(gone)
        shutil.rmtree(gone)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _rank(adapter: Path) -> int:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def _write(folder: Path, base: Path, files: dict[str, str | Path]) -> None:
    partial, target = folder / ".repository.partial", folder / "repository"
    shutil.rmtree(partial, ignore_errors=True)
    for name, content in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, partial / name)
        else:
            (partial / name).write_text(content, encoding="utf-8")
    commit(partial, target)
    link = folder / ".base.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(base.resolve(), folder.resolve()))
    link.rename(folder / "base")
