"""Megatron-Bridge's checkpoints of a Gemma, or of a LoRA for one: a run folder, or one iteration of it.

    latest_train_state.pt               the last iteration: {"step": tensor, …}
    latest_checkpointed_iteration.txt   the same for Megatron-LM
    iter_0000000/run_config.yaml        `model`: the provider's class (`_target_`) and its fields; `tokenizer`, `peft`
    iter_0000000/train_state.pt
    iter_0000000/metadata.json, .metadata, common.pt, __0_0.distcp …   a distributed checkpoint (distributed.py)
    iter_0000000/tokenizer/             Hugging Face's files; of ours config.json too

Classes are only named, never imported: nothing that a run_config.yaml describes is instantiated. common.pt is not read.

Written for 0.6.2, whose own loading wants an entry `…._extra_state` of each module that has one, Transformer Engine's
state of FP8 training; it throws away what it finds there. Each is written as None. What no version needs is left out:
optimizer, scheduler and states of random generators.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from converters import megatron_gemma4, megatron_layout
from converters.adapter import base_named, recorded
from converters.byte_ranges import ByteRange, files_below, members, parsing, whole_file
from converters.checkpoint import Adapter, Checkpoint, LazyTensor
from converters.distributed import COMMON, CONFIG, INDEX, Piece, read_distributed, stack_layers, write_distributed
from converters.megatron_adapter import adapter_tensors, holds_adapter, read_adapter
from converters.megatron_config import json_file, read_prompt
from converters.megatron_run_config import config_from, family_of, provider_of, run_config
from converters.torch_file import read_tensors
from core.errors import UserError
from core.gemma_config import layer_types
from core.prompt import PROMPT_FILE

TITLE = "Megatron-Bridge run folder (torch_dist)"
TRIED = "megatron-core 0.19.2 and 0.16.1, maps of megatron-bridge 0.6.2"
READS = {Checkpoint, Adapter}
WRITES = {Checkpoint: "", Adapter: ""}
SHARDS = True

RUN_CONFIG, STATE, TOKENIZER = "run_config.yaml", "train_state.pt", "tokenizer"
LATEST_STATE, LATEST = f"latest_{STATE}", "latest_checkpointed_iteration.txt"
LEGACY = "mp_rank_*/model_optim_rng.pt"
WRITTEN = "iter_0000000"
# Megatron-Bridge's TrainState, of no step.
COUNTS = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
FLAGS = ("do_train", "do_valid", "do_test")
CONTENT = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {"singleton_local_shards": False}}
WITHOUT = (  # of Gemma 3 and 4 that also see and hear, what is no part of the text model
    "vision_tower.",
    "vision_model.",
    "embed_vision.",
    "multi_modal_projector.",
    "audio_tower.",
    "embed_audio.",
)
# What `singleton_local_shards` keeps on its own: gate (w) and up (v) of a linear_fc1, and an expert.
GATE_OR_UP = re.compile(r"(.+\.linear_fc1\.weight)_([wv])")
EXPERT = re.compile(r"(.+\.experts\.experts\.)(\d+)\.(.+)")
# Modules that have a state: of Transformer Engine, of which versions differ in norms; of Megatron's own linear layers.
STATEFUL = re.compile(r"(.*(?:linear_(?:qkv|proj|fc1|fc2)|_?layernorm|per_layer_model_proj))\.weight")


def recognizes(path: Path) -> bool:
    if _is_iteration(path) or (path / LATEST).is_file() or (path / LATEST_STATE).is_file():
        return True
    return any(_is_iteration(folder) for folder in path.glob("iter_*"))


def _is_iteration(path: Path) -> bool:
    """Whether `path` is one, also of Megatron-LM or of Megatron FSDP, which are refused when they are read."""
    if (path / RUN_CONFIG).is_file() or any(path.glob(LEGACY)):
        return True
    return (path / CONFIG).is_file() and ((path / INDEX).is_file() or (path / COMMON).is_file())


def iteration_in(path: Path) -> Path:
    """The folder of the iteration that `path` is, or that the run folder `path` names as its last.

    Raises:
        UserError: none is named, or the one that is named is missing.
    """
    if _is_iteration(path):
        return path
    there = sorted(folder.name for folder in path.glob("iter_*") if folder.is_dir())
    if (path / LATEST_STATE).is_file():
        step = read_tensors(whole_file(path / LATEST_STATE)).get("step")
        if step is None or step.shape or step.dtype != torch.int64:
            raise UserError(f"{path / LATEST_STATE} does not say which iteration is the last; name one of {there}")
        named = f"iter_{step.read().item():07d}"
    elif (path / LATEST).is_file():
        with parsing(f"{path / LATEST}"):
            text = (path / LATEST).read_text(encoding="utf-8").strip()
            named = text if text == "release" else f"iter_{int(text):07d}"
    elif len(there) == 1:
        named = there[0]
    else:
        raise UserError(f"{path} does not say which iteration is the last; name one: {', '.join(there)}")
    if not (path / named).is_dir():
        raise UserError(f"{path} says that {named} is its last iteration, and holds {', '.join(there) or 'none'}")
    return path / named


def read(path: Path) -> Checkpoint | Adapter:
    """
    Raises:
        UserError: damaged, incomplete or hostile; a model of another kind, or in another of Megatron's formats.
    """
    folder = iteration_in(path)
    run, parts = read_run_config(folder), members(folder)
    tensors = text_model(read_distributed(parts, f"{folder}"), folder)
    tokenizer = files_below(parts, TOKENIZER)
    config = read_config(run, tokenizer, tensors, folder)
    if config["model_type"] in megatron_gemma4.FAMILIES:
        tensors = megatron_gemma4.number_layers(tensors, layer_types(config))
    if holds_adapter(tensors):
        adapter = read_adapter(tensors, parts, run, config, f"{folder / RUN_CONFIG}")
        adapter.base = recorded(path)[0] or base_named(run["model"].get("hf_model_id"), None)
        adapter.prompt = read_prompt(tokenizer.get(PROMPT_FILE))
        return adapter
    if config["model_type"] in megatron_gemma4.FAMILIES:
        found = megatron_gemma4.from_megatron(tensors, config)
    else:
        found = megatron_layout.from_megatron(tensors, config)
    names = [name for name in tokenizer if name not in ("config.json", PROMPT_FILE) and "/" not in name]
    files: dict[str, bytes | Path] = {name: folder / TOKENIZER / name for name in names}
    origin = {"name": f"{run['model']['hf_model_id']}"} if run["model"].get("hf_model_id") else {}
    return Checkpoint(config, found, files, read_prompt(tokenizer.get(PROMPT_FILE)), origin)


def read_config(
    run: Mapping[str, Any], tokenizer: Mapping[str, ByteRange], tensors: Mapping[str, LazyTensor], folder: Path
) -> dict[str, Any]:
    """`config.json` of the model that the run_config.yaml `run` describes: the one beside its tokenizer if they agree.

    Raises:
        UserError: it is of another model, or a field is missing or wrong.
    """
    where = f"{folder / RUN_CONFIG}"
    try:
        family = family_of(f"{run['model'].get('_target_') or run['model'].get('_builder_')}")
    except UserError as error:
        raise UserError(f"{where} is of {error}") from None
    with parsing(where):
        size = run["model"].get("vocab_size") or megatron_layout.embedding_rows(tensors)
        config = config_from(family, {**run["model"], "vocab_size": size})
    kept = json_file(tokenizer, "config.json")
    try:
        with parsing("config.json"):
            return kept if kept and provider_of(kept) == provider_of(config) else config
    except UserError:  # it is of something else
        return config


def read_run_config(folder: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: there is none, as in a folder of Megatron-LM, or it is damaged.
    """
    if any(folder.glob(LEGACY)):
        raise UserError(
            f"{folder} is of Megatron-LM's legacy format, one pickle for each GPU, which are not read. Have "
            f"Megatron-LM write torch_dist (--ckpt-convert-format torch_dist), then load that in Megatron-Bridge, "
            f"load_megatron_model, and save it with save_megatron_model"
        )
    if not (folder / RUN_CONFIG).is_file():
        raise UserError(
            f"{folder} has no {RUN_CONFIG}: it is a checkpoint of Megatron-LM, or a part of another, and does not say "
            f"which Gemma it is. Load it in Megatron-Bridge, load_megatron_model, and save it with save_megatron_model"
        )
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} has no {CONFIG}: it was saved by Megatron FSDP (fsdp_dtensor), or is not whole. Load it in "
            f"Megatron-Bridge and save it as torch_dist"
        )
    with parsing(f"{folder / RUN_CONFIG}"):
        run = yaml.safe_load(whole_file(folder / RUN_CONFIG).read())
        if not isinstance(run["model"], dict):
            raise ValueError("it has no model")
    return dict(run)


