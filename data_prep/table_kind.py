"""What a table that nobody has described can teach: decided by its headers, and by what its columns hold.

In this order: multiple choice, preference pairs, translations, questions and answers, extraction to JSON, summaries
(all but the fourth in more_kinds.py), terms and definitions, texts and labels, surveys, one column of text, and, with
none of these, two columns of text as question and answer; of more, the user says which. A task with code of its own may
claim the table instead, see data_prep/new_task.py.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import UserError
from core.tasks import having, part_of
from data_prep.find_header import are_questions
from data_prep.more_kinds import Found, choices, extraction, preferences, summaries, translation
from data_prep.profile_table import FEW, Column, TableProfile, called, field_of
from data_prep.read_table import plain_header

# Headers, best first. A header is one of these, or has one among its words.
QUESTIONS = ("question", "prompt", "instruction", "query", "input", "problem", "user")
ANSWERS = ("answer", "answers", "response", "output", "completion", "reply", "solution", "assistant", "target")
SYSTEM = ("system",)
MORE = ("input", "context", "passage", "background")  # what a question may be about
TERMS = ("term", "slang", "word", "phrase", "keyword", "acronym", "abbreviation", "concept")
DEFINITIONS = ("definition", "meaning", "description", "explanation")
EXAMPLES = ("example", "examples", "usage")
NOUNS = ("label", "category", "class", "intent", "topic", "genre", "tag", "sentiment", "emotion", "stance", "polarity")
LABELS = (*NOUNS, "labels", "target", "spam", "toxic", "y")
NAMES, DESCRIPTIONS = ("product", "item", "name"), ("description", "details", "about", "bio", "summary")
VALUES = ("numbers", "signs", "ids", "dates", "true or false")  # answers, too, where they are called so
CLASSES = ("labels", "text", "numbers", "signs", "true or false")  # what a column of labels can hold
MOST_CLASSES, LISTED = 200, 30  # labels at most, and labels that the instruction lists
# Who or where a row is from: never what is asked or answered where the headers do not say so.
PEOPLE = {
    *("name", "author", "user", "username", "customer", "agent", "reviewer", "respondent", "company", "gender"),
    *("city", "country", "state", "location", "region", "language", "lang", "source", "version", "device", "browser"),
}
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
        why: what decided, for people; "" where the headers did.
        unclear: why this cannot be a task before the user has said more; "" where it can.
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
    why: str = ""
    unclear: str = ""


def kind_of(profile: TableProfile, file_name: str, title: str, asked: str = "", answer: str = "") -> TableKind:
    """What the table can teach: what the user says, else what the first task that claims it does, else the headers.

    Args:
        title: what the user said that the rows are about; "" if nothing.
        asked, answer: the headers of the columns that are asked and answered; "" where the user did not say.

    Raises:
        UserError: no column holds text; a title for a table that no task claims; it is not clear what is asked.
    """
    if asked or answer:
        return _as_said(profile, asked, answer)
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
    if general.unclear:
        raise UserError(general.unclear)
    return general


def _as_said(profile: TableProfile, asked: str, answer: str) -> TableKind:
    """Raises UserError: only one column is named, or there is none of a name."""
    if not asked or not answer or plain_header(asked) == plain_header(answer):
        raise UserError("name two columns: ASKED=..., which the model is given, and ANSWER=..., which it learns")
    named = []
    for header in (asked, answer):
        found = [column for column in profile.columns if plain_header(column.header) == plain_header(header)]
        if not found:
            known = ", ".join(f"'{column.header}'" for column in profile.columns)
            raise UserError(f"there is no column '{header}'. The columns are {known}")
        named += found[:1]
    kind = _pair(f"'{named[0].header}' is asked, and '{named[1].header}' answered.", profile, named[:1], named[1:])
    kind.why = "you said so, with ASKED and ANSWER"
    return kind


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
    if labelled := _labels(profile, texts):
        return labelled
    if pair := _two(called(NAMES, texts), called(DESCRIPTIONS, texts)):
        kind = _pair("Names and descriptions.", profile, [pair[0]], [pair[1]])
        kind.instruction = f"Describe {{{field_of(pair[0])}}}."
        return kind
    free = [column for column in texts if column.holds == "text" and not set(column.words) <= PEOPLE] or texts
    if survey := _survey(profile, free):
        return survey
    if len(free) == 1:
        return _corpus(profile, free[0])
    first, second = sorted(free[:2], key=lambda column: not are_questions(column.filled))
    kind = _pair(f"'{first.header}' is asked, and '{second.header}' answered.", profile, [first], [second])
    seen = "the first holds questions" if are_questions(first.filled) else "in this order"
    kind.is_guess, kind.why = True, f"they are the two columns of text, {seen}; the headers do not say more"
    if profile.form.startswith(("CSV", "TSV")) and not re.fullmatch(r"column \d+", first.header):
        kind.why += ". If the first line is a row, not headers, put a line of names above it"
    if len(free) > 2:
        named = ", ".join(f"'{column.header}'" for column in free)
        kind.unclear = (
            f"the headers do not say what is asked and what is answered: {named} all hold text. Say it: "
            f"ASKED='{first.header}' ANSWER='{second.header}'"
        )
    return kind


def _labels(profile: TableProfile, texts: list[Column]) -> TableKind | None:
    """A text with its label: of a column that is called so, or beside the text the only column with few values."""
    longest = max(texts, key=lambda column: column.mean_length)
    others = [column for column in profile.columns if column is not longest and _has_classes(column)]
    labels = called(LABELS, others)
    words = [column for column in labels if column.holds in ("labels", "text")]
    by_header = bool(labels)
    if not labels and longest.holds == "text" and not called(RATINGS, profile.columns):
        told = {id(column) for column in (*others, *texts)}
        few = [column for column in others if column.holds != "numbers" or column.different <= 10]  # not an age
        labels = [column for column in few if len(told) == 2 and 3 * column.mean_length < longest.mean_length]
    if not labels:
        return None
    label = (words or labels)[0]  # "food" says more than 2
    kind = _pair("Texts and their labels: the model learns to label a text.", profile, [longest], [label])
    counts = Counter(" ".join(cell.split()) for cell in label.filled)
    header = plain_header(label.header)
    is_noun = label.words[-1] in NOUNS
    what = header if is_noun else "label" if re.search(r"\d|^column|^unnamed|^y$", header) else f'label for "{header}"'
    listed = f": {', '.join(sorted(counts))}" if len(counts) <= LISTED else ""
    kind.instruction = f"Which {what} fits this text{listed}?\n{{{field_of(longest)}}}"
    kind.cells = {field_of(label): "line"}
    kind.values = {"is_labels": True}
    shares = ", ".join(f"{text} {count / len(label.filled):.0%}" for text, count in counts.most_common(6))
    more = f" and {len(counts) - 6} more" if len(counts) > 6 else ""
    said = "is called so" if by_header else "is the only other column, with few values"
    kind.why = f"'{label.header}' {said}: {len(counts)} labels, {shares}{more}"
    return kind


def _has_classes(column: Column) -> bool:
    """Whether few values occur again and again in the column, each short; numbers are whole."""
    if column.holds not in CLASSES or not 1 < column.different <= min(MOST_CLASSES, max(2, len(column.filled) / 3)):
        return False
    if column.holds == "numbers":
        return column.different <= FEW and all(re.fullmatch(r"-?\d{1,2}(\.0)?", cell) for cell in column.filled)
    return column.mean_length <= 40


def _survey(profile: TableProfile, free: list[Column]) -> TableKind | None:
    """Answers to a survey, one respondent a row: what they chose is given, what they wrote is learned."""
    questions = [column for column in profile.columns if "?" in column.header or len(column.words) > 4]
    written = [column for column in free if column in questions]
    chosen = [
        column for column in profile.columns if column not in free and _has_classes(column) and column.holds != "text"
    ][:8]
    if len(questions) < 2 or not written or not chosen:
        return None
    about = "A survey: the model learns to answer its open questions as somebody who chose so."
    kind = _pair(about, profile, chosen, written)
    kind.key = [field_of(max(written, key=lambda column: column.different))]
    kind.required = kind.key
    lines = [f"{column.header}{':' * column.header[-1].isalnum()} {{{field_of(column)}}}" for column in chosen]
    kind.instruction = "\n".join([*lines, *(column.header for column in written)])
    if len(written) > 1:
        kind.response = "\n".join(f"{column.header} {{{field_of(column)}}}" for column in written)
    said = f"{len(written)} with answers in free text, {len(chosen)} with few different ones"
    kind.why = f"the headers are questions: {said}"
    return kind


def _corpus(profile: TableProfile, text: Column) -> TableKind:
    """A column of text and nothing that is asked; tasks/text learns it as it is, and tasks/reviews may know more."""
    kind = _pair(f"'{text.header}' is learned.", profile, [], [text])
    kind.is_guess = True
    kind.unclear = (
        f"'{text.header}' is the only column of text that could be learned, and no column says what is asked: it is a "
        "corpus, not questions with answers. Add a column of questions or of labels"
    )
    return kind


def _found(found: Found, profile: TableProfile) -> TableKind:
    kind = _pair(found.about, profile, found.given, found.learned)
    kind.instruction, kind.cells = found.instruction, found.cells
    return kind


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
