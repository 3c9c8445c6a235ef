"""Metrics of a run's answers, each with an interval: `metrics.json`.

`task.evaluate.metrics` names a task whose own METRICS, in `tasks/<task>/metrics.py`, join those below.

A metric is a function of the answers and of what they are compared with. It returns a score for each answer, or None
where it does not apply. The report shows the first paragraph of its docstring.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.artifacts import Generation, MetricResult
from core.files import Lines, read_lines
from core.prompt import Prompt
from core.tasks import part_of
from evaluation.intervals import estimates, share_estimates

Generations = Sequence[Generation]
Scores = list[float | None]


class Evidence:
    """What answers are compared with: the data folder of a run, its base model's folder, and its configuration.

    Attributes:
        folder: the data folder, where a task's own metrics find what its rows.py wrote besides.
        data: `task.data`.
    """

    def __init__(self, data_folder: Path, base_folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.base_folder = data_folder, base_folder
        self.data, self.prompt = config["task"]["data"], Prompt(**config["task"]["prompt"])

    @cached_property
    def training(self) -> Lines:
        return read_lines(self.folder / "training.jsonl")

    @cached_property
    def examples(self) -> Lines:
        """The examples of all splits."""
        return [
            example for split in ("validation", "test") for example in read_lines(self.folder / f"{split}.jsonl")
        ] + self.training

    @cached_property
    def targets(self) -> list[str]:
        """The target text of each training example: its answer, or all the model's turns."""
        examples = map(self.prompt.pieces, self.training)
        return ["\n".join(text for text, is_target in pieces if is_target) for pieces in examples]


@dataclass(frozen=True)
class Metric:
    """A metric: `score(generations, evidence)` gives a score for each answer.

    Attributes:
        better: "higher", "lower", or "" where neither is.
        unit: "%" for shares, given as 0 to 1; "yes/no" for what an answer has or has not; else what is counted.
        together: whether all answers to a question, with every seed, get one score together.
    """

    title: str
    score: Callable[[Generations, Evidence], Scores]
    better: Literal["higher", "lower", ""]
    unit: str = "%"
    together: bool = False

    @property
    def explanation(self) -> str:
        return " ".join((inspect.getdoc(self.score) or "").split("\n\n")[0].split())


def measure(
    generations: Generations, evidence: Evidence, task: str | None
) -> tuple[list[MetricResult], dict[str, dict[str, float]]]:
    """Every metric that applies to some question, those of `task` too.

    Returns:
        The results, and the id of each answer → {name of a metric: score}.
    """
    known = [
        one.model_copy(update={"side": "reference", "text": one.reference, "ended": True})
        for one in generations
        if one.side == "after" and one.reference is not None
    ]
    answers = [*generations, *known]
    scores: dict[str, dict[str, float]] = {one.id: {} for one in generations}
    found = []
    for metric in metrics_of(task):
        name = metric.score.__name__
        values = metric.score(answers, evidence)
        sums: dict[str, dict[str, tuple[float, int]]] = {"before": {}, "after": {}, "reference": {}}
        for one, value in zip(answers, values, strict=True):
            if value is not None:
                total, count = sums[one.side].get(one.question, (0.0, 0))
                sums[one.side][one.question] = total + value, count + 1
        both = [question for question in sums["before"] if question in sums["after"]]
        if not both:
            continue
        before, after = (np.array([sums[side][question] for question in both]) for side in ("before", "after"))
        own = np.array(list(sums["reference"].values()))
        change = share_estimates if metric.unit == "yes/no" else estimates
        found.append(
            MetricResult(
                name=name,
                title=metric.title,
                better=metric.better,
                unit=metric.unit,
                explanation=metric.explanation,
                questions=len(both),
                **change(before, after).to_dict(),
                reference=float(own[:, 0].sum() / own[:, 1].sum()) if len(own) else None,
            )
        )
        for one, value in zip(generations, values, strict=False):
            if value is not None and not metric.together:
                scores[one.id][name] = value
    return found, scores


def metrics_of(task: str | None) -> list[Metric]:
    """Those of every task, and those of the folder that `task.evaluate.metrics` names.

    Raises:
        UserError: there is no such folder, or it has no metrics.
    """
    return [*METRICS, *(part_of(task, "metrics", "task.evaluate.metrics").METRICS if task else [])]


