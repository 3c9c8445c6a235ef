"""The experts of Gemma 4's mixture on a CPU: transformers' arithmetic, on numbers of rows that repeat.

Each expert is sent another number of tokens in each layer and step. oneDNN builds a kernel for each new number and
keeps a thousand of them, which took more memory than all activations, and time. Of rounded numbers there are few.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ROUND = 32  # rows of one expert


def round_experts(gemma: PreTrainedModel, device: torch.device) -> None:
    """Have `gemma` compute its experts, if it has some, by `rounded_experts` where `device` is a CPU; adapters stay at
    work.

    Args:
        device: on which it will compute; it may lie elsewhere now.
    """
    if device.type == "cpu" and getattr(gemma.config, "enable_moe_block", False):
        gemma.set_experts_implementation("rounded")


def rounded_experts(self: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """transformers' experts interface.

    Args:
        x: [tokens, hidden].
        index, weight: [tokens, active], the experts of each token and their weights.

    Returns:
        [tokens, hidden].
    """
    gate_up, down = self.gate_up_proj, self.down_proj  # once: where they have an adapter, each is a sum
    tokens, active = index.shape
    order = index.flatten().argsort(stable=True)  # (token, expert) pairs by expert
    counts = torch.bincount(index.flatten(), minlength=len(gate_up)).tolist()
    sizes = [-(-count // ROUND) * ROUND for count in counts]
    source = torch.full((sum(sizes),), tokens)  # the row of x that each row here is; `tokens`: one of zeros
    place = torch.empty_like(order)  # the row here that each pair is
    begin = first = 0
    for count, size in zip(counts, sizes, strict=True):
        pairs = order[first : first + count]
        source[begin : begin + count] = pairs // active
        place[pairs] = torch.arange(begin, begin + count)
        begin, first = begin + size, first + count
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])[source]
    outputs = []
    for expert, part in enumerate(rows.split(sizes)):
        if len(part):
            gate, up = (part @ gate_up[expert].T).chunk(2, -1)
            outputs.append((self.act_fn(gate) * up) @ down[expert].T)
    found = torch.cat(outputs)[place].view(tokens, active, -1)
    return (found * weight[..., None]).sum(1).to(x.dtype)


ALL_EXPERTS_FUNCTIONS.register("rounded", rounded_experts)
