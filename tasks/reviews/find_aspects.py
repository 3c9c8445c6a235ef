"""Finds in reviews what they are of and which things many of them speak of.

A thing that is spoken of is a noun, and the grammar of English shows many of them without a dictionary: what stands
between "the", "our" or "their" and a word such as "was" or "of" is one, perhaps after an adjective. Those that enough
reviews name so become aspects, in their own words; singular and plural are one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from tasks.reviews.aspect_words import ANYTHING, COMMON_WORDS, AspectWords, Domain, any_of, domain_of, domains
from tasks.reviews.options import Options

FEWEST, SHARE = 3, 0.02  # a new aspect is named by so many reviews, and by this share of them
MOST, SHOWN = 12, 12  # new aspects; things that no aspect covers
LEAST = 0.1  # of the reviews show the domain

_WORD = r"[^\W\d_]+(?:['-][^\W\d_]+)*"
_DETERMINER = r"(?:the|our|my|their|its|your|his|her|these|those|no)"
_VERB = (
    r"(?:is|are|was|were|isn't|aren't|wasn't|weren't|has|have|had|does|do|did|came|comes|tastes?|tasted|looks?|looked"
    r"|feels?|felt|works?|worked|seems?|seemed|could|would|should|can|can't|will|needs?|needed|smell(?:s|ed)?|lasts?)"
)
_SUBJECT = re.compile(rf"\b{_DETERMINER}\s+(?:{_WORD}\s+)?({_WORD})\s+{_VERB}\b", re.IGNORECASE)
_NOUN = re.compile(
    rf"\b(?:{_DETERMINER}|a|an)\s+(?:{_WORD}\s+)?({_WORD})(?=\s*[,.;:!?)]|\s+(?:of|and|or|but|in|on|at|to|for|with|that|"
    rf"which|who|from|than|as|because|when|while|{_VERB})\b|\s*$)",
    re.IGNORECASE,
)

_NO_ASPECT = frozenset(yaml.safe_load(COMMON_WORDS.read_text(encoding="utf-8"))["no_aspect"])


@dataclass(frozen=True)
class Subject:
    """What reviews are of, and what they speak of.

    Attributes:
        kind: the noun for it.
        words: of its aspects: those that the task names, those of its domain and those found in the reviews.
        new: the names of the last.
        uncovered: things that no aspect covers → how many reviews name them, the most frequent first.
    """

    kind: str
    domain: Domain
    words: AspectWords
    new: list[str]
    uncovered: dict[str, int]

    @classmethod
    def of(cls, reviews: Sequence[str], about: Options) -> "Subject":
        """Args: `reviews` of any language; what is found is of English grammar."""
        found = domain_in(reviews)
        kind = about.kind.strip() or (found[1] if found else ANYTHING)
        domain = domain_of(kind)
        given = {
            **about.aspects,
            **{name: words for name, words in domain.aspects.items() if name not in about.aspects},
        }
        known, not_these = AspectWords(about.title, given), [*about.title.split(), *domain.kinds]
        left_out = [name for name, words in about.aspects.items() if not words]
        things = frequent_things(reviews, known, [*not_these, *left_out])
        new = new_aspects(things, len(reviews))
        words = AspectWords(about.title, {**given, **new})
        rest = {word: count for word, (_, count) in things.items() if word not in new}
        return cls(kind, domain, words, list(new), dict(list(rest.items())[:SHOWN]))


def domain_in(reviews: Sequence[str]) -> tuple[Domain, str] | None:
    """What the reviews are of, as domain and noun; None if that cannot be told.

    Each review counts for the domains whose nouns it uses, most of all behind "this", and whose aspects it names.
    """
    texts = [review.casefold() for review in reviews]
    nouns = {domain.name: {kind: _uses(kind, texts) for kind in domain.kinds} for domain in domains().values()}
    shared = Counter(word for domain in domains().values() for words in domain.aspects.values() for word in set(words))

    def score(domain: Domain) -> int:
        own = any_of(word for words in domain.aspects.values() for word in words if shared[word] == 1)
        return 2 * sum(nouns[domain.name].values()) + sum(bool(own.search(text)) for text in texts)

    best = max(domains().values(), key=score)  # of equals the first
    if score(best) < max(2, LEAST * len(texts)):
        return None
    return best, max(best.kinds, key=lambda kind: nouns[best.name][kind])


def _uses(kind: str, texts: Iterable[str]) -> int:
    """In how many texts the noun stands; those with "this" before it count twice."""
    alone, pointed = any_of([kind, f"{kind}s"]), any_of([f"this {kind}"])
    return sum(bool(alone.search(text)) + bool(pointed.search(text)) for text in texts if kind in text)


def frequent_things(
    reviews: Iterable[str], known: AspectWords, not_these: Iterable[str]
) -> dict[str, tuple[list[str], int]]:
    """Things that no aspect of `known` covers: word → its forms, and how many reviews name it; the most frequent first.

    Args:
        not_these: words that are no aspect either: the title, what the reviews are of.
    """
    named, as_noun, as_subject = Counter[str](), Counter[str](), Counter[str]()
    for review in reviews:
        text = known.without_title(review).casefold().replace("’", "'")
        named.update(set(re.findall(_WORD, text)))
        as_noun.update({match[1] for match in _NOUN.finditer(text)})
        as_subject.update({match[1] for match in _SUBJECT.finditer(text)})
    left_out = _NO_ASPECT | {word.casefold() for word in not_these} | {f"{word.casefold()}s" for word in not_these}
    things: dict[str, tuple[list[str], int]] = {}
    for word, count in sorted(as_noun.items(), key=lambda item: (-named[item[0]], item[0])):
        # "best" stands behind "the" as often as any noun, but seldom where a sentence goes on with a verb.
        if len(word) < 3 or word in left_out or word in known or not as_subject[word] or 3 * count < named[word]:
            continue
        forms = [form for form in _forms(word) if named[form]]
        if any(form in known or form in left_out for form in forms) or any(form in things for form in forms):
            continue
        things[max(forms, key=lambda form: named[form])] = (forms, max(named[form] for form in forms))
    return dict(sorted(things.items(), key=lambda item: (-item[1][1], item[0])))


def new_aspects(things: Mapping[str, tuple[list[str], int]], reviews: int) -> dict[str, list[str]]:
    """Those of `frequent_things` that enough of the reviews name, as aspects."""
    enough = max(FEWEST, SHARE * reviews)
    return {word: forms for word, (forms, count) in list(things.items())[:MOST] if count >= enough}


def _forms(noun: str) -> list[str]:
    """A noun with its plural, or a plural with its singular."""
    if noun.endswith("ies") and len(noun) > 4:
        return [noun, noun[:-3] + "y"]
    if noun.endswith(("ches", "shes", "sses", "xes")):
        return [noun, noun[:-2]]
    if noun.endswith("s") and not noun.endswith(("ss", "us", "is")):
        return [noun, noun[:-1]]
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return [noun, noun[:-1] + "ies"]
    return [noun, noun + ("es" if noun.endswith(("ch", "sh", "ss", "x")) else "s")]
