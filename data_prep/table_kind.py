"""What a table that nobody has described can teach: decided by its headers, and by what its columns hold.

In this order: questions and answers, terms and definitions, texts and labels, one column of text, and, with none of
these, the first column of text as the question and the second as the answer. A task with code of its own may claim the
table instead, see data_prep/new_task.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core.errors import UserError
from core.tasks import having, part_of
from data_prep.profile_table import Column, TableProfile
from data_prep.read_table import plain_header
from data_prep.task import RESERVED

# Headers, best first. A header is one of these, or has one among its words.
QUESTIONS = ("question", "prompt", "instruction", "query", "input", "problem", "user")
ANSWERS = ("answer", "answers", "response", "output", "completion", "reply", "solution", "assistant", "target")
MORE = ("input", "context", "passage", "background")  # what a question may be about
TERMS = ("term", "slang", "word", "phrase", "keyword", "acronym", "abbreviation", "concept")
DEFINITIONS = ("definition", "meaning", "description", "explanation")
EXAMPLES = ("example", "examples", "usage")
LABELS = ("label", "category", "class", "intent", "topic", "genre", "tag", "sentiment", "emotion")
RATINGS = ("rating", "stars", "score", "rate", "grade")


@dataclass
class TableKind:
    """What a model can learn from a table, as the keys of a task.

    Attributes:
        about: a sentence for people.
        columns: the columns in use, by field.
        given: the fields that the instruction contains.
        base: a task in task/ whose other settings this one inherits; "" for none.
        template: the template of the YAML file; "films/new_task.yaml.j2" lies in tasks/films/.
        values: further variables for that template.
        is_guess: the headers do not tell questions from answers.
    """

    about: str
    columns: dict[str, Column]
    key: str
    required: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    instruction: str = ""
    response: str = ""
    base: str = ""
    template: str = "new_task.yaml.j2"
    values: dict[str, Any] = field(default_factory=dict)
    is_guess: bool = False


def kind_of(profile: TableProfile, file_name: str, title: str) -> TableKind:
    """What the table can teach; the first task that claims it decides, else the headers.

    Args:
        title: what the user said that the rows are about; "" if nothing.

    Raises:
        UserError: no column holds text; a title for a table that no task claims.
    """
    texts = text_columns(profile)
    if not texts and not any(column.holds == "dialogues" for column in profile.columns):
        seen = ", ".join(f"{column.header}: {column.holds}" for column in profile.columns)
        raise UserError(f"{file_name} has no column of text that could be learned ({seen})")
    general = _general_kind(profile, texts) if texts else None
    for name in having("new_task"):
        kind: TableKind | None = part_of(name, "new_task", "task").claim(profile, general, file_name, title)
        if kind:
            return kind
    if title:
        raise UserError(f'TITLE="{title}" is given, but none of the tasks here asks for a title; leave it out')
    if general is None:
        raise UserError(f"{file_name} holds dialogues, but none of the tasks here learns from dialogues")
    return general


def text_columns(profile: TableProfile) -> list[Column]:
    return [column for column in profile.columns if column.holds in ("text", "labels")]


def _general_kind(profile: TableProfile, texts: list[Column]) -> TableKind:
    if pair := _two(called(QUESTIONS, texts), called(ANSWERS, texts)):
        more = [column for column in called(MORE, texts) if column not in pair][:1]
        return _pair("Questions and answers.", profile, [pair[0], *more], [pair[1]])
    if pair := _two(called(TERMS, texts), called(DEFINITIONS, texts)):
        term, definition = map(field_of, pair)
        examples = [column for column in called(EXAMPLES, texts) if column not in pair][:1]
        kind = _pair("Terms and their definitions.", profile, [pair[0]], [pair[1], *examples])
        kind.instruction = f'What does "{{{term}}}" mean?'
        kind.response = "\n".join([f"{{{definition}}}", *(f"Example: {{{field_of(column)}}}" for column in examples)])
        return kind
    longest = max(texts, key=lambda column: column.mean_length)
    labels = [column for column in called(LABELS, texts) if column.holds == "labels" and column is not longest]
    if labels:
        kind = _pair("Texts and their labels: the model learns to label a text.", profile, [longest], labels[:1])
        known = ", ".join(sorted(set(labels[0].filled)))
        kind.instruction = f"Which {labels[0].header.lower()} fits this text: {known}?\n{{{field_of(longest)}}}"
        return kind
    if len(texts) == 1:
        kind = _pair(
            f"One column of text: the model learns to write another {longest.header.lower()}.", profile, [], texts
        )
        kind.instruction = f"Write a new {longest.header.lower()}."
        kind.is_guess = True
        return kind
    first, second = texts[:2]
    about = (
        f"The headers do not tell questions from answers: '{first.header}' is taken as the question, "
        f"'{second.header}' as the answer."
    )
    return replace(_pair(about, profile, [first], [second]), is_guess=True)


def called(wanted: Sequence[str], columns: Iterable[Column]) -> list[Column]:
    """The columns whose header is, or contains as a word, one of `wanted`; best first."""
    ranked = []
    for place, column in enumerate(columns):
        ranks = [rank for rank, word in enumerate(wanted) if word in column.words]
        if ranks:
            ranked.append((len(column.words) > 1, ranks[0], place, column))
    return [column for *_, column in sorted(ranked, key=lambda entry: entry[:3])]


def _two(first: Sequence[Column], second: Sequence[Column]) -> tuple[Column, Column] | None:
    return next(((one, other) for one in first for other in second if one is not other), None)


def _pair(about: str, profile: TableProfile, given: list[Column], learned: list[Column]) -> TableKind:
    """`given` columns form the instruction, `learned` ones the response; the first of each is required in every row."""
    varied = [max(columns, key=lambda column: column.different) for columns in (given, learned) if columns]
    # The question is the key of a row, unless the same question is asked again and again.
    key = varied[0] if varied[0].different >= profile.rows / 2 else max(varied, key=lambda column: column.different)
    return TableKind(
        about,
        {field_of(column): column for column in (*given, *learned)},
        key=field_of(key),
        required=list(dict.fromkeys(field_of(column) for column in (key, *given[:1], *learned[:1]))),
        given=[field_of(column) for column in given],
        instruction="\n".join(f"{{{field_of(column)}}}" for column in given),
        response="\n".join(f"{{{field_of(column)}}}" for column in learned),
    )


def field_of(column: Column) -> str:
    """The name of a column in templates: `Sample Question` → `sample_question`."""
    name = plain_header(column.header).replace(" ", "_")
    return f"the_{name}" if name in RESERVED or name[0].isdigit() else name
