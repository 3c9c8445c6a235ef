"""A table that nobody has described becomes a task that works: what is told from its columns, written, and refused."""

import csv
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_task

from commands.new_task import main, new_task
from core import configuration as command_line
from core.configuration import load_config
from core.errors import UserError
from core.schema import TaskConfig
from data_prep import table_kind
from data_prep.prepare import prepare

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
PRAISE = ["a quiet, patient film", "the desert looks endless", "what a score", "I cried at the end", "the worms!"]
BLAME = ["too long by an hour", "nobody ever smiles", "I lost the plot twice", "loud, loud, loud", "half a story"]


@pytest.fixture(autouse=True)
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configuration for tasks to be written into; its folder of tasks."""
    copy = tmp_path / "nemo_configs"
    shutil.copytree(command_line.CONFIG_DIR, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(command_line, "CONFIG_DIR", copy)
    return copy / "task"


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def made_up(count: int, *words: int, seed: int = 0) -> list[list[str]]:
    """Rows of random words, so many to a cell."""
    letters = random.Random(seed)
    return [
        [" ".join("".join(letters.choices("abdefgiklmnoprstu", k=6)) for _ in range(n)) for n in words]
        for _ in range(count)
    ]


def film_reviews(count: int) -> list[list[object]]:
    """Reviews of a second film, with a rating each."""
    deal = random.Random(3)
    rows: list[list[object]] = []
    for number in range(count):
        good = deal.random() < 0.6
        said = deal.sample(PRAISE if good else BLAME, 2)
        seen = f"Saw it with {deal.choice(['my sister', 'friends', 'dad', 'nobody'])} on day {number}"
        rows.append([f"{seen}: {said[0]}, {said[1]}.", deal.randint(4, 5) if good else deal.randint(1, 3)])
    return rows


@pytest.fixture
def rows_of(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`rows_of(task)` prepares it as it was written, and gives a training row."""

    def prepared(name: str) -> dict[str, Any]:
        folder = prepare(load_config([f"task={name}", f"data_dir={tmp_path / 'data' / name}"]), None)
        row: dict[str, Any] = json.loads((folder / "training.jsonl").read_text(encoding="utf-8").partition("\n")[0])
        return row

    return prepared


def task_of(name: str) -> TaskConfig:
    return load_config([f"task={name}"]).task


# --- what kind of table ---------------------------------------------------------------------------------------


def test_questions_and_answers(tmp_path: Path, rows_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[n, f"How is {a} made?", f"With {b}, for ${{cost}}.", n % 5] for n, (a, b) in enumerate(made_up(80, 3, 6))]
    source = write(tmp_path / "help.csv", ["ID", "Question", "Best Answer", "score"], rows, delimiter=";")
    text = new_task("helpdesk", str(source)).read_text()
    assert [f"# {column}" in text for column in ("id: [ID]", "score: [score]")] == [True, True]
    assert '# filters: { score: ">=3" }' in text
    row = rows_of("helpdesk")
    (same,) = [given for given in rows if given[1] == row["question"]]
    assert (row["input"], row["output"]) == (same[1], same[2])
    out = capsys.readouterr().out
    assert f"{source}: CSV with semicolons, UTF-8, 80 rows" in out
    assert "Questions and answers." in out and "make data TASK=helpdesk" in out and "\x1b" not in out
    for line in ("Question        100%          80", "score           100%           5       1-1   numbers   0"):
        assert line in out


