"""The roofline of a training step: how fast torch computes the matrix products alone on this machine.

The products are timed in the shapes of the model's layers and of its output layer, in both passes; it takes some
seconds. On a CPU, a product with more than LARGEST rows or columns is timed with so many, which is as fast, and
bfloat16 is left out where it is emulated.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig

from core.layer_shapes import layer_shapes
from training.flops import Flops, bf16_peak

SECONDS = 0.15  # each product is repeated for so long, after a warm-up call
LARGEST = 2048
VOCABULARY_BLOCKS = (512, 2048, 8192)  # on a CPU, logits that fit in the cache are computed several times faster
VOCABULARY_BYTES = 256 << 20  # of the output layer's weights; more than a cache holds
DTYPES = (torch.float32, torch.bfloat16)


def measure(config: PretrainedConfig, tokens: int, target_tokens: int) -> dict[str, Any]:
    """FLOP/s of matrix products, `{"float32": {"layers", "output"}, "bfloat16": …, "gpu_peak": bfloat16 or None}`.

    bfloat16 is missing where its products are less than half as fast as those of float32.

    Args:
        tokens: of a micro-batch, the rows of the layers' products.
        target_tokens: the rows of the output layer's products.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device.type == "cpu"
    peak = None if on_cpu else bf16_peak(torch.cuda.get_device_name())
    rates: dict[str, Any] = {"tokens": tokens, "learned": target_tokens, "gpu_peak": peak}
    if on_cpu:
        tokens, target_tokens = min(tokens, LARGEST), min(target_tokens, LARGEST)
    sizes = Counter(size for layer in layer_shapes(config) for size in layer.linear().values())
    with torch.inference_mode():
        trial = [_layers_rate(Counter([(640, 640)]), min(tokens, 512), dtype, device) for dtype in DTYPES]
        for dtype in DTYPES[: 1 if on_cpu and trial[1] < trial[0] / 2 else 2]:
            rates[str(dtype).removeprefix("torch.")] = {
                "layers": _layers_rate(sizes, tokens, dtype, device),
                "output": _output_rate(config, target_tokens, dtype, device),
            }
    return rates


def higher(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher rates of two measurements: other load on the machine lowers one, and must not raise a fraction of
    it."""
    rates = other | one
    for dtype in dtypes(rates):
        first, second = one.get(dtype, {}), other.get(dtype, {})
        rates[dtype] = {part: max(first.get(part, 0), second.get(part, 0)) for part in ("layers", "output")}
    return rates


def dtypes(rates: dict[str, Any]) -> list[str]:
    """Those that were measured, bfloat16 first."""
    return [dtype for dtype in ("bfloat16", "float32") if dtype in rates]


def least_seconds(flops: Flops, rates: dict[str, float]) -> float:
    """The least time for `flops` at the measured `rates` of one dtype; adapters and attention at the layers' rate."""
    return (flops.layers + flops.adapters + flops.attention) / rates["layers"] + flops.output / rates["output"]


def _layers_rate(sizes: Counter[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    seconds = flops = 0.0
    timed = Counter[tuple[int, int]]()
    for size, count in sizes.items():
        inputs, outputs = (min(one, LARGEST) if device.type == "cpu" else one for one in size)
        timed[inputs, outputs] += count
    for (inputs, outputs), count in timed.items():
        x, weight = _random(tokens, inputs, dtype, device), _random(outputs, inputs, dtype, device)
        grad = _random(tokens, outputs, dtype, device)
        forward, backward = torch.empty_like(grad), torch.empty_like(x)
        seconds += count * _best(lambda x=x, w=weight, to=forward: torch.mm(x, w.T, out=to))  # type: ignore[misc]
        seconds += count * _best(lambda g=grad, w=weight, to=backward: torch.mm(g, w, out=to))  # type: ignore[misc]
        flops += count * 4.0 * tokens * inputs * outputs
    return flops / seconds


def _output_rate(config: PretrainedConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    hidden = _random(tokens, config.hidden_size, dtype, device)
    blocks, rows = (config.vocab_size,), config.vocab_size
    if device.type == "cpu":
        blocks = tuple(sorted({min(block, rows) for block in VOCABULARY_BLOCKS}))
        rows = min(rows, VOCABULARY_BYTES // hidden[:1].nbytes)
    some = _random(min(rows, blocks[-1]), config.hidden_size, dtype, device)
    weight = some.repeat(-(-rows // len(some)), 1)
    gradient = torch.empty_like(hidden)
    rates = []
    for block in blocks:
        parts = itertools.cycle([part for part in weight.split(block) if len(part) == block])
        logits = hidden.new_empty(tokens, block)

        def next_part(parts: Any = parts, logits: Any = logits) -> None:
            part = next(parts)
            torch.mm(hidden, part.T, out=logits)
            torch.mm(logits, part, out=gradient)

        rates.append(4.0 * tokens * config.hidden_size * block / _best(next_part))
    return max(rates)


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, device=device).to(dtype)


def _best(call: Callable[[], Any]) -> float:
    """The seconds of the fastest call; of the first one where that took longer than SECONDS."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def timed() -> float:
        began = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - began

    if (first := timed()) > SECONDS:
        return first
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        best = min(best, timed())
    return best
