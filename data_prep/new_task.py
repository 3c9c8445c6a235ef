"""A starter for a task of the user's own, from a look at the table.

    python -m data_prep.new_task films reviews.csv --title "Squid Game"
    (what `make new-task NAME=films SOURCE=reviews.csv TITLE="Squid Game"` calls)

Headers and cells say what kind of table it is: dialogues, questions and answers, terms and definitions, texts and
labels, reviews, or none of these. The result, `nemo_configs/task/films.yaml`, works as it is, and says in its comments
what may be changed; the words are in `new_task.yaml.j2`.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_prep.clean_text import key_of
from data_prep.look_at_table import ABOUT, Column, Look, look_at, show
from data_prep.read_table import plain_header
from data_prep.show_rows import plain_console
from data_prep.sources import HubTable, find_source
from data_prep.split import hash_of, ranges, seed_that_fills
from data_prep.task import RESERVED, Task
from nemo_configs import command_line
from nemo_configs.command_line import UserError, load_config, names, run

FEWEST = 10  # rows of which some can be held out
# Headers, best first. A header is one of these, or has one among its words.
DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "dialog")
QUESTIONS = ("question", "prompt", "instruction", "query", "input", "problem", "user")
ANSWERS = ("answer", "answers", "response", "output", "completion", "reply", "solution", "assistant", "target")
MORE = ("input", "context", "passage", "background")  # what a question may be about
TERMS = ("term", "slang", "word", "phrase", "keyword", "acronym", "abbreviation", "concept")
DEFINITIONS = ("definition", "meaning", "description", "explanation")
EXAMPLES = ("example", "examples", "usage")
LABELS = ("label", "category", "class", "intent", "topic", "genre", "tag", "sentiment", "emotion")
REVIEWS = ("review", "reviews", "comment", "comments", "feedback", "opinion", "text", "content", "body")
RATINGS = ("rating", "stars", "score", "rate", "grade")
# Words of a file's name that are not the title of a film.
NOT_A_TITLE = {*REVIEWS, *RATINGS, "ratings", "imdb", "data", "dataset", "all", "clean", "cleaned", "raw"}


@dataclass
class Starter:
    """What the task's file says; `base` is a task that it is like in all else, `given` the columns of the instruction."""

    about: str
    columns: list[Column]
    instruction: str = ""
    response: str = ""
    required: list[str] = field(default_factory=list)
    key: str = ""
    base: str = ""
    title: str = ""
    guessed: bool = False
    given: list[Column] = field(default_factory=list)


def new_task(name: str, source_text: str, title: str = "") -> Path:
    """Write `nemo_configs/task/<name>.yaml` for a table, and print what was seen and decided.

    Args:
        source_text: as `SOURCE`, see `sources.py`.
        title: what the reviews are of, where the table holds reviews.

    Raises:
        UserError: a name that cannot be one or is taken, a source that cannot be read or is of no use.
    """
    file = command_line.CONFIG_DIR / "task" / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name.lower() in ("null", "true", "false", "nan", "inf"):
        raise UserError(f"a task cannot be called '{name}'. Use letters, digits and _, as in NAME=films")
    if name in names("task"):
        raise UserError(f"there is a task {name} already, {file}. Give another NAME, or delete that file")
    if not source_text:
        raise UserError("which table? Give it as SOURCE=reviews.csv")
    source = find_source(source_text)
    look = look_at(source)
    console = plain_console()
    show(look, source, console)
    starter = _decide(look, source.name, title)
    if isinstance(source, HubTable):
        source_text = str(source.pinned())
    text = _write(starter, look, name, source_text)
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(file)
    try:
        Task.of(load_config([f"task={name}"]))
    except BaseException:
        file.unlink()
        raise
    console.print(f"{starter.about}\n\nWrote nemo_configs/task/{file.name}. Its comments say what may be changed. Now "
                  f"look at the rows:\n\n  make data TASK={name}", soft_wrap=True)  # fmt: skip
    return file


# --- which kind of table --------------------------------------------------------------------------------------


