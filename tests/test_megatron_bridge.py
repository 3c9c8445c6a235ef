"""Megatron-Bridge's run folders of whole models: round trips, every layout of shards, and damage.

test_megatron_core.py holds the same to megatron-core itself.
"""

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from conftest import FAMILIES, tiny_gemma
from tiny_gemma4 import KINDS, tiny_gemma4

from converters import megatron
from converters.byte_ranges import members, whole_file
from converters.checkpoint import Checkpoint, LazyTensor, in_memory
from converters.conversion import read_source
from converters.convert import convert
from converters.distributed import INDEX, Piece, read_distributed, read_index, stack_layers, write_distributed
from converters.formats import detect, model_in
from core.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

ITERATION = "iter_0000000"
ALL = [*FAMILIES, *KINDS]


def checkpoint(family: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Checkpoint:
    model = tiny_gemma4(family, dtype, **options) if family in KINDS else tiny_gemma(family, dtype, **options)
    untied = options.get("tie_word_embeddings") is False
    tensors = {name: in_memory(t) for name, t in model.state_dict().items() if untied or name != "lm_head.weight"}
    return Checkpoint(json.loads(model.config.to_json_string()), tensors, {"tokenizer.model": b"pieces"})


def assert_same(found: Any, expected: Checkpoint) -> None:
    assert isinstance(found, Checkpoint) and set(found.tensors) == set(expected.tensors)
    for name, lazy in expected.tensors.items():
        tensor, read = lazy.read(), found.tensors[name].read()
        assert read.dtype == tensor.dtype and read.shape == found.tensors[name].shape, name
        assert torch.equal(read.contiguous().view(torch.int16), tensor.view(torch.int16)), name


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Checkpoint]]:
    """Family → a run folder of it, which is not to be changed, and what it was written from."""
    done: dict[str, tuple[Path, Checkpoint]] = {}

    def of(family: str) -> tuple[Path, Checkpoint]:
        if family not in done:
            folder = tmp_path_factory.mktemp(family) / "run"
            source = checkpoint(family)
            megatron.write(source, folder, shards=3)
            done[family] = folder, source
        return done[family]

    return of


@pytest.fixture
def run(written: Any, tmp_path: Path) -> Path:
    """A run folder of a Gemma 3 to damage."""
    return Path(shutil.copytree(written("gemma3_text")[0], tmp_path / "damaged"))


@pytest.mark.parametrize("family", ALL)
def test_round_trip_of_every_family(family: str, written: Any, tmp_path: Path) -> None:
    folder, source = written(family)
    assert len(list((folder / ITERATION).glob("*.distcp"))) == 3 and detect(folder) == "megatron"
    found = megatron.read(folder)
    assert found.config == source.config and set(found.files) == {"tokenizer.model"}
    assert_same(found, source)
    # Megatron-Bridge's own have no config.json: all that decides is in run_config.yaml.
    bare = Path(shutil.copytree(folder / ITERATION, tmp_path / ITERATION))
    (bare / "tokenizer/config.json").unlink()
    assert_same(read_source("megatron", bare), source)


def test_torch_reads_what_is_written_in_several_files(written: Any) -> None:
    folder, source = written("gemma")
    layers = source.config["num_hidden_layers"]
    expected = source.tensors["model.embed_tokens.weight"].read()
    down = torch.stack([source.tensors[f"model.layers.{n}.mlp.down_proj.weight"].read() for n in range(layers)])
    state = {
        "embedding.word_embeddings.weight": torch.zeros_like(expected),
        "decoder.layers.mlp.linear_fc2.weight": torch.zeros_like(down),
        f"decoder.layers.mlp.linear_fc1._extra_state/shard_1_{layers}": io.BytesIO(),
    }
    dcp.load(state, checkpoint_id=folder / ITERATION)
    assert torch.equal(state["embedding.word_embeddings.weight"], expected)
    assert torch.equal(state["decoder.layers.mlp.linear_fc2.weight"], down)


def rewrite(folder: Path, change: Callable[[dict[str, LazyTensor]], list[Piece]], target: Path) -> Path:
    """The iteration of `folder` with the tensors that `change` makes of those with numbered layers."""
    shutil.copytree(folder / ITERATION, target, ignore=shutil.ignore_patterns("*.distcp", INDEX))
    tensors = read_distributed(members(folder / ITERATION), "source")
    write_distributed(change(tensors), lambda name: (target / name).open("wb"))
    return target


