"""Triton before the engine: the contract of NVIDIA's vLLM backend, what it refuses, and what it survives.

The contract's tests also run against NVIDIA's own backend, where VLLM_TRITON_HTTP and VLLM_TRITON_GRPC name one that
serves a base as `gemma`. FUZZ_REQUESTS and STORM_SECONDS make the two long tests longer.
"""

import hashlib
import itertools
import json
import os
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
import tritonclient.grpc as grpc_client
import yaml
from conftest import PATIENCE, ROOT, needs_task, until
from peft import LoraConfig, get_peft_model
from tiny_serving import ENDLESS, LONG, SERVING_PYTHON, WINDOW, Stack, free_ports, needs_serving, serve_tiny
from transformers import AutoModelForCausalLM
from tritonclient.utils import InferenceServerException
from vllm_contract import Refused, Server, tensors

from commands.prepare_serving import prepare
from commands.serve import main as serve
from converters import nemo
from converters.adapter import peft_name
from converters.checkpoint import Adapter
from core.artifacts import ServedAdapter
from core.base_model import describe
from core.errors import UserError
from core.prompt import Prompt
from serving import triton_server
from serving.client import Client
from serving.processes import ManagedProcess, lives
from serving.record_file import record_log
from serving.repository import put_adapter, remove_adapter, write_repository, write_vllm_repository
from serving.state import State

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
FUZZ_REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "400"))
STORM_SECONDS = float(os.environ.get("STORM_SECONDS", "30"))


