"""This project's `.nemo`: a tar of `model_config.yaml` and `model_weights.ckpt`, of an adapter or of a full model.

An adapter's weights have peft's names and shapes, see adapter.py; its configuration refers to the base by hash.
A full model's weights have Hugging Face's, see hf.py, and its `config.json` and tokenizer are beside them, as
`files/<name>`. Weights are what `torch.save` writes, so that NeMo restores an adapter by `GemmaLoRA.restore_from`, and
are read in place.

Nothing in an untrusted archive is executed, unpacked to disk or followed: members are read by fixed names.
"""

import json
import tarfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml

from converters.adapter import lora_settings
from converters.byte_ranges import ByteRange, files_below, members
from converters.checkpoint import Adapter, Checkpoint, LazyTensor, in_memory
from converters.hf import COMPANIONS, parse_prompt
from converters.torch_file import read_tensors, write_tensors
from core.configuration import escaped, unescaped
from core.errors import UserError

TITLE = ".nemo of this project"
TRIED = "nemo-toolkit 3.0.0"
READS = {Checkpoint, Adapter}
WRITES = {Checkpoint: ".nemo", Adapter: ".nemo"}

CONFIG, WEIGHTS, FILES = "model_config.yaml", "model_weights.ckpt", "files/"
MEGATRON = {"num_layers", "encoder_seq_length", "megatron_amp_O2"}  # in the configuration of NeMo 1's models
MAX_CONFIG = 2**18  # bytes
MAX_DEPTH = 20
MAX_MEMBERS = 100


def recognizes(path: Path) -> bool:
    """Any file with this suffix that is not NeMo 1's; `read` says what is wrong with a damaged one."""
    if path.suffix != ".nemo" or not path.is_file():
        return False
    try:
        return not MEGATRON & _config(members(path), path).keys()
    except UserError:
        return True


def read(path: Path) -> Checkpoint | Adapter:
    parts = members(path)
    config = _config(parts, path)
    if WEIGHTS not in parts:
        raise UserError(f"{path} is not a whole .nemo of this project: it has no {WEIGHTS}")
    prompt = parse_prompt(config["prompt"], path) if config.get("prompt") is not None else None
    tensors = read_tensors(parts[WEIGHTS])
    if "config" in config:
        values = _section(config, "config", path)
        companions = files_below(parts, FILES)
        for name in companions:
            if not any(fnmatch(name, pattern) for pattern in COMPANIONS) or Path(name).name != name:
                raise UserError(f"{path}: {FILES}{name} is none of the files that belong to a model beside its weights")
        files = {name: byte_range.read() for name, byte_range in companions.items()}
        return Checkpoint(values, tensors, files, prompt, _texts(config.get("origin") or {}, "origin", path))
    if missing := {"base", "peft", "dtype"} - config.keys():
        raise UserError(f"{path} is a .nemo of another kind: {CONFIG} has no {', '.join(sorted(missing))}")
    dtype = getattr(torch, str(config["dtype"]), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"{path}: dtype {config['dtype']!r} in {CONFIG} is no floating-point type")
    quantization = _section(config, "quantization", path) if config.get("quantization") else None
    base = _texts(config["base"], "base", path)
    if isinstance(config.get("base_folder"), str) and config["base_folder"]:
        base["folder"] = config["base_folder"]  # where it was on the machine that wrote this
    settings = {key: value for key, value in _section(config, "peft", path).items() if key != "name"}
    adapter = {name: tensor.read() for name, tensor in tensors.items()}
    return Adapter(
        lora_settings(settings, adapter, path),
        adapter,
        base,
        None,
        prompt,
        str(config["dtype"]),
        quantization,
        as_stored=(settings, adapter),
    )


def write(content: Checkpoint | Adapter, target: Path) -> None:
    prompt = vars(content.prompt) if content.prompt else None
    files: Mapping[str, bytes | Path] = {}
    tensors: Mapping[str, LazyTensor]
    config: dict[str, Any]
    if isinstance(content, Checkpoint):
        config = {"config": content.config, "origin": content.origin, "prompt": prompt}
        tensors, files = content.tensors, content.files
    else:
        tensors = {name: in_memory(tensor) for name, tensor in content.tensors.items()}
        base = {key: content.base.get(key, "") for key in ("name", "source", "revision", "sha256")}
        config = {
            "base_folder": content.base.get("folder", ""),
            "base": base,
            "prompt": prompt,
            "seed": 0,
            "dtype": content.dtype or _dtype(content.config or {}),
            "quantization": content.quantization,
            "peft": {"name": "qlora" if content.quantization else "lora", **content.peft},
            "target": "training.gemma_lora.GemmaLoRA",
        }
    with target.open("wb") as file:
        # Through JSON, so that YAML repeats shared values instead of referring to them.
        text = yaml.safe_dump(escaped(json.loads(json.dumps(config))), sort_keys=False).encode()
        file.write(_header(CONFIG, len(text)) + _padded(text))
        for name, where in files.items():
            text = where.read_bytes() if isinstance(where, Path) else where
            file.write(_header(FILES + name, len(text)) + _padded(text))
        write_tensors(tensors, file, lambda size: _header(WEIGHTS, size))
        file.write(bytes(-file.tell() % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE))  # a tar ends with two empty blocks


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


# --- the archive ------------------------------------------------------------------------------------------------


def _config(parts: Mapping[str, ByteRange], path: Path) -> dict[str, Any]:
    if len(parts) > MAX_MEMBERS:
        raise UserError(
            f"{path} is not a whole .nemo of this project: it has {len(parts)} members, of which none "
            f"needs more than {MAX_MEMBERS}"
        )
    text = parts[CONFIG].read(MAX_CONFIG) if CONFIG in parts else b""
    try:
        _refuse_expansion(text)
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a whole .nemo of this project: {CONFIG} is damaged ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a whole .nemo of this project: it has no readable {CONFIG}")
    return unescaped(config)


def _refuse_expansion(text: bytes) -> None:
    """Refuse aliases and deep nesting: a few lines of aliases can expand to gigabytes, and nesting can take hours to
    parse."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            raise ValueError("it refers to itself, or is nested too deeply")


def _section(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    values = config[name]
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: {name} in {CONFIG} is damaged; it must be a mapping with string keys")
    return values


def _texts(values: Any, name: str, path: Path) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(text, str) for pair in values.items() for text in pair):
        raise UserError(f"{path}: {name} in {CONFIG} is damaged; it must be a mapping of strings to strings")
    return values


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(f"./{name}")
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)
