"""The slang page: a scene goes in, a dictionary entry comes out, and visitors keep the words that they like."""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from serving.client import Adapter
from serving.rate_limit import Rate
from serving.web.page import Page, suggestions, task_config
from serving.web.settings import Settings
from tasks.slang.dictionary import DictionaryEntry, dictionary_of, router
from tasks.slang.novelty import Novelty, load_lists

TASK = "slang"
# After the default three epochs, so many bring a new term to 93 scenes of 100, in twice the time of one answer. After
# one, where one answer in twelve is new, it is four scenes of five: python -m tasks.slang.measure_choices
SEEDS = 24
_QUOTED = re.compile('["“„][^"“”„]*["”“]?')


def values(settings: Settings) -> dict[str, Any]:
    return {"fields": task_config(TASK)["prompt"]["fields"], "scenes": suggestions(TASK, "context")}


def answered(
    settings: Settings, adapter: Adapter, asked: Mapping[str, str], answer: Mapping[str, str]
) -> dict[str, Any]:
    """What the page shows beside an answer that has a term and its meaning; null where it has none.

    keep: the token by which a visitor may keep this term.
    not_new: why it is not new, "" if it is; null where the adapter's run is not on this machine.
    """
    if not {"slang", "description"} <= answer.keys():
        return {"keep": None, "not_new": None}
    entry = DictionaryEntry(
        answer["slang"], answer["description"], answer.get("example", ""), asked.get("context", "").strip()
    )
    novelty = _novelty_of(settings.runs / TASK / Path(adapter.run).name)
    return {
        "keep": dictionary_of(settings).token_of(entry),
        "not_new": novelty and novelty.why_not(entry.slang, adapter.prompt.write_instruction(**asked)),
    }


def refuses(settings: Settings, adapter: Adapter, asked: Mapping[str, str], answer: Mapping[str, str]) -> str:
    """Why the term of an answer is no choice: it is not new. All are choices where that cannot be told."""
    novelty = _novelty_of(settings.runs / TASK / Path(adapter.run).name)
    return novelty.why_not(answer.get("slang", ""), adapter.prompt.write_instruction(**asked)) if novelty else ""


def tidy(fields: dict[str, str]) -> dict[str, str]:
    """The fields with the term as a dictionary has it: without quotation marks around the whole of it."""
    return {**fields, "slang": bare(fields["slang"])} if "slang" in fields else fields


def bare(term: str) -> str:
    """`“plot armor”` and, while it grows, `“plot ar` → `plot armor`, `plot ar`; `'tis` and `"big" mood` stay."""
    if _QUOTED.fullmatch(term):
        return term.strip('"“”„').strip()
    return term[1:-1].strip() if len(term) > 2 and term[0] in "'‘" and term[-1] in "'’" else term


@lru_cache(maxsize=8)
def _novelty_of(run: Path) -> Novelty | None:
    try:
        return Novelty.read(run)
    except OSError:
        return None


def start(settings: Settings) -> None:
    dictionary_of(settings)
    load_lists()


PAGE = Page(
    task=TASK,
    title="Slang",
    order=1,
    values=values,
    router=router,
    rates={"/api/dictionary": Rate(per_minute=30, burst=30)},
    start=start,
    answered=answered,
    tidy=tidy,
    seeds=SEEDS,
    refuses=refuses,
)
