"""From logits to the next token, as vLLM defines it: tokens that are allowed, bad words, biases, penalties,
structured_outputs, temperature, min_p, top_k, top_p, in this order.

Each request has its own random generator and draws one number per token, so its answer does not depend on the rest of
the batch. The number is looked up in the cumulative distribution; a random number for each of Gemma's 262,144 tokens
(Gumbel-max) would take longer than the layers do.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.engine.grammar import CannotGoOn, Constraint
from serving.sampling_parameters import Sampling

Floats = npt.NDArray[np.float32]
FEW = 1024  # bytes of a mask; of so few, the tokens are picked out, which takes a third of the time of a pass over all


def bad_word_tokens(tokenizer: Any, words: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens of each word, at the beginning of a text and after a space."""
    texts = [text for word in words for text in (word.lstrip(), f" {word.lstrip()}") if text.strip()]
    return [tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in dict.fromkeys(texts)]


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: list[int],
        eos_token_ids: tuple[int, ...],
        constraint: Constraint | None = None,
        bad_words: Sequence[tuple[int, ...]] = (),
    ) -> None:
        """
        Args:
            prompt: its tokens, which the repetition penalty counts.
            eos_token_ids: tokens that, as `stop_token_ids`, may not be chosen before `min_tokens`.
            constraint: what the answer must match.
            bad_words: tokens that may not follow one another.
        """
        self.sampling = sampling
        self.eos_token_ids = np.array(eos_token_ids, np.int64)
        self.ends = np.array([*eos_token_ids, *sampling.stop_token_ids], np.int64)
        self.bad_words, self.said = bad_words, list[int]()
        self.bias = sampling.logit_bias or {}
        self.constraint = constraint
        self.random = random.Random(sampling.seed)
        self.counts: Counter[int] = Counter()
        self.repeated = sampling.repetition_penalty != 1
        self.penalized = self.repeated or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self.seen = set(prompt) if self.repeated else set()
        self.chosen = 0

    @property
    def needs_logits(self) -> bool:
        """Whether the next token may be another than the most likely one of the model's own logits."""
        return self._changes_logits or self.constraint is not None

    @property
    def _changes_logits(self) -> bool:
        sampling = self.sampling
        return bool(
            sampling.temperature > 0
            or self.penalized
            or self.chosen < sampling.min_tokens
            or self.bias
            or sampling.allowed_token_ids
            or self.bad_words
        )

    def choose(self, best: int, logits: Floats) -> int:
        """The next token.

        Args:
            best: the most likely one of the model's own logits.
            logits: [vocabulary], float32; changed in place, and undefined unless `needs_logits`.

        Raises:
            CannotGoOn: the parameters forbid all tokens, or what the answer must match is too complex.
        """
        if not self.needs_logits:
            return best
        if self.constraint is None:
            self._penalize(logits)
            return self._pick(logits)
        mask = self.constraint.mask()
        may_end = self.chosen >= self.sampling.min_tokens and not self.sampling.ignore_eos
        if not self._changes_logits and _has(mask, best) and (may_end or best not in self.eos_token_ids):
            return best  # mostly, of a model that knows what is asked of it
        self._penalize(logits)
        if np.count_nonzero(mask) >= FEW:
            np.copyto(logits, -np.inf, where=np.unpackbits(mask, count=len(logits), bitorder="little") == 0)
            if not may_end:
                logits[self.eos_token_ids] = -np.inf
            return self._pick(logits)
        allowed = _tokens(mask)
        if not may_end:
            going_on = allowed[~np.isin(allowed, self.eos_token_ids)]
            allowed = going_on if len(going_on) else allowed  # what must end ends, whatever min_tokens says
        return int(allowed[self._pick(logits[allowed])])

    def accept(self, token: int) -> None:
        """Record the token that was chosen, for penalties, `min_tokens` and the constraint.

        Raises:
            CannotGoOn: what the answer must match is too complex.
        """
        self.chosen += 1
        if self.bad_words:
            self.said.append(token)
        if self.constraint:
            self.constraint.accept(token)
        if self.penalized:
            self.counts[token] += 1
            if self.repeated:
                self.seen.add(token)

    def _penalize(self, logits: Floats) -> None:
        sampling = self.sampling
        if sampling.allowed_token_ids:
            allowed = np.array(sampling.allowed_token_ids, np.int64)
            kept = logits[allowed]
            logits.fill(-np.inf)
            logits[allowed] = kept
        for *before, last in self.bad_words:
            if self.said[len(self.said) - len(before) :] == before:
                logits[last] = -np.inf
        if self.chosen < sampling.min_tokens and not self.constraint:
            logits[self.ends] = -np.inf
        for token, bias in self.bias.items():
            logits[token] += np.float32(bias)
        if self.seen:
            seen = np.fromiter(self.seen, np.int64)
            values = logits[seen]
            penalty = np.float32(sampling.repetition_penalty)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self.counts and (sampling.presence_penalty or sampling.frequency_penalty):
            tokens = np.fromiter(self.counts, np.int64)
            times = np.fromiter(self.counts.values(), np.float32)
            logits[tokens] -= np.float32(sampling.frequency_penalty) * times + np.float32(sampling.presence_penalty)

    def _pick(self, logits: Floats) -> int:
        if logits.max() == -np.inf:
            raise CannotGoOn("allowed_token_ids, bad_words, logit_bias and min_tokens together forbid every token")
        return int(logits.argmax()) if not self.sampling.temperature else self._draw(logits)

    def _draw(self, logits: Floats) -> int:
        sampling, point = self.sampling, self.random.random()
        logits *= np.float32(1 / sampling.temperature)
        highest = logits.max()
        if not (sampling.top_p < 1 or sampling.min_p > 0 or 0 < sampling.top_k < len(logits)):
            return _at(np.exp(logits - highest), point)
        tokens, total = candidates(logits, highest, sampling)
        order = np.argsort(-logits[tokens], kind="stable")
        tokens = tokens[order]
        likelihood = np.exp((logits[tokens] - highest).astype(np.float64))
        if sampling.top_p < 1:
            total = likelihood.sum() if total is None else total
            before = np.cumsum(likelihood) - likelihood
            kept = max(1, int(np.count_nonzero(before < sampling.top_p * total)))
            tokens, likelihood = tokens[:kept], likelihood[:kept]
        return int(tokens[_at(likelihood, point)])


