"""Kinds of tables that are known by their headers besides questions and answers: choices, preferences, translations.

Each function gives the columns and the instruction of one kind, or None for a table of another.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from data_prep.profile_table import Column, called, field_of
from data_prep.read_table import plain_header

LANGUAGES = {
    "ar": "Arabic",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sr": "Serbian",
    "sv": "Swedish",
    "sw": "Swahili",
    "ta": "Tamil",
    "th": "Thai",
    "tl": "Tagalog",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "yo": "Yoruba",
    "zh": "Chinese",
}
_BESIDE_A_CODE = {"text", "sentence", "sentences", "translation", "lang", "source", "target", "src", "tgt", "segment"}
_SIDES = (("source", "target"), ("src", "tgt"), ("original", "translation"), ("text", "translation"))
DOCUMENTS = (
    "article",
    "document",
    "text",
    "dialogue",
    "content",
    "body",
    "transcript",
    "report",
    "story",
    "post",
    "news",
)
SUMMARIES = ("summary", "highlights", "abstract", "tldr", "headline", "summaries")
JSON_ANSWERS = (
    "json",
    "output",
    "answer",
    "response",
    "completion",
    "entities",
    "extracted",
    "extraction",
    "fields",
    "result",
    "target",
    "labels",
    "label",
    "data",
)
CHOICES = ("choices", "options", "endings", "candidates")
KEYS = ("answer", "answers", "answerkey", "correct", "label", "cop", "solution", "target", "gold")
STEMS = ("question", "stem", "prompt", "goal", "ctx", "sentence", "query", "problem", "input")
_CHOICE = re.compile(r"(|option|opt|op|choice|ending|sol|solution|answer) ?([a-h]|\d)")


class Found(NamedTuple):
    """The columns of a kind: `given` form the instruction, `learned` the response."""

    about: str
    given: list[Column]
    learned: list[Column]
    instruction: str
    cells: dict[str, str]


def choices(columns: Sequence[Column]) -> Found | None:
    """Multiple choice: a question, its choices in columns of their own or in a list, and which one is right."""
    groups: dict[str, list[tuple[str, Column]]] = {}
    for column in columns:
        if (named := _CHOICE.fullmatch(plain_header(column.header))) and column.filled:
            groups.setdefault(named[1], []).append((named[2], column))
    single = max(groups.values(), key=len, default=[])
    lists = [c for c in called(CHOICES, columns) if c.holds in ("lists", "objects", "dialogues", "JSON", "text")]
    lists = [column for column in lists if column.filled[0][0] in "[{("]
    options = [column for _, column in single] if len(single) > 1 else lists[:1]
    stems = [c for c in called(STEMS, columns) if c not in options and c.holds in ("text", "labels")]
    keys = [c for c in called(KEYS, columns) if c not in options and c not in stems[:1] and _is_key(c)]
    if not (options and stems and keys):
        return None
    numbers = [int(cell) for cell in keys[0].filled if cell.isdigit()]
    numbered = len(numbers) == len(keys[0].filled)
    stem, question = stems[0], f"{{{field_of(stems[0])}}}"
    if options[0] in lists:
        field = field_of(options[0])
        lines, cells = [f"{{{field}}}"], {field: "numbered" if numbered else "lettered"}
    else:
        first = min(numbers) if numbered else 0
        names = [str(first + n) if numbered else chr(ord("A") + n) for n in range(len(options))]
        lines = [f"{name}. {{{field_of(column)}}}" for name, column in zip(names, options, strict=True)]
        cells = {field_of(column): "line" for column in options}
    about = "Multiple choice: the model learns to name the right one."
    instruction = "\n".join([question, *lines, "Answer with the right one."])
    return Found(about, [stem, *options], keys[:1], instruction, {**cells, field_of(keys[0]): "line"})


def preferences(columns: Sequence[Column]) -> Found | None:
    """Preference pairs: a question, a chosen answer and a rejected one."""
    chosen = [c for c in called(("chosen", "preferred", "accepted"), columns) if c.holds in ("text", "labels")]
    rejected = called(("rejected", "dispreferred"), columns)
    asked = [
        c
        for c in called(("prompt", "question", "instruction", "query", "input"), columns)
        if c not in (*chosen, *rejected) and c.holds in ("text", "labels")
    ]
    if not (chosen and rejected and asked):
        return None
    more = [c for c in called(("input", "context"), columns) if c not in asked[:1] and c.holds in ("text", "labels")]
    system = [c for c in called(("system",), columns) if c.holds in ("text", "labels")]
    given = [asked[0], *system[:1], *more[:1]]
    return Found(
        f"Preference pairs: '{chosen[0].header}' is learned as the answer; '{rejected[0].header}' is not used, as "
        "nothing here learns by comparison.",
        given,
        chosen[:1],
        "\n".join(f"{{{field_of(column)}}}" for column in (*system[:1], asked[0], *more[:1])),
        {},
    )


def translation(columns: Sequence[Column]) -> Found | None:
    """Two columns of text in two languages, named so, or as source and target."""
    texts = [column for column in columns if column.holds in ("text", "labels")]
    spoken = {language: column for column in reversed(texts) if (language := _language(column.words))}
    two = [(column, language) for language, column in reversed(spoken.items())][:2]
    if len(two) == 2:
        (one, first), (other, second) = two
        about = (
            f"Translations from {first} into {second}; for the other direction swap both in instruction and response."
        )
        return Found(about, [one], [other], f"Translate from {first} into {second}:\n{{{field_of(one)}}}", {})
    for source, target in _SIDES:
        pair = [column for name in (source, target) for column in texts if name in column.words]
        if len(pair) == 2 and pair[0] is not pair[1] and len(texts) == 2:
            about = f"Translations: '{pair[1].header}' is learned for '{pair[0].header}'. Name the languages in it."
            return Found(about, pair[:1], pair[1:], f"Translate this text:\n{{{field_of(pair[0])}}}", {})
    return None


def extraction(columns: Sequence[Column]) -> Found | None:
    """A text and JSON that is taken from it."""
    found = [c for c in called(JSON_ANSWERS, columns) if c.holds in ("objects", "JSON", "lists", "dialogues")]
    texts = [column for column in columns if column.holds == "text"]
    if not found or not texts:
        return None
    text = max(texts, key=lambda column: column.mean_length)
    keys = _common_keys(found[0].filled)
    what = f"{', '.join(keys)} from this text as JSON" if keys else "as JSON what this text says"
    about = f"Extraction: the model learns to answer with the JSON in '{found[0].header}'."
    instruction = f"Extract {what}:\n{{{field_of(text)}}}"
    return Found(about, [text], found[:1], instruction, {field_of(found[0]): "json"})


def summaries(columns: Sequence[Column]) -> Found | None:
    """Long texts and their summaries."""
    texts = [column for column in columns if column.holds == "text"]
    pairs = [(d, s) for d in called(DOCUMENTS, texts) for s in called(SUMMARIES, texts) if d is not s]
    pairs = [(d, s) for d, s in pairs if d.mean_length > 1.5 * s.mean_length]
    if not pairs:
        return None
    document, summary = pairs[0]
    noun = next(name for name in DOCUMENTS if name in document.words)
    about = f"Summaries: '{summary.header}' is learned for '{document.header}'."
    what = "Write a headline for" if "headline" in summary.words else "Summarize"
    return Found(about, [document], [summary], f"{what} this {noun}:\n{{{field_of(document)}}}", {})


def _is_key(column: Column) -> bool:
    return column.holds in ("labels", "text", "numbers", "signs") and column.mean_length < 200


def _language(words: Sequence[str]) -> str:
    named = [name for name in LANGUAGES.values() if name.lower() in words]
    codes = [LANGUAGES[word] for word in words if word in LANGUAGES]
    if named:
        return named[0]
    others = [word for word in words if word not in LANGUAGES]
    return codes[0] if len(codes) == 1 and set(others) <= _BESIDE_A_CODE else ""


def _common_keys(cells: Sequence[str]) -> list[str]:
    """The keys that objects have in common, in order; none where they are lists or have few in common."""
    found = []
    for cell in cells[:200]:
        try:
            value = json.loads(cell, strict=False)
        except ValueError:
            continue
        found.append(list(value) if isinstance(value, dict) else [])
    common = [key for key in found[0] if all(key in keys for keys in found)] if found else []
    return common[:12]