@pytest.fixture(scope="module")
def stack(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serve_tiny(tiny_base, tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture(scope="module")
def server(stack: Stack) -> Server:
    return Server(stack.http, stack.grpc)


@pytest.fixture(params=["embedded", "vllm"])
def either(request: pytest.FixtureRequest) -> Server:
    """Our server, and NVIDIA's where there is one."""
    if request.param == "embedded":
        return request.getfixturevalue("server")
    if "VLLM_TRITON_HTTP" not in os.environ:
        pytest.skip("no Triton with the vLLM backend: VLLM_TRITON_HTTP and VLLM_TRITON_GRPC are not set")
    return Server(os.environ["VLLM_TRITON_HTTP"], os.environ["VLLM_TRITON_GRPC"])


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


# --- the contract -------------------------------------------------------------------------------------------------


def test_an_answer_begins_with_its_prompt_unless_that_is_excluded(either: Server, protocol: str) -> None:
    (whole,) = either.ask(protocol, "Hello there", GREEDY)
    (answer,) = either.ask(protocol, "Hello there", GREEDY, exclude_input_in_output=True)
    assert whole["text_output"] == "Hello there" + answer["text_output"]
    assert len(answer["text_output"]) > 0


def test_each_response_of_a_stream_carries_only_new_text(either: Server, protocol: str) -> None:
    returns = {"return_finish_reason": True, "return_num_output_tokens": True, "return_num_input_tokens": True}
    sampling = {"max_tokens": 40, "seed": 3, "ignore_eos": True}  # the tiny base says one thing only unless it is drawn
    (whole,) = either.ask(protocol, "Hello there", sampling, exclude_input_in_output=True, **returns)
    parts = either.ask(protocol, "Hello there", sampling, stream=True, **returns)
    assert "".join(part["text_output"] for part in parts) == whole["text_output"]
    assert len(parts) > 3
    assert [part["finish_reason"] for part in parts] == ["None"] * (len(parts) - 1) + ["length"]
    assert sum(part["num_output_tokens"] for part in parts) == whole["num_output_tokens"] == 40
    assert parts[-1]["num_input_tokens"] == whole["num_input_tokens"] > 2


def test_only_requested_outputs_are_returned(either: Server, protocol: str) -> None:
    (answer,) = either.ask(protocol, "Hello there", GREEDY)
    assert answer.keys() - {"model_name", "model_version"} == {"text_output"}


def test_a_stream_cannot_include_its_prompt(either: Server, protocol: str) -> None:
    with pytest.raises(Refused, match="exclude_input_in_output"):
        either.ask(protocol, "Hello there", GREEDY, stream=True, exclude_input_in_output=False)


def test_request_parameters_are_used_where_sampling_parameters_are_missing(either: Server) -> None:
    (expected,) = either.ask("http", "Hello there", {"temperature": 0, "max_tokens": 5})
    body = {"text_input": "Hello there", "parameters": {"temperature": 0, "max_tokens": 5}}
    answer = httpx.post(f"{either.http}/v2/models/gemma/generate", json=body, timeout=PATIENCE).json()
    assert answer["text_output"] == expected["text_output"]


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_the_id_of_a_request_comes_back_and_is_no_parameter(server: Server, path: str) -> None:
    body = {"text_input": "Hi", "stream": path != "generate", **GREEDY}
    plain, named = (
        httpx.post(f"{server.http}/v2/models/gemma/{path}", json=body | given, timeout=PATIENCE)
        for given in ({}, {"id": "7-é"})
    )
    assert plain.status_code == named.status_code == 200 and '"id":"7-é"' in named.text
    assert named.text.replace('"id":"7-é",', "") == plain.text
    unknown = httpx.post(f"{server.http}/v2/models/gemma/{path}", json=body | {"ids": "7"}, timeout=PATIENCE)
    assert unknown.status_code == 400 and "unknown sampling parameter 'ids'" in unknown.text


def test_seeded_sampling_repeats_itself(either: Server, protocol: str) -> None:
    sampling = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_tokens": 12, "seed": 7, "ignore_eos": True}
    first, again = (either.ask(protocol, "Once upon", sampling)[0]["text_output"] for _ in range(2))
    (other,) = either.ask(protocol, "Once upon", {**sampling, "seed": 8})
    assert first == again != other["text_output"]


def test_generate_gives_one_response(either: Server) -> None:
    body = {"text_input": "Hi", "sampling_parameters": json.dumps(GREEDY), "stream": True}
    answer = httpx.post(f"{either.http}/v2/models/gemma/generate", json=body, timeout=PATIENCE)
    assert "exactly 1 response" in answer.json()["error"]


def test_an_unknown_adapter_is_refused(either: Server, protocol: str) -> None:
    with pytest.raises(Refused, match=r"nobody|LoRA feature is not enabled"):
        either.ask(protocol, "Hi", {**GREEDY, "lora_name": "nobody"})


# --- ours alone ---------------------------------------------------------------------------------------------------


def test_concurrent_streams_do_not_mix(server: Server) -> None:
    texts = [f"Number {n} says" for n in range(8)]
    alone = [server.ask("http", text, GREEDY, exclude_input_in_output=True)[0]["text_output"] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: server.ask("grpc", text, GREEDY, stream=True), texts))
    assert ["".join(part["text_output"] for part in parts) for parts in together] == alone


def test_parameter_values_may_be_strings(server: Server) -> None:
    texts = {"temperature": "0", "max_tokens": "12", "ignore_eos": "true", "lora_name": "slang"}
    assert server.ask("http", "Hi", texts) == server.ask("http", "Hi", {**GREEDY, "lora_name": "slang"})


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_client_that_disconnects_cancels_its_generation(server: Server, stack: Stack, protocol: str) -> None:
    def cancelled() -> int:
        return (stack.folder / "state/requests.jsonl").read_text().count('"outcome": "cancelled"')

    before = cancelled()
    parts = server.responses(protocol, "Hi", ENDLESS, stream=True)
    next(parts)
    parts.close()
    until(lambda: cancelled() > before)
    assert stack.stats()["running"] == 0


def test_the_catalogue_has_each_adapters_prompt_and_sampling(server: Server, stack: Stack) -> None:
    client = grpc_client.InferenceServerClient(server.grpc)
    answer = client.infer(
        "adapters", tensors({"name": "slang"}), outputs=[grpc_client.InferRequestedOutput("catalogue")]
    )
    (adapter,) = json.loads(answer.as_numpy("catalogue")[0])
    assert adapter["prompt"] == json.loads((stack.folder / "adapters/slang/prompt.json").read_text())
    assert adapter["sampling"]["temperature"] == 0.7
    with pytest.raises(InferenceServerException, match=r"unknown_adapter: .* known: chat, slang, squid_game"):
        client.infer("adapters", tensors({"name": "nobody"}))


def test_adapters_come_and_go_while_it_runs(
    server: Server, stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_adapter(stack, "late", tmp_path)
    again = subprocess.run(
        [SERVING_PYTHON, "-m", "commands.serve", f"folder={stack.folder}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert again.returncode == 0, again.stderr
    assert f"A server is running already (process {stack.process.pid}); it serves chat, late, slang" in again.stdout
    assert server.ask("http", "Hi", {**GREEDY, "lora_name": "late"}) != server.ask("http", "Hi", GREEDY)
    with pytest.raises(UserError, match=r"and not with threads=7 but 1, which cannot change while it runs"):
        serve([f"folder={stack.folder}", "max_waiting=8", "threads=7"])
    monkeypatch.setenv("SERVING_API_KEY", "a new key")
    with pytest.raises(UserError, match=r"and not with this SERVING_API_KEY, which cannot change while it runs") as key:
        serve([f"folder={stack.folder}"])
    assert "a new key" not in str(key.value)
    remove_adapter(stack.folder / "adapters" / "late")

    def is_gone() -> bool:
        try:
            server.ask("http", "Hi", {**GREEDY, "lora_name": "late"})
        except Refused as error:
            return str(error).startswith("unknown_adapter: ")
        return False

    until(is_gone)


def write_tiny_adapter(stack: Stack, name: str, scratch: Path, weights: bytes = b"") -> None:
    """Put an adapter into the served folder, with `weights` for its file where they are given."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(stack.folder / "base"),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(scratch / name)
    Prompt("{instruction}\n{response}", "{context}", "{slang}").save(scratch / name)
    if weights:
        (scratch / name / "adapter_model.safetensors").write_bytes(weights)
    put_adapter(stack.folder, scratch / name, ServedAdapter(name=name, task=name, sampling={}, has_turns=False))


def test_a_broken_adapter_does_not_affect_the_others(server: Server, stack: Stack, tmp_path: Path) -> None:
    write_tiny_adapter(stack, "broken", tmp_path, b"nothing")
    try:
        until(lambda: "broken" in State(stack.folder / "state").ask_engine(PATIENCE).broken)
        with Client(stack.grpc) as client:
            until(lambda: [adapter.name for adapter in client.adapters()] == ["chat", "slang", "squid_game"])
        with pytest.raises(Refused, match="broken"):
            server.ask("http", "Hi", {**GREEDY, "lora_name": "broken"})
        assert server.ask("http", "Hi", {**GREEDY, "lora_name": "slang"})
    finally:
        remove_adapter(stack.folder / "adapters" / "broken")


def test_metrics_count_by_adapter_and_outcome(server: Server, stack: Stack) -> None:
    def figure(name: str) -> float:
        text = httpx.get(f"http://127.0.0.1:{stack.ports['metrics']}/metrics", timeout=PATIENCE).text
        found = re.search(rf"^gemma_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = [
        'requests{adapter="slang",outcome="length"}',
        'tokens{adapter="slang"}',
        'ttft_seconds_count{adapter="slang"}',
        'requests{adapter="",outcome="invalid"}',
    ]
    before = [figure(name) for name in names]
    server.ask("http", "Hi", {**GREEDY, "lora_name": "slang"})
    with pytest.raises(Refused):
        server.ask("http", "Hi", {"temperature": -1})
    # The client has its answer a moment before it is counted.
    until(lambda: [figure(name) - old for name, old in zip(names, before, strict=True)] == [1, 12, 1, 1])
    assert figure('ttft_seconds_sum{adapter="slang"}') > 0


def test_the_log_records_requests_without_their_texts(server: Server, stack: Stack) -> None:
    log = stack.folder / "state/requests.jsonl"
    before = len(log.read_text())
    server.ask("grpc", "My secret wish", {**GREEDY, "lora_name": "chat"})
    until(lambda: log.read_text()[before:].endswith("\n"))
    text = log.read_text()
    line = json.loads(text.splitlines()[-1])
    assert (line["request"], line["adapter"], line["outcome"], line["output_tokens"]) == ("mine", "chat", "length", 12)
    assert "secret" not in text


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"text_input": ""}, "invalid: the prompt is empty"),
        ({"text_input": b"\xff\xfe"}, "invalid: text_input is not UTF-8"),
        ({"text_input": "word " * 200_000}, rf"invalid: .*{WINDOW}"),
        ({"sampling_parameters": "{"}, "invalid: sampling_parameters is not JSON"),
        ({"sampling_parameters": b"\xff"}, "invalid: sampling_parameters is not UTF-8"),
        ({"sampling_parameters": "[1]"}, "invalid: sampling_parameters is not a JSON object"),
        ({"sampling_parameters": '{"temperature": -1}'}, "invalid: temperature is -1"),
        ({"sampling_parameters": '{"temperature": "hot"}'}, "invalid: temperature is not a number: 'hot'"),
        ({"sampling_parameters": '{"max_tokens": 100000}'}, rf"invalid: .*{WINDOW}"),
        ({"sampling_parameters": '{"best_of": 3}'}, "invalid: unknown sampling parameter 'best_of'"),
        ({"sampling_parameters": '{"n": 2}'}, "invalid: n is 2"),
        ({"sampling_parameters": '{"lora_name": "nobody"}'}, "unknown_adapter: .*nobody"),
        ({"prompt_token_ids": np.array([2])}, "data-type"),
        ({"text_input": np.array([["a", "b"]], dtype=np.object_)}, "unexpected shape"),
        ({"text_input": np.array([3])}, "data-type"),
        ({"stream": "yes"}, "data-type"),
        ({"nothing": "x"}, "nothing"),
    ],
)
def test_bad_input_is_named(server: Server, fields: dict[str, Any], error: str) -> None:
    with server.grpc_stream() as (client, answers):
        client.async_stream_infer("gemma", tensors({"text_input": "Hi", **fields}))
        _, said = answers.get(timeout=PATIENCE)
    assert said is not None
    assert re.search(error, said.message(), re.DOTALL), said.message()


def test_bad_http_is_refused_with_a_reason(server: Server) -> None:
    url = f"{server.http}/v2/models/gemma/generate"
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"text_input": 3}', b'{"stream": true}', b"x" * 2_000_000):
        answer = httpx.post(url, content=body, timeout=PATIENCE)
        assert answer.status_code in (400, 500), (body[:20], answer.text)
        assert answer.json()["error"], body[:20]
    assert httpx.post(f"{server.http}/v2/models/nobody/generate", json={}, timeout=PATIENCE).status_code in (400, 404)


@pytest.mark.parametrize(
    "path",
    [
        "repository/index",
        "repository/models/gemma/unload",
        "repository/models/gemma/load",
        "logging",
        "trace/setting",
        "systemsharedmemory/region/x/register",
        "systemsharedmemory/status",
        "cudasharedmemory/region/x/register",
    ],
)
def test_the_server_cannot_be_controlled_over_http(server: Server, path: str) -> None:
    ask = httpx.get if path.endswith("status") else httpx.post
    body = {} if ask is httpx.get else {"json": {}}
    assert ask(f"{server.http}/v2/{path}", timeout=PATIENCE, **body).status_code == 403
    host, port = server.http.removeprefix("http://").split(":")
    for header in ("nobody's: locked", "nobody's\nkey: locked\nfor good", "nobody's\r\n key: locked\r\n for good"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"POST /v2/{path} HTTP/1.1\r\nHost: x\r\n{header}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
            )
            connection.settimeout(PATIENCE)
            assert b" 200 " not in connection.recv(100).partition(b"\r\n")[0]
    assert server.is_ready()


@pytest.mark.parametrize(
    "call",
    [
        "load_model",
        "unload_model",
        "get_model_repository_index",
        "get_trace_settings",
        "get_log_settings",
        "get_system_shared_memory_status",
    ],
)
def test_the_server_cannot_be_controlled_over_grpc(server: Server, call: str) -> None:
    client = grpc_client.InferenceServerClient(server.grpc)
    with pytest.raises(InferenceServerException, match="restricted"):
        getattr(client, call)(*(["gemma"] if call in ("load_model", "unload_model") else []))
    assert server.is_ready()


def test_the_security_policy_is_about_what_is_served(server: Server) -> None:
    policy = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert f"Triton {httpx.get(f'{server.http}/v2', timeout=20).json()['version']}" in policy
    pinned = re.search(r"nvidia-pytriton==([\d.]+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert pinned and f"nvidia-pytriton {pinned[1]}" in policy
    image = re.search(r"^ARG BASE_IMAGE=(\S+)", (ROOT / "docker/serve.Dockerfile").read_text(encoding="utf-8"), re.M)
    assert image and f"`{image[1]}`" in policy


def test_other_users_of_the_machine_cannot_read_requests(stack: Stack) -> None:
    """Triton itself leaves the region of shared memory that they pass through readable by everybody."""
    region = next(word for word in victim(stack, "gemma").cmdline() if word.startswith("triton_gemma_"))
    assert Path("/dev/shm", region).stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_variables_of_vertex_ai_open_no_other_frontend(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AIP_MODE": "PREDICTION", "AIP_HTTP_PORT": str(free_ports(1)[0])}.items():
        monkeypatch.setenv(name, value)
    with serve_tiny(tiny_base, tmp_path) as running:
        listening = [one.laddr for one in running.managed("triton").net_connections() if one.status == "LISTEN"]
        assert {one.port for one in listening} == {running.ports[name] for name in ("http", "grpc", "metrics")}
        assert {one.ip.removeprefix("::ffff:") for one in listening} == {"127.0.0.1"}


@pytest.mark.slow
@needs_serving
def test_a_triton_on_path_takes_the_place_of_the_wheels(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as in NVIDIA's images: one folder with the server, its Python backend and the stub of one Python."""
    (site,) = (ROOT / ".venv-serve/lib").resolve().glob("python*/site-packages")
    wheels, mine = site / "pytriton/tritonserver", tmp_path / "opt/tritonserver"
    (mine / "bin").mkdir(parents=True)
    (mine / "bin/tritonserver").symlink_to(wheels / "bin/tritonserver")
    shutil.copytree(wheels / "backends", mine / "backends")
    stub = wheels / "python_backend_stubs" / site.parent.name.removeprefix("python") / "triton_python_backend_stub"
    shutil.copy(stub, mine / "backends/python")
    monkeypatch.setenv("PATH", f"{mine / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(site / "nvidia_pytriton.libs"))
    with serve_tiny(tiny_base, tmp_path) as running:
        assert running.managed("triton").cmdline()[0] == str(mine / "bin/tritonserver")
        assert Server(running.http, running.grpc).ask("http", "Hi", GREEDY)
    laid_out = mine / "backends/python/triton_python_backend_stub"
    laid_out.write_bytes(laid_out.read_bytes().replace(b"libpython3.", b"libpython9."))
    with pytest.raises(triton_server.NoTriton, match=r"runs another Python than \d"):
        triton_server.lay_out_backend(tmp_path / "backends")


@pytest.mark.slow
def test_random_requests_do_no_harm(server: Server, stack: Stack) -> None:
    """Each is answered or refused with a reason, and afterwards it says what it said before."""
    (expected,) = server.ask("http", "The zoo is", GREEDY)
    engine = victim(stack, "engine").pid
    with ThreadPoolExecutor(8) as pool:
        outcomes = Counter(pool.map(lambda seed: random_request(server, random.Random(seed)), range(FUZZ_REQUESTS)))
    print(f"\n{FUZZ_REQUESTS} random requests: {dict(outcomes)}")
    assert outcomes["silence"] == 0
    assert outcomes["answered"] > 0 and outcomes["invalid"] > 0
    until(lambda: stack.stats()["running"] == stack.stats()["waiting"] == 0)
    assert server.ask("http", "The zoo is", GREEDY) == [expected]
    assert victim(stack, "engine").pid == engine


def random_request(server: Server, draw: random.Random) -> str:
    """How one request of anything ends: answered, an error's code, triton (its own refusal), or silence."""
    texts = [
        "Hi",
        "",
        "é" * draw.randint(1, 2000),
        "\x00",
        "<start_of_turn>",
        "a b " * draw.randint(1, 300),
        draw.randbytes(draw.randint(1, 50)),
        "𓀀\u202e\ufffd",
        "word " * 20_000,
    ]
    values = [0, -1, 1, 0.5, 1e308, -1e308, "0.7", "", None, True, [], ["a"], {}, "x" * 100, 2**70, float("nan"), 7]
    names = [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "min_tokens",
        "stop",
        "seed",
        "repetition_penalty",
        "n",
        "presence_penalty",
        "frequency_penalty",
        "ignore_eos",
        "lora_name",
        "logprobs",
        "",
    ]
    sampling: Any = {"max_tokens": draw.choice([1, 3, 8]), "temperature": draw.choice([0, 1, "0.7"])}
    if draw.random() < 0.5:
        sampling[draw.choice(names)] = draw.choice(values)
    broken: list[Any] = ["{", "[]", "null", "1", '"x"', "[" * 5000, draw.randbytes(9)]
    encoded = json.dumps(sampling) if draw.random() < 0.8 else draw.choice(broken)
    flags = {
        name: draw.choice([True, False])
        for name in (
            "stream",
            "exclude_input_in_output",
            "return_finish_reason",
            "return_logprobs",
            "return_num_input_tokens",
        )
        if draw.random() < 0.25
    }
    text = draw.choice(texts) if draw.random() < 0.6 else "Tell me"
    try:
        if draw.random() < 0.5:
            fields: dict[str, Any] = {"text_input": text, "sampling_parameters": encoded, **flags}
            if draw.random() < 0.2:
                fields[draw.choice(list(fields))] = draw.choice(
                    [np.zeros((2, 2)), np.array([1]), True, "x", np.array([["a"]], dtype=np.object_)]
                )
            return over_grpc(server, fields)
        body = {"text_input": _text(text), "sampling_parameters": _text(encoded), **flags}
        if draw.random() < 0.2:
            body[draw.choice(list(body))] = draw.choice(values)
        content: bytes = json.dumps(body).encode()
        if draw.random() < 0.2:
            content = bytearray(content)
            for _ in range(3):
                content[draw.randrange(len(content))] = draw.randrange(256)
        path = "generate_stream" if flags.get("stream") else "generate"
        answer = server.client.post(f"{server.http}/v2/models/gemma/{path}", content=bytes(content))
        found = re.search(r'"error":"(\w+: )?', answer.text)
        return "answered" if not found else (found[1] or "triton: ")[:-2]
    except (httpx.HTTPError, TimeoutError):
        return "silence"


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


TRITONS_OWN = r"unexpected|data-type|shape|input"  # what Triton itself refuses


def over_grpc(server: Server, fields: dict[str, Any]) -> str:
    with server.grpc_stream() as (client, answers):
        with suppress(InferenceServerException):  # the stream has ended; why, it says below
            client.async_stream_infer("gemma", tensors(fields), enable_empty_final_response=True)
        while True:
            result, error = answers.get(timeout=PATIENCE)
            if error is not None:
                found = re.match(r"(\w+): ", error.message())
                return found[1] if found else "triton" if re.search(TRITONS_OWN, error.message()) else error.message()
            if result.get_response().parameters["triton_final_response"].bool_param:
                return "answered"


# --- what it survives ---------------------------------------------------------------------------------------------


IN_COMMAND = {
    "engine": "serving.engine",
    "triton": "bin/tritonserver",
    "gateway": "serving.gateway",
    "gemma": "/gemma/1/model.py",
    "adapters": "/adapters/1/model.py",
}


def victim(stack: Stack, name: str) -> psutil.Process:
    """A process of the server, or the stub of a model.

    Raises:
        LookupError: it is not there just now.
    """
    for process in psutil.Process(stack.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(IN_COMMAND[name] in word for word in process.cmdline()):
                return process
    raise LookupError(name)


def test_clients_of_a_killed_engine_get_an_error_and_it_is_restarted(server: Server, stack: Stack) -> None:
    before = server.ask("http", "Hi", GREEDY)
    assert strike(server, stack, "engine", signal.SIGKILL) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
@pytest.mark.parametrize("name", ["engine", "gemma", "triton", "adapters"])
def test_any_process_may_die_or_hang(server: Server, stack: Stack, name: str, number: signal.Signals) -> None:
    before = server.ask("http", "Hi", GREEDY)
    assert strike(server, stack, name, number) == before


def strike(server: Server, stack: Stack, name: str, number: signal.Signals) -> Any:
    """Kill or stop a process while four wait: all are told. What the server then answers to `GREEDY`."""
    after: list[Any] = []
    told: queue.Queue[float] = queue.Queue()
    is_struck = threading.Event()

    def wait(protocol: str, stream: bool) -> None:
        while True:  # until it fails for that
            try:
                server.ask(protocol, "Hi", LONG, **({"stream": True} if stream else {}))
            except Refused as error:
                if is_struck.is_set():
                    break
                print(f"refused before {name} was struck: {error}")  # a server may still clean up after the last strike
        told.put(time.monotonic())

    waiting = [
        threading.Thread(target=wait, args=way)
        for way in (("http", False), ("http", True), ("grpc", False), ("grpc", True))
    ]
    for thread in waiting:
        thread.start()
    until(lambda: stack.stats()["running"] > 1)
    struck = victim(stack, name)
    began = time.monotonic()
    is_struck.set()
    struck.send_signal(number)
    last = max(told.get(timeout=PATIENCE) for _ in waiting) - began
    until(lambda: not lives(struck) and server.is_ready() and answers(server, after))
    print(f"{name} {number.name}: told after {last:.2f} s, back after {time.monotonic() - began:.2f} s")
    return after[0]


def answers(server: Server, into: list[Any]) -> bool:
    with suppress(Refused):
        into.append(server.ask("http", "Hi", GREEDY))
    return bool(into)


@pytest.mark.slow
def test_nothing_that_is_only_written_down_ends_serving(tiny_base: Path, tmp_path: Path) -> None:
    """Every log is on a full disk, status.json cannot be replaced, and nobody reads what the server says."""
    state = State(tmp_path / "serve" / "state")
    in_the_way = state.folder / ".status.json.partial"
    in_the_way.mkdir(parents=True)
    for log in ("engine.log", "triton.log", "gateway.log", "events.jsonl", "requests.jsonl"):
        (state.folder / log).symlink_to("/dev/full")
    with serve_tiny(tiny_base, tmp_path) as stack:
        server = Server(stack.http, stack.grpc)
        stack.process.stdout.close()  # type: ignore[union-attr]
        before = server.ask("http", "Hi", GREEDY)
        assert strike(server, stack, "engine", signal.SIGKILL) == before
        supervisor = psutil.Process(stack.process.pid)
        limits = supervisor.rlimit(psutil.RLIMIT_NOFILE)
        killed = victim(stack, "engine")
        supervisor.rlimit(psutil.RLIMIT_NOFILE, (3, limits[1]))  # no descriptor for another process
        killed.kill()
        until(lambda: not psutil.pid_exists(killed.pid))
        supervisor.rlimit(psutil.RLIMIT_NOFILE, limits)
        until(lambda: answers(server, []))
        in_the_way.rmdir()
        until(lambda: (state.folder / "status.json").exists())
        status = state.read()
        assert status.restarts["engine"] == 2 and status.unwritten.endswith("Is a directory")


def test_a_record_that_could_not_be_written_is_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "events.jsonl"
    file.symlink_to("/dev/full")
    log = record_log("a test", file, 1000, 1)
    for _ in range(3):
        log.info("lost")
    file.unlink()
    for number in range(2):
        log.info(json.dumps(number))
    assert capsys.readouterr().err == f"{file} cannot be written (No space left on device): lines are lost\n"
    noted = {"lost_lines": 3, "reason": "No space left on device"}
    assert [json.loads(line) for line in file.read_text().splitlines()] == [0, noted, 1]


def test_running_out_of_memory_is_reported_as_such(tmp_path: Path) -> None:
    memory = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28)); bytes(2**30)"
    process = ManagedProcess("engine", [sys.executable, "-c", memory], tmp_path, tmp_path / "log")
    process.start()
    until(lambda: not process.is_running)
    assert process.reap() == "engine ran out of memory: MemoryError"


def test_a_process_that_keeps_dying_is_restarted_less_and_less_often(tmp_path: Path) -> None:
    process = ManagedProcess(
        "engine", [sys.executable, "-c", "print('no such base'); exit(3)"], tmp_path, tmp_path / "log"
    )
    for delay in (0, 0, 1, 2):
        process.start()
        until(lambda: not process.is_running)
        reason, least, most = reap(process)
        assert least <= delay <= most
    assert reason == "engine ended with code 3: no such base (4 times in a row; the next start is in 2 s)"


def test_a_process_that_had_answered_is_restarted_soon_however_often_it_dies(tmp_path: Path) -> None:
    process = ManagedProcess("engine", ["true"], tmp_path, tmp_path / "log")
    for delay in (0, 0, 1, 1, 1, 1, 1, 1, 1):
        process.start()
        until(lambda: not process.is_running)
        process.answered()
        _, least, most = reap(process)
        assert least <= delay <= most


def reap(process: ManagedProcess) -> tuple[str, float, float]:
    """Why it ended, and what its next start may be away, in seconds: the call began and ended at some moment each."""
    before = time.monotonic()
    reason = process.reap()
    return reason, process.start_at - time.monotonic(), process.start_at - before


def leftovers(stack: Stack) -> list[str]:
    """Processes, shared memory and sockets of a server, by what only they have in their names."""
    name = hashlib.sha256(str((stack.folder / "state").resolve()).encode()).hexdigest()[:8]
    found = [str(path) for path in Path("/dev/shm").glob(f"triton_gemma_{name}_*")]
    found += [str(path) for path in (stack.folder / "state").glob("*.sock")]
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(stack.folder) in word for word in words):
            found.append(" ".join(words[:4]))
    return found


@pytest.mark.slow
def test_sigterm_lets_requests_finish_tells_the_rest_and_leaves_nothing_behind(tiny_base: Path, tmp_path: Path) -> None:
    # No machine gives three answers of so many tokens before the drain is over.
    endless_sampling = {**ENDLESS, "max_tokens": 3 * WINDOW}
    with serve_tiny(tiny_base, tmp_path, window=4 * WINDOW, cache=16 * WINDOW) as stack:
        server = Server(stack.http, stack.grpc)
        parts = {
            protocol: server.responses(
                protocol, "Hi", {**LONG, "max_tokens": 200}, stream=True, return_finish_reason=True
            )
            for protocol in ("http", "grpc")
        }
        endless = server.responses("grpc", "Hi", endless_sampling, stream=True)
        ways = [{"stream": stream, **endless_sampling, "prompt": "Hi", "model": "gemma"} for stream in (True, False)]
        with ThreadPoolExecutor(2) as pool:
            url = f"{stack.gateway}/v1/completions"
            through = [pool.submit(httpx.post, url, json=way, timeout=PATIENCE) for way in ways]
            next(endless)
            until(lambda: stack.stats()["running"] == 3)
            for stream in parts.values():
                next(stream)
            stack.process.terminate()
            assert [list(stream)[-1]["finish_reason"] for stream in parts.values()] == ["length", "length"]
            with pytest.raises(Refused, match="unavailable: the server was stopped before the answer was complete"):
                list(endless)
            cut, refused = (one.result() for one in through)
        assert "data: [DONE]" not in cut.text and '"finish_reason":"' not in cut.text
        for said in (cut.text, refused.text):
            assert "the server was stopped before the answer was complete; ask again" in said
        assert refused.status_code == 503
        assert stack.process.wait(PATIENCE) == 0
        assert leftovers(stack) == []


@pytest.mark.slow
def test_all_processes_end_with_a_killed_supervisor(tiny_base: Path, tmp_path: Path) -> None:
    with serve_tiny(tiny_base, tmp_path) as stack:
        victim(stack, "gemma").suspend()  # which then cannot see that Triton has ended
        stack.process.kill()
        until(lambda: len([left for left in leftovers(stack) if left.startswith("/") and "stub" not in left]) <= 3)
        with serve_again(stack) as again:
            assert Server(again.http, again.grpc).ask("http", "Hi", GREEDY)
        assert leftovers(stack) == []


@contextmanager
def serve_again(stack: Stack) -> Iterator[Stack]:
    words = [f"{name}_port={port}" for name, port in stack.ports.items()]
    process = subprocess.Popen(
        [SERVING_PYTHON, "-m", "commands.serve", f"folder={stack.folder}", "threads=1", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert any(line.startswith("Ready") for line in process.stdout)
    yield Stack(process, stack.folder, stack.ports)
    process.terminate()
    process.communicate(timeout=PATIENCE)


@needs_serving
def test_a_port_that_is_taken_is_named(tiny_base: Path, tmp_path: Path) -> None:
    write_repository(tmp_path, tiny_base)
    (tmp_path / "adapters").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, (free,) = taken.getsockname()[1], free_ports(1)
        started = subprocess.run(
            [SERVING_PYTHON, "-m", "commands.serve", f"folder={tmp_path}", f"grpc_port={port}", f"http_port={free}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert started.returncode == 2
    assert f"port {port} of 127.0.0.1 cannot be used (Address already in use)" in started.stderr
    assert "grpc_port=" in started.stderr
    assert "warning" not in started.stdout


@needs_serving
def test_what_other_machines_reach_is_said(tiny_base: Path, tmp_path: Path) -> None:
    write_repository(tmp_path, tiny_base)
    (tmp_path / "adapters").mkdir()
    with socket.create_server(("0.0.0.0", 0)) as taken:  # so that nothing is started
        port = taken.getsockname()[1]
        words = ["host=0.0.0.0", "expose=http,grpc", f"grpc_port={port}"]
        started = subprocess.run(
            [SERVING_PYTHON, "-m", "commands.serve", f"folder={tmp_path}", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={name: value for name, value in os.environ.items() if name != "SERVING_API_KEY"},
        )
    assert started.returncode == 2
    _, gateway, http, grpc = started.stdout.splitlines()
    assert gateway.startswith("Other machines reach port 9000, the gateway") and "SERVING_API_KEY is not set" in gateway
    assert "Triton's own HTTP on port 8000" in http and "critical flaws" in http and "SECURITY.md" in http
    assert f"Triton's gRPC on port {port}, which asks for no key" in grpc


@pytest.mark.slow
def test_a_storm_of_kills(server: Server, stack: Stack) -> None:
    """Every few seconds something dies or hangs: of 32 clients, whoever is answered is right, the rest is told why."""
    adapters = [None, "slang", "squid_game", "chat"]
    asked = [
        (
            f"Number {n} says",
            {**GREEDY, "max_tokens": 8 + 8 * (n % 4), **({"lora_name": adapters[n % 4]} if n % 4 else {})},
        )
        for n in range(16)
    ]
    quiet = [
        server.ask("http", text, sampling, exclude_input_in_output=True)[0]["text_output"] for text, sampling in asked
    ]
    before = usage(stack)
    outcomes: Counter[str] = Counter()
    longest = 0.0
    end = time.monotonic() + STORM_SECONDS

    def client(seed: int) -> None:
        nonlocal longest
        draw = random.Random(seed)
        while (now := time.monotonic()) < end or (not outcomes["right"] and now < end + PATIENCE):
            number = draw.randrange(len(asked))
            text, sampling = asked[number]
            stream, said, began = draw.random() < 0.6, "", time.monotonic()
            try:
                way = {"exclude_input_in_output": True, **({"stream": True} if stream else {})}
                for part in server.responses(draw.choice(["http", "grpc"]), text, sampling, **way):
                    said += part["text_output"]
                    if stream and draw.random() < 0.02:
                        break  # it leaves
                else:
                    outcomes["right" if said == quiet[number] else f"wrong: {said!r} for {quiet[number]!r}"] += 1
                    continue
                outcomes["left"] += 1
            except Refused as error:
                outcomes[kind_of(str(error))] += 1
                time.sleep(0.2)
            except queue.Empty:
                outcomes["silence"] += 1
            if not quiet[number].startswith(said):
                outcomes[f"wrong part: {said!r} of {quiet[number]!r}"] += 1
            longest = max(longest, time.monotonic() - began)

    with ThreadPoolExecutor(32) as pool:
        clients = [pool.submit(client, seed) for seed in range(32)]
        draw, kills = random.Random(0), Counter[str]()
        while time.monotonic() < end - 5:
            time.sleep(draw.uniform(2, 10))
            name, number = (
                draw.choice(["engine", "gemma", "triton", "adapters", "gateway"]),
                draw.choice([9, signal.SIGSTOP]),
            )
            if name == "gateway":
                number = 9
            with suppress(LookupError, psutil.NoSuchProcess):  # it is being started just now
                victim(stack, name).send_signal(number)
                kills[f"{name} {signal.Signals(number).name}"] += 1
        for one in clients:
            one.result()
    counted = ("processes", "shared memory")

    def is_as_before() -> bool:  # what has been replaced may still be ending, and Triton be replaced for keeping it
        with suppress(OSError, AssertionError):  # the engine is not there yet
            stats, now = stack.stats(), usage(stack)
            at_rest = stats["running"] == stats["waiting"] == 0 and server.is_ready()
            return at_rest and all(now[key] == before[key] for key in counted)
        return False

    with suppress(AssertionError):  # then `after` says what is left
        until(is_as_before)
    after = usage(stack)
    print(
        f"\n{STORM_SECONDS:.0f} s, kills {dict(kills)}\noutcomes {dict(outcomes)}\nlongest request {longest:.1f} s"
        f"\nbefore {before}\nafter  {after}"
    )
    assert set(outcomes) <= {"right", "left", "unavailable", "busy"}, outcomes
    assert outcomes["right"] > 0
    assert [after[key] for key in counted] == [before[key] for key in counted]
    assert after["supervisor MiB"] < before["supervisor MiB"] + 20
    assert after["files"] <= before["files"] + 5
    assert [
        server.ask("http", text, sampling, exclude_input_in_output=True)[0]["text_output"] for text, sampling in asked
    ] == quiet


AWAY = re.compile(
    r"unavailable: |no available versions|not found|not ready|is stopping|Stub process|not healthy"  # the stub, Triton
    r"|Socket closed|recvmsg|GOAWAY|Stream removed|Broken pipe|failed to connect|Connection re"  # gRPC
    r"|ConnectError|ReadError|WriteError|RemoteProtocolError"  # httpx; not ReadTimeout, which is silence
)


def kind_of(error: str) -> str:
    """The error's code; "unavailable" too where it says in other words that the server is away just now."""
    return "busy" if error.startswith("busy: ") else "unavailable" if AWAY.search(error) else error


def usage(stack: Stack) -> dict[str, int]:
    """What a leak would show in."""
    supervisor = psutil.Process(stack.process.pid)
    shared = [left for left in leftovers(stack) if left.startswith("/dev/shm")]
    children = supervisor.children(recursive=True)
    memory = 0
    for process in children:
        with suppress(psutil.NoSuchProcess):  # it has just ended
            memory += process.memory_info().rss
    return {
        "processes": len(children),
        "shared memory": len(shared),
        "files": supervisor.num_fds(),
        "supervisor MiB": supervisor.memory_info().rss >> 20,
        "all MiB": memory >> 20,
    }


@pytest.mark.slow
@needs_serving
def test_a_user_starts_a_server_with_the_real_base_alone(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(base_folder.parent)
    prepare([], "slang", None, "embedded", tmp_path / "serve")
    assert "Train first: make train TASK=slang\nUntil then the base is served alone." in capsys.readouterr().out
    ports = dict(zip(("http", "grpc", "metrics", "gateway"), free_ports(4), strict=True))
    words = [f"{name}_port={port}" for name, port in ports.items()]
    process = subprocess.Popen(
        [SERVING_PYTHON, "-m", "commands.serve", f"folder={tmp_path}/serve", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        said = "".join(itertools.takewhile(lambda line: not line.startswith("Try: "), lines))
        assert "Serving gemma-3-270m alone" in said
        server = Server(f"http://127.0.0.1:{ports['http']}", f"127.0.0.1:{ports['grpc']}")
        (answer,) = server.ask("http", "The capital of France is", {"temperature": 0, "max_tokens": 8})
        assert answer["text_output"].startswith("The capital of France is the") or "Paris" in answer["text_output"]
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


# --- what is served -----------------------------------------------------------------------------------------------


@pytest.fixture
def work(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with runs of slang and chat on the tiny base, finished but for what they have learned."""
    monkeypatch.chdir(tmp_path)
    for task in PROMPTS:
        run = tmp_path / "runs" / task / "tiny-1"
        run.mkdir(parents=True)
        data = {"columns": {"slang": [], "context": []} if task == "slang" else {"message": []}}
        config = {"task": {"name": task, "data": data}, "model": {"name": "tiny", "path": str(tiny_base)}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        measured = {"loss": 3.0, "perplexity": 20.1}
        (run / "evaluation.json").write_text(json.dumps({"held_out_rows": 4, "before": measured, "after": measured}))
    return tmp_path


def write_archive(run: Path, task: str, prompt: Prompt, base: Path) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(len(task))
    weights = {peft_name(n): torch.randn(p.shape) * 0.3 for n, p in model.named_parameters() if "lora_" in n}
    content = Adapter(settings, weights, {**describe(base), "name": "tiny"}, None, prompt, "bfloat16")
    nemo.write(content, run / f"{task}.nemo")


PROMPTS = {
    "slang": Prompt("Q: {instruction}\nA: {response}", "{context}", "{slang}"),
    "chat": Prompt("U: {instruction}\nM: {response}<end_of_turn>", "{message}", "{answer}"),
}


@needs_task("chat")
@pytest.mark.usefixtures("one_thread")
def test_finished_runs_become_a_repository(work: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = work / "exports/serve"
    for task, prompt in PROMPTS.items():
        write_archive(work / "runs" / task / "tiny-1", task, prompt, tiny_base)
    prepare(["slang", "chat"], None, None, "embedded", folder)
    adapters = {
        name: json.loads((folder / "adapters" / name / "serving.json").read_text()) for name in ("slang", "chat")
    }
    assert (adapters["slang"]["field"], adapters["slang"]["has_turns"]) == ("context", False)
    assert (adapters["chat"]["sampling"]["stop"], adapters["chat"]["has_turns"]) == (["<end_of_turn>"], True)
    assert adapters["chat"]["sampling"]["max_tokens"] == 150
    assert (folder / "base").resolve() == tiny_base.resolve()
    assert capsys.readouterr().out.count("Converting") == 2
    prepare(["chat"], None, None, "embedded", folder)  # slang is not served any more, chat as it was exported
    assert [path.name for path in (folder / "adapters").iterdir()] == ["chat"]
    assert "Converting" not in capsys.readouterr().out


def test_the_same_folder_for_nvidias_container(stack: Stack, tmp_path: Path) -> None:
    shutil.copytree(stack.folder / "adapters", tmp_path / "adapters")
    write_vllm_repository(tmp_path, stack.folder / "base")
    repository = tmp_path / "repository/gemma"
    model = json.loads((repository / "1/model.json").read_text())
    assert model["model"] == "/serve/base"
    assert (model["enable_lora"], model["max_loras"], model["max_lora_rank"]) == (True, 3, 8)
    loras = json.loads((repository / "1/multi_lora.json").read_text())
    assert loras == {name: f"/serve/adapters/{name}" for name in ("chat", "slang", "squid_game")}
    assert 'backend: "vllm"' in (repository / "config.pbtxt").read_text()


@needs_task("squid_game")
def test_a_named_task_must_have_been_trained(work: Path, tiny_base: Path) -> None:
    with pytest.raises(UserError, match=r"no finished run in runs/squid_game. Train first: make train TASK=squid_game"):
        prepare(["slang", "squid_game"], None, None, "embedded", work / "serve")
    assert not (work / "serve/repository").exists()


@needs_task("chat")
def test_tasks_of_two_bases_are_not_served_together(work: Path, tiny_base: Path, stack: Stack) -> None:
    shutil.copytree(tiny_base, work / "other-base")
    config = yaml.safe_load((work / "runs/chat/tiny-1/config.yaml").read_text())
    config["model"]["path"] = str(work / "other-base")
    (work / "runs/chat/tiny-1/config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"share one base, but these are slang on .*, chat on other-base"):
        prepare(["slang", "chat"], None, None, "embedded", work / "serve")
    with pytest.raises(UserError, match=r"newest run of slang is on tiny, not on MODEL=gemma-2-2b\. Leave MODEL out"):
        prepare(["slang"], None, "gemma-2-2b", "embedded", work / "serve")
    with pytest.raises(UserError, match=r"the running server has the base tiny-base0, and these tasks other-base"):
        prepare(["chat"], None, None, "embedded", stack.folder)


@pytest.mark.usefixtures("work")
def test_the_repository_of_a_running_server_is_not_overwritten(stack: Stack) -> None:
    with pytest.raises(UserError, match=r"a server is running from .*; stop it first"):
        prepare(["slang"], None, None, "vllm", stack.folder)
