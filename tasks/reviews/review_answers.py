"""Writes answers about what is reviewed: counts and exact quotes from reviews in whole sentences, nothing else."""

import re

from tasks.reviews.answer_parts import (
    MOSTLY,
    AnswerParts,
    ReviewAnswer,
    count_of_reviews,
    listing,
    quotes_of,
    with_article,
)
from tasks.reviews.knowledge import Aspect

_AUDIENCE = re.compile(
    r"\bif you(?:'re| are| like| love| enjoy| want| can)\b|\b(?:fans|lovers) of\b|\bnot for\b|\brecommend"
    r"|\bfor (?:anyone|everyone|those|people|someone) (?:who|that|looking)\b",
    re.IGNORECASE,
)


class AnswerWriter(AnswerParts):
    """Words answers from one set of reviews. The same question asked again brings other quotes in other words."""

    # --- the whole ---

    def summary(self) -> ReviewAnswer:
        return self._answer(self._verdicts(), self._talked_about(), self._cite(self._knowledge.representative, 2))

    def explanation(self) -> ReviewAnswer:
        return self._answer(self._reasons())

    def summary_and_explanation(self) -> ReviewAnswer:
        return self._answer(
            "Summary:", self._verdicts(), self._talked_about(), "\n\nExplanation:", self._reasons(quotes=1)
        )

    def overall(self) -> ReviewAnswer:
        return self._answer(self._verdicts(), self._ratings(), self._cite(self._knowledge.representative, 1))

    def phrases(self) -> ReviewAnswer | None:
        found = self._some(self._knowledge.phrases, 5)
        if len(found) < 2:
            return None
        named = [f"{phrase} ({count_of_reviews(self._count(rows))})" for phrase, rows in found]
        opening = self._one_of(
            "Some phrases come back in review after review:",
            f"Several {self._people} use the same words:",
            "Certain expressions return again and again:",
        )
        return self._answer(opening, f"{listing(named)}.")

    def languages(self) -> ReviewAnswer:
        found = self._knowledge.languages()
        named = [f"{language} ({self._count(rows)})" for language, rows in found.items() if language != "unknown"]
        other = [
            (r.text, r.row)
            for r in self._knowledge.reviews
            if r.language not in ("en", "unknown") and len(r.text) < 150
        ]
        opening = self._one_of(
            "The reviews are written in", f"{self._people.capitalize()} wrote in", "I have reviews in"
        )
        unknown = self._count(found.get("unknown", []))
        left = f"Of {count_of_reviews(unknown)} the language could not be told." if unknown else ""
        return self._answer(f"{opening} {listing(named)}.", left, self._cite(other, 1))

    def ratings(self) -> ReviewAnswer | None:
        said = self._ratings()
        return self._answer(said, self._verdicts()) if said else None

    def audience(self) -> ReviewAnswer:
        praised, criticised = self._knowledge.praised()[:3], self._knowledge.criticised()[:2]
        suits = self._some([aspect.name for aspect in praised], 2)
        self._count([row for aspect in [*praised, *criticised] for row in aspect.judged])
        opening = ""
        if suits:
            opening = self._one_of(
                f"The {self._noun} suits {self._people} who care for {with_article(suits)}, which the reviews praise.",
                f"Who comes for {with_article(suits)} will be content, going by the reviews.",
                f"Going by the reviews, those who value {with_article(suits)} will like the {self._noun} best.",
            )
        mind = self._one_of(*[aspect.name for aspect in criticised]) if criticised else ""
        warning = mind and self._one_of(
            f"Those who are particular about the {mind} may be let down: that is where {self._people} complain.",
            f"Complaints are mostly about the {mind}.",
        )
        advice = [(s, r.row) for r in self._knowledge.reviews for s in r.sentences if _AUDIENCE.search(s)]
        return self._answer(opening, warning, self._cite(advice, 2))

    # --- both sides ---

    def positive(self) -> ReviewAnswer:
        return self._answer(self._side(self._knowledge.praised(), good=True, quotes=3))

    def negative(self) -> ReviewAnswer:
        return self._answer(self._side(self._knowledge.criticised(), good=False, quotes=3))

    def comparison(self) -> ReviewAnswer:
        labelled = self._chance.random() < 0.5
        return self._answer(
            "Positive aspects:" if labelled else "",
            self._side(self._knowledge.praised(), good=True, quotes=2),
            "\n\nNegative aspects:"
            if labelled
            else self._one_of("On the other side,", "Against that,", "As for the bad,"),
            self._side(self._knowledge.criticised(), good=False, quotes=2),
        )

    def division(self) -> ReviewAnswer:
        split = [
            aspect for aspect in self._knowledge.aspects if min(len(aspect.favourable), len(aspect.unfavourable)) >= 2
        ]
        split.sort(key=lambda a: -min(len(a.favourable), len(a.unfavourable)) / len(a.judged) ** 0.5)
        if not split:
            self._count([row for aspect in self._knowledge.aspects for row in aspect.judged])
            return self._answer(
                self._one_of(
                    "Nothing divides them clearly: no aspect is praised by two reviews and criticised by two.",
                    "I find no real division: there is no aspect with two reviews or more on each side.",
                )
            )
        aspect = self._one_of(*split[:4])
        opening = self._one_of(
            f"{self._people.capitalize()} part ways over the {aspect.name}:",
            f"Opinions clash about the {aspect.name}:",
            f"They disagree about the {aspect.name}:",
        )
        return self._answer(opening, self._numbers(aspect), self._both_sides(aspect, 2, 2))

    # --- one aspect ---

    def about(self, aspect: Aspect) -> ReviewAnswer | None:
        judged, good = len(aspect.judged), len(aspect.favourable)
        if not judged:
            rows = self._count(aspect.mentions)
            return self._answer(
                f"{count_of_reviews(rows).capitalize()} {'mentions' if rows == 1 else 'mention'} the {aspect.name}, "
                f"but {'it does not judge' if rows == 1 else 'none judges'} clearly."
            )
        if judged == 1:
            self._count(aspect.judged)
            kind = "favourable" if aspect.favourable else "unfavourable" if aspect.unfavourable else "of two minds"
            opening = f"Only one review gives an opinion on the {aspect.name}; it is {kind}."
            return self._answer(opening, self._both_sides(aspect, 1, 1))
        share = good / judged
        if share >= MOSTLY:
            opening = self._one_of(
                f"{self._people.capitalize()} mostly speak well of the {aspect.name}:",
                f"The {aspect.name} can count on praise:",
                f"Most who judge the {aspect.name} are pleased:",
                f"There is much praise for the {aspect.name}:",
            )
        elif len(aspect.unfavourable) / judged >= MOSTLY:
            opening = self._one_of(
                f"{self._people.capitalize()} are hard on the {aspect.name}:",
                f"The {aspect.name} disappointed most {self._people}:",
                f"There is more blame than praise for the {aspect.name}:",
            )
        else:
            opening = self._one_of(
                f"Opinions on the {aspect.name} differ:",
                f"{self._people.capitalize()} do not agree about the {aspect.name}:",
                f"Views of the {aspect.name} are mixed:",
            )
        return self._answer(
            opening, self._numbers(aspect), self._both_sides(aspect, 2 if share >= 0.4 else 1, 2 if share < 0.6 else 1)
        )

    def praise(self, aspect: Aspect) -> ReviewAnswer:
        return self._answer(self._one_side(aspect, good=True))

    def criticism(self, aspect: Aspect) -> ReviewAnswer:
        return self._answer(self._one_side(aspect, good=False))

    def citation(self, aspect: Aspect) -> ReviewAnswer | None:
        said = [*quotes_of(aspect.praise), *quotes_of(aspect.criticism)]
        cited = self._cite(said, min(2, len(said)))
        return self._answer(cited) if cited else None

    def silence(self, subject: str) -> ReviewAnswer:
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
        names = with_article(self._some([aspect.name for aspect in aspects], 3))
        instead = self._one_of(
            f"They talk about {names} instead.",
            f"What {self._people} do discuss is {names}.",
            f"You could ask about {names}.",
            f"I can tell you what they say about {names}.",
        )
        return self._answer(opening, instead)
