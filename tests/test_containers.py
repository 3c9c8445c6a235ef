"""Images, `make train RUNTIME=container` and `make up`. What needs a container engine runs where .ci/containers set it up."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_training import ENVIRONMENT, command, course, only_run, train

from docker import UserError, container, image
from docker.image import Engine

DOCKER, PODMAN = Engine("docker", True, False), Engine("podman", False, False)
SECRET = "hf_not_to_be_seen_by_anybody"


def make(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *words], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**ENVIRONMENT, **environment},
    )  # fmt: skip


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


# --- what is chosen, and what is said -------------------------------------------------------------------------------


@pytest.mark.skipif(image.has_gpu(), reason="this machine has an NVIDIA GPU")
def test_auto_trains_here_without_a_gpu_and_says_why() -> None:
    said = make("-n", "train").stdout
    assert "RUNTIME=auto: local, as there is no NVIDIA GPU" in said
    assert ".venv/bin/python -m training task=slang" in said


@pytest.mark.parametrize(("runtime", "launcher"), [
    ("container", "docker.container"), ("slurm", "docker.slurm"), ("k8s", "docker.kubernetes"),
])  # fmt: skip
def test_each_runtime_gets_the_same_words(runtime: str, launcher: str) -> None:
    here = make("-n", "train", "RUNTIME=local", "GPUS=8", "ARGS=seed=1").stdout.splitlines()[-1].split()
    there = make("-n", "train", f"RUNTIME={runtime}", "GPUS=8", "ARGS=seed=1").stdout.split()
    assert "trainer.devices=8" in here and "seed=1" in here
    assert there == ["python3", "-m", launcher, *here[2:]]


@pytest.mark.parametrize(("words", "says"), [
    (["train", "RUNTIME=cloud"], "RUNTIME=cloud is unknown. Known: auto local container slurm k8s"),
    (["image", "KIND=bake"], "KIND=bake is unknown. Known: train serve"),
    (["image", "VARIANT=tpu"], "VARIANT=tpu is unknown. Known: cpu gpu"),
    (["train", "RUNTIME=container", "ENGINE=automodel"], "ENGINE=automodel is not in the image: use RUNTIME=local"),
    (["train", "RUNTIME=container", "ARGS=runs_dir=../runs"], "runs_dir=../runs is not shared with the container"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_built(words: list[str], says: str, tmp_path: Path) -> None:
    program(tmp_path, "podman", f"echo '{{\"host\": {{}}}}'; [ $1 = info ] || echo $@ >> {tmp_path}/done")
    result = make(*words, PATH=f"{tmp_path}:/usr/bin:/bin", PYTHON=sys.executable, IMAGE="there")
    assert result.returncode == 2
    assert says in result.stderr
    assert not (tmp_path / "done").exists()


def test_an_engine_is_one_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no container engine is here. Install docker or podman"):
        image.find_engine()
    program(tmp_path, "docker", 'echo \'{"ServerErrors": ["Cannot connect to the daemon"]}\'')
    with pytest.raises(UserError, match="docker is installed, but: Cannot connect to the daemon"):
        image.find_engine()
    program(tmp_path, "podman", "echo '{\"host\": {}}'")
    assert image.find_engine() == PODMAN
    program(tmp_path, "docker", 'echo \'{"SecurityOptions": ["name=rootless"]}\'')
    assert image.find_engine() == Engine("docker", True, True)


def test_without_the_containers_toolkit_a_gpu_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "docker", "echo '{}'")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-ctk" in container.why_not()
    program(tmp_path, "nvidia-ctk", "")
    assert container.why_not() == ""


def test_gpus_limits_and_the_user_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is here: what would be said to docker and podman, where NVIDIA's toolkit is installed."""
    program(tmp_path, "nvidia-ctk", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(container, "has_gpu", lambda: True)
    monkeypatch.setenv("VARIANT", "gpu")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    words = container.run_command(DOCKER, "image", ["training", "task=slang"])
    assert {"--gpus=all", "--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864"} <= set(words)
    assert words[words.index("--user") + 1].startswith("1234:")
    assert words[words.index("HF_TOKEN") - 1] == "--env"
    assert SECRET not in " ".join(words)
    with pytest.raises(UserError, match="nvidia-ctk cdi generate"):
        container.run_command(PODMAN, "image", ["training"])
    monkeypatch.setenv("VARIANT", "cpu")
    assert "--userns=keep-id" in container.run_command(PODMAN, "image", ["training"])
    assert "--gpus=all" not in container.run_command(DOCKER, "image", ["training"])


def test_what_the_words_name_is_mounted(tmp_path: Path) -> None:
    (tmp_path / "my rows.csv").touch()
    found = container.mounts([
        f"task.data.source='{tmp_path}/my rows.csv'", "model.path=/nowhere", "runs_dir=runs/mine", f"data_dir={tmp_path}/d",
        "task.data.source=hf:owner/name", "task.data.source=README.md",
    ])  # fmt: skip
    assert found == [
        f"--volume={tmp_path}/my rows.csv:{tmp_path}/my rows.csv:ro", f"--volume={tmp_path}:{tmp_path}",
        f"--volume={ROOT}/README.md:/opt/gemma-nemo/README.md:ro",
    ]  # fmt: skip


def test_network_settings_are_named_to_the_build_but_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text(SECRET)
    monkeypatch.setenv("PIP_CONFIG_FILE", f"{tmp_path}/pip.conf")
    monkeypatch.setenv("BASE_IMAGE", "mine")
    words = image.build_command(PODMAN, "serve", "gpu")
    assert f"id=pip_conf,src={tmp_path}/pip.conf" in words
    assert "BASE_IMAGE=mine" in words
    assert SECRET not in " ".join(words)
    monkeypatch.setenv("PIP_CONFIG_FILE", f"{tmp_path}/nowhere")
    with pytest.raises(UserError, match="is not a file"):
        image.build_command(PODMAN, "serve", "gpu")


def test_the_dashboard_asks_prometheus_and_its_panels_do_not_overlap() -> None:
    board = json.loads((ROOT / "docker/grafana/dashboards/gemma.json").read_text())
    source = (ROOT / "docker/grafana/datasources/prometheus.yaml").read_text()
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(f"uid: {panel['datasource']['uid']}," in source for panel in board["panels"])


# --- many devices ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gpus_are_processes_of_one_training(source: Path, tiny_base: Path, tmp_path: Path) -> None:
    words = command(source, tiny_base, tmp_path)[3:]
    result = make("train", "RUNTIME=local", "GPUS=2", f"ARGS={' '.join(words)} task.train.epochs=1")
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path)
    assert (run / "logs/process1.log").exists()
    assert (run / "report.html").exists()