def text_model(tensors: Mapping[str, LazyTensor], folder: Path) -> dict[str, LazyTensor]:
    """The weights of the text model, without the prefixes of wrappers and without what an optimizer keeps."""
    found, beside = {}, 0
    for name, lazy in tensors.items():
        short = re.sub(r"^((model|module)\.)+", "", name)
        beside += short.startswith(WITHOUT)
        short = short.removeprefix("language_model.")
        if short.startswith(("decoder.", "embedding.", "output_layer.", "per_layer_")) and "_extra_state" not in short:
            found[short] = lazy
    if beside:
        print(f"{folder} has {beside} tensors of parts that see or hear, which are no part of the text model: left out")
    return join_singles(found)


def join_singles(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` with gate and up, and all experts of a layer, as one tensor again where Megatron was told to keep each
    on its own (`singleton_local_shards`).

    Raises:
        UserError: some of what belongs together is missing, or has another shape or dtype.
    """
    found = {name: lazy for name, lazy in tensors.items() if not GATE_OR_UP.fullmatch(name)}
    for name, gate in tensors.items():
        match = GATE_OR_UP.fullmatch(name)
        if match and match[2] == "w":
            parts = _alike([gate, tensors.get(f"{match[1]}_v")], match[1])
            shape = (2 * gate.shape[0], *gate.shape[1:])
            found[match[1]] = LazyTensor(shape, gate.dtype, partial(_read_all, parts, shape))
    experts: dict[str, dict[int, LazyTensor]] = defaultdict(dict)
    for name in list(found):
        if match := EXPERT.fullmatch(name):
            experts[match[1] + match[3]][int(match[2])] = found.pop(name)
    for name, numbered in experts.items():
        parts = _alike([numbered.get(number) for number in range(len(numbered))], name)
        shape = (len(parts), *parts[0].shape)
        found[name] = LazyTensor(shape, parts[0].dtype, partial(_read_all, parts, shape))
    return found


def _alike(parts: Sequence[LazyTensor | None], name: str) -> list[LazyTensor]:
    there = [part for part in parts if part is not None]
    if len(there) < len(parts) or len({(part.shape, part.dtype) for part in there}) > 1:
        raise UserError(f"the parts of {name} are not whole: one is missing or unlike the others")
    return there


def _read_all(parts: Sequence[LazyTensor], shape: tuple[int, ...]) -> Tensor:
    out = torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype)
    for number, part in enumerate(parts):
        out[number] = part.read()
    return out.view(shape)


def write(content: Checkpoint | Adapter, target: Path, shards: int = 1) -> None:
    """
    Args:
        shards: the number of files that the weights are divided among.

    Raises:
        UserError: a model that Megatron has no place for.
    """
    folder, files, config = target / WRITTEN, dict[str, bytes | Path](), content.config or {}
    is_4 = config["model_type"] in megatron_gemma4.FAMILIES
    if isinstance(content, Adapter):
        weights, settings = adapter_tensors(content)
        run = run_config(config, getattr(torch, content.dtype or "bfloat16"), content.base) | {"peft": settings}
    else:
        weights = (megatron_gemma4 if is_4 else megatron_layout).to_megatron(content.tensors, config)
        run, files = run_config(config, weights[megatron_layout.EMBEDDING].dtype, content.origin), dict(content.files)
    pieces = megatron_gemma4.pieces(weights, config) if is_4 else stack_layers(weights)
    of_modules = [] if isinstance(content, Adapter) else states(pieces)  # which an iteration of adapters does not have
    (folder / TOKENIZER).mkdir(parents=True)
    write_distributed(pieces, lambda name: (folder / name).open("wb"), shards, of_modules, CONTENT)
    files["config.json"] = json.dumps(config, indent=2).encode()
    for name, data in files.items():
        (folder / TOKENIZER / name).write_bytes(data.read_bytes() if isinstance(data, Path) else data)
    if content.prompt:
        content.prompt.save(folder / TOKENIZER)
    write_run(target, run)


def states(pieces: Iterable[Piece]) -> Iterator[str]:
    """The names of the states of the modules whose weights `pieces` are."""
    for piece in pieces:
        match = STATEFUL.fullmatch(piece.key)
        if match is None:
            continue
        at = [(piece.index, piece.count)] if piece.index is not None else []
        experts = range(piece.content.shape[0]) if ".experts." in piece.key else [None]
        for expert in experts:
            grid = [*at, *([(expert, len(experts))] if expert is not None else [])] or [(0, 1)]
            shard = "_".join(".".join(f"{pair[n]}" for pair in grid) for n in (0, 1))
            yield f"{match[1]}._extra_state/shard_{shard}"
            if match[1].endswith(".linear_qkv"):
                yield f"{match[1].removesuffix('linear_qkv')}core_attention._extra_state/shard_{shard}"


def write_run(target: Path, run: Mapping[str, Any]) -> None:
    """Make `target` a run folder, whose only iteration has its weights already: how it was run, and which it is."""
    state = {name: torch.tensor(0) for name in COUNTS} | {name: torch.tensor(False) for name in FLAGS}
    state["floating_point_operations_so_far"] = torch.tensor(0.0)
    for place in (target / WRITTEN / STATE, target / LATEST_STATE):
        torch.save(state, place)
    (target / LATEST).write_text("0")
    (target / WRITTEN / RUN_CONFIG).write_text(yaml.safe_dump(run, sort_keys=False))
