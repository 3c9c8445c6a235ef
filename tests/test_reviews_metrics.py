"""The metrics of the review chatbot, on answers made by hand."""

import json
from pathlib import Path

import pytest
from test_metrics import evidence_of, said

from evaluation.metrics import Evidence

pytest.importorskip("tasks.reviews.metrics")
from tasks.reviews import metrics as reviews_metrics

KNOWLEDGE = {
    "title": "Some Film",
    "reviews": 40,
    "aspects": [
        {"name": "acting", "words": ["acting"], "mentions": 12, "favourable": 9, "unfavourable": 1, "both": 0},
        {"name": "ending", "words": ["ending"], "mentions": 8, "favourable": 1, "unfavourable": 2, "both": 1},
        {"name": "music", "words": ["music"], "mentions": 0, "favourable": 0, "unfavourable": 0, "both": 0},
    ],
}


@pytest.fixture
def reviews(tmp_path: Path, tiny_base: Path) -> Evidence:
    rows = [{"input": "?", "output": 'Nine like the acting: "the cast is a joy to watch".'}]
    found = evidence_of(tmp_path, tiny_base, rows)
    (tmp_path / "knowledge.json").write_text(json.dumps(KNOWLEDGE))
    return found


def test_what_no_review_says_is_without_support(reviews: Evidence) -> None:
    texts = [
        'Nine of 40 say "The cast is a joy to watch!"',
        '"A masterpiece of our time", 73 % say',
        'They call it "art" in "two words".',
        "Of 7, as asked, 12.",
    ]
    lines = said(*texts)
    lines[3].text_in = "Which 7 reviews?"
    assert reviews_metrics.unsupported(lines, reviews) == [0, 2, 0, 0]


@pytest.mark.slow
def test_aspects_and_judgements_are_held_against_the_reviews(reviews: Evidence) -> None:
    texts = "The acting is wonderful, but the ending is terrible.", "Awful acting. Great music!", "It is a series."
    assert reviews_metrics.aspects_named(said(*texts), reviews) == [2, 1, 0]
    # Nine of ten praise the acting; three of four find something bad in the ending; nobody judges the music.
    assert reviews_metrics.agreement(said(*texts), reviews) == pytest.approx([(9 / 10 + 3 / 4) / 2, 1 / 10, None])
