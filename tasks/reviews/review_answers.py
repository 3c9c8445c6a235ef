"""What a chatbot answers about a film: counted facts and exact quotes of its reviews in whole sentences, nothing else.

Quotes stand in “curly marks”, which cleaned reviews do not have, so that each can be found again word for word.
"""

import re
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import NamedTuple, TypeVar

from tasks.reviews.knowledge import STRONG, Aspect, Knowledge, Opinion

MOSTLY = 0.7  # the share from which viewers "mostly" say something
_AUDIENCE = re.compile(
    r"\bif you(?:'re| are| like| love| enjoy| want| can)\b|\b(?:fans|lovers) of\b|\bnot for\b|\brecommend"
    r"|\bfor (?:anyone|everyone|those|people|someone) (?:who|that|looking)\b",
    re.IGNORECASE,
)
_ENDED = re.compile(r"[.!?…][\"')\]]*$")

Quote = tuple[str, int]  # the words, the review
T = TypeVar("T")


class Answer(NamedTuple):
    """Attributes: `reviews`, the rows of the source behind it, counted or quoted; `quoted`, those quoted."""

    text: str
    reviews: list[int]
    quoted: list[int]


class Answers:
    """Answers from one set of reviews. The same question again brings other quotes in other words.

    Args:
        noun: what the film is, such as "film" or "series".
        chance: decides wordings and quotes; the same state gives the same answers.
    """

    def __init__(self, knowledge: Knowledge, noun: str, chance: Random) -> None:
        self._knowledge, self._noun, self._chance = knowledge, noun, chance
        self._used: Counter[str] = Counter()
        self._begin()

    def _begin(self) -> None:
        self._behind, self._quoted = set[int](), list[int]()

    def _answer(self, *parts: str) -> Answer:
        text = " ".join(part for part in parts if part).replace("\n ", "\n")
        answer = Answer(text[:1].upper() + text[1:], sorted(self._behind), sorted(set(self._quoted)))
        self._begin()
        return answer

    # --- the whole ---

    def summary(self) -> Answer:
        return self._answer(self._verdicts(), self._talked_about(), self._cite(self._knowledge.representative, 2))

    def explanation(self) -> Answer:
        return self._answer(self._reasons())

    def summary_and_explanation(self) -> Answer:
        return self._answer(
            "Summary:", self._verdicts(), self._talked_about(), "\n\nExplanation:", self._reasons(quotes=1)
        )

    def overall(self) -> Answer:
        return self._answer(self._verdicts(), self._ratings(), self._cite(self._knowledge.representative, 1))

    def phrases(self) -> Answer | None:
        found = self._some(self._knowledge.phrases, 5)
        if len(found) < 2:
            return None
        named = [f"{phrase} ({_reviews(self._count(rows))})" for phrase, rows in found]
        opening = self._one_of(
            "Some phrases come back in review after review:",
            "Several viewers use the same words:",
            "Certain expressions return again and again:",
        )
        return self._answer(opening, f"{_listing(named)}.")

    def languages(self) -> Answer:
        found = self._knowledge.languages()
        named = [f"{language} ({self._count(rows)})" for language, rows in found.items() if language != "unknown"]
        other = [
            (r.text, r.row)
            for r in self._knowledge.reviews
            if r.language not in ("en", "unknown") and len(r.text) < 150
        ]
        opening = self._one_of("The reviews are written in", "Viewers wrote in", "I have reviews in")
        unknown = self._count(found.get("unknown", []))
        left = f"Of {_reviews(unknown)} the language could not be told." if unknown else ""
        return self._answer(f"{opening} {_listing(named)}.", left, self._cite(other, 1))

    def ratings(self) -> Answer | None:
        said = self._ratings()
        return self._answer(said, self._verdicts()) if said else None

    def audience(self) -> Answer:
        praised, criticised = self._knowledge.praised()[:3], self._knowledge.criticised()[:2]
        suits = self._some([aspect.name for aspect in praised], 2)
        self._count([row for aspect in [*praised, *criticised] for row in aspect.judged])
        opening = ""
        if suits:
            opening = self._one_of(
                f"The {self._noun} suits viewers who care for {_the(suits)}, which the reviews praise.",
                f"Whoever watches for the sake of {_the(suits)} is well served, going by the reviews.",
                f"Going by the reviews, those who value {_the(suits)} will like the {self._noun} best.",
            )
        mind = self._one_of(*[aspect.name for aspect in criticised]) if criticised else ""
        warning = mind and self._one_of(
            f"Those who are particular about the {mind} may be let down: that is where viewers complain.",
            f"Complaints are mostly about the {mind}.",
        )
        advice = [(s, r.row) for r in self._knowledge.reviews for s in r.sentences if _AUDIENCE.search(s)]
        return self._answer(opening, warning, self._cite(advice, 2))

    # --- both sides ---

    def positive(self) -> Answer:
        return self._answer(self._side(self._knowledge.praised(), good=True, quotes=3))

    def negative(self) -> Answer:
        return self._answer(self._side(self._knowledge.criticised(), good=False, quotes=3))

    def comparison(self) -> Answer:
        labelled = self._chance.random() < 0.5
        return self._answer(
            "Positive aspects:" if labelled else "",
            self._side(self._knowledge.praised(), good=True, quotes=2),
            "\n\nNegative aspects:"
            if labelled
            else self._one_of("On the other side,", "Against that,", "As for the bad,"),
            self._side(self._knowledge.criticised(), good=False, quotes=2),
        )

    def division(self) -> Answer:
        split = [
            aspect for aspect in self._knowledge.aspects if min(len(aspect.favourable), len(aspect.unfavourable)) >= 2
        ]
        split.sort(key=lambda a: -min(len(a.favourable), len(a.unfavourable)) / len(a.judged) ** 0.5)
        if not split:
            self._count([row for aspect in self._knowledge.aspects for row in aspect.judged])
            return self._answer(
                self._one_of(
                    "Nothing divides these viewers clearly: no aspect is praised by two reviews and criticised by two.",
                    "I find no real division: there is no aspect with two reviews or more on each side.",
                )
            )
        aspect = self._one_of(*split[:4])
        opening = self._one_of(
            f"Viewers part ways over the {aspect.name}:",
            f"Opinions clash about the {aspect.name}:",
            f"One point of disagreement is the {aspect.name}:",
        )
        return self._answer(opening, self._numbers(aspect), self._both_sides(aspect, 2, 2))

    # --- one aspect ---

    def about(self, aspect: Aspect) -> Answer | None:
        judged, good = len(aspect.judged), len(aspect.favourable)
        if not judged:
            rows = self._count(aspect.mentions)
            return self._answer(
                f"{_reviews(rows).capitalize()} {'mentions' if rows == 1 else 'mention'} the {aspect.name}, but "
                f"{'it does not judge' if rows == 1 else 'none judges'} clearly."
            )
        if judged == 1:
            self._count(aspect.judged)
            kind = "favourable" if aspect.favourable else "unfavourable" if aspect.unfavourable else "of two minds"
            opening = f"Only one review gives an opinion on the {aspect.name}; it is {kind}."
            return self._answer(opening, self._both_sides(aspect, 1, 1))
        share = good / judged
        if share >= MOSTLY:
            opening = self._one_of(
                f"Viewers mostly speak well of the {aspect.name}:",
                f"The {aspect.name} can count on praise:",
                f"Most who judge the {aspect.name} are pleased:",
                f"There is much praise for the {aspect.name}:",
            )
        elif len(aspect.unfavourable) / judged >= MOSTLY:
            opening = self._one_of(
                f"Viewers are hard on the {aspect.name}:",
                f"The {aspect.name} disappointed most viewers:",
                f"There is more blame than praise for the {aspect.name}:",
            )
        else:
            opening = self._one_of(
                f"Opinions on the {aspect.name} differ:",
                f"Viewers do not agree about the {aspect.name}:",
                f"The picture of the {aspect.name} is mixed:",
            )
        return self._answer(
            opening, self._numbers(aspect), self._both_sides(aspect, 2 if share >= 0.4 else 1, 2 if share < 0.6 else 1)
        )

    def praise(self, aspect: Aspect) -> Answer:
        return self._answer(self._one_side(aspect, good=True))

    def criticism(self, aspect: Aspect) -> Answer:
        return self._answer(self._one_side(aspect, good=False))

    def citation(self, aspect: Aspect) -> Answer | None:
        said = _strong([*aspect.praise, *aspect.criticism])
        cited = self._cite(said, min(2, len(said)))
        return self._answer(cited) if cited else None

    def silence(self, subject: str) -> Answer:
        """For a `subject` that no review mentions."""
        aspects, searched = self._knowledge.aspects[:4], len(self._knowledge.reviews)
        self._count([row for aspect in aspects for row in aspect.mentions])
        opening = self._one_of(
            f"The reviews do not say: none of the {searched} mentions {subject}.",
            f"I cannot tell from the reviews; not one of the {searched} speaks of {subject}.",
            f"That is not covered. None of the {searched} reviews says anything about {subject}.",
            f"I have no review that mentions {subject}, among {searched} in all, so I would be guessing.",
        )
        if not aspects:
            return self._answer(opening)
        names = _the(self._some([aspect.name for aspect in aspects], 3))
        instead = self._one_of(
            f"They talk about {names} instead.",
            f"What viewers do discuss is {names}.",
            f"You could ask about {names}.",
            f"I can tell you what they say about {names}.",
        )
        return self._answer(opening, instead)

    # --- parts of an answer ---

    def _verdicts(self) -> str:
        found = {name: self._count(rows) for name, rows in self._knowledge.verdicts().items()}
        total = sum(found.values())
        if not total:
            return "No review passes a clear judgement."
        good, bad = found["positive"] / total, found["negative"] / total
        numbers = (
            f"of {_reviews(total)} that judge, {found['positive']} {'is' if found['positive'] == 1 else 'are'} "
            f"positive, {found['mixed']} mixed and {found['negative']} negative."
        )
        if total == 1:
            return f"There is one judgement to go by, and it is {next(name for name, count in found.items() if count)}."
        if good >= MOSTLY:
            opening = self._one_of(
                "Viewers are impressed:", "The response is mostly positive:", "Most viewers come away happy:"
            )
        elif bad >= MOSTLY:
            opening = self._one_of(
                "Viewers are disappointed:", "The response is mostly negative:", "Most viewers are let down:"
            )
        elif good > bad:
            opening = self._one_of(
                "More viewers are pleased than not:",
                "The response leans to the positive:",
                f"Viewers like the {self._noun} more often than not:",
            )
        else:
            opening = self._one_of("Viewers are divided:", "The response is mixed at best:", "There is no agreement:")
        return f"{opening} {numbers}"

    def _ratings(self) -> str:
        found = self._knowledge.mean_rating()
        if not found:
            return ""
        scale, rated = self._knowledge.scale, _reviews(self._count(found[1]))
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
            f"They talk most about {_the(names)}.",
            f"Most is said about {_the(names)}.",
            f"The talk is mainly of {_the(names)}.",
        )

    def _reasons(self, quotes: int = 2) -> str:
        """Why viewers like or dislike it, and what they say that it is about."""
        praised, criticised = self._knowledge.praised()[:4], self._knowledge.criticised()[:3]
        parts = []
        meaning = [a for a in self._knowledge.aspects if a.name in ("themes", "premise", "plot") and a.praise]
        if praised:
            first = self._one_of(*praised)
            count = _reviews(self._count(first.praised_by))
            parts.append(
                self._one_of(
                    f"What wins viewers over is, among other things, the {first.name}, with {count} in favour.",
                    f"Much of the praise goes to the {first.name}: {count} in favour.",
                    f"Those who like the {self._noun} point to the {first.name} ({count}).",
                )
            )
            parts.append(self._cite(_strong(first.praise), quotes))
        if meaning:
            about = self._one_of(*meaning)
            parts.append(self._cite(_strong(about.praise), 1, f"About the {about.name}, a viewer says:"))
        if criticised:
            worst = self._one_of(*criticised)
            count = _reviews(self._count(worst.criticised_by))
            parts.append(
                self._one_of(
                    f"What spoils it for some is the {worst.name} ({count} against).",
                    f"Among the objections is the {worst.name}, with {count} against.",
                )
            )
            parts.append(self._cite(_strong(worst.criticism), 1))
        return " ".join(part for part in parts if part) or "The reviews give no reasons that could be counted."

    def _side(self, ranked: Sequence[Aspect], good: bool, quotes: int) -> str:
        chosen = list(ranked[: self._chance.choice((3, 4, 5))])
        if not chosen:
            return f"no aspect is {'praised' if good else 'criticised'} in these reviews."
        counts = [self._count(aspect.praised_by if good else aspect.criticised_by) for aspect in chosen]
        units = [" review" if counts[0] == 1 else " reviews", *[""] * (len(chosen) - 1)]
        named = [f"the {aspect.name} ({n}{unit})" for aspect, n, unit in zip(chosen, counts, units, strict=True)]
        opening = (
            self._one_of("viewers like", "praise goes to", "the reviews speak well of")
            if good
            else self._one_of("viewers criticise", "criticism goes to", "the reviews complain about")
        )
        parts = [f"{opening} {_listing(named)}."]
        for place, aspect in enumerate(self._some(chosen, quotes)):
            pool = _strong(aspect.praise if good else aspect.criticism)
            lead = self._one_of(f"On the {aspect.name}:", f"About the {aspect.name} one viewer writes:")
            parts.append(self._cite(pool, 1, lead if place else f"Of the {aspect.name} one viewer says:"))
        return " ".join(part for part in parts if part)

    def _one_side(self, aspect: Aspect, good: bool) -> str:
        rows, others = (aspect.praised_by, aspect.criticised_by) if good else (aspect.criticised_by, aspect.praised_by)
        verb, side, other = ("praise", "in favour of", "against") if good else ("criticise", "against", "in favour")
        one, count = len(rows) == 1, _reviews(self._count(rows))
        if not rows:
            opposite = f" {_reviews(self._count(others)).capitalize()} {_is(others)} {other}." if others else ""
            return f"No review {verb}s the {aspect.name}.{opposite}"
        opening = self._one_of(
            f"{count.capitalize()} {verb}{'s' * one} the {aspect.name}.",
            f"There {_is(rows)} {count} {side} the {aspect.name}.",
        )
        return f"{opening} {self._cite(_strong(aspect.praise if good else aspect.criticism), 3)}".strip()

    def _numbers(self, aspect: Aspect) -> str:
        self._count(aspect.judged)
        total, good, bad = len(aspect.judged), len(aspect.favourable), len(aspect.unfavourable)
        if total in (good, bad):
            return f"all {total} reviews with an opinion are {'favourable' if good else 'unfavourable'}."
        both = f", with {_reviews(len(aspect.both))} on both sides" if aspect.both else ""
        return self._one_of(
            f"of {total} reviews with an opinion, {good} {_is(aspect.favourable)} favourable and {bad} unfavourable"
            f"{both}.",
            f"{good} for and {bad} against among the {total} reviews that judge{both}.",
        )

    def _both_sides(self, aspect: Aspect, good: int, bad: int) -> str:
        praise, criticism = self._cite(_strong(aspect.praise), good), ""
        if aspect.criticism:
            turn = self._one_of("Another viewer objects:", "Not everyone agrees:", "On the other hand:")
            criticism = self._cite(_strong(aspect.criticism), bad, turn if praise else "")
        return f"{praise} {criticism}".strip()

    def _cite(self, pool: Sequence[Quote], count: int, lead: str = "") -> str:
        """Up to `count` quotes, those used least so far, each of another review; "" where there is none."""
        order = sorted(pool, key=lambda quote: (self._used[quote[0]], self._chance.random()))
        cited: list[str] = []
        for words, row in order:
            if row in self._quoted or len(cited) == count:
                continue
            lead = lead or (self._one_of(*_NEXT) if cited else self._one_of(*_FIRST))
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


_FIRST = (
    "One viewer writes:",
    "In one review:",
    "As one viewer puts it:",
    "A viewer says:",
    "One review says:",
    "In the words of one viewer:",
)
_NEXT = ("Another writes:", "Another says:", "And another:", "Someone else writes:", "From another review:")


def _strong(opinions: Sequence[Opinion]) -> list[Quote]:
    """The quotes of those opinions that leave no doubt, or of all where these are few."""
    strong = [opinion for opinion in opinions if abs(opinion.score) >= STRONG]
    return [(opinion.quote, opinion.review) for opinion in (strong if len(strong) >= 3 else opinions)]


def _reviews(count: int) -> str:
    return "one review" if count == 1 else f"{count} reviews"


def _is(rows: Sequence[int]) -> str:
    return "is" if len(rows) == 1 else "are"


def _listing(items: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1]) if part)


def _the(names: Sequence[str]) -> str:
    return _listing([f"the {name}" for name in names])
