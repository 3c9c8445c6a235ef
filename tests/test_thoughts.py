"""Thoughts and calls of tools of a Gemma 4, from the engine's text to the client, the gateway and the site."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import PATIENCE, ROOT, until
from scripted_triton import ScriptedTriton, scripted_triton
from tiny_gemma4 import tiny_gemma4
from tiny_serving import PROMPTS, SERVING_PYTHON, free_ports, is_open, needs_serving
from website import Site, expect

from core.prompt import Prompt
from serving.client import BASE, Client, InvalidRequest, ToolCall
from serving.repository import base_entry

pytest_plugins = ("website",)
PROMPT = Prompt("<|turn>user\n{instruction}<turn|>\n<|turn>model\n{response}<turn|>", "{message}", "{answer}")
HI = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi!"}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {}}}
SAID = ["<|channel>", "thought\nA gu", "est.\n", "<channel|>", "Hel", "lo!"]
CALL = ["<|tool_call>", "call:weather{city:", '<|"|>Ro', 'me<|"|>}', "<tool_call|>"]


@pytest.fixture
def triton(tmp_path: Path) -> Iterator[ScriptedTriton]:
    """The base, an adapter `chat` with Gemma 4's turns, and `old` with those of Gemma 3."""
    tiny_gemma4("e2b").config.save_pretrained(tmp_path)
    catalogue = {
        "chat": {"name": "chat", "prompt": vars(PROMPT), "sampling": {"stop": ["<turn|>"]}},
        "old": {"name": "old", "prompt": vars(PROMPTS["chat"])},
        "gemma": base_entry(tmp_path),
    }
    with scripted_triton(catalogue, SAID) as running:
        yield running


@pytest.mark.parametrize("name", ["chat", None])
def test_a_thought_is_no_part_of_the_answer_and_comes_first(triton: ScriptedTriton, name: str | None) -> None:
    with Client(triton.url) as client:
        answer = client.chat(HI, name, thinking=True)
        assert (answer.text, answer.thought) == ("Hello!", "A guest.")
        stream = client.chat(HI, name, stream=True)
        parts = list(iter(stream.part, None))
        assert list(client.chat(HI, name, stream=True)) == ["Hel", "lo!"]
    assert [part.thought for part in parts] == ["A gu", "est.", "", ""]
    assert "".join(part.text for part in parts) == stream.answer.text == "Hello!"
    assert [text for text, _ in triton.asked[:2]] == [PROMPT.wrap_dialogue(HI, thinking=t) for t in (True, False)]
    assert triton.asked[0][1]["stop"] == ["<turn|>"] and triton.asked[0][1]["skip_special_tokens"] is False


def test_the_client_says_where_nothing_can_think_or_be_called(triton: ScriptedTriton) -> None:
    with Client(triton.url) as client:
        with pytest.raises(InvalidRequest, match="thinking: the prompt of this model has no place for it"):
            client.chat(HI, "old", thinking=True)
        with pytest.raises(InvalidRequest, match="tools: the prompt of this model has no place for it"):
            client.chat(HI, "old", tools=[TOOL])
        with pytest.raises(InvalidRequest, match="tools: number 1 is no function"):
            client.chat(HI, "chat", tools=[{}])
        client.chat(HI, "old")
    (asked,) = triton.asked
    assert "skip_special_tokens" not in asked[1]


def test_a_call_comes_back_as_a_name_and_arguments(triton: ScriptedTriton) -> None:
    triton.pieces = ["Let me see. ", *CALL]
    with Client(triton.url) as client:
        answer = client.chat(HI, "chat", tools=[TOOL])
    assert answer.tool_calls == [ToolCall("weather", {"city": "Rome"})] and answer.text == "Let me see. "


def test_an_older_server_that_does_not_say_how_its_base_is_asked_gets_the_turns_of_gemma_3(
    triton: ScriptedTriton,
) -> None:
    del triton.catalogue["gemma"]
    with Client(triton.url) as client:
        client.chat(HI, None)
    assert triton.asked[0][0] == BASE.prompt.wrap_dialogue(HI)


def test_the_command_line_thinks_aloud_on_standard_error(triton: ScriptedTriton, tmp_path: Path) -> None:
    (tmp_path / "hi.json").write_text(json.dumps(HI))
    words = ["chat", tmp_path / "hi.json", "--think", "--stream", "--url", triton.url]
    command = [sys.executable, "-m", "serving.client", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("Hello!\n", "A guest.")


@pytest.fixture
def api(triton: ScriptedTriton) -> Iterator[openai.OpenAI]:
    if not SERVING_PYTHON.exists():
        pytest.skip("needs the serving environment: make serve-env")
    (port,) = free_ports(1)
    command = [SERVING_PYTHON, "-m", "serving.gateway", "--triton", triton.url, "--port", str(port)]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: is_open(port))
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
    process.terminate()
    process.wait(PATIENCE)


