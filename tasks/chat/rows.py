"""Multi-turn dialogues: parsed from their usual formats, cleaned, validated, and cut if they are too long.

A source row holds, in the task's key column (`messages` in chat.yaml), one of

    [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]    a system message may come first
    [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]             the same in ShareGPT's format
    a text                                                                      with its answer in the column `answer`

and becomes rows `{"messages": [{"role", "content"}, …], "row": n}`. User and assistant alternate, beginning with the
user and ending with the assistant; a last user message without an answer is left out. A dialogue that breaks this rule
is dropped, with the number of the offending message, and so is one in which the assistant calls a tool, as its text
alone would teach to answer without. Thoughts beside an answer are left out.

A dialogue of more than `task.data.max_tokens` tokens becomes several rows. The first has as many whole exchanges as
fit; the next begins with the user's turn after them and repeats the system message, which is how Vicuna's dialogues
were cut. So the model is trained on every answer, and sees what it will see in a chat that has outgrown its window, in
which commands/chat.py leaves out the oldest exchanges. An exchange that is too long by itself ends the dialogue, as
what follows would refer to something the model never saw.

Dialogues are assigned to splits by their first user message, so all that begin alike are in one split.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from core.prompt import exchanges
from data_prep.clean_text import clean_lines, key_of
from data_prep.row_store import Unusable
from data_prep.task import Task

ChatMessage = dict[str, str]

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # besides system, user and assistant


class Reader:
    """Turns a row's raw cells into `(key, cells, how many messages were repaired)`.

    The key's cell then holds, as JSON, the rows that the dialogue becomes, each as `[system text, user, model, user,
    …]`; the other cells are empty.

    Attributes:
        notes: how many dialogues were cut or shortened, by what was done.

    Args:
        tokenizer_file: counts the tokens for `task.data.max_tokens`; None leaves dialogues whole.
    """

    def __init__(self, task: Task, tokenizer_file: Path | None) -> None:
        columns = list(task.data.columns)
        self._place = columns.index(task.data.key[0])
        self._answer_place = columns.index("answer") if "answer" in columns else None
        self._columns, self._prompt, self._most = len(columns), task.prompt, task.data.max_tokens or 0
        self._tokenizer_file = tokenizer_file if self._most else None
        self._cut = f"dialogues of over {self._most} tokens cut between exchanges"
        self._shortened = f"dialogues that end before an exchange of over {self._most} tokens"
        self._thoughtless = "dialogues without the thoughts that they had"
        self.notes = {self._cut: 0, self._shortened: 0, self._thoughtless: 0}

    def __call__(self, raw: Sequence[str]) -> tuple[str, list[str], int]:
        """
        Raises:
            Unusable: the row is not a dialogue, has calls of tools, or its first exchange is too long.
        """
        answer = "" if self._answer_place is None else raw[self._answer_place]
        messages = _read(raw[self._place], answer)
        repaired = 0
        for message in messages:
            message["content"], changed = clean_lines(message["content"])
            repaired += changed
        if len(messages) > 1 and messages[-1]["role"] == "user":
            messages.pop()
        try:
            if exchanges(messages)[-1][1] is None:
                raise ValueError("no message of the assistant")
        except ValueError as error:
            raise Unusable("user and assistant do not take turns", str(error)) from None
        self.notes[self._thoughtless] += any("thought" in message for message in messages)
        system = [message["content"] for message in messages if message["role"] == "system"]
        turns = [message["content"] for message in messages[len(system) :]]
        parts = [[*(system or [""]), *part] for part in self._parts(system, turns)]
        cells = [""] * self._columns
        cells[self._place] = json.dumps(parts, ensure_ascii=False)
        return key_of(turns[0]), cells, repaired

    def _parts(self, system: list[str], turns: list[str]) -> list[list[str]]:
        """Cut `turns` so that each part has at most the allowed number of tokens."""
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
        # A token has at least one byte, so a short dialogue need not be tokenized.
        fewer = 1 + sum(len(text.encode()) + learned for text, learned in pieces) <= self._most
        return fewer or self._count(pieces) <= self._most

    def _pieces(self, system: list[str], turns: list[str]) -> list[tuple[str, bool]]:
        return self._prompt.samples({"messages": write_messages([*(system or [""]), *turns])})[-1]  # the longest

    def _count(self, pieces: list[tuple[str, bool]]) -> int:
        """The number of tokens with BOS and an end token after each model turn, as in training/batches.py."""
        encodings = self._tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        return 1 + sum(len(encoding.ids) for encoding in encodings) + sum(learned for _, learned in pieces)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self._tokenizer_file))


def split_rows(rows: Iterable[Mapping[str, Any]], split: str, task: Task) -> Iterator[dict[str, Any]]:
    """The rows of a split, from what `Reader` stored for each dialogue."""
    for row in rows:
        for part in json.loads(row[task.data.key[0]]):
            yield {"messages": write_messages(part), "row": row["row"]}


def write_messages(part: Sequence[str]) -> list[ChatMessage]:
    """`[system text or "", user, model, user, …]` as messages."""
    system, *turns = part
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def _read(cell: str, answer: str) -> list[ChatMessage]:
    """The messages of a row, with any roles; a message without text has the content ""."""
    if not cell.lstrip().startswith("["):
        return [{"role": "user", "content": cell}, {"role": "assistant", "content": answer}]
    try:
        found = json.loads(cell)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        if answer:  # it is a question that begins with a bracket
            return [{"role": "user", "content": cell}, {"role": "assistant", "content": answer}]
        raise Unusable("no list of messages", "it begins with [ and is no JSON list of objects")
    messages = list[ChatMessage]()
    for number, message in enumerate(found, 1):
        if message.get("tool_calls") or message.get("function_call"):
            raise Unusable("calls of tools are not learned", f"message {number} calls a tool")
        role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
        name = str(role).lower()
        messages.append({"role": ROLES.get(name, name), "content": text if isinstance(text, str) else ""})
        if thought := message.get("reasoning_content") or message.get("reasoning"):
            messages[-1]["thought"] = str(thought)
    return messages
