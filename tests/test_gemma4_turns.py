"""Gemma 4's turns: written as the published templates write them, trained as they are asked, read back as they come."""

import hashlib
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from tiny_gemma4 import CONTROL, KINDS, WHOLE, tiny_gemma4, tiny_tokenizer4

from core.base_turns import in_turns, turns_of
from core.configuration import load_config
from core.gemma4_answers import AnswerPart, AnswerReader, ToolCall, read_answer
from core.prompt import Prompt, disarm
from training.batches import tokenize

GEMMA3 = "<start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n{response}<end_of_turn>"
SMALL = Prompt("<|turn>user\n{instruction}<turn|>\n<|turn>model\n{response}<turn|>", "{message}", "{answer}")
LARGE = Prompt(in_turns(SMALL.template, "gemma4-large"), "{message}", "{answer}")
SYSTEM = {"role": "system", "content": " Be kind. "}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def model(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "content": text}


# --- asking -----------------------------------------------------------------------------------------------------

TALK = [SYSTEM, user(" hi "), model("<|channel>thought\nA guest.\n<channel|>Hello!"), user("Bye")]
HISTORY = "<|turn>user\nhi<turn|>\n<|turn>model\nHello!<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"


@pytest.mark.parametrize("prompt, opening", [(SMALL, ""), (LARGE, "<|channel>thought\n<channel|>")])
def test_a_dialogue_has_a_system_turn_and_only_large_sizes_an_empty_thought_at_its_end(
    prompt: Prompt, opening: str
) -> None:
    assert prompt.wrap_dialogue(TALK) == f"<|turn>system\nBe kind.<turn|>\n{HISTORY}{opening}"
    assert prompt.wrap_dialogue([user("hi")]) == prompt.wrap("hi") == f"<|turn>user\nhi<turn|>\n<|turn>model\n{opening}"


@pytest.mark.parametrize("prompt", [SMALL, LARGE])
def test_thinking_is_switched_on_in_the_system_turn_and_leaves_no_empty_thought(prompt: Prompt) -> None:
    asked = prompt.wrap_dialogue(TALK, thinking=True)
    assert asked == f"<|turn>system\n<|think|>\nBe kind.<turn|>\n{HISTORY}"
    asked = prompt.wrap_dialogue([user("hi")], thinking=True)
    assert asked == "<|turn>system\n<|think|>\n<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n"


def test_tools_are_declared_called_and_answered_within_the_model_s_turn() -> None:
    asked = [user("Rain?"), model("", tool_calls=[CALL], reasoning_content="I look."), tool("sunny")]
    declared = (
        '<|turn>system\n<|tool>declaration:weather{description:<|"|>The weather now.<|"|>,parameters:{properties:{'
        'city:{description:<|"|>Where<|"|>,type:<|"|>STRING<|"|>},days:{type:<|"|>INTEGER<|"|>}},'
        'required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n'
    )
    called = (
        "<|turn>user\nRain?<turn|>\n<|turn>model\n<|channel>thought\nI look.\n<channel|>"
        '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
        '<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>'
    )
    assert SMALL.wrap_dialogue(asked, tools=[WEATHER]) == LARGE.wrap_dialogue(asked, tools=[WEATHER])
    assert SMALL.wrap_dialogue(asked, tools=[WEATHER]) == declared + called
    later = SMALL.wrap_dialogue([*asked, model("No."), user("Sure?")], tools=[WEATHER])
    assert later.endswith('<|"|>sunny<|"|>}<tool_response|>No.<turn|>\n<|turn>user\nSure?<turn|>\n<|turn>model\n')
    assert "I look." not in later


