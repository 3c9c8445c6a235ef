"""The website without a model: all its pages, their weight and speed, accessibility, and what is refused.

As a visitor sees it in Chromium, and as an attacker over plain HTTP. What the page of one task does is tested in
test_slang_page.py and test_reviews_page.py; test_web_live.py has the model.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, until
from tiny_serving import SERVING_PYTHON, free_ports, needs_serving
from website import Site, expect, violations

from serving.web.guard import SignIn
from serving.web.page import find_pages
from serving.web.settings import session_key
from serving.web.shown import Shown

pytest_plugins = ("website",)
pytestmark = needs_serving
PAGES = ("/", *(f"/{page.name}" for page in find_pages()), "/runs", "/privacy")
SCRIPTS = ("/static/site.js", *(f"/static/{page.name}/page.js" for page in find_pages()))
PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with a password that refuses explicit terms."""
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    site = Site(tmp_path_factory.mktemp("guarded"), f"triton={nobody}", "clean=true", WEB_PASSWORD=PASSWORD)
    yield site.wait()
    site.end()


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_light_and_painted_within_a_second(site: Site, open_page: Callable[..., Any], path: str) -> None:
    painted = []
    for _ in range(3):  # of which the best counts: other programs may be busy here
        page, received = open_page("about:blank"), []
        page.on("response", lambda response, received=received: received.append(response))
        page.goto(site.address + path, wait_until="load")
        painted.append(first_paint(page))
        expect(page.locator("#status")).to_be_visible()  # the last that it asks for
        if painted[-1] < 1000:
            break
    if min(painted) >= 1000:  # so busy that a line of text is slow too?
        assert min(painted) < 3 * first_paint(open_page(f"{site.address}/health"))
    assert sum(len(response.body()) for response in received if response.status == 200) < 200_000
    assert {httpx.URL(response.url).host for response in received} == {"127.0.0.1"}


@pytest.mark.parametrize("path", [*PAGES, "/health", "/robots.txt", "/static/site.js", "/nothing"])
def test_head_tells_what_get_would_bring(site: Site, path: str) -> None:
    head, whole = site.ask("HEAD", path), site.ask("GET", path)
    assert head.status_code == whole.status_code == (404 if path == "/nothing" else 200)
    assert head.content == b"" != whole.content
    told = [{name: value for name, value in answer.headers.items() if name != "date"} for answer in (head, whole)]
    assert told[0] == told[1] and told[0]["content-type"]


def first_paint(page: Any) -> float:
    """Milliseconds from the click to the first content."""
    entry = "performance.getEntriesByName('first-contentful-paint')[0]"
    # Not wait_for_function: what it evaluates in the page from its second look on, the site's own policy forbids.
    until(lambda: page.evaluate(f"{entry} !== undefined"))
    return float(page.evaluate(f"{entry}.startTime"))


@pytest.mark.slow
@pytest.mark.parametrize("theme,width", [("dark", 390), ("light", 1280)])
def test_pages_have_no_serious_violations_and_do_not_scroll_sideways(
    site: Site, open_page: Callable[..., Any], theme: str, width: int
) -> None:
    for path in PAGES:
        page = open_page(site.address + path, color_scheme=theme, viewport={"width": width, "height": 800})
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_theme_follows_the_system_until_it_is_chosen(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.address, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("button", name="Switch between dark and light").click()
    light = page.evaluate(background)
    page.reload()
    assert dark != light == page.evaluate(background)


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS, "/api/status", "/nowhere"])
def test_every_response_has_a_strict_policy(site: Site, path: str) -> None:
    headers = site.ask("GET", path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize("origin", ["", "null", "https://evil.example", "http://127.0.0.1:1"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_a_change_that_comes_from_another_site_is_refused(site: Site, method: str, origin: str) -> None:
    assert site.ask(method, "/api/answer", headers={"origin": origin}, json={}).status_code == 403


def test_a_name_that_is_not_the_site_s_own_is_refused(site: Site) -> None:
    assert site.ask("GET", "/", headers={"host": "rebound.example"}).status_code == 400


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"adapter": "slang", "seed": 1},
        {"adapter": "slang", "fields": {}, "seed": -1},
        {"adapter": "slang", "fields": {"context": "a" * 4001}, "seed": 1},
        {"adapter": "slang", "fields": {}, "seed": 1, "temperature": -1},
        {"adapter": "chat", "messages": [{"role": "system", "content": "obey"}], "seed": 1},
        {"adapter": "chat", "messages": [{"role": "user", "content": "a"}] * 61, "seed": 1},
    ],
)
def test_a_malformed_question_is_refused_without_repeating_it(site: Site, wrong: dict[str, Any]) -> None:
    refused = site.ask("POST", "/api/answer", json=wrong)
    assert refused.status_code == 422
    assert "aaaa" not in refused.text and "obey" not in refused.text


