"""Checks grammars for the engine, as a process that a costly one may end.

    python serving/engine/grammar_check.py

On stdin one line a grammar, [kind, what was given], JSON; on stdout a line for each, [what llguidance is to compile,
null] or [null, what is wrong with it and where]. It ends without an answer where it would need more than `CPU_SECONDS`
or `MEMORY`.
"""

import json
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import gbnf_to_lark

EXACT = '%llguidance {"no_forcing": true}\n'  # its last word on that counts
# Between two tokens of JSON. Without a bound, a small model may write spaces until max_tokens.
WHITESPACE = r"[ \n\r\t]{1,32}"
# What a step may spend on one mask: some 10 ms. A lexer's state takes some 2 kB.
LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=50_000, max_lexer_states=25_000, verbose_errors=False)
CPU_SECONDS = 2  # for one grammar; the machine's load does not count
MEMORY = 2 << 30  # bytes of address space
LOOKING_SECONDS = 0.5  # for the part of a schema that is wrong
GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C of a terminal is for the engine, whose end ends stdin
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        kind, given = json.loads(line)
        used = int(time.process_time()) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, resource.RLIM_INFINITY))
        print(json.dumps(check(kind, given)), flush=True)


def check(kind: str, given: Any) -> tuple[str | None, str | None]:
    """What llguidance is to compile for `structured_outputs`.`kind`, or what is wrong with it."""
    where = f"structured_outputs.{kind}"
    try:
        lark = _lark(kind, given)
    except Exception as error:  # the converter of GBNF raises all kinds
        return None, f"{where}: {sentence(str(error), kind)}"
    if message := _error(lark, kind):
        place = _wrong_part(given, message) if kind == "json" else ""
        return None, f"{where} at {place}: {message}" if place else f"{where}: {message}"
    return lark, None


def _error(lark: str, kind: str) -> str:
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(lark, None, limits=LIMITS)
    return sentence(messages[0], kind) if is_wrong else ""


def _wrong_part(schema: dict[str, Any], message: str) -> str:
    """The JSON pointer of the smallest part of `schema` that is refused with the same `message`."""
    place, part, until = "", schema, time.monotonic() + LOOKING_SECONDS
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    while True:
        for pointer, child in _subschemas(part):
            if time.monotonic() > until:
                return place
            if _error(_lark("json", {**definitions, **child}), "json") == message:
                place, part = f"{place}/{pointer}", child
                break
        else:
            return place


def _lark(kind: str, wanted: Any) -> str:
    """`wanted` in llguidance's dialect of Lark."""
    match kind:
        case "json" | "json_object":
            schema = {"type": "object"} if kind == "json_object" else wanted
            options = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
            lark = f"start: %json {json.dumps({**schema, **options}, ensure_ascii=False)}"
        case "regex":
            lark = json.loads(LLMatcher.grammar_from_regex(wanted))["grammars"][0]["lark_grammar"]
        case "choice":
            # As escapes, since the lexer takes no control character, of which JSON leaves DEL as it is.
            lark = "start: " + " | ".join(map(json.dumps, dict.fromkeys(wanted)))
        case _:
            lark = gbnf_to_lark(wanted) if GBNF.search(wanted) else wanted
    return f"{lark}\n{EXACT}"


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas directly inside `schema`, each with its JSON pointer there."""
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(found := schema.get(key), dict):
            yield from ((f"{key}/{_escaped(name)}", one) for name, one in found.items() if isinstance(one, dict))
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(found := schema.get(key), list):
            yield from ((f"{key}/{number}", one) for number, one in enumerate(found) if isinstance(one, dict))
    for key in ("items", "additionalProperties", "contains", "not"):
        if isinstance(found := schema.get(key), dict):
            yield key, found


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def sentence(message: str, kind: str) -> str:
    """A message of the library as one line, without the grammar around it: of "grammar", which the user wrote, the line
    and column stay."""
    if kind != "grammar":
        message = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", message)
    message = message.replace("Unimplemented keys:", "not supported:")
    lines = [line.strip() for line in message.splitlines() if not re.match(r"\s*(\d+ \||\^)", line)]
    return " ".join(line for line in lines if line)[:500]


if __name__ == "__main__":
    main()
