"""The page of reviews without a model: the reviews that an answer is checked against, and their picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_serving import needs_serving
from website import Site

pytest.importorskip("tasks.reviews.page")
from tasks.reviews.evidence import ReviewIndex

pytest_plugins = ("website",)
pytestmark = needs_serving


def test_the_reviews_behind_an_answer_are_those_that_name_its_aspect(house: Path) -> None:
    reviews = ReviewIndex(house / "data/squid_game")
    real = reviews.knowledge["aspects"][0]["praise"][0]
    found = reviews.behind("What about the acting?", f"One says: “{real['quote']}” Another: “I made this one up.”")
    acting = next(aspect for aspect in reviews.knowledge["aspects"] if aspect["name"] == "acting")
    assert [aspect["name"] for aspect in found["aspects"]] == ["acting"]
    assert found["aspects"][0]["praised"] == acting["favourable"] + acting["both"]
    assert {quote["review"] for quote in found["aspects"][0]["praise"]} <= set(found["aspects"][0]["reviews"])
    assert found["quotes"] == [
        {"quote": real["quote"], "reviews": [real["review"]]},
        {"quote": "I made this one up.", "reviews": []},
    ]
    # Whatever a row of training quotes is found again, in reviews that the row names.
    for line in (house / "data/squid_game/training.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for quote in reviews.behind(row["input"], row["output"])["quotes"]:
            assert set(quote["reviews"]) & set(row["quoted"]), quote
    assert reviews.behind("Who wrote Hamlet?", "The reviews do not say.")["aspects"] == []


def test_the_picture_of_aspects_and_bars_are_those_of_the_data(
    site: Site, open_page: Callable[..., Any], house: Path
) -> None:
    known = json.loads((house / "data/squid_game/knowledge.json").read_text())["aspects"][0]
    page = open_page(f"{site.address}/reviews")
    said = page.locator(".aspect").first.get_attribute("aria-label")
    assert said.startswith(f"{known['name']}: criticised by {known['unfavourable'] + known['both']}, ")
    picture = site.ask("GET", "/reviews/aspects.svg")
    assert picture.headers["content-type"].startswith("image/svg")
    assert "sandbox" in picture.headers["content-security-policy"]
