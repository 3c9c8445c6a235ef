"""The arithmetic of a LoRA step in FLOPs, and the peak FLOP/s of GPUs, for model FLOPs utilization (MFU).

What any implementation must compute is counted: products over tokens without padding, attention only where the mask
allows it, the output layer only for target tokens, nothing recomputed. A multiply-add is 2 FLOPs. Norms, activations,
rotary embeddings and the optimizer are left out, as is usual (Kaplan et al., 2020, table 1).
"""

from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass

from transformers import PretrainedConfig

from core.layer_shapes import SLIDING, layer_shapes, linear_before_layers
from core.load_model import is_target

# Dense bfloat16 FLOP/s, from NVIDIA's data sheets; the first key that is part of the device's name applies.
BF16_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of forward and backward pass together.

    Attributes:
        layers: the frozen matrices of the transformer layers, forward and gradient of their inputs: 4·N per token.
        adapters: LoRA's two products, forward, and gradients of inputs and weights.
        attention: scores and weighted sums, forward and backward, for the (query, key) pairs within the mask.
        output: logits and the gradient of the hidden states, for target tokens.
    """

    layers: float
    adapters: float
    attention: float
    output: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def flops_of(
    config: PretrainedConfig,
    lengths: Iterable[int],
    target_tokens: int,
    rank: int,
    targets: str | Collection[str],
    experts: Collection[str] = (),
) -> Flops:
    """FLOPs of one pass over samples with LoRA.

    Args:
        config: of a Gemma text model.
        lengths: tokens of each sample (it attends to itself only, packed or not).
        target_tokens: of all samples, those in the loss.
        rank: LoRA's r; of experts, that of each expert.
        targets: peft's `target_modules`, e.g. `[q_proj, v_proj]` or a pattern.
        experts: peft's `target_parameters`, e.g. `[experts.down_proj]`; only a token's active ones are counted.
    """
    lengths = list(lengths)
    tokens = sum(lengths)
    frozen = adapters = attention = 0.0
    for number, layer in enumerate(layer_shapes(config)):
        for name, (inputs, outputs) in layer.linear().items():
            frozen += 4.0 * inputs * outputs
            adapters += 6.0 * (inputs + outputs) * is_target(f"model.layers.{number}.{name}", targets)
        for name, (inputs, outputs) in layer.expert().items():
            frozen += 4.0 * layer.active_experts * inputs * outputs
            adapters += 6.0 * layer.active_experts * (inputs + outputs) * is_target(name, experts)
        window = config.sliding_window if layer.kind == SLIDING else None
        pairs = sum(_attended_pairs(length, window) for length in lengths)
        attention += 12.0 * pairs * layer.heads * layer.head_dim  # two products forward, four backward
    for name, (inputs, outputs) in linear_before_layers(config).items():  # their input is frozen, it has no gradient
        frozen += 2.0 * inputs * outputs
        adapters += (4.0 * inputs + 6.0 * outputs) * is_target(f"model.{name}", targets)
    return Flops(
        layers=frozen * tokens,
        adapters=adapters * rank * tokens,
        attention=attention,
        output=4.0 * target_tokens * config.vocab_size * config.hidden_size,
    )


def _attended_pairs(length: int, window: int | None) -> int:
    """The number of (query, key) pairs in a causal mask over `length` tokens; `window` includes the query itself."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def bf16_peak(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name (`torch.cuda.get_device_name()`), or None if it is unknown."""
    return next((peak for name, peak in BF16_PEAKS.items() if name in device), None)
