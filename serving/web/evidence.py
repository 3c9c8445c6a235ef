"""The reviews behind an answer, from what `make data` left in data/<task>: knowledge.json and the rows' metadata.

Nothing is guessed: an aspect is shown where the question, or else the answer, names it by the words that reviews were
read with, and a quote of the answer is looked for, word for word, among those that the rows and knowledge.json hold.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, StringConstraints

from serving.web.tasks import task_config
from tasks.reviews.aspect_words import AspectWords

QUOTE = re.compile(r'["“]([^"“”\n]{4,})["”]')
MOST_ASPECTS, MOST_QUOTES = 5, 3  # shown
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
router = APIRouter()
Text = Annotated[str, StringConstraints(max_length=8000)]


class Reviews:
    """What is known of a film's reviews.

    Args:
        folder: data/<task>, with knowledge.json and the splits.
        film: `task.data.reviews` of the task: title and aspects.
    """

    def __init__(self, folder: Path, film: dict[str, Any]) -> None:
        self.knowledge: dict[str, Any] = json.loads((folder / "knowledge.json").read_text(encoding="utf-8"))
        self._words = AspectWords(film["title"], film.get("aspects") or {})
        self._aspects = {aspect["name"]: aspect for aspect in self.knowledge["aspects"]}
        self._behind: dict[str, set[int]] = {}  # aspect → the reviews that rows about it rest on
        self._said_in: dict[str, set[int]] = {}  # words of a quote → the reviews that it can be of
        for row in _rows(folder):
            if row["aspect"]:
                self._behind.setdefault(row["aspect"], set()).update(row["reviews"])
            for quote in QUOTE.findall(row["output"]):
                # A row names the reviews of all its quotes; what all rows with this one have in common is its own.
                candidates = self._said_in.setdefault(_plain(quote), set(row["quoted"]))
                candidates &= set(row["quoted"])
        for known in self._known_quotes():
            self._said_in[_plain(known["quote"])] = {known["review"]}

    def behind(self, question: str, answer: str) -> dict[str, Any]:
        """What to show beside `answer`: aspects with their counts, reviews and quotes, and its own quotes looked up."""
        asked = self._aspects_in(question)
        aspects = asked or self._aspects_in(QUOTE.sub(" ", answer))
        return {
            "reviews": self.knowledge["reviews"],
            "aspects": [self._shown(name) for name in aspects[:MOST_ASPECTS]],
            "quotes": [
                {"quote": quote, "reviews": sorted(self._said_in.get(_plain(quote), []))}
                for quote in QUOTE.findall(answer)
            ],
        }

    def _aspects_in(self, text: str) -> list[str]:
        return [name for name in dict.fromkeys(self._words.find(text)) if name in self._aspects]

    def _shown(self, name: str) -> dict[str, Any]:
        aspect = self._aspects[name]
        return {
            "name": name,
            "praised": aspect["favourable"] + aspect["both"],
            "criticised": aspect["unfavourable"] + aspect["both"],
            "mentions": aspect["mentions"],
            "praise": aspect["praise"][:MOST_QUOTES],
            "criticism": aspect["criticism"][:MOST_QUOTES],
            "reviews": sorted(self._behind.get(name, [])),
        }

    def _known_quotes(self) -> Iterator[dict[str, Any]]:
        yield from self.knowledge["representative"]
        for aspect in self.knowledge["aspects"]:
            yield from aspect["praise"]
            yield from aspect["criticism"]


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for split in ("training", "validation", "test"):
        with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _plain(quote: str) -> str:
    """Without signs and capitals: a model may set them otherwise."""
    return " ".join(WORD.findall(quote.casefold().replace("’", "'")))


def reviews_of(data: Path, task: str) -> Reviews | None:
    """What `make data` found for `task`, read anew when it was made anew; None where it has not been made."""
    file = data / task / "knowledge.json"
    try:
        return _read(file, file.stat().st_mtime_ns, task)
    except (OSError, ValueError, KeyError):
        return None


@lru_cache(maxsize=8)
def _read(file: Path, made: int, task: str) -> Reviews:
    return Reviews(file.parent, task_config(task)["data"]["reviews"])


class Asked(BaseModel):
    task: Annotated[str, StringConstraints(max_length=64, pattern=r"^\w+$")]
    question: Text
    answer: Text


@router.post("/api/evidence")
def evidence(asked: Asked, request: Request) -> dict[str, Any]:
    reviews = reviews_of(request.app.state.settings.data, asked.task)
    if reviews is None:
        raise HTTPException(404, f"The reviews are not on this machine. Prepare them: make data TASK={asked.task}")
    return reviews.behind(asked.question, asked.answer)