def _decide(look: Look, file_name: str, title: str) -> Starter:
    if look.rows < FEWEST:
        raise UserError(f"{file_name} has {look.rows} rows; at least {FEWEST} are needed, to learn from most and to "
                        "measure with the rest")  # fmt: skip
    texts = [column for column in look.columns if column.holds in ("text", "labels")]
    dialogues = _called(DIALOGUES, [column for column in look.columns if column.holds == "dialogues"])
    if not texts and not dialogues:
        seen = ", ".join(f"{column.header}: {column.holds}" for column in look.columns)
        raise UserError(f"{file_name} has no column of text that could be learned ({seen})")
    if title:
        return _reviews(look, texts, file_name, title)
    if dialogues:
        return Starter("Dialogues: what the model says in them is learned.", dialogues[:1], base="chat")
    questions, answers = _called(QUESTIONS, texts), _called(ANSWERS, texts)
    if pair := _two(questions, answers):
        more = [column for column in _called(MORE, texts) if column not in pair][:1]
        return _pair("Questions and answers.", [pair[0], *more], [pair[1]], look)
    if pair := _two(_called(TERMS, texts), _called(DEFINITIONS, texts)):
        term, definition = map(_field, pair)
        example = [column for column in _called(EXAMPLES, texts) if column not in pair][:1]
        response = "\n".join([f"{{{definition}}}", *(f"Example: {{{_field(column)}}}" for column in example)])
        starter = _pair("Terms and what they mean.", [pair[0]], [pair[1], *example], look)
        starter.instruction, starter.response = f'What does "{{{term}}}" mean?', response
        starter.required = [term, definition]
        return starter
    longest = max(texts, key=lambda column: column.mean_length)
    labels = [column for column in _called(LABELS, texts) if column.holds == "labels" and column is not longest]
    if labels:
        starter = _pair("Texts and their labels: which label a text has is learned.", [longest], labels[:1], look)
        choices = ", ".join(sorted(set(labels[0].filled)))
        starter.instruction = f"Which {labels[0].header} has this text: {choices}?\n{{{_field(longest)}}}"
        return starter
    if _called(REVIEWS, texts) and (
        len(texts) == 1 or _called(RATINGS, look.columns) or "review" in " ".join(longest.words)
    ):
        return _reviews(look, texts, file_name, title)
    if len(texts) == 1:
        starter = _pair(f"One column of text: to write another {texts[0].header} is learned.", [], texts, look)
        starter.instruction = f"Write a new {texts[0].header}."
        return starter
    about = f"No names that tell questions from answers: '{texts[0].header}' is taken for what is asked, and " \
            f"'{texts[1].header}' for the answer."  # fmt: skip
    return _pair(about, texts[:1], texts[1:2], look)


def _called(wanted: Sequence[str], columns: Iterable[Column]) -> list[Column]:
    """The columns whose header is or holds one of `wanted`, the best first."""
    ranked = []
    for place, column in enumerate(columns):
        for rank, word in enumerate(wanted):
            if word in column.words:
                ranked.append((column.words != [word], rank, place, column))
                break
    return [column for *_, column in sorted(ranked, key=lambda entry: entry[:3])]


def _two(first: Sequence[Column], second: Sequence[Column]) -> tuple[Column, Column] | None:
    return next(((one, other) for one in first for other in second if one is not other), None)


def _pair(about: str, given: list[Column], learned: list[Column], look: Look) -> Starter:
    """The columns `given` make the instruction, `learned` the response; the first of each stands in every row."""
    varied = [max(columns, key=lambda column: column.different) for columns in (given, learned) if columns]
    # A row is known by what is asked, unless the same is asked again and again.
    key = varied[0] if varied[0].different >= look.rows / 2 else max(varied, key=lambda column: column.different)
    return Starter(
        about, [*given, *learned],
        instruction="\n".join(f"{{{_field(column)}}}" for column in given),
        response="\n".join(f"{{{_field(column)}}}" for column in learned),
        required=list(dict.fromkeys(_field(column) for column in (key, *given[:1], *learned[:1]))),
        key=_field(key),
        given=given,
    )  # fmt: skip


