"""The website without a model: pages, their weight and speed, accessibility, what is refused, and the dictionary.

As a visitor sees it in Chromium, and as an attacker over plain HTTP. test_web_live.py has the model.
"""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT
from tiny_serving import SERVING_PYTHON, free_ports
from website import PAYLOADS, Site, expect, needs_serving, violations

from core.configuration import load_config
from data_prep.prepare import prepare
from serving.web.answers import _Shown
from serving.web.dictionary import COLUMNS, Dictionary, Entry, csv_of
from serving.web.evidence import Reviews
from serving.web.guard import SignIn
from serving.web.tasks import task_config

pytest_plugins = ("website",)
pytestmark = needs_serving
PAGES = ("/", "/reviews", "/chat", "/runs", "/privacy")
PASSWORD = "correct horse"
WORD = Entry(
    "plot armor", "What keeps you safe in a story.", "He slept through the exam. Plot armor.", "A friend always wins."
)


@pytest.fixture(scope="module")
def folder(house: Path) -> Path:
    """A house with runs: a good one, and one whose report an attacker wrote."""
    for name, report in (("good", "<h1>A report</h1>"), ("bad", f"<title>report</title>{PAYLOADS[0]}")):
        run = house / "runs/slang" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(
            "task: {name: slang, train: {epochs: 3}}\nmodel: {name: gemma-3-270m}\npeft: {name: lora, r: 8}\nseed: 0\n"
        )
        found = {
            "held_out_rows": 38,
            "before": {"loss": 3.786, "perplexity": 44.08},
            "after": {"loss": 2.813, "perplexity": 16.66},
        }
        (run / "evaluation.json").write_text(json.dumps(found))
        (run / "report.html").write_text(report)
    (house / "runs/slang/half").mkdir()
    (house / "runs/slang/half/report.html").write_text("of a run that is not finished")
    (house / "secret.html").write_text("not for the internet")
    return house


@pytest.fixture(scope="module")
def sites(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Site]]:
    """Two without a model: an open one, and one with a password that keeps it clean."""
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    sites = (
        Site(folder, "--triton", nobody),
        Site(tmp_path_factory.mktemp("guarded"), "--triton", nobody, "--clean", WEB_PASSWORD=PASSWORD),
    )
    yield sites[0].wait(), sites[1].wait()
    for site in sites:
        site.end()


@pytest.fixture(scope="module")
def site(sites: tuple[Site, Site]) -> Site:
    return sites[0]


@pytest.fixture(scope="module")
def guarded(sites: tuple[Site, Site]) -> Site:
    return sites[1]


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


@pytest.mark.parametrize("path", [*PAGES, "/health", "/robots.txt", "/static/slang.js", "/dictionary.csv", "/nothing"])
def test_head_tells_what_get_would_bring(site: Site, path: str) -> None:
    head, whole = site.ask("HEAD", path), site.ask("GET", path)
    assert head.status_code == whole.status_code == (404 if path == "/nothing" else 200)
    assert head.content == b"" != whole.content
    told = [{name: value for name, value in answer.headers.items() if name != "date"} for answer in (head, whole)]
    assert told[0] == told[1] and told[0]["content-type"]


def first_paint(page: Any) -> float:
    """Milliseconds from the click to the first content."""
    entry = "performance.getEntriesByName('first-contentful-paint')[0]"
    page.wait_for_function(f"{entry} !== undefined")
    return float(page.evaluate(f"{entry}.startTime"))


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


def test_without_a_model_the_page_says_so_and_keeps_what_was_typed(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.address)
    expect(page.locator("#status")).to_have_text("Model away")
    page.get_by_label("Where are you?").fill("A quiet library.")
    page.get_by_role("button", name="Coin a word").click()
    expect(page.locator("#alert")).to_contain_text("The model is not there at the moment")
    assert page.get_by_label("Where are you?").input_value() == "A quiet library."
    with page.expect_request("**/api/answer") as asked:
        page.get_by_role("button", name="Try again").click()
    assert asked.value.post_data_json["fields"]["context"] == "A quiet library."


