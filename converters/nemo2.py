"""NeMo 2's checkpoint folder of a Gemma, and of a LoRA for one.

    context/model.yaml        the model's class and its configuration, for people
    context/io.json           the same as a graph of fiddle, which is what NeMo loads
    context/nemo_tokenizer/   the tokenizer, and with it Hugging Face's config.json
    weights/                  a distributed checkpoint: `module.decoder.layers.mlp.linear_fc2.weight` …
    weights/adapter_metadata.json   of a LoRA: which checkpoint it was trained on; NeMo wants its folder there

Classes are only named, never imported: nothing that a context describes is instantiated.

Transformer Engine's state of FP8 training (`_extra_state`) is not written. NeMo 2.7 loads a checkpoint without it with
`ckpt_load_strictness="log_all"`, as its own converter from NeMo 1 does. Gemma 2's sliding layers are the even ones in
Hugging Face (counted from 0) and the odd ones in NeMo 2.7.3; within the window of 4,096 tokens both compute the same.
"""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from converters.byte_ranges import files_below, members, parsing
from converters.checkpoint import Adapter, Checkpoint, LazyTensor
from converters.distributed import read_distributed, stack_layers, write_distributed
from converters.megatron_config import config_of, nemo_fields, read_prompt
from converters.megatron_layout import embedding_rows, from_megatron, to_megatron
from converters.megatron_lora import from_megatron_lora, in_order
from converters.megatron_lora_writer import to_megatron_lora
from core.errors import UserError
from core.prompt import PROMPT_FILE

TITLE = "NeMo 2 checkpoint folder (Megatron layout)"
TRIED = "layout of NeMo 2.7.3, read and not run"
READS = {Checkpoint, Adapter}
WRITES = {Checkpoint: "", Adapter: ""}

MODEL, GRAPH, TOKENIZER = "context/model.yaml", "context/io.json", "context/nemo_tokenizer"
ADAPTER = "adapter_metadata.json"
MODULE = "nemo.collections.llm.gpt.model"
# Family → module, class of the model, class of its configuration. All fields are given, so that a size in a class
# name has no effect; of Gemma 3's only the classes with a size have a field for every mechanism.
CLASSES = {
    "gemma": (f"{MODULE}.gemma", "GemmaModel", "GemmaConfig"),
    "gemma2": (f"{MODULE}.gemma2", "Gemma2Model", "Gemma2Config"),
    "gemma3_text": (f"{MODULE}.gemma3", "Gemma3Model", "Gemma3Config1B"),
}
KNOWN = re.compile(
    rf"{re.escape(MODULE)}\.(?:gemma\.(?:Code)?GemmaConfig|gemma2\.Gemma2Config|gemma3\.Gemma3Config)\w*"
)
AUTO_TOKENIZER = ("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer")
LORA = ("nemo.collections.llm.peft.lora", "LoRA")


class FiddleConfig(dict[str, Any]):
    """The configuration of an object that NeMo instantiates: the class's `module` and `name`, and its arguments."""

    def __init__(self, where: tuple[str, str], **arguments: Any):
        super().__init__(arguments)
        self.module, self.name = where


def recognizes(path: Path) -> bool:
    return (path / MODEL).is_file() and (path / "weights").is_dir()


def read(path: Path) -> Checkpoint | Adapter:
    """
    Raises:
        UserError: damaged, incomplete or hostile; a model of another kind.
    """
    parts = members(path)
    with parsing(f"{path / MODEL}"):
        model = yaml.safe_load(parts[MODEL].read())
        fields, transform = model["config"], model.get("model_transform")
        target = f"{fields['_target_']}"
    if not KNOWN.fullmatch(target):
        raise UserError(f"{path / MODEL} is of {target}; only the text Gemmas of NeMo 2 are known")
    family = next(family for family, (module, *_) in CLASSES.items() if target.rpartition(".")[0] == module)
    tokenizer = files_below(parts, TOKENIZER)
    tensors = read_distributed(files_below(parts, "weights"), f"{path / 'weights'}")
    with parsing(f"{path / MODEL}"):
        config = config_of(family, fields, tokenizer, embedding_rows(tensors))
    prompt = read_prompt(parts.get(f"context/{PROMPT_FILE}"))
    if f"weights/{ADAPTER}" in parts or any(".adapter." in name for name in tensors):
        if not isinstance(transform, dict) or "alpha" not in transform:
            raise UserError(f"{path / MODEL} does not describe its LoRA: it has no model_transform with an alpha")
        with parsing(f"{path / MODEL}"):
            alpha, dropout = float(transform["alpha"]), float(transform.get("dropout") or 0.0)
            ranks = int(fields.get("tensor_model_parallel_size") or 1)
            base = json.loads(parts[f"weights/{ADAPTER}"].read()) if f"weights/{ADAPTER}" in parts else {}
            origin = base.get("base") or {}
        adapters = {name: lazy for name, lazy in tensors.items() if ".adapter." in name}
        adapters = in_order(adapters, files_below(parts, "weights"), ranks)
        adapter = from_megatron_lora(adapters, config, alpha, dropout)
        adapter.base, adapter.prompt, adapter.dtype = origin, prompt, _dtype(fields)
        return adapter
    if not fields.get("layernorm_zero_centered_gamma", True):
        raise UserError(f"{path / MODEL}: norms that are not zero-centred are not a Gemma's in NeMo 2")
    names = [name for name in tokenizer if name != "config.json" and "/" not in name]
    files: dict[str, bytes | Path] = {name: path / TOKENIZER / name for name in names}
    return Checkpoint(config, from_megatron(tensors, config), files, prompt)


