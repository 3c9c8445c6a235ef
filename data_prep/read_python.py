"""Reads the text that Python prints for lists and dictionaries, as pandas and numpy write them into the cells of a CSV.

    [{'role': 'user', 'content': "it's"}, {'role': 'assistant', 'content': None}]                 a list
    [{'role': 'user', 'content': 'Hi'}\\n {'role': 'assistant', 'content': 'Hello'}]               an array: no commas
    array([{'role': 'user', 'content': array(['Hi'], dtype=object)}, …], dtype=object)            arrays in a list
    {'weight': np.float64(1.0), 'seen': nan}                                                      numbers of numpy 2

Nothing is executed: what numpy adds is taken away from the text, and `ast.literal_eval` reads the rest.
"""

import ast
import re
import warnings
from collections.abc import Iterator

_TOKEN = re.compile(
    r"""(?P<text>[bu]?'(?:[^'\\]|\\.)*'|[bu]?"(?:[^"\\]|\\.)*")|(?P<word>[\w.+-]+)|(?P<space>\s+)|(?P<sign>.)""", re.S
)
_MADE_BY_NUMPY = re.compile(r"(?:(?:np|numpy)\.)?(?:array|str_|bool_?|u?int\d*|float\d*)")
_WORDS = {"nan": "None", "np.nan": "None", "NaT": "None", "np.True_": "True", "np.False_": "False"}


def read_python(text: str) -> object:
    """The value that `text` describes.

    Raises:
        ValueError: it is not made of texts, numbers, True, False, None, lists, tuples and dictionaries alone.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of escapes that no repr has; literal_eval reads them
            return ast.literal_eval("".join(_without_numpy(text)).strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a Python list: {str(error)[:100]}") from None


def _without_numpy(text: str) -> Iterator[str]:
    """The tokens of `text`, with the commas that numpy leaves out, and without the names of its types."""
    tokens = [match for match in _TOKEN.finditer(text) if match.lastgroup != "space"]
    follows_value = False  # a text after a text would be one text to Python
    place = 0
    while place < len(tokens):
        token, kind = tokens[place][0], tokens[place].lastgroup
        following = [match[0] for match in tokens[place + 1 : place + 3]]
        if token == "," and following == ["dtype", "="]:
            place += 4
            continue
        if follows_value and (kind != "sign" or token in "([{"):
            yield ","
        follows_value = kind != "sign" or token in ")]}"
        if kind == "word" and following[:1] == ["("] and _MADE_BY_NUMPY.fullmatch(token):
            follows_value = False
        else:
            yield _WORDS.get(token, token) + " "
        place += 1
