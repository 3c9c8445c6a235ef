"""How an example becomes a prompt and a response, for data preparation, training, evaluation and serving alike.

A `Prompt` is written into every checkpoint and exported adapter, so that a model is prompted as it was trained. This
file and gemma4_*.py are part of the client's wheel too (setup.py), so they need only the standard library. `{name}` is
filled by plain replacement: a template in a checkpoint from elsewhere cannot reach into Python objects as it could with
`str.format`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .gemma4_answers import AnswerPart, AnswerReader, ToolCall, read_answer
from .gemma4_turns import MODEL_TURN, TURN, check_tools, check_turns, strip_thoughts, write_dialogue

__all__ = ["CONTINUED", "EOS", "PROMPT_FILE", "AnswerPart", "AnswerReader", "Prompt", "ToolCall", "disarm", "exchanges"]

PROMPT_FILE = "prompt.json"  # beside the weights in an exported folder
EOS = "<eos>"  # of every Gemma, as text
CONTINUED = "{instruction}{response}"  # the template of plain text, which has no instruction
_FIELD = re.compile(r"\{(\w+)\}")
# The control tokens of all Gemma generations, as text. In a user's message they must not act as control tokens.
_CONTROL = re.compile(
    r"<(?=(?:pad|eos|bos|unk|mask|unused\d+|start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token"
    r"|start_of_audio|end_of_audio|audio_soft_token)>"
    r"|\|(?:turn|channel|think|tool|tool_call|tool_response|image|audio|video|\")\|?>"
    r"|(?:turn|channel|think|tool|tool_call|tool_response|image|audio|video)\|>)"
)
_END = re.compile(r"(<\w+>|<\w+\|>)?")  # what may follow {response}: one token of the model's own


@dataclass(frozen=True)
class Prompt:
    """A task's prompt template.

        prompt = Prompt("{instruction}\\n{response}", "Describe {thing}.", "Colour: {colour}")
        prompt.wrap(prompt.write_instruction(thing="the sky"))    # 'Describe the sky.\\n'
        prompt.read_response("Colour: blue")                      # {'colour': 'blue'}

    Attributes:
        template: the text of an example, with `{instruction}` and, at its end, `{response}`. One token of the model's
            may follow, such as `<end_of_turn>`: it is the target after a response in place of EOS. Gemma 4's turns are
            known by `<|turn>`: they have a turn for the system, thoughts and tools (gemma4_turns.py).
        instruction: how the fields of an example make an instruction, e.g. `{tag}{context}{condition}`.
        response: how the fields of an example make a response, one `Label: {field}` a line.
        fields: values for the fields that an example or a caller leaves out.

    Raises:
        ValueError: `template` does not hold `{instruction}` once, or does not end as described.
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
        asked, model_turn, _ = before.partition(MODEL_TURN)
        if self.has_gemma4_turns and not (model_turn and "{instruction}" in asked):
            raise ValueError(
                f"prompt template with Gemma 4's turns must have the line <|turn>model between {{instruction}} and "
                f"{{response}}: {self.template!r}"
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
        lines = _lines(template)
        if not all(values.get(name) for _, fields in lines for name in fields):
            kept = [line for line, fields in lines if not fields or any(values.get(name) for name in fields)]
            template = "\n".join(kept)
        return self._fill(template, values)

    @property
    def end(self) -> str:
        """The token after `{response}` in the template, which ends the model's turn; "" if there is none."""
        return self.template.partition("{response}")[2]

    @property
    def has_gemma4_turns(self) -> bool:
        """Whether there is a turn for the system, thinking and tools, and answers may hold thoughts and calls."""
        return TURN in self.template

    @property
    def continues_text(self) -> bool:
        """Whether the model goes on with a text, rather than answer: instruction and response are one field, with
        nothing around them."""
        return self.template == CONTINUED and self.instruction == self.response

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters, by vLLM's names, that `read_answer` needs an engine to be given."""
        return {"skip_special_tokens": False} if self.has_gemma4_turns else {}

    def wrap(self, instruction: str) -> str:
        """The text that the model is given for `instruction`, in which control tokens are disarmed."""
        return self._fill(self.template.partition("{response}")[0], {"instruction": disarm(instruction)})

    def samples(self, example: Mapping[str, Any]) -> list[list[tuple[str, bool]]]:
        """What an example trains the model on: samples, each in pieces `(text, is_target)`.

        The loss is on targets; the end token follows each of them. A dialogue is one sample where every answer comes
        after the very text that it is asked for with, the answers before it included. Gemma 4's large sizes are asked
        with an empty thought that earlier turns do not have, so that each answer is a sample of its own. A plain text
        is a target from its first token on.

        Args:
            example: `{"text"}`, `{"input", "output"}`, or `{"messages": [{"role", "content"}, …]}`, which ends with an
                answer. One of `"weight": 0` is context: it stands in the text of the next one, as at inference, and is
                no target. Where there is no other, there is no sample.

        Raises:
            ValueError: see `exchanges`.
        """
        if "messages" not in example and "input" not in example:
            return [[(disarm(example["text"]), True)]]
        if "messages" not in example:
            return [[(self.wrap(example["input"]), False), (self._answer(example["output"]), True)]]
        messages, pieces, given = example["messages"], list[tuple[str, bool]](), ""
        answers = [message for message in messages if message["role"] in ("assistant", "model")]
        for place, (user, model) in enumerate(exchanges(messages)):
            if model is None:
                raise ValueError("the dialogue ends with the user; its last message must be the model's")
            given += "\n" * (place > 0) + self.wrap(user)
            if is_learned(answers[place]):
                pieces += [(given, False), (self._answer(model), True)]
                given = ""
            else:
                given += self._answer(model) + (self.end or EOS)
        if not self.has_gemma4_turns:
            return [pieces] if pieces else []
        found, said = list[list[tuple[str, bool]]](), ""
        for number, message in enumerate(messages):
            if message["role"] in ("assistant", "model") and is_learned(message):
                asked, answer = self.wrap_dialogue(messages[:number]), self._answer(message["content"])
                if found and asked.startswith(said):
                    found[-1] += [(asked[len(said) :], False), (answer, True)]
                else:
                    found.append([(asked, False), (answer, True)])
                said = asked + answer + (self.end or EOS)
        return found

    def pieces(self, example: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """The pieces of all samples of an example, see `samples`."""
        return [piece for sample in self.samples(example) for piece in sample]

    def wrap_dialogue(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text that the model is given to answer the last of `messages`, the user's. As `wrap`, for many turns.

        Args:
            thinking: let the model think before it answers.
            tools: functions that it may call, in OpenAI's form. `messages` may then have calls (`tool_calls`) and
                answers of tools (`role` "tool"), and end with one of these.

        Raises:
            ValueError: see `exchanges`; the last message is the model's; or the prompt has no thinking or no tools.
        """
        if self.has_gemma4_turns:
            head, _, opening = self.template.partition("{response}")[0].partition(MODEL_TURN)
            return write_dialogue(
                _disarmed(check_turns(messages)),
                lambda text: self._fill(head, {"instruction": text}),
                self.end or EOS,
                opening,
                thinking,
                _disarmed(check_tools(tools)),
            )
        if thinking or tools:
            raise ValueError(f"{'tools' if tools else 'thinking'}: the prompt of this model has no place for it")
        text = ""
        for user, model in exchanges(messages):
            text += "\n" * bool(text) + self.wrap(user) + ("" if model is None else disarm(model) + (self.end or EOS))
        if model is not None:
            raise ValueError("the dialogue ends with the model; its last message must be the user's")
        return text

    def _answer(self, text: str) -> str:
        """An answer as it is learned, and as it stands in a dialogue."""
        return disarm(strip_thoughts(text) if self.has_gemma4_turns else text)

    def read_answer(self, asked: str, text: str) -> AnswerPart:
        """Answer and thought of a generated `text`; with Gemma 4's turns, `text` has its control tokens."""
        return read_answer(asked, text)[0] if self.has_gemma4_turns else AnswerPart(text, "")

    def end_id(self, tokenizer: Any) -> int:
        """The id of the token that ends a response, in a Hugging Face tokenizer.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        if not self.end:
            return int(tokenizer.eos_token_id)
        ids = tokenizer(self.end, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"task.prompt.template ends in {self.end}, which is not a token of this model")
        return int(ids[0])

    def read_response(self, text: str) -> dict[str, str]:
        """The fields of a generated response, those that are found: the inverse of `write_response`."""
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

    def has_all_parts(self, fields: Mapping[str, str]) -> bool:
        """Whether a response was read that has every part with a label, with text behind each."""
        return all(fields.get(name) for name, label in self.labels().items() if label)

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


@cache  # of a template there are millions of rows
def _lines(template: str) -> list[tuple[str, list[str]]]:
    """The lines of a template, each with the fields in it."""
    return [(line, _FIELD.findall(line)) for line in template.split("\n")]


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether an answer in a dialogue is a target: all are but those of `"weight": 0`, OpenAI's word for it."""
    return message.get("weight") != 0


def exchanges(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str | None]]:
    """The dialogue `messages` as `[(user, model), …]`; the last model is None where the user spoke last.

    As in Gemma's own chat template, white space around texts is removed, and a system message, for which Gemma has no
    turn, is put before the first message of the user.

    Raises:
        ValueError: a role is none of system, user, assistant and model; turns do not alternate, the user's first; or a
            message has no text.
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
                f"message {number} has role {role!r} where {due} is expected: user and assistant alternate, "
                f"after one system message at most"
            )
    if not found:
        raise ValueError("the dialogue has no user message")
    return found


def _disarmed(value: Any) -> Any:
    """`value` of JSON with all its texts disarmed."""
    if isinstance(value, str):
        return disarm(value)
    if isinstance(value, Mapping):
        return {disarm(str(key)): _disarmed(inner) for key, inner in value.items()}
    return [_disarmed(inner) for inner in value] if isinstance(value, list | tuple) else value


def disarm(text: str) -> str:
    """`text` without control tokens: `<end_of_turn>` → `< end_of_turn>`, which is seven ordinary tokens.

    Otherwise the author of a message, or of a row of a table, could end the user's turn and speak as the model. This is
    done in the text rather than in a tokenizer, so that every server that is given a prompt as text agrees with
    training.
    """
    return _CONTROL.sub("< ", text)