def pad(lazy: LazyTensor) -> LazyTensor:
    return in_memory(torch.cat([lazy.read(), torch.full((40, lazy.shape[1]), 7.0).to(lazy.dtype)]))


def padded(tensors: dict[str, LazyTensor]) -> list[Piece]:
    rows = ("embedding.word_embeddings.weight", "per_layer_embedding.weight")
    return stack_layers({name: pad(lazy) if name in rows else lazy for name, lazy in tensors.items()})


def numbered(tensors: dict[str, LazyTensor]) -> list[Piece]:
    return [Piece(name, lazy) for name, lazy in tensors.items()]


def singles(tensors: dict[str, LazyTensor]) -> list[Piece]:
    found = {}
    for name, lazy in tensors.items():
        parts = {name: lazy.read()}
        if ".experts.experts." in name:
            parts = {
                name.replace(".experts.experts.", f".experts.experts.{number}."): expert
                for number, expert in enumerate(lazy.read())
            }
        for part, tensor in parts.items():
            halves = zip("wv", tensor.chunk(2), strict=True)
            split = {f"{part}_{half}": values for half, values in halves} if "linear_fc1.weight" in part else {}
            found |= split or {part: tensor}
    return [Piece(name, in_memory(tensor)) for name, tensor in found.items()]


def wrapped_beside_an_optimizer(tensors: dict[str, LazyTensor]) -> list[Piece]:
    state = {f"optimizer.state.exp_avg.module.{name}": lazy for name, lazy in tensors.items()}
    return stack_layers({f"module.{name}": lazy for name, lazy in tensors.items()} | state)


def seeing(tensors: dict[str, LazyTensor]) -> list[Piece]:
    tower = {"vision_tower.encoder.layers.0.weight": in_memory(torch.ones(2, 2))}
    return stack_layers({f"language_model.{name}": lazy for name, lazy in tensors.items()} | tower)


LAYOUTS = [(change, "gemma3_text") for change in (numbered, singles)]  # of two kinds of layers, see the next test
LAYOUTS += [
    (change, family)
    for change in (padded, wrapped_beside_an_optimizer, seeing)
    for family in ("gemma3_text", "e4b", "26b-a4b")
]


@pytest.mark.parametrize(("change", "family"), LAYOUTS)
def test_every_layout_is_read(change: Any, family: str, written: Any, tmp_path: Path) -> None:
    folder, source = written(family)
    assert_same(megatron.read(rewrite(folder, change, tmp_path / ITERATION)), source)


@pytest.mark.parametrize("change", [numbered, singles])
def test_layers_of_two_kinds_by_their_numbers(change: Any, written: Any, tmp_path: Path) -> None:
    folder, source = written("26b-a4b")

    def own_numbers(tensors: dict[str, LazyTensor]) -> list[Piece]:
        renamed = {
            name.replace("layers.0.self_attention_global", "layers.5.self_attention_global"): lazy
            for name, lazy in tensors.items()
        }
        return list(change(renamed))

    assert_same(megatron.read(rewrite(folder, own_numbers, tmp_path / ITERATION)), source)


@pytest.mark.parametrize(("family", "number", "groups"), [("31b", 0, 2), ("e2b", 9, 1)])
@pytest.mark.parametrize("missing", [False, True])
def test_what_nothing_reads_may_be_anything_or_missing(
    missing: bool, family: str, number: int, groups: int, written: Any, tmp_path: Path
) -> None:
    """Values of a layer whose values are its keys, or of one that borrows both: here of head size 32."""
    folder, source = written(family)
    name = f"decoder.layers.{number}.self_attention_global.linear_qkv.weight"

    def change(tensors: dict[str, LazyTensor]) -> list[Piece]:
        grouped = tensors[name].read().clone().unflatten(0, (groups, -1))
        grouped[:, -32:] = 5.0
        tensors[name] = in_memory((grouped[:, :-32] if missing else grouped).flatten(0, 1))
        return numbered(tensors) if family == "e2b" else stack_layers(tensors)

    assert_same(megatron.read(rewrite(folder, change, tmp_path / ITERATION)), source)


def test_an_output_layer_of_its_own(tmp_path: Path) -> None:
    source = checkpoint("gemma3_text", tie_word_embeddings=False)
    megatron.write(source, tmp_path / "run")
    model = yaml.safe_load((tmp_path / "run" / ITERATION / "run_config.yaml").read_text())["model"]
    assert model["share_embeddings_and_output_weights"] is False
    (tmp_path / "run" / ITERATION / "tokenizer/config.json").unlink()
    assert_same(megatron.read(tmp_path / "run"), source)


