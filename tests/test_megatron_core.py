"""What is read and written for Megatron-Bridge, against NVIDIA's own code: its maps, and checkpoints of megatron-core.

Both are in `.venv-megatron` (make megatron-env). Megatron-Bridge 0.6.2 needs a GPU's libraries to be imported: of its
modules the maps are run, with nothing behind what they import, and the functions that join and split.
"""

import ast
import builtins
import json
import os
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from conftest import FAMILIES, ROOT, TINY, TINY_FAMILY
from tiny_gemma4 import KINDS, tiny_gemma4
from torch import Tensor
from transformers import AutoConfig

from converters import megatron, megatron_gemma4, megatron_layout
from converters.checkpoint import Adapter, Checkpoint, LazyTensor
from converters.megatron_modules import modules
from converters.megatron_run_config import run_config
from converters.merge_lora import lora_updates
from core.gemma_config import write_both_dialects

ENVIRONMENT = ROOT / ".venv-megatron"
BRIDGE = ENVIRONMENT / "bridge/megatron/bridge"
HERE = "NVIDIA's own code is not here: make megatron-env"
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(not BRIDGE.is_dir(), reason=HERE)]

Maps = dict[str, tuple[str, dict[str, str]]]  # Megatron's tensor → kind of map, Hugging Face's tensors by their role
MODELS = [*FAMILIES, *KINDS]


def config_of(model: str) -> dict[str, Any]:
    """`config.json` of the tiny model, with four layers or more, for two pipeline stages."""
    if model in KINDS:
        return write_both_dialects(json.loads(tiny_gemma4(model).config.to_json_string()))
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if model != "gemma" else {}
    sizes = TINY | TINY_FAMILY[model] | {"vocab_size": 300, "num_hidden_layers": 4} | kinds
    return dict(json.loads(AutoConfig.for_model(model, **sizes).to_json_string()))


# Megatron-Bridge's own maps


class Recorded:
    """A map of Megatron-Bridge, which is only asked what it was made with."""

    def __init__(self, megatron_param: str, hf_param: str | None = None, **parts: str) -> None:
        self.megatron, self.parts = megatron_param, parts or {"": f"{hf_param}"}


