"""`/v1/responses`: what it takes and refuses, and that the `openai` package understands its responses and streams."""

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
import torch
from conftest import PATIENCE, tiny_gemma
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter
from tiny_serving import GREEDY, SAMPLING, WINDOW, Stack, serve_tiny
from tiny_tokenizer import tiny_tokenizer

from serving.client import Answer, AnswerPart, AsyncClient, Client, InvalidRequest, Unavailable
from serving.openai_api import ApiError
from serving.openai_responses import ModelResponse, ResponseReply
from serving.protocol import LENGTH, STOP

TEMPERATURE, LIMIT = {"temperature": 0}, {"max_output_tokens": GREEDY["max_tokens"]}
HI = {"role": "user", "content": "Hi!"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}
EVENT = TypeAdapter[Any](ResponseStreamEvent)


def read(**others: Any) -> ModelResponse:
    return ModelResponse.read(json.dumps({"model": "chat", "input": "Hi!", **others}).encode())


def refused(**others: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        read(**others)
    assert error.value.status == 400
    return error.value


def messages(form: ModelResponse) -> list[dict[str, Any]]:
    return [message.as_dict() for message in form.messages]


def events(text: str) -> list[dict[str, Any]]:
    """Those of a stream, each of a form that OpenAI's reference has, in their order."""
    found = []
    for number, event in enumerate(text.split("\n\n")[:-1]):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}" and found[-1]["sequence_number"] == number
        EVENT.validate_python(found[-1])
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_text_or_a_list_of_messages_is_the_dialogue() -> None:
    assert messages(read()) == [HI]
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    said = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": parts, "type": "message"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}], "id": "msg_1"},
        HI,
    ]
    heard = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}, HI]
    assert messages(read(input=said)) == [{"role": "system", "content": "Be kind."}, *heard]
    assert messages(read(input=said[1:], instructions="Be brief.")) == [
        {"role": "system", "content": "Be brief."},
        *heard,
    ]
    both = {"role": "system", "content": "Be brief.\n\nBe kind."}
    assert messages(read(input=said, instructions="Be brief.")) == [both, *heard]


def test_an_answer_can_be_sent_back_as_it_came_without_its_thought() -> None:
    reply = read().reply()
    output = reply.whole(Answer("Hello.", STOP, 3, 2, thought="A guest."))["output"]
    assert [item["type"] for item in output] == ["reasoning", "message"]
    assert messages(read(input=[HI, *output, HI])) == [HI, {"role": "assistant", "content": "Hello."}, HI]


def test_parameters_of_sampling_are_taken_by_the_names_of_openai_and_of_vllm() -> None:
    form = read(max_output_tokens=7, temperature=0.5, top_p=0.9, top_k=3, seed=1, stop=["x"], min_tokens=2)
    assert form.sampling == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 1,
        "stop": ["x"],
        "min_tokens": 2,
    }
    assert read(structured_outputs={"regex": "a"}).sampling == {"structured_outputs": {"regex": "a"}}


def test_harmless_parameters_change_nothing() -> None:
    harmless = {
        "store": True,
        "metadata": {"a": "b"},
        "user": "me",
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "max_tool_calls": 3,
        "tools": [],
        "tool_choice": "auto",
        "include": [],
        "background": False,
        "truncation": "disabled",
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "top_logprobs": 0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "stream_options": {"include_obfuscation": False},
        "temprature": None,
    }
    form = read(**harmless)
    assert form.sampling == {} and messages(form) == [HI] and form.metadata == {"a": "b"}


def test_a_format_becomes_what_the_answer_must_be() -> None:
    assert read(text={"format": FORMAT}).sampling == {"structured_outputs": {"json": SCHEMA}}
    form = read(text={"format": {"type": "json_object"}})
    assert form.sampling == {"structured_outputs": {"json_object": True}}
    assert form.reply().whole(Answer("{}", STOP))["text"] == {"format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("prompt", {"id": "pmpt_1"}),
        ("tools", [{"type": "web_search"}]),
        ("tool_choice", "required"),
        ("include", ["message.output_text.logprobs"]),
        ("truncation", "auto"),
        ("reasoning", {"effort": "low"}),
        ("top_logprobs", 2),
        ("logprobs", True),
        ("n", 2),
        ("stream_options", {"include_obfuscation": True}),
        ("echo", True),
    ],
)
def test_what_would_change_the_answer_and_is_not_there_is_refused_by_name(name: str, value: Any) -> None:
    error = refused(**{name: value})
    assert error.message.startswith(f"{name} is not supported")
    assert (error.param, error.code) == (name, "unsupported_parameter")
    if name in ("previous_response_id", "conversation"):
        assert "send the whole dialogue as input" in error.message


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("inputs", "input"),
        ("instruction", "instructions"),
        ("truncaton", "truncation"),
        ("messages", "input"),
        ("max_tokens", "max_output_tokens"),
        ("max_completion_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
    ],
)
def test_a_name_that_is_not_known_is_refused_with_the_one_that_is_meant(name: str, meant: str) -> None:
    error = refused(**{name: 1})
    assert error.message == f"unknown parameter '{name}'; did you mean {meant}?"
    assert (error.param, error.code) == (name, "unknown_parameter")


