"""Make every generated part of README.md and docs/ again: figures, pictures, references.

    python -m commands.docs                 (what `make docs` calls)

Benchmarks write their own pages when they are measured; nothing is measured here.
"""

from benchmarks.diagrams import write_diagrams
from benchmarks.figures import pages, render
from core.errors import run
from core.files import write_whole


def main(words: list[str]) -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (made := render(text)) != text:
            write_whole(page, made)
            print(page.name)
    write_diagrams()


if __name__ == "__main__":
    run(main)
