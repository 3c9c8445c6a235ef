"""A dialogue with a model: its messages, how many of them fit into the context window, and answers as they are made."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from core.errors import UserError
from core.prompt import Prompt


class Dialogue:
    """Messages of a user and answers of a model, by plain transformers and peft.

    A prompt that ends the model's turn with a token, as Gemma's turns do, is given the whole dialogue; any other
    has room for one question, so that each message is asked alone.

    Attributes:
        system: a text before the first message; "" for none.
        messages: `{"role", "content"}` of all that was said, user and assistant in turn.
        forgotten: how many of the oldest exchanges no longer fit in the model's window.

    Args:
        sampling: arguments of transformers' `generate`, with `max_new_tokens`.
        field: the field of the prompt's instruction that a message fills; None makes it the whole instruction.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        sampling: Mapping[str, Any],
        field: str | None,
    ) -> None:
        self.system, self.messages, self.forgotten = "", list[dict[str, str]](), 0
        self._model, self._tokenizer, self._prompt = model, tokenizer, prompt
        self._sampling, self._field = dict(sampling), field
        window, answer = model.config.get_text_config().max_position_embeddings, sampling["max_new_tokens"]
        self._room = window - answer
        if self._room < 1:
            raise UserError(
                f"task.generate.max_new_tokens={answer} leaves no room for a question in this model's window of "
                f"{window} tokens; lower it"
            )

    @property
    def has_memory(self) -> bool:
        return bool(self._prompt.end)

    def reset(self, system: str) -> None:
        self.system, self.messages, self.forgotten = system, [], 0

    def ask(self, text: str, show: Callable[[str], None]) -> str:
        """Ask `text`; `show` is given the answer in parts as they are generated. Ctrl-C ends it, and keeps its text.

        Returns:
            A remark on how the answer ended; "" where the model ended it.

        Raises:
            ValueError: the message is too long for the window, and was not asked.
        """
        content = self._prompt.write_instruction(**{self._field: text}) if self._field else text
        question = {"role": "user", "content": content}
        ids = self._fit(question).to(self._model.device)
        streamer = _Streamer(self._tokenizer, show)
        ends = [self._tokenizer.eos_token_id, self._prompt.end_id(self._tokenizer)]
        remark = ""
        try:
            with torch.inference_mode():
                output = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    streamer=streamer,
                    eos_token_id=ends,
                    pad_token_id=self._tokenizer.pad_token_id or 0,
                    **self._sampling,
                )
            if output[0, -1] not in ends:
                remark = f"cut at task.generate.max_new_tokens={self._sampling['max_new_tokens']}"
        except KeyboardInterrupt:
            streamer.end()
            remark = "stopped"
        if not streamer.text.strip():
            return remark or "the model had nothing to say"
        self.messages += [question, {"role": "assistant", "content": streamer.text.strip()}]
        return remark

    def _fit(self, question: dict[str, str]) -> Tensor:
        """Token ids `[1, tokens]` of what the model is given: the system text and the latest exchanges that fit."""
        forgotten = self.forgotten
        while True:
            seen = self.messages[2 * forgotten :] if self.has_memory else []
            text = self._prompt.wrap_dialogue([*self._system_message(), *seen, question])
            ids: Tensor = self._tokenizer(text, return_tensors="pt").input_ids
            if ids.shape[1] <= self._room:
                self.forgotten = forgotten
                return ids
            if not seen:
                raise ValueError(
                    f"this message has {ids.shape[1]:,} tokens, and the model's window holds "
                    f"{self._room:,} before its answer; shorten it"
                )
            forgotten += 1

    def rows(self) -> list[dict[str, Any]]:
        """The dialogue as examples to train on, `{"messages": …}`: one, or one for each question asked alone."""
        step = max(len(self.messages), 1) if self.has_memory else 2
        parts = [self.messages[first : first + step] for first in range(0, len(self.messages), step)]
        return [{"messages": [*self._system_message(), *part]} for part in parts]

    def _system_message(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []


class _Streamer(TextStreamer):
    """Passes each word on when it is complete, and keeps the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show, self.text = show, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.text else text.lstrip()
        self.text += text
        if text:
            self._show(text)
