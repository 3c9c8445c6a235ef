"""Multi-turn dialogues: parsed from their usual formats, cleaned, validated, and cut if they are too long.

A source row holds, in the task's key column (`messages` in chat.yaml), one of

    [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]    or as in read_messages.py
    a text, or such a list that ends with the user                              with its answer in the column `answer`
    \n\nHuman: …\n\nAssistant: …                                                a transcript

A text may have more in other columns: `about`, which follows it after a blank line (Alpaca's input), and `history`, the
turns before it. `system` is the system message of any dialogue without one. What of them is not used is counted.

It becomes rows `{"messages": [{"role", "content"}, …], "row": n}`. User and assistant alternate, beginning with the
user and ending with the assistant; a system message may come first, and a last user message without an answer is left
out. A dialogue that breaks this rule is dropped, with the number of the offending message, and so is one in which the
assistant calls a tool, as its text alone would teach to answer without. Where the call is written in the text, the
tool's answer becomes the user's turn. Thoughts beside an answer are left out.

An answer that is marked not to be learned gets `"weight": 0`: it is context of what follows, and no target. A dialogue
ends with the last answer that is learned.

A dialogue of more than `task.data.max_tokens` tokens becomes several rows. The first has as many whole exchanges as
fit; the next begins with the user's turn after them and repeats the system message, which is how Vicuna's dialogues
were cut. So the model is trained on every answer, and sees what it will see in a chat that has outgrown its window, in
which commands/chat.py leaves out the oldest exchanges. An exchange that is too long by itself ends the dialogue, as
what follows would refer to something the model never saw.

Dialogues are assigned to splits by their first user message, so all that begin alike are in one split.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from core.prompt import exchanges, is_learned
from data_prep.clean_text import clean_lines, key_of
from data_prep.read_table import NotText
from data_prep.row_store import Unusable
from data_prep.task import Task
from tasks.chat.read_messages import read_messages, read_parts

ChatMessage = dict[str, Any]
# Anthropic's transcripts, and the like.
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|User|Assistant): ?")
Turn = str | list[str]  # an answer that is context only is the one text of a list


class Reader:
    """Turns a row's raw cells into `(key, cells, how many messages were repaired)`.

    The key's cell then holds, as JSON, the rows that the dialogue becomes, each as `[system text, user, model, user,
    …]`, where an answer that is context only is a list of one text; the other cells are empty.

    Attributes:
        notes: how many dialogues were cut or shortened, by what was done.

    Args:
        tokenizer_file: counts the tokens for `task.data.max_tokens`; None leaves dialogues whole.
    """

    def __init__(self, task: Task, tokenizer_file: Path | None) -> None:
        columns = list(task.data.columns)
        self._place = columns.index(task.data.key[0])
        self._places = {name: place for place, name in enumerate(columns) if place != self._place}
        self._columns, self._prompt, self._most = len(columns), task.prompt, task.data.max_tokens or 0
        self._tokenizer_file = tokenizer_file if self._most else None
        self._cut = f"dialogues of over {self._most} tokens cut between exchanges"
        self._shortened = f"dialogues that end before an exchange of over {self._most} tokens"
        self._thoughtless = "dialogues without the thoughts that they had"
        self._context = "dialogues with answers that are context only, as they are marked"
        self._weighed = "dialogues with weights other than 0 and 1, which count as 1"
        self._asked = "dialogues with messages marked to be learned that are not the assistant's; those are not learned"
        self._tools = "dialogues in which a tool's answer is given as the user's turn"
        self._answered = "dialogues that end with an answer; the one in a column of its own is left out"
        notes = self._cut, self._shortened, self._thoughtless, self._context, self._weighed, self._asked
        self.notes = Counter(dict.fromkeys((*notes, self._tools, self._answered), 0))

    def __call__(self, raw: Sequence[str]) -> tuple[str, list[str], int]:
        """
        Raises:
            Unusable: the row is not a dialogue, has calls of tools, or its first exchange is too long.
        """
        more = {name: raw[place] for name, place in self._places.items() if raw[place].strip()}
        messages = self._read(raw[self._place], more)
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
        while not is_learned(messages[-1]):
            if len(messages) < 4:
                raise Unusable("no answer is marked to be learned", "all its answers are context only")
            del messages[-2:]
        self._note(messages)
        system = [message["content"] for message in messages if message["role"] == "system"]
        turns = [
            [message["content"]] if message["role"] == "assistant" and not is_learned(message) else message["content"]
            for message in messages[len(system) :]
        ]
        parts = [[*(system or [""]), *part] for part in self._parts(system, turns)]
        cells = [""] * self._columns
        cells[self._place] = json.dumps(parts, ensure_ascii=False)
        return key_of(str(turns[0])), cells, repaired

    def _read(self, cell: str, more: dict[str, str]) -> list[ChatMessage]:
        """The messages of a row, with any roles; a message without text has the content "".

        Args:
            more: the other cells that are filled, by field.
        """
        answer = more.pop("answer", "")
        messages = read_messages(cell, not answer) or ([] if answer else _transcript(cell))
        answered = (read_messages(answer, False) or [{"role": "assistant", "content": answer}]) if answer else []
        if answered and answered[0]["role"] in ("system", "user"):
            messages, answered = answered, []  # the whole dialogue, as in some tables of preference pairs
        if not messages:
            if cell.lstrip().startswith("[") and not answer:
                raise Unusable("no list of messages", "it begins with [ and is no list of messages in JSON or Python")
            about = "" if isinstance(about := more.get("about", ""), NotText) else about
            earlier = read_messages(more.get("history", "")) or []
            messages = [*earlier, {"role": "user", "content": "\n\n".join(filter(None, (cell.rstrip(), about)))}]
            answered = answered or [{"role": "assistant", "content": ""}]
            if about:
                del more["about"]
            if earlier:
                del more["history"]
        system = more.get("system", "")
        if isinstance(system, NotText):
            system = read_parts(system)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
            del more["system"]
        for name in more:
            if name in ("about", "history", "system"):
                self.notes[f"dialogues whose {name} is not used"] += 1
        if messages[-1]["role"] == "assistant" and answered:
            self.notes[self._answered] += 1
            answered = []
        found = list[ChatMessage]()
        for number, message in enumerate([*messages, *answered], 1):
            if message.pop("calls", False):
                raise Unusable("calls of tools are not learned", f"message {number} calls a tool")
            before = found[-1] if found else message
            if message["role"] == "tool" and "tool" in before:
                before["content"] += "\n" + message["content"]
            elif message["role"] == "tool" and before["role"] == "assistant":
                found.append({"role": "user", "content": message["content"], "tool": True})
            else:
                found.append(message)
        return found

    def _note(self, messages: Sequence[ChatMessage]) -> None:
        """Count the dialogue for what of it is not used as it was given."""
        spoken = [message for message in messages if message["role"] == "assistant"]
        self.notes[self._tools] += any("tool" in message for message in messages)
        self.notes[self._thoughtless] += any("thought" in message for message in spoken)
        self.notes[self._context] += not all(map(is_learned, spoken))
        self.notes[self._weighed] += any(message.get("weight", 1) not in (0, 1) for message in spoken)
        self.notes[self._asked] += any(message.get("weight") for message in messages if message["role"] != "assistant")

    def _parts(self, system: list[str], turns: list[Turn]) -> list[list[Turn]]:
        """Cut `turns` so that each part has at most the allowed number of tokens."""
        if self._fits(system, turns):
            return [turns]
        parts, first = list[list[Turn]](), 0
        while first < len(turns):
            end = first
            while end < len(turns) and self._fits(system, turns[first : end + 2]):
                end += 2
            if end == first:
                break
            if any(isinstance(turn, str) for turn in turns[first + 1 : end : 2]):
                parts.append(turns[first:end])
            first = end
        if not parts:
            tokens = self._count(self._pieces(system, turns[:2]))
            raise Unusable(f"the first exchange has over {self._most} tokens", f"it has {tokens}")
        self.notes[self._cut] += len(parts) > 1
        self.notes[self._shortened] += first < len(turns)
        return parts

    def _fits(self, system: list[str], turns: list[Turn]) -> bool:
        if self._tokenizer_file is None:
            return True
        pieces = self._pieces(system, turns)
        # A token has at least one byte, so a short dialogue need not be tokenized.
        fewer = 1 + sum(len(text.encode()) + learned for text, learned in pieces) <= self._most
        return fewer or self._count(pieces) <= self._most

    def _pieces(self, system: list[str], turns: list[Turn]) -> list[tuple[str, bool]]:
        samples = self._prompt.samples({"messages": write_messages([*(system or [""]), *turns])})
        return samples[-1] if samples else []  # the longest

    def _count(self, pieces: list[tuple[str, bool]]) -> int:
        """The number of tokens with BOS and an end token after each model turn, as in training/batches.py."""
        encodings = self._tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        return 1 + sum(len(encoding.ids) for encoding in encodings) + sum(learned for _, learned in pieces)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self._tokenizer_file))


ROW_BY_ROW = True


def split_rows(rows: Iterable[Mapping[str, Any]], split: str, task: Task) -> Iterator[dict[str, Any]]:
    """The rows of a split, from what `Reader` stored for each dialogue."""
    for row in rows:
        for part in json.loads(row[task.data.key[0]]):
            yield {"messages": write_messages(part), "row": row["row"]}


def _transcript(cell: str) -> list[ChatMessage]:
    """The messages of `Human: …\n\nAssistant: …`, none where a text is none or has one turn alone."""
    before, *said = _SPEAKER.split(cell)
    if before.strip() or len(said) < 4:
        return []
    roles = {"Assistant": "assistant"}
    return [{"role": roles.get(who, "user"), "content": text} for who, text in zip(said[::2], said[1::2], strict=True)]


def write_messages(part: Sequence[Turn]) -> list[ChatMessage]:
    """`[system text or "", user, model, user, …]` as messages."""
    system, *turns = part
    messages: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    for number, text in enumerate(turns):
        said = {"content": text} if isinstance(text, str) else {"content": text[0], "weight": 0}
        messages.append({"role": ("user", "assistant")[number % 2], **said})
    return messages
