"""How a row becomes a prompt and a response: the one place, for data, training, evaluation and serving.

A `Prompt` is written into every checkpoint and exported adapter, so a model is asked the way it was trained.
It needs only the standard library, and fills `{name}` by plain replacement: a template that comes with a
checkpoint from elsewhere cannot reach into Python objects as `str.format` would let it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROMPT_FILE = "prompt.json"  # beside the weights in an exported folder
EOS = "<eos>"  # of every Gemma, as text
_FIELD = re.compile(r"\{(\w+)\}")
# Gemma's control tokens as text, those of all generations. In somebody's message they are text, and stay so.
_CONTROL = re.compile(
    r"<(?=(?:pad|eos|bos|unk|mask|unused\d+|start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token)>)"
)
_END = re.compile(r"(<\w+>)?")  # what may follow {response}: one token of the model's own


@dataclass(frozen=True)
class Prompt:
    """A task's wording.

    Attributes:
        template: the whole text of a row, with `{instruction}` and, at its end, `{response}`. One token of the model's
            may follow, such as `<end_of_turn>`: it is learned as the end of a response in place of EOS.
        instruction: how the fields of a row make an instruction, e.g. `{tag}{context}{condition}`.
        response: how the fields of a row make a response, one `Label: {field}` a line.
        fields: values for the fields that a row or a caller leaves out.
    """

    template: str
    instruction: str
    response: str
    fields: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        before, _, end = self.template.partition("{response}")
        if before.count("{instruction}") != 1 or "{response}" not in self.template or not _END.fullmatch(end):
            raise ValueError(
                f"prompt template must hold {{instruction}} once and end in {{response}}, or in {{response}} and one "
                f"token such as <end_of_turn>: {self.template!r}"
            )

    def write_instruction(self, **values: str) -> str:
        """The instruction for `values`; fields left out take the task's defaults, unknown ones become empty.

        A line whose fields are all empty is left out, here as in a response.
        """
        return self._write(self.instruction, {**self.fields, **values})

    def write_response(self, **values: str) -> str:
        """The response for `values`. A line whose fields are all empty is left out, as in a two-column table."""
        return self._write(self.response, values)

    def _write(self, template: str, values: dict[str, str]) -> str:
        lines = template.split("\n")
        kept = [line for line in lines if not _FIELD.findall(line) or any(values.get(f) for f in _FIELD.findall(line))]
        return self._fill("\n".join(kept), values)

    @property
    def end(self) -> str:
        """What the template has after `{response}`: a token that ends the model's turn, or nothing."""
        return self.template.partition("{response}")[2]

    def wrap(self, instruction: str) -> str:
        """Everything the model is given before it answers. Control tokens in `instruction` are text to it."""
        return self._fill(self.template.partition("{response}")[0], {"instruction": disarm(instruction)})

    def pieces(self, row: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """A row's whole text in pieces: each with whether it is learned. After a learned one comes the end token.

        Args:
            row: `{"input", "output"}`, or `{"messages": [{"role", "content"}, …]}` that ends with the model's answer.

        Raises:
            ValueError: see `exchanges`.
        """
        if "messages" not in row:
            return [(self.wrap(row["input"]), False), (disarm(row["output"]), True)]
        pieces: list[tuple[str, bool]] = []
        for user, model in exchanges(row["messages"]):
            if model is None:
                raise ValueError("the dialogue ends with the user; its last message must be the model's")
            pieces += [("\n" * bool(pieces) + self.wrap(user), False), (disarm(model), True)]
        return pieces

    def wrap_dialogue(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Everything the model is given before it answers the last of `messages`, the user's. As `wrap`, of many turns.

        Raises:
            ValueError: see `exchanges`; or the last message is the model's.
        """
        text = ""
        for user, model in exchanges(messages):
            text += "\n" * bool(text) + self.wrap(user) + ("" if model is None else disarm(model) + (self.end or EOS))
        if model is not None:
            raise ValueError("the dialogue ends with the model; its last message must be the user's")
        return text

    def end_id(self, tokenizer: Any) -> int:
        """The token after which a response is over, of a Hugging Face tokenizer.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        if not self.end:
            return int(tokenizer.eos_token_id)
        ids = tokenizer(self.end, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"task.prompt.template ends in {self.end}, which is no token of this model")
        return int(ids[0])

    def read_response(self, text: str) -> dict[str, str]:
        """The fields of a generated response, the inverse of `write_response`; those not found are left out."""
        labels = self.labels()
        found: dict[str, str] = {}
        current = None
        for line in text.split("\n"):
            named = next((name for name, label in labels.items() if label and line.startswith(label)), None)
            if named in found:
                break  # the model has begun a second answer
            if named:
                current, line = named, line[len(labels[named]) :]
            if current:
                found[current] = f"{found.get(current, '')}\n{line}".strip()
        return found

    def instruction_fields(self) -> list[str]:
        """The names of the fields that an instruction is made of, in order."""
        return _FIELD.findall(self.instruction)

    def labels(self) -> dict[str, str]:
        """Field → the label before it in a response, e.g. `{"description": "Definition:"}`."""
        lines = [line for line in self.response.split("\n") if _FIELD.search(line)]
        return {_FIELD.findall(line)[0]: line.split("{")[0].strip() for line in lines}

    def save(self, folder: Path) -> None:
        (folder / PROMPT_FILE).write_text(
            json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> "Prompt":
        return cls(**json.loads((folder / PROMPT_FILE).read_text(encoding="utf-8")))

    @staticmethod
    def _fill(text: str, values: dict[str, str]) -> str:
        return _FIELD.sub(lambda match: values.get(match[1]) or "", text)


def exchanges(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str | None]]:
    """`[(user, model), …]` of a dialogue; the last model is None where the user spoke last.

    As in Gemma's own chat template, texts lose the spaces around them, and a system message, which Gemma's turns have
    no place for, becomes the beginning of the first user's.

    Raises:
        ValueError: a role that is none of system, user, assistant and model; turns that do not alternate, with the user
            first; a message without text.
    """
    system, found = "", list[tuple[str, str | None]]()
    for number, message in enumerate(messages, 1):
        role, text = message.get("role"), message.get("content")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"message {number} has no text")
        text = text.strip()
        waiting = bool(found) and found[-1][1] is None  # for the model
        if role == "system" and number == 1:
            system = text + "\n\n"
        elif role == "user" and not waiting:
            found.append((system + text if not found else text, None))
        elif role in ("assistant", "model") and waiting:
            found[-1] = (found[-1][0], text)
        else:
            due = "assistant" if waiting else "user"
            raise ValueError(
                f"message {number} is of role {role!r} where {due} is due: user and assistant alternate, "
                f"after one system message at most"
            )
    if not found:
        raise ValueError("the dialogue has no message of a user")
    return found


def disarm(text: str) -> str:
    """`text` in which a control token is text: `<end_of_turn>` → `< end_of_turn>`, which is seven ordinary tokens.

    Otherwise whoever writes a message, or a row of a table, could end their turn and speak as the model. It is done to
    the text and not in a tokenizer, so that every server that is given a prompt as text agrees with training.
    """
    return _CONTROL.sub("< ", text)
