"""The OpenAI-compatible gateway: the `openai` package, raw requests, refusals, metrics and logs."""

import asyncio
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import PATIENCE, ROOT, until
from safetensors.torch import load_file, save_file
from tiny_serving import (
    ENDLESS,
    FILLING,
    GREEDY,
    LONG,
    PROMPTS,
    SAMPLING,
    SERVING_PYTHON,
    WINDOW,
    Stack,
    free_ports,
    serve_tiny,
)

from commands.serve import addresses
from core.artifacts import ServedAdapter
from serving.client import (
    AsyncClient,
    Busy,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    ServingError,
    TooLong,
    Unavailable,
    UnknownAdapter,
)
from serving.openai_api import ApiError, ChatCompletion, TextCompletion
from serving.repository import put_adapter, remove_adapter
from serving.state import State

HI = [{"role": "user", "content": "Hi!"}]


@pytest.fixture(scope="module")
def stack(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serve_tiny(tiny_base, tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture(scope="module")
def api(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.gateway}/v1", api_key="-", max_retries=2)


@pytest.fixture
def web(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.gateway, timeout=PATIENCE) as client:
        yield client


def test_the_example_of_the_banner_asks_in_the_prompt_of_its_task(stack: Stack) -> None:
    status = State(stack.folder / "state").read()
    for name, field in (("slang", "context"), ("squid_game", "question")):
        _, _, url, _, body = shlex.split(addresses(status, stack.folder, [name]).splitlines()[-1])
        answered = httpx.post(url, content=body, timeout=PATIENCE).json()
        with Client(stack.grpc) as client:
            asked = client.ask(name, {field: PROMPTS[name].fields[field]})
        assert answered["usage"]["prompt_tokens"] == asked.input_tokens
    assert '"model": "gemma"' in addresses(status, stack.folder, [])


@dataclass
class Gateway:
    """A gateway of our own, in front of a stack or of nothing."""

    process: "subprocess.Popen[str]"
    url: str
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]


@contextmanager
def gateway(
    triton: str, log: Path, *words: str, start: Sequence[str] = ("-m", "serving.gateway"), **environment: str
) -> Iterator[Gateway]:
    if not SERVING_PYTHON.exists():
        pytest.skip("needs the serving environment: make serve-env")
    port = free_ports(1)[0]
    with log.open("w") as out:
        process = subprocess.Popen(
            [SERVING_PYTHON, *start, "--triton", triton, "--port", str(port), *words],
            cwd=ROOT,
            stderr=out,
            text=True,
            env={**os.environ, **environment},
        )
    try:
        while "listening" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield Gateway(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def settled_health(url: str) -> httpx.Response:
    """What /health says once the adapters have been checked."""
    while (answer := httpx.get(f"{url}/health", timeout=PATIENCE)).json()["status"] == "checking adapters":
        assert answer.status_code == 503
        time.sleep(0.05)
    return answer


def chat(**others: Any) -> dict[str, Any]:
    return {"model": "chat", "messages": HI, **GREEDY, **others}


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.split("\n") if line]


def add_empty_adapter(stack: Stack, scratch: Path) -> Path:
    """Serve an adapter, beside the others, whose matrices are zero; its folder."""
    source = shutil.copytree(stack.folder / "adapters" / "slang", scratch / "empty")
    weights = source / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(weights).items()}, weights)
    serving = ServedAdapter.read(source / "serving.json")
    put_adapter(stack.folder, source, serving.model_copy(update={"name": "empty"}))
    until(lambda: "empty" in stack.stats()["adapters"])
    return stack.folder / "adapters" / "empty"


# --- without a server -------------------------------------------------------------------------------------------------


def test_each_kind_of_failure_has_openais_status_and_reveals_no_internals() -> None:
    statuses = {
        InvalidRequest: 400,
        TooLong: 400,
        UnknownAdapter: 404,
        Busy: 429,
        Unavailable: 503,
        DeadlineExceeded: 504,
        ServingError: 500,
    }
    for kind, status in statuses.items():
        error = ApiError.of(kind("temperature is -1"))
        assert error.status == status and set(error.body()["error"]) == {"message", "type", "param", "code"}
        assert (error.headers().get("x-should-retry") == "false") == (status in (400, 404, 504))
    assert "x-should-retry" not in ApiError(429, "x", retry_after=60).headers()
    assert ApiError(429, "x", retry_after=61).headers()["x-should-retry"] == "false"
    assert ApiError.of(InvalidRequest("temperature is -1")).param == "temperature"
    assert ApiError.of(TooLong("x")).code == "context_length_exceeded"
    for kind in (Busy, Unavailable, DeadlineExceeded, ServingError):
        assert "10.0.0.7" not in ApiError.of(kind("10.0.0.7:8001: refused")).message


