"""Sites in processes of their own, and Chromium to look at them: what the tests of the website share."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import PATIENCE, ROOT
from tiny_serving import SERVING_PYTHON, free_ports, is_open

from core.configuration import load_config, names
from data_prep.prepare import prepare

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from axe_playwright_python.sync_playwright import Axe  # noqa: E402

PAYLOADS = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</textarea><svg onload=document.title='owned'>",
)
expect = sync_api.expect
expect.set_options(timeout=1000 * PATIENCE)


class Site:
    """A site of its own, in a process; what it prints is in `log`."""

    def __init__(self, folder: Path, *words: str, alone: bool = True, **environment: str) -> None:
        (self.port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{self.port}"
        self.storage, self.log = folder / "kept", folder / "log"
        folders = [f"runs={folder}/runs", f"data={folder}/data", f"storage={self.storage}"]
        self._client = httpx.Client(timeout=PATIENCE)
        self._process = subprocess.Popen(
            [SERVING_PYTHON, "-m", "commands.web", *["alone=true"] * alone, f"port={self.port}", *folders, *words],
            cwd=ROOT,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )

    def wait(self) -> "Site":
        while not is_open(self.port):
            assert self._process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return self

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """As a page of the site does, unless `headers` say otherwise."""
        self._client.cookies.clear()
        self._client.cookies.update(options.pop("cookies", {}))
        return self._client.request(method, self.address + path, **{"headers": {"origin": self.address}, **options})

    def kill(self) -> None:
        self._client.close()
        self._process.kill()
        self._process.wait(PATIENCE)

    def end(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(PATIENCE)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `make data` leaves for the pages, and runs: a good one, and one with an attacker's report."""
    folder = tmp_path_factory.mktemp("web")
    if "squid_game" in names("task"):
        # A third of the reviews: to read what they say takes a model.
        lines = (ROOT / "tasks/reviews/squid_game_reviews.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "reviews.csv").write_text("".join(lines[:61]), encoding="utf-8")
        words = ["task=squid_game", "trainer=cpu", f"task.data.source={folder}/reviews.csv"]
        prepare(load_config([*words, f"data_dir={folder}/data/squid_game"]), None)
    for name, report in (("good", "<h1>A report</h1>"), ("bad", f"<title>report</title>{PAYLOADS[0]}")):
        run = folder / "runs/slang" / name
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
    (folder / "runs/slang/half").mkdir()
    (folder / "runs/slang/half/report.html").write_text("of a run that is not finished")
    (folder / "secret.html").write_text("not for the internet")
    return folder


@pytest.fixture(scope="module")
def site(house: Path) -> Iterator[Site]:
    """An open site without a model behind it."""
    site = Site(house, f"triton=127.0.0.1:{free_ports(1)[0]}")
    yield site.wait()
    site.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        program = shutil.which("chromium") or playwright.chromium.executable_path
        if not Path(program).exists():
            pytest.skip("no Chromium: apt-get install chromium, or .venv/bin/playwright install chromium")
        options = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        browser = playwright.chromium.launch(executable_path=program, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages; whatever they report as an error, in the console or as an exception, fails the test at its end."""
    contexts, errors = [], []

    def open_page(url: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(1000 * PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.errors = errors
        # Chromium itself notes each refused request; those are what some tests are about.
        page.on(
            "console",
            lambda said: (
                said.type == "error" and "Failed to load resource" not in said.text and errors.append(said.text)
            ),
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def violations(page: Any) -> list[str]:
    """What axe finds that is serious: which rule, where."""
    expect(page.locator("#toast")).to_be_hidden()  # half faded away, its letters are pale
    found = Axe().run(page).response["violations"]
    return [
        f"{page.url} {one['id']}: {node['target']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
