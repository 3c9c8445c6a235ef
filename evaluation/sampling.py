"""Answers sampled in batches, each with its own random numbers, so that an answer does not depend on its batch."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from core.prompt import Prompt
from evaluation.few_rows import fast_for_few_rows


class Answer(NamedTuple):
    """A sampled text without its thoughts, and whether the model ended it rather than `max_new_tokens`."""

    text: str
    ended: bool


def sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    texts: Sequence[str],
    seeds: Sequence[int],
    sampling: Mapping[str, Any],
    seen: Callable[[int], object] = lambda tokens: None,
) -> list[Answer]:
    """One answer to each of `texts`, all in one batch.

    The same text and seed give the same answer in any batch, up to the rounding of the machine.

    Args:
        texts: everything the model is given but `<bos>`, see `Prompt.wrap`; there is at least one.
        seeds: one for each text.
        sampling: `task.generate`: `max_new_tokens`, `temperature`, `top_k`, `top_p`; other keys go to transformers.
        seen: told the number of new tokens, of all answers together, after each.
    """
    tokens = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    own = {key: sampling[key] for key in ("temperature", "top_k", "top_p") if sampling.get(key) is not None}
    rest = {key: value for key, value in sampling.items() if key not in ("temperature", "top_k", "top_p")}
    ends = end_ids(model, tokenizer, prompt)
    draw = SampledToken([Random(f"{seed} {text}") for seed, text in zip(seeds, texts, strict=True)], **own)
    # The last hidden states are a strided view, for which torch multiplies each sequence with its own copy of frozen
    # weights: 6 GB for 16 sequences and Gemma's vocabulary, and a hundred times as slow.
    dense = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    with torch.inference_mode(), fast_for_few_rows(model):
        output = model.generate(
            **tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([draw]),
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id or 0,
            streamer=_Counter(seen),
            **rest,
        )
    dense.remove()
    answers = output[:, tokens.input_ids.shape[1] :]
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device)).any(1).tolist()
    said = tokenizer.batch_decode(answers, skip_special_tokens=not prompt.has_gemma4_turns)
    # A continuation may begin with the space between two words.
    trimmed = str.rstrip if prompt.continues_text else str.strip
    return [
        Answer(trimmed(prompt.read_answer(asked, text).text), over)
        for asked, text, over in zip(texts, said, ended, strict=True)
    ]


def end_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens that end an answer: EOS, the prompt's end, and all that the model's own settings name."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, prompt.end_id(tokenizer), *named} - {None})


class _Counter(BaseStreamer):
    """Tells `seen` of new tokens."""

    def __init__(self, seen: Callable[[int], object]) -> None:
        self.seen, self.is_prompt = seen, True

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:  # which comes first
            self.seen(value.numel())
        self.is_prompt = False

    def end(self) -> None:
        pass


class SampledToken(LogitsProcessor):
    """Leaves each sequence one token, drawn with its own random numbers; transformers then takes the largest.

    The distribution is that of transformers' temperature, top-k and top-p, in this order. Those draw a batch's tokens
    from one generator, which makes a text depend on its neighbours, and sort all 262,144 tokens of the vocabulary for
    top-p, where the `top_k` candidates are enough.

    Args:
        randoms: one for each sequence.
        temperature: 0 takes the likeliest token.
        top_k: 0 keeps the whole vocabulary.
    """

    def __init__(self, randoms: Sequence[Random], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
        self.randoms, self.temperature, self.top_k, self.top_p = randoms, temperature, top_k, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` [sequences, vocabulary], float, with all but one token of each sequence at -inf."""
        size = scores.shape[-1]
        best = scores.float().topk(min(self.top_k or size, size) if self.temperature else 1)
        likely = torch.softmax(best.values / (self.temperature or 1), -1)
        likely = likely * (likely.cumsum(-1) - likely < self.top_p)  # the fewest that reach top_p together
        reached = likely.cumsum(-1)
        drawn = torch.tensor([[random.random()] for random in self.randoms], device=scores.device) * reached[:, -1:]
        place = torch.searchsorted(reached, drawn, right=True).clamp(max=reached.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, best.indices.gather(-1, place), 0.0)
