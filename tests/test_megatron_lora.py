"""Megatron-Bridge's LoRA: what an adapter of peft computes, and does again when it comes back; damage and refusals."""

import json
import pickle
import random
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FAMILIES, tiny_gemma
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from test_gemma4_conversion import EXPERTS, SEVEN, quick
from test_megatron import Evil, assert_same, spoiled
from tiny_gemma4 import KINDS, tiny_folder4, tiny_gemma4
from torch import Tensor

from converters import megatron, megatron_gemma4, megatron_layout
from converters.adapter import LORA_TENSOR, lora_settings
from converters.byte_ranges import members
from converters.checkpoint import Adapter, in_memory
from converters.convert import convert
from converters.distributed import Piece, read_distributed, write_distributed
from converters.megatron_adapter import CANONICAL, DORA, LORA, adapter_tensors
from converters.megatron_modules import modules
from converters.merge_lora import lora_updates, weight_name
from core.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = [*FAMILIES, *KINDS]
ITERATION = "iter_0000000"


def adapter_of(model: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Adapter:
    """What peft saves of an adapter of `model` whose every number is random."""
    base = tiny_gemma4(model) if model in KINDS else tiny_gemma(model, vocab_size=300)
    experts = {"target_parameters": EXPERTS} if model == "26b-a4b" and "use_dora" not in settings else {}
    found = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": SEVEN, **experts} | settings))
    torch.manual_seed(1)
    for name, parameter in found.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tensors = {name: tensor.to(dtype).clone() for name, tensor in get_peft_model_state_dict(found).items()}
    config = json.loads(base.config.to_json_string())
    peft = found.peft_config["default"].to_dict() | {"peft_type": "LORA"}
    return Adapter(lora_settings(peft, tensors, Path("it")), tensors, {}, config, None, "bfloat16")


def changes(adapter: Adapter) -> dict[str, Tensor]:
    """Each weight of Hugging Face that the adapter changes → what is added to it, float64."""
    updates = lora_updates(adapter, Path("it"))
    return {
        weight_name(layer): update.scale * update.lora_b.double() @ update.lora_a.double()
        for layer, update in updates.items()
    }


def written(adapter: Adapter, folder: Path) -> Path:
    megatron.write(adapter, folder)
    assert megatron.recognizes(folder) and megatron.recognizes(folder / ITERATION)
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / ITERATION / megatron.RUN_CONFIG).read_text()))


def put_settings(folder: Path, **sections: Mapping[str, Any]) -> None:
    run = settings_of(folder)
    for section, values in sections.items():
        run[section] = {**run[section], **values}
    (folder / ITERATION / megatron.RUN_CONFIG).write_text(yaml.safe_dump(run))


@pytest.mark.parametrize("model", quick("gemma2", "e2b", "26b-a4b", of=MODELS))
def test_every_adapter_comes_back_as_it_was(model: str, tmp_path: Path) -> None:
    adapter = adapter_of(model)
    back = megatron.read(written(adapter, tmp_path / "run"))
    assert isinstance(back, Adapter) and settings_of(tmp_path / "run")["peft"]["_target_"] == CANONICAL
    assert_same(back.tensors, adapter.tensors)
    assert {key: back.peft[key] for key in ("r", "lora_alpha")} == {"r": 4, "lora_alpha": 8}
    assert back.dtype == "bfloat16" and not (tmp_path / "run").joinpath("adapter_config.json").exists()


@pytest.mark.parametrize("model", quick("gemma3_text", "31b", of=MODELS))
@pytest.mark.parametrize("shared", [True, False], ids=["joined", "canonical"])
def test_megatron_adds_what_peft_adds(model: str, shared: bool) -> None:
    adapter = adapter_of(model, torch.float32)
    if shared:  # as in an adapter that Megatron trained: q, k and v have one lora_A
        for name in adapter.tensors:
            source = re.sub(r"[kv]_proj.lora_A", "q_proj.lora_A", name).replace("up_proj.lora_A", "gate_proj.lora_A")
            adapter.tensors[name] = adapter.tensors[source]
    tensors, settings = adapter_tensors(adapter)
    assert (settings["_target_"], settings["dim"], settings["alpha"]) == (LORA if shared else CANONICAL, 4, 8)
    base = tiny_gemma4(model) if model in KINDS else tiny_gemma(model, vocab_size=300)
    added = changes(adapter)
    weights = {
        name: in_memory(added.get(name, torch.zeros(tensor.shape, dtype=torch.float64)))
        for name, tensor in base.state_dict().items()
        if name != "lm_head.weight"
    }
    layout = megatron_gemma4 if model in KINDS else megatron_layout
    seen = set()
    for name, lazy in layout.to_megatron(weights, adapter.config or {}).items():
        place = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.weight", name)
        module = modules(adapter.config or {})[int(place[1])].get(place[2]) if place else None
        if not place or not module:
            continue
        parts = [""]
        if not shared and not module.experts and (module.groups or len(module.parts) > 1):
            parts = [f".adapter_{part.rpartition('.')[2].removesuffix('_proj')}" for part in module.parts]
        found = [
            2
            * tensors[f"{prefix}.linear_out.weight"].read().double()
            @ tensors[f"{prefix}.linear_in.weight"].read().double()
            for prefix in (f"{name.removesuffix('.weight')}.adapter{part}" for part in parts)
        ]
        expected = [lazy.read()] if not module.groups and parts == [""] else [*module.split(lazy.read())]
        if parts == [""] and module.groups:
            found = [*module.split(found[0])]
        assert all(map(torch.allclose, found, expected)), name
        seen.add(place[2])
    assert len(seen) == (6 if model == "26b-a4b" else 4)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["up_proj", "o_proj"]], ids=str)
