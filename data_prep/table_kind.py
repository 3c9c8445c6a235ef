"""What a table that nobody has described can teach: told from its headers, and from what its columns hold.

In this order: dialogues, questions and answers, terms and definitions, texts and labels, reviews, one column of text,
and, with none of these, the first column of text as what is asked and the second as the answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import UserError
from data_prep.look_at_table import Column, Look
from data_prep.read_table import plain_header
from data_prep.task import RESERVED

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
HEADLINES = ("title", "headline", "summary")
# Words of a file's name that are not the title of what its reviews are of.
NOT_A_TITLE = {*REVIEWS, *RATINGS, "ratings", "imdb", "data", "dataset", "all", "clean", "cleaned", "raw"}


@dataclass
class Kind:
    """What a table can teach, as the keys of a task.

    Attributes:
        about: in a sentence, for people.
        columns: the columns that are used, by their field.
        given: of these, the fields of the instruction.
        base: a task in task/ which this one is like in all else; "" for a task of its own.
        title: what the reviews are of, of a table of reviews.
    """

    about: str
    columns: dict[str, Column]
    key: str
    required: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    instruction: str = ""
    response: str = ""
    base: str = ""
    title: str = ""


def kind_of(look: Look, file_name: str, title: str) -> Kind:
    """Decide. `title` says that the table holds reviews, and of what.

    Raises:
        UserError: no column holds text; reviews of nobody knows what.
    """
    texts = [column for column in look.columns if column.holds in ("text", "labels")]
    dialogues = called(DIALOGUES, [column for column in look.columns if column.holds == "dialogues"])
    if not texts and not dialogues:
        seen = ", ".join(f"{column.header}: {column.holds}" for column in look.columns)
        raise UserError(f"{file_name} has no column of text that could be learned ({seen})")
    if title:
        return _reviews(look, texts, file_name, title)
    if dialogues:
        about = "Dialogues: what the model says in them is learned."
        return Kind(about, {"messages": dialogues[0]}, key="messages", base="chat")
    if pair := _two(called(QUESTIONS, texts), called(ANSWERS, texts)):
        more = [column for column in called(MORE, texts) if column not in pair][:1]
        return _pair("Questions and answers.", look, [pair[0], *more], [pair[1]])
    if pair := _two(called(TERMS, texts), called(DEFINITIONS, texts)):
        term, definition = map(field_of, pair)
        examples = [column for column in called(EXAMPLES, texts) if column not in pair][:1]
        kind = _pair("Terms and what they mean.", look, [pair[0]], [pair[1], *examples])
        kind.instruction = f'What does "{{{term}}}" mean?'
        kind.response = "\n".join([f"{{{definition}}}", *(f"Example: {{{field_of(column)}}}" for column in examples)])
        return kind
    longest = max(texts, key=lambda column: column.mean_length)
    labels = [column for column in called(LABELS, texts) if column.holds == "labels" and column is not longest]
    if labels:
        kind = _pair("Texts and their labels: to give a text its label is learned.", look, [longest], labels[:1])
        known = ", ".join(sorted(set(labels[0].filled)))
        kind.instruction = f"Which {labels[0].header.lower()} fits this text: {known}?\n{{{field_of(longest)}}}"
        return kind
    said = {"review", "reviews", "comment", "comments", "feedback", "opinion"} & set(longest.words)
    if said or (called(REVIEWS, texts) and (len(texts) == 1 or called(RATINGS, look.columns))):
        return _reviews(look, texts, file_name, title)
    if len(texts) == 1:
        kind = _pair(f"One column of text: to write another {longest.header.lower()} is learned.", look, [], texts)
        kind.instruction = f"Write a new {longest.header.lower()}."
        return kind
    first, second = texts[:2]
    return _pair(
        f"No headers that tell questions from answers: '{first.header}' is taken for what is asked, "
        f"'{second.header}' for the answer.",
        look,
        [first],
        [second],
    )


def called(wanted: Sequence[str], columns: Iterable[Column]) -> list[Column]:
    """The columns whose header is, or has among its words, one of `wanted`; the best first."""
    ranked = []
    for place, column in enumerate(columns):
        ranks = [rank for rank, word in enumerate(wanted) if word in column.words]
        if ranks:
            ranked.append((len(column.words) > 1, ranks[0], place, column))
    return [column for *_, column in sorted(ranked, key=lambda entry: entry[:3])]


def _two(first: Sequence[Column], second: Sequence[Column]) -> tuple[Column, Column] | None:
    return next(((one, other) for one in first for other in second if one is not other), None)


def _pair(about: str, look: Look, given: list[Column], learned: list[Column]) -> Kind:
    """The columns `given` make the instruction, `learned` the response; the first of each stands in every row."""
    varied = [max(columns, key=lambda column: column.different) for columns in (given, learned) if columns]
    # A row is known by what is asked, unless the same is asked again and again.
    key = varied[0] if varied[0].different >= look.rows / 2 else max(varied, key=lambda column: column.different)
    return Kind(
        about,
        {field_of(column): column for column in (*given, *learned)},
        key=field_of(key),
        required=list(dict.fromkeys(field_of(column) for column in (key, *given[:1], *learned[:1]))),
        given=[field_of(column) for column in given],
        instruction="\n".join(f"{{{field_of(column)}}}" for column in given),
        response="\n".join(f"{{{field_of(column)}}}" for column in learned),
    )


def _reviews(look: Look, texts: list[Column], file_name: str, title: str) -> Kind:
    texts = called(REVIEWS, texts) or texts
    if not texts:
        raise UserError(f'TITLE="{title}" says that {file_name} holds reviews, but no column of it holds text')
    guess = " ".join(word for word in plain_header(Path(file_name).stem).split() if word not in NOT_A_TITLE).title()
    if not title and not guess:
        raise UserError(f'{file_name} holds reviews. Say what they are of: TITLE="…"')
    about = f"Reviews of {title}." if title else f"Reviews of {guess}, as the file's name has it; or give TITLE=..."
    columns = {"review": max(texts, key=lambda column: column.mean_length)}
    others = [column for column in look.columns if column is not columns["review"]]
    for name, wanted, holds in (("rating", RATINGS, ("numbers", "labels")), ("title", HEADLINES, ("text", "labels"))):
        if found := [column for column in called(wanted, others) if column.holds in holds]:
            columns[name] = found[0]
    return Kind(about, columns, key="review", required=["review"], title=title or guess)


def field_of(column: Column) -> str:
    """The name by which templates know a column: `Sample Question` → `sample_question`."""
    name = plain_header(column.header).replace(" ", "_")
    return f"the_{name}" if name in RESERVED or name[0].isdigit() else name
