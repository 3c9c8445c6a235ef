"""Distributed strategies: what each process holds of the model, and how their gradients become one step.

The adapters are small: every process holds all of them, in float32. The strategies differ in the frozen base:

- `ddp`: a copy in every process; each takes its share of a step's samples.
- `fsdp2`: a shard of every tensor in every process (torch's `fully_shard`); a layer is gathered when it is computed and
  freed after it. Each process takes its share of a step's samples.
- `tp`: some of the heads and of the MLP's features in every process of a node, as in Megatron-LM (Shoeybi et al., 2019,
  section 3); they compute the same samples together. Each node takes a share of the samples.

At the end of a step, gradients and loss are summed over all processes in one all-reduce. So checkpoints and archives
are complete in every process, the same under any strategy, and a run may be resumed with another number of processes.
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
    """Lightning's process bookkeeping, with the base divided as `kind` says ("ddp", "fsdp2" or "tp") and one all-reduce
    a step.

    Not torch's DistributedDataParallel: it would broadcast the whole frozen base at the start, and cannot hold one that
    is sharded.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(cluster_environment=TorchElasticEnvironment())
        self.kind = kind

    @property
    def share(self) -> tuple[int, int]:
        """Which share of a step's samples this process computes, and the number of shares."""
        return (self.node_rank, self.num_nodes) if self.kind == "tp" else (self.global_rank, self.world_size)

    def model_to_device(self) -> None:
        # Before the move, so that a device never holds more of the base than its shard and one layer.
        gemma = self.lightning_module.model.get_base_model()  # type: ignore[union-attr, operator]
        device = self.root_device.type
        if self.kind == "fsdp2":
            shard_base(gemma, init_device_mesh(device, (self.world_size,)))
        elif self.kind == "tp":
            mesh = init_device_mesh(device, (self.num_nodes, self.num_processes), mesh_dim_names=("samples", "heads"))
            split_base(gemma, mesh.get_group("heads"))
        super().model_to_device()

    def configure_ddp(self) -> None:
        pass

    def sum_step(self, adapters: list[Tensor], loss: Tensor) -> Tensor:
        """Sum the gradients of `adapters` over all processes, in place.

        Under `tp` every process of a node has the same loss, and a part of every gradient.

        Args:
            loss: float32 scalar of this process.

        Returns:
            The sum of `loss` over all shares of the step.
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
    """Shard every frozen tensor of `gemma` over the processes of `mesh`, in place; layers are gathered one by one.

    The embedding, which is also the output layer, is gathered around `gemma.loss_sum`, which uses both.

    Raises:
        UserError: the base is quantized.
    """
    _check_weights(gemma, "fsdp2")
    whole = {parameter for parameter in gemma.parameters() if parameter.requires_grad}
    for module in gemma.modules():
        if "_apply" in vars(module):  # see core.load_model.keep_in_main_memory
            whole.update(module.parameters())
    for layer in gemma.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(gemma, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(gemma, "loss_sum")


def _check_weights(gemma: PreTrainedModel, kind: str) -> None:
    if not all(parameter.is_floating_point() for parameter in gemma.parameters()):
        raise UserError(
            f"trainer.strategy={kind} cannot divide a quantized base; use trainer.strategy=ddp, which copies it"
        )


# --- tp -----------------------------------------------------------------------------------------------------------

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # each process computes some of the outputs
ROW_PARALLEL = ("o_proj", "down_proj")  # each process has some of the inputs; their outputs are summed


def split_base(gemma: PreTrainedModel, group: ProcessGroup) -> None:
    """Divide the heads of every attention of `gemma` and the features of every MLP over `group`, in place.

    Adapters stay whole; each process uses, and has the gradient of, the part that belongs to its heads and features.

    Raises:
        UserError: a quantized base, or adapters other than plain LoRA on the linear layers of attention and MLP.
    """
    _check_weights(gemma, "tp")
    for name, module in gemma.named_modules():
        if isinstance(module, LoraLayer) and (
            name.rpartition(".")[2] not in COLUMN_PARALLEL + ROW_PARALLEL or module.lora_variant
        ):
            raise UserError(
                f"trainer.strategy=tp supports plain LoRA on {', '.join(COLUMN_PARALLEL + ROW_PARALLEL)}; "
                f"{name} has other adapters. trainer.strategy=fsdp2 supports any"
            )
    for layer in gemma.model.layers:
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_pre_hook(partial(_copy_input, group), with_kwargs=True)
            for name, linear in block.named_children():
                if name in COLUMN_PARALLEL:
                    _split(linear, group, 0)
                elif name in ROW_PARALLEL:
                    _split(linear, group, 1)
                    linear.register_forward_hook(lambda module, inputs, output: _ReduceFromGroup.apply(output, group))


def _split(linear: Any, group: ProcessGroup, dim: int) -> None:
    """Keep this process's part of the outputs (`dim` 0) or of the inputs (`dim` 1) of a linear layer, in place."""

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


def _copy_input(group: ProcessGroup, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (_CopyToGroup.apply(args[0], group), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _CopyToGroup.apply(kwargs["hidden_states"], group)}


class _CopyToGroup(torch.autograd.Function):
    """Identity forward, all-reduce backward: Megatron-LM's function f (section 3)."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFromGroup(torch.autograd.Function):
    """All-reduce forward, identity backward: Megatron-LM's function g (section 3)."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad, None
