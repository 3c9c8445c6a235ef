"""The same questions and the same held-out rows, to the base model and to the fine-tuned one.

Both sides run by plain transformers and peft on what was saved, so a figure here is one that a user of the
exported adapter gets too.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.prompt import Prompt
from training.batches import Batches, held_out_loss


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    instruction: str,
    sampling: dict[str, Any],
    seed: int,
) -> str:
    """One sampled response to `instruction`; the same seed gives the same text on the same kind of machine."""
    tokens = tokenizer(prompt.wrap(instruction), return_tensors="pt").to(model.device)
    torch.manual_seed(seed)
    with torch.inference_mode():
        # A batch of one has no padding; the id only stops transformers from warning.
        ends = [tokenizer.eos_token_id, prompt.end_id(tokenizer)]
        padding = tokenizer.pad_token_id or 0
        output = model.generate(**tokens, do_sample=True, pad_token_id=padding, eos_token_id=ends, **sampling)
    return tokenizer.decode(output[0, tokens.input_ids.shape[1] :], skip_special_tokens=True).strip()


def measure(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    held_out: Batches,
    instructions: Sequence[str],
    sampling: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """`{"loss", "perplexity", "answers"}` of a model: mean cross-entropy per response token, and its answers."""
    gemma = model.get_base_model() if isinstance(model, PeftModel) else model
    loss = held_out_loss(gemma, held_out)
    answers = [answer(model, tokenizer, prompt, text, sampling, seed) for text in instructions]
    return {"loss": loss, "perplexity": math.exp(loss), "answers": answers}


def without_adapter(model: PeftModel | PreTrainedModel) -> AbstractContextManager[None]:
    """The base model under an adapted one."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
