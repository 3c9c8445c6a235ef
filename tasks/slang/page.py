"""The slang page: a scene goes in, a dictionary entry comes out, and visitors keep the words that they like."""

from collections.abc import Mapping
from typing import Any

from serving.rate_limit import Rate
from serving.web.page import Page, suggestions, task_config
from serving.web.settings import Settings
from tasks.slang.dictionary import DictionaryEntry, dictionary_of, router

TASK = "slang"


def values(settings: Settings) -> dict[str, Any]:
    return {"fields": task_config(TASK)["prompt"]["fields"], "scenes": suggestions(TASK, "context")}


def answered(settings: Settings, asked: Mapping[str, str], answer: Mapping[str, str]) -> dict[str, Any]:
    """`keep`: the token by which a visitor may keep this word, or null where the answer has no word and meaning."""
    if not {"slang", "description"} <= answer.keys():
        return {"keep": None}
    entry = DictionaryEntry(
        answer["slang"], answer["description"], answer.get("example", ""), asked.get("context", "").strip()
    )
    return {"keep": dictionary_of(settings).token_of(entry)}


PAGE = Page(
    task=TASK,
    title="Slang",
    order=1,
    values=values,
    router=router,
    rates={"/api/dictionary": Rate(per_minute=30, burst=30)},
    start=dictionary_of,
    answered=answered,
)
