"""Products of a few rows with float32 weights on a CPU, which are all that generation consists of, at memory's speed.

For x [rows, in] and W [out, in] torch hands `x Wᵀ` to a library that is made for many rows: on two cores with AVX2 it
took 197 ms for three rows and Gemma's output layer, and `W xᵀ`, the same sums, 24 ms. Of a single row it uses one core.
In bfloat16 torch uses oneDNN, which knows few rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

FEW = 48  # rows; with more, both ways take about as long
BLOCK = 2048  # outputs at a time, which stay in the processor's cache until they are turned round


@contextmanager
def fast_for_few_rows(model: nn.Module) -> Iterator[None]:
    """Within the context, the linear layers of `model` that are float32 and on a CPU compute up to FEW rows so.

    Rounding differs in the last bits.
    """
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
    ]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    count = x.numel() // x.shape[-1]
    if self.bias is not None or not 0 < count <= FEW:
        return nn.Linear.forward(self, x)
    return product(x.reshape(count, -1), self.weight).view(*x.shape[:-1], -1)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows` [rows, in] times `weight` [out, in] transposed: [rows, out]."""
    columns = (rows.expand(2, -1) if len(rows) == 1 else rows).T
    if len(weight) <= BLOCK:
        return torch.mm(weight, columns)[:, : len(rows)].T.contiguous()
    y = rows.new_empty(len(rows), len(weight))
    for begin in range(0, len(weight), BLOCK):
        y[:, begin : begin + BLOCK] = torch.mm(weight[begin : begin + BLOCK], columns)[:, : len(rows)].T
    return y