@pytest.mark.parametrize(
    ("others", "param", "words"),
    [
        ({"input": None}, "input", "array"),
        ({"input": ["Hi"]}, "input.0", "object"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "'assistant'"),
        ({"input": [HI, {"type": "function_call_output", "output": "x"}]}, "input.1", "'function_call_output'"),
        ({"input": [HI, {"type": "item_reference", "id": "msg_1"}]}, "input.1", "'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content", "'input_image'"),
        ({"input": [{"role": "user", "content": ["Hi"]}]}, "input.0.content", "each part"),
        ({"max_output_tokens": "7"}, "max_output_tokens", "integer"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"stream": 1}, "stream", "boolean"),
        ({"text": {"verbosity": "high"}}, "text.verbosity", "'medium'"),
        ({"text": {"form": {}}}, "text.form", "not permitted"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'json_schema'"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format", '"schema"'),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "text.format",
            "not both",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(others: dict[str, Any], param: str, words: str) -> None:
    error = refused(**others)
    assert error.param == param and error.message.startswith(param) and words in error.message


@pytest.mark.parametrize(
    ("others", "message", "shown", "param"),
    [
        ({}, "messages: the dialogue has no user message", "input: the dialogue has no user message", "input"),
        ({}, "max_tokens is 0", "max_output_tokens is 0", "max_output_tokens"),
        ({}, "min_tokens is 9, more than max_tokens", "min_tokens is 9, more than max_output_tokens", "min_tokens"),
        ({"text": {"format": FORMAT}}, "structured_outputs.json at /a: no", "text.format.schema at /a: no", None),
        ({"structured_outputs": {"json": {}}}, "structured_outputs.json: no", "structured_outputs.json: no", None),
    ],
)
def test_errors_of_the_server_have_the_names_that_were_sent(
    others: dict[str, Any], message: str, shown: str, param: str | None
) -> None:
    error = read(**others).named_as_sent(ApiError.of(InvalidRequest(message)))
    assert error.message == shown and error.param == (param or shown.partition(" ")[0].partition(".json")[0])


# --- writing ----------------------------------------------------------------------------------------------------------
PARTS = [AnswerPart("", "A gu"), AnswerPart("", "est."), AnswerPart("Hel", ""), AnswerPart("lo.", "")]


def streamed(reply: ResponseReply, answer: Answer) -> list[dict[str, Any]]:
    return events("".join(reply.chunk(part, answer) for part in PARTS) + reply.last(answer))


@pytest.mark.parametrize(("reason", "status"), [(STOP, "completed"), (LENGTH, "incomplete")])
def test_a_stream_tells_how_its_last_response_came_into_being(reason: str, status: str) -> None:
    form = read(instructions="Be brief.", text={"format": FORMAT}, metadata={"a": "b"}, store=True, **LIMIT)
    answer = Answer("Hello.", reason, 5, 7, thought="A guest.")
    told = streamed(ResponseReply(form), answer)
    assert [one["type"].removeprefix("response.") for one in told] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        status,
    ]
    assert told[0]["response"]["status"] == "in_progress" and told[0]["response"]["output"] == []
    assert told[2]["item"]["content"] == [] and told[2]["item"]["status"] == "in_progress"
    assert [one["delta"] for one in told if "delta" in one] == ["A gu", "est.", "Hel", "lo."]
    last = told[-1]["response"]
    assert [one["item"] for one in told if one["type"] == "response.output_item.done"] == last["output"]

    whole = ResponseReply(form).whole(answer)
    Response.model_validate(whole, strict=True)
    same = whole.keys() - {"id", "output", "created_at", "completed_at"}
    assert {name: whole[name] for name in same} == {name: last[name] for name in same}
    thought, said = whole["output"]
    assert thought["summary"] == [] and thought["content"] == [{"type": "reasoning_text", "text": "A guest."}]
    assert said["content"][0]["text"] == "Hello." and said["status"] == status == whole["status"]
    assert (whole["completed_at"] is None) == (reason == LENGTH)
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if reason == LENGTH else None)
    assert whole["usage"]["input_tokens"] == 5 and whole["usage"]["total_tokens"] == 12
    assert (whole["instructions"], whole["metadata"], whole["store"]) == ("Be brief.", {"a": "b"}, False)
    assert whole["text"] == {"format": FORMAT} and whole["max_output_tokens"] == GREEDY["max_tokens"]


