"""Labels are measured: what an answer names, accuracy, F1 and a confusion matrix, with intervals."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from core.artifacts import Generation, Labels
from evaluation.labels import measure_labels
from evaluation.metrics import Evidence

PROMPT = {"template": "{instruction}\n{response}", "instruction": "{text}", "response": "{label}", "fields": {}}


def evidence_of(folder: Path, targets: list[str]) -> Evidence:
    """A data folder whose training rows have these answers."""
    rows = [{"input": f"text {number}", "output": text} for number, text in enumerate(targets)]
    (folder / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Evidence(folder, folder, {"task": {"data": {}, "prompt": PROMPT}})


def answers(truth: list[str], before: list[str], after: list[str]) -> list[Generation]:
    sides: Any = (("before", before), ("after", after))
    return [
        Generation(
            id=f"{side} {row}", side=side, question=f"row {row}", text_in="", seed=0, row=row, text=text, reference=ref
        )
        for side, texts in sides
        for row, (ref, text) in enumerate(zip(truth, texts, strict=True), 1)
    ]


def measured(folder: Path, truth: list[str], before: list[str], after: list[str], training: list[str]) -> Labels:
    found = measure_labels(answers(truth, before, after), evidence_of(folder, training))
    assert found
    return found


def test_accuracy_f1_and_confusion_are_those_of_scikit_learn(tmp_path: Path) -> None:
    deal, names = random.Random(1), ["angry", "glad", "sad"]
    truth = deal.choices(names, weights=[1, 6, 3], k=90)
    after = [text if deal.random() < 0.7 else deal.choice(names) for text in truth]
    before = [deal.choice([*names, "I cannot say"]) for _ in truth]
    found = measured(tmp_path, truth, before, after, names * 20)
    for side, named in (("before", before), ("after", after)):
        value, low, high = getattr(found.accuracy, side)
        assert value == pytest.approx(accuracy_score(truth, named)) and low < value < high
        value, low, high = getattr(found.f1, side)
        assert value == pytest.approx(f1_score(truth, named, labels=names, average="macro")) and low < value < high
        expected = confusion_matrix(truth, named, labels=[*names, "I cannot say"])[:3]
        assert getattr(found, f"confusion_{side}") == expected.tolist()
    difference, low, high = found.accuracy.difference
    assert difference == pytest.approx(found.accuracy.after[0] - found.accuracy.before[0]) and low and high and low > 0
    assert [label.asked for label in found.labels] == [truth.count(name) for name in names]


def test_a_label_that_is_always_found_is_not_certain(tmp_path: Path) -> None:
    truth = ["ham"] * 9 + ["spam"] * 3
    found = measured(tmp_path, truth, ["ham"] * 12, truth, ["ham"] * 60 + ["spam"] * 20)
    ham, spam = found.labels
    assert (ham.training, spam.training) == (60, 20)
    assert spam.after and spam.after[0] == 1 and 0.4 < (spam.after[1] or 0) < 0.5  # Wilson's for 3 of 3
    assert found.usual[0] == found.accuracy.before[0] == 0.75


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("spam", "spam"),
        (" Spam.\nBecause it is.", "spam"),
        ("**Spam**", "spam"),
        ("The label is spam", "spam"),
        ("not spam", "not spam"),
        ("It is not spam.", "not spam"),
        ("A: no", "a"),
        ("spam or a?", "spam"),
        ("This is a question", None),
        ("spammy", None),
        ("maybe\nspam", None),
        ("", None),
    ],
)
def test_what_an_answer_names(tmp_path: Path, answer: str, named: str | None) -> None:
    names = ["a", "not spam", "spam"]
    found = measured(tmp_path, ["spam"], ["spam"], [answer], names * 10)
    (row,) = [row for row in found.confusion_after if sum(row)]
    assert row.index(1) == (names.index(named) if named else 3)


def test_answers_that_are_no_labels_are_not_measured(tmp_path: Path) -> None:
    for targets in (["one", "two", "three"], ["the same"] * 20, ["a\nb", "c"] * 20, ["long " * 20, "c"] * 20):
        assert measure_labels(answers(["one"], ["one"], ["one"]), evidence_of(tmp_path, targets)) is None
