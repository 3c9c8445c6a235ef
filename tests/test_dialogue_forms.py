"""Dialogues as other tools write them: marks on turns, content in parts, tools, and lists that Python printed."""

import csv
import json
import shutil
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from conftest import needs_task
from test_chat import PRETRAINED, PROMPT, dialogue, made_up, make, read, tokens_of
from transformers import PreTrainedTokenizerBase

from commands.new_task import new_task
from core import configuration
from core.configuration import load_config
from core.errors import UserError
from core.prompt import Prompt
from data_prep.prepare import prepare
from data_prep.read_python import read_python

pytest.importorskip("tasks.chat.rows")
__all__ = ["make"]  # a fixture

GEMMA_4 = "<|turn>user\n{instruction}<turn|>\n<|turn>model\n{response}<turn|>"
LARGE = GEMMA_4.replace("{response}", "<|channel>thought\n<channel|>{response}")


def prepared(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text)
    words = ["task=chat", f"task.data.source={tmp_path / name}", f"data_dir={tmp_path}/data"]
    return prepare(load_config(words), None)


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def notes_of(folder: Path) -> dict[str, int]:
    return {note: count for note, count in manifest_of(folder)["notes"].items() if count}


def row_of(folder: Path, number: int = 1) -> list[dict[str, Any]]:
    (found,) = [row["messages"] for row in read(folder) if row["row"] == number]
    return list(found)


# --- marks ----------------------------------------------------------------------------------------------------

