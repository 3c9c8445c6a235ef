"""Figures of a run's answers, each with an interval: `metrics.json`.

`task.evaluate.metrics` names a family of more: METRICS of `tasks/<family>/metrics.py` join those below.

A metric is a function of the answers and what they are held against; its result has a score for each answer, or None
where it does not apply. The first paragraph of its docstring is what the report says about it.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from core.files import Lines, read_json, read_lines
from core.prompt import Prompt
from core.tasks import part_of
from evaluation.intervals import estimates

Scores = list[float | None]


class Evidence:
    """What answers are held against: the data folder that a run learned from, its base model's, and its configuration.

    Attributes:
        data: `task.data`.
    """

    def __init__(self, data_folder: Path, base_folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self.base_folder = data_folder, base_folder
        self.data, self.prompt = config["task"]["data"], Prompt(**config["task"]["prompt"])

    @cached_property
    def training(self) -> Lines:
        return read_lines(self._folder / "training.jsonl")

    @cached_property
    def rows(self) -> Lines:
        """Of all splits."""
        return [
            row for split in ("validation", "test") for row in read_lines(self._folder / f"{split}.jsonl")
        ] + self.training

    @cached_property
    def learned(self) -> list[str]:
        """What was learned of each training row: its answer, or all the model's turns."""
        rows = (self.prompt.pieces(row) for row in self.training)
        return ["\n".join(text for text, learned in pieces if learned) for pieces in rows]

    @cached_property
    def knowledge(self) -> dict[str, Any]:
        """`knowledge.json`, of tasks that have one."""
        return read_json(self._folder / "knowledge.json")


@dataclass(frozen=True)
class Metric:
    """A figure: `score(generations, evidence)` gives a score for each answer.

    Attributes:
        better: "higher", "lower", or "" where neither is.
        unit: "%" for shares, given as 0 to 1; "yes/no" for what an answer has or has not; else what is counted.
        together: of a question's answers with all seeds together, not of each.
    """

    title: str
    score: Callable[[Lines, Evidence], Scores]
    better: str
    unit: str = "%"
    together: bool = False

    @property
    def explanation(self) -> str:
        return " ".join((inspect.getdoc(self.score) or "").split("\n\n")[0].split())


def measure(generations: Lines, evidence: Evidence, family: str | None) -> dict[str, Any]:
    """`{"metrics": [{"name", "title", "better", "unit", "explanation", "questions", "before", "after", "difference",
    "reference"}], "scores": {id of an answer: {name: score}}}`.

    `before`, `after` and `difference` are `[value, low, high]`; `reference` is the score of the held-out rows' own
    answers, or None. A metric that applies to no question is left out.
    """
    known = [
        {**line, "side": "reference", "text": line["reference"], "ended": True}
        for line in generations
        if line["side"] == "after" and "reference" in line
    ]
    lines = [*generations, *known]
    more = part_of(family, "metrics", "task.evaluate.metrics").METRICS if family else []
    scores: dict[str, dict[str, float]] = {line["id"]: {} for line in generations}
    found = []
    for metric in [*METRICS, *more]:
        name = metric.score.__name__
        values = metric.score(lines, evidence)
        sides = {side: _by_question(lines, values, side) for side in ("before", "after", "reference")}
        both = [question for question in sides["before"] if question in sides["after"]]
        if not both:
            continue
        before, after = (np.array([sides[side][question] for question in both]) for side in ("before", "after"))
        own = np.array(list(sides["reference"].values()))
        found.append(
            {
                "name": name,
                "title": metric.title,
                "better": metric.better,
                "unit": metric.unit,
                "explanation": metric.explanation,
                "questions": len(both),
                **estimates(before, after),
                "reference": float(own[:, 0].sum() / own[:, 1].sum()) if len(own) else None,
            }
        )
        for line, value in zip(generations, values, strict=False):
            if value is not None and not metric.together:
                scores[line["id"]][name] = value
    return {"metrics": found, "scores": scores}


def _by_question(lines: Lines, values: Scores, side: str) -> dict[str, tuple[float, int]]:
    """Question → sum of its answers' scores, and how many there are."""
    sums: dict[str, tuple[float, int]] = {}
    for line, value in zip(lines, values, strict=True):
        if line["side"] == side and value is not None:
            total, count = sums.get(line["question"], (0.0, 0))
            sums[line["question"]] = total + value, count + 1
    return sums


# --- metrics of every task ------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


def chrf(generations: Lines, evidence: Evidence) -> Scores:
    """How much of the held-out row's own answer is found in the model's, in sequences of one to six letters. 100 is the
    same text. An answer may be good and quite another one.

    chrF (Popović, 2015), by sacrebleu: F2 of character n-grams to 6, spaces left out, mean over answers.
    """
    from sacrebleu.metrics import CHRF

    measured = CHRF()
    return [_with_reference(line, lambda a, b: measured.sentence_score(a, [b]).score) for line in generations]


