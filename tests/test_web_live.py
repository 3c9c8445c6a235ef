"""The website in front of a real Triton with the real model: each flow in Chromium, also while the engine dies."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import PATIENCE, ROOT, needs_task, until
from tiny_serving import (
    ENDLESS,
    SERVING_PYTHON,
    WINDOW,
    Stack,
    free_ports,
    needs_serving,
    serve,
    serve_tiny,
    write_tiny_folder,
)
from website import PAYLOADS, Site, expect, violations

from core.artifacts import ServedAdapter
from core.configuration import load_config, names, plain
from core.prompt import Prompt
from serving.client import Client
from serving.repository import put_adapter, write_repository

pytest_plugins = ("website",)
pytestmark = [needs_serving, pytest.mark.slow]
SLANG = ROOT / "exports/slang/adapter"
SCENE = "Someone in the group chat answers a serious question with a single thumbs up."


@pytest.fixture(scope="module")
def stack(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Triton with the real base and a trained slang generator, whose weights stand in for tasks not trained here."""
    if not (SLANG / "adapter_model.safetensors").exists():
        pytest.skip("needs a trained adapter: make train TASK=slang && make convert TASK=slang")
    scratch = tmp_path_factory.mktemp("serving")
    for task in ("slang", "squid_game", "chat"):
        if task not in names("task"):
            continue
        trained = ROOT / "exports" / task / "adapter"
        found = scratch / task
        shutil.copytree(trained if trained.exists() else SLANG, found)
        config = load_config([f"task={task}"]).task
        prompt = Prompt(**plain(config.prompt))
        prompt.save(found)
        put_adapter(
            scratch / "serve",
            found,
            ServedAdapter(
                name=task,
                task=task,
                title=task,
                base=base_folder.name,
                run=f"run-of-{task}",
                sampling={"temperature": config.generate.temperature, "max_tokens": 60},
                has_turns=bool(prompt.end),
                field="context" if task == "slang" else None,
            ),
        )
    write_repository(scratch / "serve", base_folder)
    with serve(scratch / "serve") as running:
        yield running


