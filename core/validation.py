"""Sentences for what pydantic refuses, shared by the configuration and by the commands' arguments.

It needs only pydantic, so that it works in the serving environment too.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN = 60  # characters of a wrong value that a sentence quotes


def sentence(key: str, error: Mapping[str, Any]) -> str:
    """What is wrong with the value of `key`, from one entry of pydantic's `ValidationError.errors()`."""
    value, limits = error.get("input"), error.get("ctx", {})
    match error["type"]:
        case "missing":
            return f"{key} has no value"
        case "int_type" | "int_parsing" | "int_from_float":
            return f"{key} must be a whole number, not {shown(value)}"
        case "float_type" | "float_parsing" | "finite_number":
            return f"{key} must be a number, not {shown(value)}"
        case "bool_type" | "bool_parsing":
            return f"{key} must be true or false, not {shown(value)}"
        case "string_type":
            hint = f'; write it in quotes: "{value}"' if isinstance(value, int | float) else ""
            return f"{key} must be text, not {shown(value)}{hint}"
        case "string_too_short" | "too_short":
            return f"{key} must not be empty"
        case "list_type":
            return f"{key} must be a list such as [a, b], not {shown(value)}"
        case "dict_type" | "model_type":
            return f"{key} must be a section of keys such as {{key: value}}, not {shown(value)}"
        case "greater_than_equal":
            return f"{key} must be {_limit(limits['ge'])} or more, not {shown(value)}"
        case "greater_than":
            return f"{key} must be above {_limit(limits['gt'])}, not {shown(value)}"
        case "less_than_equal":
            return f"{key} must be {_limit(limits['le'])} or less, not {shown(value)}"
        case "less_than":
            return f"{key} must be below {_limit(limits['lt'])}, not {shown(value)}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", limits["expected"])
            hint = did_you_mean([str(value)], known)
            return f"{key}={value} is unknown. Known: {', '.join(known)}{hint}"
        case "string_pattern_mismatch":  # only folder names have one, see core/schema.py
            return f"{key} names a folder: use letters, digits, _, - and ., not {shown(value)}"
        case "value_error":
            return f"{key} {limits['error']}"
    return f"{key}: {error['msg']}, not {shown(value)}"


def _limit(value: float) -> str:
    return str(int(value) if value == int(value) else value)


def shown(value: Any) -> str:
    """A value as YAML would hold it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def did_you_mean(unknown: Iterable[str], known: Iterable[str]) -> str:
    """`; did you mean epochs?` where one of `known` is like one of `unknown`, else nothing.

    Case, spaces and punctuation do not count.
    """
    plainly = {_plainly(name): name for name in known}
    close = [match for name in unknown for match in difflib.get_close_matches(_plainly(name), plainly, n=1)]
    return f"; did you mean {', '.join(plainly[match] for match in close)}?" if close else ""


def _plainly(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").casefold()