@pytest.mark.slow
def test_the_gateway_speaks_of_thoughts_and_tools_as_openais_clients_expect(
    triton: ScriptedTriton, api: openai.OpenAI
) -> None:
    ask: Callable[..., Any] = api.chat.completions.create
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    whole = ask(model="chat", messages=HI, extra_body=thinking).choices[0]
    assert whole.message.model_extra == {"reasoning_content": "A guest."}
    assert (whole.message.content, whole.finish_reason) == ("Hello!", "stop")
    assert triton.asked[-1][0] == PROMPT.wrap_dialogue(HI, thinking=True)
    deltas = [chunk.choices[0].delta for chunk in ask(model="gemma", messages=HI, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "Hello!"
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "A guest."

    begun = [*HI, {"role": "assistant", "content": "Well, "}]
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    assert ask(model="chat", messages=begun, extra_body=goes_on).choices[0].message.content == "Hello!"
    assert triton.asked[-1][0] == PROMPT.wrap_dialogue(HI) + "Well, "
    with pytest.raises(openai.BadRequestError, match="continue_final_message: the last message must be a text of the"):
        ask(model="chat", messages=HI, extra_body=goes_on)

    triton.pieces = CALL
    called = ask(model="chat", messages=HI, tools=[TOOL]).choices[0]
    (call,) = called.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    assert called.finish_reason == "tool_calls" and called.message.content is None
    *_, told, end = [chunk.choices[0] for chunk in ask(model="chat", messages=HI, tools=[TOOL], stream=True)]
    assert told.delta.tool_calls[0].function.name == "weather" and end.finish_reason == "tool_calls"
    back = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    ask(model="chat", messages=[*HI, called.message, back], tools=[TOOL])
    spoken = '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
    answered = '<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>'
    assert triton.asked[-1][0].endswith(f"<|turn>model\n{spoken}{answered}")

    for more in ({"tools": [TOOL]}, {"messages": [*HI, called.message, back]}):
        with pytest.raises(openai.BadRequestError, match="tools is not supported; leave it out"):
            ask(**{"model": "old", "messages": HI, **more})
    assert ask(model="old", messages=HI, extra_body=thinking).choices[0].message.content.startswith("<|tool_call>")


@pytest.mark.slow
def test_a_thought_is_an_item_of_its_own_in_a_response(triton: ScriptedTriton, api: openai.OpenAI) -> None:
    ask: Callable[..., Any] = api.responses.create
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    whole = ask(model="chat", input=HI, extra_body=thinking)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert (whole.output[0].content[0].text, whole.output_text) == ("A guest.", "Hello!")
    told = list(ask(model="chat", input=HI, extra_body=thinking, stream=True))
    assert [event.delta for event in told if event.type == "response.reasoning_text.delta"] == ["A gu", "est."]
    assert told[-1].response.output_text == "Hello!"
    asked = PROMPT.wrap_dialogue(HI, thinking=True)
    assert [text for text, _ in triton.asked] == [asked, asked]
    back = [*HI, *whole.output, user("And you?")]
    ask(model="chat", input=back)
    assert triton.asked[-1][0] == PROMPT.wrap_dialogue([*HI, model("Hello!"), user("And you?")])
    with pytest.raises(openai.BadRequestError, match="cannot be combined with thinking") as refused:
        ask(model="chat", input=HI, extra_body=thinking, text={"format": {"type": "json_object"}})
    assert refused.value.param == "text.format"


@needs_serving
@pytest.mark.slow
def test_the_site_folds_a_thought_away(triton: ScriptedTriton, tmp_path: Path, open_page: Callable[..., Any]) -> None:
    site = Site(tmp_path, f"triton={triton.url}").wait()
    try:
        page = open_page(f"{site.address}/chat")
        page.get_by_label("Think first").check()
        for question in ("Hi!", "And you?"):
            page.get_by_label("Your message").fill(question)
            page.get_by_label("Send").click()
            expect(page.locator("#tools")).to_be_visible()
        expect(page.locator(".bubble.assistant")).to_have_text(["Hello!", "Hello!"])
        thought = page.locator(".thought p").first
        expect(thought).to_be_hidden()
        page.locator(".thought summary").first.click()
        expect(thought).to_have_text("A guest.")
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator("#tools")).to_be_visible()
        expect(page.locator(".thought")).to_have_count(2)
    finally:
        site.end()
    said = [user("Hi!"), {"role": "assistant", "content": "Hello!"}, user("And you?")]
    assert triton.asked[-1][0] == PROMPT.wrap_dialogue(said, thinking=True)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def model(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
