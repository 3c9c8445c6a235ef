"""A table of rows becomes training data: what is read, repaired, merged, split and left out, and what goes wrong."""

import contextlib
import csv
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, typed, until
from rapidfuzz import fuzz, process
from transformers import AutoTokenizer

from core import progress
from core.configuration import load_config, plain, write_config
from core.errors import UserError
from core.prompt import Prompt
from core.schema import Config, DataConfig
from data_prep.candidates import REACH, Candidates, Signatures
from data_prep.clean_text import clean, clean_lines, is_explicit, key_of
from data_prep.minhash import BANDS, minhash
from data_prep.near_duplicates import SAME_KEY, SAME_TEXT, Wording, are_near
from data_prep.prepare import prepare
from data_prep.read_table import NotText, Row, open_table
from data_prep.show_rows import show
from data_prep.split import hash_of, ranges
from data_prep.task import Task
from data_prep.write_splits import SplitWriter
from training.batches import tokenize

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"
TASK = load_config(["task=slang", "trainer=cpu"]).task
HEADER = ["Slang", "Description", "Example", "Context"]


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"needs the real file {REAL / name}")
    return REAL / name


def config_for(folder: Path, source: Path, *options: str, seed: int = 0) -> Config:
    """The slang task's configuration for another source; `options` as on the command line."""
    given = (f"source={source}", f"split.seed={seed}", *options)
    return load_config(
        ["task=slang", "trainer=cpu", f"data_dir={folder}", *(f"task.data.{option}" for option in given)]
    )


def write_csv(path: Path, rows: Iterable[Sequence[str]], header: Sequence[str] = HEADER) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def made_up(count: int, seed: int = 0) -> list[list[str]]:
    """Rows that have nothing in common: words of random letters."""
    letters = random.Random(seed)

    def words(number: int) -> str:
        return " ".join("".join(letters.choices("abcdefghijklmnoprstuvwyz", k=6)) for _ in range(number))

    return [[words(1), words(5), words(6), words(6)] for _ in range(count)]


