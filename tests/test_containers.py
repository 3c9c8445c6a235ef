"""Images, `make train RUNTIME=container` and `make up`. What needs an engine runs where .ci/containers set one up."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, until
from launcher import ENVIRONMENT
from test_training import arguments, course, only_run, train

from core.configuration import names

sys.path.append(str(ROOT / "docker"))  # as for a program of that folder
import container
import image
from errors import UserError
from image import Engine

DOCKER, PODMAN = Engine("docker", True, False), Engine("podman", False, False)
SECRET = "hf_not_to_be_seen_by_anybody"


def make(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**ENVIRONMENT, **environment},
    )


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


# --- what is chosen, and what is said -------------------------------------------------------------------------------


@pytest.mark.skipif(image.has_gpu(), reason="this machine has an NVIDIA GPU")
def test_runtime_auto_trains_locally_without_a_gpu_and_says_why() -> None:
    said = make("-n", "train").stdout
    assert "RUNTIME=auto: local, as there is no NVIDIA GPU" in said
    assert ".venv/bin/python -m commands.train task=slang" in said


@pytest.mark.parametrize(
    ("runtime", "launcher"),
    [
        ("container", "docker/container.py"),
        ("slurm", "docker/slurm.py"),
        ("k8s", "docker/kubernetes.py"),
    ],
)
def test_each_runtime_gets_the_same_arguments(runtime: str, launcher: str) -> None:
    here = make("-n", "train", "RUNTIME=local", "GPUS=8", "ARGS=seed=1").stdout.splitlines()[-1].split()
    there = make("-n", "train", f"RUNTIME={runtime}", "GPUS=8", "ARGS=seed=1").stdout.split()
    assert '"trainer.devices=$GPUS"' in here and "seed=1" in here  # the shell's: make expands no value
    assert there == ["python3", launcher, *here[2:]]


def test_the_docker_sdk_and_this_project_do_not_hide_each_other(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/__init__.py").write_text("NAME = 'the SDK'")
    sdk = {"PYTHONPATH": str(tmp_path)}  # after the working directory, as site-packages is
    found = subprocess.run(
        [sys.executable, "-c", "import docker; print(docker.NAME)"],
        cwd=ROOT,
        env={**ENVIRONMENT, **sdk},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "the SDK\n", found.stderr
    assert make("train", "RUNTIME=slurm", "DRY_RUN=1", **sdk).stdout.startswith("#!/bin/bash")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "RUNTIME=cloud"], "RUNTIME=cloud is unknown. Known: auto local container slurm k8s"),
        (["image", "KIND=bake"], "KIND=bake is unknown. Known: train serve"),
        (["up", "PROFILES=cpu gpu"], "PROFILES=cpu gpu must name cpu or gpu, and may name monitoring"),
        (["up", "TASKS=poems"], f"TASKS=poems is unknown. Known: {' '.join(names('task'))}"),
        (["image", "VARIANT=tpu"], "VARIANT=tpu is unknown. Known: cpu gpu"),
        (["train", "RUNTIME=container", "ENGINE=automodel"], "ENGINE=automodel is not in the image: use RUNTIME=local"),
        (["train", "RUNTIME=container", "ARGS=runs_dir=../runs"], "runs_dir=../runs is not shared with the container"),
    ],
)
def test_mistakes_are_reported_before_anything_is_built(words: list[str], says: str, tmp_path: Path) -> None:
    program(tmp_path, "podman", f"echo '{{\"host\": {{}}}}'; [ $1 = info ] || echo $@ >> {tmp_path}/done")
    result = make(*words, PATH=f"{tmp_path}:/usr/bin:/bin", PYTHON=sys.executable, IMAGE="there")
    assert result.returncode == 2
    assert says in result.stderr
    assert not (tmp_path / "done").exists()


def test_only_a_working_container_engine_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no container engine is installed\. Install docker or podman"):
        image.find_engine()
    program(tmp_path, "docker", 'echo \'{"ServerErrors": ["Cannot connect to the daemon"]}\'')
    with pytest.raises(UserError, match="docker is installed, but: Cannot connect to the daemon"):
        image.find_engine()
    program(tmp_path, "podman", "echo '{\"host\": {}}'")
    assert image.find_engine() == PODMAN
    program(tmp_path, "docker", 'echo \'{"SecurityOptions": ["name=rootless"]}\'')
    assert image.find_engine() == Engine("docker", True, True)


def test_a_gpu_needs_nvidias_container_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "docker", "echo '{}'")
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-ctk" in container.why_not()
    program(tmp_path, "nvidia-ctk", "")
    assert container.why_not() == ""


def test_gpus_limits_and_the_user_are_passed_to_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is here: what would be said to docker and podman, where NVIDIA's toolkit is installed."""
    program(tmp_path, "nvidia-ctk", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(container, "has_gpu", lambda: True)
    monkeypatch.setenv("VARIANT", "gpu")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    words = container.run_command(DOCKER, "image", ["commands.train", "task=slang"])
    assert {"--gpus=all", "--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864"} <= set(words)
    assert words[words.index("--user") + 1].startswith("1234:")
    assert words[words.index("HF_TOKEN") - 1] == "--env"
    assert SECRET not in " ".join(words)
    with pytest.raises(UserError, match="nvidia-ctk cdi generate"):
        container.run_command(PODMAN, "image", ["commands.train"])
    monkeypatch.setenv("VARIANT", "cpu")
    assert "--userns=keep-id" in container.run_command(PODMAN, "image", ["commands.train"])
    assert "--gpus=all" not in container.run_command(DOCKER, "image", ["commands.train"])


def test_files_named_by_arguments_are_mounted(tmp_path: Path) -> None:
    (tmp_path / "my rows.csv").touch()
    found = container.mounts(
        [
            f"task.data.source='{tmp_path}/my rows.csv'",
            "model.path=/nowhere",
            "runs_dir=runs/mine",
            f"data_dir={tmp_path}/d",
            "task.data.source=hf:owner/name",
            "task.data.source=README.md",
        ]
    )
    assert found == [
        f"--volume={tmp_path}/my rows.csv:{tmp_path}/my rows.csv:ro",
        f"--volume={tmp_path}:{tmp_path}",
        f"--volume={ROOT}/README.md:/opt/gemma-nemo/README.md:ro",
    ]


def test_the_build_command_names_network_settings_without_their_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_the_dashboard_queries_prometheus_and_its_panels_do_not_overlap() -> None:
    board = json.loads((ROOT / "docker/grafana/dashboards/gemma.json").read_text())
    source = (ROOT / "docker/grafana/datasources/prometheus.yaml").read_text()
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(f"uid: {panel['datasource']['uid']}," in source for panel in board["panels"])


# --- many devices ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_gpu_is_a_process_of_one_training(source: Path, tiny_base: Path, tmp_path: Path) -> None:
    words = arguments(source, tiny_base, tmp_path, "task.train.epochs=1")
    result = make("train", "RUNTIME=local", "GPUS=2", f"ARGS={' '.join(words)}")
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path)
    assert (run / "logs/process1.log").exists()
    assert (run / "report.html").exists()