def test_what_peft_does_not_adapt_is_zero_and_is_left_out_again(targets: list[str], tmp_path: Path) -> None:
    adapter = adapter_of("gemma3_text", target_modules=targets, layers_to_transform=[0, 2])
    back = megatron.read(written(adapter, tmp_path / "run"))
    assert_same(back.tensors, adapter.tensors)


def test_experts_alone_are_named_alone(tmp_path: Path) -> None:
    adapter = adapter_of("26b-a4b", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    written(adapter, tmp_path / "run")
    peft = settings_of(tmp_path / "run")["peft"]
    assert peft["target_modules"] == ["*.mlp.experts.linear_fc2", "linear_q", "linear_k", "linear_v"]
    assert peft["share_expert_adapters"] is False
    assert_same(megatron.read(tmp_path / "run").tensors, adapter.tensors)


def test_other_ranks_and_scales_keep_what_they_add(tmp_path: Path) -> None:
    ranks = {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"o_proj": 4}, "use_rslora": True}
    adapter = adapter_of("gemma2", torch.float32, **ranks)
    back = megatron.read(written(adapter, tmp_path / "run"))
    assert isinstance(back, Adapter)
    found, expected = changes(back), changes(adapter)
    assert found.keys() == expected.keys() and all(torch.allclose(found[name], expected[name]) for name in found)
    assert back.peft["rank_pattern"]["q_proj"] == 2


@pytest.mark.parametrize("model", ["gemma2", "31b"])
def test_dora_is_joined(model: str, tmp_path: Path) -> None:
    adapter = adapter_of(model, use_dora=True)
    back = megatron.read(written(adapter, tmp_path / "run"))
    assert settings_of(tmp_path / "run")["peft"]["_target_"] == DORA
    assert_same(back.tensors, adapter.tensors)


def rewrite(folder: Path, change: Any) -> None:
    """Write the tensors of a run again, as `change` of them by name."""
    iteration = folder / ITERATION
    tensors = change({name: lazy.read() for name, lazy in read_distributed(members(iteration), "it").items()})
    parts = {name: re.fullmatch(r"(.*layers\.)(\d+)\.(.*)", name) for name in tensors}
    keys = {name: part[1] + part[3] for name, part in parts.items() if part}
    counts = Counter(keys.values())
    pieces = []
    for name, tensor in tensors.items():
        place = (int(part[2]), counts[keys[name]]) if (part := parts[name]) else ()
        pieces.append(Piece(keys.get(name, name), in_memory(tensor), *place))
    write_distributed(pieces, lambda name: (iteration / name).open("wb"))


@pytest.mark.parametrize("kept", ["once", "outer", "normalized"])
def test_experts_that_share_an_adapter_have_it_each_in_peft(kept: str, tmp_path: Path) -> None:
    adapter = adapter_of("26b-a4b", target_modules=["q_proj"])
    written(adapter, tmp_path / "run")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        once = {"once": ("linear_in", "linear_out"), "outer": ("fc1.adapter.linear_in", "fc2.adapter.linear_out")}
        found = {}
        for name, tensor in tensors.items():
            if ".experts." in name and kept == "normalized":  # half of dim for two experts of a token
                tensor = tensor[..., :2, :] if "linear_in" in name else tensor[..., :2]
            elif ".experts." in name and any(part in name for part in once[kept]):
                tensor = tensor[0]
            found[name] = tensor.contiguous()
        return found

    rewrite(tmp_path / "run", change)
    back = megatron.read(tmp_path / "run")
    assert isinstance(back, Adapter)
    found, expected = lora_updates(back, Path("it")), lora_updates(adapter, Path("it"))
    for layer in expected:
        a, b = expected[layer].lora_a, expected[layer].lora_b
        if ".experts." in layer and kept == "normalized":
            a, b = a[:, :2], b[..., :2]
            assert found[layer].scale == 8 / 2
        elif ".experts." in layer:
            a = a[:1].expand_as(a) if kept == "once" or "gate_up" in layer else a
            b = b[:1].expand_as(b) if kept == "once" or "down" in layer else b
        assert torch.equal(found[layer].lora_a, a) and torch.equal(found[layer].lora_b, b), layer


