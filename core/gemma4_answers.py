"""What a Gemma 4 writes, told apart: its answer, the thought before it, and calls of tools. See gemma4_turns.py."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from .gemma4_turns import CALL, CALL_END, QUOTE, THOUGHT, THOUGHT_END


class AnswerPart(NamedTuple):
    """New text of an answer, and of the thought before it.

    Attributes:
        tokens: how many have come with it, where its text is streamed from a server; a part may be of none.
    """

    text: str
    thought: str
    tokens: int = 0


class ToolCall(NamedTuple):
    name: str
    arguments: dict[str, Any]


# The control tokens that a model may write, except the quotes of a call's texts.
_WRITTEN = re.compile(
    r"<\|(?:turn|channel|tool_call|tool_response|tool|think\|)>|<(?:turn|channel|tool_call|tool_response|tool)\|>"
    r"|<(?:eos|bos|pad)>"
)
_BEGUN = re.compile(r"<[|\w]{0,15}$")  # what may become one of them


class AnswerReader:
    """Tells an answer, its thoughts and its calls of tools apart, in text with control tokens that arrives in pieces.

        reader = AnswerReader(asked)
        for part in reader.read(piece): ...  # for each piece
        for part in reader.end(): ...
        reader.calls

    Args:
        asked: the text that the model was given, which may end within a thought.
    """

    def __init__(self, asked: str) -> None:
        self.calls: list[ToolCall] = []
        self._waiting, self._state = "", "thought" if asked.endswith(THOUGHT) else "answer"

    def read(self, text: str) -> Iterator[AnswerPart]:
        """What is certain, now that `text` has arrived."""
        self._waiting += text
        while found := _WRITTEN.search(self._waiting):
            before, after = self._waiting[: found.start()], self._waiting[found.end() :]
            yield from self._part(before)
            self._waiting = after
            if found[0] == CALL:
                self._state = "call"
            elif found[0] == "<|channel>":
                self._state = "name"
            elif found[0] == THOUGHT_END:
                self._state = "answer"
            elif found[0] == CALL_END and self._state == "call":
                self._state = "answer"
                if call := read_call(before):
                    self.calls.append(call)
                else:
                    yield AnswerPart(before, "")
        if self._state == "name" and "\n" in self._waiting:  # of the channel; "thought" is the only one
            self._state, self._waiting = "thought", self._waiting.partition("\n")[2]
        if self._state in ("answer", "thought"):
            held = _BEGUN.search(self._waiting)
            sure = self._waiting[: held.start()] if held else self._waiting
            sure = sure.rstrip() if self._state == "thought" else sure
            self._waiting = self._waiting[len(sure) :]
            yield from self._part(sure)

    def end(self) -> Iterator[AnswerPart]:
        """What was held back, as the answer is over. A call that was cut off is text."""
        if self._state == "call":
            self._state = "answer"
        yield from self._part(self._waiting)
        self._waiting = ""

    def _part(self, text: str) -> Iterator[AnswerPart]:
        """All there is of the present state, but for calls."""
        if self._state == "name":
            text, self._state = text.partition("\n")[2], "thought"
        text = text.rstrip() if self._state == "thought" else text
        if text and self._state != "call":
            yield AnswerPart("", text) if self._state == "thought" else AnswerPart(text, "")


def read_answer(asked: str, text: str) -> tuple[AnswerPart, list[ToolCall]]:
    """A whole answer, with its control tokens, to what was `asked`."""
    reader = AnswerReader(asked)
    parts = [*reader.read(text), *reader.end()]
    return AnswerPart("".join(one.text for one in parts), "".join(one.thought for one in parts)), reader.calls


def read_call(text: str) -> ToolCall | None:
    """The call `call:name{key:value,…}`; None where it is none."""
    if not (named := re.match(r"\s*call:([\w.\-]+)(?=\{)", text)):
        return None
    try:
        arguments, end = _read_value(text, named.end())
    except (ValueError, IndexError, RecursionError):
        return None
    return ToolCall(named[1], arguments) if not text[end:].strip() else None


def _read_value(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends.

    Raises:
        ValueError, IndexError: there is no value.
    """
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text[at] == "[":
        listed: list[Any] = []
        at += 1
        while text[at] != "]":
            value, at = _read_value(text, at + (text[at] == ","))
            listed.append(value)
        return listed, at + 1
    if text[at] == "{":
        pairs: dict[str, Any] = {}
        at += 1
        while text[at] != "}":
            at += text[at] == ","
            if text.startswith(QUOTE, at):
                key, at = _read_value(text, at)
                at = text.index(":", at)
            else:
                end = text.index(":", at)
                key, at = text[at:end].strip(), end
            pairs[key], at = _read_value(text, at + 1)
        return pairs, at + 1
    bare = re.compile(r"[^,\]}]+").match(text, at)
    if not bare:
        raise ValueError
    word = bare[0].strip()
    known = {"true": True, "false": False, "null": None}
    try:
        return known[word] if word in known else int(word) if re.fullmatch(r"-?\d+", word) else float(word), bare.end()
    except ValueError:
        return word, bare.end()  # a text that the model did not put between quotes