# --- for real -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The engine that .ci/containers has set up, with the images in it."""
    if not os.environ.get("BASE_IMAGE"):
        pytest.skip("BASE_IMAGE names no image to build on: bash .ci/containers makes one, and the engine for it")
    os.environ["VARIANT"] = "cpu"
    return image.find_engine(("docker", "podman"))


def inside(engine: Engine, kind: str, script: str) -> str:
    words = [engine.command, "run", "--rm", "--user=0", "--network=none", image.tag(kind, "cpu"), "sh", "-c"]
    return subprocess.run([*words, script], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", image.KINDS)
def test_rebuilding_an_image_uses_the_cache(engine: Engine, kind: str) -> None:
    first = image.build(engine, kind, "cpu", quiet=True)
    identity = [engine.command, "image", "inspect", "--format", "{{.Id}}", first]
    before = subprocess.run(identity, capture_output=True, text=True, check=True).stdout
    assert image.build(engine, kind, "cpu", quiet=True) == first
    assert subprocess.run(identity, capture_output=True, text=True, check=True).stdout == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", image.KINDS)
def test_an_image_holds_no_secrets_caches_or_stray_files(engine: Engine, kind: str) -> None:
    found = inside(
        engine,
        kind,
        "cd /opt/gemma-nemo; ls -A; find / -xdev \\( -name pip.conf -o -name .netrc -o -path"
        " '/run/wheels/*' -o -path '*/.cache/*' -o -path '/var/lib/apt/lists/*_*'"
        " -o -path '/var/cache/apt/*' -o -path '/run/secrets/*' \\)",
    )
    environment = ".venv" if kind == "train" else ".venv-serve"
    assert set(found.split()) == {
        environment,
        "LICENSE",
        "Makefile",
        "commands",
        "converters",
        "core",
        "data",
        "data_prep",
        "evaluation",
        "exports",
        "models",
        "nemo_configs",
        "pyproject.toml",
        "runs",
        "serve.lock",
        "serving",
        "tasks",
        "train.lock",
        "training",
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", image.KINDS)
def test_build_secrets_are_not_in_the_image(engine: Engine, kind: str) -> None:
    told = Path(os.environ.get("PIP_CONFIG_FILE", ""))
    if not told.is_file():
        pytest.skip("PIP_CONFIG_FILE named nothing to the build: bash .ci/containers writes one")
    (secret,) = re.findall("token (.+)", told.read_text())
    assert inside(engine, kind, f"cd /; grep -rlF {secret} bin etc home opt root run srv tmp usr var || true") == ""
    history = [engine.command, "history", "--no-trunc", "--format", "{{.CreatedBy}}", image.tag(kind, "cpu")]
    said = subprocess.run(history, capture_output=True, text=True, check=True).stdout
    assert "train.stamp" in said or "serve.stamp" in said
    assert secret not in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", image.KINDS)
def test_an_image_has_labels_and_a_health_check(engine: Engine, kind: str) -> None:
    asked = subprocess.run(
        [engine.command, "image", "inspect", image.tag(kind, "cpu")], capture_output=True, check=True
    )
    described = json.loads(asked.stdout)[0]
    config = {**described, **described["Config"]}
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert len(labels["org.opencontainers.image.revision"]) >= 40
    assert config["User"] == "10001:10001"
    check = json.dumps(config.get("Healthcheck") or config.get("HealthCheck"))  # docker's name, and podman's
    assert (":9000/health" in check) == (kind == "serve")


@pytest.mark.slow
def test_a_container_trains_to_the_same_bits(engine: Engine, source: Path, tiny_base: Path, tmp_path: Path) -> None:
    words = {
        where: arguments(source, tiny_base, tmp_path / where, "task.train.epochs=1") for where in ("here", "there")
    }
    result = train(words["here"])
    assert result.returncode == 0, result.stderr
    result = make("train", "RUNTIME=container", f"ARGS={' '.join(words['there'])}", HF_TOKEN=SECRET)
    assert result.returncode == 0, result.stderr
    here, there = only_run(tmp_path / "here"), only_run(tmp_path / "there")
    assert here.name == there.name
    assert course(here) == course(there)
    checkpoints = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (here, there)]
    assert checkpoints[0] == checkpoints[1]  # named by the hash of their bytes
    assert {path.stat().st_uid for path in there.rglob("*")} == {os.getuid()}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("stop", 75), ("Ctrl-C", 130)])