def maps(model: str, config: Mapping[str, Any]) -> Maps:
    """What Megatron-Bridge's map of `model` says, run with nothing behind its imports."""
    name = {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"}.get(model, "gemma4")
    classes: dict[str, Any] = {
        "MegatronModelBridge": type("B", (), {"register_bridge": staticmethod(lambda **_: lambda bridge: bridge)}),
        "MegatronMappingRegistry": lambda *every: every,
    }
    behind = MagicMock()  # configuration classes and the like, which maps never ask

    def importing(module: str, *others: Any) -> Any:
        if module.partition(".")[0] not in ("megatron", "transformers"):
            return builtins.__import__(module, *others)
        found = types.SimpleNamespace()
        for wanted in others[2]:
            recorder = type(wanted, (Recorded,), {"register_module_type": staticmethod(lambda *_: None)})
            setattr(found, wanted, classes.get(wanted) or (recorder if wanted.endswith("Mapping") else behind))
        return found

    scope: dict[str, Any] = {"__builtins__": {**vars(builtins), "__import__": importing}, "__name__": name}
    exec((BRIDGE / f"models/gemma/{name}_bridge.py").read_text(), scope)
    bridge = next(value() for key, value in scope.items() if key.endswith("Bridge") and key.startswith("Gemma"))
    bridge._is_dense = not config.get("enable_moe_block")
    bridge.hf_config = types.SimpleNamespace(**config)
    return {one.megatron: (type(one).__mro__[-3].__name__, one.parts) for one in bridge.mapping_registry()}


def function(name: str) -> Callable[..., Any]:
    """The function `name` of Megatron-Bridge's param_mapping.py, alone."""
    tree = ast.parse((BRIDGE / "models/conversion/param_mapping.py").read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    scope: dict[str, Any] = {"torch": torch, **vars(typing), "TransformerConfig": object}
    exec(compile(ast.Module(found, []), name, "exec"), scope)
    return scope[name]  # type: ignore[no-any-return]


def attention(config: Mapping[str, Any], number: int) -> Any:
    """What Megatron-Bridge's functions ask of the configuration of layer `number`."""
    own = number_of(config, number)
    return types.SimpleNamespace(num_attention_heads=own[0], num_query_groups=own[1], kv_channels=own[2])


def number_of(config: Mapping[str, Any], number: int) -> tuple[int, int, int]:
    heads, groups, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    if "global_head_dim" in config and config["layer_types"][number] == "full_attention":
        own = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
        return heads, own or groups, config["global_head_dim"]
    return heads, groups, head


def star(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def ours(config: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Our map of a model: Megatron's tensor → Hugging Face's in each layer, with * for the layer's number."""
    if config["model_type"] in megatron_gemma4.FAMILIES:
        found = {name: [*place.parts] for name, place in megatron_gemma4.places(config).items()}
    else:
        found = {name: [*parts] for name, parts in megatron_layout.layout(megatron_layout.Sizes.of(config)).items()}
    starred: dict[str, list[list[str]]] = {}
    for name, parts in found.items():
        starred.setdefault(star(name), []).append([star(part) for part in parts])
    return starred


@pytest.mark.parametrize("model", MODELS)
def test_every_name_is_that_of_megatron_bridge(model: str) -> None:
    config = config_of(model)
    theirs, mine = maps(model, config), ours(config)
    for name, (_, parts) in theirs.items():
        # Of experts, the model has a tensor each, the checkpoint one of all.
        stored = name.replace("mlp.experts.", "mlp.experts.experts.").removesuffix("*")
        if stored not in mine:  # a model without per-layer embeddings has nothing under their names
            assert "per_layer" in name and not config.get("hidden_size_per_layer_input"), name
            continue
        expected = [parts[role] for role in ("q", "k", "v", "gate", "up", "") if role in parts]
        layers = mine.pop(stored)  # of which some may have no values, or neither keys nor values
        assert expected in layers and all(own == expected[: len(own)] for own in layers), name
    assert not mine, f"Megatron-Bridge has no {', '.join(mine)}"


@pytest.mark.parametrize("model", MODELS)
def test_queries_keys_and_values_are_joined_as_megatron_bridge_does(model: str) -> None:
    config = config_of(model)
    merge, split = function("merge_qkv_weights"), function("split_qkv_weights")
    for number, layer in enumerate(modules(config)):
        theirs = attention(config, number)
        heads, groups, head = vars(theirs).values()
        theirs.hidden_size, linear = config["hidden_size"], layer["self_attention.linear_qkv"]
        q, k, v = (torch.randn(rows * head, theirs.hidden_size) for rows in (heads, groups, groups))
        joined = merge(theirs, q, k, v)
        assert tuple(joined.shape) == linear.shape
        expected = [q, k, v][: len(linear.parts)]
        assert all(map(torch.equal, linear.split(joined), expected))
        assert all(map(torch.equal, linear.split(linear.join(expected)), expected))
        if len(expected) == 3:
            assert torch.equal(linear.join(expected), joined)
        adapter = torch.randn(len(joined), 5)  # linear_out of rank 5
        pieces = split(theirs, adapter, feature_dim=5)
        assert all(map(torch.equal, linear.split(adapter), pieces))


# Checkpoints that megatron-core writes and reads


def core(jobs: list[dict[str, Any]]) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ENVIRONMENT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    # By -c: processes that megatron-core begins to write files would import a program that was named once more.
    program = "import run_megatron_core; run_megatron_core.main()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input=json.dumps(jobs) + "\n",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def expected_of(model: str, config: Mapping[str, Any], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors of megatron-core's `whole` ones, by Megatron-Bridge's map and functions."""
    split, found = function("split_qkv_weights"), {}
    theirs = maps(model, config)
    local = {
        "input_layernorm": "self_attention.linear_qkv.layer_norm",
        "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm",
    }
    named: dict[str, Tensor] = {}
    for name, tensor in whole.items():  # megatron-core's own layers have norms of their own
        key = name
        for own, fused in local.items():
            other = key.replace(f".{own}.weight", f".{fused}_weight")
            key = other if star(other) in theirs else key
        named[key] = tensor
    experts = {name.split(".local_experts.")[0]: 0 for name in named if ".local_experts." in name}
    for place in experts:
        for part in ("linear_fc1", "linear_fc2"):
            each = [named.pop(f"{place}.local_experts.{e}.{part}.weight") for e in range(config["num_experts"])]
            named[f"{place}.{part}.weight*"] = torch.stack(each)
    for name, tensor in named.items():
        numbers = [part for part in name.split(".") if part.isdigit()]
        kind, parts = theirs[star(name)]
        parts = {role: part.replace("*", *numbers) if numbers else part for role, part in parts.items()}
        if {*parts} == {"q", "k", "v"}:
            q, k, v = split(attention(config, int(numbers[0])), tensor, feature_dim=tensor.shape[1])
            found |= {parts["q"]: q, parts["k"]: k, parts["v"]: v}
        elif {*parts} == {"gate", "up"}:
            found |= dict(zip((parts["gate"], parts["up"]), tensor.chunk(2), strict=True))
        else:
            assert len(parts) == 1, kind
            found[parts[""]] = tensor
    return found


def read(tensors: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    return {name: lazy.read() for name, lazy in tensors.items()}


def parallel(model: str) -> dict[str, int]:
    # Megatron-Bridge itself has dense Gemma 4 with one pipeline stage only.
    return {"tensor": 2, "pipeline": 2, "expert": 2 if model == "26b-a4b" else 1}


ONE = {"tensor": 1, "pipeline": 1, "expert": 1}


LORAS = {
    "lora": {"rank": 4, "canonical": False, "dora": False},
    "canonical": {"rank": 4, "canonical": True, "dora": False},
    "dora": {"rank": 4, "canonical": False, "dora": True},
}
ADAPTERS = [
    *((model, "lora") for model in ("gemma2", "26b-a4b")),
    *((model, "canonical") for model in ("gemma3_text", "e2b", "26b-a4b", "31b")),
    *((model, "dora") for model in ("gemma", "12b")),
]
RUNS = [*((model, "") for model in MODELS), *ADAPTERS]
APART = ("canonical", "dora")  # of which a tensor is stored by rank
CLASSES = {"lora": "lora.LoRA", "canonical": "canonical_lora.CanonicalLoRA", "dora": "dora.DoRA"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each model and adapter a run that megatron-core wrote as several processes, and what it reads from that."""
    folder, jobs = tmp_path_factory.mktemp("theirs"), []
    for model, kind in RUNS:
        run = folder / f"{model}{kind}"
        job = {"config": config_of(model), "folder": f"{run / 'iter_0000010'}", "lora": LORAS.get(kind)}
        jobs.append({"do": "write", **job, **parallel(model)})
        layouts = [ONE, parallel(model)] if kind in APART else [ONE]
        jobs += [{"do": "dump", **job, **layout, "to": f"{run}.pt"} for layout in layouts]
    core(jobs)
    for model, kind in RUNS:
        settings = run_config(config_of(model), torch.float32, {})
        settings["model"]["tensor_model_parallel_size"] = 2
        if kind:
            settings["peft"] = {"_target_": f"megatron.bridge.peft.{CLASSES[kind]}", "dim": 4, "alpha": 8}
        run = folder / f"{model}{kind}"
        (run / "iter_0000010" / megatron.RUN_CONFIG).write_text(yaml.safe_dump(settings))
        (run / megatron.LATEST).write_text("10")
    return folder


@pytest.fixture(scope="module")
def returned(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each what is read from `written` and was written again here, as megatron-core reads that with several
    processes, saves it, and reads it again."""
    folder, jobs = tmp_path_factory.mktemp("ours"), []
    for model, kind in RUNS:
        run, again = folder / f"{model}{kind}", f"{folder / f'again-{model}{kind}'}"
        megatron.write(megatron.read(written / f"{model}{kind}"), run, shards=1 if kind else 3)
        job = {"config": config_of(model), "folder": f"{megatron.iteration_in(run)}", "lora": LORAS.get(kind)}
        jobs.append({"do": "resave", **job, **parallel(model), "to": again})
        jobs.append({"do": "dump", **job, **ONE, "folder": again, "to": f"{run}.pt"})
    core(jobs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_megatron_core_writes_what_is_read(model: str, written: Path) -> None:
    found = megatron.read(written / model)
    assert isinstance(found, Checkpoint)
    whole = torch.load(written / f"{model}.pt", weights_only=True)
    same(read(found.tensors), expected_of(model, config_of(model), whole))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_megatron_core_reads_what_is_written(model: str, written: Path, returned: Path) -> None:
    found = megatron.read(written / model)
    assert isinstance(found, Checkpoint)
    whole = torch.load(returned / f"{model}.pt", weights_only=True)
    same(read(found.tensors), expected_of(model, config_of(model), whole))


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Whether all of `found` is in `expected`, whose vocabulary may be padded."""
    assert found
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name][: len(tensor)]), name


def changes_of(model: str, run: Path, of_each_rank: bool) -> dict[str, tuple[Tensor, ...]]:
    """Hugging Face's layer → what the adapter in `run`.pt adds to it, and its magnitudes, from megatron-core's tensors
    and Megatron-Bridge's maps. Of experts [experts, out, in].

    Args:
        of_each_rank: two tensors are taken from `run`.pt.0 …, as 0.6.2 only gets them right with as many tensor
            parallel ranks as wrote them.
    """
    config = config_of(model)
    whole = torch.load(f"{run}.pt", weights_only=True)
    stages, layers = parallel(model)["pipeline"], config["num_hidden_layers"]
    several = range(2 * stages if of_each_rank else 0)
    ranks = [torch.load(f"{run}.pt.{rank}", weights_only=True) for rank in several]
    theirs, split, changes = maps(model, config), function("split_qkv_weights"), {}

    def of_ranks(name: str) -> Tensor:
        """Each rank's rows, one rank's after the other's."""
        number, stage = int(name.split(".")[2]), int(name.split(".")[2]) // (layers // stages)
        own = name.replace(f".{number}.", f".{number - stage * (layers // stages)}.", 1)
        return torch.cat([ranks[2 * stage + rank][own] for rank in (0, 1)])

    for name in [name for name in whole if name.endswith("linear_in.weight")]:
        place, _, part = name.removesuffix(".linear_in.weight").partition(".adapter")
        number, prefix = int(place.split(".")[2]), name.removesuffix("linear_in.weight")
        out = f"{prefix}linear_out.weight"
        b = of_ranks(out) if of_each_rank and part and ".linear_fc1." in out else whole[out]
        change = 8 / 4 * b.double() @ whole[name].double()
        magnitude = whole.get(f"{prefix}weight_magnitude")
        if of_each_rank and magnitude is not None and place.endswith("linear_fc1"):
            halves = [rank.chunk(2) for rank in of_ranks(f"{prefix}weight_magnitude").chunk(2)]
            magnitude = torch.cat([half[n] for n in (0, 1) for half in halves])
        starred = place.replace(f".{number}.", ".*.", 1)
        expert = re.sub(r"local_experts\.(\d+)\.", "", starred)
        _, parts = theirs[f"{expert}.weight{'*' if expert != starred else ''}"]
        both = [change] if magnitude is None else [change, magnitude]
        if part:
            pieces = {part.removeprefix(".adapter_"): tuple(both)}
        elif {*parts} == {"q", "k", "v"}:
            each = [
                split(attention(config, number), one.reshape(len(one), -1), feature_dim=one.numel() // len(one))
                for one in both
            ]
            pieces = dict(zip("qkv", zip(*each, strict=True), strict=True))
        elif {*parts} == {"gate", "up"}:
            pieces = dict(zip(("gate", "up"), zip(*(one.chunk(2) for one in both), strict=True), strict=True))
        else:
            pieces = {"": tuple(both)}
        for role, values in pieces.items():
            layer = parts[role].replace("*", f"{number}", 1).removesuffix(".weight")
            changes.setdefault(layer, []).append(values)
    return {
        layer: tuple(torch.stack(one) for one in zip(*values, strict=True)) if "experts" in layer else values[0]
        for layer, values in changes.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), ADAPTERS)
def test_adapters_of_megatron_core_are_read(model: str, kind: str, written: Path) -> None:
    found = megatron.read(written / f"{model}{kind}")
    assert isinstance(found, Adapter)
    equal(found, changes_of(model, written / f"{model}{kind}", kind in APART))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), ADAPTERS)
def test_adapters_that_are_written_are_read_by_megatron_core(
    model: str, kind: str, written: Path, returned: Path
) -> None:
    found = megatron.read(written / f"{model}{kind}")
    assert isinstance(found, Adapter)
    equal(found, changes_of(model, returned / f"{model}{kind}", of_each_rank=False))


def equal(adapter: Adapter, changes: Mapping[str, tuple[Tensor, ...]]) -> None:
    updates = lora_updates(adapter, Path("it"))
    assert updates
    for layer, update in updates.items():
        expected = changes[layer]
        change = update.scale * update.lora_b.double() @ update.lora_a.double()
        assert torch.allclose(change, expected[0].reshape(change.shape), atol=1e-12), layer
        if update.magnitudes is not None:
            assert torch.equal(update.magnitudes, expected[1].flatten()), layer
