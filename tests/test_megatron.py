"""NeMo 1 and NeMo 2 checkpoints: Megatron's layout against a forward pass written out here; damage of every kind."""

import io
import json
import math
import os
import pickle
import random
import re
import shutil
import sys
import tarfile
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from conftest import FAMILIES, tiny_gemma
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from converters import nemo1, nemo2
from converters.byte_ranges import members
from converters.checkpoint import Adapter, Checkpoint, LazyTensor
from converters.distributed import read_distributed
from converters.megatron_layout import to_megatron
from converters.megatron_lora import from_megatron_lora
from converters.megatron_lora_writer import to_megatron_lora
from core.errors import UserError
from core.prompt import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 300
PROMPT = Prompt("Instruction:\n{instruction}\n\nResponse:\n{response}", "{tag}", "Slang: {slang}")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEMO1 = ("gemma", "gemma2")
EDGES = [(nemo2, family) for family in FAMILIES] + [(nemo1, family) for family in NEMO1]


def lazies(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


def gemma(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    return tiny_gemma(family, dtype, vocab_size=VOCABULARY, **options)


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def checkpoint(family: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Checkpoint:
    model = gemma(family, dtype, **options)
    config = json.loads(model.config.to_json_string())
    return Checkpoint(config, lazies(weights(model)), {"tokenizer.model": b"pieces", "LICENSE": b"terms"}, PROMPT)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def read(lazy: dict[str, LazyTensor]) -> dict[str, Tensor]:
    found = {name: content.read() for name, content in lazy.items()}
    assert all(tuple(found[name].shape) == lazy[name].shape and found[name].dtype == lazy[name].dtype for name in lazy)
    return found


# Megatron's computation, written out from its definition: what each of `ranks` does with its part, and where the parts
# are summed or put together. Nothing of the converters is used.


def part_of(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """What tensor parallel rank `rank` of `ranks` holds of a whole tensor."""
    if "norm" in name:
        return tensor
    if "linear_proj" in name or "linear_fc2" in name:
        return tensor.chunk(ranks, dim=1)[rank]
    if "linear_fc1" in name:
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
    return tensor.chunk(ranks)[rank]


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (1 + weight)


def rotate(x: Tensor, base: float) -> Tensor:
    size = x.shape[-1]
    angle = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(0, size, 2) / size)[None]
    cosine, sine = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return x * cosine + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1) * sine


def megatron_forward(ranks: list[dict[str, Tensor]], config: Any, tokens: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of a Gemma of which each rank holds a part."""
    family, epsilon, count = config.model_type, config.rms_norm_eps, len(ranks)
    embedding = torch.cat([rank["embedding.word_embeddings.weight"] for rank in ranks])
    x = embedding[tokens] * config.hidden_size**0.5
    scale = (config.head_dim if family == "gemma" else config.query_pre_attn_scalar) ** -0.5
    groups = config.num_key_value_heads // count
    queries = config.num_attention_heads // config.num_key_value_heads
    for number in range(config.num_hidden_layers):
        layer = [
            {
                key.removeprefix(f"decoder.layers.{number}."): value
                for key, value in rank.items()
                if key.startswith(f"decoder.layers.{number}.")
            }
            for rank in ranks
        ]
        local = family != "gemma" and config.layer_types[number] == "sliding_attention"
        base = 10_000 if family != "gemma3_text" or local else 1_000_000
        distance = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))[None]
        seen = (distance >= 0) & (distance < (config.sliding_window if local else len(tokens)))
        attended, fed = 0.0, 0.0
        for own in layer:
            y = norm(x, own["self_attention.linear_qkv.layer_norm_weight"], epsilon)
            out = y @ own["self_attention.linear_qkv.weight"].T
            heads = []
            for group in range(groups):
                width = (queries + 2) * config.head_dim
                q, k, v = out[:, group * width : (group + 1) * width].split(
                    [queries * config.head_dim, config.head_dim, config.head_dim], dim=1
                )
                q, k = q.reshape(len(tokens), queries, -1).transpose(0, 1), k[None]
                if family == "gemma3_text":
                    q = norm(q, own["self_attention.q_layernorm.weight"], epsilon)
                    k = norm(k, own["self_attention.k_layernorm.weight"], epsilon)
                scores = rotate(q, base) @ rotate(k, base).transpose(1, 2) * scale
                if family == "gemma2":
                    scores = 50 * torch.tanh(scores / 50)
                heads.append((scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(0, 1).flatten(1))
            attended = attended + torch.cat(heads, dim=1) @ own["self_attention.linear_proj.weight"].T
        if family != "gemma":
            attended = norm(attended, layer[0]["self_attention.linear_proj.post_layernorm.weight"], epsilon)
        x = x + attended
        for own in layer:
            y = norm(x, own["mlp.linear_fc1.layer_norm_weight"], epsilon)
            gate, up = (y @ own["mlp.linear_fc1.weight"].T).chunk(2, dim=1)
            fed = fed + (F.gelu(gate, approximate="tanh") * up) @ own["mlp.linear_fc2.weight"].T
        if family != "gemma":
            fed = norm(fed, layer[0]["mlp.linear_fc2.post_layernorm.weight"], epsilon)
        x = x + fed
    logits = norm(x, ranks[0]["decoder.final_layernorm.weight"], epsilon) @ embedding.T
    return 30 * torch.tanh(logits / 30) if family == "gemma2" else logits


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_computes_the_same_with_converted_weights(family: str, ranks: int, tmp_path: Path) -> None:
    model = gemma(family, num_key_value_heads=4, num_attention_heads=8)
    ours = read(to_megatron(lazies(weights(model)), model.config.to_dict()))
    parts = [{name: part_of(name, tensor, rank, ranks) for name, tensor in ours.items()} for rank in range(ranks)]
    tokens = torch.randint(3, VOCABULARY, (40,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]
        found = megatron_forward(parts, model.config, tokens)
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()
    assert expected.std() > 0.1

    if family not in NEMO1:
        return
    nemo1.write(checkpoint(family, num_key_value_heads=4, num_attention_heads=8), tmp_path / "model.nemo")
    folder = unpacked(tmp_path / "model.nemo")
    shutil.rmtree(folder / "model_weights")
    for rank, part in enumerate(parts):
        where = folder if ranks == 1 else folder / f"mp_rank_{rank:02d}"
        where.mkdir(exist_ok=True)
        extra = {"model.decoder.layers.0.mlp.linear_fc1._extra_state": io.BytesIO(b"fp8")}
        torch.save({**{f"model.{name}": t.clone() for name, t in part.items()}, **extra}, where / "model_weights.ckpt")
    assert_same(read(nemo1.read(folder).tensors), weights(model))


def test_layers_of_pipeline_parallel_ranks_are_renumbered(tmp_path: Path) -> None:
    model = gemma("gemma2")
    ours = read(to_megatron(lazies(weights(model)), model.config.to_dict()))
    nemo1.write(checkpoint("gemma2"), tmp_path / "model.nemo")
    folder = unpacked(tmp_path / "model.nemo")
    shutil.rmtree(folder / "model_weights")
    for stage, layers in enumerate(([0, 1], [2])):
        own = {name: t for name, t in ours.items() if ".layers." not in name and ("embedding" in name) == (stage == 0)}
        for number, layer in enumerate(layers):
            own |= {
                name.replace(f".{layer}.", f".{number}.", 1): t
                for name, t in ours.items()
                if f"layers.{layer}." in name
            }
        for rank in range(2):
            where = folder / f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
            where.mkdir()
            part = {f"model.module.{name}": part_of(name, t, rank, 2).clone() for name, t in own.items()}
            torch.save(part, where / "model_weights.ckpt")
    assert_same(read(nemo1.read(folder).tensors), weights(model))
    shutil.rmtree(folder / "tp_rank_01_pp_rank_001")
    with pytest.raises(UserError, match="weights of all ranks"):
        nemo1.read(folder)


def unpacked(archive: Path) -> Path:
    folder = archive.with_suffix("")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_equal_those_of_nvidias_converter(family: str) -> None:
    name = {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"}[family]
    theirs = pytest.importorskip(
        f"nemo.collections.llm.gpt.model.{name}", reason="NeMo 2.7.3 with Megatron is not here"
    )
    importer = theirs.HFGemma3Importer if family == "gemma3_text" else theirs.HFGemmaImporter
    model = gemma(family)
    ours = read(to_megatron(lazies(weights(model)), model.config.to_dict()))
    target = torch.nn.Module()
    for key, tensor in ours.items():
        *path, last = key.split(".")
        module = target
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(last, torch.nn.Parameter(torch.zeros_like(tensor)))
    target.config = types.SimpleNamespace(
        num_attention_heads=model.config.num_attention_heads,
        num_query_groups=model.config.num_key_value_heads,
        kv_channels=model.config.head_dim,
        hidden_size=model.config.hidden_size,
    )
    assert_same({k: v.detach() for k, v in importer.convert_state(object(), model, target).state_dict().items()}, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("format_", "family"), EDGES)
def test_a_round_trip_preserves_every_bit(format_: Any, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, target = checkpoint(family, dtype), tmp_path / "target"
    format_.write(source, target)
    assert format_.recognizes(target) and not {nemo1: nemo2, nemo2: nemo1}[format_].recognizes(target)
    found = format_.read(target)
    assert_same(read(found.tensors), read(source.tensors))
    assert found.config == source.config and found.prompt == PROMPT
    content = {name: data.read_bytes() if isinstance(data, Path) else data for name, data in found.files.items()}
    assert content == source.files


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_restored_from_the_fields_alone(family: str, tmp_path: Path) -> None:
    options = (
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
            },
            "query_pre_attn_scalar": 21,
        }
        if family == "gemma3_text"
        else {}
    )
    source, formats = checkpoint(family, **options), [nemo2, *([nemo1] if family in NEMO1 else [])]
    for format_ in formats:
        target = tmp_path / format_.__name__
        format_.write(source, target)
        if format_ is nemo1:
            target.rename(target.with_suffix(".nemo"))
            target = unpacked(target.with_suffix(".nemo"))
        next(target.rglob("config.json")).unlink()
        made, given = (AutoConfig.for_model(**c).to_dict() for c in (format_.read(target).config, source.config))
        said = AutoConfig.for_model(family).to_dict()
        same = set(said) - {"transformers_version", "dtype", "architectures", "_name_or_path"}
        assert {key: made[key] for key in same} == {key: given[key] for key in same}
        # And a config.json that says something else than the checkpoint is not believed.
        wrong = {**source.config, "rms_norm_eps": 0.5}
        (target / ("tokenizer" if format_ is nemo1 else nemo2.TOKENIZER) / "config.json").write_text(json.dumps(wrong))
        assert format_.read(target).config["rms_norm_eps"] == source.config["rms_norm_eps"]


def test_norms_stored_as_one_plus_w_and_a_padded_vocabulary_are_read(tmp_path: Path) -> None:
    model = gemma("gemma")
    for name, tensor in weights(model).items():
        if "norm" in name:
            tensor.copy_((tensor * 256).round() / 256)  # of these 1 + w is exact in float32
    ours = read(to_megatron(lazies(weights(model)), model.config.to_dict()))
    theirs = {name: tensor + 1 if "norm" in name else tensor for name, tensor in ours.items()}
    rows = theirs["embedding.word_embeddings.weight"]
    theirs["embedding.word_embeddings.weight"] = torch.cat([rows, torch.randn(384 - VOCABULARY, rows.shape[1])])
    nemo1.write(checkpoint("gemma"), tmp_path / "model.nemo")
    folder = unpacked(tmp_path / "model.nemo")
    shutil.rmtree(folder / "model_weights")
    (folder / "tokenizer/config.json").unlink()
    vocabulary = {
        "model": {"vocab": {f"{n}": n for n in range(VOCABULARY - 1)}},
        "added_tokens": [{"id": VOCABULARY - 1}],
    }
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(vocabulary))
    settings = yaml.safe_load((folder / "model_config.yaml").read_text())
    del settings["layernorm_zero_centered_gamma"]  # as NeMo's own converter of Gemma 1 leaves it
    (folder / "model_config.yaml").write_text(yaml.safe_dump(settings))
    torch.save({f"model.{name}": tensor for name, tensor in theirs.items()}, folder / "model_weights.ckpt")
    found = nemo1.read(folder)
    assert found.config["vocab_size"] == VOCABULARY
    assert_same(read(found.tensors), weights(model))


def test_the_reader_of_pytorch_finds_stacked_layers(tmp_path: Path) -> None:
    source = checkpoint("gemma3_text")
    nemo2.write(source, tmp_path / "model")
    ours = to_megatron(source.tensors, source.config)
    folder, key = tmp_path / "model/weights", "module.decoder.layers.self_attention.linear_qkv.weight"
    state = {
        key: torch.empty(3, 128, 32, dtype=torch.bfloat16),
        "module.decoder.final_layernorm.weight": torch.empty(32).bfloat16(),
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    for number in range(3):
        assert torch.equal(state[key][number], ours[f"decoder.layers.{number}.self_attention.linear_qkv.weight"].read())
    assert torch.equal(state["module.decoder.final_layernorm.weight"], source.tensors["model.norm.weight"].read())


def test_the_reader_and_writer_of_megatron_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensor parallel ranks' pieces, declared as Megatron's layers declare theirs."""
    theirs = pytest.importorskip("megatron.core.dist_checkpointing", reason="megatron-core is not here")
    source = checkpoint("gemma3_text")
    ours, layers, ranks = read(to_megatron(source.tensors, source.config)), 3, 2

    def pieces(fill: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        found = {}
        for name, tensor in ours.items():
            match = re.fullmatch(r"(decoder\.layers\.)(\d+)\.(.+)", name)
            key = f"module.{match[1]}{match[3]}" if match else f"module.{name}"
            stack, ahead = [(0, int(match[2]), layers)] if match else [], int(bool(match))
            for rank in range(ranks):
                if "norm" in name and rank:
                    continue  # a copy
                part = part_of(name, tensor, rank, ranks)
                axis = int("linear_proj" in name or "linear_fc2" in name)
                cuts = [(part, [] if "norm" in name else [(axis + ahead, rank, ranks)])]
                if name.endswith("linear_fc1.weight"):
                    cuts = [(half, [(ahead, n * ranks + rank, 2 * ranks)]) for n, half in enumerate(part.chunk(2))]
                for n, (cut, places) in enumerate(cuts):
                    found[f"{name}.{rank}.{n}"] = theirs.ShardedTensor.from_rank_offsets(
                        key, fill(cut), *stack, *places, prepend_axis_num=ahead
                    )
        return found

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        nemo2.write(source, tmp_path / "model")
        weights_folder = tmp_path / "model/weights"
        loaded = theirs.load(pieces(torch.zeros_like), str(weights_folder))
        expected = pieces(Tensor.clone)
        for name, piece in expected.items():
            assert torch.equal(loaded[name], piece.data), name
        shutil.rmtree(weights_folder)
        weights_folder.mkdir()
        if not torch.cuda.is_available():
            monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)  # its writer asks for a GPU, there or not
            monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
        theirs.save(expected, str(weights_folder))
    finally:
        torch.distributed.destroy_process_group()
    assert_same(read(nemo2.read(tmp_path / "model").tensors), read(source.tensors))


def test_shards_of_other_writers_are_assembled(tmp_path: Path) -> None:
    """torch_dist as PyTorch writes whole stacked tensors, and zarr as Megatron wrote it: chunks of raw numbers."""
    model = gemma("gemma", torch.bfloat16)
    ours = read(to_megatron(lazies(weights(model)), model.config.to_dict()))
    stacked: dict[str, Tensor] = {}
    for name in ours:
        if ".layers.0." in name:
            stacked[f"model.{name.replace('.0.', '.')}"] = torch.stack(
                [ours[name.replace(".0.", f".{n}.")] for n in range(3)]
            )
        elif ".layers." not in name:
            stacked[f"model.{name}"] = ours[name]
    nemo1.write(checkpoint("gemma"), tmp_path / "model.nemo")
    folder = unpacked(tmp_path / "model.nemo")
    shutil.rmtree(folder / "model_weights")
    dcp.save(stacked, storage_writer=dcp.FileSystemWriter(folder / "model_weights"), no_dist=True)
    (folder / "model_weights/metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert_same(read(nemo1.read(folder).tensors), weights(model))

    shutil.rmtree(folder / "model_weights")
    for key, tensor in stacked.items():
        where = folder / "model_weights" / key
        where.mkdir(parents=True)
        chunk = [
            1 if tensor.dim() > 1 and "layers" in key else tensor.shape[0],
            *[-(-n // 3) for n in tensor.shape[1:]],
        ]
        zarr = {
            "chunks": chunk,
            "compressor": None,
            "dtype": "bfloat16",
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": list(tensor.shape),
            "zarr_format": 2,
        }
        (where / ".zarray").write_text(json.dumps(zarr))
        padded = F.pad(
            tensor, [n for size, c in zip(reversed(tensor.shape), reversed(chunk), strict=True) for n in (0, -size % c)]
        )
        for place in torch.cartesian_prod(
            *[torch.arange(n // c) for n, c in zip(padded.shape, chunk, strict=True)]
        ).view(-1, tensor.dim()):
            box = tuple(slice(int(p) * c, (int(p) + 1) * c) for p, c in zip(place, chunk, strict=True))
            data = padded[box].contiguous().view(torch.int16).numpy().tobytes()
            (where / ".".join(f"{int(p)}" for p in place)).write_bytes(data)
    (folder / "model_weights/metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert_same(read(nemo1.read(folder).tensors), weights(model))


@pytest.mark.parametrize("format_", [nemo1, nemo2])
def test_only_one_tensor_at_a_time_is_in_memory(format_: Any, tmp_path: Path) -> None:
    model = gemma("gemma2", num_hidden_layers=8, layer_types=["sliding_attention", "full_attention"] * 4)
    alive: dict[int, int] = {}
    most = 0

    def watched(tensor: Tensor) -> Callable[[], Tensor]:
        def fresh() -> Tensor:
            nonlocal most
            copy = tensor.clone()
            alive[id(copy)] = tensor.nbytes
            weakref.finalize(copy, alive.pop, id(copy))
            most = max(most, sum(alive.values()))
            return copy

        return fresh

    source = Checkpoint(
        model.config.to_dict(),
        {name: LazyTensor(tuple(t.shape), t.dtype, watched(t)) for name, t in weights(model).items()},
    )
    format_.write(source, tmp_path / "target")
    largest = max(lazy.nbytes for lazy in source.tensors.values())
    assert 0 < most <= 2 * largest


# LoRA


def trained_adapter(family: str, modules: list[str] = MODULES, **options: Any) -> tuple[Adapter, Any]:
    """What peft saves of an adapter whose every number is random, and peft's model of it."""
    model = get_peft_model(gemma(family), LoraConfig(r=4, lora_alpha=8, target_modules=modules, **options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tensors = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    peft = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "target_modules": sorted(modules),
    }
    config = json.loads(model.get_base_model().config.to_json_string())
    return Adapter(peft | options, tensors, {"name": "tiny", "sha256": "1"}, config, PROMPT), model


def megatron_change(tensors: dict[str, Tensor], alpha: float, rank: int, layer: str) -> Tensor:
    """What an adapter adds to Megatron's weight, by its definition."""
    one, two = (tensors[f"{layer}.adapter.{part}.weight"].double() for part in ("linear_in", "linear_out"))
    return alpha / rank * (two @ one)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "modules", [MODULES, ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"], ["o_proj"]], ids=len
)
def test_a_fused_adapter_has_the_same_effect_and_is_split_again(family: str, modules: list[str]) -> None:
    adapter, model = trained_adapter(family, modules)
    tensors, rank, alpha = to_megatron_lora(adapter)
    base = model.get_base_model()
    for module in base.modules():
        if hasattr(module, "lora_A"):
            module.base_layer.weight.data = module.get_delta_weight("default").data.double()
    # The base's weights are now what peft adds; where it adds nothing they are made zero.
    added = {
        name.replace(".base_layer", ""): t.double() if ".base_layer" in name else torch.zeros_like(t).double()
        for name, t in base.state_dict().items()
        if "lora_" not in name and name != "lm_head.weight"
    }
    expected = read(to_megatron(lazies(added), adapter.config))
    for name, change in expected.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.adapter.linear_in.weight" in tensors:
            assert (megatron_change(tensors, alpha, rank, layer) - change).abs().max() < 1e-6
        else:
            assert not change.any(), name
    back = from_megatron_lora(lazies({f"module.{name}": t for name, t in tensors.items()}), adapter.config, alpha)
    assert_same(back.tensors, adapter.tensors)
    assert back.peft == adapter.peft


@pytest.mark.parametrize(("format_", "family"), EDGES)
def test_adapters_survive_a_round_trip_through_a_file(format_: Any, family: str, tmp_path: Path) -> None:
    adapter, _ = trained_adapter(family)
    adapter.tensors = {name: tensor.bfloat16() for name, tensor in adapter.tensors.items()}
    format_.write(adapter, tmp_path / "lora.nemo")
    assert format_.recognizes(tmp_path / "lora.nemo")
    back = format_.read(tmp_path / "lora.nemo")
    assert_same(back.tensors, adapter.tensors)
    assert (back.peft, back.base, back.prompt, back.config) == (adapter.peft, adapter.base, PROMPT, adapter.config)


def test_an_adapter_that_megatron_trained_keeps_its_rank_both_ways(tmp_path: Path) -> None:
    adapter, _ = trained_adapter("gemma2")
    joined, _, _ = to_megatron_lora(adapter)
    torch.manual_seed(2)
    theirs = {
        f"module.{name}": torch.randn(*[6 if n == 12 else n for n in tensor.shape]) for name, tensor in joined.items()
    }
    found = from_megatron_lora(lazies(theirs), adapter.config, 12.0)
    assert (found.peft["r"], found.peft["lora_alpha"]) == (6, 12)
    a = "base_model.model.model.layers.0.self_attn.{}_proj.lora_A.weight"
    assert torch.equal(found.tensors[a.format("q")], found.tensors[a.format("v")])
    back, rank, alpha = to_megatron_lora(found)
    assert (rank, alpha) == (6, 12)
    assert_same({f"module.{name}": tensor for name, tensor in back.items()}, theirs)


@pytest.mark.parametrize("names", ["nemo1", "nemo2"])
def test_a_canonical_lora_equals_that_of_peft(names: str) -> None:
    adapter, _ = trained_adapter("gemma")
    theirs = {}
    for name, tensor in adapter.tensors.items():
        name = (
            name.removeprefix("base_model.model.model.").replace("lora_A", "linear_in").replace("lora_B", "linear_out")
        )
        for part in "qkv":
            name = name.replace(f"self_attn.{part}_proj", f"self_attention.linear_qkv.adapter.adapter_{part}")
        for part in ("gate", "up"):
            name = name.replace(f"mlp.{part}_proj", f"mlp.linear_fc1.adapter.adapter_{part}")
        name = name.replace("self_attn.o_proj", "self_attention.linear_proj.adapter").replace(
            "mlp.down_proj", "mlp.linear_fc2.adapter"
        )
        if names == "nemo1":
            name = name.replace("linear_qkv.adapter.adapter_", "adapter_layer.lora_unfused_kqv_adapter.")
            name = name.replace("linear_fc1.adapter.adapter_", "adapter_layer.lora_unfused_hto4h_adapter.")
            name = name.replace("linear_proj.adapter", "adapter_layer.lora_dense_attention_adapter")
            name = name.replace("linear_fc2.adapter", "adapter_layer.lora_4htoh_adapter")
            for part in ("q", "k", "v", "gate", "up"):
                name = name.replace(f"_adapter.{part}.", f"_adapter.{part}_adapter.")
        theirs[f"model.decoder.{name}"] = tensor
    tensors = (
        {nemo1._renamed(name): lazy for name, lazy in lazies(theirs).items()} if names == "nemo1" else lazies(theirs)
    )
    assert_same(from_megatron_lora(tensors, adapter.config, 8).tensors, adapter.tensors)


def test_tensor_parallel_parts_of_a_lora_are_merged(tmp_path: Path) -> None:
    adapter, _ = trained_adapter("gemma2")
    nemo1.write(adapter, tmp_path / "lora.nemo")
    folder = unpacked(tmp_path / "lora.nemo")
    whole = torch.load(folder / "model_weights.ckpt", weights_only=True)
    (folder / "model_weights.ckpt").unlink()
    for rank in range(2):
        part = {}
        for name, tensor in whole.items():
            if "linear_in" in name and ("dense" in name or "4htoh" in name):
                part[name] = tensor.chunk(2, dim=1)[rank].clone()  # its input is divided
            elif "linear_out" in name and "hto4h" in name:
                part[name] = part_of("linear_fc1", tensor, rank, 2).clone()
            else:
                part[name] = tensor.chunk(2)[rank].clone()
        (folder / f"mp_rank_{rank:02d}").mkdir()
        torch.save(part, folder / f"mp_rank_{rank:02d}/model_weights.ckpt")
    assert_same(nemo1.read(folder).tensors, adapter.tensors)


def test_rslora_dora_and_single_layers_are_converted(tmp_path: Path) -> None:
    adapter, _ = trained_adapter("gemma3_text", use_rslora=True)
    _, rank, alpha = to_megatron_lora(adapter)
    assert (rank, alpha / rank) == (12, pytest.approx(8 / 4**0.5, rel=1e-15))
    adapter, _ = trained_adapter("gemma3_text", use_dora=True)
    nemo2.write(adapter, tmp_path / "dora")
    back = nemo2.read(tmp_path / "dora")
    assert_same(back.tensors, adapter.tensors)
    assert back.peft["use_dora"] and "peft.dora.DoRA" in (tmp_path / "dora/context/model.yaml").read_text()
    with pytest.raises(UserError, match="DoRA"):
        nemo1.write(trained_adapter("gemma", use_dora=True)[0], tmp_path / "dora.nemo")
    adapter, _ = trained_adapter("gemma3_text", layers_to_transform=[0, 2])
    tensors, _, alpha = to_megatron_lora(adapter)
    back = from_megatron_lora(lazies(tensors), adapter.config, alpha)
    assert_same(back.tensors, adapter.tensors)
    assert "model.layers.2.mlp.up_proj" in back.peft["target_modules"] and len(back.peft["target_modules"]) == 14
    get_peft_model(gemma("gemma3_text"), LoraConfig(**back.peft))  # peft finds them by those names


# What NeMo makes of it


def test_the_loader_of_nemo_finds_the_classes_and_their_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serialization = pytest.importorskip(
        "fiddle.experimental.serialization", reason="fiddle, which NeMo 2 uses, is not here"
    )
    adapter, _ = trained_adapter("gemma2")
    nemo2.write(adapter, tmp_path / "lora")
    nemo2.write(checkpoint("gemma2"), tmp_path / "model")
    for path in (
        "nemo.lightning.io.pl:TrainerContext",
        "nemo.collections.llm.gpt.model.gemma2:Gemma2Model",
        "nemo.collections.llm.gpt.model.gemma2:Gemma2Config",
        "nemo.collections.llm.peft.lora:LoRA",
        "nemo.collections.common.tokenizers.huggingface.auto_tokenizer:AutoTokenizer",
    ):
        module, name = path.split(":")
        stand_in = sys.modules.get(module) or types.ModuleType(module)
        setattr(stand_in, name, type(name, (), {"__init__": lambda self, **arguments: vars(self).update(arguments)}))
        monkeypatch.setitem(sys.modules, module, stand_in)
    graph = json.loads((tmp_path / "lora/context/io.json").read_text())
    context = serialization.load_json(json.dumps(graph))
    assert context.model.config.num_query_groups == 2 and context.model.config.window_size == (16, 0)
    assert context.model.config.params_dtype is torch.bfloat16
    assert (context.model.model_transform.dim, context.model.model_transform.alpha) == (12, 24)
    assert context.model.model_transform.target_modules == ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"]
    model = serialization.load_json((tmp_path / "model/context/io.json").read_text()).model
    assert model.tokenizer.pretrained_model_name == "nemo_tokenizer" and model.config.bf16
    # NeMo asks for "model" by looking for the object of this path.
    assert sum("<root>.model" in entry.get("paths", []) for entry in graph["objects"].values()) == 1


# Damage and malice


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


def spoiled(path: Path, kind: random.Random) -> None:
    """Flip a bit, cut off the end, or zero a stretch, anywhere in one file."""
    data = bytearray(path.read_bytes())
    at = kind.randrange(len(data))
    match kind.randrange(3):
        case 0:
            data[at] ^= 1 << kind.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at : at + 64] = bytes(len(data[at : at + 64]))
    path.write_bytes(data)


@pytest.mark.parametrize(("format_", "content"), [(nemo1, "model"), (nemo1, "lora"), (nemo2, "model"), (nemo2, "lora")])
@pytest.mark.parametrize("times", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_damage_gives_one_sentence_or_the_same_values(format_: Any, content: str, times: int, tmp_path: Path) -> None:
    small = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    source = checkpoint("gemma2", **small) if content == "model" else trained_adapter("gemma2")[0]
    expected = read(source.tensors) if isinstance(source, Checkpoint) else source.tensors
    good, bad = tmp_path / "good", tmp_path / "bad"
    format_.write(source, good)
    chance, refused = random.Random(0), 0
    for _ in range(times):
        if good.is_dir():
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            files = [
                bad / "weights/.metadata",
                bad / "weights/__0_0.distcp",
                bad / "context/model.yaml",
                bad / "weights/metadata.json",
            ]
            spoiled(chance.choice(files), chance)
        else:
            shutil.copy(good, bad)
            spoiled(bad, chance)
        format_.recognizes(bad)
        try:
            found = format_.read(bad)
            tensors = read(found.tensors) if isinstance(found, Checkpoint) else found.tensors
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert_same(tensors, expected)
    assert refused > times / 3


def test_no_code_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nemo2.write(checkpoint("gemma"), tmp_path / "model")
    index = tmp_path / "model/weights/.metadata"
    index.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"mkdir"):
        nemo2.read(tmp_path / "model")
    nemo1.write(trained_adapter("gemma")[0], tmp_path / "lora.nemo")
    folder = unpacked(tmp_path / "lora.nemo")
    torch.save({"model.decoder": Evil()}, folder / "model_weights.ckpt")
    with pytest.raises(UserError, match=r"model_weights\.ckpt"):
        nemo1.read(folder)
    (folder / "model_config.yaml").write_text("!!python/object/apply:os.mkdir [hacked]")
    assert not nemo1.recognizes(folder)
    with pytest.raises(UserError, match=r"model_config\.yaml"):
        nemo1.read(folder)
    assert not (tmp_path / "hacked").exists()


def test_archives_with_paths_that_lead_outside_are_refused(tmp_path: Path) -> None:
    nemo1.write(trained_adapter("gemma")[0], tmp_path / "good.nemo")

    def archive(name: str, mode: str = "w:", **member: Any) -> Path:
        target = tmp_path / "bad.nemo"
        shutil.copy(tmp_path / "good.nemo", target)
        with tarfile.open(target, mode.replace("w", "a") if mode == "w:" else mode) as tar:
            info = tarfile.TarInfo(name)
            for key, value in member.items():
                setattr(info, key, value)
            tar.addfile(info)
        return target

    hostile = {
        "../outside": {},
        "/etc/outside": {},
        "device": {"type": tarfile.CHRTYPE},
        "link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        "hard": {"type": tarfile.LNKTYPE, "linkname": "model_config.yaml"},
    }
    for name, member in hostile.items():
        bad = archive(name, **member)
        assert nemo1.recognizes(bad)  # so that a user is told why, not that the format is unknown
        with pytest.raises(UserError, match="not a checkpoint to trust"):
            nemo1.read(bad)
    with pytest.raises(UserError, match="unpack it"):
        nemo1.read(archive("model_config.yaml", "w:gz"))


def test_a_mismatch_is_reported_by_name(tmp_path: Path) -> None:
    source = checkpoint("gemma")
    with pytest.raises(UserError, match="NeMo 1 does not support Gemma 3"):
        nemo1.write(checkpoint("gemma3_text"), tmp_path / "x")
    name = "model.layers.1.mlp.up_proj.weight"
    others = {key: lazy for key, lazy in source.tensors.items() if key != name}
    with pytest.raises(UserError, match=name):
        nemo2.write(Checkpoint(source.config, others), tmp_path / "x")
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        nemo2.write(
            Checkpoint(source.config, {**source.tensors, "lm_head.weight": source.tensors[name]}), tmp_path / "x"
        )
    with pytest.raises(UserError, match=r"up_proj.*\[64, 32\]"):
        nemo2.write(Checkpoint(source.config, {**others, name: source.tensors["model.norm.weight"]}), tmp_path / "x")
    with pytest.raises(UserError, match="llama"):
        nemo2.write(Checkpoint({"model_type": "llama"}, source.tensors), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    nemo2.write(source, tmp_path / "model")
    settings = yaml.safe_load((tmp_path / "model/context/model.yaml").read_text())
    settings["config"]["_target_"] = "nemo.collections.llm.gpt.model.llama.Llama3Config8B"
    (tmp_path / "model/context/model.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="Llama3Config8B"):
        nemo2.read(tmp_path / "model")
    adapter, _ = trained_adapter("gemma")
    with pytest.raises(UserError, match="base=FOLDER"):
        nemo2.write(Adapter(adapter.peft, adapter.tensors), tmp_path / "x")
    with pytest.raises(UserError, match="modules_to_save"):
        nemo2.write(
            Adapter(adapter.peft | {"modules_to_save": ["lm_head"]}, adapter.tensors, config=adapter.config),
            tmp_path / "x",
        )


def test_the_result_loads_in_transformers(tmp_path: Path) -> None:
    source = checkpoint("gemma3_text", torch.float32)
    nemo2.write(source, tmp_path / "model")
    next((tmp_path / "model").rglob("config.json")).unlink()
    found = nemo2.read(tmp_path / "model")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**found.config)).eval()
    model.load_state_dict(read(found.tensors), strict=False)
    tokens = torch.arange(3, 43)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, gemma("gemma3_text")(tokens).logits)
    assert read_distributed(members(tmp_path / "model/weights"), "model")
