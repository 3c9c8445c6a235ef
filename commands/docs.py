"""Make every generated part of README.md and docs/ again: figures, pictures, references.

    python -m commands.docs                 (what `make docs` calls)

Benchmarks write their own pages when they are measured; nothing is measured here.
"""

from benchmarks.diagrams import write_diagrams
from benchmarks.figures import refresh
from core.arguments import Arguments, parse
from core.errors import run


def main(argv: list[str]) -> None:
    parse(Arguments, argv)
    print("\n".join(refresh()))
    write_diagrams()


if __name__ == "__main__":
    run(main)
