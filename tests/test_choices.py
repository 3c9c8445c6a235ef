"""Several answers to one question: what is offered, what is left out and why, and what a visitor makes of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_triton import ScriptedTriton, scripted_triton
from tiny_serving import needs_serving
from website import Site, expect, violations

from core.configuration import load_config, plain

pytest.importorskip("tasks.slang.page")
from tasks.slang.novelty import FILE
from tasks.slang.page import PAGE, bare

pytest_plugins = ("website",)
pytestmark = needs_serving
SCENE = "You missed the last bus home."
OLD = ["Bussin'", "bus home", "ramen"]  # known slang, words of the scene, a word
NEW = ["quizpad", "“Wubbledrift”", "snorfle", "glimbatch"]
BROKEN = "zzyzxo"  # new, and without an example


def says(term: str) -> list[str]:
    example = [] if term == BROKEN else ["\nExample", f": So {term}, he said."]
    return ["Slang: ", term[:3], term[3:], "\nDefinition", f": What {term} means.", *example]


def of(terms: list[str]) -> Callable[[int], list[str]]:
    """Every so many seeds in a row bring each of the terms."""
    return lambda seed: says(terms[seed % len(terms)])


@pytest.fixture(scope="module")
def triton() -> Iterator[ScriptedTriton]:
    prompt = plain(load_config(["task=slang"]).task.prompt)
    entry = {"name": "slang", "prompt": prompt, "field": "context", "run": "a-run"}
    with scripted_triton({"slang": entry}, []) as running:
        yield running


@pytest.fixture(scope="module")
def coining(triton: ScriptedTriton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("coining")
    (folder / "runs/slang/a-run").mkdir(parents=True)
    (folder / "runs/slang/a-run" / FILE).write_text("bussin\n")
    site = Site(folder, f"triton={triton.url}")
    yield site.wait()
    site.end()


def events(site: Site, **question: Any) -> list[tuple[str, dict[str, Any]]]:
    question = {"adapter": "slang", "fields": {"context": SCENE}, "seed": 7, "choices": 3, **question}
    blocks = site.ask("POST", "/api/answer", json=question).text.strip().split("\n\n")
    found = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    return [(one["event"], json.loads(one["data"])) for one in found]


def test_only_new_and_complete_terms_are_offered_each_once(coining: Site, triton: ScriptedTriton) -> None:
    triton.asked.clear()
    triton.pieces = of([*OLD, NEW[0], NEW[1], BROKEN])
    found = events(coining)
    offered = {data["seed"]: data for name, data in found if name == "choice"}
    terms = {data["choice"]: data["fields"] for name, data in found if name == "part"}
    assert {terms[data["choice"]]["slang"] for data in offered.values()} <= {"quizpad", "Wubbledrift"}
    assert all(data["not_new"] == "" and data["keep"] for data in offered.values())
    assert {sampling["seed"] for _, sampling in triton.asked} == {7 + number for number in range(PAGE.seeds)}
    name, done = found[-1]
    assert (name, done["choices"], done["asked"]) == ("done", len(offered), PAGE.seeds)
    assert {"known slang", "words of the question", "already a word", "said already"} <= done["dropped"].keys()
    assert sum(done["dropped"].values()) + done["choices"] == done["asked"]
    # What was chosen is had again, alone, by its seed.
    seed, chosen = offered.popitem()
    again = events(coining, seed=seed, choices=1)
    assert [data["fields"] for name, data in again if name == "part"][-1] == terms[chosen["choice"]]
    assert "choices" not in again[-1][1]


def test_an_answer_that_turns_out_incomplete_is_taken_back(coining: Site, triton: ScriptedTriton) -> None:
    triton.pieces = of([BROKEN])
    found = events(coining)
    shown = {data["choice"] for name, data in found if name == "part"}
    assert shown and shown == {data["choice"] for name, data in found if name == "dropped"}
    assert found[-1][1]["choices"] == 0 and found[-1][1]["dropped"]["incomplete"] == len(shown)


def test_at_most_as_many_are_offered_as_were_asked_for(coining: Site, triton: ScriptedTriton) -> None:
    triton.pieces = of(NEW)
    names = [name for name, _ in events(coining, choices=3)]
    assert names.count("choice") == 3 and names[-1] == "done"


@pytest.mark.slow
def test_a_visitor_keeps_one_of_three_and_the_choice_is_a_vote(
    coining: Site, triton: ScriptedTriton, open_page: Callable[..., Any]
) -> None:
    triton.pieces = of([*OLD, *NEW])
    page = open_page(coining.address, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Where are you?").fill(SCENE)
    page.get_by_role("button", name="Coin a word").click()
    buttons = page.get_by_role("button", name="Keep this one")
    expect(buttons).to_have_count(3)
    expect(page.locator("#facts")).to_contain_text("known slang")
    expect(page.get_by_role("button", name="Share")).to_be_hidden()
    assert violations(page) == []
    term = page.locator(".choice .term").nth(1).inner_text()
    buttons.nth(1).click()
    expect(page.locator("#after .term")).to_have_text([term])
    expect(page.locator("#entries .term")).to_have_text([term])
    expect(page.locator("#entries").get_by_role("button", name="Thumbs up")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#facts")).to_contain_text("a new term")
    page.get_by_role("button", name="Share").click()
    expect(page.locator("#toast")).to_contain_text("Link copied")
    again = open_page(page.evaluate("navigator.clipboard.readText()"))
    expect(again.locator("#after .term")).to_have_text([term])


@pytest.mark.slow
def test_that_no_new_word_came_of_it_is_said(
    coining: Site, triton: ScriptedTriton, open_page: Callable[..., Any]
) -> None:
    triton.pieces = of(OLD)
    page = open_page(coining.address)
    page.get_by_label("Where are you?").fill(SCENE)
    page.get_by_role("button", name="Coin a word").click()
    expect(page.locator("#after")).to_contain_text("No new word came of it")
    assert violations(page) == []
    triton.pieces = of([*OLD, NEW[0]])
    page.get_by_role("button", name="Another roll").click()
    expect(page.locator("#after .term")).to_have_text(["quizpad"])  # the only one needs no choice
    expect(page.get_by_role("button", name="Keep", exact=True)).to_have_attribute("aria-pressed", "false")


def test_answers_are_offered_unjudged_where_the_run_is_elsewhere(triton: ScriptedTriton, tmp_path: Path) -> None:
    triton.pieces = of(OLD)
    site = Site(tmp_path, f"triton={triton.url}").wait()
    choices = [data for name, data in events(site) if name == "choice"]
    site.end()
    assert len(choices) == 3 and all(data["not_new"] is None for data in choices)


def test_terms_have_no_quotation_marks_around_them() -> None:
    for written in ('"plot armor"', "“plot armor”", "'plot armor'", "“plot armor"):  # the last still grows
        assert bare(written) == "plot armor"
    for written in ("'tis", '"big" mood', "chillin'", "plot armor"):
        assert bare(written) == written
