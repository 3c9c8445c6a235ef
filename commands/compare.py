"""The finished runs of a task in one table: in the terminal, and as `runs/<task>/comparison.html`.

python -m commands.compare task=slang                    (what `make compare TASK=slang RUNS="a b"` calls)
python -m commands.compare task=slang "runs=a b"         only these, by name or folder
"""

from pathlib import Path

from pydantic import Field

from core.arguments import Arguments
from core.configuration import load_config
from core.errors import run
from evaluation.compare_runs import choose, compare, show
from evaluation.plots import draw_comparison
from evaluation.report import write_page


class Options(Arguments):
    runs: str = Field("", description="names or folders of runs, with spaces between them; empty: all finished runs")


def main(argv: list[str]) -> None:
    config, options = load_config(argv, Options)
    comparisons = compare(choose(config, options.runs))
    show(comparisons)
    for comparison in comparisons:
        comparison.plots = draw_comparison(comparison.runs)
    print(
        write_page(
            Path(config.runs_dir) / config.task.name / "comparison.html",
            "comparison.html.j2",
            {"task": config.task.name, "groups": comparisons},
        )
    )


if __name__ == "__main__":
    run(main)
