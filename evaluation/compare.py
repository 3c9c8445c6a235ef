"""The same questions and the same held-out rows, to the base model and to the fine-tuned one.

Both sides run by plain transformers and peft on what was saved, so a figure here is one that a user of the
exported adapter gets too.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.prompt import Prompt
from evaluation.questions import Question
from evaluation.sampling import sample
from training.batches import Batches, row_losses


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    instruction: str,
    sampling: Mapping[str, Any],
    seed: int,
) -> str:
    """One sampled response to `instruction`; the same seed gives the same text on the same kind of machine."""
    return sample(model, tokenizer, prompt, [prompt.wrap(instruction)], [seed], sampling)[0].text


def measure(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    held_out: Batches,
    questions: Sequence[Question],
    sampling: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """`{"loss", "perplexity", "rows", "answers"}` of a model.

    `loss` is the mean cross-entropy of a learned token in nats, `rows` the `[sum of it, learned tokens]` of each row
    of `held_out`, in their order, for intervals (evaluation/intervals.py).
    """
    gemma = model.get_base_model() if isinstance(model, PeftModel) else model
    rows = row_losses(gemma, held_out)
    loss = sum(nats for nats, _ in rows) / sum(tokens for _, tokens in rows)
    texts = [question.text_in for question in questions]
    answers = sample(model, tokenizer, prompt, texts, [seed] * len(texts), sampling)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "rows": [(round(nats, 4), tokens) for nats, tokens in rows],
        "answers": [answer.text for answer in answers],
    }


def without_adapter(model: PeftModel | PreTrainedModel) -> AbstractContextManager[None]:
    """The base model under an adapted one."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
