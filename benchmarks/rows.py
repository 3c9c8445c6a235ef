"""The rows that every system is given, as token ids: tokenized once, by this project's own data preparation.

Either rows as the table has them, with their true lengths, or pieces of a fixed length cut from the same rows laid end
to end.
"""

import random
from itertools import accumulate, chain, cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from omegaconf import DictConfig, OmegaConf

from core.configuration import plain
from core.errors import UserError
from core.prompt import Prompt
from data_prep.prepare import prepare

Row = dict[str, Any]  # {"input_ids": list[int], "learned": [[first, past the last], ...]}
HELD_OUT_TOKENS = 8192  # enough to tell losses apart by some thousandths, for rows of one kind


def read_rows(config: DictConfig, base_folder: Path, length: int | None, count: int) -> tuple[list[Row], list[Row]]:
    """`count` rows to train on, in the order of training (again from the start where the table has fewer), and the
    held-out ones.

    Args:
        config: the resolved tree; `task` and `data_dir` are used.
        base_folder: with the tokenizer.
        length: tokens of every row, or None for the table's own rows.

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
        rows, _ = tokenize(
            folder / f"{split}.jsonl",
            tokenizer,
            Prompt(**plain(config.task.prompt)),
            config.task.train.max_length,
            cache=folder / ".tokens",
        )
        found = [
            # Random weights may have a smaller vocabulary than the tokenizer (random_base.py).
            {"input_ids": [token % vocabulary for token in ids], "learned": learned}
            for ids, learned in zip(rows["input_ids"], rows["learned"], strict=True)
        ]
        random.Random(config.seed).shuffle(found)
        splits.append(found if length is None else pieces(found, length))
    training, held_out = splits
    if not training or not held_out:
        raise UserError(
            f"length={length} is longer than all held-out rows together. Give more rows, or a shorter length"
        )
    ends = accumulate(len(row["input_ids"]) for row in held_out)
    enough = sum(end <= HELD_OUT_TOKENS for end in ends)
    return list(islice(cycle(training), count)), held_out[: max(1, enough)]


def pieces(rows: list[Row], length: int) -> list[Row]:
    """`rows` laid end to end and cut to `length` tokens each; as large a share of a piece is learned as of the rows."""
    bos = rows[0]["input_ids"][0]
    stream = list(chain.from_iterable(row["input_ids"][1:] for row in rows))
    learned = sum(end - first for row in rows for first, end in row["learned"])
    first = max(1, round(length * (1 - learned / sum(len(row["input_ids"]) for row in rows))))
    cut = range(0, len(stream) - length + 2, length - 1)
    return [{"input_ids": [bos, *stream[at : at + length - 1]], "learned": [[first, length]]} for at in cut]


def as_dataset(rows: list[Row]) -> Dataset:
    """As training/batches.py takes them."""
    return Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows])


def text_task(config: DictConfig, column: str) -> DictConfig:
    """`config` with a task that writes the texts of one `column`, for a table that is no task of this project's."""
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.task.name = "text"
    config.task.data = {
        **config.task.data,
        "module": None,
        "columns": {"text": [column]},
        "required": ["text"],
        "key": "text",
        "train_fields": None,
    }
    config.task.prompt = {
        "template": "Instruction:\n{instruction}\n\nResponse:\n{response}",
        "instruction": f"Write a {column.replace('_', ' ')}.",
        "response": "{text}",
        "fields": {},
    }
    return config
