"""How often the slang page has a new term to offer, and how long that takes beside a single answer, by number of seeds.

    python -m tasks.slang.measure_choices                      (a server with the task slang has to run: make serve)
    python -m tasks.slang.measure_choices seeds=8,16 scenes=30

The scenes are those that the task's report asks and those of rows that were held out. A scene counts where at least
one term is offered: new by `tasks/slang/novelty.py`, in an answer with all its parts. The run that is served must lie
in `runs/`, or nothing can tell a new term. Seconds are medians over the scenes, asked one after the other, without the
reading of the prompt, which all seeds share: with it, several answers take fewer times as long as one.
"""

import asyncio
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from core.arguments import Arguments, parse
from core.errors import UserError, run
from core.files import read_lines
from core.progress import Progress
from serving.client import Adapter, AsyncClient, ServingError
from serving.web.choices import Choices
from serving.web.page import suggestions
from serving.web.settings import Settings
from tasks.slang.page import PAGE, TASK, answered, tidy

WANTED = 3  # as the page's script asks for


class Options(Arguments):
    triton: str = Field(Settings.triton, description="host:port of its gRPC, or a URL of serving.client")
    runs: Path = Field(Settings.runs, description="folder of all runs")
    data: Path = Field(Settings.data, description="folder of all prepared data")
    scenes: int = Field(100, ge=1, description="how many scenes are asked")
    seeds: list[int] = Field([PAGE.seeds], description="numbers of seeds to try")


def main(argv: list[str]) -> None:
    asyncio.run(measure(parse(Options, argv)))


async def measure(options: Options) -> None:
    settings = Settings(runs=options.runs, data=options.data)
    scenes = scenes_of(options.data / TASK)[: options.scenes]
    async with AsyncClient(options.triton) as client:
        try:
            adapter = await client.adapter(TASK)
        except ServingError as error:
            raise UserError(f"{error}. Serve the task: make serve TASK={TASK}") from None
        if is_offered(settings, adapter, {"slang": "x", "description": "y"}, "z") is None:
            raise UserError(
                f"{options.runs / TASK} lacks the run {adapter.run!r} that is served: no term can be judged"
            )
        alone = list[tuple[bool, float]]()
        with_seeds: dict[int, list[tuple[bool, float]]] = {count: [] for count in options.seeds}
        with Progress("Scenes", len(scenes)) as progress:
            for done, scene in enumerate(scenes):
                await client.ask(TASK, context=scene, max_tokens=1)  # the prompt is read before all that is timed
                alone.append(await ask_once(client, settings, adapter, scene, done))
                for count, results in with_seeds.items():
                    results.append(await ask_several(client, settings, adapter, scene, done, count))
                progress.at(done + 1)
    one = statistics.median(seconds for _, seconds in alone)
    print(f"one answer: {share(alone)} new, {one:.2f} s")
    for count, results in with_seeds.items():
        several = statistics.median(seconds for _, seconds in results)
        print(
            f"{count} seeds: {share(results)} with a term to offer, {several:.2f} s, {several / one:.2f} times as long"
        )


def scenes_of(data: Path) -> list[str]:
    """
    Raises:
        UserError: the task's data have not been prepared.
    """
    try:
        held_out = [row for split in ("test", "validation") for row in read_lines(data / f"{split}.jsonl")]
    except FileNotFoundError:
        raise UserError(f"{data} has no prepared rows: make data TASK={TASK}") from None
    return list(dict.fromkeys([*suggestions(TASK, "context"), *(row["context"] for row in held_out if row["context"])]))


def is_offered(settings: Settings, adapter: Adapter, fields: Mapping[str, str], scene: str) -> bool | None:
    """Whether an answer has all its parts and a new term; None where nothing tells new terms."""
    asked = {**adapter.prompt.fields, "context": scene}
    not_new = answered(settings, adapter, asked, fields)["not_new"]
    return None if not_new is None else not not_new and adapter.prompt.has_all_parts(fields)


async def ask_once(
    client: AsyncClient, settings: Settings, adapter: Adapter, scene: str, seed: int
) -> tuple[bool, float]:
    began = time.monotonic()
    answer = await client.ask(TASK, context=scene, seed=seed)
    return bool(is_offered(settings, adapter, tidy(answer.fields), scene)), time.monotonic() - began


async def ask_several(
    client: AsyncClient, settings: Settings, adapter: Adapter, scene: str, seed: int, count: int
) -> tuple[bool, float]:
    def unheard(name: str, **data: Any) -> None: ...

    began, asked = time.monotonic(), {**adapter.prompt.fields, "context": scene}
    choices = Choices(replace(PAGE, seeds=count), settings, adapter, asked, 1000 * seed, WANTED, unheard)
    done = await choices.ask(lambda seed: client.ask(TASK, context=scene, seed=seed))
    return done["choices"] > 0, time.monotonic() - began


def share(results: list[tuple[bool, float]]) -> str:
    return f"{sum(found for found, _ in results)} of {len(results)} scenes"


if __name__ == "__main__":
    run(main)
