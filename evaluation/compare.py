"""The same questions and the same held-out rows, to the base model and to the fine-tuned one.

Both sides run by plain transformers and peft on what was saved, so a figure here is one that a user of the
exported adapter gets too.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.prompt import Prompt
from evaluation.questions import Question
from evaluation.sampling import sample
from training.batches import Batches, learned_loss
from training.packing import use_packed_attention


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
    held_out: Dataset,
    micro_batch_tokens: int,
    questions: Sequence[Question],
    sampling: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """`{"loss", "perplexity", "rows", "answers"}` of a model.

    `loss` is the mean cross-entropy of a learned token in nats, `rows` the `[sum of it, learned tokens]` of each row
    of `held_out`, in their order, for intervals (evaluation/metrics.py).
    """
    gemma = model.get_base_model() if isinstance(model, PeftModel) else model
    rows = row_losses(gemma, held_out, micro_batch_tokens)
    loss = sum(nats for nats, _ in rows) / sum(tokens for _, tokens in rows)
    texts = [question.text_in for question in questions]
    answers = sample(model, tokenizer, prompt, texts, [seed] * len(texts), sampling)
    return {"loss": loss, "perplexity": math.exp(loss), "rows": rows, "answers": [answer.text for answer in answers]}


def row_losses(gemma: PreTrainedModel, rows: Dataset, micro_batch_tokens: int) -> list[tuple[float, int]]:
    """Sum of the cross-entropy over the learned tokens of each row, and how many they are."""
    losses = []
    usual_attention = use_packed_attention(gemma)
    with torch.inference_mode():
        for step in Batches(rows, 1, micro_batch_tokens, seed=None):
            (batch,) = step.micro_batches
            losses.append((round(learned_loss(gemma, batch.to(gemma.device)).item(), 4), step.learned))
    gemma.set_attn_implementation(usual_attention)
    return losses


def without_adapter(model: PeftModel | PreTrainedModel) -> AbstractContextManager[None]:
    """The base model under an adapted one."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
