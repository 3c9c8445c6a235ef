"""LoRA for a batch with many adapters, in two matrix products for each projection.

The A and B of all adapters in a step are concatenated: x @ Aᵀ gives the low-rank activations of every adapter, those of
other adapters than the token's own are set to zero, and the rest times B is added. Ranks, alphas, rank-stabilized
scaling and target modules may differ between adapters.
"""

import torch
from torch import Tensor

from serving.engine.adapters import LoraAdapter, module_shapes
from serving.engine.architecture import GemmaConfig
from serving.engine.step import Chunk

# The projections of a layer, and the modules whose outputs are concatenated in each, as far as the layer has them.
PACKED_MODULES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "per_layer_gate": ("per_layer_input_gate",),
    "per_layer_projection": ("per_layer_projection",),
    "per_layer_model": ("per_layer_model_projection",),
    "router": ("router.proj",),
}


class StackedAdapters:
    """The A and B of several adapters, concatenated for each projection of each layer.

    Args:
        adapters: their order is that of the blocks.
        device: of the matrices, which are float32.
    """

    def __init__(self, adapters: list[LoraAdapter], config: GemmaConfig, device: torch.device) -> None:
        self.adapters = adapters
        self.device = device
        self.projections: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}
        for layer in range(config.layers):
            shapes = module_shapes(config, layer)
            for projection, all_modules in PACKED_MODULES.items():
                modules = [module for module in all_modules if module in shapes]
                widths = [shapes[module][0] for module in modules]
                a_blocks, b_blocks, owners = [], [], []
                for index, adapter in enumerate(adapters):
                    for number, module in enumerate(modules):
                        if (a := adapter.lora_a.get((layer, module))) is None:
                            continue
                        b = torch.zeros(a.shape[0], sum(widths))
                        start = sum(widths[:number])
                        b[:, start : start + widths[number]] = adapter.lora_b[layer, module].T
                        a_blocks.append(a.T)
                        b_blocks.append(b)
                        owners += [index] * a.shape[0]
                if a_blocks:
                    self.projections[layer, projection] = (
                        torch.cat(a_blocks, 1).to(device),
                        torch.cat(b_blocks).to(device),
                        torch.tensor(owners, device=device),
                    )

    def for_step(self, chunks: list[Chunk]) -> "StackedStep":
        """These adapters with the assignment of one step's tokens to them."""
        indices = {id(adapter): index for index, adapter in enumerate(self.adapters)}
        of_tokens = [indices.get(id(chunk.adapter), -1) for chunk in chunks for _ in range(chunk.count)]
        return StackedStep(self, torch.tensor(of_tokens, device=self.device))


class StackedStep:
    """Stacked adapters, and the adapter of each token of a step: its index, or -1 for the base."""

    def __init__(self, stacked: StackedAdapters, of_tokens: Tensor) -> None:
        self.projections = stacked.projections
        self.of_tokens = of_tokens[:, None]

    def add(self, y: Tensor, x: Tensor, layer: int, projection: str) -> Tensor:
        """Add each token's LoRA update of x [tokens, in] to y [tokens, out], float32, in place, and return y."""
        if (layer, projection) not in self.projections:
            return y
        lora_a, lora_b, owners = self.projections[layer, projection]
        return y.addmm_(torch.mm(x, lora_a).mul_(owners == self.of_tokens), lora_b)
