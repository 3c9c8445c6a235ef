"""Loss and answers of a model: the same test split and the same questions for the base and the fine-tuned model.

Both run on plain transformers and peft, from what was saved, so that a user of the exported adapter gets the same
results.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.artifacts import Before
from core.progress import Progress
from core.prompt import Prompt
from evaluation.questions import Question
from evaluation.sampling import sample
from training.batches import Batches, sample_losses, work_of


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    instruction: str,
    sampling: Mapping[str, Any],
    seed: int,
    seen: Callable[[int], object] = lambda tokens: None,
) -> str:
    """One sampled response to `instruction`; the same seed gives the same text on the same kind of machine.

    `seen` is told of each token: 1.
    """
    return sample(model, tokenizer, prompt, [prompt.wrap(instruction)], [seed], sampling, seen)[0].text


def measure(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    held_out: Batches,
    questions: Sequence[Question],
    sampling: Mapping[str, Any],
    seed: int,
) -> Before:
    """Loss of `model` on `held_out`, and its answers to `questions`.

    The loss of each example is kept, in the order of `held_out`, for intervals (evaluation/intervals.py).
    """
    gemma = model.get_base_model() if isinstance(model, PeftModel) else model
    with Progress("Held-out loss", work_of(gemma, held_out)) as progress:
        losses = sample_losses(gemma, held_out, progress.advance)
    loss = sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses)
    texts = [question.text_in for question in questions]
    with Progress("Answers", len(texts) * sampling["max_new_tokens"]) as progress:
        answers = sample(model, tokenizer, prompt, texts, [seed] * len(texts), sampling, progress.advance)
    return Before(
        loss=loss,
        perplexity=math.exp(loss),
        rows=[(round(nats, 4), tokens) for nats, tokens in losses],
        answers=[answer.text for answer in answers],
    )


def without_adapter(model: PeftModel | PreTrainedModel) -> AbstractContextManager[None]:
    """The base model under an adapted one."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
