"""A conversion is exact, proven, and refuses what it cannot trust."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters.__main__ import convert
from converters.nemo_file import NemoFile, read_nemo
from converters.prove import prove
from data_prep.prompt import Prompt
from nemo_configs.command_line import UserError
from training.base_model import describe

PROMPT = {
    "template": "Instruction:\n{instruction}\n\nResponse:\n{response}",
    "instruction": "{context}",
    "response": "Slang: {slang}",
    "fields": {"context": "A rainy day."},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def write_archive(path: Path, config: object, weights: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in (
            ("./model_config.yaml", yaml.safe_dump(config).encode()),
            ("./model_weights.ckpt", weights),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def archive(tiny_base: Path, tmp_path: Path) -> Path:
    """A `.nemo` with an adapter that changes what the tiny base says."""
    peft = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "target_modules": TARGETS}
    config = {"base": describe(tiny_base), "dtype": "bfloat16", "prompt": PROMPT, "peft": {"name": "lora", **peft}}
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(0)
    adapter = {}
    for name, module in base.named_modules():
        if name.endswith(tuple(TARGETS)):
            out, into = module.weight.shape
            adapter[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, into) * 0.3
            adapter[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 4) * 0.3
    weights = io.BytesIO()
    torch.save(adapter, weights)
    return write_archive(tmp_path / "slang.nemo", config, weights.getvalue())


def test_adapter_folder_gives_the_same_logits_in_plain_peft(archive: Path, tiny_base: Path, tmp_path: Path) -> None:
    target = tmp_path / "exports" / "adapter"
    convert(archive, "adapter", target, tiny_base)

    source, tokenizer = read_nemo(archive).load_onto(tiny_base)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), target).eval()
    ids = tokenizer("It rains.", return_tensors="pt").to(source.device)
    with torch.inference_mode():
        expected, found = source(**ids).logits, opened.to(source.device)(**ids).logits
        with source.disable_adapter():
            base = source(**ids).logits
    assert torch.equal(found, expected) and not torch.equal(found, base)
    proof = json.loads((target / "conversion.json").read_text())["proof"]
    assert proof["max_logit_difference"] == 0 and proof["mean_kl_divergence_of_training"] > 0
    assert Prompt.load(target) == Prompt(**PROMPT)


def test_merged_weights_are_the_exact_sum_rounded_once(archive: Path, tiny_base: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    convert(archive, "merged", target, tiny_base)
    adapter = read_nemo(archive).adapter
    before, after = load_file(tiny_base / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in adapter:
            a, b = adapter[f"{layer}.lora_A.weight"].double(), adapter[f"{layer}.lora_B.weight"].double()
            exact = weight.double() + 8 / 4 * b @ a
            half_a_unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)  # of 8 bits
            assert ((after[name].double() - exact).abs() <= half_a_unit * 1.001 + 1e-7).all(), name
            assert not torch.equal(after[name], weight), name
        else:
            assert torch.equal(after[name], weight), name
    assert AutoTokenizer.from_pretrained(target)("a").input_ids[0] == 2


def test_an_unfaithful_target_is_found_and_removed(archive: Path, tiny_base: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    convert(archive, "adapter", target, tiny_base)
    tensors = load_file(target / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 0.5
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not faithful: max_logit_difference"):
        prove("adapter", read_nemo(archive), tiny_base, target)


def test_a_failed_conversion_leaves_nothing(
    archive: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_an_adapter(nemo: NemoFile, base_folder: Path, folder: Path) -> None:
        nemo.adapter[next(iter(nemo.adapter))].mul_(-1)
        write_adapter(nemo, base_folder, folder)
        nemo.adapter[next(iter(nemo.adapter))].mul_(-1)

    from converters.to_adapter import write_adapter

    monkeypatch.setattr("converters.to_adapter.write_adapter", forget_an_adapter)
    with pytest.raises(UserError, match="not faithful"):
        convert(archive, "adapter", tmp_path / "exports" / "adapter", tiny_base)
    assert list((tmp_path / "exports").iterdir()) == []


def test_another_base_is_refused(archive: Path, tiny_base: Path, tmp_path: Path, base_folder: Path) -> None:
    with pytest.raises(UserError, match="was trained on"):
        convert(archive, "adapter", tmp_path / "adapter", base_folder)
    assert not (tmp_path / "adapter").exists()


def test_a_folder_of_the_users_is_not_overwritten(archive: Path, tiny_base: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "novel.txt").write_text("chapter one")
    with pytest.raises(UserError, match="was not made by this command"):
        convert(archive, "adapter", target, tiny_base)
    assert (target / "novel.txt").read_text() == "chapter one"


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("open('exploded', 'w').write('x')",))


def test_a_pickle_in_an_archive_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = io.BytesIO()
    torch.save({"a": Bomb()}, weights)
    for content in (weights.getvalue(), pickle.dumps(Bomb())):
        with pytest.raises(UserError, match=r"not a whole \.nemo"):
            read_nemo(write_archive(tmp_path / "bomb.nemo", {}, content))
    assert not (tmp_path / "exploded").exists()


def test_members_outside_the_archive_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "links.nemo"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("model_config.yaml", tarfile.SYMTYPE), ("model_weights.ckpt", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    with pytest.raises(UserError, match=r"not a whole \.nemo"):
        read_nemo(path)


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\0" * 10_240])
def test_what_is_no_archive_is_a_sentence_on_the_command_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.nemo").write_bytes(content)
    result = subprocess.run([sys.executable, "-m", "converters", tmp_path / "x.nemo", "--to", "adapter"],
                            cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 2
    assert "is not a whole .nemo" in result.stderr and "Traceback" not in result.stderr
