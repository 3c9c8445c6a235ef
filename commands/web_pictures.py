"""The pictures of the README, of a site that runs: `make web` in one terminal, `make web-pictures` in another.

    python -m commands.web_pictures [site=http://127.0.0.1:8080]

docs/web.png is the slang page on a desktop, base model beside the terms of the fine-tuned one; docs/web-phone.png the
page of reviews on a phone. Both show what the model said, to the seed below.
"""

import os
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Error, expect, sync_playwright
from pydantic import Field

from core.arguments import Arguments, parse
from core.errors import UserError, run

FIXED_SEED = "crypto.getRandomValues = (numbers) => numbers.fill(6)"  # half of it is the seed
PATIENCE = 120_000  # milliseconds for an answer


class Options(Arguments):
    site: str = Field("http://127.0.0.1:8080", description="address of the running site")


def main(argv: list[str]) -> None:
    site = parse(Options, argv).site
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        # Debian's, where there is one; otherwise the one of `playwright install chromium`.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=browser_options())
        try:
            slang(browser, site, Path("docs/web.png"))
            reviews(browser, site, Path("docs/web-phone.png"))
        except (Error, AssertionError) as error:
            raise UserError(f"{site}: {str(error).splitlines()[0]}. Is the site running? make web") from None


def browser_options() -> list[str]:
    """Chromium's sandbox cannot be had by root, as in most containers."""
    return ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]


def slang(browser: Browser, site: str, file: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 1240}, device_scale_factor=1.5)
    page.add_init_script(FIXED_SEED)
    page.goto(site)
    page.get_by_label("Where are you?").fill(
        "Your phone dies at two percent, right when the best part of the concert begins."
    )
    page.get_by_label("Put the base model beside it").check()
    page.get_by_role("button", name="Coin a word").click()  # a shared link would show one term, without a choice
    page.mouse.move(0, 0)
    expect(page.locator("#tools")).to_be_visible()
    expect(page.locator("#status[data-state=ready]")).to_be_visible()
    page.screenshot(path=file, animations="disabled")
    print(file)


def reviews(browser: Browser, site: str, file: Path) -> None:
    page = browser.new_page(
        viewport={"width": 390, "height": 844},
        device_scale_factor=2,
        is_mobile=True,
        has_touch=True,
        color_scheme="dark",
    )
    page.add_init_script(FIXED_SEED)
    page.goto(f"{site}/reviews")
    page.get_by_label("Your question").fill("What do viewers say about the games?")
    page.get_by_label("Your question").press("Enter")
    expect(page.locator(".evidence")).to_be_visible()
    page.get_by_label("Your question").blur()
    page.wait_for_timeout(800)  # the page scrolls to the answer
    page.screenshot(path=file, animations="disabled")
    print(file)


if __name__ == "__main__":
    run(main)
