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


def test_one_column_of_text(tmp_path: Path, rows_of: Callable[..., Any]) -> None:
    rows = made_up(60, 12)
    new_task("poems", str(write(tmp_path / "a.csv", ["Poem"], rows)))
    row = rows_of("poems")
    assert row["input"] == "Write a new poem." and [row["output"]] in rows


def test_any_two_columns(tmp_path: Path, rows_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    new_task(
        "recipes",
        str(
            write(
                tmp_path / "a.csv",
                ["no", "Dish (name)", "How to"],
                [[f"id-{n}", *row] for n, row in enumerate(made_up(60, 2, 9))],
            )
        ),
    )
    row = rows_of("recipes")
    assert (row["input"], row["output"]) == (row["dish_name"], row["how_to"])
    assert "'Dish (name)' is taken as the question, 'How to' as the answer" in capsys.readouterr().out


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
        ("films", "/", "/ is a folder; name a CSV, TSV, JSONL or Parquet file in it"),
        ("films", "hf:films", "Write hf:OWNER/NAME"),
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
