"""A program for an interpreter that has megatron-core: its own checkpoints of tiny Gemmas, of any layout, on a CPU.

Reads a line of JSON from stdin, a list of jobs, which are done one after another by as many processes as each says:

    {"do": "write", "config": …, "folder": …, "tensor": 2, "pipeline": 2, "expert": 1, "lora": null}
        a random model of transformers' `config` is saved to `folder` by dist_checkpointing
    {"do": "dump", …, "to": "whole.pt"}       `folder` is loaded, and each process saves its tensors with torch.save
    {"do": "resave", …, "to": other}          `folder` is loaded by all processes, and saved by them to `other`

With "lora", the adapters alone, as Megatron-Bridge saves them: {"rank": 4, "canonical": false, "dora": false}.

The model is megatron-core's GPTModel with its own local layers, which saves under the names that Transformer Engine's
layers have. What Megatron-Bridge adds for Gemma is written here from its modules' names: norms behind the projections
(Gemma 2, 3); attention by its kind, per-layer embeddings, scalars and experts (Gemma 4).
"""

import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules, apply_swiglu_sharded_factory
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

# The tied embedding and the router's buffers are moved to the GPU, and saving waits for it.
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = lambda *_: None
torch.Tensor.cuda = lambda self, *_: self
METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}  # Megatron-Bridge 0.6.2's


class Norm(torch.nn.Module):
    """Only the weight: no model is run here."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size))


class NormedRowParallelLinear(RowParallelLinear):
    """Megatron-Bridge's TERowParallelLinearLayerNorm: the projection, and the norm behind it."""

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        self.post_layernorm = Norm(output_size)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in own.items() if "post_layernorm" not in key or key.endswith("weight")}


class NormedColumnParallelLinear(ColumnParallelLinear):
    """Transformer Engine's layer with the norm before it, which is a part of the attention and so saved by its kind."""

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size))


class Attention4(SelfAttention):
    """Gemma 4's: full attention has its own head size and groups; each kind is a tensor of its own in the checkpoint,
    whose first dimension goes through the layers of that kind."""

    def __init__(self, config: TransformerConfig, submodules: Any, layer_number: int, **options: Any) -> None:
        self.sliding, own = config.sliding, copy.copy(config)
        if not self.sliding[layer_number - 1]:
            own.kv_channels, own.num_query_groups = config.global_kv_channels, config.num_global_query_groups
        super().__init__(own, submodules, layer_number, **options)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        mine = self.sliding[self.layer_number - 1]
        prefix_of_kind = f"{prefix[:-1]}_{'sliding' if mine else 'global'}."
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        of_kind, before = self.sliding.count(mine), self.sliding[: self.layer_number - 1].count(mine)

        def moved(value: Any) -> Any:
            change: dict[str, Any] = {"key": value.key.replace(prefix, prefix_of_kind, 1)}
            if isinstance(value, ShardedTensor) and value.prepend_axis_num:
                change["global_shape"] = (of_kind, *value.global_shape[1:])
                change["global_offset"] = (before, *value.global_offset[1:])
                change["axis_fragmentations"] = (of_kind, *value.axis_fragmentations[1:])
            return dataclasses.replace(value, **change)

        return {key: moved(value) for key, value in found.items() if not isinstance(value, ShardedObject)}


class Router4(TopKRouter):
    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.scale = torch.nn.Parameter(torch.empty(config.hidden_size))
        self.per_expert_scale = torch.nn.Parameter(torch.empty(config.num_moe_experts))


class Experts4(MoELayer):
    def __init__(self, config: TransformerConfig, submodules: Any, **options: Any) -> None:
        super().__init__(config, submodules, **options)
        self.post_moe_layernorm, self.post_shared_expert_layernorm = Norm(config.hidden_size), Norm(config.hidden_size)


class Layer4(TransformerLayer):
    def __init__(self, config: TransformerConfig, submodules: Any, layer_number: int = 1, **options: Any) -> None:
        super().__init__(config, submodules, layer_number, **options)
        self.register_buffer("layer_scalar", torch.empty(1))
        h = config.hidden_size
        if config.num_moe_experts:
            self.pre_shared_expert_layernorm, self.post_ffn_layernorm = Norm(h), Norm(h)
            return
        self.post_self_attn_layernorm, self.post_mlp_layernorm = Norm(h), Norm(h)
        if config.per_layer:
            self.per_layer_input_gate = torch.nn.Linear(h, config.per_layer, bias=False)
            self.per_layer_projection = torch.nn.Linear(config.per_layer, h, bias=False)
            self.post_per_layer_input_norm = Norm(h)
        if config.hetereogenous_dist_checkpoint and self.layer_number > config.num_layers - config.kv_shared:
            wide = copy.copy(config)
            wide.ffn_hidden_size *= 2
            parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            self.mlp = MLP(wide, parts, ffn_hidden_size=wide.ffn_hidden_size)