def test_what_is_no_lora_of_peft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no place for model\.layers\.0\.per_layer_input_gate"):
        adapter_tensors(adapter_of("e2b", target_modules=["per_layer_input_gate"]))
    with pytest.raises(UserError, match=r"no place for model\.layers\.0\.router\.proj"):
        adapter_tensors(adapter_of("26b-a4b", target_modules=["router.proj"]))
    with pytest.raises(UserError, match="base=FOLDER"):
        adapter_tensors(Adapter({}, {}))
    adapter = adapter_of("26b-a4b", target_modules=["q_proj", "o_proj"])
    place = "decoder.layers.{}.mlp.router.adapter.linear_in.weight"
    gate = "decoder.layers.{}.per_layer_input_gate.linear_in.weight"
    cases = {
        "of the router|router before its norm": lambda t: {
            **t,
            **{place.format(n): torch.ones(4, 64) for n in range(6)},
        },
        "not divided among GPUs": lambda t: {**t, **{gate.format(n): torch.ones(4, 64) for n in range(6)}},
        "it is not whole": lambda t: {
            name: one for name, one in t.items() if "linear_proj.adapter.linear_out" not in name
        },
        r"should be \[64, 4\]": lambda t: {
            name: one[1:] if "linear_proj.adapter.linear_out" in name else one for name, one in t.items()
        },
        "no part of a LoRA of this Gemma": lambda t: {
            name.replace("linear_proj", "linear_q_proj"): one for name, one in t.items()
        },
    }
    for match, change in cases.items():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        rewrite(written(adapter, tmp_path / "run"), change)
        with pytest.raises(UserError, match=match):
            megatron.read(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    written(adapter, tmp_path / "run")
    for peft, match in (
        ({"_target_": "os.system"}, "peft is os.system"),
        ({"_target_": LORA, "alpha": "much"}, "run_config"),
        ({"_target_": LORA, "alpha": float("nan")}, "alpha nan"),
        (None, "no section peft"),
    ):
        run = settings_of(tmp_path / "run") | {"peft": peft}
        (tmp_path / "run" / ITERATION / megatron.RUN_CONFIG).write_text(yaml.safe_dump(run))
        with pytest.raises(UserError, match=match):
            megatron.read(tmp_path / "run")


def test_no_pickle_of_a_run_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = adapter_of("gemma", target_modules=["o_proj"])
    run = written(adapter, tmp_path / "run")
    for name in ("common.pt", megatron.STATE):  # nothing of them is needed
        for evil in (pickle.dumps(Evil()), None):
            file = run / ITERATION / name
            file.write_bytes(evil) if evil else torch.save(Evil(), file)
            assert_same(megatron.read(run).tensors, adapter.tensors)
    for evil in (pickle.dumps(Evil()), None):
        file = run / megatron.LATEST_STATE
        file.write_bytes(evil) if evil else torch.save({"step": Evil()}, file)
        with pytest.raises(UserError, match=r"latest_train_state\.pt"):
            megatron.read(run)
        megatron.read(run / ITERATION)
    shards = [*(run / ITERATION).glob("*.distcp")]
    for name in (".metadata", shards[0].name):
        broken = tmp_path / "broken"
        shutil.copytree(run / ITERATION, broken)
        (broken / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(UserError):
            megatron.read(broken)
        shutil.rmtree(broken)
    (run / ITERATION / megatron.RUN_CONFIG).write_text("!!python/object/apply:os.mkdir [hacked]")
    with pytest.raises(UserError, match=r"run_config\.yaml"):
        megatron.read(run / ITERATION)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("times", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_damage_gives_one_sentence_or_the_same_values(times: int, tmp_path: Path) -> None:
    adapter = adapter_of("31b", target_modules=["q_proj", "down_proj"])
    run, chance, refused = written(adapter, tmp_path / "run"), random.Random(0), 0
    names = [".metadata", ".metadata", "__0_0.distcp", "metadata.json", megatron.RUN_CONFIG]
    for _ in range(times):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(run, tmp_path / "bad")
        name = chance.choice(names)
        spoiled(tmp_path / "bad" / ITERATION / name, chance)
        try:
            found = megatron.read(tmp_path / "bad")
            assert isinstance(found, Adapter)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            if name != megatron.RUN_CONFIG:  # which may be another valid one: the base decides
                assert_same(found.tensors, adapter.tensors)
    assert refused > times / 3


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma3_text", "26b-a4b", "e2b"])
def test_the_command_converts_both_ways_with_a_proof(model: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    if model in KINDS:
        tiny_folder4(model, base)
    else:
        tiny_gemma(model, torch.bfloat16, vocab_size=300).save_pretrained(base)
    from converters import adapter as folder

    source = adapter_of(model)
    folder.write(source, tmp_path / "peft")
    convert(tmp_path / "peft", "megatron", tmp_path / "run", base)
    convert(tmp_path / "run", "adapter", tmp_path / "back", base)
    assert_same(folder.read(tmp_path / "back").tensors, source.tensors)
    record = json.loads((tmp_path / "run/conversion.json").read_text())
    assert record["proof"]["tensors_with_the_same_bits"] == record["proof"]["tensors"] == len(source.tensors)
    assert all(LORA_TENSOR.fullmatch(name) for name in source.tensors)
