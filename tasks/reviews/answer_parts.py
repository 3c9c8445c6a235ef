"""The sentences that answers about reviews are made of: verdicts, counts and quotes, in changing words.

Quotes are in “curly quotes”, which cleaned reviews do not contain, so that each can be looked up word for word.
"""

import re
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import NamedTuple, TypeVar

from tasks.reviews.knowledge import Aspect, Knowledge
from tasks.reviews.read_reviews import Opinion

MOSTLY = 0.7  # share of reviews from which people "mostly" say something
FEW = 6  # quotes to choose from
_ENDED = re.compile(r"[.!?…][\"')\]]*$")
_FIRST = (
    "One {one} writes:",
    "In one review:",
    "As one {one} puts it:",
    "A {one} says:",
    "One review says:",
    "In the words of one {one}:",
)
_NEXT = ("Another writes:", "Another says:", "And another:", "Someone else writes:", "From another review:")

Quote = tuple[str, int]  # the words, the review
T = TypeVar("T")


class ReviewAnswer(NamedTuple):
    """An answer. `reviews`: the source rows that it counts or quotes; `quoted`: those that it quotes."""

    text: str
    reviews: list[int]
    quoted: list[int]


class AnswerParts:
    """Words parts of answers from one set of reviews, and keeps account of the reviews behind them.

    Args:
        noun: what is reviewed, such as "film" or "restaurant".
        people: who writes the reviews, such as "viewers" or "guests".
        chance: chooses wordings and quotes; the same state gives the same answers.
    """

    def __init__(self, knowledge: Knowledge, noun: str, people: str, chance: Random) -> None:
        self._knowledge, self._noun, self._chance = knowledge, noun, chance
        self._people, self._one = people, people.removesuffix("s")
        self._used: Counter[str] = Counter()
        self._begin()

    def _begin(self) -> None:
        self._behind, self._quoted = set[int](), list[int]()

    def _answer(self, *parts: str) -> ReviewAnswer:
        text = " ".join(part for part in parts if part).replace("\n ", "\n")
        answer = ReviewAnswer(text[:1].upper() + text[1:], sorted(self._behind), sorted(set(self._quoted)))
        self._begin()
        return answer

    def _verdicts(self) -> str:
        found = {name: self._count(rows) for name, rows in self._knowledge.verdicts().items()}
        total = sum(found.values())
        if not total:
            return "No review passes a clear judgement."
        good, bad = found["positive"] / total, found["negative"] / total
        numbers = (
            f"of {count_of_reviews(total)} that judge clearly, {found['positive']} "
            f"{'is' if found['positive'] == 1 else 'are'} positive, {found['mixed']} mixed and "
            f"{found['negative']} negative."
        )
        if total == 1:
            return f"There is one judgement to go by, and it is {next(name for name, count in found.items() if count)}."
        if good >= MOSTLY:
            opening = self._one_of(
                f"{self._people.capitalize()} are impressed:",
                "The response is mostly positive:",
                f"Most {self._people} come away happy:",
            )
        elif bad >= MOSTLY:
            opening = self._one_of(
                f"{self._people.capitalize()} are disappointed:",
                "The response is mostly negative:",
                f"Most {self._people} are let down:",
            )
        elif good > bad:
            opening = self._one_of(
                f"More {self._people} are pleased than not:",
                "The response leans to the positive:",
                f"{self._people.capitalize()} like the {self._noun} more often than not:",
            )
        else:
            opening = self._one_of(
                f"{self._people.capitalize()} are divided:", "The response is mixed at best:", "There is no agreement:"
            )
        return f"{opening} {numbers}"

    def _ratings(self) -> str:
        found = self._knowledge.mean_rating()
        if not found:
            return ""
        scale, rated = self._knowledge.scale, count_of_reviews(self._count(found[1]))
        return self._one_of(
            f"The average rating is {scale * found[0]:.1f} out of {scale}, over {rated}.",
            f"They give {scale * found[0]:.1f} out of {scale} on average ({rated} with a rating).",
        )

    def _talked_about(self) -> str:
        names = [aspect.name for aspect in self._knowledge.aspects[:3]]
        self._count([row for aspect in self._knowledge.aspects[:3] for row in aspect.mentions])
        if not names:
            return "They name no particular aspect."
        return self._one_of(
            f"They talk most about {with_article(names)}.",
            f"Most is said about {with_article(names)}.",
            f"The talk is mainly of {with_article(names)}.",
        )

    def _reasons(self, quotes: int = 2) -> str:
        """Why people like or dislike it, and what they say that it is about."""
        praised, criticised = self._knowledge.praised()[:4], self._knowledge.criticised()[:3]
        parts = []
        meaning = [a for a in self._knowledge.aspects if a.name in ("themes", "premise", "plot") and a.praise]
        if praised:
            first = self._one_of(*praised)
            count = count_of_reviews(self._count(first.praised_by))
            parts.append(
                self._one_of(
                    f"They are won over by the {first.name}, among other things, with {count} in favour.",
                    f"Much of the praise goes to the {first.name}: {count} in favour.",
                    f"Those who like the {self._noun} point to the {first.name} ({count}).",
                )
            )
            parts.append(self._cite(quotes_of(first.praise), quotes))
        if meaning:
            about = self._one_of(*meaning)
            parts.append(self._cite(quotes_of(about.praise), 1, f"About the {about.name}, a {self._one} says:"))
        if criticised:
            worst = self._one_of(*criticised)
            count = count_of_reviews(self._count(worst.criticised_by))
            parts.append(
                self._one_of(
                    f"Some find fault with the {worst.name} ({count} against).",
                    f"One of the objections is to the {worst.name}, with {count} against.",
                )
            )
            parts.append(self._cite(quotes_of(worst.criticism), 1))
        return " ".join(part for part in parts if part) or "The reviews give no reasons that could be counted."

    def _side(self, ranked: Sequence[Aspect], good: bool, quotes: int) -> str:
        chosen = list(ranked[: self._chance.choice((3, 4, 5))])
        if not chosen:
            return f"no aspect is {'praised' if good else 'criticised'} in these reviews."
        counts = [self._count(aspect.praised_by if good else aspect.criticised_by) for aspect in chosen]
        units = [" review" if counts[0] == 1 else " reviews", *[""] * (len(chosen) - 1)]
        named = [f"the {aspect.name} ({n}{unit})" for aspect, n, unit in zip(chosen, counts, units, strict=True)]
        opening = (
            self._one_of(f"{self._people} like", "praise goes to", "the reviews speak well of")
            if good
            else self._one_of(f"{self._people} criticise", "criticism goes to", "the reviews complain about")
        )
        parts = [f"{opening} {listing(named)}."]
        for place, aspect in enumerate(self._some(chosen, quotes)):
            pool = quotes_of(aspect.praise if good else aspect.criticism)
            lead = self._one_of(f"On the {aspect.name}:", f"About the {aspect.name} one {self._one} writes:")
            parts.append(self._cite(pool, 1, lead if place else f"Of the {aspect.name} one {self._one} says:"))
        return " ".join(part for part in parts if part)

    def _one_side(self, aspect: Aspect, good: bool) -> str:
        rows, others = (aspect.praised_by, aspect.criticised_by) if good else (aspect.criticised_by, aspect.praised_by)
        verb, side, other = ("praise", "in favour of", "against") if good else ("criticise", "against", "in favour")
        one, count = len(rows) == 1, count_of_reviews(self._count(rows))
        if not rows:
            opposite = (
                f" {count_of_reviews(self._count(others)).capitalize()} {is_or_are(others)} {other}." if others else ""
            )
            return f"No review {verb}s the {aspect.name}.{opposite}"
        opening = self._one_of(
            f"{count.capitalize()} {verb}{'s' * one} the {aspect.name}.",
            f"There {is_or_are(rows)} {count} {side} the {aspect.name}.",
        )
        return f"{opening} {self._cite(quotes_of(aspect.praise if good else aspect.criticism), 3)}".strip()

    def _numbers(self, aspect: Aspect) -> str:
        self._count(aspect.judged)
        total, good, bad = len(aspect.judged), len(aspect.favourable), len(aspect.unfavourable)
        if total in (good, bad):
            return f"all {total} reviews with an opinion are {'favourable' if good else 'unfavourable'}."
        both = f", with {count_of_reviews(len(aspect.both))} on both sides" if aspect.both else ""
        return self._one_of(
            f"of {total} reviews with an opinion, {good} {is_or_are(aspect.favourable)} favourable and {bad} "
            f"unfavourable{both}.",
            f"{good} for and {bad} against among the {total} reviews that judge{both}.",
        )

    def _both_sides(self, aspect: Aspect, good: int, bad: int) -> str:
        praise, criticism = self._cite(quotes_of(aspect.praise), good), ""
        if aspect.criticism:
            turn = self._one_of(f"Another {self._one} objects:", "Not everyone agrees:", "On the other hand:")
            criticism = self._cite(quotes_of(aspect.criticism), bad, turn if praise else "")
        return f"{praise} {criticism}".strip()

    def _cite(self, pool: Sequence[Quote], count: int, lead: str = "") -> str:
        """Up to `count` quotes, those used least so far, each of another review; "" where there is none."""
        order = sorted(pool, key=lambda quote: (self._used[quote[0]], self._chance.random()))
        cited: list[str] = []
        for words, row in order:
            if row in self._quoted or len(cited) == count:
                continue
            lead = lead or (self._one_of(*_NEXT) if cited else self._one_of(*_FIRST).format(one=self._one))
            cited.append(f"{lead} “{words}”" + "." * (not _ENDED.search(words)))
            self._used[words] += 1
            self._quoted.append(row)
            self._behind.add(row)
            lead = ""
        return " ".join(cited)

    def _count(self, rows: Sequence[int]) -> int:
        self._behind.update(rows)
        return len(rows)

    def _one_of(self, *wordings: T) -> T:
        return self._chance.choice(wordings)

    def _some(self, of: Sequence[T], count: int) -> list[T]:
        """Up to `count` of them, in their order."""
        return [of[place] for place in sorted(self._chance.sample(range(len(of)), min(count, len(of))))]


def quotes_of(opinions: Sequence[Opinion]) -> list[Quote]:
    """The more certain half of them, or all where these are few."""
    surest = opinions[: max(len(opinions) // 2, FEW)]
    return [(opinion.quote, opinion.review) for opinion in surest]


def count_of_reviews(count: int) -> str:
    return "one review" if count == 1 else f"{count} reviews"


def is_or_are(rows: Sequence[int]) -> str:
    return "is" if len(rows) == 1 else "are"


def listing(items: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1]) if part)


def with_article(names: Sequence[str]) -> str:
    return listing([f"the {name}" for name in names])
