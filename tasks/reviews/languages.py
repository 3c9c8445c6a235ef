"""The language of a review. Only English is read; the others are counted by name."""

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache

import yaml
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from tasks.reviews.aspect_words import COMMON_WORDS

SURE = 0.5  # probability of a language; below it, a review with a common English word counts as English
LANGUAGES = {
    "en": "English",
    "es": "Spanish",
    "pt": "Portuguese",
    "fr": "French",
    "de": "German",
    "it": "Italian",
    "nl": "Dutch",
    "sv": "Swedish",
    "da": "Danish",
    "no": "Norwegian",
    "fi": "Finnish",
    "pl": "Polish",
    "cs": "Czech",
    "hu": "Hungarian",
    "ro": "Romanian",
    "el": "Greek",
    "tr": "Turkish",
    "ru": "Russian",
    "uk": "Ukrainian",
    "ar": "Arabic",
    "he": "Hebrew",
    "fa": "Persian",
    "hi": "Hindi",
    "bn": "Bengali",
    "ur": "Urdu",
    "id": "Indonesian",
    "tl": "Tagalog",
    "vi": "Vietnamese",
    "th": "Thai",
    "ko": "Korean",
    "ja": "Japanese",
    "zh": "Chinese",
}
UNKNOWN = "unknown"
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_ENGLISH = ENGLISH_STOP_WORDS | set(yaml.safe_load(COMMON_WORDS.read_text(encoding="utf-8"))["english"])


def language_of(text: str) -> str:
    """A code of `LANGUAGES`, or `UNKNOWN`."""
    words = _WORD.findall(text.casefold())
    if not words:
        return UNKNOWN
    language, probability = _identifier().classify(text)
    if probability >= SURE:
        return str(language)
    # Names and slang mislead the detector in short texts: "Craptacular" is not Romanian.
    return "en" if language == "en" or (text.isascii() and _ENGLISH & set(words)) else UNKNOWN


def names_of(languages: Iterable[str]) -> str:
    """`"Spanish 40, French 2"`, for messages."""
    found = Counter(LANGUAGES.get(language, UNKNOWN) for language in languages)
    return ", ".join(f"{name} {count}" for name, count in found.most_common())


@cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(LANGUAGES))
    return identifier