@pytest.mark.slow
def test_an_address_that_guesses_keys_is_blocked_for_a_while(tmp_path: Path) -> None:
    with (
        gateway("127.0.0.1:9", tmp_path / "log", SERVING_API_KEY="right") as guarded,
        httpx.Client(timeout=PATIENCE) as client,
    ):

        def ask(key: str | None, address: str = "192.0.2.7") -> httpx.Response:
            headers = {"x-forwarded-for": address, **({"authorization": f"Bearer {key}"} if key else {})}
            return client.post(f"{guarded.url}/v1/completions", headers=headers, content=b"{")

        assert [ask(None).status_code for _ in range(20)] == [401] * 20  # no guess
        assert [ask(f"guess {number}").status_code for number in range(10)] == [401] * 10
        for key in ("another guess", "right"):
            refused = ask(key)
            assert refused.status_code == 429 and 0 < int(refused.headers["retry-after"]) <= 6
            assert refused.json()["error"]["message"] == "too many wrong API keys from this address"
        assert ask("right", "192.0.2.8").status_code == 400  # elsewhere it is heard, as far as its broken body
        time.sleep(int(refused.headers["retry-after"]))
        assert ask("right").status_code == 400


def test_openais_parameters_and_vllms_become_sampling_parameters() -> None:
    form = ChatCompletion.read(json.dumps(chat(max_completion_tokens=7, stop="x", top_k=3, seed=1, user="me")).encode())
    assert form.sampling == {"temperature": 0, "max_tokens": 7, "stop": "x", "top_k": 3, "seed": 1}
    assert TextCompletion.read(b'{"model": "gemma", "prompt": "Hi"}').prompt == ["Hi"]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    read = ChatCompletion.read(json.dumps(chat(messages=parts)).encode())
    assert read.messages[0].as_dict() == {"role": "system", "content": "a\nb"}


