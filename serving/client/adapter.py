"""What is served under a name, and how a question becomes what is sent: its prompt and its sampling parameters."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from .errors import InvalidRequest
from .prompt import Prompt, ToolCall, disarm

Message = Mapping[str, Any]  # {"role", "content"}, or in OpenAI's form a call of a tool or its answer


@dataclass(frozen=True)
class Adapter:
    """An entry of the server's catalogue: a LoRA adapter, or the base model alone.

    Attributes:
        sampling: the task's own sampling parameters, by vLLM's names.
        has_turns: whether the model is given the whole dialogue; otherwise only its last message.
        base: the name of the base model it was trained on.
        field: the field of the prompt's instruction that a plain question fills; None: the question is the instruction.
        run: the name of the training run's folder.
        licence: of its base, as the hub calls it: gemma or apache-2.0.
    """

    name: str
    title: str
    prompt: Prompt
    sampling: dict[str, Any]
    has_turns: bool
    base: str
    field: str | None
    run: str = ""
    licence: str = "gemma"

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> "Adapter":
        """The adapter of one JSON object of the server's catalogue.

        Raises:
            ValueError, KeyError, TypeError: the entry does not have the form of one.
        """
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
            entry.get("licence", "gemma"),
        )

    def write(self, question: str | Mapping[str, str]) -> str:
        """The whole prompt for a question, or for values of the prompt's fields; the other fields take their defaults.

            adapter.write("You missed the last bus home.")
            adapter.write({"context": "You missed the last bus home.", "condition": "Be brief."})

        Raises:
            InvalidRequest: the prompt has no such field, or a value is not a string.
        """
        if isinstance(question, str):
            if self.field is None:
                return self.prompt.wrap(question)
            question = {self.field: question}
        for name, value in question.items():
            if name not in self.fields:
                raise InvalidRequest(
                    f"'{self.name}' has no field '{name}'; the fields of its prompt are {', '.join(self.fields)}"
                )
            if not isinstance(value, str):
                raise InvalidRequest(f"field '{name}' of '{self.name}' must be a string, not {type(value).__name__}")
        return self.prompt.wrap(self.prompt.write_instruction(**question))

    def write_dialogue(
        self, messages: Sequence[Message], thinking: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The whole prompt for a dialogue whose last message is the user's, or the answer of one of `tools`.

        After it may stand the beginning of the answer, which the model goes on with: the assistant's, with
        `"prefix": True`.

        A user's message fills the prompt's `field`. Without turns only the last message is used, after the system
        message if there is one; it may fill several fields, as a JSON object: `{"context": "…", "condition": "…"}`.

        Raises:
            InvalidRequest: the messages are not a dialogue, or this prompt has no thinking or no tools.
        """
        seen = list(messages)
        if not all(isinstance(message, Mapping) for message in seen):
            raise InvalidRequest('messages: each must be an object, {"role": "user", "content": "…"}')
        beginning: Any = ""
        if seen and seen[-1].get("role") == "assistant" and seen[-1].get("prefix") is True:
            beginning = seen.pop().get("content")
            if not isinstance(beginning, str):
                raise InvalidRequest("messages: the beginning of the answer must be a string")
        if not self.has_turns:
            seen = [message for message in seen[:-1][:1] if message.get("role") == "system"] + seen[-1:]
        try:
            asked = self.prompt.wrap_dialogue([self._fill_message(message) for message in seen], thinking, tools)
            return asked + disarm(beginning)
        except ValueError as error:
            names_itself = str(error).startswith(("tools:", "thinking:"))
            raise InvalidRequest(str(error) if names_itself else f"messages: {error}") from None

    def dialogue(
        self,
        messages: Sequence[Message],
        base: bool,
        sampling: Mapping[str, Any],
        forget: bool = False,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> "PreparedRequest":
        """The request for a dialogue; with `forget`, its oldest exchanges can be left out."""
        request = self.request(self.write_dialogue(messages, thinking, tools), base, sampling)
        first = int(messages[0]["role"] == "system")
        later = (at for at, message in enumerate(messages) if at > first and message["role"] == "user")
        rest = [*messages[:first], *messages[next(later, len(messages)) :]]
        if forget and self.has_turns and len(rest) > first:
            return replace(request, shorter=partial(self.dialogue, rest, base, sampling, True, thinking, tools))
        return request

    def request(self, text: str, base: bool, sampling: Mapping[str, Any]) -> "PreparedRequest":
        """The request for a whole prompt, to this adapter or to the base alone; `sampling` overrides the task's own."""
        adapter = {} if base else {"lora_name": self.name}
        return PreparedRequest(text, {**self.prompt.sampling, **self.sampling, **sampling, **adapter}, self.prompt)

    def _fill_message(self, message: Message) -> Message:
        text = message.get("content")
        if message.get("role") != "user" or not isinstance(text, str) or not text.strip():
            return message  # the prompt raises for it
        fields = None if self.has_turns else _object(text)
        if fields and all(isinstance(value, str) for value in fields.values()) and set(fields) <= set(self.fields):
            return {**message, "content": self.prompt.write_instruction(**fields)}
        return {**message, "content": self._instruction(text)}

    @property
    def fields(self) -> list[str]:
        """The names of the fields of the prompt's instruction."""
        return self.prompt.instruction_fields()

    def _instruction(self, text: str) -> str:
        return self.prompt.write_instruction(**{self.field: text}) if self.field else text


# The base alone, under the name of its Triton model, for servers whose catalogue does not say how theirs is asked.
# Gemma's instruction-tuned models were trained with these turns; the pretrained ones were not, but have no better
# format. https://ai.google.dev/gemma/docs/core/prompt-structure
BASE = Adapter(
    "gemma",
    "The base model, without an adapter",
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


class TokenLogprob(NamedTuple):
    """What the model thought of a token in its place.

    Attributes:
        token: its text.
        logprob: natural logarithm of its probability, before the sampling parameters changed it.
        rank: 1 for the most likely one.
        bytes: of `token`; of one that is a byte of a longer character, that byte; None: the server did not say it.
    """

    id: int
    token: str
    logprob: float
    rank: int
    bytes: bytes | None


@dataclass
class Answer:
    """A model's answer.

    Attributes:
        finish_reason: "stop": the model ended it; "length": `max_tokens` or the context window ended it; "cancelled".
        fields: the fields of a task's answer by name, e.g. slang, description and example.
        forgotten: how many of the dialogue's oldest exchanges were left out because they did not fit in the window.
        thought: what the model thought before it answered, which is no part of `text`.
        tool_calls: the functions that the model asks to be called.
        logprobs: for each of the `output_tokens`, where the sampling parameter `logprobs` asked for it: the token, then
            the most likely ones in its place.
    """

    text: str = ""
    finish_reason: str = "cancelled"
    input_tokens: int = 0
    output_tokens: int = 0
    fields: dict[str, str] = field(default_factory=dict)
    forgotten: int = 0
    thought: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)


@dataclass(frozen=True)
class PreparedRequest:
    """A request that is ready to be sent.

    Attributes:
        text: the whole prompt, or its tokens.
        sampling: vLLM's sampling parameters, with the adapter's name as `lora_name`.
        prompt: parses the answer into its fields.
        shorter: makes the same request without the dialogue's oldest exchange, for one that is too long.
    """

    text: str | Sequence[int]
    sampling: dict[str, Any]
    prompt: Prompt | None = None
    shorter: "Callable[[], PreparedRequest] | None" = None


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