@pytest.fixture(scope="module")
def live(stack: Stack, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    words = [f"data={house}/data", f"triton={stack.grpc}"]
    site = Site(tmp_path_factory.mktemp("live"), *words)
    yield site.wait()
    site.end()


def choose(page: Any) -> str:
    """The answer that a visitor keeps, of several that the page offers; there are rolls that bring one, or none."""
    keep = page.get_by_role("button", name="Keep this one")
    for _ in range(20):
        expect(page.locator("#tools")).to_be_visible()  # at the end of a roll
        if keep.count():
            keep.first.click()
            return str(page.locator("#after-text").inner_text())
        page.get_by_role("button", name="Another roll").click()
    raise AssertionError("twenty rolls offered no choice")


def coined(page: Any) -> str:
    expect(page.locator("#tools")).to_be_visible()
    return str(page.locator("#after-text").inner_text())


def test_a_word_streams_in_is_shared_kept_and_rolled_again(live: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(live.address, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Where are you?").fill(SCENE)
    page.get_by_label("Creativity").fill("0.9")
    lengths = page.evaluate_handle("""() => {
        const seen = [], text = document.querySelector("#after-text");
        new MutationObserver(() => seen.push(text.textContent.length))
            .observe(text, { childList: true, subtree: true });
        return seen;
    }""")
    page.get_by_role("button", name="Coin a word").click()
    text = choose(page)
    assert len(set(lengths.json_value())) > 5  # it grew before the visitor's eyes
    expect(page.locator("#after .term")).not_to_be_empty()
    page.get_by_role("button", name="Share").click()
    expect(page.locator("#toast")).to_contain_text("Link copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert SCENE.split()[0] in httpx.URL(link).fragment and SCENE.split()[0] not in link.partition("#")[0]
    again = open_page(link)  # somebody else, elsewhere
    assert coined(again) == text
    assert again.get_by_label("Creativity").input_value() == "0.9"

    expect(page.locator("#entries li")).to_have_count(1)
    assert page.locator("#entries .context").inner_text() == SCENE
    expect(page.locator("#entries").get_by_role("button", name="Thumbs up")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Another roll").click()
    assert choose(page) != text
    assert violations(page) == []


def test_the_base_model_stands_beside_on_a_desktop_and_below_on_a_phone(
    live: Site, open_page: Callable[..., Any]
) -> None:
    link = f"{live.address}/#{httpx.QueryParams({'seed': 4, 'context': SCENE, 'creativity': 0.3, 'compare': 1})}"
    for width in (1280, 390):
        page = open_page(link, viewport={"width": width, "height": 800}, has_touch=width < 800, is_mobile=width < 800)
        coined(page)
        after, before = (page.locator(name).bounding_box() for name in ("#after", "#before"))
        assert (before["x"] > after["x"] + 100) == (width == 1280)
        assert (before["y"] > after["y"] + 100) == (width == 390)
        assert page.locator("#before-text").inner_text() != page.locator("#after-text").inner_text() != ""
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_task("squid_game")
def test_a_question_about_the_reviews_brings_those_behind_it(live: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(f"{live.address}/reviews", viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.get_by_role("button", name="Summarize and explain Squid Game").click()
    expect(page.locator(".evidence").first).to_be_visible()
    page.get_by_label("Your question").fill("What about the acting?")
    page.keyboard.press("Enter")
    evidence = page.locator(".exchange").nth(1).locator(".evidence")
    expect(evidence).to_contain_text("acting")
    expect(evidence).to_contain_text("reviews name it")
    assert page.locator(".exchange").nth(1).locator(".answer").inner_text().strip()
    assert violations(page) == []


@needs_task("chat")
@needs_task("squid_game")
def test_a_dialogue_goes_on_stops_and_begins_anew(live: Site, stack: Stack, open_page: Callable[..., Any]) -> None:
    page = open_page(f"{live.address}/chat")
    sent = []
    page.on("request", lambda request: request.url.endswith("/api/answer") and sent.append(request.post_data_json))
    expect(page.locator("#adapter option")).to_have_count(4)
    bubbles, message = page.locator(".bubble"), page.get_by_label("Your message")
    message.fill("Hello! I am Ada.")
    message.press("Enter")
    expect(page.locator("#tools")).to_be_visible()
    first = bubbles.nth(1).inner_text()
    message.fill("Tell me a long story about a ship.")
    message.press("Enter")
    expect(page.locator("#tools")).to_be_visible()
    assert [one["role"] for one in sent[-1]["messages"]] == ["user", "assistant", "user"]
    assert sent[-1]["messages"][1]["content"] == first
    with stack.stopped("engine"):  # or it may have said all before the visitor stops it
        page.get_by_role("button", name="Regenerate").click()
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    assert len(sent) == 3 and sent[2]["messages"] == sent[1]["messages"] and sent[2]["seed"] != sent[1]["seed"]
    expect(bubbles).to_have_count(4)
    until(lambda: not stack.stats()["running"])  # stopped in the engine too
    page.get_by_label("Model").select_option("squid_game")
    expect(bubbles).to_have_count(0)
    message.fill("Is it violent?")
    message.press("Enter")
    expect(page.locator("#tools")).to_be_visible()
    assert sent[-1]["adapter"] == "squid_game" and len(sent[-1]["messages"]) == 1
    assert violations(page) == []


@pytest.mark.parametrize("payload", PAYLOADS[:2])
def test_markup_that_the_model_writes_is_text(live: Site, open_page: Callable[..., Any], payload: str) -> None:
    """The base goes on with what it is full of, the likeliest token each time: the page would let it draw."""
    page = open_page(f"{live.address}/chat")
    page.route(
        "**/api/answer",
        lambda route: route.continue_(post_data=json.dumps({**route.request.post_data_json, "temperature": 0})),
    )
    page.get_by_label("Model").select_option("Base model, not fine-tuned")
    page.get_by_label("Your message").fill((payload + "\n") * 6)
    page.get_by_label("Your message").press("Enter")
    expect(page.locator("#tools")).to_be_visible()
    said = page.locator(".bubble.assistant").inner_text()
    assert payload[:7] in said
    assert page.locator(".bubble *").count() == 0
    assert page.title() == "Chat · Own Gemma"


def test_two_browsers_at_once_do_not_meet(live: Site, open_page: Callable[..., Any]) -> None:
    names = ("Quillon", "Brask")  # which no model says of itself
    pages = [open_page(f"{live.address}/chat") for _ in names]
    for page, name in zip(pages, names, strict=True):
        page.get_by_label("Your message").fill(f"My name is {name}. Who won the match?")
        page.get_by_label("Your message").press("Enter")
    for page, other in zip(pages, reversed(names), strict=True):
        expect(page.locator("#tools")).to_be_visible()
        assert page.locator(".bubble").count() == 2 and other not in page.locator("#log").inner_text()


def test_one_visitor_has_a_few_answers_on_their_way(live: Site) -> None:
    question = {"adapter": "chat", "messages": [{"role": "user", "content": "Tell me a story."}], "seed": 1}
    streams = []
    try:
        for _ in range(4):
            request = httpx.Client().stream(
                "POST", f"{live.address}/api/answer", json=question, timeout=PATIENCE, headers={"origin": live.address}
            )
            streams.append(request)
        codes = [stream.__enter__().status_code for stream in streams]
        assert codes[:3] == [200] * 3 and codes[3] == 429
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)


def test_a_slow_model_is_waited_for(live: Site, stack: Stack, open_page: Callable[..., Any]) -> None:
    page = open_page(live.address)
    with stack.stopped("engine"):
        page.get_by_role("button", name="Coin a word").click()
        expect(page.locator("body")).to_have_class(re.compile("waiting"))
    assert coined(page)


def test_a_busy_model_is_told_in_words_and_asked_again(
    tiny_base: Path, tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    room = 4 * WINDOW
    with serve_tiny(tiny_base, tmp_path, "max_waiting=1", window=room) as stack, Client(stack.grpc) as client:
        site = Site(tmp_path, f"triton={stack.grpc}").wait()
        page = open_page(f"{site.address}/chat")
        holding = []
        for waiting in (0, 1):  # one has the whole cache, and the other the only place in the queue
            holding.append(client.stream("Hi", **{**ENDLESS, "max_tokens": room - 1000}))
            until(lambda waiting=waiting: (stack.stats()["running"], stack.stats()["waiting"]) == (1, waiting))
        page.get_by_label("Your message").fill("Hello!")
        page.get_by_label("Your message").press("Enter")
        expect(page.locator("#alert")).to_contain_text("Many people are asking right now")
        assert page.locator(".bubble").all_inner_texts() == ["Hello!"]
        for stream in holding:
            stream.cancel()
        until(lambda: not stack.stats()["running"])
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#tools")).to_be_visible()
        expect(page.locator("#alert")).to_be_hidden()
        site.end()


@contextmanager
def without_supervisor(stack: Stack) -> Iterator[None]:
    supervisor = psutil.Process(stack.process.pid)
    supervisor.suspend()
    try:
        yield
    finally:
        supervisor.resume()


def test_an_engine_that_dies_mid_stream_is_told_and_asked_again(
    live: Site, stack: Stack, open_page: Callable[..., Any]
) -> None:
    page = open_page(live.address)
    page.get_by_label("Where are you?").fill(SCENE)
    page.get_by_label("Put the base model beside it").check()
    page.get_by_role("button", name="Coin a word").click()
    expect(page.locator("#before-text")).not_to_be_empty()
    with without_supervisor(stack):  # nobody brings the engine back while the page is looked at
        stack.managed("engine").kill()
        expect(page.locator("#alert")).to_contain_text("The model is not available at the moment")
        assert page.locator("#before-text").inner_text()  # what came is still there
        assert page.get_by_label("Where are you?").input_value() == SCENE
        assert violations(page) == []
        expect(page.locator("#status")).to_have_text("Model away")
    expect(page.locator("#status")).to_have_text("Model ready")
    page.get_by_role("button", name="Try again").click()
    assert coined(page)
    expect(page.locator("#alert")).to_be_hidden()


def test_a_site_that_is_killed_takes_the_server_it_started_with_it(tiny_base: Path, tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "serve", tiny_base, tmp_path)
    ports = dict(zip(("http", "grpc", "metrics", "gateway"), free_ports(4), strict=True))
    words = " ".join(f"{name}_port={port}" for name, port in ports.items())
    # The project's own Makefile would serve what was trained here, at ports that may be taken.
    (tmp_path / "Makefile").write_text(
        f"serve:\n\t@{SERVING_PYTHON} -m commands.serve folder={tmp_path}/serve {words}\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/make").write_text(f'#!/bin/sh\nexec {shutil.which("make")} -f {tmp_path}/Makefile "$@"\n')
    (tmp_path / "bin/make").chmod(0o755)

    def ours() -> list[str]:
        found = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        return [" ".join(words) for words in found if any(str(tmp_path) in word for word in words)]

    site = Site(tmp_path, f"triton=127.0.0.1:{ports['grpc']}", alone=False, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    site.wait()
    until(lambda: site.ask("GET", "/api/status").json()["ready"])
    assert len(ours()) > 5
    site.kill()
    until(lambda: not ours())


def test_the_page_of_runs_shows_what_is_served(live: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(f"{live.address}/runs")
    expect(page.locator(".model")).to_have_count(3)
    assert "run-of-slang" in page.locator(".model", has_text="slang").first.inner_text()
    assert violations(page) == []
