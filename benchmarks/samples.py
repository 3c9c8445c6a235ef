"""The samples that every system trains on, as token ids: tokenized once, by this project's own data preparation.

Either the table's rows with their true lengths, or chunks of a fixed length, cut from the same rows laid end to end.
"""

import random
from itertools import accumulate, chain, cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from core.configuration import plain
from core.errors import UserError
from core.prompt import Prompt
from core.schema import Config, DataConfig, PromptConfig
from data_prep.prepare import prepare

Sample = dict[str, Any]  # {"input_ids": list[int], "target_ranges": [[first, past the last], ...]}
HELD_OUT_TOKENS = 8192  # enough to resolve loss differences of a few thousandths


def read_samples(
    config: Config, base_folder: Path, length: int | None, count: int
) -> tuple[list[Sample], list[Sample]]:
    """`count` samples to train on, in order (repeated if the table has fewer), and the held-out ones.

    Args:
        config: `task` and `data_dir` are used.
        base_folder: has the tokenizer.
        length: tokens of every sample, or None for the table's rows as they are.

    Raises:
        UserError: see `prepare`; or fewer than `length` held-out tokens.
    """
    from transformers import AutoConfig, AutoTokenizer

    from training.batches import tokenize

    folder = prepare(config, base_folder / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    vocabulary = AutoConfig.from_pretrained(base_folder).vocab_size
    splits = []
    for split in ("training", "test"):
        tokenized, _ = tokenize(
            folder / f"{split}.jsonl",
            tokenizer,
            Prompt(**plain(config.task.prompt)),
            config.task.train.max_length,
            cache=folder / ".tokens",
        )
        found = [
            # Random weights may have a smaller vocabulary than the tokenizer (random_base.py).
            {"input_ids": [token % vocabulary for token in ids], "target_ranges": ranges}
            for ids, ranges in zip(tokenized["input_ids"], tokenized["target_ranges"], strict=True)
        ]
        random.Random(config.seed).shuffle(found)
        splits.append(found if length is None else chunks(found, length))
    training, held_out = splits
    if not training or not held_out:
        raise UserError(f"length={length} is more than all held-out rows together. Use more rows, or a shorter length")
    ends = accumulate(len(row["input_ids"]) for row in held_out)
    enough = sum(end <= HELD_OUT_TOKENS for end in ends)
    return list(islice(cycle(training), count)), held_out[: max(1, enough)]


def chunks(samples: list[Sample], length: int) -> list[Sample]:
    """`samples` laid end to end and cut to `length` tokens each, with the same fraction of target tokens as they
    have."""
    bos = samples[0]["input_ids"][0]
    stream = list(chain.from_iterable(sample["input_ids"][1:] for sample in samples))
    targets = sum(end - first for sample in samples for first, end in sample["target_ranges"])
    first = max(1, round(length * (1 - targets / sum(len(sample["input_ids"]) for sample in samples))))
    cut = range(0, len(stream) - length + 2, length - 1)
    return [{"input_ids": [bos, *stream[at : at + length - 1]], "target_ranges": [[first, length]]} for at in cut]


def as_dataset(samples: list[Sample]) -> Dataset:
    """`samples` as `training.batches.Batches` takes them."""
    return Dataset.from_list([{**sample, "length": len(sample["input_ids"])} for sample in samples])


def text_task(config: Config, column: str) -> Config:
    """`config` with a task that writes the texts of one `column`, for a table that is no task of this project's."""
    data = {name: value for name, value in plain(config.task.data).items() if name in DataConfig.model_fields}
    data |= {
        "module": None,
        "columns": {"text": [column]},
        "required": ["text"],
        "key": "text",
        "train_fields": None,
    }
    prompt = PromptConfig(
        template="Instruction:\n{instruction}\n\nResponse:\n{response}",
        instruction=f"Write a {column.replace('_', ' ')}.",
        response="{text}",
        fields={},
    )
    task = config.task.model_copy(update={"name": "text", "data": DataConfig(**data), "prompt": prompt})
    return config.model_copy(update={"task": task})
