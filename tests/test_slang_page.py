"""The slang page without a model: what was typed is kept, shared links, and the dictionary up to training rows."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT
from tiny_serving import needs_serving
from website import PAYLOADS, Site, expect

from core.configuration import load_config, plain
from data_prep.formula_cells import plain_cell, spreadsheet_cell
from data_prep.prepare import prepare
from data_prep.read_table import open_table
from serving.client import Adapter
from serving.client.prompt import Prompt
from serving.web.settings import Settings

pytest.importorskip("tasks.slang.page")
from tasks.slang.dictionary import COLUMNS, FILE_NAME, Dictionary, DictionaryEntry, csv_of
from tasks.slang.novelty import FILE
from tasks.slang.page import answered

pytest_plugins = ("website",)
pytestmark = needs_serving
WORD = DictionaryEntry(
    "plot armor", "What keeps you safe in a story.", "He slept through the exam. Plot armor.", "A friend always wins."
)


def token(site: Site, entry: DictionaryEntry) -> str:
    """What the site signs when its model has said `entry`."""
    return Dictionary(site.storage / FILE_NAME).token_of(entry)


@pytest.mark.slow
def test_without_a_model_the_page_says_so_and_keeps_what_was_typed(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.address)
    expect(page.locator("#status")).to_have_text("Model away")
    page.get_by_label("Where are you?").fill("A quiet library.")
    page.get_by_role("button", name="Coin a word").click()
    expect(page.locator("#alert")).to_contain_text("The model is not available at the moment")
    assert page.get_by_label("Where are you?").input_value() == "A quiet library."
    with page.expect_request("**/api/answer") as asked:
        page.get_by_role("button", name="Try again").click()
    assert asked.value.post_data_json["fields"]["context"] == "A quiet library."


def test_kept_words_are_found_voted_on_and_removed(site: Site, open_page: Callable[..., Any]) -> None:
    page = open_page(site.address)
    others = [DictionaryEntry(f"word {number}", "A meaning.", "", "") for number in range(3)]
    for entry in (*others, WORD):
        page.request.post(
            f"{site.address}/api/dictionary", data={"token": token(site, entry)}, headers={"origin": site.address}
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
        data={"token": token(site, DictionaryEntry(payload, payload, payload, payload))},
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


def test_below_an_answer_stands_whether_its_term_is_new(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "slang" / "a-run"
    run.mkdir(parents=True)
    (run / FILE).write_text("bussin\n")
    settings = Settings(runs=tmp_path / "runs", storage=tmp_path / "web")
    prompt = Prompt(**plain(load_config(["task=slang"]).task.prompt))
    asked = {**prompt.fields, "context": "You missed the last bus home."}

    def not_new(term: str, run: str = "a-run") -> str | None:
        adapter = Adapter("slang", "Slang", prompt, {}, False, "", "context", run)
        return answered(settings, adapter, asked, {"slang": term, "description": "Style."})["not_new"]

    assert [not_new(term) for term in ("quizpad", "Bussin'", "bus home", "ramen")] == [
        "",
        "known slang",
        "words of the question",
        "already a word",
    ]
    for elsewhere in ("another-run", "../slang/../../secret", ""):
        assert not_new("quizpad", elsewhere) is None
    adapter = Adapter("slang", "Slang", prompt, {}, False, "", "context", "a-run")
    assert answered(settings, adapter, asked, {"slang": "quizpad"}) == {"keep": None, "not_new": None}


def test_only_what_the_model_said_can_be_kept(site: Site) -> None:
    signed = token(site, WORD)
    forged = ("A" if signed[0] != "A" else "B") + signed[1:]
    for text in (forged, "", "é", "AAAA"):
        assert site.ask("POST", "/api/dictionary", json={"token": text}).status_code == 400
    kept = site.ask("POST", "/api/dictionary", json={"token": signed})
    assert kept.status_code == 200 and "HttpOnly; " in kept.headers["set-cookie"]
    assert "SameSite=lax" in kept.headers["set-cookie"]
    number = kept.json()["id"]  # of somebody else, for whoever has no cookie
    assert site.ask("DELETE", f"/api/dictionary/{number}").status_code == 404
    assert site.ask("PUT", f"/api/dictionary/{10**30}", json={"thumb": 1}).status_code == 422


def test_exported_words_become_training_rows(tmp_path: Path) -> None:
    """The loop: what visitors kept is what data preparation reads, cell by cell."""
    with (ROOT / "tasks/slang/slang.csv").open(encoding="utf-8", newline="") as file:
        kept = [DictionaryEntry(*(row[name] for name in COLUMNS)) for row in islice(csv.DictReader(file), 60)]
    for place, hostile in enumerate(("-maxxing", "'=cap", "@me, not you", "+1 energy")):
        kept[place] = replace(kept[place], slang=hostile)
    store = Dictionary(tmp_path / "d.sqlite3")
    for entry in kept:
        store.keep("a", entry, 0)
    store.keep("b", kept[0], 1)  # somebody else kept it too
    store.keep("b", DictionaryEntry("no good", "Voted down.", "", ""), -1)
    out = tmp_path / "kept.csv"
    said = subprocess.run(
        [sys.executable, "-m", "tasks.slang.dictionary", str(out), str(tmp_path / "d.sqlite3")],
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
    cells = csv_of([DictionaryEntry('=HYPERLINK("http://evil")', "+1", "-", "@a")], spreadsheet_cell)
    assert cells.splitlines()[1] == '"\'=HYPERLINK(""http://evil"")",\'+1,\'-,\'@a'
    assert "'" not in csv_of([DictionaryEntry("-maxxing", "=1", "+1", "@a")], plain_cell)


@pytest.mark.parametrize("as_cell", [plain_cell, spreadsheet_cell])
def test_hostile_terms_come_back_from_the_csv_as_they_were(as_cell: Callable[[str], str], tmp_path: Path) -> None:
    terms = [
        *(before + sign + rest for before in ("", "'", "''", '"') for sign in "=+-@\t\r" for rest in ("maxxing", "")),
        *("'tis", "'", "''", "it's -giving", "-in'", "'-in'", "a,b;c|d", '"""', "-two\nlines", "=1\r\n+1", "’-x"),
    ]
    file = tmp_path / "kept.csv"
    file.write_text(csv_of([DictionaryEntry(term, "m", term, "") for term in terms], as_cell), encoding="utf-8")
    table = open_table(file, {"slang": ["slang"], "example": ["example"]}, ["slang"])
    assert [row.cells for row in table.rows] == [[term, term] for term in terms]
    table.close()


@pytest.mark.parametrize(("method", "path"), [("POST", ""), ("PUT", "/1"), ("DELETE", "/1")])
def test_a_change_of_the_dictionary_that_comes_from_another_site_is_refused(site: Site, method: str, path: str) -> None:
    for origin in ("", "https://evil.example"):
        assert site.ask(method, f"/api/dictionary{path}", headers={"origin": origin}, json={}).status_code == 403


def test_the_csv_is_not_for_search_engines_and_nothing_searched_for_is_logged(site: Site) -> None:
    head, whole = (site.ask(method, "/dictionary.csv") for method in ("HEAD", "GET"))
    assert head.status_code == whole.status_code == 200 and whole.headers["x-robots-tag"] == "noindex"
    site.ask("GET", "/api/dictionary?q=hush-search")
    log = site.log.read_text()
    assert "GET /api/dictionary 200" in log and "hush" not in log