@pytest.mark.parametrize(
    ("others", "param", "words"),
    [
        ({"n": 17}, "n", "n: .* less than or equal to 16"),
        ({"logprobs": 2}, "logprobs", "logprobs: .* boolean"),
        ({"top_logprobs": 2}, "top_logprobs", 'top_logprobs: it needs "logprobs": true'),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"tools": "weather"}, "tools", "tools: .* array"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice is not supported"),
        ({"temperature": "warm"}, "temperature", "temperature: .* number"),
        ({"temperature": True}, "temperature", "temperature: .* number"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: .* integer"),
        ({"stream": "yes"}, "stream", "stream: .* boolean"),
        ({"messages": "Hi"}, "messages", "messages: .* array"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", '"type": "text"'),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"model": None}, "model", "model: .* string"),
    ],
)
def test_unsupported_parameters_are_refused_by_name(others: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        ChatCompletion.read(json.dumps(chat(**others)).encode())
    assert refused.value.status == 400 and refused.value.param == param
    assert re.search(words, refused.value.message)


def test_harmless_values_of_unsupported_parameters_are_accepted() -> None:
    harmless = {
        "n": 1,
        "logprobs": False,
        "tools": [],
        "response_format": {"type": "text"},
        "user": "me",
        "store": True,
    }
    assert ChatCompletion.read(json.dumps(chat(**harmless)).encode()).sampling == GREEDY


@pytest.mark.parametrize("prompt", [[1, "a"], [[1], []], [[1, [2]]], [-1], [True], [], 3, None])
def test_a_completion_takes_texts_and_tokens(prompt: Any) -> None:
    with pytest.raises(ApiError, match="prompt: a text or a list of tokens, or a list of these"):
        TextCompletion.read(json.dumps({"model": "gemma", "prompt": prompt}).encode())


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"model": "\xff"}', b'{"a": "\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not JSON in UTF-8"):
        TextCompletion.read(body)


@pytest.mark.slow
def test_a_gateway_without_a_server_says_so_limits_its_callers_and_refuses_a_taken_port(tmp_path: Path) -> None:
    with gateway(
        f"127.0.0.1:{free_ports(1)[0]}", tmp_path / "log", "--per-minute", "1", SERVING_API_KEY="a,b,c"
    ) as alone:
        for path in ("/health", "/v1/models"):
            found = httpx.get(alone.url + path, headers={"authorization": "Bearer a"}, timeout=PATIENCE)
            assert found.status_code == 503, found.text
        url = f"{alone.url}/v1/chat/completions"
        asked = httpx.post(url, json=chat(), headers={"authorization": "Bearer c"}, timeout=PATIENCE)
        assert asked.status_code == 503 and asked.json()["error"]["type"] == "server_error"
        assert int(asked.headers["retry-after"]) > 0
        # One a minute.
        limited = [
            httpx.post(url, content=b"{", headers={"authorization": "Bearer b"}, timeout=PATIENCE) for _ in range(2)
        ]
        assert [response.status_code for response in limited] == [400, 429]
        assert limited[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(limited[-1].headers["retry-after"]) <= 60
        port = alone.url.rpartition(":")[2]
        again = subprocess.run(
            [SERVING_PYTHON, "-m", "serving.gateway", "--port", port], cwd=ROOT, capture_output=True, text=True
        )
    assert again.returncode == 2 and again.stderr.startswith(f"error: the gateway cannot listen on 127.0.0.1:{port}")
    assert alone.process.returncode == 0


# --- the openai package -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_openai_package_lists_the_base_and_the_adapters(api: openai.OpenAI) -> None:
    assert sorted(model.id for model in api.models.list()) == sorted(["gemma", *PROMPTS])
    assert api.models.retrieve("slang").id == "slang"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("nobody")


@pytest.mark.slow
def test_a_chat_is_answered_with_the_prompt_the_adapter_was_trained_with(api: openai.OpenAI, stack: Stack) -> None:
    with Client(stack.grpc) as client:
        expected = {name: client.chat(HI, name, **GREEDY) for name in PROMPTS}
        expected["gemma"] = client.chat(HI, None, **GREEDY)
        both = client.ask("slang", {"context": "In the rain. ", "condition": "Long."}, **GREEDY)
    for name, answer in expected.items():
        given = api.chat.completions.create(model=name, messages=HI, **GREEDY)
        assert (
            given.choices[0].message.content == answer.text and given.choices[0].finish_reason == answer.finish_reason
        )
        assert given.usage and given.usage.completion_tokens == answer.output_tokens
        assert given.usage.prompt_tokens == answer.input_tokens and given.model == name
    fields = json.dumps({"context": "In the rain. ", "condition": "Long."})
    asked = [{"role": "user", "content": fields}]
    assert api.chat.completions.create(model="slang", messages=asked, **GREEDY).choices[0].message.content == both.text


@pytest.mark.slow
def test_streams_and_whole_answers_have_the_same_text_sync_and_async(api: openai.OpenAI, stack: Stack) -> None:
    whole = api.chat.completions.create(**chat())
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(api.chat.completions.create(**chat(**options)))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 4
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices

    async def asynchronously() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{stack.gateway}/v1", api_key="-") as others:
            answer = await others.completions.create(model="slang", prompt="Once upon", **GREEDY)
            stream = await others.completions.create(model="slang", prompt="Once upon", stream=True, **GREEDY)
            parts = [chunk.choices[0].text async for chunk in stream]
            return answer.choices[0].text, "".join(parts)

    text, streamed = asyncio.run(asynchronously())
    with Client(stack.grpc) as client:
        assert text == streamed == client.generate("Once upon", "slang", **GREEDY).text


@pytest.mark.slow
def test_n_answers_to_each_of_several_prompts_whole_and_in_a_stream(api: openai.OpenAI, stack: Stack) -> None:
    drawn: dict[str, Any] = {"temperature": 1, "max_tokens": 12}
    alone = [
        api.completions.create(model="gemma", prompt=prompt, seed=seed, **drawn)
        for prompt in ("Hi", "Good morning")
        for seed in (5, 6, 7)
    ]
    asked: dict[str, Any] = {"model": "gemma", "prompt": ["Hi", "Good morning"], "n": 3, "seed": 5, **drawn}
    whole = api.completions.create(**asked)
    texts = [one.choices[0].text for one in alone]
    assert [(one.index, one.text) for one in whole.choices] == list(enumerate(texts)) and len(set(texts)) > 2
    assert whole.usage and alone[0].usage and alone[3].usage
    assert whole.usage.prompt_tokens == alone[0].usage.prompt_tokens + alone[3].usage.prompt_tokens
    assert whole.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone if one.usage)
    streamed, reasons = [""] * 6, {}
    for chunk in api.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert streamed == texts and reasons == {one.index: one.finish_reason for one in whole.choices}
    chats = api.chat.completions.create(model="chat", messages=HI, n=2, **drawn)  # type: ignore[arg-type]
    assert [one.index for one in chats.choices] == [0, 1]
    with pytest.raises(openai.BadRequestError, match="min_tokens is 9"):
        api.completions.create(**asked, extra_body={"min_tokens": 9, "max_tokens": 3})
    before = stack.cancelled()
    endless = api.completions.create(model="gemma", prompt="Hi", n=2, stream=True, extra_body=ENDLESS)
    next(iter(endless))
    endless.close()
    until(lambda: stack.cancelled() == before + 2)


@pytest.mark.slow
def test_a_seed_repeats_an_answer_and_a_stop_ends_it(api: openai.OpenAI) -> None:
    def ask(**sampling: Any) -> str:
        return str(api.completions.create(model="gemma", prompt="Once upon", max_tokens=12, **sampling).choices[0].text)

    assert ask(temperature=1, seed=3) == ask(temperature=1, seed=3) != ask(temperature=1, seed=4)
    text = ask(temperature=0)
    stop = text[4:6]
    assert ask(temperature=0, stop=[stop]) == text.partition(stop)[0]


@pytest.mark.slow
def test_the_openai_package_raises_its_usual_exceptions(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        api.chat.completions.create(model="nobody", messages=HI)
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(model="chat", messages=HI, temperature=-1)
    assert refused.value.param == "temperature" and "0 (greedy) or more" in str(refused.value)
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(model="chat", messages=[{"role": "user", "content": "word " * WINDOW}], stream=True)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="stop is not a text, or a list of texts"):
        api.chat.completions.create(model="chat", messages=HI, extra_body={"stop": [1]})
    with pytest.raises(openai.BadRequestError, match="the user's"):
        api.chat.completions.create(model="chat", messages=[*HI, {"role": "assistant", "content": "Hello."}])


HASTY = """
import functools
import serving.gateway
serving.gateway.AsyncClient = functools.partial(serving.gateway.AsyncClient, deadline=0.5)
serving.gateway.main()
"""


@pytest.mark.slow
def test_the_openai_package_asks_once_where_asking_again_cannot_help(stack: Stack, tmp_path: Path) -> None:
    with gateway(stack.grpc, tmp_path / "log", start=("-c", HASTY)) as hasty:
        client = openai.OpenAI(base_url=f"{hasty.url}/v1", api_key="-", max_retries=2)
        with pytest.raises(openai.InternalServerError) as late:
            client.chat.completions.create(
                model="chat", messages=HI, max_tokens=ENDLESS["max_tokens"], extra_body={"ignore_eos": True}
            )
        assert late.value.status_code == 504 and late.value.response.headers["x-should-retry"] == "false"
        until(lambda: not stack.stats()["running"])
        asked = [line["status"] for line in hasty.lines() if line["message"] == "request"]
    assert asked == [504]
    with gateway(f"127.0.0.1:{free_ports(1)[0]}", tmp_path / "nobody") as alone:
        client = openai.OpenAI(base_url=f"{alone.url}/v1", api_key="-", max_retries=1)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="chat", messages=HI)
        asked = [line["status"] for line in alone.lines() if line["message"] == "request"]
    assert asked == [503, 503], "what may be there in a moment is asked for again"