def test_an_input_beside_an_instruction_is_asked_about(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    lines = []
    for number, (what, about, answer) in enumerate(made_up(80, 4, 5, 6)):
        lines.append(json.dumps({"instruction": what, "input": about if number % 2 else "", "output": answer}))
    (tmp_path / "alpaca.jsonl").write_text("\n".join(lines))
    new_task("alpaca", str(tmp_path / "alpaca.jsonl"))
    row = rows_of("alpaca")
    assert row["output"] in {json.loads(line)["output"] for line in lines}
    assert task_of("alpaca").prompt.instruction == "{instruction}\n{input}"
    about = json.loads(lines[row["row"] - 1])
    assert row["input"] == "\n".join(filter(None, [about["instruction"], about["input"]]))


def test_terms_and_definitions(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    rows = made_up(80, 1, 6, 7)
    new_task("words", str(write(tmp_path / "a.csv", ["Keyword", "Meaning", "Usage"], rows)))
    row = rows_of("words")
    assert row["input"] == f'What does "{row["keyword"]}" mean?'
    assert row["output"] == f"{row['meaning']}\nExample: {row['usage']}"


def test_texts_and_labels(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    rows = [[text, ("sport", "food", "music")[n % 3]] for n, (text,) in enumerate(made_up(80, 9))]
    new_task("topics", str(write(tmp_path / "a.csv", ["text", "category"], rows)))
    row = rows_of("topics")
    assert row["input"] == f"Which category fits this text: food, music, sport?\n{row['text']}"
    assert row["output"] == row["category"]


@pytest.mark.parametrize(
    ("header", "labels"),
    [
        ("label", [0, 1, 2]),
        ("is_spam", ["true", "false"]),
        ("mood", ["🙂", "🙁"]),
        ("Intent", [f"do {n}" for n in range(25)]),
    ],
)
def test_labels_are_numbers_and_words(
    tmp_path: Path, rows_of: Callable[..., Any], capsys: pytest.CaptureFixture[str], header: str, labels: list[Any]
) -> None:
    rows = [[n, text, labels[n % len(labels)]] for n, (text,) in enumerate(made_up(100, 9))]
    new_task("labels", str(write(tmp_path / "a.csv", ["id", "text", header], rows)))
    row = rows_of("labels")
    assert row["input"].endswith(f"?\n{row['text']}") and row["output"] == str(rows[row["row"] - 1][2])
    said = capsys.readouterr().out
    share = len(range(0, 100, len(labels)))
    assert f"{len(labels)} labels, {labels[0]} {share}%" in said, "the balance of the classes is said"
    settings = load_config(["task=labels"]).task
    assert (settings.generate.temperature, settings.evaluate.held_out) == (0, 200)
    assert settings.train.epochs > load_config(["task=slang"]).task.train.epochs, "60 rows are few"


def test_text_alone_is_a_corpus(tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.csv", ["text"], made_up(60, 12))
    if "text" in command_line.names("task"):
        new_task("mine", str(source))
        assert task_of("mine").data.module == "text"
    else:
        with pytest.raises(UserError, match=r"'text' is the only column of text .* it is a corpus"):
            new_task("mine", str(source))


def test_any_two_columns(tmp_path: Path, rows_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    header = ["no", "Dish (name)", "How to", "mail", "When", "Where"]
    rows = [
        [f"id-{n}", *row, f"a{n}@b.org", f"March {n % 28 + 1}, 2021", f"{n} Oak Street, Springfield"]
        for n, row in enumerate(made_up(60, 2, 9))
    ]
    new_task("recipes", str(write(tmp_path / "a.csv", header, rows)))
    row = rows_of("recipes")
    assert (row["input"], row["output"]) == (row["dish_name"], row["how_to"])
    lines = capsys.readouterr().out.splitlines()
    told = next(number for number, line in enumerate(lines) if line.startswith("Guessed"))
    assert [line[:11].strip() for line in lines[told : told + 5]] == [
        "Guessed",
        "Because",
        "Columns",
        "Not used",
        "Change it",
    ]
    assert lines[told].endswith("'Dish (name)' is asked, and 'How to' answered.")
    assert lines[told + 3].endswith("no (ids), mail (addresses), When (dates), Where (addresses)")


def test_of_three_columns_the_user_says_which(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    source = str(write(tmp_path / "a.csv", ["One", "Two", "Three"], made_up(60, 4, 5, 6)))
    with pytest.raises(UserError, match=r"'One', 'Two', 'Three' all hold text. Say it: ASKED='One' ANSWER='Two'"):
        new_task("mine", source)
    with pytest.raises(UserError, match=r"there is no column 'four'. The columns are 'One', 'Two', 'Three'"):
        new_task("mine", source, asked="four", answer="One")
    with pytest.raises(UserError, match="name two columns"):
        new_task("mine", source, asked="One")
    new_task("mine", source, asked="three", answer="One")
    row = rows_of("mine")
    assert (row["input"], row["output"]) == (row["three"], row["one"])


def test_a_survey_is_answered(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    header = ["Timestamp", "How old are you?", "What did you like most?", "What should we improve?"]
    rows = [["2024/03/01 10:22:11 AM", ("18-25", "26-40")[n % 2], *row] for n, row in enumerate(made_up(60, 6, 7))]
    new_task("survey", str(write(tmp_path / "a.csv", header, rows)))
    row = rows_of("survey")
    age, liked, improve = rows[row["row"] - 1][1:]
    assert row["input"] == f"How old are you? {age}\nWhat did you like most?\nWhat should we improve?"
    assert row["output"] == f"What did you like most? {liked}\nWhat should we improve? {improve}"


def test_headers_of_emoji_are_columns(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    rows = made_up(60, 4, 9)
    new_task("emoji", str(write(tmp_path / "a.csv", ["🙂", "❤️"], rows)))
    row = rows_of("emoji")
    assert (row["slightly_smiling_face"], row["heavy_black_heart"]) == (row["input"], row["output"])
    assert [row["input"], row["output"]] in rows


@needs_task("squid_game")
def test_a_file_called_reviews_is_no_review_of_anything_without_more(tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.csv", ["text", "stars"], film_reviews(40))
    with pytest.raises(UserError, match=r"holds reviews. Say what they are of"):
        new_task("mine", str(source))


def test_a_preview_shows_three_rows_and_writes_nothing(
    tmp_path: Path, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.csv", TABLE, made_up(40, 3, 5))
    before = sorted(path for path in tmp_path.rglob("*") if "pycache" not in str(path))
    main(["name=mine", f"source={source}", "preview=true"])
    said = capsys.readouterr().out
    assert said.count("    <bos>Instruction:") == said.count("Example ") == 3
    assert "Guessed    Questions and answers." in said and "Nothing was written" in said
    assert sorted(path for path in tmp_path.rglob("*") if "pycache" not in str(path)) == before


def test_few_things_asked_again_and_again_do_not_make_the_rows_one(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    rows = [[f"a {('joke', 'riddle')[n % 2]} please", text] for n, (text,) in enumerate(made_up(80, 9))]
    new_task("jokes", str(write(tmp_path / "a.csv", ["prompt", "completion"], rows)))
    assert task_of("jokes").data.key == ["completion"]
    assert rows_of("jokes")["input"] in ("a joke please", "a riddle please")


@needs_task("squid_game")
@pytest.mark.parametrize(
    ("file", "title", "found"),
    [
        ("dune_part_two-reviews.csv", "", "Dune Part Two"),
        ("reviews.csv", "Dune", "Dune"),
        ("dune.csv", "Dune: Part Two", "Dune: Part Two"),
    ],
)
def test_reviews_of_another_film(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, title: str, found: str
) -> None:
    new_task("dune", str(write(tmp_path / file, ["Review Text", "Rating"], film_reviews(40))), title)
    data = task_of("dune").data
    assert data.module == "reviews" and data.options.title == found
    assert data.columns == {"review": ["Review Text"], "rating": ["Rating"]}
    out = capsys.readouterr().out
    assert (f"Reviews of {found}, going by the file's name; if that is wrong, give TITLE=..." in out) == (not title)


@needs_task("squid_game")
@pytest.mark.slow
def test_reviews_of_another_film_become_rows(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    new_task("dune", str(write(tmp_path / "dune_reviews.csv", ["Review Text", "Rating"], film_reviews(60))))
    row = rows_of("dune")
    assert row["input"] and row["output"]


@needs_task("chat")
def test_dialogues(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    with (tmp_path / "talks.jsonl").open("w") as file:
        for question, answer in made_up(60, 5, 6):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": 7, "messages": messages}) + "\n")
    new_task("talks", str(tmp_path / "talks.jsonl"))
    assert [message["role"] for message in rows_of("talks")["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("name", "module", "columns"),
    [
        ("all_slangs.csv", None, {"slang": ["Slang"], "description": ["Description"], "example": ["Example"]}),
        ("genz_slang.csv", None, {"keyword": ["keyword"], "description": ["description"]}),
        pytest.param("squid_game_reviews.csv", "reviews", {"review": ["review_text"]}, marks=needs_task("squid_game")),
    ],
)
def test_real_tables(rows_of: Callable[..., Any], name: str, module: str | None, columns: dict[str, Any]) -> None:
    if not (REAL / name).exists():
        pytest.skip(f"needs the real file {REAL / name}")
    new_task("real", str(REAL / name))
    data = task_of("real").data
    assert (data.module, data.columns) == (module, columns)
    if module:
        assert data.options.title == "Squid Game"
    else:
        assert rows_of("real")["output"]


Given, Expected = Callable[[int, str, str, str], dict[str, Any]], Callable[[int, str, str, str], tuple[str, str]]
# A row made of three texts, what it becomes, and what is said.
KINDS: dict[str, tuple[Given, Expected, str]] = {
    "translations": (
        lambda n, a, b, c: {"id": n, "translation": {"en": a, "de": b}},
        lambda n, a, b, c: (f"Translate from English into German:\n{a}", b),
        "Translations from English into German",
    ),
    "languages": (
        lambda n, a, b, c: {"English words": a, "French words": b},
        lambda n, a, b, c: (f"Translate from English into French:\n{a}", b),
        "Translations from English into French",
    ),
    "extraction": (
        lambda n, a, b, c: {"text": c, "output": {"name": a, "n": [n]}},
        lambda n, a, b, c: (f"Extract name, n from this text as JSON:\n{c}", json.dumps({"name": a, "n": [n]})),
        "Extraction: the model learns to answer with the JSON in 'output'",
    ),
    "summaries": (
        lambda n, a, b, c: {"article": f"{c}\n{b}", "highlights": a},
        lambda n, a, b, c: (f"Summarize this article:\n{c}\n{b}", a),
        "Summaries: 'highlights' is learned for 'article'",
    ),
    "choices": (
        lambda n, a, b, c: {"question": c, "A": a, "B": b, "answer": "AB"[n % 2]},
        lambda n, a, b, c: (f"{c}\nA. {a}\nB. {b}\nAnswer with the right one.", "AB"[n % 2]),
        "Multiple choice",
    ),
    "a list of choices": (
        lambda n, a, b, c: {"question": c, "choices": [a, b], "answer": n % 2},
        lambda n, a, b, c: (f"{c}\n0. {a}\n1. {b}\nAnswer with the right one.", str(n % 2)),
        "Multiple choice",
    ),
    "labelled choices": (
        lambda n, a, b, c: {"question": c, "choices": {"text": [a, b], "label": ["C", "D"]}, "answerKey": "CD"[n % 2]},
        lambda n, a, b, c: (f"{c}\nC. {a}\nD. {b}\nAnswer with the right one.", "CD"[n % 2]),
        "Multiple choice",
    ),
    "spam": (
        lambda n, a, b, c: {"v1": ("ham", "spam")[n % 2], "v2": c},
        lambda n, a, b, c: (f"Which label fits this text: ham, spam?\n{c}", ("ham", "spam")[n % 2]),
        "Texts and their labels",
    ),
    "pairs": (
        lambda n, a, b, c: {"system": "Be brief.", "prompt": a, "chosen": b, "rejected": c},
        lambda n, a, b, c: (f"Be brief.\n{a}", b),
        "'chosen' is learned as the answer; 'rejected' is not used",
    ),
    "code": (
        lambda n, a, b, c: {"instruction": "Write it.", "input": a, "output": f"def f():\n    return '{b}'\n\n\n# {n}"},
        lambda n, a, b, c: (f"Write it.\n{a}", f"def f():\n    return '{b}'\n\n\n# {n}"),
        "Questions and answers",
    ),
    "no text": (
        lambda n, a, b, c: {"question": a, "answer": b, "tags": [c], "meta": {"n": n}, "verified": True, "score": 0.5},
        lambda n, a, b, c: (a, b),
        "Not used   tags (lists), meta (objects), verified (true or false), score (numbers)",
    ),
    "dates": (
        lambda n, a, b, c: {"question": a, "answer": f"2024-01-{n % 28 + 1:02d}"},
        lambda n, a, b, c: (a, f"2024-01-{n % 28 + 1:02d}"),
        "Questions and answers",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_row_of_a_kind_is_asked_and_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    given, expected, about = KINDS[name]
    words = made_up(60, 3, 4, 9)
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps(given(n, *row)) + "\n" for n, row in enumerate(words))
    new_task("kind", str(tmp_path / "a.jsonl"))
    assert about in capsys.readouterr().out
    folder = prepare(load_config(["task=kind", f"data_dir={tmp_path}/data"]), None)
    splits = [(folder / f"{split}.jsonl").read_text().splitlines() for split in ("training", "validation", "test")]
    found = {row["row"] - 1: (row["input"], row["output"]) for lines in splits for row in map(json.loads, lines)}
    assert found == {n: expected(n, *row) for n, row in enumerate(words)}


def test_unwanted_answers_are_filtered(tmp_path: Path) -> None:
    rows = [{"prompt": a, "completion": b, "label": n % 2 == 0} for n, (a, b) in enumerate(made_up(80, 3, 5))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    new_task("wanted", str(tmp_path / "a.jsonl"))
    folder = prepare(load_config(["task=wanted", f"data_dir={tmp_path}/data"]), None)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["rows_out"], manifest["dropped"]) == (40, {"label does not match true": 40})


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("{label}\t{text}\n", "Which label fits this text: ham, spam?\n{text}"),
        ("{number}\t{text}\n", "Which label fits this text: 0, 1?\n{text}"),
        ("{text}?\tThe answer is {text}.\n", "{text}?"),
        ("{text}?\t{word}\n", "{text}?"),
        ("how is {text}\t{word}\n", "how is {text}"),
        ("{word}\tWhat is {text}?\n", "What is {text}?"),
    ],
)
def test_a_table_without_a_header_is_seen(
    tmp_path: Path, rows_of: Callable[..., Any], capsys: pytest.CaptureFixture[str], line: str, asked: str
) -> None:
    rows = [
        {"label": ("ham", "spam")[n % 2], "number": n % 2, "text": text, "word": text.split()[-1]}
        for n, (text,) in enumerate(made_up(60, 9))
    ]
    (tmp_path / "a.tsv").write_text("".join(line.format(**row) for row in rows))
    new_task("spam", str(tmp_path / "a.tsv"))
    assert (
        "its first line is a row, not a header; its columns are called 'column 1', 'column 2'"
        in capsys.readouterr().out
    )
    row = rows_of("spam")
    assert row["input"] == asked.format(**rows[row["row"] - 1])
    manifest = json.loads((tmp_path / "data" / "spam" / "manifest.json").read_text())
    assert manifest["rows_in"] == manifest["rows_out"] == 60


# --- what is written ------------------------------------------------------------------------------------------


def test_few_rows_are_dealt_so_that_no_split_is_empty(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    for seed in range(4):
        rows = made_up(12, 3, 5, seed=seed)
        new_task(f"few{seed}", str(write(tmp_path / "a.csv", ["question", "answer"], rows)))
        rows_of(f"few{seed}")
        splits = [tmp_path / "data" / f"few{seed}" / f"{name}.jsonl" for name in ("training", "validation", "test")]
        counts = [len(split.read_text().splitlines()) for split in splits]
        assert min(counts) >= 1 and sum(counts) == 12


def test_the_row_asked_before_and_after_training_is_held_out(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    new_task("asked", str(write(tmp_path / "a.csv", ["question", "answer"], made_up(80, 3, 5))))
    rows_of("asked")
    test = (tmp_path / "data" / "asked" / "test.jsonl").read_text()
    assert json.dumps(task_of("asked").prompt.fields["question"]) in test


def test_long_rows_are_not_left_out(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    new_task("long", str(write(tmp_path / "a.csv", ["question", "answer"], made_up(40, 3, 900))))
    task = task_of("long")
    assert (task.data.max_chars, task.train.max_length) == (7000, 4096)
    assert len(rows_of("long")["output"]) > 6000


@pytest.mark.slow
@pytest.mark.parametrize("header", ["on", "row", "1st", "a: b", "${x}", "да", '"q"'])
def test_any_header_can_be_asked(tmp_path: Path, rows_of: Callable[..., Any], header: str) -> None:
    rows = [[f"${{oc.env:HOME}} {{answer}}: {one} # '\"\\", two] for one, two in made_up(40, 3, 5)]
    new_task("odd", str(write(tmp_path / "a.csv", [header, "answer"], rows)), "")
    row = rows_of("odd")
    (asked,) = task_of("odd").prompt.fields.values()
    assert asked in {given[0] for given in rows}, "and nothing in it is taken for another key"
    assert any(given[0] in row["input"] or given[0] == row["output"] for given in rows)


# --- what is refused ------------------------------------------------------------------------------------------

TABLE = ["question", "answer"]
USELESS = {
    "empty": (b"", "is empty"),
    "header only": (b"question,answer\n", "has 0 rows; at least 10 are needed"),
    "one row": (b"question,answer\nWhy?,So.\n", "has 1 row; at least 10 are needed"),
    "numbers": (b"a,b\n" + b"1,2.5\n" * 20, "has no column of text that could be learned (a: numbers, b: numbers)"),
    "emoji": (b"mood\n" + "🙂🎉\n".encode() * 20, "(mood: signs)"),
    "dates and ids": (b"id,when\n" + b"a-7,2024-01-02\n" * 20, "(id: ids, when: "),
    "the same again": (b"question,answer\n" + b"Why?,So.\n" * 20, "only 1 of the rows differ in 'question'"),
    "a column twice": (b"question,answer,Answer\n" + b"Why?,So.,No.\n" * 20, "more than one column called"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is a PNG image"),
    "noise": (random.Random(1).randbytes(5000), "looks like a binary file"),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_table_of_no_use_is_refused_in_words(tmp_path: Path, configs: Path, name: str) -> None:
    content, message = USELESS[name]
    (tmp_path / "data.csv").write_bytes(content)
    before = sorted(configs.iterdir())
    with pytest.raises(UserError) as error:
        new_task("useless", str(tmp_path / "data.csv"))
    assert message in str(error.value)
    assert sorted(configs.iterdir()) == before


@needs_task("squid_game")
def test_reviews_of_nobody_knows_what_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "data.csv", ["Review"], [[f"A fine film number {n}"] for n in range(30)])
    with pytest.raises(UserError, match=r"holds reviews. Say what they are of: TITLE="):
        new_task("useless", str(source))


def test_a_title_that_no_task_asks_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_kind, "having", lambda part: [])
    source = write(tmp_path / "a.csv", TABLE, made_up(40, 3, 5))
    with pytest.raises(UserError, match=r'TITLE="Dune" is given, but none of the tasks here asks for a title'):
        new_task("dune", str(source), "Dune")


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("slang", "a.csv", "there is a task slang already"),
        ("my-films", "a.csv", "a task cannot be called 'my-films'. Use letters, digits and _"),
        ("../films", "a.csv", "a task cannot be called '../films'"),
        ("null", "a.csv", "a task cannot be called 'null'"),
        ("", "a.csv", "the new task needs a name, such as NAME=films"),
        ("films", "", "the new task needs a table, such as SOURCE=reviews.csv"),
        ("films", "/no/such.csv", "no such file: /no/such.csv"),
        ("films", "/proc/self/fdinfo", "/proc/self/fdinfo is a folder without a file of rows"),
        ("films", "hf:films", "Write hf:OWNER/NAME"),
        ("films", "https://example.org/a.csv", "Download it, then name the file: curl -LO 'https://example.org/a.csv'"),
        ("films", "www.example.org/a.csv", "Download it, then name the file: curl -LO 'https://www.example.org/a.csv'"),
        ("films", "https://huggingface.co/datasets/me/films/tree/main", "is named SOURCE=hf:me/films"),
        ("films", "https://docs.google.com/spreadsheets/d/1", "is a page, not a table. Download it there as CSV"),
        ("films", "s3://bucket/a.parquet", "aws s3 cp 's3://bucket/a.parquet' ."),
        ("films", "file:///a.csv", "name the file itself: SOURCE=/a.csv"),
    ],
)
def test_what_cannot_be_is_said_in_words(configs: Path, name: str, source: str, message: str) -> None:
    before = {file.name: file.read_bytes() for file in configs.iterdir()}
    with pytest.raises(UserError) as error:
        main([f"name={name}", f"source={source}", "title="])
    assert message in str(error.value)
    assert {file.name: file.read_bytes() for file in configs.iterdir()} == before


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    source = str(write(tmp_path / "a.csv", TABLE, made_up(40, 3, 5)))
    file = new_task("mine", source)
    file.write_text(file.read_text().replace("{question}", "Tell me: {question}"))
    with pytest.raises(UserError, match="there is a task mine already"):
        new_task("mine", source)
    assert "Tell me: {question}" in file.read_text()
