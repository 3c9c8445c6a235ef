"""Which tokens are learned, and that no way of cutting a step changes what it learns."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_gemma
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.prompt import Prompt
from training.batches import Batches, held_out_loss, loss_sum, sample_losses, tokenize, work_of
from training.packed_attention import use_packed_attention

PROMPT = Prompt("Instruction:\n{instruction}\n\nResponse:\n{response}", "{ask}", "Slang: {slang}")
ROWS = [{"input": "word " * (n % 7 + 1), "output": f"Slang: {'yes ' * (n % 5 + 1)}".strip()} for n in range(23)]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("split") / "training.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture(scope="module")
def rows(split: Path, tokenizer: PreTrainedTokenizerBase):  # type: ignore[no-untyped-def]
    return tokenize(split, tokenizer, PROMPT, 512, split.parent / "cache")[0]


def test_the_loss_covers_the_response_and_its_end_and_not_the_prompt(
    rows,
    tokenizer: PreTrainedTokenizerBase,  # type: ignore[no-untyped-def]
) -> None:
    (step,) = Batches(rows.select([3]), 1, 10_000, seed=None)
    (batch,) = step.micro_batches
    assert tokenizer.decode(batch.targets) == "Slang: yes yes yes yes<eos>"
    asked = batch.input_ids[0, : batch.logit_positions[0] + 1]  # a row by itself begins at the pack's first token
    assert asked.tolist() == tokenizer(PROMPT.wrap(ROWS[3]["input"])).input_ids
    assert asked[0] == tokenizer.bos_token_id and (asked == tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize(
    "texts",
    [
        ["2024-01-02", "2023-12-31"],
        ["2024-01-02T03:04:05Z", "2024-01-02 03:04:05"],
        ["1", "02"],
        ["1e5", "Infinity"],
        ["null", "true"],
        ["9" * 400, "0.10"],
    ],
)
def test_texts_of_any_look_are_learned_as_they_are_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    file = tmp_path / "training.jsonl"
    file.write_text(
        "".join(json.dumps({"input": text, "output": text, "row": 1, "when": text}) + "\n" for text in texts)
    )
    rows, left_out = tokenize(file, tokenizer, PROMPT, 2000, tmp_path / "cache")
    assert left_out == 0
    for row, text in zip(rows, texts, strict=True):
        ((first, end),) = row["target_ranges"]
        assert row["input_ids"][first:end] == [
            *tokenizer(text, add_special_tokens=False).input_ids,
            PROMPT.end_id(tokenizer),
        ]
        assert row["input_ids"][:first] == tokenizer(PROMPT.wrap(text)).input_ids


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_equals_that_of_transformers_sample_by_sample(family: str, rows) -> None:  # type: ignore[no-untyped-def]
    model = tiny_gemma(family)
    expected, learned = 0.0, 0
    usual_attention = model.config._attn_implementation
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            labels = ids.clone()
            ((first, _),) = row["target_ranges"]
            labels[0, :first] = -100
            count = int((labels != -100).sum())
            expected += model(ids, labels=labels).loss.item() * count
            learned += count
        use_packed_attention(model)
        for budget in (1, 60, 10_000):  # one row at a time, a few, all together
            steps = list(Batches(rows, 8, budget, seed=0))
            assert sum(step.target_tokens for step in steps) == learned
            total = sum(loss_sum(model, batch).item() for step in steps for batch in step.micro_batches)
            assert total == pytest.approx(expected, rel=1e-5)
    model.set_attn_implementation(usual_attention)
    held_out = Batches(rows, 8, 100, seed=None)
    assert held_out_loss(model, held_out) == pytest.approx(expected / learned, rel=1e-5)
    parts = list[int]()
    sample_losses(model, held_out, parts.append)
    micro_batches = sum(len(step.micro_batches) for step in held_out)
    assert len(parts) == micro_batches * (len(model.model.layers) + 1) and sum(parts) == work_of(model, held_out)
    assert model.config._attn_implementation == usual_attention


def test_every_epoch_has_every_sample_once_in_a_new_order(rows) -> None:  # type: ignore[no-untyped-def]
    taken = 0
    batches = Batches(rows, 4, 10_000, seed=0, steps_taken=lambda: taken)
    first = [step.micro_batches[0].input_ids.tolist() for step in batches]
    taken = len(batches)
    second = [step.micro_batches[0].input_ids.tolist() for step in batches]
    assert len(first) == len(second) == 6 and first != second
    assert sum(step.target_tokens for step in batches) == sum(batches.target_counts)


def test_a_resumed_epoch_continues_where_it_stopped(rows) -> None:  # type: ignore[no-untyped-def]
    whole = [step.micro_batches[0].input_ids.tolist() for step in Batches(rows, 4, 10_000, seed=0)]
    rest = [
        step.micro_batches[0].input_ids.tolist() for step in Batches(rows, 4, 10_000, seed=0, steps_taken=lambda: 4)
    ]
    assert rest == whole[4:]


def test_processes_share_a_step_without_overlap(rows) -> None:  # type: ignore[no-untyped-def]
    alone = list(Batches(rows, 8, 10_000, seed=0))
    parts = [list(Batches(rows, 8, 10_000, seed=0, rank=rank, world_size=2)) for rank in (0, 1)]
    for step, left, right in zip(alone, *parts, strict=True):
        assert left.target_tokens == right.target_tokens == step.target_tokens
        assert sum(len(b.targets) for part in (left, right) for b in part.micro_batches) == step.target_tokens


@pytest.mark.usefixtures("one_thread")
def test_the_loss_of_a_sample_does_not_depend_on_its_pack(rows) -> None:  # type: ignore[no-untyped-def]
    model = tiny_gemma("gemma3_text")
    together = sample_losses(model, Batches(rows, 32, 256, seed=None))
    assert len(together) == len(rows)
    for place in (0, 3, len(rows) - 1):
        (alone,) = sample_losses(model, Batches(rows.select([place]), 1, 256, seed=None))
        assert together[place] == pytest.approx(alone, rel=1e-4)
    loss, tokens = (sum(part) for part in zip(*together, strict=True))
    assert held_out_loss(model, Batches(rows, 32, 256, seed=None)) == pytest.approx(loss / tokens)


def test_all_processes_take_the_same_number_of_micro_batches_and_an_empty_one_has_no_loss(rows) -> None:  # type: ignore[no-untyped-def]
    model = tiny_gemma("gemma3_text")
    use_packed_attention(model)
    parts = [list(Batches(rows.select(range(9)), 8, 20, seed=0, rank=rank, world_size=2)) for rank in (0, 1)]
    for left, right in zip(*parts, strict=True):
        assert len(left.micro_batches) == len(right.micro_batches)
    empty = parts[1][-1].micro_batches[0]  # the second step is of one row
    assert empty.tokens == len(empty.targets) == 0
    assert loss_sum(model, empty).item() == 0


def test_samples_over_the_limit_are_counted_and_having_none_left_is_an_error(
    split: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    fitting, too_long = tokenize(split, tokenizer, PROMPT, 20, tmp_path / "cache")
    assert 0 < len(fitting) < len(ROWS) and len(fitting) + too_long == len(ROWS)
    with pytest.raises(UserError, match="max_length"):
        tokenize(split, tokenizer, PROMPT, 5, tmp_path / "cache")