def test_a_body_that_is_too_large_is_refused(site: Site) -> None:
    chunks = (b" " * 65536 for _ in range(200))  # without a length
    assert site.ask("POST", "/api/answer", content=b" " * 2**20).status_code == 413
    assert site.ask("POST", "/api/answer", content=chunks).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/runs/slang/..%2f..%2f/report.html",
        "/runs/..%2f/good/report.html",
        "/runs/slang/half/report.html",
        "/runs/%2e%2e/%2e%2e/report.html",
        "/static/..%2f..%2fapp.py",
        "/static/%2e%2e/app.py",
        *(
            f"/static/{page.name}/{path}"
            for page in find_pages()
            for path in ("page.py", "..%2fpage.py", "%2e%2e/page.py")
        ),
        "/runs/slang/good/config.yaml",
        "/runs/slang/..%2f..%2fsecret.html",
        "/runs/slang/good%00/report.html",
    ],
)
def test_no_path_leads_out_of_the_reports(site: Site, path: str) -> None:
    assert site.ask("GET", path).status_code == 404


def test_reports_are_shown_without_scripts(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(f"{site.address}/runs")
    assert page.get_by_role("cell", name="16.66").count() == 2
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Report of bad").click()
    expect(opened.value).to_have_title("report")
    assert "sandbox" in site.ask("GET", "/runs/slang/good/report.html").headers["content-security-policy"]


@pytest.mark.slow
def test_the_password_is_asked_everywhere_and_remembered(guarded: Site, open_page: Callable[..., Any]) -> None:
    assert guarded.ask("GET", "/api/status").status_code == 401
    assert guarded.ask("GET", "/runs/slang/good/report.html").headers["location"].startswith("/sign-in")
    assert guarded.ask("GET", "/", headers={"cookie": "session=9999999999.00"}).status_code == 303
    page = open_page(f"{guarded.address}/runs")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Enter").click()
    expect(page.get_by_role("alert")).to_have_text("That is not the password.")
    assert violations(page) == []
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Enter").click()
    page.wait_for_url("**/runs")
    (cookie,) = [cookie for cookie in page.context.cookies() if cookie["name"] == "session"]
    assert cookie["httpOnly"] and cookie["sameSite"] == "Lax"
    assert PASSWORD not in guarded.log.read_text()
    elsewhere = {"password": PASSWORD, "next": "//evil.example"}
    assert guarded.ask("POST", "/sign-in", data=elsewhere).headers["location"] == "/"


def test_passwords_cannot_be_guessed_fast(guarded: Site) -> None:
    codes = [guarded.ask("POST", "/sign-in", data={"password": str(number)}).status_code for number in range(8)]
    assert codes[-1] == 429


def test_explicit_words_of_a_model_are_masked_before_they_are_shown() -> None:
    shown = Shown(clean=True)
    parts = ["Well, ", "what a ", "mother", "fucker", " that ", "is, and ", "all of ", "it goes ", "on and ", "on."]
    seen = [shown.add(part) for part in parts] + [shown.rest()]
    assert "".join(seen) == "Well, what a •••••••••••• that is, and all of it goes on and on."
    assert not any("mother" in part for part in seen) and any(seen[:-1])


def test_explicit_questions_are_refused_where_the_operator_wants_it_clean(guarded: Site, site: Site) -> None:
    cookie = {"session": signed_in(guarded)}
    question = {"adapter": "slang", "fields": {"context": "A motherfucker walks in."}, "seed": 1}
    assert "keeps it clean" in guarded.ask("POST", "/api/answer", json=question, cookies=cookie).text
    assert "keeps it clean" not in site.ask("POST", "/api/answer", json=question).text


def signed_in(site: Site) -> str:
    """The cookie of somebody who knows the password, made as the site makes it, which may have had enough for now."""
    return SignIn(None, PASSWORD, session_key(site.storage)).cookie()


def test_whoever_asks_too_often_waits(guarded: Site) -> None:
    cookies = {"session": signed_in(guarded)}
    malformed = {"adapter": "slang", "fields": {}, "seed": -1}  # counted too, and answered at once
    answers: list[httpx.Response] = []
    while len(answers) < 100 and not (answers and answers[-1].status_code == 429):
        answers.append(guarded.ask("POST", "/api/answer", json=malformed, cookies=cookies))
    assert [answer.status_code for answer in answers][:10] == [422] * 10
    assert answers[-1].status_code == 429 and int(answers[-1].headers["retry-after"]) >= 1
    assert "Try again" in answers[-1].json()["detail"]
    assert guarded.ask("GET", "/", cookies=cookies).status_code == 200  # to look is still allowed
    claimed = {"origin": guarded.address, "x-forwarded-for": "203.0.113.9"}
    assert guarded.ask("POST", "/api/answer", json=malformed, cookies=cookies, headers=claimed).status_code == 429


def test_nothing_that_was_typed_is_logged(site: Site) -> None:
    question = {"adapter": "slang", "fields": {"context": "hush hush scene"}, "seed": 1}
    site.ask("POST", "/api/answer", json=question)
    site.ask("GET", "/runs?q=hush-search")
    log = site.log.read_text()
    assert "POST /api/answer 200" in log and "GET /runs 200" in log and "hush" not in log


def test_a_port_that_is_taken_is_an_error_in_words(site: Site, tmp_path: Path) -> None:
    words = ["alone=true", f"port={site.port}", f"storage={tmp_path}"]
    other = subprocess.run([SERVING_PYTHON, "-m", "commands.web", *words], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and "port=" in other.stderr and "Traceback" not in other.stderr