def test_windows_of_older_versions(written: Any, tmp_path: Path) -> None:
    """Gemma 2: Megatron-Bridge 0.3.1 writes the window itself, 0.6.2 one less."""
    folder, source = written("gemma2")
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / ITERATION / "tokenizer/config.json").unlink()
    file = run / ITERATION / "run_config.yaml"
    settings = yaml.safe_load(file.read_text())
    window = source.config["sliding_window"]
    assert settings["model"]["window_size"] == [window - 1, 0]
    settings["model"]["window_size"] = [window, 0]
    settings["model"]["_target_"] += "2B"
    file.write_text(yaml.safe_dump(settings))
    assert megatron.read(run).config["sliding_window"] == window


def test_the_last_iteration_is_read(run: Path) -> None:
    (run / ITERATION).rename(run / "iter_0000012")
    shutil.copytree(run / "iter_0000012", run / "iter_0000100")
    with pytest.raises(UserError, match="says that iter_0000000 is its last iteration, and holds iter_0000012, iter_"):
        megatron.read(run)
    torch.save({"step": torch.tensor(12)}, run / "latest_train_state.pt")
    assert megatron.iteration_in(run).name == "iter_0000012"
    (run / "latest_train_state.pt").unlink()
    (run / "latest_checkpointed_iteration.txt").write_text("100\n")
    assert megatron.iteration_in(run).name == "iter_0000100"
    (run / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(UserError, match="does not say which iteration is the last; name one: iter_0000012, iter_"):
        megatron.read(run)
    assert megatron.recognizes(run / "iter_0000012")


def test_other_formats_of_megatron_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    legacy = tmp_path / "old" / "iter_0005000"
    (legacy / "mp_rank_00").mkdir(parents=True)
    (legacy / "mp_rank_00/model_optim_rng.pt").write_bytes(pickle.dumps("anything"))
    for path in (legacy, legacy.parent):
        assert detect(model_in(path)) == "megatron"
        with pytest.raises(UserError, match=r"legacy format, one pickle for each GPU.* write torch_dist"):
            megatron.read(path)
    (run / ITERATION / "metadata.json").rename(tmp_path / "metadata.json")
    with pytest.raises(UserError, match=r"Megatron FSDP \(fsdp_dtensor\)"):
        megatron.read(run)
    (tmp_path / "metadata.json").rename(run / ITERATION / "metadata.json")
    (run / ITERATION / "run_config.yaml").unlink()
    with pytest.raises(UserError, match=r"has no run_config.yaml: it is a checkpoint of Megatron-LM"):
        megatron.read(run)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another model": (
        lambda model: model.update(_target_="megatron.bridge.models.llama.LlamaProvider"),
        "only the Gem",
    ),
    "code": (lambda model: model.update(_target_="os.system"), "is of a model of os.system; only the Gemmas"),
    "no class": (lambda model: model.pop("_target_"), "only the Gemmas of Megatron-Bridge are known"),
    "a field is missing": (lambda model: model.pop("hidden_size"), "run_config.yaml is damaged .*hidden_size"),
    "a field is a word": (lambda model: model.update(num_layers="two"), "run_config.yaml|num_hidden_layers"),
    "more layers": (lambda model: model.update(num_layers=9), "the model has no decoder.layers"),
    "fewer layers": (lambda model: model.update(num_layers=1), "which no Gemma of its family has"),
    "other widths": (lambda model: model.update(ffn_hidden_size=7), "by the model's configuration it should be"),
    "a huge size": (lambda model: model.update(ffn_hidden_size=1 << 50), "sizes that no model has"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_configuration_is_said(what: str, run: Path) -> None:
    file = run / ITERATION / "run_config.yaml"
    settings = yaml.safe_load(file.read_text())
    change, message = WRONG[what]
    change(settings["model"])
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=message):
        read_source("megatron", run)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hostile",)


