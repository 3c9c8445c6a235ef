"""The words that name the aspects of what is reviewed, used to read reviews and to find those behind an answer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

DOMAINS, COMMON_WORDS = (Path(__file__).parent / name for name in ("domains.yaml", "common_words.yaml"))
ANYTHING = "product"  # the domain of what is in no other


@dataclass(frozen=True)
class Domain:
    """What reviews may be of: see domains.yaml."""

    name: str
    kinds: tuple[str, ...]
    people: str
    aspects: Mapping[str, Sequence[str]]


@cache
def domains() -> dict[str, Domain]:
    known = yaml.safe_load(DOMAINS.read_text(encoding="utf-8"))
    return {name: Domain(name, tuple(of["kinds"]), of["people"], of["aspects"]) for name, of in known.items()}


def domain_of(kind: str) -> Domain:
    """The domain of a noun such as "series"; that of products for a noun that no domain lists."""
    word = kind.casefold().split()[-1:] or [""]
    return next((domain for domain in domains().values() if word[0] in domain.kinds), domains()[ANYTHING])


class AspectWords:
    """Finds the aspects that a text names.

    Args:
        title: of what is reviewed; words in it name no aspect: the "game" in Squid Game is not one of its games.
        aspects: name → words, an earlier name before a later one; an empty list leaves an aspect out.
    """

    def __init__(self, title: str, aspects: Mapping[str, Sequence[str]]) -> None:
        self.aspects = {name: list(words) for name, words in aspects.items() if words}
        self.names = list(self.aspects)
        self._aspect_of: dict[str, str] = {}
        for name, words in self.aspects.items():
            for word in words:
                self._aspect_of.setdefault(word.casefold(), name)
        self._words = any_of(self._aspect_of)
        self._title = any_of([title])

    def __contains__(self, word: str) -> bool:
        return word in self._aspect_of

    def find(self, text: str) -> list[str]:
        """The aspects that `text` names, in order of occurrence and with repetitions."""
        return [self._aspect_of[match[0].casefold()] for match in self._words.finditer(self.without_title(text))]

    def without_title(self, text: str) -> str:
        return self._title.sub(" ", text)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of `words` as whole words, the longest first: "voice acting" before "acting"."""
    longest = sorted(filter(None, words), key=lambda word: (-len(word), word))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest)) or '(?!)'})(?![\w-])", re.IGNORECASE)
