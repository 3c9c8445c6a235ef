"""The proof of a conversion: the target is read again, and must be equivalent to the source.

Every tensor is compared with the source's, bit by bit, unless the conversion rounds, as a merge or a format with a
TOLERANCE does. Then both sides are run on the same prompts, a layer at a time (layerwise_forward.py), and
what they predict is compared. An adapter is run on its base, by peft.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from converters.adapter import PREFIX, WEIGHTS
from converters.checkpoint import Adapter, Checkpoint, LazyTensor, in_memory
from converters.layerwise_forward import empty_model, logits
from converters.merge_lora import lora_updates, weight_name
from core.artifacts import Proof
from core.errors import UserError
from core.gemma_config import WHOLE
from core.text_model import text_name

# Merging rounds each weight once, to bfloat16's 8 bits, which moves logits a little: the mean divergence of the
# predicted distributions must stay far below what separates the fine-tuned model from its base.
MERGED_LIMITS = {"mean_kl_divergence": 0.005}
# A scale inside B is applied before the products instead of after them, so that float32 rounds differently.
RESCALED_LIMITS = {"mean_kl_divergence": 1e-6}
SHARE_OF_TRAINING = 0.1  # and at most this share of the divergence between base and fine-tuned model

PROBES = (
    "The rain had stopped by the time the train left the station.",
    "My friend texted me that the concert was",
    "def area(radius):\n    return",
    "¿Qué vas a hacer este fin de semana?",
)
# Of a dtype's size: NaN and -0 are compared as bits, and any strides do, such as those of a factor of rank 1.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MAX_TOKENS = 24  # of a probe: logits over 262,144 tokens are 1 MB each


def prove(
    source: Checkpoint | Adapter,
    target: Checkpoint | Adapter,
    base: Checkpoint | None,
    tolerance: dict[str, float] | None,
) -> Proof:
    """Compare `source` with `target`, as read again from what was written.

    Args:
        base: of the adapter, if one or both sides are one.
        tolerance: name of a difference → its limit; None: every bit must be the same.

    Returns:
        What was measured, with the limits that it kept.

    Raises:
        UserError: a difference is beyond its limit.
    """
    merged = isinstance(source, Adapter) and isinstance(target, Checkpoint)
    if not merged:
        _leave_out_zeros(source, target)
    names, differing = _compare(base if merged and base else source, target)
    if isinstance(source, Adapter) and merged:
        changed = {weight_name(layer) for layer in lora_updates(source, Path("the adapter"))}
        unexpected = [name for name in differing if name not in changed]
    else:
        unexpected = differing if tolerance is None else []
    if unexpected:
        raise UserError(f"the conversion is not faithful: {unexpected[0]} has other values than in the source")
    probes = probe_texts(source, target, base)
    expected = _run(source, base, probes)
    if not expected.isfinite().all():
        raise UserError(
            "the source itself computes logits that are not finite, so that nothing can be proven of its conversion: "
            "its weights are too large, or damaged"
        )
    found = _run(target, base, probes)
    proof = Proof(
        tensors=names,
        tensors_with_the_same_bits=names - len(differing),
        probes=len(probes),
        tokens=len(expected),
        **differences(expected, found)._asdict(),
    )
    exact = RESCALED_LIMITS if _rescaled(source, target) else {"max_logit_difference": 0.0}
    limits = dict(exact if tolerance is None else tolerance)
    if merged and base:
        del found
        trained = differences(expected, _run(base, base, probes)).mean_kl_divergence
        proof.mean_kl_divergence_of_training = trained
        limits = {name: min(limit, SHARE_OF_TRAINING * trained) for name, limit in limits.items()}
    for name, limit in limits.items():
        if not (value := getattr(proof, name)) <= limit:  # also NaN
            why = ""
            if merged and limit < MERGED_LIMITS[name]:
                why = (
                    f", as training moved the base by {trained:.2g} alone: rounding to its dtype loses much of that. "
                    f"Train for longer, or use the adapter itself, to=adapter"
                )
            raise UserError(f"the conversion is not faithful: {name} is {value:.2g}, at most {limit:.2g} allowed{why}")
    proof.limits = limits
    return proof


class Differences(NamedTuple):
    """Between two sides' logits, see core.artifacts.Proof."""

    max_logit_difference: float
    mean_logit_difference: float
    mean_kl_divergence: float
    top1_agreement: float


