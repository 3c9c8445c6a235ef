"""Converts LoRA from peft's separate layers to Megatron's joined ones; megatron_lora has the table, and the way back.

The parts' lora_A must be shared. If they are equal in all layers, they are. Otherwise they are stacked, and each part's
lora_B is in its own columns, with zeros in the others':

    linear_in = [A_q; A_k; A_v]        linear_out = join(B_q·[1 0 0], B_k·[0 1 0], B_v·[0 0 1])

of rank 3r (2r if only gate and up are joined). Adapters of lower rank are padded with zeros, and alpha grows with the
rank, so that the scale and every product stay exactly the same; a scale that is not the commonest goes into B. All
layers have an adapter if one has.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from converters.checkpoint import Adapter
from converters.megatron_layout import QKV, full_config
from converters.megatron_modules import KINDS, A, B, Kinds, Layers, M, Module, common_rank, modules, whole
from converters.merge_lora import lora_updates
from core.errors import UserError

# Settings of a LoraConfig that Megatron does not support.
UNSUPPORTED = (
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
)


@dataclass(frozen=True)
class Collected:
    """An adapter by the layers of its base, of one rank and one scale.

    Attributes:
        known: what `modules` says of the base.
        layers: by the part.
        dtype: of all tensors: a tensor of all layers is one in Megatron.
    """

    known: Sequence[Mapping[str, Module]]
    layers: Layers
    rank: int
    scale: float
    dtype: torch.dtype

    def present(self) -> Iterator[tuple[int, str, Module]]:
        """Layer by layer Megatron's modules of which a part has an adapter in any layer: all layers must have it."""
        used = {
            name
            for number, adapters in self.layers.items()
            for name, module in self.known[number].items()
            if adapters.keys() & module.parts.keys()
        }
        for number, own in enumerate(self.known):
            yield from ((number, name, module) for name, module in own.items() if name in used)

    def alpha(self, factor: int) -> float | int:
        """alpha of adapters of `factor` times the rank."""
        return whole(self.scale * self.rank * factor)

    def differ(self, number: int, module: Module) -> bool:
        """Whether the parts of `module` have different lora_A in layer `number`."""
        own = self.layers.get(number, {})
        have = [own[part][A] for part in module.parts if part in own]
        return 0 < len(have) < len(module.parts) or not all(torch.equal(have[0], other) for other in have[1:])

    def joined(self, number: int, module: Module, stack: bool, factor: int) -> Kinds:
        """The adapter of `module`, of rank · factor; parts without one are zero."""
        own = self.layers.get(number, {})
        magnitudes = [own[part][M] for part in module.parts if M in own.get(part, {})]
        each = [module.experts] * bool(module.experts)
        linear_in = torch.zeros(*each, self.rank * factor, module.shape[1], dtype=self.dtype)
        outs = [torch.zeros(*each, out, self.rank * factor, dtype=self.dtype) for out, _ in module.parts.values()]
        for position, part in enumerate(module.parts):
            if part in own:
                place = slice(position * self.rank, (position + 1) * self.rank) if stack else slice(self.rank)
                linear_in[..., place, :] = own[part][A]
                outs[position][..., place] = own[part][B]
        return {A: linear_in, B: module.join(outs), **({M: module.join(magnitudes)} if magnitudes else {})}

    def separate(self, number: int, module: Module) -> dict[str, Kinds]:
        """The adapters of the parts of `module`, by Megatron's names of them; also of those that only Megatron has."""
        own = self.layers.get(number, {})
        first = next(iter(module.parts.values()))[0]
        others = (module.shape[0] - first) // 2
        rows = {"q": first, "k": others, "v": others} if module.groups else {"gate": first, "up": first}
        parts = {part.rpartition(".")[2].removesuffix("_proj"): part for part in module.parts}
        return {
            short: own.get(parts.get(short, ""), {})
            or {
                A: torch.zeros(self.rank, module.shape[1], dtype=self.dtype),
                B: torch.zeros(out, self.rank, dtype=self.dtype),
            }
            for short, out in rows.items()
        }


