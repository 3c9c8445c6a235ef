"""Makes a chatbot's rows from reviews: questions in many wordings, answered with what the reviews say.

The answers of a split are based on the reviews of that split alone, and some wordings (review_questions.yaml) occur in
the test split only. So the test has reviews and questions that the model never saw. Every row names its `kind`, its
`aspect` if it is about one, the source rows that it is based on (`reviews`) and those that it quotes (`quoted`). Beside
the splits, `knowledge.json` holds everything found in all reviews, and `aspects.svg` charts it.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from core.errors import UserError
from data_prep.clean_text import key_of
from data_prep.split import seed_that_fills
from data_prep.task import Task
from tasks.reviews.aspect_chart import draw
from tasks.reviews.find_aspects import Subject
from tasks.reviews.knowledge import Aspect, Knowledge, told
from tasks.reviews.languages import names_of
from tasks.reviews.opinions import Opinions
from tasks.reviews.read_reviews import RawReview, Review, ReviewReader
from tasks.reviews.review_answers import AnswerWriter, ReviewAnswer

WORDS = 180  # in an answer at most
TRIES = 5  # at an answer that has not been given yet
# Reviews (for an aspect: opinions) needed per row of a kind, and how many rows of that kind at most.
PER_ROW, MOST = 12, 20
FEW = {"phrases": 5, "ratings": 5, "languages": 5}  # the limit for kinds with little to say
PER_ASPECT_ROW, MOST_OF_ASPECT = 3, 8
SILENT = 2  # rows about each subject that no review mentions


def make_rows(
    sources: Mapping[str, Iterable[dict[str, Any]]], task: Task, folder: Path
) -> dict[str, Iterator[dict[str, Any]]]:
    """The rows of each split from its source rows; writes `knowledge.json` and `aspects.svg` of all rows to `folder`.

    Raises:
        UserError: the title is missing, ratings are not numbers in range, or a split has no usable English review.
    """
    about = task.data.options
    if about is None or not about.title.strip():
        raise UserError('task.data.module=reviews needs to know of what: task.data.reviews={title: "My Film"}')
    found = {split: list(rows) for split, rows in sources.items()}
    ratings, scale = _read_ratings([row for rows in found.values() for row in rows], task)
    raw: dict[str, list[RawReview]] = {split: [] for split in found}
    for split, rows in found.items():
        for row in rows:
            review, headline = (" ".join(row.get(name, "").split()) for name in ("review", "title"))
            raw[split].append(RawReview(row["row"], review, ratings.get(row["row"]), headline))
    subject = Subject.of([review.text for some in raw.values() for review in some], about)
    _check(_read(raw, ReviewReader(subject.words, None)), task)  # before minutes are spent on what they say
    reviews = _read(raw, ReviewReader(subject.words, Opinions().read))
    for line in told([review for some in reviews.values() for review in some], subject):
        print(line)
    split_of = {review.row: split for split, some in reviews.items() for review in some}
    everything = Knowledge.of([review for some in reviews.values() for review in some], about.title, scale)
    known = {"title": about.title, "kind": subject.kind, **everything.as_json(split_of), "things": subject.uncovered}
    for aspect in known["aspects"]:
        aspect["words"] = subject.words.aspects[aspect["name"]]
    text = json.dumps(known, indent=2, ensure_ascii=False) + "\n"
    (folder / "knowledge.json").write_text(text, encoding="utf-8")
    draw(folder / "aspects.svg", about.title, everything.aspects)
    return {
        split: _rows(Knowledge.of(some, about.title, scale), subject, split, task) for split, some in reviews.items()
    }


def _read(raw: Mapping[str, Sequence[RawReview]], reader: ReviewReader) -> dict[str, list[Review]]:
    read = iter(reader.read([review for some in raw.values() for review in some]))
    return {split: list(islice(read, len(some))) for split, some in raw.items()}


def _check(reviews: Mapping[str, list[Review]], task: Task) -> None:
    silent = [split for split, some in reviews.items() if not any(review.sentences for review in some)]
    if not silent:
        return
    all_of_them = [review for some in reviews.values() for review in some]
    speaking = [review for review in all_of_them if review.sentences]
    seed = seed_that_fills([key_of(review.text) for review in speaking], task.split)
    languages = names_of(review.language for review in all_of_them)
    raise UserError(
        f"{task.data.source}: no review in the {' and '.join(silent)} split says something in English, in a sentence "
        f"of four words or more; {len(speaking)} of {len(all_of_them)} do in all. Languages: "
        f"{languages}.\nAdd or translate reviews, or name the column that holds them in "
        "task.data.columns.review"
        + (f", or deal these another way: task.data.split.seed={seed}" if seed is not None else "")
    )


def _read_ratings(rows: list[dict[str, Any]], task: Task) -> tuple[dict[int, float], int]:
    """Row → rating from 0 to 1, and the scale's maximum: the first of 5, 10 and 100 that no rating exceeds."""
    plain: dict[int, float] = {}
    of_best: dict[int, float] = {}
    for row in rows:
        cell = str(row.get("rating", "")).replace(",", ".")
        stars, said = cell.count("★"), re.search(r"(\d+(?:\.\d+)?)\s*(?:(?:/|out of|of)\s*(\d+)|(%))?", cell)
        if stars:
            of_best[row["row"]] = min((stars + 0.5 * cell.count("½")) / 5, 1.0)
        elif said and (best := float(said[2] or 100 * bool(said[3]))):
            of_best[row["row"]] = min(float(said[1]) / best, 1.0)
        elif said:
            plain[row["row"]] = float(said[1])
    highest = max(plain.values(), default=0.0)
    if highest > 100:
        raise UserError(
            f"{task.data.source}: column rating holds {highest:g}; ratings are out of 5, 10 or 100, or like 7/10. Name "
            f"another column in task.data.columns.rating, or none: task.data.columns.rating=[]"
        )
    scale = next(best for best in (5, 10, 100) if highest <= best)
    return of_best | {row: value / scale for row, value in plain.items()}, scale