def differences(expected: Tensor, found: Tensor) -> Differences:
    """Differences between logits [tokens, vocabulary], float32; the divergence is KL(expected ‖ found), in nats per
    token."""
    if torch.equal(expected, found):  # as where an adapter is copied; NaN equals nothing
        return Differences(0.0, 0.0, 0.0, 1.0)
    largest, total, divergence, agreeing = torch.zeros(()), 0.0, 0.0, 0
    for left, right in zip(expected, found, strict=True):  # a token at a time, to save memory
        difference = (left - right).abs()
        largest = torch.maximum(largest, difference.max())  # Python's max() would lose NaN
        total += difference.mean().item()
        p, q = left.double().log_softmax(-1), right.double().log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        agreeing += int(left.argmax() == right.argmax())
    count = len(expected)
    return Differences(
        max_logit_difference=largest.item(),
        mean_logit_difference=total / count,
        mean_kl_divergence=max(divergence / count, 0.0),  # rounding may make the sum negative
        top1_agreement=agreeing / count,
    )


def _run(side: Checkpoint | Adapter, base: Checkpoint | None, probes: Sequence[Tensor]) -> Tensor:
    if isinstance(side, Checkpoint):
        return logits(side, probes)
    assert base is not None
    return logits(base, probes, side)


def _compare(source: Checkpoint | Adapter, target: Checkpoint | Adapter) -> tuple[int, list[str]]:
    """The number of tensors, and the names of those that differ."""
    left, right = _tensors(source), _tensors(target)
    for name in sorted(left.keys() ^ right.keys()):
        raise UserError(
            f"the conversion is not faithful: {name} is only in the {'source' if name in left else 'target'}"
        )
    rescaled = _rescaled(source, target)
    return len(left), [
        name
        for name in sorted(left)
        if not (rescaled[name] if name in rescaled else same_bits(left[name], right[name]))
    ]


def _leave_out_zeros(source: Checkpoint | Adapter, target: Checkpoint | Adapter) -> None:
    """Of layers that only one of two adapters has, drop those whose update is zero, which formats say in two ways."""
    if isinstance(source, Adapter) and isinstance(target, Adapter):
        for side, other in ((source, target), (target, source)):
            for update in lora_updates(side, Path("the adapter")).values():
                names = [name for name in side.tensors if name.startswith(f"{PREFIX}{update.module}.lora_")]
                zero = update.magnitudes is None and not update.lora_b.any()
                if zero and names[0] not in other.tensors and len(names) < len(side.tensors):
                    side.tensors = {name: value for name, value in side.tensors.items() if name not in names}


def same_bits(one: LazyTensor, other: LazyTensor) -> bool:
    with ThreadPoolExecutor(1) as beside:
        left = beside.submit(one.read)
        right = other.read()
        return _same_bits(left.result(), right)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    # A format with fewer dtypes may hold the same value in a wider one.
    right = right if left.dtype == right.dtype else right.to(left.dtype)
    bits = INTEGERS[left.dtype.itemsize]
    return left.shape == right.shape and torch.equal(left.view(bits), right.view(bits))


def compare_beside(whole: Path, written: Path, text: Collection[str]) -> int:
    """Compare what a whole model has beside the tensors `text` of its text model (towers, and keys and values that no
    layer uses) with what was `written`, as the safetensors library reads both.

    Returns:
        The number of tensors compared.

    Raises:
        UserError: one differs, or is only in one of the two.
    """
    count = 0
    for shard in sorted(whole.glob("*.safetensors")):
        with safe_open(shard, "pt") as source, safe_open(written / shard.name, "pt") as target:
            if set(source.keys()) != set(target.keys()):
                raise UserError(f"the conversion is not faithful: {shard.name} has other tensors than in the source")
            for name in source.keys():  # noqa: SIM118, safe_open is not a dict
                if text_name(name) in text:
                    continue
                left, right = source.get_tensor(name), target.get_tensor(name)
                if left.dtype != right.dtype or not _same_bits(left.reshape(-1), right.reshape(-1)):
                    raise UserError(f"the conversion is not faithful: {name} has other values than in the source")
                count += 1
    return count