def test_no_pickle_is_run(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hostile, index = pickle.dumps(Hostile()), (run / ITERATION / INDEX).read_bytes()
    (run / ITERATION / "common.pt").write_bytes(hostile)
    (run / ITERATION / "train_state.pt").write_bytes(hostile)
    assert megatron.read(run)  # neither is read
    torch.save({"step": Hostile()}, run / "latest_train_state.pt")
    with pytest.raises(UserError, match="would run code"):
        megatron.read(run)
    (run / "latest_train_state.pt").unlink()
    (run / ITERATION / INDEX).write_bytes(hostile)
    with pytest.raises(UserError, match="not one to trust"):
        megatron.read(run)
    # A name for the class that an index's paths are of, then BUILD, which would give that class an attribute.
    on_the_class = b"\x80\x04cpathlib\nPosixPath\nN}X\x06\0\0\0markedX\x03\0\0\0yess\x86b0"
    (run / ITERATION / INDEX).write_bytes(on_the_class + index[2:])
    with pytest.raises(UserError, match="not one to trust"):
        megatron.read(run)
    assert not hasattr(PurePosixPath, "marked")
    (run / ITERATION / "run_config.yaml").write_text("model: !!python/object/apply:os.mkdir [hostile]")
    with pytest.raises(UserError, match=r"run_config\.yaml is damaged"):
        megatron.read(run)
    assert not (tmp_path / "hostile").exists()


def test_an_index_whose_parts_are_not_one_another_s_is_damaged(run: Path) -> None:
    """Which no comparison of what is read with what is written would show, as both are read by it."""
    file = run / ITERATION / INDEX
    index = read_index(whole_file(file))
    one, other = [item for item in index.storage_data if item.fqn.endswith("layernorm.weight")][:2]
    right = index.storage_data[one]
    index.storage_data[one] = index.storage_data[other]
    file.write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"\.metadata is damaged: a part of .* has the place of another"):
        megatron.read(run)
    index.storage_data[one] = right

    key = next(item for item in index.storage_data if item.fqn.endswith("word_embeddings.weight") and item.offset[0])
    (chunk,) = [part for part in index.state_dict_metadata[key.fqn].chunks if part.offsets == key.offset]
    chunk.offsets = torch.Size((key.offset[0] - 1, *key.offset[1:]))
    index.storage_data[replace(key, offset=chunk.offsets)] = index.storage_data.pop(key)
    file.write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match="is damaged: shards of it overlap"):
        megatron.read(run).tensors["model.embed_tokens.weight"].read()


def test_what_a_run_config_says_is_bounded(run: Path) -> None:
    file = run / ITERATION / "run_config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["model"]["num_layers"] = 10**9
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="num_layers is 1000000000"):
        megatron.read(run)


def test_layers_of_several_dtypes_are_refused_by_name(written: Any, tmp_path: Path) -> None:
    source = written("gemma3_text")[1]
    name = "model.layers.1.self_attn.q_norm.weight"
    mixed = replace(source, tensors={**source.tensors, name: in_memory(source.tensors[name].read().float())})
    with pytest.raises(UserError, match=r"q_layernorm.* is one tensor of all layers .* in one dtype first"):
        megatron.write(mixed, tmp_path / "run")


def test_damage_is_said_or_harmless(run: Path, written: Any) -> None:
    """Whatever bit flips: an error in one sentence, or the same model."""
    source, chance = written("gemma3_text")[1], random.Random(0)
    files = [run / "latest_train_state.pt", *(run / ITERATION).glob("*.distcp"), run / ITERATION / INDEX]
    files += [run / ITERATION / name for name in ("run_config.yaml", "metadata.json")]
    outcomes = set()
    for turn in range(35):
        file = files[turn % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        file.write_bytes(bad)
        try:
            found = read_source("megatron", run)
            assert isinstance(found, Checkpoint)
            for name, lazy in found.tensors.items():
                assert torch.equal(lazy.read(), source.tensors[name].read()), (file, name)
            outcomes.add("harmless")
        except UserError:
            outcomes.add("said")
        file.write_bytes(good)
    assert outcomes == {"harmless", "said"}


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_shard_that_is_not_whole(how: str, run: Path) -> None:
    shard = run / ITERATION / "__1_0.distcp"
    if how == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match=r"__1_0\.distcp is (missing|cut off)"):
        for lazy in megatron.read(run).tensors.values():
            lazy.read()


def test_a_conversion_is_proven(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(tiny_base, "megatron", tmp_path / "run", shards=2)
    record = json.loads((tmp_path / "run/conversion.json").read_text())
    assert record["to"] == "megatron" and record["proof"]["max_logit_difference"] == 0
    assert {f"{ITERATION}/__1_0.distcp", f"{ITERATION}/.metadata"} < set(record["files"])
    convert(tmp_path / "run", "hf", tmp_path / "back")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tiny_base / name).read_bytes(), name
    with pytest.raises(UserError, match="shards=2 is for to=megatron"):
        convert(tiny_base, "hf", tmp_path / "out", shards=2)
