"""Rows become optimizer steps.

A step is `batch_size` rows drawn by chance. Inside it the rows are sorted, so that those with a common beginning are
neighbours, and packed into micro-batches of at most `micro_batch_tokens` tokens. The loss of a step is a mean over all
its learned tokens however it was cut.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import UserError
from core.prompt import Prompt
from training.cross_entropy import linear_cross_entropy
from training.packing import Layout, pack, shared_prefixes, use_packed_attention


@dataclass
class MicroBatch:
    """Some rows, packed (training/packing.py).

    Attributes:
        input_ids: [1, tokens], int64. The last token of a row predicts nothing and is left out.
        layout: where the rows lie in it.
        sources: [learned], int64: flat positions in `input_ids` whose next token is learned; one may stand here more
            than once, where rows with the same prompt share it.
        targets: [learned], int64: those next tokens.
        lengths: tokens of each of its rows, as many as without packing.
        rows: the place of each in the data set.
    """

    input_ids: Tensor
    layout: Layout
    sources: Tensor
    targets: Tensor
    lengths: list[int]
    rows: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def to(self, device: torch.device) -> "MicroBatch":
        ids, sources, targets = (
            part.to(device, non_blocking=True) for part in (self.input_ids, self.sources, self.targets)
        )
        return MicroBatch(ids, self.layout.to(device), sources, targets, self.lengths, self.rows)


@dataclass
class Step:
    """One optimizer step's share of this process; the tokens, and those learned, of all processes together."""

    micro_batches: list[MicroBatch]
    learned: int
    tokens: int


def tokenize(
    file: Path, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int, cache: Path
) -> tuple[Dataset, int]:
    """Read a split and tokenize it to `input_ids`, their `length`, and `learned`: spans `[[first, past the last], …]`.

    Learned are responses, or the model's turns of a dialogue. Each is tokenized apart from what comes before it, as it
    is when a served model is asked, and ends in EOS or in the template's own end, so that the model learns to stop.

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

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [prompt.pieces(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        texts = [text for pieces in rows for text, _ in pieces]
        tokens = iter(tokenizer(texts, add_special_tokens=False).input_ids)
        encoded: dict[str, list[Any]] = {"input_ids": [], "length": [], "learned": []}
        for pieces in rows:
            ids, spans = [tokenizer.bos_token_id], []
            for _, learned in pieces:
                first = len(ids)
                ids += next(tokens)
                if learned:
                    ids.append(end)
                    spans.append([first, len(ids)])
            for key, value in zip(encoded, (ids, len(ids), spans), strict=True):
                encoded[key].append(value)
        return encoded

    # Named here, as `datasets` would otherwise pickle the tokenizer to name it, for seconds: `cache` lies in the data
    # folder, which is made anew with another tokenizer or prompt.
    name = hashlib.sha256(f"{file.stat().st_mtime_ns} {prompt}".encode()).hexdigest()[:16]
    small = len(rows) < 100_000
    rows = rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        keep_in_memory=small,
        desc=file.name,
        new_fingerprint=name,
    )
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
        self.learned = [sum(end - first for first, end in spans) for spans in rows["learned"]]
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
            missing = max(map(len, shares)) - len(shares[self.rank])
            mine = shares[self.rank] + [_micro_batch({}) for _ in range(missing)]
            yield Step(mine, sum(self.learned[i] for i in chosen), sum(self.lengths[i] for i in chosen))

    def _cut(self, chosen: list[int]) -> Iterator[MicroBatch]:
        """Rows sorted by their tokens, as many to a micro-batch as fit."""
        rows = {index: self.rows[index] for index in chosen}
        part: dict[int, Any] = {}
        for index, row in sorted(rows.items(), key=lambda item: item[1]["input_ids"]):
            if part and _unique_tokens([*part.values(), row]) > self.micro_batch_tokens:
                yield _micro_batch(part)
                part = {}
            part[index] = row
        if part:
            yield _micro_batch(part)


def _unique_tokens(rows: list[Any]) -> int:
    """Tokens of `rows` with what neighbours share counted once."""
    ids = [row["input_ids"][:-1] for row in rows]
    shared = sum(length * (len(members) - 1) for length, members in shared_prefixes(ids))
    return sum(map(len, ids)) - shared


def _micro_batch(rows: dict[int, Any]) -> MicroBatch:
    packed = pack([row["input_ids"][:-1] for row in rows.values()])
    sources, targets = [], []
    for row, prefix, rest in zip(rows.values(), packed.prefixes, packed.rests, strict=True):
        places = [*prefix, *rest]
        for first, end in row["learned"]:
            sources += places[first - 1 : end - 1]
            targets += row["input_ids"][first:end]
    as_int64 = partial(torch.tensor, dtype=torch.int64)
    lengths = [len(row["input_ids"]) for row in rows.values()]
    return MicroBatch(packed.ids, packed.layout, as_int64(sources), as_int64(targets), lengths, list(rows))


def learned_loss(gemma: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Sum of the cross-entropy over the learned tokens of `batch`, a float32 scalar."""
    return token_losses(gemma, batch).sum()


def token_losses(gemma: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """The cross-entropy of each learned token of `batch`, [learned], float32.

    Only the hidden states that predict a learned token reach the output layer. `gemma` uses packed attention.
    """
    hidden = gemma.model(
        input_ids=batch.input_ids, position_ids=batch.layout.positions, layout=batch.layout, use_cache=False
    ).last_hidden_state
    learned = hidden.flatten(0, 1).index_select(0, batch.sources)
    softcap = getattr(gemma.config, "final_logit_softcapping", None)
    return linear_cross_entropy(learned, gemma.lm_head.weight, batch.targets, softcap)


def row_losses(gemma: PreTrainedModel, batches: Batches) -> list[tuple[float, int]]:
    """Sum of the cross-entropy over the learned tokens of each row, and how many they are; in the order of the rows."""
    losses: dict[int, tuple[float, int]] = {}
    usual_attention = use_packed_attention(gemma)
    with torch.inference_mode():
        for step in batches:
            for batch in step.micro_batches:
                learned = [batches.learned[row] for row in batch.rows]
                parts = token_losses(gemma, batch.to(gemma.device)).split(learned)
                sums = torch.stack([part.sum() for part in parts]).tolist()
                losses |= dict(zip(batch.rows, zip(sums, learned, strict=True), strict=True))
    gemma.set_attn_implementation(usual_attention)
    return [losses[row] for row in sorted(losses)]


def held_out_loss(gemma: PreTrainedModel, batches: Batches) -> float:
    """Mean cross-entropy per learned token over `batches`; its exponential is the perplexity."""
    rows = row_losses(gemma, batches)
    return sum(loss for loss, _ in rows) / sum(tokens for _, tokens in rows)
