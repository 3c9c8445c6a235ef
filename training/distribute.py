"""What each of several processes holds, and how their work becomes one step.

The adapters are small: every process holds all of them, in float32. The strategies differ in the frozen base:

- `ddp`: a copy in every process; each takes its share of a step's rows.
- `fsdp2`: a share of every tensor in every process (torch's `fully_shard`); a layer is gathered when it is computed and
  freed after it. Each process takes its share of a step's rows.
- `tp`: some of the heads and of the MLP's features in every process of a node, as in Megatron-LM (Shoeybi et al., 2019,
  section 3); they compute the same rows together. Nodes take a share of the rows each.

At the end of a step, gradients and loss are summed over all processes, in one message. So checkpoints and archives are
whole in every process, the same under any strategy, and a run may go on with another number of processes.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from core.errors import UserError


class AdapterParallel(DDPStrategy):
    """Lightning's process bookkeeping with `kind` ("ddp", "fsdp2" or "tp") of base, and one message a step.

    Not torch's DistributedDataParallel: it would send the whole frozen base to every process at the start, and cannot
    hold one that is sharded.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(cluster_environment=TorchElasticEnvironment())
        self.kind = kind

    @property
    def share(self) -> tuple[int, int]:
        """Which share of a step's rows this process computes, and of how many."""
        return (self.node_rank, self.num_nodes) if self.kind == "tp" else (self.global_rank, self.world_size)

    def model_to_device(self) -> None:
        # Before the move, so that a device never holds more of the base than its share and one layer.
        gemma = self.lightning_module.model.get_base_model()  # type: ignore[union-attr, operator]
        device = self.root_device.type
        if self.kind == "fsdp2":
            shard_base(gemma, init_device_mesh(device, (self.world_size,)))
        elif self.kind == "tp":
            mesh = init_device_mesh(device, (self.num_nodes, self.num_processes), mesh_dim_names=("rows", "heads"))
            split_base(gemma, mesh.get_group("heads"))
        super().model_to_device()

    def configure_ddp(self) -> None:
        pass

    def sum_step(self, adapters: list[Tensor], loss: Tensor) -> Tensor:
        """Sum the gradients of `adapters` over all processes, in place, and return the sum of `loss` (float32 scalar).

        Under `tp` every process of a node has the same loss, and its part of every gradient.
        """
        if self.kind == "tp":
            loss = loss / self.num_processes
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in adapters]
        message = torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)])
        torch.distributed.all_reduce(message)
        parts = message.split([1, *(gradient.numel() for gradient in gradients)])
        for parameter, part in zip(adapters, parts[1:], strict=True):
            parameter.grad = part.view_as(parameter)
        return parts[0][0].clone()


# --- fsdp2 --------------------------------------------------------------------------------------------------------


def shard_base(gemma: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leave each process of `mesh` its share of every frozen tensor of `gemma`, gathered layer by layer when needed.

    The embedding, which is the output layer too, is gathered around `gemma.learned_loss`, where both are used.
    """
    _check_weights(gemma, "fsdp2")
    adapters = {parameter for parameter in gemma.parameters() if parameter.requires_grad}
    for layer in gemma.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapters)
    fully_shard(gemma, mesh=mesh, ignored_params=adapters)
    register_fsdp_forward_method(gemma, "learned_loss")


def _check_weights(gemma: PreTrainedModel, kind: str) -> None:
    if not all(parameter.is_floating_point() for parameter in gemma.parameters()):
        raise UserError(f"trainer.strategy={kind} cannot divide a quantized base. trainer.strategy=ddp copies it")


# --- tp -----------------------------------------------------------------------------------------------------------

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # each process computes some of the outputs
ROWS = ("o_proj", "down_proj")  # each process has some of the inputs; their outputs are summed


def split_base(gemma: PreTrainedModel, group: ProcessGroup) -> None:
    """Leave each process of `group` some heads of every attention of `gemma` and some features of every MLP.

    Adapters stay whole; each process uses, and has the gradient of, the part that belongs to its heads and features.
    """
    _check_weights(gemma, "tp")
    for name, module in gemma.named_modules():
        if isinstance(module, LoraLayer) and (name.rpartition(".")[2] not in COLUMNS + ROWS or module.lora_variant):
            raise UserError(
                f"trainer.strategy=tp knows plain LoRA on {', '.join(COLUMNS + ROWS)}; {name} has other adapters. "
                f"trainer.strategy=fsdp2 takes any"
            )
    for layer in gemma.model.layers:
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_pre_hook(partial(_share_input, group), with_kwargs=True)
            for name, linear in block.named_children():
                if name in COLUMNS:
                    _split(linear, group, 0)
                elif name in ROWS:
                    _split(linear, group, 1)
                    linear.register_forward_hook(lambda module, inputs, output: _Sum.apply(output, group))


def _split(linear: Any, group: ProcessGroup, dim: int) -> None:
    """Keep this process's part of the outputs (`dim` 0) or the inputs (`dim` 1) of a linear layer."""

    def mine(weight: Tensor) -> Tensor:
        return weight.chunk(group.size(), dim)[group.rank()]

    def forward(self: LoraLinear, x: Tensor) -> Tensor:
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        a, b = (a, mine(b)) if dim == 0 else (mine(a), b)
        low = F.linear(self.lora_dropout["default"](x), a.to(x.dtype))
        return F.linear(x, self.base_layer.weight) + F.linear(low, (b * self.scaling["default"]).to(x.dtype))

    base = linear
    if isinstance(linear, LoraLinear):
        base = linear.base_layer
        linear.forward = MethodType(forward, linear)
    base.weight = nn.Parameter(mine(base.weight).clone(), requires_grad=False)


def _share_input(group: ProcessGroup, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (_Copy.apply(args[0], group), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _Copy.apply(kwargs["hidden_states"], group)}


class _Copy(torch.autograd.Function):
    """The same input for every process's part; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum of every process's part; each part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad, None
