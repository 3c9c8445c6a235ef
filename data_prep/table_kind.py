"""What a table that nobody has described can teach: decided by its headers, and by what its columns hold.

In this order: multiple choice, preference pairs, translations, questions and answers, extraction to JSON, summaries
(all but the fourth in more_kinds.py), terms and definitions, texts and labels, one column of text, and, with none of
these, the first column of text as the question and the second as the answer. A task with code of its own may claim the
table instead, see data_prep/new_task.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core.errors import UserError
from core.tasks import having, part_of
from data_prep.more_kinds import Found, choices, extraction, preferences, summaries, translation
from data_prep.profile_table import Column, TableProfile, called, field_of
from data_prep.read_table import plain_header

# Headers, best first. A header is one of these, or has one among its words.
QUESTIONS = ("question", "prompt", "instruction", "query", "input", "problem", "user")
ANSWERS = ("answer", "answers", "response", "output", "completion", "reply", "solution", "assistant", "target")
SYSTEM = ("system",)
MORE = ("input", "context", "passage", "background")  # what a question may be about
TERMS = ("term", "slang", "word", "phrase", "keyword", "acronym", "abbreviation", "concept")
DEFINITIONS = ("definition", "meaning", "description", "explanation")
EXAMPLES = ("example", "examples", "usage")
LABELS = ("label", "category", "class", "intent", "topic", "genre", "tag", "sentiment", "emotion")
VALUES = ("numbers", "signs", "ids", "true or false")  # answers, too, where they are called so
RATINGS = ("rating", "stars", "score", "rate", "grade")


@dataclass
class TableKind:
    """What a model can learn from a table, as the keys of a task.

    Attributes:
        about: a sentence for people.
        columns: the columns in use, by field.
        key: the fields that tell rows apart.
        given: the fields that the instruction contains.
        cells, filters: as in `task.data`.
        base: a task in task/ whose other settings this one inherits; "" for none.
        template: the template of the YAML file; "films/new_task.yaml.j2" lies in tasks/films/.
        values: further variables for that template.
        is_guess: the headers do not tell questions from answers.
    """

    about: str
    columns: dict[str, Column]
    key: list[str]
    required: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    instruction: str = ""
    response: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    filters: dict[str, str] = field(default_factory=dict)
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
    columns = profile.columns
    is_reviews = bool(called(RATINGS, columns))
    for look in (choices, preferences):
        if found := look(columns):
            return _found(found, profile)
    languages = translation(columns)
    if languages and not called(("instruction", "question", "prompt"), texts):
        return _found(languages, profile)
    json_columns = [column for column in columns if column.holds in ("objects", "JSON")]
    others = [column for column in columns if column.holds in VALUES]
    answers = called(ANSWERS, texts) or called(ANSWERS, json_columns) or called(ANSWERS, others)
    asked = called(QUESTIONS, texts)
    is_extraction = answers and answers[0] in json_columns and not called(QUESTIONS[:3], texts)
    if not is_extraction and (pair := _two(asked, answers)):
        more = [column for column in called(MORE, texts) if column not in pair][:1]
        system = [column for column in called(SYSTEM, texts) if column not in pair][:1]
        kind = _pair("Questions and answers.", profile, [pair[0], *system, *more], [pair[1]])
        kind.instruction = "\n".join(f"{{{field_of(column)}}}" for column in (*system, pair[0], *more))
        if pair[1] in json_columns:
            kind.cells[field_of(pair[1])] = "json"
        wanted = [column for column in called(("label", "desirable"), columns) if column.holds == "true or false"][:1]
        if wanted:
            name = field_of(wanted[0])
            kind.columns[name], kind.filters[name] = wanted[0], "true"
            kind.required.append(name)
            kind.about += f" Only answers with {wanted[0].header}: true are learned."
        return kind
    if found := extraction(columns):
        return _found(found, profile)
    if not is_reviews and (found := summaries(columns)):
        return _found(found, profile)
    if pair := _two(called(TERMS, texts), called(DEFINITIONS, texts)):
        term, definition = map(field_of, pair)
        examples = [column for column in called(EXAMPLES, texts) if column not in pair][:1]
        kind = _pair("Terms and their definitions.", profile, [pair[0]], [pair[1], *examples])
        kind.instruction = f'What does "{{{term}}}" mean?'
        kind.response = "\n".join([f"{{{definition}}}", *(f"Example: {{{field_of(column)}}}" for column in examples)])
        kind.cells = {term: "line"}
        return kind
    longest = max(texts, key=lambda column: column.mean_length)
    labels = [column for column in called(LABELS, texts) if column.holds == "labels" and column is not longest]
    if not labels and len(texts) == 2:  # spam tables: v1 is ham or spam, v2 the text
        labels = [column for column in texts if column is not longest and _is_label(column, longest)]
    if labels:
        label = labels[0]
        if label.header in label.filled:
            raise UserError(
                f"the first line is a row, not the names of columns: '{label.header}' is a value of its column. Put a "
                "line of names above it, such as label,text"
            )
        kind = _pair("Texts and their labels: the model learns to label a text.", profile, [longest], labels[:1])
        known = ", ".join(sorted({" ".join(cell.split()) for cell in label.filled}))
        what = "label" if re.search(r"\d|^(column|unnamed)", label.header.lower()) else plain_header(label.header)
        kind.instruction = f"Which {what} fits this text: {known}?\n{{{field_of(longest)}}}"
        kind.cells = {field_of(label): "line"}
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


def _found(found: Found, profile: TableProfile) -> TableKind:
    kind = _pair(found.about, profile, found.given, found.learned)
    kind.instruction, kind.cells = found.instruction, found.cells
    return kind


def _is_label(column: Column, longest: Column) -> bool:
    return column.holds == "labels" and column.different > 1 and 3 * column.mean_length < longest.mean_length


def _two(first: Sequence[Column], second: Sequence[Column]) -> tuple[Column, Column] | None:
    return next(((one, other) for one in first for other in second if one is not other), None)


def _pair(about: str, profile: TableProfile, given: list[Column], learned: list[Column]) -> TableKind:
    """`given` columns form the instruction, `learned` ones the response; the first of each is required in every row."""
    # All that the prompt shows is the key of a row, unless the same is asked again and again.
    asked = len(set(zip(*(column.cells for column in given), strict=True)))
    key = given
    if not given or (asked < profile.rows / 2 and asked < max(column.different for column in learned)):
        key = [max(learned, key=lambda column: column.different)]
    needed = (key[0], *given[:1], *learned[:1])
    return TableKind(
        about,
        {field_of(column): column for column in (*given, *learned)},
        key=[field_of(column) for column in key],
        required=list(dict.fromkeys(field_of(column) for column in needed)),
        given=[field_of(column) for column in given],
        instruction="\n".join(f"{{{field_of(column)}}}" for column in given),
        response="\n".join(f"{{{field_of(column)}}}" for column in learned),
    )