def test_a_stopped_container_leaves_a_checkpoint(
    engine: Engine, source: Path, tiny_base: Path, tmp_path: Path, how: str, code: int
) -> None:
    words = arguments(source, tiny_base, tmp_path, "task.train.epochs=400")
    environment = {**ENVIRONMENT, "HF_TOKEN": SECRET}
    process = subprocess.Popen(
        [sys.executable, "docker/container.py", "commands.train", *words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if "epoch 1: validation" in line:
                break
        assert SECRET not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        if how == "stop":
            subprocess.run([engine.command, "stop", f"gemma-nemo-{process.pid}"], capture_output=True, check=True)
        else:
            process.send_signal(signal.SIGINT)
        said += process.stdout.readlines()
        assert process.wait(PATIENCE) == code, "".join(said)
    finally:
        process.kill()
    assert "checkpoint written; run the same command to resume" in said[-1]
    assert list((only_run(tmp_path) / "checkpoints").glob("step=*.ckpt"))


PORTS = ("GRPC_PORT", "GATEWAY_PORT", "WEB_PORT", "PROMETHEUS_PORT")


@pytest.fixture(scope="session")
def stack(engine: Engine) -> Iterator[dict[str, str]]:
    """`make up` of the cpu profile: {name of a port: number}."""
    if not shutil.which("docker-compose"):
        pytest.skip("docker-compose is not installed: bash .ci/containers brings it")
    if (ROOT / "exports").is_symlink():
        pytest.skip("exports is a link: the container would not find the base beside it")
    with contextlib.ExitStack() as sockets:
        free = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in PORTS]
    ports = dict(zip(PORTS, map(str, free), strict=True))
    settings = {**ports, "COMPOSE_PROJECT_NAME": "gemma-test", "PROFILES": "cpu", "VARIANT": "cpu"}
    result = make("up", **settings)
    try:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        assert f"http://127.0.0.1:{ports['WEB_PORT']}" in result.stdout
        yield ports
    finally:
        assert make("down", **settings).returncode == 0
        left = subprocess.run([engine.command, "ps", "--all", "--format", "{{.Names}}"], capture_output=True, text=True)
        assert "gemma-test" not in left.stdout


def ask(port: str, path: str, body: dict[str, object] | None = None) -> str:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_the_stack_answers_through_triton_the_gateway_and_the_website(stack: dict[str, str]) -> None:
    asked = {"text_input": "The sea is", "parameters": {"max_tokens": 4, "temperature": 0, "lora_name": "slang"}}
    answer = json.loads(ask(stack["GATEWAY_PORT"], "/v2/models/gemma/generate", asked))
    assert answer["text_output"].startswith("The sea is ")
    models = json.loads(ask(stack["GATEWAY_PORT"], "/v1/models"))
    assert "slang" in [model["id"] for model in models["data"]]
    assert "slang" in ask(stack["WEB_PORT"], "/").lower()


@pytest.mark.slow
def test_a_running_stack_exports_every_metric_of_the_dashboard(stack: dict[str, str]) -> None:
    ask(stack["GATEWAY_PORT"], "/v1/completions", {"model": "slang", "prompt": "The sea", "max_tokens": 2})
    told = ask(stack["GATEWAY_PORT"], "/triton/metrics") + ask(stack["GATEWAY_PORT"], "/metrics")
    families = set(re.findall(r"^# TYPE (\S+)", told, re.MULTILINE)) | set(re.findall(r"^(\w+)", told, re.MULTILINE))
    board = json.loads((ROOT / "docker/grafana/dashboards/gemma.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:gemma|nv|door)_\w+", query)}
    assert asked and asked <= families, asked - families


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("prometheus"), reason="no Prometheus: bash .ci/containers brings Debian's")
def test_prometheus_scrapes_the_stack_and_answers_every_query(stack: dict[str, str], tmp_path: Path) -> None:
    """A Prometheus of Debian's, outside of the containers: the addresses are the published ones."""
    settings = (ROOT / "docker/prometheus/prometheus.yml").read_text()
    assert settings.count("gateway:9000") == 2
    settings = settings.replace("gateway:9000", f"127.0.0.1:{stack['GATEWAY_PORT']}")
    (tmp_path / "prometheus.yml").write_text(settings.replace("scrape_interval: 5s", "scrape_interval: 1s"))
    address = f"127.0.0.1:{stack['PROMETHEUS_PORT']}"
    words = [
        "prometheus",
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address={address}",
    ]
    board = json.loads((ROOT / "docker/grafana/dashboards/gemma.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            # What fails and is started again is counted where that happens.
            empty = [query for query in queries if "failure" not in query and "restarts" not in query]

            def all_have_series() -> bool:
                ask(stack["GATEWAY_PORT"], "/v1/completions", {"model": "slang", "prompt": "The sea", "max_tokens": 2})
                with contextlib.suppress(ConnectionError, urllib.error.URLError):  # it is starting
                    empty[:] = [query for query in empty if not found(stack["PROMETHEUS_PORT"], query)]
                return not empty

            until(all_have_series)
            for query in queries:
                found(stack["PROMETHEUS_PORT"], query)
        finally:
            process.terminate()


def found(port: str, query: str) -> list[object]:
    """The series of a query; raises where Prometheus does not understand it."""
    answer = json.loads(ask(port, f"/api/v1/query?query={urllib.parse.quote(query)}"))
    series: list[object] = answer["data"]["result"]
    return series


@pytest.mark.parametrize("profile", ["cpu", "gpu", "monitoring"])
def test_the_compose_file_is_valid(profile: str) -> None:
    if not shutil.which("docker-compose"):
        pytest.skip("docker-compose is not installed: bash .ci/containers brings it")
    words = ["docker-compose", "--file", "docker/compose.yaml", "--profile", profile, "config", "--format", "json"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_TOKEN": ""})
    assert result.returncode == 0, result.stderr
    services = json.loads(result.stdout)["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published and all(port["host_ip"] == "127.0.0.1" for port in published)


@pytest.mark.parametrize("kind", image.KINDS)
def test_hadolint_accepts_the_dockerfiles(kind: str) -> None:
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed: bash .ci/containers brings it")
    result = subprocess.run(["hadolint", f"docker/{kind}.Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