# --- questions and answers --------------------------------------------------------------------------------------


class PlannedQuestion(NamedTuple):
    """A question to ask: its wordings in turn, how it is answered, and the names to fill into its wordings."""

    kind: str
    wordings: Iterator[str]
    answer: Callable[[], ReviewAnswer | None]
    names: dict[str, str]


def _rows(knowledge: Knowledge, subject: Subject, split: str, task: Task) -> Iterator[dict[str, Any]]:
    about = task.data.options
    chance = Random(f"{task.seed} {split}")  # a text seeds alike on every machine
    answers = AnswerWriter(knowledge, subject.kind, subject.domain.people, chance)
    filled = {"title": about.title, "noun": subject.kind, "people": subject.domain.people}
    given: set[str] = set()
    for kind, wordings, answer, names in _questions(
        knowledge, subject, answers, "test" if split == "test" else "learned"
    ):
        made = (answer() for _ in range(TRIES))
        new = (said for said in made if said and said.text not in given and 0 < len(said.text.split()) <= WORDS)
        if said := next(new, None):
            given.add(said.text)
            question = next(wordings).format(**filled, **names)
            yield {
                "input": question,
                "output": said.text,
                "kind": kind,
                "aspect": names.get("aspect", ""),
                "reviews": said.reviews,
                "quoted": said.quoted,
            }


def _questions(knowledge: Knowledge, subject: Subject, answers: AnswerWriter, part: str) -> Iterator[PlannedQuestion]:
    """Each question as often as there is evidence for another answer; `part` is a key of review_questions.yaml."""
    known = yaml.safe_load((Path(__file__).parent / "review_questions.yaml").read_text(encoding="utf-8"))
    of_the_whole = {
        "comparison": answers.comparison,
        "summary and explanation": answers.summary_and_explanation,
        "summary": answers.summary,
        "explanation": answers.explanation,
        "positive": answers.positive,
        "negative": answers.negative,
        "overall": answers.overall,
        "division": answers.division,
        "audience": answers.audience,
        "phrases": answers.phrases,
        "ratings": answers.ratings,
        "languages": answers.languages,
    }
    for kind, wordings in known["of_the_whole"].items():
        asked = cycle(wordings[part])
        for _ in range(_how_many(len(knowledge.reviews), PER_ROW, FEW.get(kind, MOST))):
            yield PlannedQuestion(kind, asked, of_the_whole[kind], {})
    of_an_aspect: dict[str, tuple[Callable[[Aspect], ReviewAnswer | None], Callable[[Aspect], int]]] = {
        "aspect": (answers.about, lambda aspect: len(aspect.judged)),
        "praise of an aspect": (answers.praise, lambda aspect: len(aspect.praise)),
        "criticism of an aspect": (answers.criticism, lambda aspect: len(aspect.criticism)),
        "citation": (answers.citation, lambda aspect: len(aspect.praise) + len(aspect.criticism)),
    }
    for kind, wordings in known["of_an_aspect"].items():
        asked, (answer, evidence) = cycle(wordings[part]), of_an_aspect[kind]
        for aspect in knowledge.aspects:
            for _ in range(_how_many(evidence(aspect), PER_ASPECT_ROW, MOST_OF_ASPECT)):
                yield PlannedQuestion(kind, asked, partial(answer, aspect), {"aspect": aspect.name})
    for kind, wordings in known["of_a_subject"].items():
        asked = cycle(wordings[part])
        subjects = known["subjects"].get(subject.domain.name, known["subjects"]["anything"])
        for thing in _not_mentioned(subjects[part], knowledge):
            for _ in range(SILENT):
                yield PlannedQuestion(kind, asked, partial(answers.silence, thing), {"subject": thing})
        for question in _not_mentioned(known["elsewhere"][part], knowledge):
            yield PlannedQuestion(kind, iter([question]), partial(answers.silence, "it"), {})


def _how_many(evidence: int, per_row: int, most: int) -> int:
    return max(1, min(evidence // per_row, most))


def _not_mentioned(words_of: Mapping[str, str], knowledge: Knowledge) -> list[str]:
    """The keys of `words_of` of which no review contains any of the words."""
    texts = "\n".join(review.text.casefold() for review in knowledge.reviews)
    return [subject for subject, words in words_of.items() if not re.search(rf"\b(?:{words})\b", texts)]