def read_split(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def read_all(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: read_split(folder, split) for split in ("training", "validation", "test")}


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def drops_of(folder: Path) -> list[dict[str, Any]]:
    return read_split(folder, "dropped")


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`make(rows, *options)` prepares a table of four columns and gives its folder."""

    def prepared(rows: Iterable[Sequence[str]], *options: str, seed: int = 0) -> Path:
        source = write_csv(tmp_path / "rows.csv", rows)
        return prepare(config_for(tmp_path / "data", source, *options, seed=seed), None)

    return prepared


# --- reading --------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    table = open_table(path, TASK.data.columns, ["slang", "description"])
    rows = list(table.rows)
    table.close()
    return rows


CURLY = "Slang;Description\r\nnaïve;“crème brûlée” isn’t café\r\nΩ;omega\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_and_unicode_encodings_are_found(tmp_path: Path, encoding: str, delimiter: str) -> None:
    (tmp_path / "a.csv").write_bytes(CURLY.replace(";", delimiter).encode(encoding))
    assert [row.cells for row in read_rows(tmp_path / "a.csv")] == [
        ["naïve", "“crème brûlée” isn’t café", "", ""],
        ["Ω", "omega", "", ""],
    ]


@pytest.mark.parametrize(
    ("encoding", "term", "meaning"),
    [
        ("cp1252", "café", "“cosy” place, isn’t it"),
        ("cp1251", "кринж", "чувство стыда за других людей, когда они делают что-то нелепое"),
        ("shift_jis", "エモい", "感情が動かされる様子を表す若者言葉"),
        ("gb18030", "内卷", "过度的内部竞争使人疲惫不堪"),
    ],
)
def test_other_encodings_are_guessed(tmp_path: Path, encoding: str, term: str, meaning: str) -> None:
    (tmp_path / "a.csv").write_bytes(f"term;meaning\n{term};{meaning}\n".encode(encoding) * 3)
    assert read_rows(tmp_path / "a.csv")[0].cells == [term, meaning, "", ""]


def test_a_few_windows_bytes_in_a_utf8_file_are_read_as_such(tmp_path: Path) -> None:
    lines = ["term,meaning", *(f"naïve{i},crème brûlée" for i in range(50))]
    (tmp_path / "a.csv").write_bytes("\n".join(lines).encode() + b"\nlast,it\x92s caf\xe9\n")
    rows = read_rows(tmp_path / "a.csv")
    assert rows[0].cells == ["naïve0", "crème brûlée", "", ""]
    assert rows[-1].cells == ["last", "it’s café", "", ""]


@pytest.mark.parametrize(
    "header",
    [
        "slang,description",
        " Description , SLANG ",
        "\ufeffKeyword,Definition",
        "id,SLANG/Acronym,Meaning",
        "Term,_meaning_",
    ],
)
def test_columns_are_known_by_any_of_their_names(tmp_path: Path, header: str) -> None:
    names = [name.strip().lower() for name in header.split(",")]
    row = ",".join("what it means" if "mean" in name or "descr" in name or "defin" in name else "W" for name in names)
    (tmp_path / "a.csv").write_text(f"{header}\n{row}\n", encoding="utf-8")
    assert read_rows(tmp_path / "a.csv")[0].cells == ["W", "what it means", "", ""]


def test_the_first_of_a_field_s_names_wins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("word,term,definition\nsecond,first,x\n")
    assert read_rows(tmp_path / "a.csv")[0].cells == ["first", "x", "", ""]


def test_a_quote_that_is_never_closed_costs_only_its_own_row(tmp_path: Path) -> None:
    good = [f'w{i},"a, quoted meaning {i}"' for i in range(5)]
    lines = ["slang,description", *good[:2], 'bad,"never closed', *good[2:], 'worse,"at the end']
    (tmp_path / "a.csv").write_text("\n".join(lines))
    rows = read_rows(tmp_path / "a.csv")
    assert [row.cells[0] for row in rows if row.cells] == [f"w{i}" for i in range(5)]
    assert [(row.number, row.line, row.problem) for row in rows if row.problem] == [
        (3, 4, "a quote that is never closed"),
        (7, 8, "a quote that is never closed"),
    ]


def test_lines_that_do_not_fit_cost_only_themselves(tmp_path: Path) -> None:
    text = (
        "slang,description,example\n"
        "a,one,x\n"
        "b,two\n"
        "c,three,x,y\n"
        "d,four,x,,,\n"
        "\n"
        'e,"he said "five" to me",x\n'
        '"f" , "six, or so" ,x\n'
        'g,"seven\nin two lines",x\n'
        "h,\x00eig\x00ht,x\n"
        f"i,{'9' * 200_000},x\n"
        f"j,{'10,' * 500_000},x\n"
        "k,eleven,x\n"
    )
    (tmp_path / "a.csv").write_text(text)
    rows = read_rows(tmp_path / "a.csv")
    assert [(row.cells or [row.problem])[0] for row in rows] == [
        "a",
        "b",
        "more cells than columns",
        "d",
        "quotes out of place",
        "f",
        "g",
        "h",
        "a line or cell too long to read",
        "a line or cell too long to read",
        "k",
    ]
    assert [row.line for row in rows] == [2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14]
    assert rows[6].cells == ["g", "seven\nin two lines", "x", ""]
    assert rows[5].cells == ["f", "six, or so", "x", ""]


def test_json_lines(tmp_path: Path) -> None:
    lines = ['{"Term": "W", "meaning": "win"}', "", '{"meaning": 7, "Term": "seven", "usage": null, "id": [1]}']
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"Term": ["L"], "meaning": "loss"}']))
    rows = read_rows(tmp_path / "a.jsonl")
    assert [row.cells for row in rows] == [["W", "win", "", ""], ["seven", "7", "", ""], ['["L"]', "loss", "", ""]]
    assert [isinstance(cell, NotText) for cell in rows[2].cells or []] == [True, False, False, False]
    assert (rows[2].line, rows[2].problem) == (4, "")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt"])
def test_lines_of_json_that_end_in_commas_are_rows(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"term": f"t{n}", "meaning": "a, {b},"}) for n in range(3)]
    (tmp_path / f"a.{suffix}").write_text(",\n".join(lines) + ",\n")
    assert [row.cells for row in read_rows(tmp_path / f"a.{suffix}")] == [
        [f"t{n}", "a, {b},", "", ""] for n in range(3)
    ]


def headed(text: str, names: dict[str, list[str]] | None, folder: Path) -> tuple[dict[str, str], list[Any], list[str]]:
    (folder / "a.csv").write_text(text, newline="")
    table = open_table(folder / "a.csv", names, list(names or ()))
    rows = [row.cells for row in table.rows]
    table.close()
    return table.columns, rows, table.notes


TWO = {"question": ["question"], "answer": ["answer"]}
ROWS_BELOW = "Why, so?;Because, so;7\nHow?;Thus it is;8\nWhen?;Now;9\n"
BELOW = [["Why, so?", "Because, so"], ["How?", "Thus it is"], ["When?", "Now"]]


@pytest.mark.parametrize(
    ("above", "says"),
    [
        ("sep=;\r\nQuestion;Answer;n\n", "its first line, sep=;, names the separator"),
        ("Support, June, 2024;;\n\nquestion;answer;n\n", "left out above its header: 'Support, June, 2024'"),
        ("Export\nMade by:;Ann\nquestion;answer;n\n", "left out above its header: 'Export', 'Made by:', 'Ann'"),
        ("Customer;Agent;\nquestion;answer;n\n", "left out above its header: 'Customer', 'Agent'"),
        ("question;answer;n\n(text);(text);(int)\n", "left out below its header: '(text)', '(text)', '(int)'"),
        ("question;answer;n\nquestion;answer;n\n", "left out below its header: 'question', 'answer', 'n'"),
        (
            "question;answer;n\nWhat is asked;What is said;How often\n",
            "left out below its header: 'What is asked', 'What is said', 'How often'",
        ),
        (
            'question;answer;n\nAsk;Reply;No\n"{""ImportId"":""a""}";"{""ImportId"":""b""}";"{""ImportId"":""c""}"\n',
            "left out below its header: 'Ask', 'Reply', 'No'",
        ),
    ],
)
def test_what_spreadsheets_put_around_a_header_is_left_out_and_said(tmp_path: Path, above: str, says: str) -> None:
    assert headed(above + ROWS_BELOW, TWO, tmp_path)[1:] == (BELOW, [says])


def test_two_header_lines_are_one(tmp_path: Path) -> None:
    above = "Customer;;Agent;\nName;Question;Name;Answer\n"
    rows = "Bob;Why, so?;Ann;Because, so.\nTim;How?;Ann;Thus it is.\n"
    names = ["Customer Name", "Customer Question", "Agent Name", "Agent Answer"]
    said = [f"two header lines are read as one: {', '.join(map(repr, names))}"]
    columns, cells, notes = headed(above + rows, None, tmp_path)
    assert (list(columns.values()), cells[0], notes) == (names, ["Bob", "Why, so?", "Ann", "Because, so."], said)
    known = {"question": ["Customer Question"], "answer": ["Agent Answer"]}
    assert headed(above + rows, known, tmp_path)[1:] == (BELOW[:0] + [row[1::2] for row in cells], said)


@pytest.mark.parametrize(
    ("text", "headers", "count"),
    [
        (",question,answer\n0,Why?,So.\n1,How?,Thus.\n", ["question", "answer"], 2),
        ("name,,city\nBob,x,Paris\nAl,y,Rome\n", ["name", "city"], 2),
        ("country,2019,2020\nPeru,1,2\nChile,3,4\nCuba,5,6\n", ["country", "2019", "2020"], 3),
        ("0,1\nGood one,x\nBad one,y\nNo one,z\n", ["0", "1"], 3),
        ("q,I like it here a lot.\nAnn,yes\nBob,no\nEve,no\n", ["q", "I like it here a lot."], 3),
        ("poem\nRoses are red\nViolets, blue\nand so on\n", ["poem"], 3),
        ("review\nfine,,,\ngood,,,\n", ["review"], 2),
        ("Title\nPart one\nPart two\n", ["Title"], 2),
    ],
)
def test_a_usual_header_is_the_first_line(tmp_path: Path, text: str, headers: list[str], count: int) -> None:
    columns, rows, notes = headed(text, None, tmp_path)
    assert (list(columns.values()), len(rows), notes) == (headers, count, [])


# --- cleaning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "text", "repaired"),
    [
        ("plain", "plain", False),
        ("  many \t spaces\r\n", "many spaces", False),
        ("Whatâ€™s passÃ©", "What's passé", True),
        ("â€œBRBâ€\x9d", '"BRB"', True),
        ("â€œBRBâ€ she said", '"BRB" she said', True),
        ("it’s “fine”", 'it\'s "fine"', True),
        ("a\x00b\x07c\x1b", "abc", True),
        ("e\u0301te\u0301", "été", True),
        ("zero\u200bwidth\ufeff", "zerowidth", True),
        ("half \ud83d emoji", "half \ufffd emoji", True),
        ("Tom &amp; Jerry", "Tom & Jerry", True),
        ("👨\u200d👩\u200d👧 naïve", "👨\u200d👩\u200d👧 naïve", False),
    ],
)
def test_a_cell_is_cleaned(cell: str, text: str, repaired: bool) -> None:
    assert clean(cell) == (text, repaired)
    assert clean(text) == (text, False)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Отличный сериал, смотрел всю ночь.", "cp1251"),
        ("Плохо. Скучно и затянуто, актёры играют ужасно.", "cp1251"),
        ("Отличный сериал, смотрел всю ночь.", "koi8-r"),
        ("Πολύ καλή σειρά, μου άρεσε πάρα πολύ", "cp1253"),
        ("סדרה מצוינת, נהניתי מאוד", "cp1255"),
        ("최고의 드라마, 강력 추천!", "cp949"),
        ("这部电视剧非常好看, 推荐大家观看", "gb18030"),
        ("這部電視劇非常好看", "big5"),
        ("とても面白かったです", "shift_jis"),
        ("とても面白かったです", "euc_jp"),
    ],
)
def test_text_of_another_script_that_was_read_as_latin_is_read_again(text: str, encoding: str) -> None:
    for read_as in ("latin-1", "cp1252"):
        written = text.encode(encoding)
        with contextlib.suppress(UnicodeDecodeError):  # five bytes are nothing in cp1252
            assert clean(written.decode(read_as)) == (text, True)
    assert clean(text) == (text, False)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("It¡¯s ¡°great¡±, don¡¦t miss it", "It's \"great\", don't miss it"),
        ("¡Qué película! ¡¡¡ÓRALE!!! Ñandú ñoño", "¡Qué película! ¡¡¡ÓRALE!!! Ñandú ñoño"),
        ("Þór fór út á ís í gær, ÄÖÜäöüß éèêëàâ", "Þór fór út á ís í gær, ÄÖÜäöüß éèêëàâ"),
        ("éèêëàâîïôùûçáíóú", "éèêëàâîïôùûçáíóú"),  # nothing that any encoding explains
        ("Äà", "Äà"),  # "Да" in cp1251, perhaps
    ],
)
def test_what_other_encodings_explain_without_a_doubt_is_repaired_and_nothing_else(cell: str, text: str) -> None:
    assert clean(cell)[0] == text


@pytest.mark.parametrize(
    ("cell", "text", "repaired"),
    [
        ("def f(x):\n    return 1", "def f(x):\n    return 1", False),
        ("  two  spaces \n", "two spaces", False),
        ("\n a\r\n\r\n\r\n\tb  # c\rd \n\n", "a\n\n\n\tb  # c\nd", False),
        ("    x = 1\n    return x\n", "    x = 1\n    return x", False),
        ("Roses,  \nviolets \nand\u2028more\xa0thorns", "Roses,  \nviolets\nand\nmore thorns", False),
        ("| a  | “b” |\n|----|-----|", '| a  | "b" |\n|----|-----|', True),
        ("- passÃ©\n  - \u200bnaïve\x07\x1f", "- passé\n  - naïve", True),
        ('{"said": "“so”"}', '{"said": "“so”"}', False),
        ('{\n  "said": "“so”"\n}', '{\n  "said": "“so”"\n}', False),
        ("你好，世界！（好）", "你好，世界！（好）", False),
    ],
)
def test_a_cell_keeps_its_lines(cell: str, text: str, repaired: bool) -> None:
    assert clean_lines(cell) == (text, repaired)
    assert clean_lines(text) == (text, False)


@pytest.mark.parametrize(
    "spellings",
    [
        ["G.O.A.T", "goat", "GOAT.", "G O A T"],
        ["Glow-up", "glow up", "GLOWUP", "glow_up!"],
        ["Bussin'", "bussin", '"Bussin"'],
        ["A/S/L", "asl"],
        ["ﬁre", "FIRE"],
        ["L+ratio", "L + Ratio"],
        ["❤️", "❤"],
        ["A.F.", "af"],
    ],
)
def test_spellings_of_one_term(spellings: list[str]) -> None:
    assert len({key_of(spelling) for spelling in spellings}) == 1


def test_terms_that_differ_in_their_signs_alone_stay_apart() -> None:
    terms = [
        "L",
        "L+ratio",
        ":)",
        ":(",
        ":D",
        "D",
        "C",
        "C++",
        "C#",
        "9/11",
        "911",
        "is -15 odd",
        "is 15 odd",
        "<3",
        "3",
        "w/",
        "w",
        "?",
        "!",
        "...",
    ]
    assert len({key_of(term) for term in terms}) == len(terms)
    assert all(key_of(term) for term in terms)


def test_explicit_terms_are_whole_words() -> None:
    assert all(is_explicit(text) for text in ("What the FUCK", "motherfuckers", "an asshole.", "(porn)"))
    assert not any(is_explicit(text) for text in ("a classic assassin", "Scunthorpe", "cocktail", "grape", "no cap"))


# --- splits ---------------------------------------------------------------------------------------------------


def test_a_row_never_moves_when_others_come_or_go(make: Callable[..., Path]) -> None:
    rows = made_up(400)
    before = {row["slang"]: split for split, found in read_all(make(rows[:200])).items() for row in found}
    random.Random(5).shuffle(rows)
    after = {row["slang"]: split for split, found in read_all(make(rows)).items() for row in found}
    assert before.items() <= after.items()


def test_shares_are_as_asked_and_a_seed_deals_anew() -> None:
    cut = ranges(0.2, 0.1)
    hashes = [[hash_of(f"key {number}", seed) for number in range(50_000)] for seed in (0, 1)]
    for split, share in {"training": 0.7, "validation": 0.2, "test": 0.1}.items():
        first, end = cut[split]
        assert abs(sum(first <= hashed < end for hashed in hashes[0]) / 50_000 - share) < 0.01
    assert not set(hashes[0]) & set(hashes[1])


def test_a_larger_validation_share_takes_from_training_alone(make: Callable[..., Path]) -> None:
    rows = made_up(200)
    small, large = (
        {
            split: {row["slang"] for row in found}
            for split, found in read_all(make(rows, f"split.validation={v}")).items()
        }
        for v in (0.1, 0.3)
    )
    assert small["test"] == large["test"]
    assert small["validation"] < large["validation"]


@pytest.mark.parametrize(("share", "says"), [(0.0, "above 0"), (0.95, "below 1 together"), (-0.1, "above 0")])
def test_shares_that_leave_a_split_empty_are_refused(make: Callable[..., Path], share: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make(made_up(50), f"split.validation={share}")


@pytest.mark.slow
def test_twenty_rows_fill_every_split_or_the_error_names_a_seed_that_does(make: Callable[..., Path]) -> None:
    rows = made_up(20)
    failed = 0
    for seed in range(30):
        try:
            splits = read_all(make(rows, seed=seed))
        except UserError as error:
            failed += 1
            assert "20 of" in str(error) and "about 47 rows fill all splits" in str(error)
            named = int(str(error).rsplit("seed=", 1)[1])
            splits = read_all(make(rows, seed=named))
        assert all(splits.values()) and sum(map(len, splits.values())) == 20
    assert 0 < failed < 15


# --- repeated and near-duplicate rows -------------------------------------------------------------------------


def wording(term: str, meaning: str, example: str = "", context: str = "") -> Wording:
    cells = [clean(cell)[0] for cell in (term, meaning, example, context)]
    return Wording.of(cells, key_of(term), [1])


NEAR_PAIRS = [
    # terms and definitions nearly the same, whatever the rest
    (("LOL", "Laughing out loud", "That cat, LOL!"), ("LOLZ", "Laughing out loud.", "He fell over again, lolz")),
    (("bussin", "Really tasty food"), ("Bussing", "really tasty food!")),
    (("EZ", "Easy"), ("EZY", "Easy")),
    (("кринж", "Чувство стыда за других"), ("кринжж", "чувство стыда за других!")),
    # everything but the term the same
    (
        ("ROFL", "Laughing hard", "That had me on the floor", "Chats"),
        ("LMAO", "Laughing hard", "That had me on the floor", "Chats"),
    ),
    (
        ("mom", "A person one looks up to so much that one wants to be adopted"),
        ("dad", "A person one looks up to so much that one wants to be adopted"),
    ),
    # a word put differently in a long row
    (
        ("drip", "A very good outfit", "He walked in wearing that coat and the whole room saw the drip"),
        ("dripp", "A very good outfit", "He walked in wearing that coat and the entire room saw the drip"),
    ),
]
DISTINCT_PAIRS = [
    # one definition, terms that are not alike, rows of their own
    (("LOL", "Laughing out loud", "That cat video!"), ("KEK", "Laughing out loud", "He fell off his chair again")),
    (("FOMO", "Fear of missing out"), ("JOMO", "Joy of missing out")),
    (("GN", "Good night"), ("GM", "Good morning")),
    (("W", "A win"), ("L", "A loss")),
    ((":)", "A happy face"), (":(", "A sad face")),
    (("cap", "A lie"), ("no cap", "Not a lie")),
]


@pytest.mark.parametrize(("one", "other"), NEAR_PAIRS)
def test_pairs_that_are_near(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert are_near([wording(*one)], [wording(*other)]).all()


@pytest.mark.parametrize(("one", "other"), DISTINCT_PAIRS)
def test_pairs_that_are_not(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert not are_near([wording(*one)], [wording(*other)]).any()


def near_pairs(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The rule again, on every pair and without an index."""
    said = [[wording(*(row[name.lower()] for name in HEADER)) for row in rows] for rows in (some, others)]

    def same(field: str, threshold: int) -> Any:
        texts = [[getattr(each, field) for each in wordings] for wordings in said]
        return process.cdist(*texts, scorer=fuzz.ratio, score_cutoff=threshold) >= threshold

    near = same("whole", SAME_TEXT) | (same("key", SAME_KEY) & same("rest", SAME_TEXT))
    return [(some[one]["slang"], others[other]["slang"]) for one, other in zip(*near.nonzero(), strict=True)]


def test_near_duplicates_are_kept_and_share_a_split(make: Callable[..., Path]) -> None:
    rows = made_up(600)
    planted = [[f"{term}s", rest[0], f"its own example {rest[2][::-1]}", ""] for term, *rest in rows[:200]]
    folder = make([*rows, *planted])
    where = {row["row"]: split for split, found in read_all(folder).items() for row in found}
    assert len(where) == 800 and all(where[n] == where[600 + n] for n in range(1, 201))
    manifest = manifest_of(folder)
    assert (manifest["dropped"], manifest["merged"]) == ({}, 0)
    found = manifest["alike"]
    assert (found["groups"], found["grouped_rows"], found["largest_group"]) == (200, 400, 2)
    alone = ranges(0.1, 0.1)
    keys = [row[0] for row in [*rows, *planted]]
    elsewhere = [n for n, key in enumerate(keys, 1) if not alone[where[n]][0] <= hash_of(key, 0) < alone[where[n]][1]]
    assert found["moved"] == len(elsewhere) > 0
    assert 50 < manifest["splits"]["test"]["rows"] < 110, "groups leave the splits their sizes"


def test_a_group_too_large_to_hold_out_is_trained_on_and_others_are_held_out(make: Callable[..., Path]) -> None:
    text = made_up(1)[0]
    alike = [[f"{text[0]}{number}", *text[1:]] for number in range(40)]
    folder = make([*alike, *made_up(60, seed=1)], "split.validation=0.2", "split.test=0.2")
    splits = read_all(folder)
    assert {row["row"] for row in splits["training"]} > set(range(1, 41))
    assert all(14 <= len(splits[name]) <= 26 for name in ("validation", "test"))
    assert sum(map(len, splits.values())) == 100


def test_rows_of_one_formula_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    long = (
        "Please tell me, as briefly as you can, what it costs to send a parcel from here to the city of {}, thank you!"
    )
    cities = [row[0] for row in made_up(100)]
    rows = [{"instruction": long.format(city), "input": "", "output": f"To {city} it is {n % 7}."}
            for n, city in enumerate(cities)]  # fmt: skip
    rows += [row | {"instruction": row["instruction"].replace(", thank you", "")} for row in rows[:20]]
    folder = asking(tmp_path, rows)
    manifest, where = manifest_of(folder), {}
    for split, found in read_all(folder).items():
        where |= {row["row"]: split for row in found}
    assert len(where) == 120 and manifest["alike"]["formula_rows"] == 120
    assert all(where[100 + n] == where[n] for n in range(1, 21)), "the same city is in one split"
    assert all(18 <= manifest["splits"][name]["rows"] <= 30 for name in ("validation", "test"))


def test_a_table_of_one_group_is_refused(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a b c", "input": "", "output": f"one two three four five six {n} seven"} for n in range(50)
    ]
    with pytest.raises(UserError, match=r"50 of the 50 usable rows of .* are one group of near-duplicates"):
        asking(tmp_path, rows)


@pytest.mark.parametrize("name", ["all_slangs.csv", "genz_slang.csv"])
def test_no_row_of_a_real_table_is_near_one_in_another_split(tmp_path: Path, name: str) -> None:
    splits = read_all(prepare(config_for(tmp_path / "data", real(name)), None))
    rows = [row["row"] for found in splits.values() for row in found]
    keys = [{key_of(row["slang"]) for row in found} for found in splits.values()]
    assert len(set(rows)) == len(rows)
    assert sum(len(of_split) for of_split in keys) == len(set().union(*keys)), "the rows of a key are in one split"
    held_out = splits["validation"] + splits["test"]
    assert near_pairs(held_out, held_out), "the rule finds at least each row itself"
    assert not near_pairs(splits["training"], held_out)
    assert not near_pairs(splits["validation"], splits["test"])


def signatures(texts: list[str], first: int) -> Signatures:
    bands, marks = minhash(texts)
    return Signatures(bands, marks, np.arange(first, first + len(texts)))


def test_candidates_are_found_among_many(tmp_path: Path) -> None:
    texts = [" ".join(row) for row in made_up(20_000, seed=3)]
    changed = []
    for text in texts[:500]:
        words = text.split()
        words[7] = "other"
        changed.append(" ".join(words))
    with closing(Candidates(tmp_path)) as index:
        index.add(signatures(texts, 0))
        index.add(signatures(changed, 20_000))
        found = {pair for one, other in index.pairs() for pair in zip(one.tolist(), other.tolist(), strict=True)}
    assert found >= {(number, 20_000 + number) for number in range(500)}
    assert len(found) < 600, "little else should have to be compared"


def test_a_phrase_that_all_rows_share_does_not_slow_the_search(tmp_path: Path) -> None:
    texts = [f"used when someone is very very happy about a thing {number}" for number in range(20_000)]
    with closing(Candidates(tmp_path)) as index:
        index.add(signatures(texts, 0))
        found = [len(one) for one, _ in index.pairs()]
    assert max(found) > 0 and sum(found) <= BANDS * REACH * 20_000


def rows_of_key(folder: Path, term: str) -> list[tuple[int, str, str, str]]:
    return [
        (row["row"], *(row[name] for name in ("description", "example", "context")))
        for found in read_all(folder).values()
        for row in found
        if key_of(row["slang"]) == key_of(term)
    ]


def test_only_true_repeats_are_merged(make: Callable[..., Path]) -> None:
    rows = made_up(60)
    term, meaning, example, context = rows[0]
    others = [
        [term.upper() + ".", meaning.upper(), example, ""],
        [term, "something else entirely", "an example of that", ""],
        [term, f"{meaning}.", example, "another scene"],
        [f" {term} ", meaning.capitalize() + ".", "", context],
        [term, "$5", "", ""],
        [term, "€5", "", ""],
        [term, "us", "", ""],
        [term, "US", "", ""],
        [term, "Us", "", ""],
    ]
    folder = make([[term, meaning, "", context], *rows[1:], *others])
    assert rows_of_key(folder, term) == [
        (1, meaning, example, context),
        (62, "something else entirely", "an example of that", ""),
        (63, f"{meaning}.", example, "another scene"),
        (65, "$5", "", ""),
        (66, "€5", "", ""),
        (67, "us", "", ""),
        (68, "US", "", ""),
    ]
    manifest = manifest_of(folder)
    assert (manifest["merged"], manifest["dropped"]) == (3, {})
    found = manifest["alike"]
    assert [found[name] for name in ("repeats", "meanings", "variants", "joined")] == [3, 5, 1, 0]
    assert account(manifest) == (69, 69)


def test_homonyms_can_be_one_row_with_all_meanings(make: Callable[..., Path]) -> None:
    rows = made_up(60)
    others = [["W", "The letter", "", "spelling"], ["w", "a win", "", ""], ["W", "Watt", "60 W", ""]]
    folder = make([*rows, ["W", "A win.", "", ""], *others], "same_key=joined")
    assert rows_of_key(folder, "W") == [(61, "A win; The letter; Watt", "", "")]
    found = manifest_of(folder)["alike"]
    assert [found[name] for name in ("repeats", "meanings", "variants", "joined")] == [1, 0, 0, 2]
    assert account(manifest_of(folder)) == (64, 64)


def test_a_term_that_thousands_of_rows_repeat(make: Callable[..., Path]) -> None:
    rows = made_up(60)
    folder = make([*rows, *([rows[0][0], rows[0][1] if i % 2 else f"{i} {i} {i} {i}", "", ""] for i in range(10_000))])
    manifest = manifest_of(folder)
    assert (manifest["merged"], manifest["dropped"]) == (5000, {})
    assert manifest["alike"]["meanings"] == 5000 and len(rows_of_key(folder, rows[0][0])) == 5001
    assert account(manifest) == (10_060, 10_060)


def asking(folder: Path, rows: list[dict[str, Any]], **data: Any) -> Path:
    """Prepare rows of an instruction, an input and an output, of which the first two are the key."""
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {name: [name] for name in ("instruction", "input", "output")}
    options = {
        "source": str(folder / "a.jsonl"),
        "columns": columns,
        "required": ["instruction", "output"],
        "key": ["instruction", "input"],
        "split": {"validation": 0.2, "test": 0.2},
        "max_chars": 4000,
    }
    prompt = {"template": "{instruction}\n{response}", "instruction": "{instruction}\n{input}", "response": "{output}"}
    task = {"name": "ask", "data": options | data, "prompt": prompt | {"fields": {}}}
    return prepare(typed(task=task, data_dir=str(folder / "data")), None)


def test_the_same_instruction_with_another_input_is_another_row(tmp_path: Path) -> None:
    long = "Read the customer's message with care and answer with the one word that names its feeling, nothing else."
    rows = [{"instruction": long, "input": text, "output": ["glad", "sad", "angry"][n % 3]} for n, (text, *_) in
            enumerate([" ".join(row[1:2]), *row] for row in made_up(60))]  # fmt: skip
    rows[0] = rows[0] | {"instruction": "Tell a joke.", "input": ""}
    manifest = manifest_of(asking(tmp_path, [*rows, rows[5], rows[6] | {"output": "bored"}]))
    assert (manifest["rows_in"], manifest["rows_out"], manifest["merged"]) == (62, 61, 1)
    assert (manifest["dropped"], manifest["alike"]["meanings"]) == ({}, 1)


def test_a_near_input_to_the_same_instruction_is_not_in_two_splits(tmp_path: Path) -> None:
    inputs = [f"{row[2]} {row[3]} {row[1]}" for row in made_up(80)]
    rows = [{"instruction": "Shorten this.", "input": text, "output": text[:30]} for text in inputs]
    near = [row | {"input": row["input"] + " so"} for row in rows]
    folder = asking(tmp_path, rows + near)
    where = {row["row"]: split for split, found in read_all(folder).items() for row in found}
    assert len(where) == 160 and all(where[n] == where[80 + n] for n in range(1, 81))


def test_values_that_are_no_text_cost_no_row_unless_they_are_needed(tmp_path: Path) -> None:
    rows = [{"instruction": row[1], "input": [row[0]], "output": row[2], "tags": ["a"], "ok": True, "meta": {"n": n}}
            for n, row in enumerate(made_up(60))]  # fmt: skip
    rows[0]["output"], rows[1]["output"] = {"a": 1}, False
    folder = asking(tmp_path, rows)
    manifest = manifest_of(folder)
    assert manifest["source"]["unused"] == ["tags", "ok", "meta"]
    assert manifest["notes"] == {"values of input that are no text left out": 60}
    assert (manifest["rows_out"], manifest["dropped"]) == (59, {"a value that is not text": 1})
    assert [drop["detail"] for drop in drops_of(folder)] == ['output holds {"a": 1}']
    outputs = {row["row"]: row["output"] for found in read_all(folder).values() for row in found}
    assert outputs[2] == "false"
    assert manifest_of(asking(tmp_path, rows, cells={"output": "json"}))["rows_out"] == 60


# --- what comes out -------------------------------------------------------------------------------------------


def test_a_row_is_written_as_nemo_reads_it(make: Callable[..., Path]) -> None:
    rows = [["G.O.A.T", "the greatest of all time", "He is the GOAT", "Talking about sports"], *made_up(60)]
    row = next(row for found in read_all(make(rows)).values() for row in found if row["row"] == 1)
    tag, condition = (TASK.prompt.fields[name] for name in ("tag", "condition"))
    assert row == {
        "input": f"{tag}Talking about sports.{condition}",
        "output": "Slang: G.O.A.T\nDefinition: The greatest of all time.\nExample: He is the GOAT",
        "row": 1,
        "slang": "G.O.A.T",
        "description": "the greatest of all time",
        "example": "He is the GOAT",
        "context": "Talking about sports",
    }


def test_a_two_column_table_asks_for_no_example(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", [row[:2] for row in made_up(80)], ["keyword", "description"])
    for split in read_all(prepare(config_for(tmp_path / "data", source), None)).values():
        for row in split:
            assert row["input"].endswith("conversation:\n\nYou should suggest new slang and its definition.")
            assert "Example" not in row["output"]
            assert (row["example"], row["context"]) == ("", "")


def test_split_files_load_in_one_line_and_have_one_form(make: Callable[..., Path]) -> None:
    import datasets

    folder = make([*made_up(100), ["only two", "no example here", "", ""]])
    files = {split: str(folder / f"{split}.jsonl") for split in ("training", "validation", "test")}
    loaded = datasets.load_dataset("json", data_files=files, cache_dir=str(folder.parent / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {
        k: v["rows"] for k, v in manifest_of(folder)["splits"].items()
    }
    for rows in read_all(folder).values():
        for row in rows:
            assert list(row) == ["input", "output", "row", "slang", "description", "example", "context"]
            assert {name: type(value) for name, value in row.items() if type(value) is not str} == {"row": int}


def account(manifest: dict[str, Any]) -> tuple[int, int]:
    return manifest["rows_in"], manifest["rows_out"] + sum(manifest["dropped"].values()) + manifest["merged"]


@pytest.mark.parametrize(
    ("name", "rows_in", "columns"),
    [
        (
            "all_slangs.csv",
            1779,
            {"slang": "Slang", "description": "Description", "example": "Example", "context": "Context"},
        ),
        ("genz_slang.csv", 145, {"slang": "keyword", "description": "description"}),
    ],
)
def test_real_tables_go_through_whole(tmp_path: Path, name: str, rows_in: int, columns: dict[str, str]) -> None:
    folder = prepare(config_for(tmp_path / "data", real(name)), None)
    manifest = manifest_of(folder)
    assert manifest["source"]["columns"] == columns
    assert manifest["rows_in"] == rows_in
    assert manifest["rows_out"] > 0.85 * rows_in
    first, second = account(manifest)
    assert first == second
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.jsonl"))
    assert not [sign for sign in ("â€", "Ã", "’", "“", "\\u", "  ") if sign in text]
    for drop in drops_of(folder):
        assert drop["reason"] in manifest["dropped"] and 1 <= drop["row"] <= rows_in
    for split, about in manifest["splits"].items():
        data = (folder / f"{split}.jsonl").read_bytes()
        assert about == {"rows": data.count(b"\n"), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_every_row_of_the_sample_is_usable(tmp_path: Path) -> None:
    manifest = manifest_of(prepare(config_for(tmp_path / "data", ROOT / "tasks" / "slang" / "slang.csv"), None))
    assert manifest["rows_out"] == manifest["rows_in"] >= 300
    assert not manifest["dropped"]


def test_every_drop_is_counted_and_named(make: Callable[..., Path]) -> None:
    rows = made_up(80)
    rows[10][1] = ""
    rows[20][0] = "  "
    rows[30][2] = "x" * 100_000
    rows[40][3] = "some porn site"
    rows[50].append("a fifth cell")
    folder = make(rows, "drop_explicit=true")
    manifest = manifest_of(folder)
    assert manifest["dropped"] == {
        "explicit term": 1,
        "longer than 4000 characters": 1,
        "more cells than columns": 1,
        "no description": 1,
        "no slang": 1,
    }
    assert [drop["row"] for drop in drops_of(folder)] == [11, 21, 31, 41, 51]
    assert [drop["key"] for drop in drops_of(folder)] == [rows[10][0], "", rows[30][0], rows[40][0], ""]
    assert account(manifest) == (80, 80)


def test_explicit_rows_stay_unless_asked(make: Callable[..., Path]) -> None:
    rows = made_up(60)
    rows[5][1] = "as fuck"
    assert manifest_of(make(rows))["rows_out"] == 60


def test_training_from_some_columns_leaves_held_out_rows_whole(make: Callable[..., Path]) -> None:
    splits = read_all(make(made_up(80), "train_fields=[slang,description]"))
    assert all(row["example"] == row["context"] == "" and "Example" not in row["output"] for row in splits["training"])
    assert all(row["context"] in row["input"] and row["example"] in row["output"] for row in splits["test"])


def test_training_from_some_rows_takes_the_same_ones_first(make: Callable[..., Path]) -> None:
    rows = made_up(100)
    few, more = (read_all(make(rows, f"train_rows={count}")) for count in (10, 30))
    assert (len(few["training"]), len(more["training"])) == (10, 30)
    assert {row["row"] for row in few["training"]} < {row["row"] for row in more["training"]}
    assert few["test"] == more["test"] and few["validation"] == more["validation"]
    folder = make(rows, "train_rows=10")
    manifest = manifest_of(folder)
    assert manifest["dropped"] == {"beyond train_rows: 10": 100 - manifest["rows_out"]}


def test_filters_leave_rows_out_by_number_and_by_pattern(tmp_path: Path) -> None:
    rows = [[*row[:2], str(number % 7), "en" if number % 2 else "de"] for number, row in enumerate(made_up(140))]
    rows[1][2], rows[3][2] = "many", ""
    source = write_csv(tmp_path / "a.csv", rows)
    options = ("columns.example=[example]", "filters.example=>=2.5", "filters.context=en|fr")  # needs no quotes
    folder = prepare(config_for(tmp_path / "data", source, *options), None)
    kept = [row for found in read_all(folder).values() for row in found]
    assert kept and {row["context"] for row in kept} == {"en"} and {row["example"] for row in kept} == {*"3456"}
    manifest = manifest_of(folder)
    too_low = sum(row[2] in ("0", "1", "2") for row in rows)
    other = sum(row[2] in ("3", "4", "5", "6") and row[3] == "de" for row in rows)
    assert manifest["dropped"] == {
        "context does not match en|fr": other,
        "example is empty": 1,
        "example is no number": 1,
        "example is not >=2.5": too_low,
    }
    assert account(manifest) == (140, 140)


def test_a_column_to_filter_by_must_be_there(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", [row[:2] for row in made_up(60)], HEADER[:2])
    with pytest.raises(UserError, match="has no column for context"):
        prepare(config_for(tmp_path / "data", source, "filters.context=en"), None)


@pytest.mark.parametrize(
    ("option", "template", "message"),
    [
        (
            "response",
            "{reveiw}",
            "task.prompt.response names reveiw; the columns are review, answer; did you mean review?",
        ),
        ("instruction", "What of {Review}?", "task.prompt.instruction names Review; the columns are"),
        ("instruction", "What of {stars}?", "task.prompt.instruction names stars; the columns are review, answer"),
        ("response", "Yes.", "task.prompt.response names no column, so every row would have the same answer"),
        ("response", None, "task.prompt.response must be text, not null"),
        (
            "respones",
            "{answer}",
            "unknown key task.prompt.respones; did you mean task.prompt.response?",
        ),
        ("template", "{response}", "task.prompt: prompt template must hold {instruction} once"),
        ("fields", {"answer": 7}, 'task.prompt.fields.answer must be text, not 7; write it in quotes: "7"'),
    ],
)
def test_a_template_that_does_not_fit_is_named(tmp_path: Path, option: str, template: object, message: str) -> None:
    columns = {"review": ["review"], "answer": ["answer"]}
    prompt = {"template": "{instruction}\n{response}", "instruction": 'As {"a": 1}, {review}', "response": "{answer}"}
    data = {
        "source": "a.csv",
        "columns": columns,
        "required": ["review"],
        "key": "review",
        "max_chars": 99,
        "split": {"validation": 0.1, "test": 0.1},
    }
    Task.of(typed(task={"name": "own", "data": data, "prompt": prompt}))
    with pytest.raises(UserError) as error:
        Task.of(typed(task={"name": "own", "data": data, "prompt": {**prompt, option: template}}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("filters.context='>=many'", "task.data.filters.context: '>=many' is no comparison: write >=, <=, > or <"),
        ("filters.context='(en'", "task.data.filters.context: '(en' is no regular expression"),
        (
            "filters.contxt=en",
            "task.data.filters names contxt; the columns are slang, description, example, context; did",
        ),
        ("filter.context=en", "unknown key task.data.filter; did you mean task.data.filters?"),
        ("columns.row=[row]", "task.data.columns: a field cannot be called 'row'"),
        ("train_fields=[slang]", "train_fields leaves out description"),
        ("train_fields=[slang,description,tone]", "train_fields names tone; the columns are slang, description"),
        ("key=term", "task.data.required names term"),
        ("train_rows=0", "must be 1 or more"),
        ("max_chars=many", "task.data.max_chars must be a whole number, not 'many'"),
    ],
)
def test_an_option_that_does_not_fit_is_named(make: Callable[..., Path], option: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        make(made_up(60), option)
    assert message in str(error.value)


def test_a_task_without_a_module_uses_its_columns_as_they_are(tmp_path: Path) -> None:
    task = {
        "name": "capitals",
        "data": {
            "source": str(write_csv(tmp_path / "a.csv", [row[:2] for row in made_up(80)], ["Country", "Capital City"])),
            "columns": {"country": ["country"], "capital": ["capital city"]},
            "required": ["country", "capital"],
            "key": "country",
            "split": {"validation": 0.1, "test": 0.1},
            "max_chars": 1000,
        },
        "prompt": {
            "template": "{instruction}\n{response}",
            "instruction": "What is the capital of {country}?",
            "response": "{capital}",
            "fields": {},
        },
    }
    config = typed(task=task, data_dir=str(tmp_path / "data"))
    rows = read_split(prepare(config, None), "training")
    assert all(row["input"] == f"What is the capital of {row['country']}?" for row in rows)
    assert all(row["output"] == row["capital"] for row in rows)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer with one token a word or sign."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokens_are_counted_of_what_the_model_will_read(tmp_path: Path, tokenizer_file: Path) -> None:
    from tokenizers import Tokenizer

    source = write_csv(tmp_path / "a.csv", made_up(80))
    folder = prepare(config_for(tmp_path / "data", source), tokenizer_file)
    manifest, tokenizer = manifest_of(folder), Tokenizer.from_file(str(tokenizer_file))
    prompt = Prompt(**plain(TASK.prompt))
    assert manifest["tokenizer_sha256"] == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    for split, rows in read_all(folder).items():
        answers = [len(tokenizer.encode(row["output"]).ids) + 1 for row in rows]  # and the end token
        lengths = [1 + len(tokenizer.encode(prompt.wrap(row["input"])).ids) for row in rows]  # and BOS
        lengths = [length + answer for length, answer in zip(lengths, answers, strict=True)]
        assert manifest["splits"][split]["tokens"] == {
            "total": sum(lengths),
            "learned": sum(answers),
            "mean": round(sum(lengths) / len(lengths), 1),
            "max": max(lengths),
            "counted_rows": len(rows),
        }


@pytest.mark.parametrize("form", ["one turn", "dialogue"])
def test_counts_and_shown_rows_are_those_of_training(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    prompt = Prompt("Instruction:\n{instruction}\n\nResponse:\n{response}", "{slang}", "{description}")
    row: dict[str, Any] = {"input": "Say hi.", "output": "Hi, you.\nHow are you?", "row": 1}
    if form == "dialogue":
        prompt = Prompt("Q: {instruction}\nA: {response}", "{slang}", "{description}")
        texts = ["Be kind.", "Say hi.", "Hi, you.\nHow are you?", "Fine!", "Good."]
        roles = ["system", "user", "assistant", "user", "assistant"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        row = {"messages": messages, "row": 1}
    (tmp_path / "training.jsonl").write_text(json.dumps(row) + "\n")
    rows, _ = tokenize(tmp_path / "training.jsonl", tokenizer, prompt, 512, tmp_path / "cache")
    ids, spans = rows[0]["input_ids"], rows[0]["target_ranges"]

    data = DataConfig.model_construct(columns={}, module=None)
    task = Task("shown", data, {}, {}, prompt, 0)
    counted = list(SplitWriter(task, tiny_base / "tokenizer.json")._count([row]))
    assert counted == [(len(ids), sum(end - first for first, end in spans))]

    tokens = {"total": len(ids), "learned": counted[0][1], "mean": float(len(ids)), "max": len(ids), "counted_rows": 1}
    manifest = {
        "rows_in": 1,
        "rows_out": 1,
        "source": {"name": "a.csv"},
        "dropped": {},
        "merged": 0,
        "repaired": 0,
        "notes": {},
        "splits": {"training": {"rows": 1, "tokens": tokens}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    show(tmp_path, prompt, 1)
    shown = capsys.readouterr().out.partition("Example 1")[2].split("\n")[1:-3]
    learned = "".join(tokenizer.decode(ids[first:end]) for first, end in spans)
    given = "".join(
        tokenizer.decode(ids[first:end])
        for first, end in zip([0, *(end for _, end in spans)], [first for first, _ in spans], strict=False)
    )
    assert "".join(line[4:].strip() for line in shown if line.startswith("  ▌ ")) == learned.replace("\n", "")
    unmarked = [line.strip() for line in shown if not line.startswith("  ▌ ")]
    assert "".join(unmarked).replace(" ", "") == given.replace("\n", "").replace(" ", "")


# --- again ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_made_once_and_anew_when_anything_changes(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = made_up(80)
    source, data = write_csv(tmp_path / "a.csv", rows), tmp_path / "data"

    def is_made(*options: str, seed: int = 0, tokenizer: Path | None = None) -> bool:
        prepare(config_for(data, source, *options, seed=seed), tokenizer)
        return "is up to date: " not in capsys.readouterr().out

    assert is_made()
    first = digest(data)
    assert not is_made()
    assert digest(data) == first
    assert is_made("max_chars=3000") and is_made() and not is_made()
    assert is_made(seed=1) and is_made(seed=0)
    assert digest(data) == first
    assert is_made(tokenizer=tokenizer_file) and is_made()
    write_csv(source, [*rows, ["one", "more row", "", ""]])
    assert is_made() and not is_made()
    with (data / "test.jsonl").open("a") as file:
        file.write("{}\n")
    assert is_made() and not is_made()
    (data / "manifest.json").write_text("[]")
    assert is_made() and not is_made()


def test_small_tables_take_no_time(tmp_path: Path) -> None:
    config = config_for(tmp_path / "data", real("all_slangs.csv"))
    prepare(config_for(tmp_path / "warm", real("genz_slang.csv")), None)  # imports
    started = time.process_time()
    prepare(config, None)
    made = time.process_time() - started
    prepare(config, None)
    assert made < 1.5
    assert time.process_time() - started - made < 0.2


def test_long_work_shows_its_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    said = ""
    with progress.Progress("Reading a.csv", 200) as shown:
        while "Reading a.csv: 0 %\n" not in said:  # also where nothing is reported for a while
            said += capsys.readouterr().err
        shown.at(30)
        shown.advance(20)
        while not re.search(r"Reading a.csv: 25 %, \d+ s left\n", said):
            said += capsys.readouterr().err
    with progress.Progress("Loading", None):
        while "Loading: 0 s so far\n" not in said:
            said += capsys.readouterr().err
    capsys.readouterr()
    monkeypatch.setattr(progress, "PATIENCE", 60.0)
    with progress.Progress("Reading a.csv", 200) as shown:
        shown.at(199)
    assert capsys.readouterr().err == "", "nothing for what is soon done"


# --- what goes wrong ------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from core.configuration import read_config
from data_prep.prepare import prepare
from core.errors import run
def main(words):
    prepare(read_config(Path(words[0])), None)
    print(Path("/proc/self/status").read_text())
run(main)
"""


def start(config: Config, folder: Path) -> subprocess.Popen[str]:
    """`prepare` in a process of its own, as the command line runs it."""
    write_config(config, folder / "config.yaml")
    command = [sys.executable, "-c", RUN, str(folder / "config.yaml")]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


ROW = "slang,description\nW,win\n"
BAD = {
    "no such file": (None, "no such file: "),
    "a folder": ("folder", "is a folder without a file of rows"),
    "empty": (b"", "is empty"),
    "blank": (b"\xef\xbb\xbf \r\n\r\n\t\n", "is empty"),
    "header only": (b"slang,description\n", "has no row below its header"),
    "a png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is a PNG image, not a CSV, TSV, JSONL or Parquet file"),
    "an old workbook": (b"\xd0\xcf\x11\xe0" + bytes(range(256)), "an old Excel workbook (save the sheet as CSV UTF-8)"),
    "parquet": (b"PAR1" + bytes(range(256)), "is a Parquet file that cannot be read"),
    "a column twice": (b"slang,description,Slang\nW,win,L\n", "more than one column called 'slang'; rename one"),
    "noise": (random.Random(1).randbytes(5000), "looks like a binary file"),
    "nul bytes alone": (b"\x00" * 5000, "is empty"),
    "no header": (b"W,win\nL,loss\n", "If its first line is already a row, put a line of column names above it"),
    "other columns": (b"id,review\n1,good\n", "Columns found: 'id', 'review'"),
    "another table": (b"id,review\n1,good\n", "make a task for it: make new-task NAME=mine SOURCE="),
    "a column missing": (b"slang,origin\nW,x\n", "has no column for description"),
    "one endless line": (b"slang,description," * 100_000, "begins with a line of over 1,000,000 characters"),
    "one endless cell": (b"x" * 500_000, "has no column for slang or description"),
    "an open quote": (b'slang,description\nW,"win\nL,loss\n', "1 dropped: a quote that is never closed"),
    "nothing usable": (b"slang,description\n,win\nL,\n", "1 dropped: no description"),
    "too few rows": (ROW.encode(), "too few rows: 1 of"),
    "a JSON list.json": (b'[{"slang": "W"}]', "has no column for description"),
    "a cut JSON list.json": (b'[{"slang": "W", "description": "win"}, {"sla', 'line 1 is not a JSON object: {"sla'),
    "an empty JSON list.json": (b"[]", "has no rows: its JSON is empty"),
    "a JSON number.jsonl": (b'{"slang": "W", "description": "win"}\n\n7\n', "line 3 is not a JSON object: 7"),
    "cut JSON.jsonl": (b'{"slang": "W", "description": "win"}\n{"slang": "L', "line 2 is not a JSON object"),
    "endless number.jsonl": (b'{"slang": ' + b"7" * 5000 + b"}", "line 1 is not a JSON object"),
    "deep JSON.jsonl": (b"[" * 100_000, "line 1 is not a JSON object"),
}


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return prepare(config_for(folder / "data", write_csv(folder / "good.csv", made_up(60))), None)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_an_error_in_words_and_changes_nothing(good_folder: Path, tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    source = tmp_path / (name if "." in name else f"{name}.csv")
    if content == "folder":
        source.mkdir()
    elif isinstance(content, bytes):
        source.write_bytes(content)
    before = digest(good_folder)
    with pytest.raises(UserError) as error:
        prepare(config_for(good_folder, source), None)
    assert message in str(error.value)
    assert str(source) in str(error.value)
    assert len(str(error.value)) < 1000
    assert digest(good_folder) == before
    assert sorted(path.name for path in good_folder.parent.iterdir()) == [".data.lock", "data", "good.csv"]


def test_the_command_line_ends_with_2_and_no_traceback(good_folder: Path, tmp_path: Path) -> None:
    before = digest(good_folder)
    process = start(config_for(good_folder, write_csv(tmp_path / "a.csv", [["x"]], ["nothing known"])), tmp_path)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert err.startswith("error: ") and "has no column for slang or description" in err
    assert "Traceback" not in out + err
    assert digest(good_folder) == before


def test_make_data_s_command(tmp_path: Path, tokenizer_file: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tokenizer_file.rename(base / "tokenizer.json")
    (base / "config.json").write_text('{"model_type": "gemma3_text"}')
    (base / "model.safetensors").touch()
    source = write_csv(tmp_path / "a.csv", made_up(80))
    words = ["task=slang", f"task.data.source={source}", f"data_dir={tmp_path / 'data'}", f"model.path={base}"]
    command = [sys.executable, "-m", "commands.data", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "80 rows in, 80 out, from a.csv" in done.stdout
    assert done.stdout.count("    <bos>Instruction:") == done.stdout.count("  ▌ Slang: ") == 2
    assert "tokens of a row" in done.stdout and "\x1b" not in done.stdout
    again = subprocess.run([*command, "examples=1"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0 and "is up to date" in again.stdout
    assert again.stdout.count("    <bos>Instruction:") == 1, "a folder that is up to date is shown as well"


def test_no_room_to_write_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot prepare"):
        prepare(config_for(tmp_path / "file" / "data", write_csv(tmp_path / "a.csv", made_up(60))), None)


def test_a_folder_that_was_not_made_here_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    source = write_csv(tmp_path / "a.csv", made_up(60))
    with pytest.raises(UserError, match="was not made by data_prep"):
        prepare(config_for(tmp_path / "precious", source), None)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "mine"


def test_a_source_in_its_own_data_folder_is_refused(good_folder: Path) -> None:
    with pytest.raises(UserError, match="lies in"):
        prepare(config_for(good_folder, good_folder / "training.jsonl"), None)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_process_stopped_in_the_middle_leaves_the_good_folder(tmp_path: Path, how: signal.Signals) -> None:
    source = write_csv(tmp_path / "a.csv", made_up(60))
    data, partial = tmp_path / "data", tmp_path / ".data.partial"
    prepare(config_for(data, source), None)
    before = digest(data)
    big = write_csv(tmp_path / "big.csv", made_up(20_000))
    process = start(config_for(data, big), tmp_path)
    until(lambda: partial.exists() and sum(path.stat().st_size for path in partial.iterdir()) > 100_000)
    os.kill(process.pid, how)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in out + err
    assert digest(data) == before
    assert partial.exists() == (how == signal.SIGKILL)
    prepare(config_for(data, write_csv(source, made_up(70))), None)
    assert manifest_of(data)["rows_in"] == 70
    assert not partial.exists()


def test_a_kill_between_the_two_renames_is_put_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(tmp_path / "data", write_csv(tmp_path / "a.csv", made_up(60)))
    before = digest(prepare(config, None))
    (tmp_path / "data").rename(tmp_path / ".data.old")
    assert digest(prepare(config, None)) == before
    assert "is up to date" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_at_once_make_one_good_folder(tmp_path: Path) -> None:
    config = config_for(tmp_path / "data", write_csv(tmp_path / "a.csv", made_up(8000)))
    both = [start(config, tmp_path) for _ in range(2)]
    outs = [process.communicate(timeout=PATIENCE) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert sorted("is up to date" in out for out, _ in outs) == [False, True]
    assert account(manifest_of(tmp_path / "data")) == (8000, 8000)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    rows = made_up(50_000, seed=7)
    with (tmp_path / "big.csv").open("w") as file:
        file.write("slang,description,example,context\n")
        for number in range(400_000):  # 50 MB
            term, *rest = rows[number % len(rows)]
            file.write(f"{term}{number},{','.join(text[::-1] if number % 2 else text for text in rest)}\n")
    process = start(config_for(tmp_path / "data", tmp_path / "big.csv"), tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    # Not wait4's ru_maxrss: that begins at what this process, its parent, held when it started the child.
    peak = int(out.partition("VmHWM:")[2].split()[0]) / 1024
    assert peak < 600, f"{peak:.0f} MiB at the peak"
    assert account(manifest_of(tmp_path / "data")) == (400_000, 400_000)
