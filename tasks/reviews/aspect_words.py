"""The words that name the aspects of a film, used to read reviews and to find those behind an answer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

FILM_WORDS = Path(__file__).parent / "film_words.yaml"


class AspectWords:
    """Finds the aspects that a text names: those of film_words.yaml and those of a task.

    Args:
        title: of the film; words in it name no aspect: the "game" in Squid Game is not one of its games.
        aspects: name → words, which add to or replace those of film_words.yaml; an empty list removes an aspect.
    """

    def __init__(self, title: str, aspects: Mapping[str, Sequence[str]]) -> None:
        known = yaml.safe_load(FILM_WORDS.read_text(encoding="utf-8"))["aspects"]
        chosen: dict[str, Sequence[str]] = {**known, **aspects}
        self.names = [name for name, words in chosen.items() if words]
        # A word that the task assigns belongs to that aspect alone.
        self._aspect_of = {word.casefold(): name for name, words in chosen.items() for word in words}
        self._aspect_of |= {word.casefold(): name for name, words in aspects.items() for word in words}
        self._words = _any_of(self._aspect_of)
        self._title = _any_of([title])

    def __contains__(self, word: str) -> bool:
        return word in self._aspect_of

    def find(self, text: str) -> list[str]:
        """The aspects that `text` names, in order of occurrence and with repetitions."""
        return [self._aspect_of[match[0].casefold()] for match in self._words.finditer(self.without_title(text))]

    def without_title(self, text: str) -> str:
        return self._title.sub(" ", text)


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of `words` as whole words, the longest first: "voice acting" before "acting"."""
    longest = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest))})(?![\w-])", re.IGNORECASE)