def place_in_peft(folder: Path, adapter: Adapter) -> str:
    """Have plain peft load the adapter in `folder` onto the class that it is for, whole or text, without weights.

    Returns:
        The name of that class of transformers.

    Raises:
        UserError: peft finds no place for a tensor, or no tensor for a place, about which it would only warn.
    """
    config: Mapping[str, Any] = adapter.config or {}
    if adapter.whole:
        kind = next(name for name, text in WHOLE.items() if text == config["model_type"])
        config = {"model_type": kind, "text_config": config}
    model, settings = empty_model(config), LoraConfig.from_pretrained(folder)
    settings.base_model_name_or_path = None  # this one has no name, about which peft would warn
    adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
    loaded = set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS), low_cpu_mem_usage=True)
    lost = [*loaded.unexpected_keys, *(name for name in loaded.missing_keys if ".lora_" in name)]
    if lost:
        raise UserError(f"the conversion is not faithful: peft finds no {lost[0]} in a {type(model).__name__}")
    return type(model).__name__


def _tensors(side: Checkpoint | Adapter) -> Mapping[str, LazyTensor]:
    if isinstance(side, Checkpoint):
        return side.tensors
    return {name: in_memory(tensor) for name, tensor in side.tensors.items()}


def _rescaled(source: Checkpoint | Adapter, target: Checkpoint | Adapter) -> dict[str, bool]:
    """B of each layer whose scale differs → whether scale times B is the same, but for float32's rounding: a format
    without an alpha for each layer stores the scale in B."""
    if not isinstance(source, Adapter) or not isinstance(target, Adapter):
        return {}
    mine, theirs = (lora_updates(adapter, Path("the adapter")) for adapter in (source, target))
    found = {}
    for layer, update in mine.items():
        other = theirs.get(layer)
        if other is not None and update.scale != other.scale:
            one, another = (side.lora_b.float() * side.scale for side in (update, other))
            same = one.shape == another.shape and torch.allclose(one, another, rtol=2**-21, atol=0)
            found[f"{PREFIX}{update.module}.lora_B.weight"] = same
    return found


# --- prompts for both sides ----------------------------------------------------------------------------------


def probe_texts(*sides: Checkpoint | Adapter | None) -> list[Tensor]:
    """Token ids of `PROBES` and of the training prompt; random ones if no side has a tokenizer.

    Raises:
        UserError: the two sides' tokenizers differ.
    """
    prompt = next((side.prompt for side in sides if side and side.prompt), None)
    whole = [side for side in sides if isinstance(side, Checkpoint)]
    texts = [*([prompt.wrap(prompt.write_instruction())] if prompt else []), *PROBES]
    found = [_tokens(content, texts) for content in dict.fromkeys(map(_tokenizer, whole)) if content]
    if any(ids != found[0] for ids in found):
        raise UserError(
            "the conversion is not faithful: the tokenizer of the target makes other tokens of the same text"
        )
    vocabulary = whole[0].config["vocab_size"]
    if found and max(max(ids) for ids in found[0]) >= vocabulary:
        raise UserError(f"the tokenizer does not belong to the model, whose vocabulary has {vocabulary:,} entries")
    if found:
        return [torch.tensor(ids[:MAX_TOKENS]) for ids in found[0]]
    drawn = torch.randint(vocabulary, (len(PROBES), MAX_TOKENS), generator=torch.Generator().manual_seed(0))
    return list(drawn)


def _tokenizer(side: Checkpoint) -> bytes | None:
    """tokenizer.json: most often the same one on both sides, and a second to parse."""
    file = side.files.get("tokenizer.json")
    try:
        return file.read_bytes() if isinstance(file, Path) else file
    except OSError as error:
        raise UserError(f"tokenizer.json cannot be read ({error}). Copy or download it again") from None


def _tokens(content: bytes, texts: Sequence[str]) -> list[list[int]]:
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"tokenizer.json is damaged ({error}). Copy or download it again") from None
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
