"""The roofline of a training step: how fast this machine computes its matrix products alone.

The products are timed in the shapes of the model's layers and of its output layer, in both passes. No implementation
can be faster than the roofline.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig

from core.layer_shapes import layer_shapes
from training.flops import Flops, bf16_peak

SECONDS = 0.3  # each product is repeated for so long, after a warm-up call
VOCABULARY_BLOCKS = (512, 2048, 8192)  # on a CPU, logits that fit in the cache are computed several times faster


def measure(config: PretrainedConfig, tokens: int, target_tokens: int) -> dict[str, Any]:
    """FLOP/s of matrix products, `{"bfloat16": {"layers", "output"}, "float32": …, "gpu_peak": bfloat16 or None}`.

    Args:
        tokens: of a micro-batch, the rows of the layers' products.
        target_tokens: the rows of the output layer's products.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = bf16_peak(torch.cuda.get_device_name()) if device.type == "cuda" else None
    rates: dict[str, Any] = {"tokens": tokens, "learned": target_tokens, "gpu_peak": peak}
    sizes = Counter(size for layer in layer_shapes(config) for size in layer.linear().values())
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            seconds = flops = 0.0
            for (inputs, outputs), count in sizes.items():
                x, weight = _random(tokens, inputs, dtype, device), _random(outputs, inputs, dtype, device)
                grad = _random(tokens, outputs, dtype, device)
                forward, backward = torch.empty_like(grad), torch.empty_like(x)
                seconds += count * _best(lambda x=x, w=weight, to=forward: torch.mm(x, w.T, out=to))  # type: ignore[misc]
                seconds += count * _best(lambda g=grad, w=weight, to=backward: torch.mm(g, w, out=to))  # type: ignore[misc]
                flops += count * 4.0 * tokens * inputs * outputs
            rates[str(dtype).removeprefix("torch.")] = {
                "layers": flops / seconds,
                "output": _output_rate(config, target_tokens, dtype, device),
            }
    return rates


def higher(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher rates of two measurements: other load on the machine lowers one, and must not raise a fraction of
    it."""
    for dtype in ("bfloat16", "float32"):
        one[dtype] = {part: max(rate, other[dtype][part]) for part, rate in one[dtype].items()}
    return one


def least_seconds(flops: Flops, rates: dict[str, float]) -> float:
    """The least time for `flops` at the measured `rates` of one dtype; adapters and attention at the layers' rate."""
    return (flops.layers + flops.adapters + flops.attention) / rates["layers"] + flops.output / rates["output"]


def _output_rate(config: PretrainedConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    hidden = _random(tokens, config.hidden_size, dtype, device)
    weight = _random(config.vocab_size, config.hidden_size, dtype, device)
    gradient = torch.empty_like(hidden)
    rates = []
    for block in VOCABULARY_BLOCKS if device.type == "cpu" else (config.vocab_size,):
        parts = [part for part in weight.split(min(block, config.vocab_size)) if len(part) == len(weight[:block])]
        logits = hidden.new_empty(tokens, len(parts[0]))

        def both(parts: Any = parts, logits: Any = logits) -> None:
            for part in parts:
                torch.mm(hidden, part.T, out=logits)
                torch.mm(logits, part, out=gradient)

        rates.append(4.0 * tokens * config.hidden_size * sum(map(len, parts)) / _best(both))
    return max(rates)


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, device=device).to(dtype)


def _best(call: Callable[[], Any]) -> float:
    """The seconds of the fastest call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    call()
    wait()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - began)
    return best
