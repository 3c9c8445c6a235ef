"""Megatron's layout of a Gemma 1, 2 or 3, as NeMo 1, NeMo 2 and Megatron-Bridge keep it, and Hugging Face's.

h is the hidden size, f the intermediate size, n query heads of size d in g groups that share a key and a value head.

| Megatron: `decoder.layers.N.…` | shape | Hugging Face: `model.layers.N.…` |
|---|---|---|
| `self_attention.linear_qkv.weight` | [g·(n/g + 2)·d, h] | `self_attn.q_proj`, `k_proj`, `v_proj` |
| `self_attention.linear_proj.weight` | [h, n·d] | `self_attn.o_proj` |
| `mlp.linear_fc1.weight` | [2f, h] | `mlp.gate_proj`, then `mlp.up_proj` |
| `mlp.linear_fc2.weight` | [h, f] | `mlp.down_proj` |
| `self_attention.linear_qkv.layer_norm_weight` | [h] | `input_layernorm` |
| `mlp.linear_fc1.layer_norm_weight` | [h] | `post_attention_layernorm`; of Gemma 2 and 3 `pre_feedforward_layernorm` |
| `self_attention.linear_proj.post_layernorm.weight` | [h] | `post_attention_layernorm`, Gemma 2 and 3 |
| `mlp.linear_fc2.post_layernorm.weight` | [h] | `post_feedforward_layernorm`, Gemma 2 and 3 |
| `self_attention.q_layernorm.weight`, `k_layernorm` | [d] | `self_attn.q_norm`, `k_norm`, Gemma 3 |

`linear_qkv` has for each group its n/g queries, its key and its value, each of d rows. There are also
`embedding.word_embeddings.weight` [vocabulary, h], `decoder.final_layernorm.weight` [h]. The output layer is the
embedding and is not stored; only Megatron-Bridge's may be another, `output_layer.weight`. Both sides keep the embedding
unscaled (√h is applied when it is looked up) and a norm as the w of 1 + w; NeMo 1 may keep 1 + w itself
(`layernorm_zero_centered_gamma` false): 1 is taken off in float32 and rounded once. Megatron may pad the vocabulary to
a multiple; the rows that are no token are cut off.

Tensor parallel rank r of t holds the r-th part of rows of `linear_qkv` (whole groups) and of the embedding, of columns
of `linear_proj` and `linear_fc2`, and of `linear_fc1` the r-th part of gate's rows on top of the r-th part of up's.

The names and the order are those of NeMo 2.7.3, `nemo/collections/llm/gpt/model/gemma{,2,3}.py`, and of NeMo 1's
`scripts/checkpoint_converters/convert_gemma{,2}_hf_to_nemo.py`; Megatron-Bridge 0.6.2 has the same in
`models/gemma/gemma{,2,3}_bridge.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from converters.byte_ranges import parsing
from converters.checkpoint import LazyTensor
from core.errors import UserError

FAMILIES = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
QKV, FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
PADDED = (EMBEDDING, OUTPUT)  # Megatron may pad their rows
PROJ, FC2 = "self_attention.linear_proj", "mlp.linear_fc2"
# Megatron's linear layers → those of Hugging Face that they join, in their order.
JOINED = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    PROJ: ("self_attn.o_proj",),
    FC1: ("mlp.gate_proj", "mlp.up_proj"),
    FC2: ("mlp.down_proj",),
}
# Not weights: Transformer Engine's state of FP8 training.
IGNORED = ("_extra_state",)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Gemma that determine its layout."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Sizes":
        """
        Args:
            config: transformers' `config.json`.

        Raises:
            UserError: of another family than Gemma 1, 2, 3 text, or with sizes that do not fit together.
        """
        text = full_config(config)
        sizes = cls(
            text.model_type,
            text.num_hidden_layers,
            text.hidden_size,
            text.intermediate_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.head_dim,
            text.vocab_size,
            text.tie_word_embeddings,
        )
        numbers = list(vars(sizes).values())[1:-1]
        if not all(isinstance(number, int) and 0 < number < 1 << 32 for number in numbers):
            raise UserError(f"the model's configuration has sizes that no model has: {sizes}")
        if sizes.heads % sizes.groups:
            raise UserError(f"{sizes.heads} query heads cannot share {sizes.groups} key and value heads evenly")
        return sizes

    def linear(self) -> dict[str, tuple[int, int]]:
        """Hugging Face's linear layers → [out, in]."""
        h, f, q, kv = self.hidden, self.intermediate, self.heads * self.head, self.groups * self.head
        return {
            "self_attn.q_proj": (q, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
        }


def full_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """`config` with all defaults, from any version of transformers.

    Raises:
        UserError: of another family.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"NeMo's Megatron layout is known here for Gemma 1, 2 and 3, not for a {str(family)[:40]!r}; to=megatron, "
            f"nemo, adapter, merged, hf and gguf hold that"
        )
    with parsing("the model's configuration"):
        return AutoConfig.for_model(**config)


def layout(sizes: Sizes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Megatron's name → the Hugging Face tensors that it holds → their shapes."""
    linear, norm = sizes.linear(), (sizes.hidden,)
    layer: dict[str, dict[str, tuple[int, ...]]] = {
        f"{name}.weight": {f"{part}.weight": linear[part] for part in parts} for name, parts in JOINED.items()
    }
    layer[f"{QKV}.layer_norm_weight"] = {"input_layernorm.weight": norm}
    layer[f"{FC1}.layer_norm_weight"] = {"post_attention_layernorm.weight": norm}
    if sizes.family != "gemma":
        layer[f"{FC1}.layer_norm_weight"] = {"pre_feedforward_layernorm.weight": norm}
        layer[f"{PROJ}.post_layernorm.weight"] = {"post_attention_layernorm.weight": norm}
        layer[f"{FC2}.post_layernorm.weight"] = {"post_feedforward_layernorm.weight": norm}
    if sizes.family == "gemma3_text":
        for part in "qk":
            layer[f"self_attention.{part}_layernorm.weight"] = {f"self_attn.{part}_norm.weight": (sizes.head,)}
    embedding = {"model.embed_tokens.weight": (sizes.vocabulary, sizes.hidden)}
    found: dict[str, dict[str, tuple[int, ...]]] = {EMBEDDING: {**embedding}}
    for number in range(sizes.layers):
        for name, parts in layer.items():
            found[f"decoder.layers.{number}.{name}"] = {f"model.layers.{number}.{p}": s for p, s in parts.items()}
    if not sizes.tied:
        found[OUTPUT] = {"lm_head.weight": (sizes.vocabulary, sizes.hidden)}
    return {**found, "decoder.final_layernorm.weight": {"model.norm.weight": norm}}


def join_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """[n·d, …], [g·d, …], [g·d, …] → [g·(n/g + 2)·d, …]: for each group its queries, its key, its value."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in (q, k, v)], dim=1).flatten(0, 1)


def split_qkv(qkv: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `join_qkv`."""
    rows = [sizes.heads // sizes.groups * sizes.head, sizes.head, sizes.head]
    q, k, v = qkv.unflatten(0, (sizes.groups, -1)).split(rows, dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def join(parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """Megatron's tensor of the Hugging Face tensors `parts`, in the order of `layout`."""
    if len(parts) == 3:
        return join_qkv(parts[0], parts[1], parts[2], sizes.groups)
    return torch.cat(list(parts)) if len(parts) == 2 else parts[0]


def split(joined: Tensor, count: int, sizes: Sizes) -> tuple[Tensor, ...]:
    """The inverse of `join`, of `count` parts."""
    return split_qkv(joined, sizes) if count == 3 else joined.chunk(count)


def to_megatron(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Hugging Face's tensors under Megatron's names and in its shapes, norms as the w of 1 + w, nothing padded.

    Raises:
        UserError: a tensor that is missing, too many, or of another shape than `config` says.
    """
    sizes = Sizes.of(config)
    found = {}
    for name, shapes in layout(sizes).items():
        parts = [checked(tensors, part, shape) for part, shape in shapes.items()]
        if len({part.dtype for part in parts}) > 1:
            raise UserError(f"{', '.join(shapes)} have different dtypes, so that Megatron cannot join them")
        rows = sum(shape[0] for shape in shapes.values())
        read = partial(lambda parts: join([part.read() for part in parts], sizes), parts)
        found[name] = LazyTensor((rows, *parts[0].shape[1:]), parts[0].dtype, read)
    refuse_others(tensors, {part for shapes in layout(sizes).values() for part in shapes})
    return found


def from_megatron(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], zero_centered: bool = True
) -> dict[str, LazyTensor]:
    """Megatron's tensors under Hugging Face's names and in its shapes.

    Args:
        zero_centered: norms are kept as the w of 1 + w, not as 1 + w.

    Raises:
        UserError: as `to_megatron`.
    """
    sizes = Sizes.of(config)
    tensors = {
        strip_wrappers(name): lazy
        for name, lazy in tensors.items()
        if strip_wrappers(name) and not name.endswith(IGNORED)
    }
    found = {}

    @lru_cache(maxsize=1)  # q, k and v are read one after another: the tensor that they share is read once
    def parts_of(name: str, count: int) -> tuple[Tensor, ...]:
        return split(tensors[name].read(), count, sizes)

    def read(name: str, number: int, of: int, rows: int) -> Tensor:
        if of > 1:
            return parts_of(name, of)[number]
        tensor = tensors[name].read()
        if "norm" in name and not zero_centered:
            return (tensor.float() - 1).to(tensor.dtype)
        return tensor[:rows]

    for name, shapes in layout(sizes).items():
        rows, first = sum(shape[0] for shape in shapes.values()), next(iter(shapes.values()))
        lazy = checked(tensors, name, (rows, *first[1:]), padded=name in PADDED)
        for number, (part, shape) in enumerate(shapes.items()):
            found[part] = LazyTensor(shape, lazy.dtype, partial(read, name, number, len(shapes), shape[0]))
    refuse_others(tensors, set(layout(sizes)))
    return found


def strip_wrappers(name: str) -> str:
    """`name` without the prefixes of wrappers; "" for what is not a weight, such as an optimizer's state."""
    name = re.sub(r"^((model|module)\.)+", "", name)
    return name if name.startswith(("decoder.", "embedding.", "output_layer.")) else ""


def embedding_rows(tensors: Mapping[str, LazyTensor]) -> int | None:
    """Rows of the embedding, padding included, or None if there is none."""
    return next((lazy.shape[0] for name, lazy in tensors.items() if strip_wrappers(name) == EMBEDDING), None)


def merge_ranks(ranks: Sequence[Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """Merge the tensors of all tensor parallel ranks, in order; also LoRA tensors with NeMo 2's names.

    Raises:
        UserError: ranks that do not hold the same names.
    """
    if any(set(rank) != set(ranks[0]) for rank in ranks):
        odd = sorted(set(ranks[0]).symmetric_difference(*ranks[1:]))
        raise UserError(f"the tensor parallel parts do not hold the same tensors; {odd[0]} is not in all of them")
    if len(ranks) == 1:
        return dict(ranks[0])
    return {name: _merged(name, [rank[name] for rank in ranks]) for name in ranks[0]}


def _merged(name: str, parts: Sequence[LazyTensor]) -> LazyTensor:
    dimension = _parallel_dimension(name)
    if dimension is None:

        def same() -> Tensor:
            first, *others = [part.read() for part in parts]
            if not all(torch.equal(first, other) for other in others):
                raise UserError(f"{name} should be the same on all tensor parallel ranks and is not: a damaged part")
            return first

        return LazyTensor(parts[0].shape, parts[0].dtype, same)
    if len({(*part.shape, part.dtype) for part in parts}) > 1 or not parts[0].shape[dimension:]:
        raise UserError(f"{name} has different shapes or dtypes on different tensor parallel ranks")
    shape = list(parts[0].shape)
    shape[dimension] *= len(parts)

    def read() -> Tensor:
        if FC1 in name and not name.endswith("linear_in.weight") and "adapter_" not in name:
            halves = [part.read().chunk(2) for part in parts]
            return torch.cat([half[n] for n in (0, 1) for half in halves])
        return torch.cat([part.read() for part in parts], dim=dimension)

    return LazyTensor(tuple(shape), parts[0].dtype, read)


def _parallel_dimension(name: str) -> int | None:
    """The dimension along which Megatron divides a tensor among tensor parallel ranks, or None."""
    if "norm" in name:
        return None
    row_parallel = PROJ in name or FC2 in name
    if ".adapter." in name:  # of a layer divided by columns, linear_in is divided as the layer is; else by its rank
        if "magnitude" in name and row_parallel:
            return None
        return 1 if row_parallel and name.endswith("linear_in.weight") else 0
    return 1 if row_parallel else 0


def checked(tensors: Mapping[str, LazyTensor], name: str, shape: tuple[int, ...], padded: bool = False) -> LazyTensor:
    if name not in tensors:
        raise UserError(f"the model has no {name}, which its configuration asks for")
    found = tuple(tensors[name].shape)
    if found != shape and not (padded and found[1:] == shape[1:] and found[0] > shape[0]):
        raise UserError(f"{name} has shape {list(found)}; by the model's configuration it should be {list(shape)}")
    return tensors[name]


def refuse_others(tensors: Mapping[str, LazyTensor], known_names: set[str]) -> None:
    others = sorted(set(tensors) - known_names)
    if others:
        raise UserError(f"the model has {others[0]}, which no Gemma of its family has ({len(others)} such tensors)")