def rouge_l(generations: Lines, evidence: Evidence) -> Scores:
    """The longest sequence of words, in order but with gaps, that the answer shares with the held-out row's own, as a
    share of both. 100% is the same text.

    ROUGE-L F1 (Lin, 2004) of lower-case words without stemming, the longest common subsequence by RapidFuzz.
    """
    return [_with_reference(line, _rouge_l) for line in generations]


def _with_reference(line: dict[str, Any], score: Callable[[str, str], float]) -> float | None:
    return score(line["text"], line["reference"]) if "reference" in line and line["side"] != "reference" else None


def _rouge_l(text: str, other: str) -> float:
    from rapidfuzz.distance import LCSseq

    one, two = words(text), words(other)
    common = LCSseq.similarity(one, two)
    return 2 * common / (len(one) + len(two)) if common else 0.0


def ended(generations: Lines, evidence: Evidence) -> Scores:
    """Answers that the model ended by itself, rather than run into the limit of tokens."""
    return [float(line["ended"]) for line in generations]


def well_formed(generations: Lines, evidence: Evidence) -> Scores:
    """Answers that hold every part of the task's response, such as a term, its definition and an example.

    Each label of `task.prompt.response` begins a line, with text behind it, see `Prompt.read_response`. Tasks with
    fewer than two labels have no form to keep.
    """
    labels = {name for name, label in evidence.prompt.labels().items() if label}
    if len(labels) < 2:
        return [None] * len(generations)
    read = (evidence.prompt.read_response(line["text"]) for line in generations)
    return [float(all(fields.get(label) for label in labels)) for fields in read]


def distinct_2(generations: Lines, evidence: Evidence) -> Scores:
    """How many of all pairs of neighbouring words in the answers to one question are different ones: low where a model
    repeats itself.

    distinct-2 (Li et al., 2016), over all seeds of a question together.
    """

    def score(texts: list[str]) -> float:
        pairs = [pair for text in texts for pair in pairwise(words(text))]
        return len(set(pairs)) / len(pairs) if pairs else 0.0

    return _of_all_seeds(generations, score)


def self_similarity(generations: Lines, evidence: Evidence) -> Scores:
    """How alike the answers to one question are with different seeds. 100%: it always says the same.

    Mean ROUGE-L F1 over all pairs of seeds.
    """

    def score(texts: list[str]) -> float:
        return float(np.mean([_rouge_l(one, two) for one, two in combinations(texts, 2)]))

    return _of_all_seeds(generations, score)


def _of_all_seeds(generations: Lines, score: Callable[[list[str]], float]) -> Scores:
    """The score of a question's answers together, for each of them; None where there is but one."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in generations:
        groups[line["side"], line["question"]].append(line["text"])
    found = {group: score(texts) for group, texts in groups.items() if len(texts) > 1}
    return [found.get((line["side"], line["question"])) for line in generations]


def copied_words(generations: Lines, evidence: Evidence) -> Scores:
    """The longest run of words that stands in an answer exactly as in some training row's answer. Common phrases have
    four or five; whole sentences learned by heart have many.
    """
    return [float(longest) for longest in longest_overlaps([line["text"] for line in generations], evidence.learned)]


def longest_overlaps(texts: Sequence[str], known: Sequence[str]) -> list[int]:
    """For each of `texts` the longest sequence of words that also stands in one of `known`.

    Lengths are tried one after another: a text, or a known one, that shares no sequence of a length shares no longer.
    """
    longest = [0] * len(texts)
    mine, theirs = ({place: words(text) for place, text in enumerate(many)} for many in (texts, known))
    length = 1
    while mine:
        wanted = {place: _sequences(text, length) for place, text in mine.items()}
        all_wanted = set().union(*wanted.values())
        shared = {place: _sequences(text, length) & all_wanted for place, text in theirs.items()}
        seen = set().union(*shared.values())
        theirs = {place: text for place, text in theirs.items() if shared[place]}
        mine = {place: text for place, text in mine.items() if wanted[place] & seen}
        for place in mine:
            longest[place] = length
        length += 1
    return longest


def _sequences(text: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(text[start : start + length]) for start in range(len(text) - length + 1)}


METRICS = [
    Metric("Like the row's own answer (chrF)", chrf, "higher", ""),
    Metric("Like the row's own answer (ROUGE-L)", rouge_l, "higher"),
    Metric("Ended by itself", ended, "higher", "yes/no"),
    Metric("Well-formed", well_formed, "higher", "yes/no"),
    Metric("Distinct pairs of words", distinct_2, "higher", together=True),
    Metric("Alike with every seed", self_similarity, "", together=True),
    Metric("Copied from training", copied_words, "", "words"),
]