CONTEXT = [
    {"weight": 0},
    {"weight": 0.0},
    {"weight": "0"},
    {"weight": False},
    {"train": False},
    {"train": "false"},
    {"training": False},
    {"trainable": False},
    {"loss": False},
    {"loss_mask": 0},
    {"mask": True},
    {"mask": 1},
    {"masked": True},
    {"train": False, "train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]},
]
LEARNED = [{"weight": 1}, {"train": True}, {"mask": False}, {"weight": None}, {"loss": 1.0}, {}]


@pytest.mark.parametrize("form", ["role", "from"])
def test_an_answer_that_is_marked_so_is_context_only(make: Callable[..., Path], form: str) -> None:
    rows = made_up(60)
    names = {"user": "human", "assistant": "gpt"}
    marked = list[dict[str, Any]]()
    for row, mark in zip_longest(rows, [*CONTEXT, *LEARNED], fillvalue={}):
        said = [m if form == "role" else {"from": names[m["role"]], "value": m["content"]} for m in row]
        said[1] = said[1] | mark
        marked.append({"conversations": said})
    folder = make(marked)
    found = {row["row"]: row["messages"] for row in read(folder)}
    assert len(found) == 60
    for number, messages in found.items():
        expected = [dict(message) for message in rows[number - 1]]
        if number <= len(CONTEXT):
            expected[1]["weight"] = 0  # type: ignore[assignment]
        assert messages == expected
    assert notes_of(folder) == {"dialogues with answers that are context only, as they are marked": len(CONTEXT)}


TALK = [
    {"role": "system", "content": "S."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two", "weight": 0},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "five"},
    {"role": "assistant", "content": "six", "weight": 0},
    {"role": "user", "content": "seven"},
    {"role": "assistant", "content": "eight"},
]


@pytest.mark.parametrize(
    "prompt", [PROMPT, PRETRAINED, *(Prompt(template, "{message}", "{answer}") for template in (GEMMA_4, LARGE))]
)
def test_context_is_given_as_at_inference_and_is_no_target(prompt: Prompt) -> None:
    samples = prompt.samples({"messages": TALK})
    assert [text for pieces in samples for text, learned in pieces if learned] == ["four", "eight"]
    said = ""
    for end in (4, 8):
        # Whatever the pieces are, what stands before an answer is the very text that it is asked for with.
        pieces = samples[0] if len(samples) == 1 else samples[end // 4 - 1]
        before = pieces[: 2 * (end // 4) - 1] if len(samples) == 1 else pieces[:1]
        said = "".join(text + (prompt.end or "<eos>") * learned for text, learned in before)
        assert said == prompt.wrap_dialogue(TALK[:end])
    unmarked = [{name: value for name, value in message.items() if name != "weight"} for message in TALK]
    learned = [text for text, is_target in prompt.pieces({"messages": unmarked}) if is_target]
    assert learned == ["two", "four", "six", "eight"]
    assert prompt.samples({"messages": TALK[:3]}) == [], "nothing of it is learned"


def test_target_ranges_leave_out_what_is_context_only(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    unmarked = [{"role": m["role"], "content": m["content"]} for m in TALK]
    marked, whole = tokens_of([TALK, unmarked], tokenizer, tmp_path)  # type: ignore[list-item]
    assert marked["input_ids"] == whole["input_ids"], "the same tokens"
    shown = [[tokenizer.decode(row["input_ids"][a:b]) for a, b in row["target_ranges"]] for row in (marked, whole)]
    assert shown == [
        [f"{n}<end_of_turn>" for n in ("four", "eight")],
        [f"{n}<end_of_turn>" for n in ("two", "four", "six", "eight")],
    ]
    assert marked["target_ranges"] == whole["target_ranges"][1::2]


def test_make_data_marks_only_what_is_learned(make: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[m | ({"weight": 0} if n == 1 else {}) for n, m in enumerate(row)] for row in made_up(60)]
    shown = read(make(rows), "training")[0]["messages"]
    lines = capsys.readouterr().out.splitlines()

    def marked(text: str) -> bool:
        (line,) = [line for line in lines if text in line]
        return line.lstrip().startswith(("▌", ">"))

    assert [marked(message["content"]) for message in shown] == [False, False, False, True]
    assert any("60  dialogues with answers that are context only" in line for line in lines)


def test_a_dialogue_ends_with_what_is_learned_and_one_without_it_is_dropped(make: Callable[..., Path]) -> None:
    rows = made_up(60)
    late = [m | ({"weight": 0} if n == 3 else {}) for n, m in enumerate(rows[0])]
    never = [m | {"weight": 0} for m in rows[1]]
    folder = make([late, never, *rows[2:]])
    assert row_of(folder) == rows[0][:2]
    assert manifest_of(folder)["dropped"] == {"no answer is marked to be learned": 1}


def test_marks_that_cannot_be_kept_are_said(make: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = made_up(60)
    marks = [
        (0, 1, {"weight": 0.5}),  # learned, as 1
        (1, 0, {"train": True}),  # of the user: not learned
        (2, 1, {"weight": "maybe"}),
        (3, 3, {"weight": -1}),
        (4, 1, {"train_detail": [{"begin_offset": 0, "end_offset": 5, "train": False}]}),
        (5, 1, {"train_detail": [{"begin_offset": 0, "end_offset": 5, "train": True}]}),
    ]
    for row, message, mark in marks:
        rows[row][message] = rows[row][message] | mark
    folder = make(rows)
    plain = made_up(60)
    assert [row_of(folder, n) for n in (1, 2, 6)] == [plain[n] for n in (0, 1, 5)]
    assert manifest_of(folder)["dropped"] == {"a mark that is none": 2, "answers cannot be learned in part": 1}
    assert sorted(notes_of(folder).values()) == [1, 1]
    out = capsys.readouterr().out
    assert "such as message 2 of row 3 has weight: 'maybe', which is neither 0 nor 1" in out
    assert "such as message 2 of row 5 has train_detail" in out


@pytest.mark.slow
def test_a_long_dialogue_is_cut_and_parts_without_a_target_are_left_out(
    make: Callable[..., Path], base_folder: Path
) -> None:
    long: list[Any] = dialogue(*(f"{word} " * 12 for word in ("a", "b", "c", "d", "e", "f", "g", "h")))
    for place in (1, 3):
        long[place]["weight"] = 0
    short = [messages[:2] for messages in made_up(60)]
    folder = make([long, *short], "task.train.max_length=60", tokenizer_file=base_folder / "tokenizer.json")
    parts = [row["messages"] for row in read(folder) if row["row"] == 1]
    said = [message["content"][0] for part in parts for message in part]
    assert said[-4:] == ["e", "f", "g", "h"] and all("weight" not in part[-1] for part in parts)


# --- content --------------------------------------------------------------------------------------------------


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def said(user: object, model: object, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": role, "content": model}]


# All say Q1, a line break and Q2, and are answered A1.
READ: dict[str, Any] = {
    "OpenAI's parts": {"messages": said(parts("Q1", "Q2"), parts("A1"))},
    "a schema's empty fields": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Q1\nQ2", "image_url": None}], "weight": None},
            {"role": "assistant", "content": "A1", "tool_calls": None, "function_call": {}, "name": None},
        ]
    },
    "OpenAI's responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Q1\nQ2"}]}],
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A1"}]}],
    },
    "prompt and completion": {"prompt": said("Q1\nQ2", "")[:1], "completion": said("", "A1")[1:]},
    "a prompt and a text": {"prompt": said("Q1\nQ2", "")[:1], "completion": "A1"},
    "a text and a completion": {"prompt": "Q1\nQ2", "completion": said("", "A1")[1:]},
    "Gemini": {
        "contents": [
            {"role": "user", "parts": [{"text": "Q1"}, {"text": "Q2"}]},
            {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": "A1"}]},
        ]
    },
    "Anthropic": {"messages": said("Q1\nQ2", [{"type": "thinking", "thinking": "Hm.", "signature": ""}, *parts("A1")])},
    "Bedrock": {"messages": said([{"text": "Q1\nQ2"}], [{"text": "A1"}])},
    "LangChain": {"messages": [{"type": "human", "data": {"content": "Q1\nQ2"}}, {"type": "ai", "content": "A1"}]},
    "OpenAssistant": {"conversation": [{"role": "prompter", "text": "Q1\nQ2"}, {"role": "assistant", "text": "A1"}]},
    "XTuner": {"conversation": [{"input": "Q1\nQ2", "output": "A1"}]},
    "Vertex": {"messages": [{"author": "user", "content": "Q1\nQ2"}, {"author": "bot", "content": "A1"}]},
    "JSON in JSON": {"messages": json.dumps(said("Q1\nQ2", "A1"))},
    "an object of messages": {"messages": json.dumps({"messages": said("Q1\nQ2", "A1", "model")})},
    "turns": {"dialog": json.dumps(["Q1\nQ2", "A1"])},
    "pairs": {"dialog": json.dumps([["Q1\nQ2", "A1"]])},
}


@pytest.mark.parametrize("name", READ)
def test_text_is_read_in_the_forms_of_other_tools(make: Callable[..., Path], name: str) -> None:
    words = [row[0]["content"].split()[:3] for row in made_up(60)]
    form = json.dumps(READ[name])
    folder = make(
        json.loads(form.replace("Q1", one).replace("Q2", two).replace("A1", three)) for one, two, three in words
    )
    found = {row["row"]: row["messages"] for row in read(folder)}
    assert found == {n: dialogue(f"{one}\n{two}", three) for n, (one, two, three) in enumerate(words, 1)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("systemInstruction", {"role": "system", "parts": [{"text": "Be"}, {"text": "brief."}]}),
        ("system_instruction", {"parts": {"text": "Be\nbrief."}}),
        ("system", [{"text": "Be\nbrief."}]),
        ("system", "Be\nbrief."),
    ],
)
def test_a_system_text_beside_the_dialogue_may_be_in_parts(make: Callable[..., Path], name: str, value: object) -> None:
    contents = [[{"role": m["role"], "parts": [{"text": m["content"]}]} for m in row] for row in made_up(60)]
    folder = make({name: value, "contents": row} for row in contents)
    assert row_of(folder)[0] == {"role": "system", "content": "Be\nbrief."}
    assert row_of(folder)[1:] == made_up(60)[0]


NOT_TEXT: dict[str, tuple[Any, str]] = {
    "OpenAI's image": ({"type": "image_url", "image_url": {"url": "x"}}, "an image"),
    "Hugging Face's image": ({"type": "image"}, "an image"),
    "a schema's image": ({"type": "image", "image": "x.png", "text": None}, "an image"),
    "Gemini's image": ({"inlineData": {"mimeType": "image/png", "data": "x"}}, "an image"),
    "Gemini's speech": ({"inline_data": {"mime_type": "audio/wav", "data": "x"}}, "audio"),
    "Gemini's film": ({"fileData": {"mimeType": "video/mp4", "fileUri": "gs://x"}}, "a video"),
    "Anthropic's document": ({"type": "document", "source": {"media_type": "application/pdf"}}, "a document"),
    "OpenAI's file": ({"type": "input_file", "file_id": "x"}, "a file"),
    "OpenAI's speech": ({"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}, "audio"),
    "something": ({"type": "weather", "of": "x"}, "a part of the type 'weather'"),
}


def test_what_is_not_text_is_refused_by_its_name(make: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [
        [*row[:2], {"role": "user", "content": [*parts("See"), part]}, row[3]]
        for row, (part, _) in zip(made_up(60), NOT_TEXT.values(), strict=False)
    ]
    rows.append(
        {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat"}]}
    )
    folder = make(
        [
            *({"messages": row} if isinstance(row, list) else {"messages": row["conversations"]} for row in rows),
            *made_up(60),
        ]
    )
    drops = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    details = [f"message 3 holds {what}" for _, what in NOT_TEXT.values()] + ["message 1 holds an image"]
    assert [drop["detail"] for drop in drops] == details and len(read(folder)) == 60
    assert "such as message 3 of row 1 holds an image" in capsys.readouterr().out


def test_where_no_row_is_text_the_first_message_is_named(make: Callable[..., Path]) -> None:
    image = said([{"type": "image"}, *parts("What?")], "A cat.")
    with pytest.raises(UserError, match="The first, line 1: message 1 of row 1 holds an image"):
        make([image] * 3)


def test_answers_that_are_json_stay_text(make: Callable[..., Path]) -> None:
    answers = ['[{"name": "A", "role": "chair"}]', '["Paris", "London"]', "{'a': 1}", "[1, 2]", '[{"role": "user"}]']
    asked = [row[0]["content"] for row in made_up(60)]
    rows = [{"prompt": text, "completion": answers[n % len(answers)]} for n, text in enumerate(asked)]
    found = {row["row"]: row["messages"] for row in read(make(rows))}
    assert found == {n: dialogue(text, answers[(n - 1) % len(answers)]) for n, text in enumerate(asked, 1)}


def test_a_second_answer_beside_a_dialogue_is_left_out_and_said(make: Callable[..., Path]) -> None:
    folder = make({"messages": row, "output": "again"} for row in made_up(60))
    assert row_of(folder) == made_up(60)[0]
    assert notes_of(folder) == {"dialogues that end with an answer; the one in a column of its own is left out": 60}


# --- tools ----------------------------------------------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CALLS: dict[str, list[dict[str, Any]]] = {
    "OpenAI": [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "Rain"}],
    "OpenAI's old ones": [
        {"role": "assistant", "content": "", "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": "Rain"},
    ],
    "Gemini": [
        {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": {}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"sky": "rain"}}}]},
    ],
    "Anthropic": [
        {"role": "assistant", "content": [*parts("I look"), {"type": "tool_use", "name": "weather", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "Rain"}]},
    ],
    "ShareGPT": [{"from": "function_call", "value": '{"name": "weather"}'}, {"from": "observation", "value": "Rain"}],
}


def test_a_call_that_is_no_text_is_refused_with_its_message(make: Callable[..., Path]) -> None:
    end = {"role": "assistant", "content": "It rains."}
    rows = [[{"role": "user", "content": f"Rome {n}?"}, *calls, end] for n, calls in enumerate(CALLS.values())]
    folder = make([*rows, *made_up(60)])
    drops = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert {(drop["reason"], drop["detail"]) for drop in drops} == {
        ("calls of tools are not learned", "message 2 calls a tool")
    }
    assert len(drops) == len(CALLS) and len(read(folder)) == 60


def test_the_answer_of_a_tool_that_is_called_in_text_is_the_user_s_turn(make: Callable[..., Path]) -> None:
    hermes = [
        {"from": "system", "value": "Tools: <tools>[]</tools>"},
        {"from": "human", "value": "Rome?"},
        {"from": "gpt", "value": '<tool_call>\n{"name": "weather"}\n</tool_call>'},
        {"from": "tool", "value": "<tool_response>\nRain\n</tool_response>"},
        {"from": "tool", "value": "Cold"},
        {"from": "gpt", "value": "It rains."},
    ]
    folder = make([{"messages": hermes}, *({"messages": row} for row in made_up(60))])
    texts = [message["value"] for message in hermes]
    assert row_of(folder) == dialogue(texts[1], texts[2], f"{texts[3]}\n{texts[4]}", texts[5], system=texts[0])
    assert notes_of(folder) == {"dialogues in which a tool's answer is given as the user's turn": 1}


# --- Python and numpy -----------------------------------------------------------------------------------------

ODD = [
    {"role": "user", "content": "it's \"odd\":\n[{'a': 'b'} {'c'}] \\ nan, array([1], dtype=object)"},
    {"role": "assistant", "content": 'x = {"a": None}\n\n    y', "weight": None},
]


def array_of(items: list[Any]) -> Any:
    found = np.empty(len(items), dtype=object)
    found[:] = items
    return found


PRINTED: dict[str, Callable[[list[Any]], object]] = {
    "a list": list,
    "a tuple": tuple,
    "an array": array_of,
    "an array in a list": lambda items: repr(array_of(items)),
    "arrays of parts": lambda items: [
        i | {"content": array_of([{"type": "text", "text": i["content"]}])} for i in items
    ],
    "numpy's numbers": lambda items: [i | {"weight": np.float64(1), "n": np.int64(3), "ok": np.True_} for i in items],
    "texts of numpy": lambda items: repr(
        [i | {"content": np.str_(i["content"]), "score": float("nan")} for i in items]
    ),
}


@pytest.mark.parametrize("form", PRINTED)
def test_messages_that_pandas_wrote_into_a_csv_are_a_dialogue(tmp_path: Path, form: str) -> None:
    rows = [ODD, *made_up(60)]
    pandas.DataFrame({"messages": [PRINTED[form](row) for row in rows]}).to_csv(tmp_path / "a.csv")
    folder = prepared(tmp_path, "b.csv", (tmp_path / "a.csv").read_text())
    plain = [[{"role": m["role"], "content": m["content"]} for m in row] for row in rows]
    assert {row["row"]: row["messages"] for row in read(folder)} == dict(enumerate(plain, 1))


@needs_task("chat")
def test_make_new_task_knows_such_a_column(tmp_path: Path) -> None:
    from data_prep.profile_table import profile_table
    from data_prep.sources import LocalFile
    from data_prep.table_kind import kind_of

    for form, printed in PRINTED.items():
        pandas.DataFrame({"messages": [printed(row) for row in made_up(20)]}).to_csv(tmp_path / "a.csv", index=False)
        profile = profile_table(LocalFile(tmp_path / "a.csv"))
        kind = kind_of(profile, "a.csv", "")
        assert (profile.columns[0].holds, kind.base) == ("dialogues", "chat"), form


@needs_task("chat")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("systemInstruction", {"role": "system", "parts": [{"text": "Be brief."}]}),
        ("system_instruction", {"parts": [{"text": "Be brief."}]}),
        ("system", [{"text": "Be brief."}]),
        ("system_prompt", "Be brief."),
    ],
)
def test_make_new_task_knows_a_system_text_in_parts(tmp_path: Path, name: str, value: object) -> None:
    """`make data` puts it before the first turn; to call the column not used would be false."""
    from data_prep.profile_table import profile_table
    from data_prep.sources import LocalFile
    from data_prep.table_kind import kind_of

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({name: value, "messages": row}) for row in made_up(20)))
    kind = kind_of(profile_table(LocalFile(tmp_path / "a.jsonl")), "a.jsonl", "")
    assert {field: column.header for field, column in kind.columns.items()} == {"messages": "messages", "system": name}