def test_an_answer_without_a_text_is_an_empty_message() -> None:
    reply = read().reply()
    answer = Answer("", STOP, 5, 1)
    told = events(reply.chunk(AnswerPart("", ""), answer) + reply.last(answer))
    (message,) = told[-1]["response"]["output"]
    assert message["content"][0]["text"] == "" and told[-1]["type"] == "response.completed"
    assert [one["type"] for one in told].count("response.output_item.added") == 1


def test_a_stream_that_fails_ends_with_the_failed_response_and_an_error() -> None:
    reply = read().reply()
    *_, failed, error = events(
        "".join(reply.chunk(part, Answer()) for part in PARTS[:3]) + reply.failure(ApiError.of(Unavailable("10.0.0.7")))
    )
    assert failed["type"] == "response.failed" and failed["response"]["error"]["code"] == "server_error"
    assert [item["status"] for item in failed["response"]["output"]] == ["completed", "incomplete"]
    assert error["type"] == "error" and error["code"] == "unavailable"
    assert error["message"] == error["error"]["message"] == failed["response"]["error"]["message"]


# --- the openai package -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    base = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_gemma("gemma3_text", torch.bfloat16, vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    with serve_tiny(base, tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture(scope="module")
def api(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.gateway}/v1", api_key="-", max_retries=2)


@pytest.mark.slow
def test_a_response_has_the_answer_of_a_chat(api: openai.OpenAI, stack: Stack) -> None:
    system = {"role": "system", "content": "Be kind."}
    with Client(stack.grpc) as client:
        expected = client.chat([system, HI], "chat", **GREEDY)
        alone = client.chat([HI], None, **GREEDY)
    given = api.responses.create(model="chat", input="Hi!", instructions="Be kind.", **TEMPERATURE, **LIMIT)
    assert (given.output_text, given.model, given.object) == (expected.text, "chat", "response")
    assert given.usage and given.usage.input_tokens == expected.input_tokens
    assert given.usage.output_tokens == expected.output_tokens
    assert given.status == ("incomplete" if expected.finish_reason == LENGTH else "completed")
    parts = [system, {"role": "user", "content": [{"type": "input_text", "text": "Hi!"}]}]
    listed = api.responses.create(model="chat", input=parts, **TEMPERATURE, **LIMIT)  # type: ignore[arg-type]
    assert listed.output_text == expected.text
    assert api.responses.create(model="gemma", input="Hi!", **TEMPERATURE, **LIMIT).output_text == alone.text
    # the dialogue goes on: what came is sent back with the next question
    dialogue: Any = [HI, *listed.output, {"role": "user", "content": "And?"}]
    with Client(stack.grpc) as client:
        turns = [HI, {"role": "assistant", "content": listed.output_text}, {"role": "user", "content": "And?"}]
        following = client.chat(turns, "chat", **GREEDY)
    assert api.responses.create(model="chat", input=dialogue, **TEMPERATURE, **LIMIT).output_text == following.text
    seeds = {api.responses.create(model="chat", input="Hi!", extra_body={"seed": 3}).output_text for _ in range(2)}
    assert len(seeds) == 1


@pytest.mark.slow
def test_an_answer_that_is_cut_off_is_incomplete_and_says_why(api: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "chat",
        "input": "Hi!",
        "max_output_tokens": 3,
        "extra_body": {"ignore_eos": True},
    }
    cut = api.responses.create(**asked)
    assert cut.status == "incomplete" and cut.incomplete_details
    assert cut.incomplete_details.reason == "max_output_tokens" and cut.usage and cut.usage.output_tokens == 3
    *_, last = api.responses.create(**asked, stream=True)
    assert last.type == "response.incomplete" and last.response.incomplete_details == cut.incomplete_details


