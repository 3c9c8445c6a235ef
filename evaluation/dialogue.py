"""A dialogue with a model: its messages, how many of them fit into the context window, and answers as they are made."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from core.errors import UserError
from core.prompt import AnswerPart, AnswerReader, Prompt
from evaluation.few_rows import fast_for_few_rows
from evaluation.sampling import end_ids


class Dialogue:
    """Messages of a user and answers of a model, by plain transformers and peft.

    A prompt that ends the model's turn with a token, as Gemma's turns do, is given the whole dialogue; any other
    has room for one question, so that each message is asked alone.

    Attributes:
        system: a text before the first message; "" for none.
        thinking: whether the model thinks before it answers, where its prompt knows how.
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
        self.thinking = False
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

    @property
    def can_think(self) -> bool:
        return self._prompt.has_gemma4_turns

    def reset(self, system: str) -> None:
        self.system, self.messages, self.forgotten = system, [], 0

    def ask(self, text: str, show: Callable[[AnswerPart], None]) -> str:
        """Ask `text`; `show` is given the answer in parts as they are generated. Ctrl-C ends it, and keeps its text.

        A thought before the answer is shown and not kept.

        Returns:
            A remark on how the answer ended; "" where the model ended it.

        Raises:
            ValueError: the message is too long for the window, and was not asked.
        """
        content = self._prompt.write_instruction(**{self._field: text}) if self._field else text
        question = {"role": "user", "content": content}
        asked, ids = self._fit(question)
        ids = ids.to(self._model.device)
        streamer = _Streamer(self._tokenizer, show, AnswerReader(asked) if self.can_think else None)
        ends = end_ids(self._model, self._tokenizer, self._prompt)
        remark = ""
        try:
            with torch.inference_mode(), fast_for_few_rows(self._model):
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

    def _fit(self, question: dict[str, str]) -> tuple[str, Tensor]:
        """What the model is given, the system text and the latest exchanges that fit, and its ids `[1, tokens]`."""
        forgotten = self.forgotten
        while True:
            seen = self.messages[2 * forgotten :] if self.has_memory else []
            text = self._prompt.wrap_dialogue([*self._system_message(), *seen, question], self.thinking)
            ids: Tensor = self._tokenizer(text, return_tensors="pt").input_ids
            if ids.shape[1] <= self._room:
                self.forgotten = forgotten
                return text, ids
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
    """Passes each word on when it is complete, and keeps the text of the answer.

    Args:
        reader: tells thoughts apart, which needs the control tokens; None: there are no thoughts.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, show: Callable[[AnswerPart], None], reader: AnswerReader | None
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=reader is None)
        self._show, self._reader, self.text = show, reader, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        parts = [AnswerPart(text, "")]
        if self._reader:
            parts = [*self._reader.read(text), *(self._reader.end() if stream_end else ())]
        for part in parts:
            new = part.text if self.text else part.text.lstrip()
            self.text += new
            if new or part.thought:
                self._show(AnswerPart(new, part.thought))