# --- metrics of every task ------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


def chrf(generations: Generations, evidence: Evidence) -> Scores:
    """How much of the held-out example's own answer is found in the model's, in sequences of one to six letters. 100 is
    the same text. An answer may be good and quite different.

    chrF (Popović, 2015), by sacrebleu: F2 of character n-grams to 6, spaces left out, mean over answers.
    """
    from sacrebleu.metrics import CHRF

    measured = CHRF()
    return [_with_reference(one, lambda a, b: measured.sentence_score(a, [b]).score) for one in generations]


def rouge_l(generations: Generations, evidence: Evidence) -> Scores:
    """The longest sequence of words, in order but with gaps, that the answer shares with the held-out example's own, as
    a share of both. 100% is the same text.

    ROUGE-L F1 (Lin, 2004) of lower-case words without stemming, the longest common subsequence by RapidFuzz.
    """
    return [_with_reference(one, _rouge_l) for one in generations]


def _with_reference(one: Generation, score: Callable[[str, str], float]) -> float | None:
    return None if one.reference is None or one.side == "reference" else score(one.text, one.reference)


def _rouge_l(text: str, other: str) -> float:
    from rapidfuzz.distance import LCSseq

    one, two = words(text), words(other)
    common = LCSseq.similarity(one, two)
    return 2 * common / (len(one) + len(two)) if common else 0.0


def ended(generations: Generations, evidence: Evidence) -> Scores:
    """Answers that the model ended itself, rather than reach the limit of tokens."""
    return [float(one.ended) for one in generations]


def well_formed(generations: Generations, evidence: Evidence) -> Scores:
    """Answers that hold every part of the task's response, such as a term, its definition and an example.

    Each label of `task.prompt.response` begins a line, with text behind it, see `Prompt.read_response`. Tasks with
    fewer than two labels have no form to keep.
    """
    prompt = evidence.prompt
    if sum(map(bool, prompt.labels().values())) < 2:
        return [None] * len(generations)
    return [float(prompt.has_all_parts(prompt.read_response(one.text))) for one in generations]


def distinct_2(generations: Generations, evidence: Evidence) -> Scores:
    """How many of all pairs of neighbouring words in the answers to one question are different ones: low where a model
    repeats itself.

    distinct-2 (Li et al., 2016), over all seeds of a question together.
    """

    def score(texts: list[str]) -> float:
        pairs = [pair for text in texts for pair in pairwise(words(text))]
        return len(set(pairs)) / len(pairs) if pairs else 0.0

    return _of_all_seeds(generations, score)


def self_similarity(generations: Generations, evidence: Evidence) -> Scores:
    """How alike the answers to one question are with different seeds. 100%: it always says the same.

    Mean ROUGE-L F1 over all pairs of seeds.
    """

    def score(texts: list[str]) -> float:
        return float(np.mean([_rouge_l(one, two) for one, two in combinations(texts, 2)]))

    return _of_all_seeds(generations, score)


def _of_all_seeds(generations: Generations, score: Callable[[list[str]], float]) -> Scores:
    """The score of a question's answers together, for each of them; None where there is but one."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in generations:
        groups[one.side, one.question].append(one.text)
    found = {group: score(texts) for group, texts in groups.items() if len(texts) > 1}
    return [found.get((one.side, one.question)) for one in generations]


def copied_words(generations: Generations, evidence: Evidence) -> Scores:
    """The longest run of words in an answer that also stands in the answer of some training example. Common phrases
    have four or five; whole sentences learned by heart have many.
    """
    return [float(longest) for longest in longest_overlaps([one.text for one in generations], evidence.targets)]


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
    Metric("Like the example's own answer (chrF)", chrf, "higher", ""),
    Metric("Like the example's own answer (ROUGE-L)", rouge_l, "higher"),
    Metric("Ended by the model", ended, "higher", "yes/no"),
    Metric("Well-formed", well_formed, "higher", "yes/no"),
    Metric("Distinct word pairs", distinct_2, "higher", together=True),
    Metric("Similarity between seeds", self_similarity, "", together=True),
    Metric("Copied from training data", copied_words, "", "words"),
]