def build(theirs: dict[str, Any]) -> GPTModel:
    """megatron-core's model of transformers' configuration `theirs`, with random weights."""
    family, first = theirs["model_type"], parallel_state.is_pipeline_first_stage()
    four = family.startswith("gemma4")
    experts = theirs.get("num_experts") if theirs.get("enable_moe_block") else None
    sizes = {"moe_ffn_hidden_size": theirs["moe_intermediate_size"], "moe_router_topk": 2} if experts else {}
    if experts:
        sizes |= {"moe_shared_expert_intermediate_size": theirs["intermediate_size"], "num_moe_experts": experts}
        sizes |= {"moe_token_dispatcher_type": "allgather", "moe_router_pre_softmax": True}
        sizes |= {"expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size()}
        sizes |= {"expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size()}
    config = TransformerConfig(
        num_layers=theirs["num_hidden_layers"],
        hidden_size=theirs["hidden_size"],
        ffn_hidden_size=theirs["intermediate_size"],
        num_attention_heads=theirs["num_attention_heads"],
        num_query_groups=theirs["num_key_value_heads"],
        kv_channels=theirs["head_dim"],
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        qk_layernorm=family not in ("gemma", "gemma2"),
        use_cpu_initialization=True,
        hetereogenous_dist_checkpoint=bool(four and theirs.get("use_double_wide_mlp")),
        **sizes,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer = spec.submodules
    later = isinstance(layer.mlp, functools.partial)  # than 0.16
    mlp = layer.mlp.keywords["submodules"] if later else layer.mlp.submodules
    if four:
        config.sliding = [kind == "sliding_attention" for kind in theirs["layer_types"]]
        config.global_kv_channels = theirs["global_head_dim"]
        fewer = theirs.get("attention_k_eq_v") and theirs.get("num_global_key_value_heads")
        config.num_global_query_groups = fewer or config.num_query_groups
        config.per_layer = theirs.get("hidden_size_per_layer_input") or 0
        config.kv_shared = theirs.get("num_kv_shared_layers") or 0
        spec.module, layer.self_attention.module = Layer4, Attention4
        if experts:
            mlp.router = Router4
            layer.mlp = functools.partial(Experts4, submodules=mlp) if later else ModuleSpec(Experts4, submodules=mlp)
            layer.self_attention.submodules.linear_proj = NormedRowParallelLinear
            layer.self_attention.submodules.linear_qkv = NormedColumnParallelLinear
            layer.input_layernorm = IdentityOp
        layer.sharded_state_dict_keys_map = {}
    elif family != "gemma":
        layer.self_attention.submodules.linear_proj = mlp.linear_fc2 = NormedRowParallelLinear
    model = GPTModel(
        config,
        spec,
        vocab_size=-(-theirs["vocab_size"] // 128) * 128,
        max_sequence_length=64,
        pre_process=first,
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    if four and config.per_layer and first:
        width, init = config.num_layers * config.per_layer, config.init_method
        rows = theirs["vocab_size_per_layer_input"]
        model.per_layer_embedding = VocabParallelEmbedding(rows, width, config=config, init_method=init)
        model.per_layer_model_proj = ColumnParallelLinear(
            config.hidden_size, width, config=config, init_method=init, bias=False, gather_output=True
        )
        model.per_layer_proj_norm = Norm(config.per_layer)
    return model


class LowRank(torch.nn.Module):
    """Megatron-Bridge's ParallelLinearAdapter: of a layer divided by columns, or by rows where `parallel_input`."""

    def __init__(self, config: Any, sizes: tuple[int, int, int], parallel_input: bool, name: str) -> None:
        super().__init__()
        into, rank, out = sizes
        options = {"config": config, "init_method": config.init_method, "bias": False}
        expert = options | {"is_expert": ".local_experts." in name}
        if parallel_input:
            self.linear_in = RowParallelLinear(into, rank, input_is_parallel=True, skip_bias_add=True, **expert)
        else:
            self.linear_in = ColumnParallelLinear(into, rank, gather_output=True, **expert)
        self.linear_out = ColumnParallelLinear(rank, out, gather_output=parallel_input, **expert)
        self.name, self.parallel_input = name, parallel_input

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        found = {
            **self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata),
            **self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata),
        }
        if "linear_fc1" in self.name:  # also where it is gate's or up's alone, as 0.6.2 has it
            key = f"{prefix}linear_out.weight"
            found[key] = apply_swiglu_sharded_factory(found[key], sharded_offsets)
        if hasattr(self, "weight_magnitude"):
            key = f"{prefix}weight_magnitude"
            if self.parallel_input:
                found[key] = make_sharded_tensor_for_checkpoint(
                    self.weight_magnitude, key, prepend_offsets=sharded_offsets
                )
            else:
                found[key] = make_tp_sharded_tensor_for_checkpoint(
                    self.weight_magnitude, key, 0, prepend_offsets=sharded_offsets
                )
        return found


class Parts(torch.nn.ModuleDict):
    """Megatron-Bridge's canonical adapters of what Megatron joins."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        found = {}
        for key, part in self.items():
            found |= part.sharded_state_dict(f"{prefix}{key}.", sharded_offsets, metadata)
        return found


class Adapted(torch.nn.Module):
    """A layer and its adapter, which is saved beside what the layer has."""

    def __init__(self, layer: torch.nn.Module, adapter: torch.nn.Module) -> None:
        super().__init__()
        self.to_wrap, self.adapter = layer, adapter

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        return {
            **self.to_wrap.sharded_state_dict(prefix, sharded_offsets, metadata),
            **self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata),
        }


def adapt(model: GPTModel, rank: int, canonical: bool, dora: bool) -> None:
    """Give each of Megatron's four layers an adapter, experts' too."""
    for name, layer in list(model.named_modules()):
        place, _, short = name.rpartition(".")
        if short not in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
            continue
        rows, config = short in ("linear_proj", "linear_fc2"), layer.config
        into, out = layer.input_size, layer.output_size
        if canonical and short == "linear_qkv":
            keys = config.kv_channels * config.num_query_groups
            sizes = {"adapter_q": out - 2 * keys, "adapter_k": keys, "adapter_v": keys}
        elif canonical and short == "linear_fc1" and ".experts." not in name:
            sizes = {"adapter_up": out // 2, "adapter_gate": out // 2}
        else:
            sizes = {}
        if sizes:
            adapter: torch.nn.Module = Parts(
                {key: LowRank(config, (into, rank, own), rows, name) for key, own in sizes.items()}
            )
        else:
            adapter = LowRank(config, (into, rank, out), rows, name)
        if dora:
            adapter.weight_magnitude = torch.nn.Parameter(torch.empty(layer.weight.shape[0]))
            adapter.weight_magnitude.tensor_model_parallel = not rows
        setattr(model.get_submodule(place), short, Adapted(layer, adapter))


def fill(model: torch.nn.Module) -> None:
    """Random values, the same for what several ranks hold whole, different for what they divide."""
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        owner = model.get_parameter(name) if name in dict(model.named_parameters()) else tensor
        divided = getattr(owner, "tensor_model_parallel", False)
        seed = (name, ranks[0] if divided else 0, ranks[1] if ".local_experts." in name else 0)
        stage = (
            0 if name.startswith(("embedding.", "output_layer.")) else parallel_state.get_pipeline_model_parallel_rank()
        )
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {stage}".encode()))
        tensor.copy_(torch.randn(tensor.shape, generator=generator).to(torch.bfloat16))


def sharded(model: torch.nn.Module, adapters: bool) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = model.sharded_state_dict(metadata={**METADATA, "dp_cp_group": group})
    return {
        key: value for key, value in found.items() if "_extra_state" not in key and (not adapters or ".adapter." in key)
    }


def process(rank: int, world: int, meeting: str, job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job["tensor"],
        pipeline_model_parallel_size=job["pipeline"],
        expert_model_parallel_size=job["expert"],
        expert_tensor_parallel_size=1 if job["expert"] > 1 else None,
    )
    if hasattr(filesystem_async, "_results_queue"):  # else it begins a Python that imports torch, in each process
        filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    with torch.no_grad():
        model = build(job["config"])
        if job.get("lora"):
            adapt(model, **job["lora"])
        fill(model)
        state = sharded(model, bool(job.get("lora")))
        if job["do"] != "write":
            found = dist_checkpointing.load(state, job["folder"], strict="raise_unexpected")
        if job["do"] == "resave":
            state = sharded(model, bool(job.get("lora")))
            for key in state:  # beside them is what common.pt holds
                state[key].data = found[key]
        if job["do"] == "dump":
            of_rank = f".{rank}" * (world > 1)
            torch.save({key: value.clone() for key, value in found.items()}, f"{job['to']}{of_rank}")
        else:
            to = Path(job["folder" if job["do"] == "write" else "to"])
            if rank == 0:
                to.mkdir(parents=True)
            dist.barrier()
            dist_checkpointing.save(state, to)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    for job in json.loads(sys.stdin.readline()):
        world = job["tensor"] * job["pipeline"] * job.get("data", 1)
        with tempfile.TemporaryDirectory() as folder:
            processes.start_processes(process, (world, f"{folder}/meeting", job), world, start_method="fork")
        print(json.dumps({"done": job["do"]}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