# --- raw requests -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_server_sent_events_end_with_done(web: httpx.Client) -> None:
    response = web.post("/v1/chat/completions", json=chat(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, done = events(response)
    assert done == "[DONE]" and all(json.loads(chunk)["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({json.loads(chunk)["id"] for chunk in chunks}) == 1
    assert web.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert web.get("/v1/chat/completions").status_code == 405


@pytest.mark.slow
def test_an_adapter_that_does_nothing_keeps_a_checking_gateway_from_being_ready(stack: Stack, tmp_path: Path) -> None:
    empty = add_empty_adapter(stack, tmp_path)
    try:
        with gateway(stack.grpc, tmp_path / "log", "--check-adapters") as checking:
            health = settled_health(checking.url)
            assert health.status_code == 503 and health.json() == {
                "status": "wrong adapters",
                "error": "adapter empty answers as the base does: it is empty, or the engine ignores it",
            }
            errors = [line["message"] for line in checking.lines() if line["level"] == "error"]
            assert errors == [health.json()["error"]]
    finally:
        remove_adapter(empty)
        until(lambda: "empty" not in stack.stats()["adapters"])
    with gateway(stack.grpc, tmp_path / "log", "--check-adapters") as checking:
        assert settled_health(checking.url).json()["status"] == "ok"


@pytest.mark.slow
def test_health_generates_a_token_and_reports_failure_when_it_cannot(web: httpx.Client, stack: Stack) -> None:
    assert web.get("/health").json()["status"] == "ok"
    with stack.stopped("engine"):
        until(lambda: web.get("/health").status_code == 503)  # an answer may be a second old
        assert web.get("/health").json()["status"] == "failing"
    until(lambda: web.get("/health").status_code == 200)


IMPATIENT = """
import serving.gateway
serving.gateway.HEALTH_DEADLINE, serving.gateway_health.HANGS_SECONDS = 0.5, 2
serving.gateway.main()
"""


@pytest.mark.slow
def test_health_tells_a_server_that_works_for_others_from_one_that_hangs(stack: Stack, tmp_path: Path) -> None:
    def health() -> tuple[int, str]:
        answer = httpx.get(f"{impatient.url}/health", timeout=PATIENCE)
        return answer.status_code, answer.json()["status"]

    with (
        gateway(stack.grpc, tmp_path / "log", start=("-c", IMPATIENT)) as impatient,
        Client(stack.grpc) as others,
        ExitStack() as streams,
    ):
        for _ in range(4):
            streams.enter_context(others.stream("Hi", **FILLING))
        until(lambda: stack.stats()["running"] == 4)
        assert health() == (200, "busy")
        with stack.stopped("engine"):
            until(lambda: health() == (503, "failing"))
    until(lambda: stack.stats()["running"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_cancels_its_answer_in_the_engine(stack: Stack, stream: bool) -> None:
    body = json.dumps(chat(stream=stream, **ENDLESS)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    before = stack.cancelled()
    with socket.create_connection(("127.0.0.1", stack.ports["gateway"])) as connection:
        connection.sendall(head + body)
        until(lambda: stack.stats()["running"])
    until(lambda: stack.cancelled() > before and not stack.stats()["running"])
    assert stack.cancelled() == before + 1


@pytest.mark.slow
def test_keys_limits_metrics_and_logs(stack: Stack, tmp_path: Path) -> None:
    with gateway(
        stack.grpc, tmp_path / "log", "--max-body", "5000", "--concurrent", "2", SERVING_API_KEY="first, second"
    ) as guarded:
        url = f"{guarded.url}/v1/chat/completions"

        def post(key: str | None, **others: Any) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}".encode()} if key else {}
            return httpx.post(url, json=chat(**others), headers=headers, timeout=PATIENCE)

        for key in (None, "", "firs", "first, second", "é"):
            refused = post(key)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{guarded.url}/v1/models", timeout=PATIENCE).status_code == 401
        assert httpx.get(f"{guarded.url}/health", timeout=PATIENCE).status_code == 200
        assert post("first").status_code == post("second").status_code == 200
        assert post("second", model="nobody").status_code == 404

        large = post("second", messages=[{"role": "user", "content": "x" * 6000}])
        assert large.status_code == 413 and large.json()["error"]["message"] == "the request is larger than 5,000 bytes"
        second = {"headers": {"authorization": "Bearer second"}, "timeout": PATIENCE}
        port = int(guarded.url.rpartition(":")[2])
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\n"
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as announces:
            announces.sendall(f"{head}Content-Length: 5001\r\nExpect: 100-continue\r\n\r\n".encode())
            assert announces.recv(12) == b"HTTP/1.1 413", "refused before its body is sent"
        chunked = httpx.post(url, content=iter([b"x" * 3000] * 3), **second)
        assert chunked.status_code == 413

        with ThreadPoolExecutor(12) as threads, httpx.Client(**second) as shared:
            together = list(threads.map(lambda _: shared.post(url, json=chat(**LONG)), range(12)))
        busy = [response for response in together if response.status_code == 429]
        assert busy and {response.json()["error"]["code"] for response in busy} == {"busy"}
        assert {response.status_code for response in together} == {200, 429}

        with httpx.Client(timeout=PATIENCE) as greedy:  # one caller does not take the last place
            first = {"headers": {"authorization": "Bearer first"}}
            with greedy.stream("POST", url, json=chat(stream=True, **ENDLESS), **first) as held:
                parts = held.iter_text()
                next(parts)
                assert post("first").json()["error"]["code"] == "busy"
                assert post("second").status_code == 200
            until(lambda: post("first").status_code == 200)
            with greedy.stream("POST", url, json=chat(stream=True, n=2, **ENDLESS), **first) as held:
                parts = held.iter_text()
                next(parts)
                assert post("second").json()["error"]["code"] == "busy"  # each answer has a place
        until(lambda: "door_in_flight 0.0" in httpx.get(f"{guarded.url}/metrics", timeout=PATIENCE).text)
        counted = httpx.get(f"{guarded.url}/metrics", timeout=PATIENCE).text
        lines = guarded.lines()
    seen = {(line["model"], line["status"]) for line in lines if line["message"] == "request" and "model" in line}
    for model, status in seen:
        times = sum(line.get("model") == model and line.get("status") == status for line in lines)
        labels = f'model="{model}",path="/v1/chat/completions",status="{status}"'
        assert f"door_requests_total{{{labels}}} {times:.1f}" in counted
    assert 'model="nobody"' not in counted  # whoever invents names makes no new series
    tokens = sum(line["output_tokens"] for line in lines if line.get("model") == "chat")
    assert f'door_tokens_total{{kind="output",model="chat"}} {tokens:.1f}' in counted
    assert 'door_next_token_seconds_count{model="chat"}' in counted
    assert 'door_first_token_seconds_count{model="chat"}' in counted and "door_in_flight 0.0" in counted
    said = guarded.log.read_text()
    assert "Hi!" not in said and "first" not in said.replace("first_token_seconds", "") and '"caller": "key 1"' in said


@pytest.mark.slow
def test_texts_are_logged_on_request_and_a_terminated_gateway_lets_answers_finish(stack: Stack, tmp_path: Path) -> None:
    with gateway(stack.grpc, tmp_path / "log", SERVING_LOG_TEXT="1") as running:
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=chat(stream=True, **LONG)) as response:
            parts = response.iter_text()
            text = next(parts)
            running.process.send_signal(signal.SIGTERM)
            text += "".join(parts)
        assert text.endswith("data: [DONE]\n\n")
        assert running.process.wait(PATIENCE) == 0
    (line,) = (line for line in running.lines() if line["message"] == "request")
    assert line["request"]["messages"] == HI and line["answer"] and line["status"] == 200


@pytest.mark.slow
def test_hundreds_of_random_bodies_are_answered_or_refused(web: httpx.Client, stack: Stack) -> None:
    dice = random.Random(1)
    values = [None, True, -1, 0, 1, 2.5, 1e400, 10**30, "", "x", "chat", [], ["x"], {}, HI, [[]], {"type": "text"}]
    names = [
        "model",
        "messages",
        "prompt",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "seed",
        "n",
        "logprobs",
        "presence_penalty",
        "tools",
        "response_format",
        "min_p",
        "ignore_eos",
        "user",
        "é",
    ]

    def ask(number: int) -> int:
        body = chat(max_tokens=2) if number % 2 else {"model": "gemma", "prompt": "Hi", **GREEDY, "max_tokens": 2}
        body |= {name: dice.choice(values) for name in dice.sample(names, dice.randrange(5))}
        content = json.dumps(body).encode()
        if number % 5 == 0:
            cut = dice.randrange(len(content))
            content = content[:cut] + dice.randbytes(3) + content[cut + dice.randrange(4) :]
        path = "/v1/chat/completions" if number % 2 else "/v1/completions"
        response = web.post(path, content=content, headers={"content-type": "application/json"})
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, response.text
        return response.status_code

    statuses = [ask(number) for number in range(400)]
    assert {200, 400} <= set(statuses) <= {200, 400, 404}, set(statuses)
    assert web.get("/health").status_code == 200
    until(lambda: stack.stats()["running"] + stack.stats()["waiting"] == 0)


@pytest.mark.slow
def test_an_interrupted_answer_ends_its_stream_with_an_error(api: openai.OpenAI, stack: Stack) -> None:
    stream = api.chat.completions.create(stream=True, extra_body={"ignore_eos": True}, **chat(max_tokens=15_000))
    next(stream)
    stack.managed("engine").kill()
    with pytest.raises(openai.APIError, match="the model is being started or stopped"):
        list(stream)

    async def until_back() -> None:
        async with AsyncClient(stack.grpc, retry_for=60) as client:
            await client.chat(HI)

    asyncio.run(until_back())
    assert api.chat.completions.create(**chat()).usage.completion_tokens <= SAMPLING["max_tokens"]  # type: ignore[union-attr]
