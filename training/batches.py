"""Samples become optimizer steps.

A step is `batch_size` samples drawn at random. Inside it the samples are sorted, so that those with a common prefix are
neighbours, and packed into micro-batches of at most `micro_batch_tokens` tokens (training/packing.py). The loss of a
step is the mean over all its target tokens, the tokens that the loss mask selects, however the step was cut.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, disable_progress_bars
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import UserError
from core.prompt import Prompt
from training.cross_entropy import linear_cross_entropy
from training.experts import round_experts
from training.packed_attention import use_packed_attention
from training.packing import Layout, pack, shared_prefixes

_INTEGER = Value("int64")
FEATURES = Features({"input_ids": List(_INTEGER), "length": _INTEGER, "target_ranges": List(List(_INTEGER))})


@dataclass
class MicroBatch:
    """Samples packed end to end.

    Attributes:
        input_ids: [1, tokens], int64. The last token of a sample predicts nothing and is left out.
        layout: where each sample lies in `input_ids`.
        logit_positions: [targets], int64: positions in `input_ids` whose next token is a target. A position is repeated
            where samples share the prompt that it belongs to.
        targets: [targets], int64: those next tokens.
        lengths: tokens of each sample, as many as without packing.
        samples: the index of each sample in the data set.
    """

    input_ids: Tensor
    layout: Layout
    logit_positions: Tensor
    targets: Tensor
    lengths: list[int]
    samples: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def to(self, device: torch.device) -> "MicroBatch":
        ids, positions, targets = (
            tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.logit_positions, self.targets)
        )
        return MicroBatch(ids, self.layout.to(device), positions, targets, self.lengths, self.samples)


@dataclass
class Step:
    """This process's micro-batches of one optimizer step.

    Attributes:
        target_tokens: in the loss, over all processes; the loss and its gradient are divided by it.
        tokens: of all samples, over all processes.
    """

    micro_batches: list[MicroBatch]
    target_tokens: int
    tokens: int


def tokenize(
    file: Path, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int, cache: Path
) -> tuple[Dataset, int]:
    """Read a split and tokenize it to the columns `input_ids`, `length` and `target_ranges`.

    `target_ranges` is the loss mask as half-open ranges of `input_ids`, `[[first, past the last], …]`: the response, or
    the model's turns of a dialogue. Each is tokenized apart from what comes before it, as it is at inference, and ends
    with EOS or the template's own end token, so that the model learns to stop. A row is one sample, or several (see
    `Prompt.samples`). A plain text that is too long is several samples of about the same length, of which the last has
    the end; every token but BOS is a target.

    Args:
        file: JSONL of contract 1, `{"input", "output"}`, `{"messages"}` or `{"text"}`.
        cache: folder for tokens of splits too large for memory; emptied with the data folder that it lies in.

    Returns:
        The samples of at most `max_length` tokens, and the number of longer ones that were left out.

    Raises:
        UserError: no sample is left, or the template's end is not a token of the model.
    """
    try:
        end = prompt.end_id(tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from None

    def encoded() -> Iterator[dict[str, Any]]:
        # Not read by `datasets`, whose JSON reader makes timestamps of texts that are all dates, and other texts of
        # those timestamps where it is told that they are texts.
        with file.open(encoding="utf-8") as lines:
            while rows := [json.loads(line) for line in islice(lines, 1000)]:
                made = [pieces for row in rows for pieces in prompt.samples(row)]
                texts = [text for pieces in made for text, _ in pieces]
                tokens = iter(tokenizer(texts, add_special_tokens=False).input_ids)
                for pieces in made:
                    ids, ranges = [tokenizer.bos_token_id], []
                    for _, is_target in pieces:
                        first = len(ids)
                        ids += next(tokens)
                        if is_target:
                            ids.append(end)
                            ranges.append([first, len(ids)])
                    is_text = len(pieces) == 1  # else something is given before the target
                    for part in _windows(ids, max_length) if is_text else [ids]:
                        parts = [[1, len(part)]] if is_text else ranges
                        yield {"input_ids": part, "length": len(part), "target_ranges": parts}

    small = file.stat().st_size < 10e6  # done in a second or two, and no trouble for the memory
    if small:
        disable_progress_bars()
        made = list(encoded())
        samples = Dataset.from_dict({key: [sample[key] for sample in made] for key in FEATURES}, features=FEATURES)
    else:
        # Given here, because `datasets` would otherwise pickle the tokenizer to hash it, which takes seconds. Tokenizer
        # and prompt are those of the data folder that `cache` lies in: another one makes another folder.
        of = f"{file.name} {file.stat().st_mtime_ns} {prompt} {max_length}"
        fingerprint = hashlib.sha256(of.encode()).hexdigest()[:16]
        samples = Dataset.from_generator(encoded, FEATURES, str(cache), fingerprint=fingerprint)
    fitting = samples.filter(lambda sample: sample["length"] <= max_length, keep_in_memory=small)
    if not len(fitting):
        raise UserError(
            f"{file} has no sample of at most {max_length} tokens ({len(samples)} longer ones). "
            f"Raise task.train.max_length"
        )
    return fitting, len(samples) - len(fitting)


def _windows(ids: list[int], max_length: int) -> list[list[int]]:
    """A text's tokens after BOS in as few parts as fit, none much shorter than the others, each after a BOS."""
    bos, *tokens = ids
    count = -(-len(tokens) // max(max_length - 1, 1))
    cuts = [len(tokens) * place // count for place in range(count + 1)]
    return [[bos, *tokens[first:end]] for first, end in pairwise(cuts)]


class Batches:
    """The steps of an epoch, a pure function of the seed and of the number of steps taken.

    Iteration begins where `steps_taken()` says training stands, so a resumed run sees the samples that the interrupted
    one would have seen next.
    """

    def __init__(
        self,
        samples: Dataset,
        batch_size: int,
        micro_batch_tokens: int,
        seed: int | None,
        steps_taken: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            samples: as `tokenize` returns them.
            batch_size: samples of an optimizer step, of all processes together.
            micro_batch_tokens: the most tokens of a micro-batch, a shared prefix counted once. A longer sample is a
                micro-batch of its own.
            seed: of the order; None keeps the samples in order, for evaluation.
            steps_taken: optimizer steps of the run so far, over all epochs.
            rank, world_size: which share of a step's samples this process takes.
        """
        self.samples = samples
        self.lengths = list(samples["length"])
        self.target_counts = [sum(end - first for first, end in ranges) for ranges in samples["target_ranges"]]
        self.batch_size, self.micro_batch_tokens, self.seed = batch_size, micro_batch_tokens, seed
        self.steps_taken, self.rank, self.world_size = steps_taken, rank, world_size

    def __len__(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Step]:
        epoch, first = divmod(self.steps_taken(), len(self))
        order = list(range(len(self.samples)))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        for step in range(first, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            chosen.sort(key=self.lengths.__getitem__)
            shares = [list(self._split(chosen[rank :: self.world_size])) for rank in range(self.world_size)]
            # Processes communicate in every micro-batch, so all take equally many; the last may be empty.
            missing = max(map(len, shares)) - len(shares[self.rank])
            mine = shares[self.rank] + [_micro_batch({}) for _ in range(missing)]
            yield Step(mine, sum(self.target_counts[i] for i in chosen), sum(self.lengths[i] for i in chosen))

    def _split(self, chosen: list[int]) -> Iterator[MicroBatch]:
        """Samples sorted by their tokens, as many to a micro-batch as fit."""
        samples = {index: self.samples[index] for index in chosen}
        packed: dict[int, Any] = {}
        for index, sample in sorted(samples.items(), key=lambda item: item[1]["input_ids"]):
            if packed and _unique_tokens([*packed.values(), sample]) > self.micro_batch_tokens:
                yield _micro_batch(packed)
                packed = {}
            packed[index] = sample
        if packed:
            yield _micro_batch(packed)


def _unique_tokens(samples: list[Any]) -> int:
    """Tokens of `samples`, what neighbours share counted once."""
    ids = [sample["input_ids"][:-1] for sample in samples]
    shared = sum(length * (len(members) - 1) for length, members in shared_prefixes(ids))
    return sum(map(len, ids)) - shared


def _micro_batch(samples: dict[int, Any]) -> MicroBatch:
    packed = pack([sample["input_ids"][:-1] for sample in samples.values()])
    logit_positions, targets = [], []
    for sample, prefix, rest in zip(samples.values(), packed.prefixes, packed.rests, strict=True):
        positions = [*prefix, *rest]
        for first, end in sample["target_ranges"]:
            logit_positions += positions[first - 1 : end - 1]
            targets += sample["input_ids"][first:end]
    as_int64 = partial(torch.tensor, dtype=torch.int64)
    lengths = [len(sample["input_ids"]) for sample in samples.values()]
    return MicroBatch(packed.ids, packed.layout, as_int64(logit_positions), as_int64(targets), lengths, list(samples))


def loss_sum(gemma: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Sum of the cross-entropy over the target tokens of `batch`, a float32 scalar."""
    return token_losses(gemma, batch).sum()


def token_losses(gemma: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """The cross-entropy of each target token of `batch`, [targets], float32, in nats.

    Only the hidden states that predict a target reach the output layer. `gemma` must use packed attention
    (`packed_attention.use_packed_attention`).
    """
    hidden = gemma.model(
        input_ids=batch.input_ids, position_ids=batch.layout.positions, layout=batch.layout, use_cache=False
    ).last_hidden_state
    predicting = hidden.flatten(0, 1).index_select(0, batch.logit_positions)
    softcap = getattr(gemma.config, "final_logit_softcapping", None)
    return linear_cross_entropy(predicting, gemma.lm_head.weight, batch.targets, softcap)


def sample_losses(
    gemma: PreTrainedModel, batches: Batches, seen: Callable[[int], object] = lambda work: None
) -> list[tuple[float, int]]:
    """For each sample, in the order of the data set: the sum of the cross-entropy over its target tokens, in nats, and
    the number of them.

    Args:
        seen: told after each layer how much more of `work_of` is done.
    """
    losses: dict[int, tuple[float, int]] = {}
    usual_attention = use_packed_attention(gemma)
    round_experts(gemma, gemma.device)
    of_a_layer, of_the_head = _work(gemma)
    tokens = 0
    hooks = [layer.register_forward_hook(lambda *_: seen(tokens * of_a_layer)) for layer in gemma.model.layers]
    with torch.inference_mode():
        for step in batches:
            for batch in step.micro_batches:
                tokens = batch.input_ids.numel()
                counts = [batches.target_counts[sample] for sample in batch.samples]
                parts = token_losses(gemma, batch.to(gemma.device)).split(counts)
                sums = torch.stack([part.sum() for part in parts]).tolist()
                losses |= dict(zip(batch.samples, zip(sums, counts, strict=True), strict=True))
                seen(len(batch.targets) * of_the_head)
    for hook in hooks:
        hook.remove()
    gemma.set_attn_implementation(usual_attention)
    return [losses[sample] for sample in sorted(losses)]


def work_of(gemma: PreTrainedModel, batches: Batches) -> int:
    """What `sample_losses` computes, in multiplications of weights."""
    of_a_layer, of_the_head = _work(gemma)
    return sum(
        batch.input_ids.numel() * of_a_layer * len(gemma.model.layers) + len(batch.targets) * of_the_head
        for step in batches
        for batch in step.micro_batches
    )


def _work(gemma: PreTrainedModel) -> tuple[int, int]:
    """Weights of a layer, on average, and of the output layer."""
    layers = gemma.model.layers
    return sum(weight.numel() for weight in layers.parameters()) // len(layers), gemma.lm_head.weight.numel()


def held_out_loss(gemma: PreTrainedModel, batches: Batches) -> float:
    """Mean cross-entropy per target token over `batches`, in nats; its exponential is the perplexity."""
    losses = sample_losses(gemma, batches)
    return sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
