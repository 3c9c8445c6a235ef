"""Dialogues of several turns: read in the forms they come in, cleaned, checked, and cut where they are too long.

A row of the source holds, in the task's key column (`messages` in chat.yaml),

    [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]    a system message may come first
    [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]             the same in ShareGPT's words
    a text                                                                      with its answer in the column `answer`

and becomes rows `{"messages": [{"role", "content"}, …], "row": n}`. User and assistant alternate, the user begins, and
the assistant ends: a last message of the user, which nobody answered, is left out. A dialogue that breaks this is
dropped with the number of the message.

A dialogue of more than `task.data.max_tokens` tokens becomes several rows. The first is the longest beginning of whole
exchanges that fits; the next begins with the user's turn after it, under the same system text, as Vicuna's dialogues
were cut. So the model learns from every answer, and meets in training what it meets in a chat that has outgrown its
window, where commands/chat.py leaves out the oldest exchanges. An exchange that is too long by itself ends the
dialogue, as what follows would speak of something that was never said.

Dialogues are dealt to splits by their first message of the user, so all that begin alike are in one split.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from core.prompt import exchanges
from data_prep.clean_text import clean
from data_prep.row_store import Unusable
from data_prep.task import Task

Message = dict[str, str]

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # besides system, user and assistant


class Reader:
    """Turns a row's raw cells into `(text of the key, cells, how many messages were repaired)`.

    The cell of the key then holds the rows to be made of the dialogue, each as `[system text, user, model, user, …]`,
    in JSON; the others are empty.

    Attributes:
        notes: what was done to dialogues that stay, and to how many.

    Args:
        tokenizer_file: the tokens of `task.data.max_tokens` are its own; None leaves dialogues whole.
    """

    def __init__(self, task: Task, tokenizer_file: Path | None) -> None:
        columns = list(task.data.columns)
        self._place = columns.index(task.data.key)
        self._answer_place = columns.index("answer") if "answer" in columns else None
        self._columns, self._prompt, self._most = len(columns), task.prompt, task.data.max_tokens or 0
        self._tokenizer_file = tokenizer_file if self._most else None
        self._cut = f"dialogues of over {self._most} tokens cut between exchanges"
        self._shortened = f"dialogues that end before an exchange of over {self._most} tokens"
        self.notes = {self._cut: 0, self._shortened: 0}

    def __call__(self, raw: Sequence[str]) -> tuple[str, list[str], int]:
        """
        Raises:
            Unusable: no dialogue, or one whose first exchange is too long.
        """
        answer = "" if self._answer_place is None else raw[self._answer_place]
        messages = _read(raw[self._place], answer)
        repaired = 0
        for message in messages:
            message["content"], changed = _clean_lines(message["content"])
            repaired += changed
        if len(messages) > 1 and messages[-1]["role"] == "user":
            messages.pop()
        try:
            if exchanges(messages)[-1][1] is None:
                raise ValueError("no message of the assistant")
        except ValueError as error:
            raise Unusable("user and assistant do not take turns", str(error)) from None
        system = [message["content"] for message in messages if message["role"] == "system"]
        turns = [message["content"] for message in messages[len(system) :]]
        parts = [[*(system or [""]), *part] for part in self._parts(system, turns)]
        cells = [""] * self._columns
        cells[self._place] = json.dumps(parts, ensure_ascii=False)
        return turns[0], cells, repaired

    def _parts(self, system: list[str], turns: list[str]) -> list[list[str]]:
        """`turns` cut so that each part has at most the tokens that it may have."""
        if self._fits(system, turns):
            return [turns]
        parts, first = list[list[str]](), 0
        while first < len(turns):
            end = first
            while end < len(turns) and self._fits(system, turns[first : end + 2]):
                end += 2
            if end == first:
                break
            parts.append(turns[first:end])
            first = end
        if not parts:
            tokens = self._count(self._pieces(system, turns[:2]))
            raise Unusable(f"the first exchange has over {self._most} tokens", f"it has {tokens}")
        self.notes[self._cut] += len(parts) > 1
        self.notes[self._shortened] += first < len(turns)
        return parts

    def _fits(self, system: list[str], turns: list[str]) -> bool:
        if self._tokenizer_file is None:
            return True
        pieces = self._pieces(system, turns)
        # No token is less than a byte, so a short dialogue need not be tokenized.
        fewer = 1 + sum(len(text.encode()) + learned for text, learned in pieces) <= self._most
        return fewer or self._count(pieces) <= self._most

    def _pieces(self, system: list[str], turns: list[str]) -> list[tuple[str, bool]]:
        return self._prompt.pieces({"messages": write_messages([*(system or [""]), *turns])})

    def _count(self, pieces: list[tuple[str, bool]]) -> int:
        """Tokens with BOS before all and an end token after each turn of the model, as training/batches.py has them."""
        encodings = self._tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        return 1 + sum(len(encoding.ids) for encoding in encodings) + sum(learned for _, learned in pieces)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self._tokenizer_file))


def split_rows(rows: Iterable[Mapping[str, Any]], split: str, task: Task) -> Iterator[dict[str, Any]]:
    """The rows of a split, from what `Reader` made of each dialogue."""
    for row in rows:
        for part in json.loads(row[task.data.key]):
            yield {"messages": write_messages(part), "row": row["row"]}


def write_messages(part: Sequence[str]) -> list[Message]:
    """`[system text or "", user, model, user, …]` as messages."""
    system, *turns = part
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def _read(cell: str, answer: str) -> list[Message]:
    """The messages of a row, whatever their roles; "" where one has no text."""
    if not cell.lstrip().startswith("["):
        return [{"role": "user", "content": cell}, {"role": "assistant", "content": answer}]
    try:
        found = json.loads(cell)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        if answer:  # a question may begin with a bracket
            return [{"role": "user", "content": cell}, {"role": "assistant", "content": answer}]
        raise Unusable("no list of messages", "it begins with [ and is no JSON list of objects")
    messages = []
    for message in found:
        role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
        name = str(role).lower()
        messages.append({"role": ROLES.get(name, name), "content": text if isinstance(text, str) else ""})
    return messages


def _clean_lines(text: str) -> tuple[str, bool]:
    """As `clean`, line by line: a list stays a list, and code keeps its indentation."""
    lines, repaired = [], False
    for line in text.splitlines():
        cleaned, changed = clean(line)
        lines.append(re.match(r"[ \t]*", line)[0] + cleaned if cleaned else "")  # type: ignore[index]
        repaired |= changed
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip(), repaired
