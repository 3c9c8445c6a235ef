"""A base model is whole and sane, or there is a sentence that says what to do."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT
from safetensors.torch import load_file, save_file

from core.base_model import describe, ensure_base_model, self_check
from core.configuration import load_config, names
from core.errors import UserError

EXPECTED = {
    *(f"gemma-{size}{kind}" for size in ("2b", "7b") for kind in ("", "-it")),
    *(f"gemma-2-{size}{kind}" for size in ("2b", "9b", "27b") for kind in ("", "-it")),
    *(f"gemma-3-{size}{kind}" for size in ("270m", "1b", "4b", "12b", "27b") for kind in ("", "-it")),
    *(f"gemma-4-{size}{kind}" for size in ("e2b", "e4b", "12b", "26b-a4b", "31b") for kind in ("", "-it")),
}


@pytest.mark.slow
def test_every_gemma_has_a_pinned_config_or_says_why_not() -> None:
    assert set(names("model")) == EXPECTED
    for name in EXPECTED:
        model = load_config([f"model={name}"]).model
        assert model.name == name and model.repo.startswith("google/gemma")
        assert (model.revision == "main" and model.revision_note) or (
            len(model.revision) == 40 and int(model.revision, 16)
        )
        assert model.licence == ("apache-2.0" if name.startswith("gemma-4") else "gemma")


def test_a_model_may_be_named_as_on_the_hub() -> None:
    assert load_config(["model=gemma-4-26B-A4B-it"]).model.repo == "google/gemma-4-26B-A4B-it"
    asked = ["make", "-n", "base", "MODEL=gemma-4-E2B"]
    result = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert "model=gemma-4-e2b " in result.stdout, result.stderr
    result = subprocess.run([*asked[:-1], "MODEL=gemma-4-E3B"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode and "MODEL=gemma-4-e3b is unknown. Known: " in result.stderr


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-4-e2b"])
def test_without_network_the_error_names_the_ways_out(name: str, tmp_path: Path) -> None:
    # Port 9 of this machine answers nobody: the hub is out of reach whatever the network.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "commands.base", f"model={name}", f"model.models_dir={tmp_path}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 2
    assert "cannot be reached" in result.stderr and "model.path=" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / name).exists()
    said = result.stdout + result.stderr
    if name == "gemma-4-e2b":
        assert "Apache License 2.0" in said and "not checked against the hub" in said
        assert not any(words in said for words in ("HF_TOKEN", "Gemma Terms", "Accept", "gated"))
    else:
        assert "Gemma Terms of Use: https://ai.google.dev/gemma/terms" in said


def test_a_folder_of_ones_own_must_be_a_model(tmp_path: Path) -> None:
    config = load_config([f"model.path={tmp_path}"]).model
    with pytest.raises(UserError, match=r"config\.json is missing"):
        ensure_base_model(config)


def test_a_truncated_file_is_noticed_on_the_next_start(base_folder: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(base_folder, models / "gemma-3-270m", copy_function=os.symlink)
    config = load_config([f"model.models_dir={models}"]).model
    assert ensure_base_model(config) == models / "gemma-3-270m"
    damaged = models / "gemma-3-270m" / "tokenizer.json"
    text = damaged.read_bytes()
    damaged.unlink()  # the link, not the base's own file
    damaged.write_bytes(text[:1000])
    with pytest.raises(UserError, match=r"tokenizer\.json is missing or not"):
        ensure_base_model(config)


def test_random_weights_fail_the_self_check(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="fails its self-check: perplexity"):
        self_check(tiny_base, max_perplexity=60)


def test_the_hash_follows_the_weights_and_not_the_folder(tiny_base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_base, tmp_path / "elsewhere")
    assert describe(copy)["sha256"] == describe(tiny_base)["sha256"]
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert describe(copy)["sha256"] != describe(tiny_base)["sha256"]


@pytest.mark.slow
def test_killed_and_doubled_builds_end_in_one_good_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "commands.base", f"model.models_dir={tmp_path}"]
    killed = subprocess.Popen(command, cwd=ROOT)
    while not list(tmp_path.glob(".gemma-3-270m.partial/*.gguf")):
        time.sleep(0.1)
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "gemma-3-270m").exists()

    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("is ready: perplexity" in text for text in said) == 1
    assert sum("Waiting for another process" in text for text in said) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["gemma-3-270m"]