def write(content: Checkpoint | Adapter, target: Path) -> None:
    """
    Raises:
        UserError: a model that Megatron has no place for.
    """
    arguments: dict[str, Any] = {}
    if isinstance(content, Adapter):
        weights, arguments["model_transform"] = _lora(content)
        config, dtype, files = dict(content.config or {}), getattr(torch, content.dtype or "bfloat16"), {}
    else:
        weights, config, files = to_megatron(content.tensors, content.config), content.config, dict(content.files)
        dtype = next(iter(weights.values())).dtype
    module, model_class, config_class = CLASSES[config["model_type"]]
    precision = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "params_dtype": dtype}
    fields = FiddleConfig((module, config_class), **nemo_fields(config), **precision)
    if any(name.startswith("tokenizer") for name in files):
        arguments["tokenizer"] = FiddleConfig(AUTO_TOKENIZER, pretrained_model_name="nemo_tokenizer")
    model = FiddleConfig((module, model_class), config=fields, **arguments)

    (target / "weights").mkdir(parents=True)
    (target / TOKENIZER).mkdir(parents=True)
    write_distributed(
        stack_layers({f"module.{name}": lazy for name, lazy in weights.items()}),
        lambda name: (target / "weights" / name).open("wb"),
    )
    if isinstance(content, Adapter):
        record = {"model_ckpt_path": content.base.get("name", ""), "base": content.base}
        (target / "weights" / ADAPTER).write_text(json.dumps(record))
    files["config.json"] = json.dumps(config, indent=2).encode()
    for name, data in files.items():
        (target / TOKENIZER / name).write_bytes(data.read_bytes() if isinstance(data, Path) else data)
    if content.prompt:
        content.prompt.save(target / "context")
    (target / MODEL).write_text(yaml.safe_dump(_as_yaml(model), sort_keys=False))
    root = FiddleConfig(("nemo.lightning.io.pl", "TrainerContext"), model=model, trainer=None, extra={})
    (target / GRAPH).write_text(json.dumps(fiddle_graph(root)))


def _lora(adapter: Adapter) -> tuple[dict[str, LazyTensor], FiddleConfig]:
    tensors, rank, alpha = to_megatron_lora(adapter)
    weights = {name: LazyTensor(tuple(t.shape), t.dtype, partial(lambda t: t, t)) for name, t in tensors.items()}
    layers = sorted({name.split(".adapter.")[0].rpartition(".")[2] for name in tensors})
    where = ("nemo.collections.llm.peft.dora", "DoRA") if adapter.peft.get("use_dora") else LORA
    return weights, FiddleConfig(
        where,
        target_modules=layers,
        dim=rank,
        alpha=int(alpha) if alpha == int(alpha) else alpha,
        dropout=adapter.peft.get("lora_dropout", 0.0),
    )


def _dtype(fields: Mapping[str, Any]) -> str:
    return "bfloat16" if fields.get("bf16") else "float16" if fields.get("fp16") else "float32"


def _as_yaml(value: Any) -> Any:
    """`value` as in NeMo's `model.yaml`: a class under `_target_`, other objects by name."""
    if isinstance(value, FiddleConfig):
        return {"_target_": f"{value.module}.{value.name}", **{key: _as_yaml(item) for key, item in value.items()}}
    if isinstance(value, torch.dtype):
        return {"_target_": f"{value}", "_call_": False}
    return list(value) if isinstance(value, tuple) else value


def fiddle_graph(root: FiddleConfig) -> dict[str, Any]:
    """`root` as `fiddle.experimental.serialization` 0.3 writes it, with each configuration as an object of its own."""
    objects: dict[str, Any] = {}
    settings = {"type": "pyref", "module": "fiddle._src.config", "name": "BuildableTraverserMetadata"}

    def container(kind: str, items: list[Any], metadata: Any, paths: dict[str, Any]) -> dict[str, Any]:
        return {
            "type": {"type": "pyref", "module": "builtins", "name": kind},
            "items": items,
            "metadata": metadata,
            **paths,
        }

    def store(value: Any, path: str | None) -> Any:
        paths = {} if path is None else {"paths": [path]}
        if isinstance(value, FiddleConfig):
            items = [[f"Attr(name='{name}')", store(item, f"{path}.{name}")] for name, item in value.items()]
            empty = container("dict", [], container("tuple", [], None, {}), {})
            described = {
                "type": settings,
                "metadata": settings,
                "items": [
                    ["Attr(name='fn_or_cls')", {"type": "pyref", "module": value.module, "name": value.name}],
                    ["Attr(name='argument_names')", store(tuple(value), None)],
                    ["Attr(name='argument_tags')", empty],
                    ["Attr(name='argument_history')", empty],
                ],
            }
            key = f"{value.name.lower()}_{len(objects) + 1}"
            buildable = {"type": "pyref", "module": "fiddle._src.config", "name": "Config"}
            objects[key] = {"type": buildable, "items": items, "metadata": described, **paths}
            return {"type": "ref", "key": key}
        if isinstance(value, list | tuple):
            items = [[f"Index(index={n})", store(item, path and f"{path}[{n}]")] for n, item in enumerate(value)]
            return container(type(value).__name__, items, None, paths)
        if isinstance(value, dict):
            return container("dict", [], container("tuple", [], None, {}), paths)
        if isinstance(value, torch.dtype):
            return {"type": "pyref", "module": "torch", "name": f"{value}".removeprefix("torch."), **paths}
        return value if path is None else {"type": "leaf", "value": value, **paths}

    reference = store(root, "<root>")
    return {"root": reference, "objects": objects, "refcounts": dict.fromkeys(objects, 1), "version": "0.0.1"}
