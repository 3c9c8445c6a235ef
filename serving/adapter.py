"""What is served under a name, and how it is asked: the adapter's prompt, its sampling, and the answer's parts."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from core.prompt import Prompt
from serving.errors import InvalidRequest

Message = Mapping[str, str]  # {"role", "content"}


@dataclass(frozen=True)
class Adapter:
    """What is served under a name, as its catalogue says.

    Attributes:
        sampling: what its task samples with, in the names of vLLM's sampling parameters.
        has_turns: whether it is given a whole dialogue; otherwise each message stands by itself.
        base: the name of the model that it was trained on.
        field: the field of the prompt's instruction that a question fills; None makes it the whole instruction.
        run: the name of the training run's folder.
    """

    name: str
    title: str
    prompt: Prompt
    sampling: dict[str, Any]
    has_turns: bool
    base: str
    field: str | None
    run: str = ""

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> "Adapter":
        prompt = Prompt(**entry["prompt"])
        fields = prompt.instruction_fields()
        return cls(
            entry["name"],
            entry.get("title") or entry["name"],
            prompt,
            dict(entry.get("sampling") or {}),
            bool(entry.get("has_turns", prompt.end)),
            entry.get("base", ""),
            entry.get("field") or (fields[0] if len(fields) == 1 else None),
            entry.get("run", ""),
        )

    def write(self, asked: str | Mapping[str, str]) -> str:
        """Everything the model is given for a question, or for values of the prompt's fields; others take defaults.

        Raises:
            InvalidRequest: a field that the prompt does not have, or a value that is no text.
        """
        if isinstance(asked, str):
            return self.prompt.wrap(self._instruction(asked))
        for name, value in asked.items():
            if name not in self.fields:
                raise InvalidRequest(f"'{self.name}' has no field '{name}'; its prompt has {', '.join(self.fields)}")
            if not isinstance(value, str):
                raise InvalidRequest(f"field '{name}' of '{self.name}' must be a text, not {type(value).__name__}")
        return self.prompt.wrap(self.prompt.write_instruction(**asked))

    def write_dialogue(self, messages: Sequence[Message]) -> str:
        """Everything the model is given before it answers the last of `messages`, the user's.

        A user's message fills the prompt's `field`. Without turns the last message is given alone, after a system text
        if there is one; it may fill several fields, as a JSON object: `{"context": "…", "condition": "…"}`.

        Raises:
            InvalidRequest: messages that are no dialogue.
        """
        seen = list(messages)
        if not all(isinstance(message, Mapping) for message in seen):
            raise InvalidRequest('messages: each is an object, {"role": "user", "content": "…"}')
        if not self.has_turns:
            seen = [message for message in seen[:-1][:1] if message.get("role") == "system"] + seen[-1:]
        try:
            return self.prompt.wrap_dialogue([self._said(message) for message in seen])
        except ValueError as error:
            raise InvalidRequest(f"messages: {error}") from None

    def dialogue(
        self, messages: Sequence[Message], base: bool, sampling: Mapping[str, Any], forget: bool = False
    ) -> "Request":
        """`messages` for this adapter; with `forget`, ready to leave out the oldest exchange where they do not fit."""
        request = self.request(self.write_dialogue(messages), base, sampling)
        first = int(messages[0]["role"] == "system")
        rest = [*messages[:first], *messages[first + 2 :]]
        if forget and self.has_turns and len(rest) > first:
            return replace(request, shorter=partial(self.dialogue, rest, base, sampling, True))
        return request

    def request(self, text: str, base: bool, sampling: Mapping[str, Any]) -> "Request":
        """`text` for this adapter, or for the base alone, sampled as its task is unless `sampling` says otherwise."""
        return Request(text, {**self.sampling, **sampling, **({} if base else {"lora_name": self.name})}, self.prompt)

    def _said(self, message: Message) -> Message:
        text = message.get("content")
        if message.get("role") != "user" or not isinstance(text, str) or not text.strip():
            return message  # what is wrong with it, the prompt says
        fields = None if self.has_turns else _object(text)
        if fields and all(isinstance(value, str) for value in fields.values()) and set(fields) <= set(self.fields):
            return {**message, "content": self.prompt.write_instruction(**fields)}
        return {**message, "content": self._instruction(text)}

    @property
    def fields(self) -> list[str]:
        """The fields of the prompt's instruction."""
        return self.prompt.instruction_fields()

    def _instruction(self, text: str) -> str:
        return self.prompt.write_instruction(**{self.field: text}) if self.field else text


# The base alone, under the name of its Triton model. Gemma's instruction-tuned models know these turns; others do not,
# but there is no better way to ask them. https://ai.google.dev/gemma/docs/core/prompt-structure
BASE = Adapter(
    "gemma",
    "The base, without an adapter",
    Prompt(
        "<start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n{response}<end_of_turn>",
        "{message}",
        "{answer}",
    ),
    {"max_tokens": 256, "stop": ["<end_of_turn>"]},
    True,
    "",
    "message",
)


@dataclass
class Answer:
    """What a model said.

    Attributes:
        finish_reason: "stop" where the model ended it, "length" at max_tokens, "cancelled".
        fields: the parts of a task's answer by name, e.g. slang, description and example.
        forgotten: how many of a dialogue's oldest exchanges the model was not given, as they did not fit.
    """

    text: str = ""
    finish_reason: str = "cancelled"
    input_tokens: int = 0
    output_tokens: int = 0
    fields: dict[str, str] = field(default_factory=dict)
    forgotten: int = 0


@dataclass(frozen=True)
class Request:
    """What is sent: the whole text, vLLM's sampling parameters, and the prompt that an answer is read with.

    Attributes:
        shorter: makes the same request with less before it, for a text that does not fit in the model's window.
    """

    text: str
    sampling: dict[str, Any]
    prompt: Prompt | None = None
    shorter: "Callable[[], Request] | None" = None


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