def _has(mask: npt.NDArray[np.uint8], token: int) -> bool:
    return token < 8 * len(mask) and bool(mask[token >> 3] >> (token & 7) & 1)


def _tokens(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The tokens in a mask of few."""
    places = np.flatnonzero(mask)
    bits = np.unpackbits(mask[places], bitorder="little")
    return np.add.outer(8 * places, np.arange(8)).reshape(-1)[bits.view(bool)]


def candidates(logits: Floats, highest: np.float32, sampling: Sampling) -> tuple[npt.NDArray[np.int64], float | None]:
    """The tokens that min_p and top_k keep and, where only top_p applies, at least those that it keeps.

    Returns:
        The tokens, and the sum over all tokens of exp(logit - highest); None: the sum is that of the tokens returned.
    """
    lowest = highest + np.float32(np.log(sampling.min_p)) if sampling.min_p > 0 else np.float32(-np.inf)
    wanted = sampling.top_k if 0 < sampling.top_k < len(logits) else 0
    total = None if wanted or sampling.min_p > 0 else float(np.exp(logits - highest).sum(dtype=np.float64))
    for distance in (8, 16, 32, np.inf):  # sorting a few hundred is a thousand times faster than sorting all
        limit = max(lowest, np.float32(highest - distance))
        tokens = np.flatnonzero(logits >= limit)
        if wanted and len(tokens) > wanted:
            least = np.partition(logits[tokens], -wanted)[-wanted]
            return tokens[logits[tokens] >= least], None
        if limit == lowest or distance == np.inf:
            return tokens, total
        if total and np.exp((logits[tokens] - highest).astype(np.float64)).sum() >= sampling.top_p * total:
            return tokens, total
        if wanted and len(tokens) == wanted:
            return tokens, None
    raise AssertionError


def _at(likelihood: npt.NDArray[np.floating], point: float) -> int:
    """The index at which the cumulative sum passes the fraction `point` of the total. In two steps, since the
    cumulative sum over all is the most expensive part."""
    stride = 512
    if len(likelihood) <= stride:
        sums = np.cumsum(likelihood, dtype=np.float64)
        return min(int(np.searchsorted(sums, point * sums[-1], side="right")), len(sums) - 1)
    parts = np.add.reduceat(likelihood, np.arange(0, len(likelihood), stride), dtype=np.float64)
    sums = np.cumsum(parts)
    part = min(int(np.searchsorted(sums, point * sums[-1], side="right")), len(sums) - 1)
    start = part * stride
    inner = np.cumsum(likelihood[start : start + stride], dtype=np.float64) + (sums[part - 1] if part else 0.0)
    return start + min(int(np.searchsorted(inner, point * sums[-1], side="right")), len(inner) - 1)