@pytest.mark.parametrize(
    "messages, tools, says",
    [
        ([user("a"), user("b")], [], "message 2 has role 'user' where assistant is expected"),
        ([user("a"), tool("b")], [], "message 2 has role 'tool' where assistant is expected"),
        ([user("a"), model("", tool_calls=[CALL]), user("b")], [], "where a tool's answer is expected"),
        ([user("a"), model("b")], [], "ends with the model"),
        ([SYSTEM], [], "no user message"),
        ([user(" ")], [], "message 1 has no text"),
        ([user("a"), model("", tool_calls=[{"function": {"name": "x", "arguments": "{"}}])], [], "its arguments as a"),
        ([user("a"), model("", tool_calls="x")], [], "a call of a tool needs a name"),
        ([user("a")], ["x"], "tools: number 1 is no function"),
        ([user("a")], [{"function": {"name": "x{"}}], "tools: number 1 is no function"),
        ([user("a")], [{"function": {"name": "x", "parameters": {"required": 3}}}], "parameters of number 1 are no"),
        ([user("a")], [{"function": {"name": "x", "parameters": {"properties": 3}}}], "number 1 are no JSON schema"),
    ],
)
def test_what_is_no_dialogue_is_refused_with_its_place(messages: Any, tools: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SMALL.wrap_dialogue(messages, tools=tools)


def test_other_prompts_have_neither_thinking_nor_tools() -> None:
    gemma3 = Prompt(GEMMA3, "{message}", "{answer}")
    with pytest.raises(ValueError, match="thinking: the prompt of this model"):
        gemma3.wrap_dialogue([user("a")], thinking=True)
    with pytest.raises(ValueError, match="tools: the prompt of this model"):
        gemma3.wrap_dialogue([user("a")], tools=[WEATHER])


# --- control tokens ---------------------------------------------------------------------------------------------

UNSEEN = ["<|image>", "<|audio>", "<|image|>", "<|audio|>", "<|video|>", "<image|>", "<audio|>"]  # by tiny_tokenizer4
INJECTED = "".join([*CONTROL.values(), *UNSEEN]) + "<<|turn>turn|><|turn<|turn>>"


def specials(text: str) -> list[int]:
    ids = tiny_tokenizer4()(text, add_special_tokens=False).input_ids
    return [one for one in ids if one in CONTROL]


def test_no_text_of_a_row_or_a_visitor_becomes_a_control_token() -> None:
    assert specials("".join(CONTROL.values())) == list(CONTROL)  # so armed they are
    assert specials(disarm(INJECTED)) == [] and not any(token in disarm(INJECTED) for token in UNSEEN)
    (pieces,) = SMALL.samples({"input": INJECTED, "output": INJECTED})
    assert specials(pieces[0][0]) == specials(SMALL.wrap("x")) and specials(pieces[1][0]) == []


def test_neither_tools_nor_calls_nor_thoughts_bring_control_tokens_along() -> None:
    def asked(text: str) -> str:
        schema = {"type": "object", "properties": {text: {"type": "string", "description": text, "enum": [text]}}}
        tools = [{"function": {"name": "f", "description": text, "parameters": {**schema, "required": [text]}}}]
        call = {"id": "c1", "function": {"name": "f", "arguments": json.dumps({text: [text, {text: text}]})}}
        said = [{"role": "system", "content": text}, user(text), model("", tool_calls=[call], reasoning_content=text)]
        return SMALL.wrap_dialogue([*said, tool(text)], thinking=True, tools=tools)

    assert INJECTED[:20] not in asked(INJECTED)
    assert specials(asked(INJECTED)) == specials(asked("x"))


# --- training ---------------------------------------------------------------------------------------------------

THREE = model("<|channel>thought\n?<channel|>three")
LONG = [SYSTEM, user("1"), model("one"), user("2"), model("two"), user("3"), THREE]


@pytest.mark.parametrize("prompt, samples", [(SMALL, 1), (LARGE, 3)])
def test_every_answer_is_trained_after_the_very_tokens_that_it_is_asked_for_with(
    prompt: Prompt, samples: int, tmp_path: Path
) -> None:
    file, tokenizer = tmp_path / "training.jsonl", tiny_tokenizer4()
    file.write_text(json.dumps({"messages": LONG}) + "\n")
    rows, _ = tokenize(file, tokenizer, prompt, 500, tmp_path)
    assert len(rows) == samples
    learned = [(row["input_ids"], first, end) for row in rows for first, end in row["target_ranges"]]
    assert len(learned) == 3
    for (ids, first, end), number, answer in zip(learned, (2, 4, 6), ("one", "two", "three"), strict=True):
        assert ids[:first] == tokenizer(prompt.wrap_dialogue(LONG[:number])).input_ids
        assert ids[first:end] == tokenizer(f"{answer}<turn|>", add_special_tokens=False).input_ids
        assert ids[end - 1] == 106


# --- the turns of the base --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_turns_of_a_model_are_known_from_its_configuration(kind: str, tmp_path: Path) -> None:
    tiny_gemma4(kind).config.save_pretrained(tmp_path / "text")
    found = "gemma4-large" if kind in ("12b", "26b-a4b", "31b") else "gemma4-small"
    assert turns_of(tmp_path / "text") == found
    if kind in WHOLE:
        tiny_gemma4(kind, whole=True).config.save_pretrained(tmp_path / "whole")
        assert turns_of(tmp_path / "whole") == found


@pytest.mark.parametrize("kind, own", [("e4b", SMALL), ("31b", LARGE)])
def test_a_prompt_with_turns_gets_those_of_its_base(
    kind: str, own: Prompt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_gemma4(kind).config.save_pretrained(tmp_path)
    base = f"model.path={tmp_path}"
    assert load_config(["task=squid_game", "+prompt=gemma-turns", base]).task.prompt.template == own.template
    assert f"turns that {tmp_path.name} does not know; it gets its own" in capsys.readouterr().err
    assert load_config(["+prompt=gemma4-turns", base]).task.prompt.template == own.template
    assert capsys.readouterr().err == ""
    pretrained = load_config(["task=chat", base]).task.prompt.template
    assert pretrained == own.template.replace("{response}<turn|>", "{response}<eos>")
    assert load_config([base]).task.prompt == load_config().task.prompt  # without turns


def test_a_gemma_3_gets_back_its_own_turns(tiny_base: Path) -> None:
    for path in ([], [f"model.path={tiny_base}"]):
        assert load_config(["+prompt=gemma4-turns", *path]).task.prompt.template == GEMMA3


@pytest.mark.parametrize("name, turns", [("E2B", SMALL), ("e4b-it", SMALL), ("12B", LARGE), ("31B-it", LARGE)])
def test_a_model_that_is_not_fetched_yet_is_known_by_its_name(name: str, turns: Prompt, tmp_path: Path) -> None:
    model = [f"model.repo=google/gemma-4-{name}", f"model.models_dir={tmp_path}"]
    assert load_config(["+prompt=gemma-turns", *model]).task.prompt.template == turns.template


def test_a_text_before_the_answer_stays_and_a_turn_that_is_lacking_is_refused() -> None:
    prompt = Prompt(in_turns(GEMMA3.replace("{response}", "Well: {response}"), "gemma4-large"), "{message}", "{answer}")
    assert prompt.wrap_dialogue([user("a"), model("b"), user("c")]) == (
        "<|turn>user\na<turn|>\n<|turn>model\nWell: b<turn|>\n"
        "<|turn>user\nc<turn|>\n<|turn>model\n<|channel>thought\n<channel|>Well: "
    )
    with pytest.raises(ValueError, match=r"must have the line <\|turn>model"):
        Prompt("<|turn>user\n{instruction}{response}<turn|>", "{message}", "{answer}")


# --- answers ----------------------------------------------------------------------------------------------------

GENERATED = (
    "<|channel>thought\nHe asks\nfor <b> weather.\n<channel|>One < two. <turn|><|tool_call>call:weather{"
    'city:<|"|>R,o}me<|"|>,n:[1,2.5,-3],m:{a:true,<|"|>b c<|"|>:null},w:hello there}<tool_call|>'
)


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_an_answer_is_told_apart_from_thoughts_and_calls_however_it_arrives(step: int) -> None:
    reader = AnswerReader("<|turn>model\n")
    parts = [part for at in range(0, len(GENERATED), step) for part in reader.read(GENERATED[at : at + step])]
    parts += reader.end()
    assert "".join(part.text for part in parts) == "One < two. "
    assert "".join(part.thought for part in parts) == "He asks\nfor <b> weather."
    arguments = {"city": "R,o}me", "n": [1, 2.5, -3], "m": {"a": True, "b c": None}, "w": "hello there"}
    assert reader.calls == [ToolCall("weather", arguments)]


@pytest.mark.parametrize(
    "asked, generated, text, thought",
    [
        ("", "<|channel>thought\n<channel|>Hi", "Hi", ""),
        ("<|channel>thought\n", "still\n<channel|>Hi", "Hi", "still"),
        ("", "<|channel>thought\ncut off", "", "cut off"),
        ("", "<|tool_call>call:f{a:", "call:f{a:", ""),
        ("", "<|tool_call>no call<tool_call|>", "no call", ""),
        ("", "a <br> b < c <", "a <br> b < c <", ""),
    ],
)
def test_what_is_cut_off_or_malformed_is_kept(asked: str, generated: str, text: str, thought: str) -> None:
    assert read_answer(asked, generated) == (AnswerPart(text, thought), [])


def test_a_call_that_is_written_reads_back() -> None:
    arguments = {"a": "x, y}", "b": [1, -2.5, {"c": None}], "d": {"e": True, "f": False}}
    call = {"id": "c1", "function": {"name": "do-it_2.now", "arguments": arguments}}
    written = SMALL.wrap_dialogue([user("a"), model("", tool_calls=[call]), tool("b")])
    begin, end = written.index("<|tool_call>"), written.index("<|tool_response>")
    assert read_answer("", written[begin:end])[1] == [ToolCall("do-it_2.now", arguments)]


# --- the published templates ------------------------------------------------------------------------------------

WHEEL = "trl==1.16.0 --hash=sha256:c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396"
HASHES = {
    "small": "0a2c8073c878ab1da004bee933a998606537bbb62016310352c7285c3f01c5b5",
    "large": "ae53464bf3be25802b3a5b37def7fd89667067d7577049b3b2d74c4d8de4c6d4",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Google's templates of 9 July 2026. That of the large sizes, which is in no package, differs in four lines from
    that of the small ones; its hash says that nothing is missing."""
    folder = tmp_path_factory.mktemp("trl")
    (folder / "requirements.txt").write_text(WHEEL)
    command = ["-m", "pip", "download", "-q", "--no-deps", "-r", folder / "requirements.txt", "-d", folder]
    if (done := subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)).returncode:
        pytest.skip(f"trl 1.16.0 cannot be had: {done.stderr.strip().splitlines()[-1]}")
    with ZipFile(next(folder.glob("*.whl"))) as wheel:
        small = wheel.read("trl/chat_templates/gemma4_v5.jinja").decode()
    turn, begun = "        {{- '<|turn>model\\n' -}}\n", "        {{- '<|turn>' + role + '\\n' }}\n"
    empty = (
        "        {%- if not enable_thinking -%}\n"
        "            {{- '<|channel>thought\\n<channel|>' -}}\n"
        "        {%- endif -%}\n"
    )
    templates = {"small": small, "large": small.replace(turn, turn + empty).replace(begun, begun + "\n")}
    assert {size: hashlib.sha256(text.encode()).hexdigest() for size, text in templates.items()} == HASHES
    return templates


SCHEMAS = {
    "city": {"type": "string", "description": "A city", "enum": ["Rome", "Oslo"]},
    "n": {"type": "integer", "nullable": True},
    "Listed": {
        "type": "array",
        "items": {"type": "object", "properties": {"k": {"type": "number"}}, "required": ["k"], "minItems": 3},
    },
    "either": {"type": ["string", "null"]},
    "odd": {"type": "array", "items": {"type": ["string", "null"], "enum": ["x"], "meta": {"b": 1, "A": [True, None]}}},
    "inner": {"type": "object", "description": "of it", "properties": {"q": {"type": "boolean"}}, "required": ["q"]},
    "open": {"type": "object", "additionalProperties": False, "extra": {"type": "string", "description": "d"}},
    "any": {},
}
TOOLS = [
    {"function": {"name": "weather", "description": "Now.", "parameters": {"type": "object", "properties": SCHEMAS}}},
    {"function": {"name": "time", "description": "Now.", "parameters": {"type": "object", "required": ["a", "b"]}}},
    {"function": {"name": "now", "description": "Now."}},
]


def calls(text: str = "", thought: str = "", **arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return model(text, tool_calls=[{"id": "c1", "function": function}], reasoning_content=thought)


TWO = model("", tool_calls=[*calls(city="Rome")["tool_calls"], {**calls(city="Oslo")["tool_calls"][0], "id": "c2"}])
DIALOGUES = {
    "a question": [user(" hi ")],
    "with a system text": TALK,
    "thoughts of earlier turns": [*TALK[1:3], user("3"), model("4", reasoning_content="2 * 2"), user("5")],
    "a call": [user("?"), calls(city="Rome", n=3, f=1.5, Big=True, list=["a", {"z": None, "B": 1}]), tool("x")],
    "a call after a thought": [SYSTEM, user("?"), calls(thought="two\nlines"), tool("x\ny")],
    "two calls": [user("?"), TWO, tool("a"), {**tool("b"), "tool_call_id": "c2"}, model("Both."), user("ok")],
    "one call after another": [SYSTEM, user("?"), calls(), tool("a"), calls(a="b"), tool("b")],
    "a text beside a call": [user("?"), calls("Let me see."), tool("")],
    "a tool that was not called": [user("?"), calls(), {"role": "tool", "name": "x", "content": "y"}],
}


@pytest.mark.slow
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_prompts_are_those_of_the_published_templates_token_by_token(dialogue: str, published: dict[str, str]) -> None:
    tokenizer, messages, prompts = tiny_tokenizer4(), DIALOGUES[dialogue], {"small": SMALL, "large": LARGE}
    for (size, prompt), thinking, tools in product(prompts.items(), (False, True), ([], TOOLS)):
        options = {"tools": tools or None, "enable_thinking": thinking, "chat_template": published[size]}
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        asked = prompt.wrap_dialogue(messages, thinking, tools)
        assert f"<bos>{asked}" == text
        assert tokenizer(asked).input_ids == tokenizer(text, add_special_tokens=False).input_ids
