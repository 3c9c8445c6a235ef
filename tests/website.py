"""Sites in processes of their own, and Chromium to look at them: what the tests of the website share."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT
from tiny_serving import SERVING_PYTHON, free_ports

from core.configuration import load_config
from data_prep.prepare import prepare
from serving.web.dictionary import Dictionary, Entry

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from axe_playwright_python.sync_playwright import Axe  # noqa: E402

PAYLOADS = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</textarea><svg onload=document.title='owned'>",
)
needs_serving = pytest.mark.skipif(not SERVING_PYTHON.exists(), reason="needs the serving environment: make serve-env")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # on a busy machine


class Site:
    """A site of its own, in a process; what it prints is in `log`."""

    def __init__(self, folder: Path, *words: str, alone: bool = True, **environment: str) -> None:
        (self.port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{self.port}"
        self.database, self.log = folder / "dictionary.sqlite3", folder / "log"
        folders = ["--runs", str(folder / "runs"), "--data", str(folder / "data"), "--database", str(self.database)]
        self._client = httpx.Client()
        self._process = subprocess.Popen(
            [SERVING_PYTHON, "-m", "commands.web", *["--alone"] * alone, "--port", str(self.port), *folders, *words],
            cwd=ROOT,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )

    def wait(self) -> "Site":
        for _ in range(600):
            try:
                httpx.get(f"{self.address}/health")
                return self
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """As a page of the site does, unless `headers` say otherwise."""
        self._client.cookies.clear()
        self._client.cookies.update(options.pop("cookies", {}))
        return self._client.request(method, self.address + path, **{"headers": {"origin": self.address}, **options})

    def token(self, entry: Entry) -> str:
        """What the site signs when its model has said `entry`."""
        return Dictionary(self.database).token_of(entry)

    def kill(self) -> None:
        self._client.close()
        self._process.kill()
        self._process.wait(20)

    def end(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(20)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/squid_game` as `make data` leaves it."""
    folder = tmp_path_factory.mktemp("web")
    prepare(load_config(["task=squid_game", "trainer=cpu", f"data_dir={folder}/data/squid_game"]), None)
    return folder


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
        context.set_default_timeout(60_000)
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
    found = Axe().run(page).response["violations"]
    return [
        f"{page.url} {one['id']}: {node['target']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
