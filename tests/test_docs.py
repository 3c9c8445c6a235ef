"""Pages quote figures that commands measured, link what exists, and stay as short as they promise."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import ROOT

from benchmarks import diagrams, figures

QUOTING = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*QUOTING, *sorted((ROOT / "examples").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: page.name)
def test_every_figure_is_what_its_result_file_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == figures.render(text), f"{page.name} is out of date: make docs"


def test_a_figure_that_differs_is_noticed() -> None:
    right = figures.render("<!--figure serve-speedup-8-->0<!--/figure-->")
    assert re.fullmatch(r"<!--figure serve-speedup-8-->[1-9]\d*<!--/figure-->", right)
    with pytest.raises(KeyError):
        figures.render("<!--figure nothing-->1<!--/figure-->")


def test_no_mark_begins_a_line_of_text() -> None:
    """Markdown would take that line for HTML and end the paragraph; a mark around a table stands alone."""
    for page in QUOTING:
        for line in page.read_text(encoding="utf-8").splitlines():
            assert re.fullmatch(r"<!--/?figure[ \w-]*-->", line) or not line.startswith(("<!--figure", "<!--/figure"))


def test_every_figure_is_quoted_somewhere() -> None:
    quoted = {mark[1] for page in QUOTING for mark in figures.MARK.finditer(page.read_text(encoding="utf-8"))}
    assert quoted == set(figures.FIGURES)


@pytest.mark.parametrize(
    ("name", "title", "rows"),
    [
        ("path-of-a-row.svg", "The path of a row", diagrams.ROW),
        ("path-of-a-request.svg", "The path of a request", diagrams.REQUEST),
    ],
)
def test_pictures_are_those_the_command_draws(name: str, title: str, rows: list[list[diagrams.Box]]) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == diagrams.svg(title, rows), "out of date: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_every_form_of_the_kernels_is_in_the_table_of_processors() -> None:
    forms = re.findall(r'^    return "([^"]+)";$', (ROOT / "training/kernels.c").read_text(), re.MULTILINE)
    table = (ROOT / "docs/training.md").read_text().partition("## Which arithmetic runs where")[2].partition("\n## ")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("|")]
    named = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell) if name != "training/kernels.c"]
    assert len(forms) > 6 and sorted(named) == sorted([*forms, "none"])
