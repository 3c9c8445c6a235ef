"""The three attempts of the first slang generator (nemo_configs/experiment/attempt*.yaml), laid side by side.

    python -m benchmarks.attempts task.data.source=all_slangs.csv      (what `make attempts SOURCE=…` calls)

Writes benchmarks/results/attempts.json and docs/attempts.md; see benchmarks/trained.py. Takes any key of the
configuration.
"""

from benchmarks.trained import measure
from core.configuration import load_config
from core.errors import run


def main(argv: list[str]) -> None:
    load_config(["task=slang", *argv])  # which knows --help
    attempts = (f"attempt{number}" for number in (1, 2, 3))
    measure("attempts", {name: ["task=slang", f"+experiment={name}", *argv] for name in attempts}, argv)


if __name__ == "__main__":
    run(main)
