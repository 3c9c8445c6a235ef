"""GGUF files of other tools, whose makers type tokens, divide models and make adapters in other ways."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_gemma
from gguf import GGUFReader, GGUFWriter
from test_gguf import copy_of, finish
from tiny_tokenizer import TEXTS, tiny_tokenizer
from transformers import AddedToken, AutoTokenizer

from converters import gguf, hf
from converters.checkpoint import in_memory
from converters.convert import convert
from core.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
NORMAL = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_gemma("gemma2", torch.bfloat16, vocab_size=len(tiny_tokenizer())).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def file(model: Path, tmp_path: Path) -> Path:
    gguf.write(hf.read(model), tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def with_tensors(writer: GGUFWriter, tensors: list[Any]) -> None:
    for tensor in tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    finish(writer)


def test_turn_tokens_that_a_file_types_as_ordinary_ones_stay_whole(file: Path, model: Path, tmp_path: Path) -> None:
    reader = GGUFReader(file)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    for token in ("<start_of_turn>", "<end_of_turn>"):
        kinds[tokens.index(token)] = NORMAL
    with_tensors(copy_of(reader, tmp_path / "theirs.gguf", {"tokenizer.ggml.token_type": kinds}), list(reader.tensors))
    convert(tmp_path / "theirs.gguf", "hf", tmp_path / "hf")
    ours, theirs = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert {*ours.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"])} <= {*ours(TEXTS[2]).input_ids}
    for text in TEXTS:
        assert theirs(text).input_ids == ours(text).input_ids


def test_a_model_in_parts_is_read_whole_whichever_part_is_named(file: Path, model: Path, tmp_path: Path) -> None:
    reader, parts = GGUFReader(file), tmp_path / "parts"
    parts.mkdir()
    tensors, names = list(reader.tensors), [f"big-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    for number, name in enumerate(names):
        writer = copy_of(reader, parts / name) if number == 0 else GGUFWriter(parts / name, "gemma2")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(tensors))
        with_tensors(writer, tensors[number::3])
    expected = hf.read(model).tensors
    for source in (parts, parts / names[0], parts / names[2]):
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        convert(source, "hf", tmp_path / "hf")
        found = hf.read(tmp_path / "hf").tensors
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].read(), expected[name].read()) for name in expected)
    (parts / names[1]).unlink()
    with pytest.raises(UserError, match=rf"one of 3 parts, and {names[1]} is not beside it"):
        convert(parts, "hf", tmp_path / "other")


def test_several_files_in_a_folder_are_named(file: Path, tmp_path: Path) -> None:
    shutil.copyfile(file, tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"holds 2 models: model\.gguf, other\.gguf\. Name one of them"):
        convert(tmp_path, "hf", tmp_path / "hf")


def test_a_name_that_only_looks_like_that_of_a_part_is_read_as_a_whole_file(file: Path, tmp_path: Path) -> None:
    shutil.copyfile(file, tmp_path / "model-00001-of-00000.gguf")
    assert gguf.read(tmp_path / "model-00001-of-00000.gguf").tensors.keys() == gguf.read(file).tensors.keys()


def test_an_activated_lora_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "alora.gguf", "gemma2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_array("adapter.alora.invocation_tokens", [5, 6])
    for part, shape in (("a", (4, 32)), ("b", (64, 4))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{part}", np.ones(shape, np.float32))
    finish(writer)
    with pytest.raises(UserError, match=r"is an activated LoRA \(aLoRA\), which acts only after certain tokens"):
        gguf.read(tmp_path / "alora.gguf")


@pytest.mark.parametrize(("dtype", "smallest", "bits"), [(torch.float16, -13, 10), (torch.bfloat16, -16, 7)])
def test_norms_are_exact_down_to_the_size_that_the_module_states(
    dtype: torch.dtype, smallest: int, bits: int, model: Path, tmp_path: Path
) -> None:
    source = hf.read(model)
    source.config = {**source.config, "dtype": str(dtype).removeprefix("torch.")}
    source.tensors = {name: in_memory(tensor.read().to(dtype)) for name, tensor in source.tensors.items()}
    odd = 1 + torch.arange(32) / 2**bits + 2.0**-bits  # every bit of some
    for exponent, same in ((smallest, True), (smallest - 1, False)):
        weights = (odd * 2.0**exponent).to(dtype)
        source.tensors = {**source.tensors, "model.norm.weight": in_memory(weights)}
        path = tmp_path / f"{exponent}.gguf"
        gguf.write(source, path)
        assert torch.equal(gguf.read(path).tensors["model.norm.weight"].read(), weights) == same


@pytest.mark.parametrize("to", ["gguf", "keras"])
def test_a_token_beside_the_vocabulary_is_left_out(
    to: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Gemma 3 270M and 1B are published: their tokenizer has the whole models' <image_soft_token> at 262,144."""
    published = shutil.copytree(model, tmp_path / "published")
    tokenizer = AutoTokenizer.from_pretrained(published)
    size = len(tiny_tokenizer())
    tokenizer.add_tokens([AddedToken("<image_soft_token>", special=True)])
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") == size
    tokenizer.save_pretrained(published)
    convert(published, to, tmp_path / to)
    assert f"<image_soft_token> is left out: its number, {size}, is beyond the vocabulary" in capsys.readouterr().out
    if to == "gguf":
        tokens = GGUFReader(tmp_path / "gguf/published.gguf").fields["tokenizer.ggml.tokens"].contents()
        assert len(tokens) == size and "<image_soft_token>" not in tokens
    convert(tmp_path / to, "hf", tmp_path / "back")  # its folder is a source again
    ours, back = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(tmp_path / "back")
    assert all(back(text).input_ids == ours(text).input_ids for text in TEXTS)
