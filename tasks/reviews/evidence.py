"""Finds the reviews behind an answer in what `make data` wrote to data/<task>: knowledge.json and the rows' metadata.

Nothing is guessed: an aspect is shown if the question, or else the answer, names it with one of the words that reviews
were read with, and quotes in the answer are looked up word for word among those of the rows and knowledge.json.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, StringConstraints

from tasks.reviews.aspect_words import AspectWords

QUOTE = re.compile(r'["“]([^"“”\n]{4,})["”]')
MOST_ASPECTS, MOST_QUOTES = 5, 3  # shown
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
router = APIRouter()
Text = Annotated[str, StringConstraints(max_length=8000)]


class ReviewIndex:
    """The reviews, by aspect and by quote.

    Args:
        folder: data/<task>, with knowledge.json and the splits.
    """

    def __init__(self, folder: Path) -> None:
        self.knowledge: dict[str, Any] = json.loads((folder / "knowledge.json").read_text(encoding="utf-8"))
        self._aspects = {aspect["name"]: aspect for aspect in self.knowledge["aspects"]}
        words = {name: aspect["words"] for name, aspect in self._aspects.items()}
        self._words = AspectWords(self.knowledge["title"], words)
        self._behind: dict[str, set[int]] = {}  # aspect → the reviews that rows about it are based on
        self._said_in: dict[str, set[int]] = {}  # words of a quote → the reviews it may be from
        for row in _rows(folder):
            if row["aspect"]:
                self._behind.setdefault(row["aspect"], set()).update(row["reviews"])
            for quote in QUOTE.findall(row["output"]):
                # A row lists the reviews of all its quotes; those common to all rows with this quote are its own.
                candidates = self._said_in.setdefault(_plain(quote), set(row["quoted"]))
                candidates &= set(row["quoted"])
        for known in self._known_quotes():
            self._said_in[_plain(known["quote"])] = {known["review"]}

    def behind(self, question: str, answer: str) -> dict[str, Any]:
        """What to show beside `answer`: aspects with counts, reviews and quotes, and the sources of its own quotes."""
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
    """Without punctuation and capitals, in which a model may differ."""
    return " ".join(WORD.findall(quote.casefold().replace("’", "'")))


def reviews_of(data: Path, task: str) -> ReviewIndex | None:
    """The reviews that `make data` prepared for `task`, reread when they change; None if they are not there."""
    file = data / task / "knowledge.json"
    try:
        return _read(file, file.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError):
        return None


@lru_cache(maxsize=8)
def _read(file: Path, made: int) -> ReviewIndex:
    return ReviewIndex(file.parent)


class EvidenceRequest(BaseModel):
    task: Annotated[str, StringConstraints(max_length=64, pattern=r"^\w+$")]
    question: Text
    answer: Text


@router.post("/api/evidence")
def evidence(asked: EvidenceRequest, request: Request) -> dict[str, Any]:
    reviews = reviews_of(request.app.state.settings.data, asked.task)
    if reviews is None:
        raise HTTPException(404, f"The reviews are not on this machine. Prepare them: make data TASK={asked.task}")
    return reviews.behind(asked.question, asked.answer)
