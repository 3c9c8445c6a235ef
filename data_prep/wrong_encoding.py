"""Repairs text in Cyrillic, Greek, Korean, Chinese, Japanese … that was read as Latin-1: `Îòëè÷íî` for `Отлично`.

ftfy does so for UTF-8, whose bytes prove what they are. Other encodings prove little, so a text is repaired only where
nothing else explains it: most of its letters are accented, as in no language that is written with them; its bytes are
valid in another encoding; and there they are letters of its one script, with those that are common in its language as
common as they should be. That must hold in one encoding alone; anything else stays as it is.
"""

import re
from typing import NamedTuple

SHARE = 0.6  # of the letters and signs of a text that are beyond ASCII


class _Encoding(NamedTuple):
    name: str
    script: str  # a character class
    common: str  # letters of the language
    share: float  # of the text's letters in `script` that are common ones: about 0.8 of what ordinary text has
    fewest: int  # letters, of which a repair may be certain


_RUSSIAN = ("[\u0400-\u04ff]", "оеаинтсрвлкм", 0.55, 10)
_CHINESE = (
    "的一是了我不在人有他这這中大来來上个個到说說们們为為和你也时時得就要以会會自过過对對可里裡后後多天能好都没沒还還看想很太非常推荐薦部"
    "電电視视劇剧演員员味道服务務店吃東东西买買用手机機"
)
_ENCODINGS = (
    _Encoding("cp1251", *_RUSSIAN),
    _Encoding("koi8-r", *_RUSSIAN),
    _Encoding("cp1253", "[\u0370-\u03ff]", "αοιετσνηυρπκμλάόίέήύς", 0.75, 10),
    _Encoding("cp1255", "[\u0590-\u05ff]", "יוהלארתמבשנ", 0.6, 10),
    _Encoding("cp1256", "[\u0600-\u06ff]", "اليمنوترب", 0.55, 10),
    _Encoding(
        "cp949",
        "[\uac00-\ud7a3]",
        "이다는을를에의가고은한로지도하서기니어사시있나리자여아그대과해수들보정인스게라일만장",
        0.3,
        6,
    ),
    _Encoding("gb18030", "[\u4e00-\u9fff]", _CHINESE, 0.3, 6),
    _Encoding("big5", "[\u4e00-\u9fff]", _CHINESE, 0.3, 6),
    _Encoding(
        "shift_jis", "[\u3040-\u30ff\u4e00-\u9fff]", "のにはをたがでてとしれさるいもかなくっりまうすこだよ", 0.35, 6
    ),
    _Encoding(
        "euc_jp", "[\u3040-\u30ff\u4e00-\u9fff]", "のにはをたがでてとしれさるいもかなくっりまうすこだよ", 0.35, 6
    ),
)
_ODD = re.compile(r"[\x80-\xff€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]")
_SIGN = re.compile(r"[^\W\d_]|[\x80-\xff]")
# A capital inside a word: what one Cyrillic encoding makes of the other's small letters.
_INNER_CAPITAL = re.compile(r"[^\W\d_][А-ЯЁΑ-Ω]")
# Quotes and dashes have the same two bytes in Korean and Chinese encodings; "¡" stands before a word, never before the
# second of these. A mark in place of an apostrophe is Big5's.
_QUOTES = {"¡®": "‘", "¡¯": "’", "¡°": "“", "¡±": "”", "¡ª": "—"}
_QUOTE = re.compile("|".join(_QUOTES))
_BIG5_APOSTROPHE = re.compile(r"(?<=[A-Za-z])¡¦(?=(?:s|t|re|ve|ll|d|m)\b)")


def reread(text: str) -> str:
    """`text` as it was written; `text` itself where that is not certain."""
    odd = len(_ODD.findall(text))
    if odd >= 8 and odd >= SHARE * len(_SIGN.findall(text)):
        readings = {said for encoding in _ENCODINGS if (said := _reading(text, encoding))}
        if len(readings) == 1:
            return readings.pop()
    return _BIG5_APOSTROPHE.sub("’", _QUOTE.sub(lambda found: _QUOTES[found[0]], text))


def _reading(text: str, encoding: _Encoding) -> str:
    """What the bytes of `text` say in `encoding`; "" if that is not its language."""
    try:
        written = b"".join(map(_byte, text))
        said = written.decode(encoding.name)
    except UnicodeError:
        return ""
    if _is_utf8(written):  # which ftfy repairs
        return ""
    own = re.findall(encoding.script, said)
    foreign = [sign for sign in said if sign > "\x7f" and sign.isalpha()]
    if len(own) < encoding.fewest or len(own) < 0.95 * len(foreign):
        return ""
    common = sum(sign in encoding.common for sign in "".join(own).lower())
    if common < encoding.share * len(own) or (_INNER_CAPITAL.search(said) and not said.isupper()):
        return ""
    return said


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _byte(sign: str) -> bytes:
    """The byte that was read as `sign`: Latin-1, or what Windows has in its place."""
    return sign.encode("latin-1" if sign <= "\xff" else "cp1252")
