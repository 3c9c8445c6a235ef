"""The words by which the aspects of a film are known, for reading reviews and for finding those behind an answer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

FILM_WORDS = Path(__file__).parent / "film_words.yaml"


class AspectWords:
    """Finds the aspects that a text names: those of film_words.yaml and those of a task.

    Args:
        title: of the film, in which words name nothing: the "game" of Squid Game is none of its games.
        aspects: name → words, added to those of film_words.yaml or in their place; no words leave an aspect out.
    """

    def __init__(self, title: str, aspects: Mapping[str, Sequence[str]]) -> None:
        known = yaml.safe_load(FILM_WORDS.read_text(encoding="utf-8"))["aspects"]
        chosen: dict[str, Sequence[str]] = {**known, **aspects}
        self.names = [name for name, words in chosen.items() if words]
        # A word of the task's own is of that aspect alone.
        self._aspect_of = {word.casefold(): name for name, words in chosen.items() for word in words}
        self._aspect_of |= {word.casefold(): name for name, words in aspects.items() for word in words}
        self._words = _any_of(self._aspect_of)
        self._title = _any_of([title])

    def __contains__(self, word: str) -> bool:
        return word in self._aspect_of

    def find(self, text: str) -> list[str]:
        """The aspects that `text` names, in its order, as often as it names them."""
        return [self._aspect_of[match[0].casefold()] for match in self._words.finditer(self.without_title(text))]

    def without_title(self, text: str) -> str:
        return self._title.sub(" ", text)


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Any of `words`, whole, the longest first: "voice acting" before "acting"."""
    longest = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest))})(?![\w-])", re.IGNORECASE)