def collect(adapter: Adapter) -> Collected:
    """
    Raises:
        UserError: an adapter without its base's configuration, or with what Megatron has no place for.
    """
    if adapter.config is None:
        raise UserError(
            "Megatron joins q, k and v by the base's configuration: name the folder of the base with base=FOLDER"
        )
    known, peft = modules(adapter.config), adapter.peft
    unsupported = [key for key in UNSUPPORTED if peft.get(key)] + ["bias"] * (peft.get("bias", "none") != "none")
    if unsupported:
        raise UserError(f"Megatron's LoRA has no {unsupported[0]}; merge the adapter into its base instead")
    layers: Layers = defaultdict(dict)
    updates = lora_updates(adapter, Path("the adapter"))
    rank = max(update.lora_a.shape[-2] for update in updates.values())
    scale = Counter(update.scale for update in updates.values()).most_common(1)[0][0]
    for layer, update in updates.items():
        place = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", layer)
        parts = (
            {part for module in known[int(place[1])].values() for part in module.parts}
            if (place and int(place[1]) < len(known))
            else set()
        )
        if place is None or place[2] not in parts:
            raise UserError(f"Megatron's LoRA has no place for {layer}; merge the adapter into its base instead")
        ratio, more = update.scale / scale, rank - update.lora_a.shape[-2]
        b = update.lora_b if ratio == 1 else update.lora_b.float() * ratio
        kinds = {A: pad(update.lora_a, (0, 0, 0, more)), B: pad(b, (0, more))}
        layers[int(place[1])][place[2]] = kinds if update.magnitudes is None else {**kinds, M: update.magnitudes}
    for experts in (False, True):
        common_rank(layers, known, experts)
    dtypes = {tensor.dtype for own in layers.values() for kinds in own.values() for tensor in kinds.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    of_one = {
        number: {part: {kind: tensor.to(dtype) for kind, tensor in kinds.items()} for part, kinds in own.items()}
        for number, own in layers.items()
    }
    return Collected(known, of_one, rank, scale, dtype)


def to_megatron_lora(adapter: Adapter) -> tuple[dict[str, Tensor], int, float]:
    """`fused` of an adapter for NeMo.

    Raises:
        UserError: as `collect` and `fused`; the base is of another family than Gemma 1, 2, 3.
    """
    full_config(adapter.config or {"model_type": "gemma"})
    return fused(collect(adapter))


def fused(found: Collected) -> tuple[dict[str, Tensor], int, float]:
    """Megatron's names → tensors of joined adapters, for every layer of the model; their rank; their alpha.

    Raises:
        UserError: DoRA that is not on all of what is joined.
    """
    dora = any(M in kinds for own in found.layers.values() for kinds in own.values())
    if dora and any(
        not module.parts.keys() <= found.layers.get(number, {}).keys() for number, _, module in found.present()
    ):
        raise UserError(
            "DoRA is on some layers or some of q, k and v (or gate and up) only, and Megatron has it on all that it "
            "joins; merge the adapter into its base instead: to=merged"
        )
    stacked = {name for number, name, module in found.present() if found.differ(number, module)}
    factor = max(len(module.parts) if name in stacked else 1 for _, name, module in found.present())
    tensors = {}
    for number, name, module in found.present():
        kinds = found.joined(number, module, name in stacked, factor)
        tensors.update({f"decoder.layers.{number}.{name}.adapter.{KINDS[kind]}": kinds[kind] for kind in kinds})
    return tensors, found.rank * factor, found.alpha(factor)


def canonical(found: Collected) -> tuple[dict[str, Tensor], int, float]:
    """As `fused`, with an adapter for each part of what Megatron joins: zeros where peft has none."""
    tensors = {}
    for number, name, module in found.present():
        adapters = {"": found.joined(number, module, stack=False, factor=1)}
        if name.endswith((QKV, "linear_fc1")) and not module.experts:
            adapters = {f"adapter_{short}.": kinds for short, kinds in found.separate(number, module).items()}
        for prefix, kinds in adapters.items():
            place = f"decoder.layers.{number}.{name}.adapter.{prefix}"
            tensors.update({f"{place}{KINDS[kind]}": kinds[kind] for kind in kinds})
    return tensors, found.rank, found.alpha(1)
