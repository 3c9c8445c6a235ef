"""From reviews of a film to the rows of a chatbot: questions in many wordings, answered from what the reviews say.

Each split's answers are made from the reviews of that split alone, and some wordings are asked in the test alone. So a
test answer rests on reviews, and answers a question, that the model never saw. Every row names its `kind`, its `aspect`
where it is about one, the source rows behind it (`reviews`) and those of them that it quotes (`quoted`). Beside the
splits stand `knowledge.json`, all that was found in all reviews, and `aspects.svg`, its picture.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from data_prep.aspect_chart import draw
from data_prep.knowledge import Knowledge, Reader, Review, languages_of
from data_prep.progress import Progress
from data_prep.review_answers import Answer, Answers
from data_prep.task import Task
from nemo_configs.command_line import UserError

WORDS = 180  # of an answer at most
TRIES = 5  # for an answer that was not given yet
# Reviews (or opinions, for questions about one aspect) for each row of a kind, and rows of it at most.
PER_ROW, MOST = 25, 20
PER_ASPECT_ROW, MOST_OF_ASPECT = 4, 8
SILENT = 2  # rows about each subject that no review mentions

# Kind of question → wordings, and wordings asked in the test alone. The first of `summary and explanation` and of
# `comparison` there are the two tasks of the first review chatbot (Gemma 2b-it), word for word.
OF_THE_WHOLE: dict[str, tuple[list[str], list[str]]] = {
    "comparison": (
        ["Compare the positive and negative aspects of {title}.", "What are the pros and cons of {title}?",
         "What do viewers like and dislike about {title}?", "Weigh the good against the bad in {title}.",
         "Strengths and weaknesses of the {noun}, according to reviews?", "Positive and negative sides of {title}"],
        ["Positive and negative aspects comparison", "Set praise and criticism of {title} side by side."],
    ),
    "summary and explanation": (
        ["Summarize {title} and explain it.", "Give me a summary of the reviews of {title} and explain the verdict.",
         "Sum up what viewers say about {title}, with an explanation.", "Summarize and explain the {noun}."],
        ["Summarize and explain {title}", "Give a summary and an explanation of {title}."],
    ),
    "summary": (
        ["Summarize the reviews of {title}.", "Sum up what people write about {title}.", "What do the reviews say, in short?",
         "Give me the gist of the reviews.", "TL;DR of the {title} reviews?"],
        ["Summarize what viewers think of {title}.", "In a few sentences, what do reviewers say?"],
    ),
    "explanation": (
        ["Explain why viewers rate {title} as they do.", "What explains the reactions to {title}?",
         "Why do people like or dislike the {noun}?", "Explain {title} through its reviews."],
        ["Explain the verdict on {title}.", "Why is {title} received the way it is?"],
    ),
    "positive": (
        ["What are the positive aspects of {title}?", "What do viewers praise?", "What is good about {title}?",
         "List what people like about the {noun}.", "Which strengths do the reviews name?"],
        ["Name the positive sides of {title}.", "What do fans of {title} point to?"],
    ),
    "negative": (
        ["What are the negative aspects of {title}?", "What do viewers criticise?", "What is bad about {title}?",
         "List what people dislike about the {noun}.", "Which weaknesses do the reviews name?"],
        ["Name the negative sides of {title}.", "What do the critics of {title} complain about?"],
    ),
    "overall": (
        ["How do viewers feel about {title} overall?", "Is {title} well received?", "Do people like {title}?",
         "What is the general opinion of the {noun}?"],
        ["What is the mood among viewers of {title}?", "Overall, good or bad?"],
    ),
    "division": (
        ["What divides viewers of {title}?", "What do reviewers disagree about?", "Which aspect is the most controversial?",
         "Where do opinions on {title} differ most?"],
        ["What do people argue about after watching {title}?", "On what are the reviews split?"],
    ),
    "audience": (
        ["Who would like {title}?", "Should I watch {title}?", "Whom do reviewers recommend the {noun} to?",
         "Is {title} something for me?", "Who should stay away from {title}?"],
        ["What kind of viewer enjoys {title}?", "Would you recommend {title}?"],
    ),
    "phrases": (
        ["Which phrases come up again and again?", "What do many reviewers mention in the same words?"],
        ["Which expressions return in the reviews?"],
    ),
    "ratings": (
        ["How is {title} rated?", "What rating does {title} get on average?", "How many stars do viewers give?"],
        ["What score does the {noun} have?"],
    ),
    "languages": (
        ["In which languages are the reviews?", "Are there reviews that are not in English?"],
        ["What languages do reviewers of {title} write in?"],
    ),
}  # fmt: skip
OF_AN_ASPECT: dict[str, tuple[list[str], list[str]]] = {
    "aspect": (
        ["What do viewers say about the {aspect}?", "How is the {aspect} in {title}?", "Tell me about the {aspect}.",
         "What did people think of the {aspect}?", "Opinions on the {aspect}?", "Do viewers like the {aspect} of {title}?"],
        ["What is the verdict on the {aspect}?", "How do reviewers judge the {aspect} of {title}?"],
    ),
    "praise of an aspect": (
        ["What do viewers like about the {aspect}?", "What is praised about the {aspect}?", "Say something good about the {aspect}.",
         "Who speaks well of the {aspect}, and how?"],
        ["What is good about the {aspect} of {title}?"],
    ),
    "criticism of an aspect": (
        ["What do viewers dislike about the {aspect}?", "What is criticised about the {aspect}?", "What is wrong with the {aspect}?",
         "Who complains about the {aspect}, and how?"],
        ["What is bad about the {aspect} of {title}?"],
    ),
    "citation": (
        ["Quote a viewer on the {aspect}.", "Give me a quote about the {aspect}.", "Cite what reviewers write about the {aspect}.",
         "In viewers' own words: how is the {aspect}?"],
        ["What exactly did someone write about the {aspect}?"],
    ),
}  # fmt: skip
# Wordings for subjects, and for questions, that reviews may not cover.
OF_A_SUBJECT = (
    ["What do the reviews say about {subject}?", "Do viewers mention {subject}?", "What about {subject}?", "Tell me about {subject}."],
    ["According to the reviews, how about {subject}?"],
)  # fmt: skip
# Subject: words by which a review would mention it. The last few are asked about in the test alone.
SUBJECTS: dict[str, str] = {
    "the budget": r"budgets?|costs?|expensive", "the filming locations": r"locations?|filmed (?:in|at|on)|shot (?:in|at)",
    "the release date": r"release[ds]?", "the awards": r"awards?|emmys?|oscars?|golden globes?|nominat\w+",
    "the salaries of the cast": r"salar(?:y|ies)|wages?|paid", "the trailer": r"trailers?", "the poster": r"posters?",
    "the merchandise": r"merch\w*|toys?|t-shirts?", "the age rating": r"age rating|r-rated|pg-13|rated r|18\+",
    "the opening credits": r"credits?|intro", "the stunt doubles": r"stunt\w*", "the make-up": r"make-?up|prosthetics?",
    "the casting process": r"audition\w*|casting", "the picture quality": r"4k|hdr|resolution|picture quality|blu-?ray",
    "the price of the subscription": r"price|subscri\w+", "the advertising breaks": r"ads?|adverts?|commercials?",
    "the animals": r"animals?|dogs?|cats?|horses?", "the food": r"food|meals?|cook\w*|eat\w*",
    "the interviews with the cast": r"interviews?|press tour", "the deleted scenes": r"deleted|director's cut|bonus|extras",
    "the weather": r"weather|rain\w*|snow\w*", "the video game": r"video ?games?|console|playstation",
    "the book version": r"books?|novels?|comics?|manga|webtoon", "the number of viewers": r"viewership|million|billion|most[- ]watched",
    "the running time": r"running time|runtime|minutes?|hours?", "the sponsors": r"sponsor\w*|product placement",
    "the camera equipment": r"lens(?:es)?|camera\w*|arri", "the lawsuit": r"lawsuit\w*|sued|court",
}  # fmt: skip
TEST_SUBJECTS = 6
ELSEWHERE = {  # questions that are not about a film at all
    "What is the capital of France?": "capital of|france", "Can you give me a recipe for pancakes?": r"recipes?|pancakes?",
    "How do I change a bicycle tyre?": r"bicycles?|tyres?|tires?", "What will the weather be tomorrow?": "weather|forecast",
    "Translate 'good morning' into Finnish.": "finnish|good morning", "What is seven times eight?": "times eight|56",
    "Who wrote Hamlet?": "hamlet|shakespeare", "How far away is the moon?": "moon",
}  # fmt: skip
TEST_ELSEWHERE = 2


def make_rows(sources: Mapping[str, Iterable[dict[str, Any]]], task: Task, folder: Path) -> dict[str, Iterator[dict[str, Any]]]:
    """The rows of each split from its source rows; `knowledge.json` and `aspects.svg` of all of them into `folder`.

    Raises:
        UserError: no title, ratings that are none, or a split without one English review that says anything.
    """
    about = task.data.reviews
    if about is None or not about.title.strip():
        raise UserError('task.data.module=reviews needs the film\'s title: task.data.reviews={title: "My Film"}')
    found = {split: list(rows) for split, rows in sources.items()}
    reader = Reader(about.title, about.aspects)
    ratings, scale = _read_ratings([row for rows in found.values() for row in rows], task)
    reviews: dict[str, list[Review]] = {split: [] for split in found}
    done = 0
    with Progress("Reading the reviews", sum(map(len, found.values()))) as progress:
        for split, rows in found.items():
            for row in rows:
                reviews[split].append(reader.read(row["row"], row["review"], ratings.get(row["row"]), row.get("title", "")))
                done += 1
                progress.at(done)
    _check(reviews, task)
    split_of = {review.row: split for split, some in reviews.items() for review in some}
    everything = Knowledge.of([review for some in reviews.values() for review in some], about.title, scale)
    text = json.dumps({"title": about.title, **everything.as_json(split_of)}, indent=2, ensure_ascii=False) + "\n"
    (folder / "knowledge.json").write_text(text, encoding="utf-8")
    draw(folder / "aspects.svg", about.title, everything.aspects)
    return {split: _rows(Knowledge.of(some, about.title, scale), reader, split, task) for split, some in reviews.items()}


def _check(reviews: Mapping[str, list[Review]], task: Task) -> None:
    for split, some in reviews.items():
        if not any(review.sentences for review in some):
            everything = [review for others in reviews.values() for review in others]
            english = sum(bool(review.sentences) for review in everything)
            raise UserError(
                f"{task.data.source}: the {split} split has no review that says something in English, in a sentence of four "
                f"words or more. Of {len(everything)} usable rows {english} have one; languages: "
                f"{languages_of(everything)}.\nAdd or translate reviews"
                + (f", deal them anew (task.data.split.seed={task.seed + 1})" if english > 2 else "")
                + ", or name the column that holds them in task.data.columns.review"
            )


def _read_ratings(rows: list[dict[str, Any]], task: Task) -> tuple[dict[int, float], int]:
    """Row → rating from 0 to 1, and the best rating there is: 5, 10 or 100, the first that none is above."""
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
            f"{task.data.source}: column rating holds {highest:g}; ratings are out of 5, 10 or 100, or like 7/10. Name another "
            f"column in task.data.columns.rating, or none: task.data.columns.rating=[]"
        )
    scale = next(best for best in (5, 10, 100) if highest <= best)
    return of_best | {row: value / scale for row, value in plain.items()}, scale


# --- questions and answers --------------------------------------------------------------------------------------


def _rows(knowledge: Knowledge, reader: Reader, split: str, task: Task) -> Iterator[dict[str, Any]]:
    about, place = task.data.reviews, int(split == "test")
    assert about is not None
    chance = Random(f"{task.seed} {split}")  # a text seed is the same on every machine
    answers = Answers(knowledge, about.kind, chance)
    given: set[str] = set()

    def ask(kind: str, wordings: Iterator[str], answer: Callable[[], Answer | None], **names: str) -> Iterator[dict[str, Any]]:
        for _ in range(TRIES):
            made = answer()
            if made and made.text not in given and len(made.text.split()) <= WORDS:
                given.add(made.text)
                question = next(wordings).format(title=about.title, noun=about.kind, **names)
                yield {
                    "input": question, "output": made.text, "kind": kind, "aspect": names.get("aspect", ""),
                    "reviews": made.reviews, "quoted": made.quoted,
                }  # fmt: skip
                return

    of_the_whole = {
        "comparison": answers.comparison, "summary and explanation": answers.summary_and_explanation,
        "summary": answers.summary, "explanation": answers.explanation, "positive": answers.positive,
        "negative": answers.negative, "overall": answers.overall, "division": answers.division,
        "audience": answers.audience, "phrases": answers.phrases, "ratings": answers.ratings,
        "languages": answers.languages,
    }  # fmt: skip
    for kind, wordings in OF_THE_WHOLE.items():
        asked = cycle(wordings[place])
        for _ in range(_how_many(len(knowledge.reviews), PER_ROW, MOST)):
            yield from ask(kind, asked, of_the_whole[kind])
    of_an_aspect = {
        "aspect": (answers.about, lambda aspect: len(aspect.judged)),
        "praise of an aspect": (answers.praise, lambda aspect: len(aspect.praise)),
        "criticism of an aspect": (answers.criticism, lambda aspect: len(aspect.criticism)),
        "citation": (answers.citation, lambda aspect: len(aspect.praise) + len(aspect.criticism)),
    }
    for kind, wordings in OF_AN_ASPECT.items():
        answer, evidence = of_an_aspect[kind]
        asked = cycle(wordings[place])
        for aspect in knowledge.aspects:
            for _ in range(_how_many(evidence(aspect), PER_ASPECT_ROW, MOST_OF_ASPECT)):
                yield from ask(kind, asked, partial(answer, aspect), aspect=aspect.name)
    asked = cycle(OF_A_SUBJECT[place])
    named = {aspect.name for aspect in knowledge.aspects}
    silent = _not_mentioned(SUBJECTS, TEST_SUBJECTS, split, knowledge)
    for subject in [*silent, *(f"the {name}" for name in reader.aspects if name not in named)]:
        for _ in range(SILENT):
            yield from ask("not covered", asked, partial(answers.silence, subject), subject=subject)
    for question in _not_mentioned(ELSEWHERE, TEST_ELSEWHERE, split, knowledge):
        yield from ask("not covered", iter([question]), partial(answers.silence, "it"))


def _how_many(evidence: int, per_row: int, most: int) -> int:
    return max(1, min(evidence // per_row, most))


def _not_mentioned(words_of: Mapping[str, str], for_test: int, split: str, knowledge: Knowledge) -> list[str]:
    """Those of `words_of` that none of the reviews mentions; the last `for_test` are of the test split alone."""
    mine = list(words_of)[-for_test:] if split == "test" else list(words_of)[:-for_test]
    texts = "\n".join(review.text.casefold() for review in knowledge.reviews)
    return [subject for subject in mine if not re.search(rf"\b(?:{words_of[subject]})\b", texts)]
