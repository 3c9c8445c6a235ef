"""What the pages say of the models behind them, with none, one, two and all adapters served."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import needs_task
from scripted_triton import ScriptedTriton, scripted_triton
from test_web import PAGES, PASSWORD
from tiny_serving import PROMPTS, needs_serving
from website import Site, expect, violations

from serving.web.page import find_pages

pytest_plugins = ("website",)
pytestmark = needs_serving
OF_PAGE = {page.name: page.page.task for page in find_pages()}
# What is served, and how its pages are looked at.
SERVED: dict[tuple[str, ...], tuple[str, int]] = {
    (): ("dark", 390),
    ("slang",): ("light", 1280),
    ("slang", "chat"): ("dark", 1280),
    ("slang", "squid_game", "chat"): ("light", 390),
}
WEIGHT = "performance.getEntries().reduce((sum, entry) => sum + (entry.encodedBodySize ?? 0), 0)"  # bytes
SAID = ["Slang: w", "ubble\nDefinition: ", "A word."]


def entry(name: str) -> dict[str, Any]:
    about = {"title": name.title(), "base": "gemma-3-270m", "run": f"run-of-{name}", "has_turns": name != "slang"}
    return {"name": name, "prompt": vars(PROMPTS[name]), **about}


@pytest.fixture(scope="module", params=SERVED, ids=lambda names: "+".join(names) or "base")
def triton(request: pytest.FixtureRequest) -> Iterator[ScriptedTriton]:
    with scripted_triton({name: entry(name) for name in request.param}, SAID) as running:
        yield running


@pytest.fixture(scope="module")
def honest(triton: ScriptedTriton, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("honest"), f"triton={triton.url}", f"data={house}/data")
    yield site.wait()
    site.end()


@pytest.mark.slow
def test_a_page_says_before_it_is_asked_whether_its_model_is_served(
    honest: Site, triton: ScriptedTriton, open_page: Callable[..., Any]
) -> None:
    theme, width = SERVED[tuple(triton.catalogue)]
    for path in PAGES:
        page = open_page(honest.address + path, color_scheme=theme, viewport={"width": width, "height": 800})
        expect(page.locator("#status")).to_have_text("Model ready")
        if task := OF_PAGE.get(path.strip("/") or next(iter(OF_PAGE))):
            notice = page.locator("#not-served")
            expect(notice).to_be_visible(visible=task not in triton.catalogue)
            assert f"make serve TASK={task}" in notice.text_content()
        assert violations(page) == []
        assert 0 < page.evaluate(WEIGHT) < 200_000
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_task("chat")
def test_the_chat_says_what_the_chosen_model_is(
    honest: Site, triton: ScriptedTriton, open_page: Callable[..., Any]
) -> None:
    page = open_page(f"{honest.address}/chat")
    expect(page.locator("#adapter option")).to_have_count(len(triton.catalogue) + 1)
    for name in triton.catalogue:
        page.get_by_label("Model").select_option(name)
        expect(page.locator("#model")).to_contain_text(f"fine-tuned from gemma-3-270m, in the run run-of-{name}")
        expect(page.locator("#no-turns")).to_be_visible(visible=name == "slang")
        expect(page.locator("#starters")).to_be_visible(visible=name == "chat")
    page.get_by_label("Model").select_option("")
    expect(page.locator("#model")).to_contain_text("without fine-tuning")


@needs_task("chat")
def test_a_dialogue_survives_reload_and_back(
    honest: Site, triton: ScriptedTriton, open_page: Callable[..., Any]
) -> None:
    page = open_page(f"{honest.address}/chat")
    expect(page.locator("#adapter option")).to_have_count(len(triton.catalogue) + 1)
    last = [*triton.catalogue, ""][-2:][0]  # the last adapter; the base where there is none
    page.get_by_label("Model").select_option(last)
    page.get_by_label("Your message").fill("Hello there!")
    page.get_by_label("Your message").press("Enter")
    expect(page.locator("#tools")).to_be_visible()
    bubbles = page.locator(".bubble").all_inner_texts()
    assert bubbles[0] == "Hello there!" and len(bubbles) == 2
    page.reload()
    expect(page.locator(".bubble")).to_have_text(bubbles)
    page.get_by_role("link", name="Runs").click()
    page.go_back()
    expect(page.locator(".bubble")).to_have_text(bubbles)
    expect(page.get_by_label("Model")).to_have_value(last)
    triton.asked.clear()
    page.get_by_label("Your message").fill("And then?")
    page.get_by_label("Your message").press("Enter")
    expect(page.locator(".bubble")).to_have_count(4)
    page.get_by_role("button", name="New").click()
    page.reload()
    expect(page.locator(".bubble")).to_have_count(0)


@needs_task("slang")
@pytest.mark.slow
def test_a_shared_link_survives_the_sign_in(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    with scripted_triton({"slang": entry("slang")}, SAID) as triton:
        site = Site(tmp_path, f"triton={triton.url}", WEB_PASSWORD=PASSWORD).wait()
        scene = {"seed": 7, "creativity": 0.4, "context": "A late bus."}
        page = open_page(f"{site.address}/#{httpx.QueryParams(scene)}")
        for password in ("wrong", PASSWORD):
            page.get_by_label("Password").fill(password)
            page.get_by_role("button", name="Enter").click()
        expect(page.get_by_label("Where are you?")).to_have_value("A late bus.")
        expect(page.locator("#after .term")).to_have_text("wubble")
        assert [sampling["seed"] for _, sampling in triton.asked] == [7]
        site.end()


@needs_task("slang")
@pytest.mark.slow
def test_a_question_that_waits_is_told_how_many_are_before_it(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    with scripted_triton({"slang": entry("slang")}, SAID) as triton:
        site = Site(tmp_path, f"triton={triton.url}").wait()
        pages = [open_page(site.address) for _ in range(2)]
        with triton.held():
            for before, page in enumerate(pages):
                page.get_by_role("button", name="Coin a word").click()
                words = "1 question is before yours" if before else "The model is taking its time"
                expect(page.locator("#announce")).to_contain_text(words)
        for page in pages:
            expect(page.locator("#tools")).to_be_visible()
        site.end()
