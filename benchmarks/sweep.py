"""The default task with other ranks, learning rates and epochs: which settings are best?

    python -m benchmarks.sweep                                    (one factor at a time around the default)
    python -m benchmarks.sweep rank=8,16 epochs=3,5               (these values in every combination)
    python -m benchmarks.sweep rate=2e-4,5e-4 task.evaluate.seeds=1

Writes benchmarks/results/sweep.json and its table in docs/attempts.md; see benchmarks/trained.py. lora_alpha keeps its
ratio to the rank. One seed each: what is less than its interval apart may be chance. Takes any key of the
configuration.
"""

from collections.abc import Iterator
from itertools import product
from typing import Annotated

from pydantic import Field, field_validator

from benchmarks.trained import measure
from core.arguments import Arguments
from core.configuration import load_config
from core.errors import run
from core.schema import Config

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AROUND: dict[str, list[float]] = {"rank": [4, 8, 16], "rate": [2e-4, 5e-4, 1e-3], "epochs": [2, 3, 5]}


class Options(Arguments):
    rank: list[Count] = Field([], min_length=1, description="of LoRA; without values it is that of the configuration")
    rate: list[Rate] = Field([], min_length=1, description="highest learning rate; likewise")
    epochs: list[Count] = Field([], min_length=1, description="passes over the training rows; likewise")

    @field_validator("rank", "rate", "epochs")
    @classmethod
    def _once(cls, values: list[float]) -> list[float]:
        if len(set(values)) < len(values):
            raise ValueError("has a value twice")
        return values


def main(argv: list[str]) -> None:
    config, options = load_config(argv, Options)
    others = [word for word in argv if word.partition("=")[0] not in Options.model_fields]
    measure("sweep", {name: [*others, *words] for name, words in combinations(config, options)}, argv)


def combinations(config: Config, options: Options) -> Iterator[tuple[str, list[str]]]:
    """The name and the overrides of each run: of all combinations of the values that were given, or, where none was,
    of the configuration itself and of AROUND's values one at a time."""
    usual = {"rank": config.peft.r, "rate": config.task.train.learning_rate, "epochs": config.task.train.epochs}
    given = {name: values for name in AROUND if (values := getattr(options, name))}
    if given:
        chosen = [usual | dict(zip(given, values, strict=True)) for values in product(*given.values())]
    else:
        others = [(name, value) for name, values in AROUND.items() for value in values if value != usual[name]]
        chosen = [usual, *(usual | {name: value} for name, value in others)]
    for one in chosen:
        alpha = config.peft.lora_alpha * one["rank"] / config.peft.r
        yield (
            f"rank{one['rank']}-rate{one['rate']:g}-epochs{one['epochs']}",
            [
                f"peft.r={one['rank']}",
                f"peft.lora_alpha={alpha:g}",
                f"task.train.learning_rate={one['rate']:g}",
                f"task.train.epochs={one['epochs']}",
            ],
        )


if __name__ == "__main__":
    run(main)