def _reviews(look: Look, texts: list[Column], file_name: str, title: str) -> Starter:
    texts = _called(REVIEWS, texts) or texts
    if not texts:
        raise UserError(f'TITLE="{title}" says that {file_name} holds reviews, but no column has text')
    review = max(texts, key=lambda column: column.mean_length)
    ratings = [column for column in _called(RATINGS, look.columns) if column.holds == "numbers"]
    guess = " ".join(word for word in plain_header(Path(file_name).stem).split() if word not in NOT_A_TITLE).title()
    if not title and not guess:
        raise UserError(f'{file_name} holds reviews. Say what of: TITLE="…"')
    said = "" if title else ', a title guessed from the name of the file; TITLE="…" says it otherwise'
    about = f"Reviews of {title or guess}{said}."
    return Starter(about, [review, *ratings[:1]], base="squid_game", title=title or guess, guessed=not title)


# --- its file -------------------------------------------------------------------------------------------------


def _field(column: Column) -> str:
    """The name by which templates know a column: `Sample Question` → `sample_question`."""
    name = plain_header(column.header).replace(" ", "_")
    return f"the_{name}" if name in RESERVED or name[0].isdigit() else name


def _write(starter: Starter, look: Look, name: str, source: str) -> str:
    columns = [{"field": _field(column), "header": column.header} for column in starter.columns]
    if starter.base:  # that task's names of its columns
        known = ("messages",) if starter.base == "chat" else ("review", "rating")
        for column, field_name in zip(columns, known, strict=False):
            column["field"] = field_name
    unused = [
        {"field": _field(column), "header": column.header, "holds": column.holds,
         "example": _text(column.filled[0][:40]) if column.filled else "-"}
        for column in look.columns if column not in starter.columns
    ]  # fmt: skip
    numbers = [column for column in look.columns if column.holds == "numbers" and not ABOUT & set(column.words)]
    numeric = next(iter(_called(RATINGS, numbers) or numbers), None)
    key = next((column for column in starter.columns if _field(column) == starter.key), starter.columns[0])
    places = {key_of(cell): place for place, cell in reversed(list(enumerate(key.cells))) if cell}
    if len(places) < FEWEST:
        raise UserError(f"only {len(places)} different rows: of those with the same '{key.header}' one is used")
    shares = (0.1, 0.1) if len(places) >= 200 else (0.2, 0.2)
    splits = ranges(*shares)
    seed = (seed_that_fills(list(places), splits) or 0) if look.is_whole and len(places) < 1000 else 0
    first, end = splits["test"]
    held_out = next((place for text, place in places.items() if first <= hash_of(text, seed) < end), 0)
    lengths = sorted(map(len, map("".join, zip(*(column.cells for column in starter.columns), strict=True))))
    long = lengths[int(0.99 * len(lengths))]
    text_of = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    text_of.filters["text"] = _text
    tokens = long / 3 + len(starter.instruction) / 3 + 30
    context: dict[str, Any] = vars(starter) | {
        "name": name, "source": source, "shown_source": Path(source).name, "rows": f"{look.rows:,}",
        "columns": columns, "unused": unused, "shares": shares, "seed": seed,
        "fields": {_field(column): column.cells[held_out] for column in starter.given},
        "filter_field": _field(numeric) if numeric else columns[0]["field"],
        "filter_rule": ">=3" if numeric else ".*[a-z].*",
        "max_chars": 0 if starter.base or long <= 4000 else round(long + 500, -3),
        "max_length": 0 if starter.base or tokens <= 512 else min(1 << int(tokens).bit_length(), 4096),
    }  # fmt: skip
    return text_of.get_template("new_task.yaml.j2").render(context)


def _text(value: str) -> str:
    """A YAML scalar that is this text, whatever is in it: quoted where a plain word could be taken for more."""
    if re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_ ./-]*[A-Za-z0-9_]", value) and value.lower() not in _YAML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False).replace("${", "\\\\${")


_YAML_WORDS = ("yes", "no", "on", "off", "true", "false", "null", "nan", "inf")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.new_task", description=__doc__.partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("source")
    parser.add_argument("--title", default="")
    options = parser.parse_args(words)
    new_task(options.name, options.source, options.title)


if __name__ == "__main__":
    run(main)