@pytest.mark.slow
@needs_task("chat")
@pytest.mark.parametrize("name", [name for name in READ if name not in ("turns", "pairs")])
def test_make_new_task_makes_a_task_of_such_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What it writes reads every row as the dialogue that it is."""
    copy = tmp_path / "nemo_configs"
    shutil.copytree(configuration.CONFIG_DIR, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(configuration, "CONFIG_DIR", copy)
    words = [row[0]["content"].split()[:3] for row in made_up(60)]
    form = json.dumps(READ[name])
    rows = [form.replace("Q1", one).replace("Q2", two).replace("A1", three) for one, two, three in words]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    new_task("mine", str(tmp_path / "a.jsonl"))
    found = read(prepare(load_config(["task=mine", f"data_dir={tmp_path}/data"]), None))
    assert len(found) == 60
    for row in found:
        one, two, three = words[row["row"] - 1]
        assert row["messages"] == dialogue(f"{one}\n{two}", three)


def test_messages_that_cannot_be_read_are_never_learned_as_text(tmp_path: Path) -> None:
    bad = [
        "[{'role': 'user', 'content': 'cut",
        "[{'role': 'user', 'content': open('x').read()}]",
        "[{'role': 'user', 'content': __import__('os').getcwd()}]",
        "[{'role': 'user', 'content': 'a'} ... {'role': 'assistant', 'content': 'b'}]",
        '[{"role": "user", "content": "cut',
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows([[cell, f"answer {n}"] for n, cell in enumerate(bad)])
        writer.writerows([[row[0]["content"], row[1]["content"]] for row in made_up(60)])
    folder = prepared(tmp_path, "b.csv", (tmp_path / "a.csv").read_text())
    assert manifest_of(folder)["dropped"] == {"no list of messages": len(bad)}
    assert sorted(row["row"] for row in read(folder)) == list(range(6, 66))


def test_nothing_but_values_is_read_as_python() -> None:
    for text in (
        "__import__('os')",
        "[open('x')]",
        "[" * 1000,
        "9" * 5000,
        "{[]: 1}",
        "lambda: 1",
        "[x for x in 'a']",
        "",
    ):
        with pytest.raises(ValueError, match="not a Python list"):
            read_python(text)
    assert read_python("['a' 'b'\n 'c']") == ["a", "b", "c"], "which are one text to Python"
    assert read_python("(array([1, -2.5], dtype=float32), nan, b'x')") == ([1, -2.5], None, b"x")