@pytest.mark.parametrize("path", [*PAGES, "/static/site.js", "/api/dictionary", "/nowhere"])
def test_every_response_has_a_strict_policy(site: Site, path: str) -> None:
    headers = site.ask("GET", path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize(
    "method,path",
    [
        ("POST", "/api/answer"),
        ("POST", "/api/dictionary"),
        ("PUT", "/api/dictionary/1"),
        ("DELETE", "/api/dictionary/1"),
    ],
)
@pytest.mark.parametrize("origin", ["", "null", "https://evil.example", "http://127.0.0.1:1"])
def test_a_change_that_comes_from_another_site_is_refused(site: Site, method: str, path: str, origin: str) -> None:
    assert site.ask(method, path, headers={"origin": origin}, json={}).status_code == 403


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
    assert site.ask("POST", "/api/evidence", content=b" " * 2**20).status_code == 413
    assert site.ask("POST", "/api/evidence", content=chunks).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/runs/slang/..%2f..%2f/report.html",
        "/runs/..%2f/good/report.html",
        "/runs/slang/half/report.html",
        "/runs/%2e%2e/%2e%2e/report.html",
        "/static/..%2f..%2fapp.py",
        "/static/%2e%2e/app.py",
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
    assert opened.value.title() == "report"
    assert "sandbox" in site.ask("GET", "/runs/slang/good/report.html").headers["content-security-policy"]


def test_kept_words_are_found_voted_on_and_removed(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.address)
    others = [Entry(f"word {number}", "A meaning.", "", "") for number in range(3)]
    for entry in (*others, WORD):
        page.request.post(
            f"{site.address}/api/dictionary", data={"token": site.token(entry)}, headers={"origin": site.address}
        )
    page.reload()
    entries = page.locator("#entries li")
    expect(entries).to_have_count(4)
    page.get_by_role("searchbox").fill("ARMOR exam")
    expect(entries).to_have_count(1)
    entries.get_by_role("button", name="Thumbs up").click()
    expect(entries.get_by_role("button", name="Thumbs up")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("searchbox").fill("word 1")
    expect(entries).to_contain_text(["word 1"])
    entries.get_by_role("button", name="Thumbs down").click()
    expect(entries).to_have_class(re.compile("down"))
    page.get_by_role("searchbox").fill("word 2")
    expect(entries).to_contain_text(["word 2"])
    entries.get_by_role("button", name="Remove").click()
    expect(entries).to_have_text(["Nothing of that kind is in it."])
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    rows = list(csv.DictReader(download.value.path().open(encoding="utf-8", newline="")))
    assert [row["Slang"] for row in rows] == ["word 0", "plot armor"]  # neither voted down nor removed
    assert open_page(site.address).locator("#entries li").count() == 0  # another visitor's is empty


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_the_dictionary_is_text(site: Site, open_page: Callable[..., Any], payload: str) -> None:
    page = open_page(site.address)
    page.request.post(
        f"{site.address}/api/dictionary",
        headers={"origin": site.address},
        data={"token": site.token(Entry(payload, payload, payload, payload))},
    )
    page.reload()
    expect(page.locator("#entries .term")).to_have_text([payload])
    assert page.title() == "Slang · Own Gemma"


def test_a_link_cannot_bring_markup_or_settings_that_do_not_exist(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(f"{site.address}/#seed=99999999999&context=never asked")
    assert page.get_by_label("Where are you?").input_value() != "never asked"
    link = httpx.QueryParams({"seed": 1, "creativity": 99, "context": PAYLOADS[2], "run": PAYLOADS[1]})
    with page.expect_request("**/api/answer") as asked:
        page.goto(f"{site.address}/#{link}")
    assert asked.value.post_data_json["temperature"] == 1.5
    assert page.get_by_label("Where are you?").input_value() == PAYLOADS[2]
    assert page.title() == "Slang · Own Gemma"


def test_only_what_the_model_said_can_be_kept(site: Site) -> None:
    token = site.token(WORD)
    forged = ("A" if token[0] != "A" else "B") + token[1:]
    for text in (forged, "", "é", "AAAA"):
        assert site.ask("POST", "/api/dictionary", json={"token": text}).status_code == 400
    kept = site.ask("POST", "/api/dictionary", json={"token": token})
    assert kept.status_code == 200 and "HttpOnly; " in kept.headers["set-cookie"]
    assert "SameSite=lax" in kept.headers["set-cookie"]
    number = kept.json()["id"]  # of somebody else, for whoever has no cookie
    assert site.ask("DELETE", f"/api/dictionary/{number}").status_code == 404
    assert site.ask("PUT", f"/api/dictionary/{10**30}", json={"thumb": 1}).status_code == 422


def test_exported_words_become_training_rows(tmp_path: Path) -> None:
    """The loop: what visitors kept is what data preparation reads, cell by cell."""
    with (ROOT / "tasks/slang/slang.csv").open(encoding="utf-8", newline="") as file:
        kept = [Entry(*(row[name] for name in COLUMNS)) for row in islice(csv.DictReader(file), 60)]
    store = Dictionary(tmp_path / "d.sqlite3")
    for entry in kept:
        store.keep("a", entry, 0)
    store.keep("b", kept[0], 1)  # somebody else kept it too
    store.keep("b", Entry("no good", "Voted down.", "", ""), -1)
    out = tmp_path / "kept.csv"
    said = subprocess.run(
        [sys.executable, "-m", "serving.web.dictionary", str(out), str(tmp_path / "d.sqlite3")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "60 rows" in said.stdout
    config = load_config(["task=slang", "trainer=cpu", f"task.data.source={out}", f"data_dir={tmp_path}/data"])
    data = prepare(config, None)
    learned = {
        json.loads(line)["output"]
        for split in ("training", "validation", "test")
        for line in (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    }
    for entry in kept:
        assert f"Slang: {entry.slang}\nDefinition: {entry.description}\nExample: {entry.example}" in learned
    manifest = json.loads((data / "manifest.json").read_text())
    assert (manifest["rows_in"], manifest["rows_out"], manifest["dropped"]) == (60, 60, {})


def test_a_formula_in_the_csv_is_text_to_a_spreadsheet() -> None:
    assert csv_of([Entry('=HYPERLINK("http://evil")', "+1", "-", "@a")]).splitlines()[1] == (
        '"\'=HYPERLINK(""http://evil"")",\'+1,\'-,\'@a'
    )


def test_the_reviews_behind_an_answer_are_those_that_name_its_aspect(folder: Path) -> None:
    reviews = Reviews(folder / "data/squid_game", task_config("squid_game")["data"]["reviews"])
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
    for line in (folder / "data/squid_game/training.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for quote in reviews.behind(row["input"], row["output"])["quotes"]:
            assert set(quote["reviews"]) & set(row["quoted"]), quote
    assert reviews.behind("Who wrote Hamlet?", "The reviews do not say.")["aspects"] == []


def test_the_picture_of_aspects_and_bars_are_those_of_the_data(
    site: Site, open_page: Callable[..., Any], folder: Path
) -> None:
    known = json.loads((folder / "data/squid_game/knowledge.json").read_text())["aspects"][0]
    page = open_page(f"{site.address}/reviews")
    said = page.locator(".aspect").first.get_attribute("aria-label")
    assert said.startswith(f"{known['name']}: criticised by {known['unfavourable'] + known['both']}, ")
    picture = site.ask("GET", "/reviews/aspects.svg")
    assert picture.headers["content-type"].startswith("image/svg")
    assert "sandbox" in picture.headers["content-security-policy"]


def test_the_password_is_asked_everywhere_and_remembered(guarded: Site, open_page: Callable[..., Any]) -> None:
    assert guarded.ask("GET", "/api/dictionary").status_code == 401
    assert guarded.ask("GET", "/runs/slang/good/report.html").headers["location"].startswith("/sign-in")
    assert guarded.ask("GET", "/", headers={"cookie": "session=9999999999.00"}).status_code == 303
    page = open_page(f"{guarded.address}/chat")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Enter").click()
    expect(page.get_by_role("alert")).to_have_text("That is not the password.")
    assert violations(page) == []
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Enter").click()
    page.wait_for_url("**/chat")
    (cookie,) = [cookie for cookie in page.context.cookies() if cookie["name"] == "session"]
    assert cookie["httpOnly"] and cookie["sameSite"] == "Lax"
    assert PASSWORD not in guarded.log.read_text()
    elsewhere = {"password": PASSWORD, "next": "//evil.example"}
    assert guarded.ask("POST", "/sign-in", data=elsewhere).headers["location"] == "/"


def test_passwords_cannot_be_guessed_fast(guarded: Site) -> None:
    codes = [guarded.ask("POST", "/sign-in", data={"password": str(number)}).status_code for number in range(8)]
    assert codes[-1] == 429


def test_explicit_words_of_a_model_are_masked_before_they_are_shown() -> None:
    shown = _Shown(clean=True)
    parts = ["Well, ", "what a ", "mother", "fucker", " that ", "is, and ", "all of ", "it goes ", "on and ", "on."]
    seen = [shown.add(part) for part in parts] + [shown.rest()]
    assert "".join(seen) == "Well, what a •••••••••••• that is, and all of it goes on and on."
    assert not any("mother" in part for part in seen) and any(seen[:-1])


def test_explicit_questions_are_refused_where_the_operator_wants_it_clean(guarded: Site, site: Site) -> None:
    cookie = {"session": signed_in(guarded)}
    question = {"adapter": "slang", "fields": {"context": "A motherfucker walks in."}, "seed": 1}
    assert "keeps it clean" in guarded.ask("POST", "/api/answer", json=question, cookies=cookie).text
    assert "keeps it clean" not in site.ask("POST", "/api/answer", json=question, timeout=30).text


def signed_in(site: Site) -> str:
    """The cookie of somebody who knows the password, made as the site makes it, which may have had enough for now."""
    return SignIn(None, PASSWORD, Dictionary(site.database).key).cookie()


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
    site.ask("POST", "/api/answer", json=question, timeout=30)
    site.ask("GET", "/api/dictionary?q=hush-search")
    log = site.log.read_text()
    assert "POST /api/answer 200" in log and "GET /api/dictionary 200" in log and "hush" not in log


def test_a_port_that_is_taken_is_an_error_in_words(site: Site, tmp_path: Path) -> None:
    words = ["--alone", "--port", str(site.port), "--database", str(tmp_path / "d")]
    other = subprocess.run([SERVING_PYTHON, "-m", "commands.web", *words], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and "--port" in other.stderr and "Traceback" not in other.stderr
