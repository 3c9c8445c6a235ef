"""The arithmetic of a LoRA step in FLOPs, and the peak FLOP/s of GPUs, for model FLOPs utilization (MFU).

What any implementation must compute is counted: products over tokens without padding, attention only where the mask
allows it, the output layer only for target tokens, nothing recomputed. A multiply-add is 2 FLOPs. Norms, activations,
rotary embeddings and the optimizer are left out, as is usual (Kaplan et al., 2020, table 1).
"""

from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass

from transformers import PretrainedConfig

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


def layer_shapes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Name → (inputs, outputs) of each linear layer of one Gemma layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def flops_of(
    config: PretrainedConfig, lengths: Iterable[int], target_tokens: int, rank: int, targets: Collection[str]
) -> Flops:
    """FLOPs of one pass over samples with LoRA.

    Args:
        config: of a Gemma 1, 2 or 3 text model.
        lengths: tokens of each sample (it attends to itself only, packed or not).
        target_tokens: of all samples, those in the loss.
        rank: LoRA's r.
        targets: names of the adapted layers, e.g. `q_proj`.
    """
    lengths = list(lengths)
    tokens, layers = sum(lengths), config.num_hidden_layers
    shapes = layer_shapes(config)
    weights = sum(inputs * outputs for inputs, outputs in shapes.values())
    adapted = sum(sum(shapes[name]) for name in targets)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    pairs = 0
    for kind in kinds:
        window = config.sliding_window if kind == "sliding_attention" else None
        pairs += sum(_attended_pairs(length, window) for length in lengths)
    width = config.num_attention_heads * config.head_dim
    return Flops(
        layers=4.0 * tokens * layers * weights,
        adapters=6.0 * tokens * layers * rank * adapted,
        attention=12.0 * pairs * width,  # two products forward, four backward
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
