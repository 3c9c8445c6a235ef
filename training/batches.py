"""Rows become optimizer steps.

A step is `batch_size` rows drawn by chance; inside it the rows are sorted by length and cut into micro-batches of
at most `micro_batch_tokens` padded tokens. So padding stays small and shapes few, while which rows share a step stays
random, and the loss of a step is a mean over all its learned tokens however it was cut.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.prompt import Prompt
from nemo_configs.command_line import UserError
from training.cross_entropy import linear_cross_entropy


@dataclass
class MicroBatch:
    """Some rows, padded on the right: with causal attention no real token ever sees the padding.

    Attributes:
        input_ids: [rows, length], int64.
        sources: [learned], int64: flat positions in `input_ids` whose next token is learned.
        targets: [learned], int64: those next tokens.
        tokens: real (unpadded) tokens in it.
    """

    input_ids: Tensor
    sources: Tensor
    targets: Tensor
    tokens: int

    def to(self, device: torch.device) -> "MicroBatch":
        ids, sources, targets = (
            part.to(device, non_blocking=True) for part in (self.input_ids, self.sources, self.targets)
        )
        return MicroBatch(ids, sources, targets, self.tokens)


@dataclass
class Step:
    """One optimizer step's share of this process, and the learned tokens of all processes together."""

    micro_batches: list[MicroBatch]
    learned: int


def tokenize(
    file: Path, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int, cache: Path
) -> tuple[Dataset, int]:
    """Read a split and tokenize it to `input_ids`, their `length`, and `prompt_length` (tokens before the response).

    The prompt is tokenized by itself, as it is when a served model is asked, and the response ends in EOS or in the
    template's own end, so that the model learns to stop.

    Returns:
        The rows of at most `max_length` tokens, and the number of longer ones that were left out.

    Raises:
        UserError: no row is left, or the template's end is no token of the model.
    """
    try:
        end = prompt.end_id(tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from None
    if file.stat().st_size < 50e6:  # done in a second or two
        disable_progress_bars()
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        prompts = tokenizer([prompt.wrap(text) for text in batch["input"]]).input_ids
        responses = tokenizer(batch["output"], add_special_tokens=False).input_ids
        rows = [[*p, *r, end] for p, r in zip(prompts, responses, strict=True)]
        return {
            "input_ids": rows, "length": [len(ids) for ids in rows], "prompt_length": [len(p) for p in prompts]
        }  # fmt: skip

    # Named here, as `datasets` would otherwise pickle the tokenizer to name it, for seconds: `cache` lies in the data
    # folder, which is made anew with another tokenizer or prompt.
    name = hashlib.sha256(f"{file.stat().st_mtime_ns} {prompt}".encode()).hexdigest()[:16]
    small = len(rows) < 100_000
    rows = rows.map(encode, batched=True, remove_columns=rows.column_names, keep_in_memory=small, desc=file.name,
                    new_fingerprint=name)  # fmt: skip
    fitting = rows.filter(lambda row: row["length"] <= max_length, keep_in_memory=small)
    if not len(fitting):
        raise UserError(
            f"{file} has no row of at most {max_length} tokens ({len(rows)} longer ones). Raise task.train.max_length"
        )
    return fitting, len(rows) - len(fitting)


class Batches:
    """The steps of an epoch, a pure function of the seed and of how many steps have been taken.

    Iterating begins where `taken()` says training stands, so a resumed run sees the rows that the stopped one would
    have seen next.
    """

    def __init__(
        self,
        rows: Dataset,
        batch_size: int,
        micro_batch_tokens: int,
        seed: int | None,
        taken: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`seed=None` keeps the rows in order, for evaluation. `rank` and `world_size` deal out a step's rows."""
        self.rows = rows
        self.lengths = list(rows["length"])
        self.learned = [n - p for n, p in zip(self.lengths, rows["prompt_length"], strict=True)]
        self.batch_size, self.micro_batch_tokens, self.seed = batch_size, micro_batch_tokens, seed
        self.taken, self.rank, self.world_size = taken, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Step]:
        epoch, first = divmod(self.taken(), len(self))
        order = list(range(len(self.rows)))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        for step in range(first, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            chosen.sort(key=self.lengths.__getitem__)
            shares = [list(self._cut(chosen[rank :: self.world_size])) for rank in range(self.world_size)]
            # Processes exchange tensors in every micro-batch, so all take equally many; the last may be empty.
            mine = shares[self.rank] + [[]] * (max(map(len, shares)) - len(shares[self.rank]))
            yield Step([self._pad(part) for part in mine], sum(self.learned[i] for i in chosen))

    def _cut(self, chosen: list[int]) -> Iterator[list[int]]:
        part: list[int] = []
        for index in chosen:  # by growing length: the newest row is the longest
            if part and _rounded(self.lengths[index]) * (len(part) + 1) > self.micro_batch_tokens:
                yield part
                part = []
            part.append(index)
        if part:
            yield part

    def _pad(self, part: list[int]) -> MicroBatch:
        length = _rounded(self.lengths[part[-1]]) if part else 16
        input_ids = torch.zeros(max(1, len(part)), length, dtype=torch.int64)
        sources, targets = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for place, index in enumerate(part):
            row = self.rows[index]
            ids = torch.tensor(row["input_ids"])
            input_ids[place, : len(ids)] = ids
            first = row["prompt_length"]
            sources.append(torch.arange(first - 1, len(ids) - 1) + place * length)
            targets.append(ids[first:])
        return MicroBatch(input_ids, torch.cat(sources), torch.cat(targets), sum(self.lengths[i] for i in part))


def _rounded(length: int) -> int:
    """Up to a multiple of 16. oneDNN builds and keeps a kernel for every new shape of a product: rows of any length
    cost half the speed, and memory without end."""
    return -(-length // 16) * 16


def learned_loss(gemma: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Sum of the cross-entropy over the learned tokens of `batch`, a float32 scalar.

    Only the hidden states that predict a learned token reach the output layer.
    """
    hidden = gemma.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    learned = hidden.flatten(0, 1).index_select(0, batch.sources)
    softcap = getattr(gemma.config, "final_logit_softcapping", None)
    return linear_cross_entropy(learned, gemma.lm_head.weight, batch.targets, softcap)


def held_out_loss(gemma: PreTrainedModel, batches: Batches) -> float:
    """Mean cross-entropy per learned token over `batches`; its exponential is the perplexity."""
    loss, tokens = 0.0, 0
    with torch.inference_mode():
        for step in batches:
            for batch in step.micro_batches:
                loss += learned_loss(gemma, batch.to(gemma.device)).item()
                tokens += len(batch.targets)
    return loss / tokens
