"""Continued training on plain text: every token is learned, nothing is wrapped around, and nothing is left out."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerBase

from core.configuration import load_config
from core.errors import UserError
from core.prompt import CONTINUED, Prompt
from data_prep.prepare import prepare
from data_prep.read_passages import PASSAGE, is_text
from evaluation.questions import BEGUN, held_out_questions, listed_questions
from serving.client.adapter import Adapter
from training.batches import Batches, tokenize

PROMPT = Prompt(CONTINUED, "{text}", "{text}")


def write(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text, "row": row}) + "\n" for row, text in enumerate(texts, 1)))
    return file


def data(folder: Path, source: Path, *more: str) -> dict[str, list[dict[str, object]]]:
    words = ["task=text", "trainer=cpu", f"task.data.source={source}", f"data_dir={folder}", *more]
    prepare(load_config(words), None, 0)
    names = ("training", "validation", "test")
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in names}


def test_every_token_of_a_text_is_learned_and_its_end(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["The rain had stopped.", "  two\n\nlines ", "<end_of_turn>"]
    rows, left_out = tokenize(write(tmp_path / "a.jsonl", texts), tokenizer, PROMPT, 512, tmp_path / "cache")
    assert left_out == 0
    for row, text in zip(rows, [*texts[:2], "< end_of_turn>"], strict=True):
        assert row["input_ids"] == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        assert row["target_ranges"] == [[1, len(row["input_ids"])]], "<bos> is given, all else is learned"
    (step,) = Batches(rows, 3, 10_000, seed=None)
    assert step.target_tokens == step.tokens - len(texts)


def test_a_long_text_is_cut_into_even_parts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "The rain had stopped by the time the train left the station. " * 9
    whole = [*tokenizer(text).input_ids, tokenizer.eos_token_id][1:]
    rows, left_out = tokenize(write(tmp_path / "a.jsonl", [text]), tokenizer, PROMPT, 50, tmp_path / "cache")
    parts = [row["input_ids"] for row in rows]
    assert left_out == 0
    assert len(parts) == -(-len(whole) // 49) and max(map(len, parts)) <= 50
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part[0] == tokenizer.bos_token_id for part in parts)
    assert [token for part in parts for token in part[1:]] == whole
    assert [row["target_ranges"] for row in rows] == [[[1, len(part)]] for part in parts]


def test_a_row_with_a_question_is_cut_by_nobody(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"input": "a", "output": "b " * 60, "text": "c"}) + "\n" + json.dumps({"text": "c"}))
    rows, left_out = tokenize(file, tokenizer, PROMPT, 30, tmp_path / "cache")
    assert (len(rows), left_out) == (1, 1)


def test_a_file_of_text_becomes_passages_that_lose_nothing(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {n}\nof two lines, " + "with words " * (n % 60) + "." for n in range(300)]
    for suffix in ("txt", "md"):
        (tmp_path / f"{suffix}").mkdir()
        (tmp_path / f"{suffix}/book.{suffix}").write_text("\n\n".join(paragraphs))
        made = data(tmp_path / f"data-{suffix}", tmp_path / suffix)
        rows = sorted((row for split in made.values() for row in split), key=lambda row: int(str(row["row"])))
        assert all(row.keys() == {"text", "row"} for row in rows)
        texts = [str(row["text"]) for row in rows]
        assert "\n\n".join(texts).split() == "\n\n".join(paragraphs).split()
        assert all(PASSAGE <= len(text) < 2 * PASSAGE for text in texts[:-1])


def test_a_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {n} " + "of words " * 9 for n in range(800)]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    made = data(tmp_path / "data", tmp_path / "log.txt")
    texts = [str(row["text"]) for split in made.values() for row in split]
    assert sorted(line for text in texts for line in text.split("\n")) == sorted(line.rstrip() for line in lines)


def test_texts_of_a_table_are_whole_documents(tmp_path: Path) -> None:
    texts = [f"Document {n}. " + "Word after word. " * (n + 1) for n in range(60)]
    (tmp_path / "a.csv").write_text("id,body\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts)))
    made = data(tmp_path / "data", tmp_path / "a.csv", "task.data.split.seed=3")
    assert {str(row["text"]) for split in made.values() for row in split} == {text.strip() for text in texts}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("task.prompt.response='Text: {text}'", "a plain text is learned as it is"),
        ("task.data.train_fields=[text]", "task.data.train_fields means nothing for plain text"),
        ("task.data.columns.about=[topic]", "only the field text is learned; leave out about"),
        ("task.data.max_tokens=5", "task.data.max_tokens means nothing for plain text"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(tmp_path: Path, more: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n')
    with pytest.raises(UserError, match=says):
        data(tmp_path / "data", tmp_path / "a.jsonl", more)


@pytest.mark.parametrize("model", ["gemma-3-1b-it", "gemma-4-e2b-it", "gemma-4-31b"])
def test_an_instruction_tuned_model_continues_texts_without_its_turns(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_config(["task=text", f"model={model}", "trainer=cpu"]).task.prompt.template == CONTINUED
    assert capsys.readouterr().err == ""


def test_a_held_out_text_is_begun_and_compared_with_what_follows(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(300)]
    file = write(tmp_path / "test.jsonl", [" ".join(words), "one two three four", "alone"])
    long, short = held_out_questions(file, 3, PROMPT)
    assert long.text_in == long.asked == " ".join(words[:BEGUN])
    assert long.reference == " " + " ".join(words[BEGUN : 2 * BEGUN])
    assert (short.text_in, short.reference) == ("one two", " three four"), "and a text of one word is not asked"
    (listed,) = listed_questions([{"text": "Once upon"}], PROMPT)
    assert listed.text_in == "Once upon"


def test_a_server_continues_what_it_is_given() -> None:
    entry = {"name": "text", "prompt": vars(PROMPT), "sampling": {"max_tokens": 5}}
    adapter = Adapter.read(entry)
    assert adapter.write("Once upon") == adapter.write({"text": "Once upon"}) == "Once upon"
    assert adapter.write_dialogue([{"role": "user", "content": "Once upon"}]) == "Once upon"
    assert not adapter.has_turns
    assert SimpleNamespace(**adapter.sampling).max_tokens == 5


def test_a_txt_is_a_text_unless_it_is_a_table() -> None:
    assert is_text(["Call me Ishmael. Some years ago, never mind", "how long precisely, having little or no money,"])
    assert is_text(["one word a line", "", "another"])
    assert not is_text(["term,definition", '"W","a win, of any kind"', "L,a loss"])
    assert not is_text(["a\tb", "c\td"]) and not is_text(['{"a": 1}'])