@pytest.mark.slow
def test_streams_have_the_text_of_whole_responses_sync_and_async(api: openai.OpenAI, stack: Stack) -> None:
    asked: dict[str, Any] = {"model": "chat", "input": "Hi!", **TEMPERATURE, "max_output_tokens": 40}
    asked |= {"extra_body": {"structured_outputs": {"regex": "[a-z ]{20,30}"}}}  # it ends by itself
    whole = api.responses.create(**asked)
    told = list(api.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in told] == list(range(len(told)))
    deltas = [event.delta for event in told if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text and len(deltas) > 2
    assert told[0].type == "response.created" and told[-1].type == "response.completed"
    assert told[-1].response.output_text == whole.output_text and told[-1].response.usage == whole.usage
    with api.responses.stream(**asked) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        assert snapshots[-1] == stream.get_final_response().output_text == whole.output_text

    async def asynchronously() -> str:
        address = f"{stack.gateway}/v1"
        async with (
            openai.AsyncOpenAI(base_url=address, api_key="-") as others,
            others.responses.stream(**asked) as stream,
        ):
            return (await stream.get_final_response()).output_text

    assert asyncio.run(asynchronously()) == whole.output_text
    body = {name: value for name, value in asked.items() if name != "extra_body"} | asked["extra_body"]
    raw = httpx.post(f"{stack.gateway}/v1/responses", json={**body, "stream": True}, timeout=PATIENCE)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert events(raw.text)[-1]["response"]["output"][0]["content"][0]["text"] == whole.output_text


class Term(BaseModel):
    """A term of slang."""

    slang: Annotated[str, Field(max_length=8)]
    kind: Literal["verb", "noun"]


@pytest.mark.slow
def test_an_answer_is_parsed_into_a_class(api: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "chat", "input": "Hi!", "max_output_tokens": 1000, "text_format": Term}
    parsed = api.responses.parse(**asked)
    assert isinstance(parsed.output_parsed, Term) and parsed.status == "completed"
    with api.responses.stream(**asked) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Term)


@pytest.mark.slow
def test_refusals_are_the_usual_exceptions_with_the_names_of_this_endpoint(api: openai.OpenAI) -> None:
    create: Any = api.responses.create
    with pytest.raises(openai.BadRequestError, match="send the whole dialogue as input"):
        create(model="chat", input="Hi!", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="nobody"):
        create(model="nobody", input="Hi!")
    with pytest.raises(openai.BadRequestError, match="max_output_tokens is 0") as wrong:
        create(model="chat", input="Hi!", max_output_tokens=0)
    assert wrong.value.param == "max_output_tokens"
    bad = {"format": {"type": "json_schema", "name": "x", "schema": {"items": {"not": {}}}}}
    with pytest.raises(
        openai.BadRequestError, match=r'text.format.schema at /items: not supported: \["not"\]'
    ) as wrong:
        create(model="chat", input="Hi!", text=bad)
    assert wrong.value.param == "text.format.schema"
    with pytest.raises(openai.BadRequestError, match="input: message 2 has role 'user' where assistant is expected"):
        create(model="chat", input=[HI, HI])
    with pytest.raises(openai.BadRequestError) as wrong:
        create(model="chat", input="word " * WINDOW, stream=True)
    assert wrong.value.code == "context_length_exceeded"
    for ask in (api.responses.retrieve, api.responses.delete):
        with pytest.raises(openai.NotFoundError, match="responses are not kept"):
            ask("resp_1")


@pytest.mark.slow
def test_an_interrupted_response_fails_and_the_package_raises(api: openai.OpenAI, stack: Stack) -> None:
    asked: dict[str, Any] = {"model": "chat", "input": "Hi!", "max_output_tokens": 15_000}
    stream = api.responses.create(**asked, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    stack.managed("engine").kill()
    told = []
    with pytest.raises(openai.APIError, match="the model is being started or stopped"):
        for event in stream:
            told.append(event)
    assert told[-1].type == "response.failed" and told[-1].response.status == "failed"

    async def until_back() -> None:
        async with AsyncClient(stack.grpc, retry_for=60) as client:
            await client.chat([HI])

    asyncio.run(until_back())
    after = api.responses.create(model="chat", input="Hi!").usage
    assert after and after.output_tokens <= SAMPLING["max_tokens"]
