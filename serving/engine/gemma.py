"""The forward pass of Gemma 1 to 4 (text) over a step's tokens, whoever they belong to.

A step is a flat list of tokens of many requests: one of each that is decoding, and chunks of prompts (chunked prefill).
Only attention distinguishes requests. Keys and values are in float32, in blocks (kv_cache.py).

The arithmetic is that of transformers' modeling_gemma*.py: RMS norm by 1 + weight (Gemma 4: weight) in float32,
embeddings times √hidden rounded to the model's dtype, rotary embeddings by halves, sliding windows, soft caps, the
output layer tied to the embedding; in Gemma 4 also values normed without weight, borrowed keys and values, per-layer
embeddings and experts. Everything between the matrix products is float32.

This is the implementation in plain torch: for GPUs, float32 weights, and machines without a C compiler. kernels.py has
the one for CPUs.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from serving.engine.architecture import GemmaConfig, Rope, Weights, norms_of, projections_of
from serving.engine.kv_cache import BLOCK
from serving.engine.stacked_lora import StackedAdapters, StackedStep
from serving.engine.step import Chunk

MAX_STACKED = 8  # adapters that stay stacked although a step does not need them


@dataclass
class Layer:
    """Weights of one layer: norms, as they multiply, in float32; projections with the same input are concatenated."""

    qkv: "Linear"
    o: "Linear"
    gate_up: "Linear"
    down: "Linear"
    norms: dict[str, Tensor] = field(default_factory=dict)
    scalar: float = 1.0  # of the layer's output
    per_layer_gate: "Linear | None" = None
    per_layer_projection: "Linear | None" = None
    experts: "Experts | None" = None


class Linear:
    """x @ weightᵀ for float32 x, with the fastest product on this machine.

    float32 weights are used as they are. bfloat16 weights are reordered once for oneDNN's AMX kernels, which read each
    of them once a step; x is rounded to bfloat16 for them.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        self.packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.enabled
        self.dtype = weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8) if self.packed else weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], None).float()
        return F.linear(x, self.weight).float()


class Experts:
    """Small MLPs of which each token uses a few, weighted: those that the router scores highest for it."""

    def __init__(self, weights: Weights, at: str, active: int) -> None:
        """
        Args:
            at: the layer's name.
            active: experts that a token uses.
        """
        self.active = active
        self.router = Linear(weights[f"{at}.router.proj"].float())  # another choice would be another answer
        self.scale = weights[f"{at}.router.scale"].float() * self.router.shape[1] ** -0.5
        self.expert_scale = weights[f"{at}.router.per_expert_scale"].float()
        self.gate_up = [Linear(one) for one in weights[f"{at}.experts.gate_up_proj"]]
        self.down = [Linear(one) for one in weights[f"{at}.experts.down_proj"]]

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        """The weighted sum of what its experts make of each token of x [tokens, hidden]; scores [tokens, experts]."""
        share, chosen = scores.softmax(-1).topk(self.active, -1)
        share = share / share.sum(-1, keepdim=True) * self.expert_scale[chosen]
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            gate, up = self.gate_up[expert](x[token]).chunk(2, -1)
            found = self.down[expert](F.gelu(gate, approximate="tanh") * up)
            y.index_add_(0, token, found * share[token, place, None])
        return y


class Gemma:
    """A model and its key/value cache; see `step.Model`."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, blocks: int) -> None:
        """
        Args:
            folder: of Hugging Face format, safetensors.
            dtype: of the weights.
            device: "cpu" or "cuda".
            blocks: of the cache, each of `BLOCK` tokens.

        Raises:
            UserError: the folder is not a complete Gemma.
        """
        self.config = config = GemmaConfig.read(folder)
        self.device = torch.device(device)
        weights = Weights(folder, dtype, self.device)
        self.embedding = weights["embed_tokens"]
        self.head = Linear(self.embedding)
        self.embedding_scale = torch.tensor(config.hidden**0.5, dtype=dtype).item()
        self.norm = config.norm_shift + weights["norm"].float()
        self.layers = [self._layer(weights, i) for i in range(config.layers)]
        self.frequencies = {rope: rope.frequencies().to(self.device) for rope in set(config.ropes)}
        own = [(blocks * BLOCK, shape.kv_heads, shape.head_dim) for shape in config.shapes]
        self.keys, self.values = (
            {n: torch.zeros(own[n], device=self.device) for n in {one.kv_source for one in config.shapes}}
            for _ in range(2)
        )
        self.table: Tensor | None = None
        if features := config.per_layer_input:
            self.table = weights.mapped("embed_tokens_per_layer")
            self.table_scale = torch.tensor(features**0.5, dtype=dtype).item()
            self.per_layer_model = Linear(weights["per_layer_model_projection"])
            self.per_layer_norm = weights["per_layer_projection_norm"].float()
        self.stack: StackedAdapters | None = None

    def _layer(self, weights: Weights, i: int) -> Layer:
        at, config, shape = f"layers.{i}", self.config, self.config.shapes[i]
        qkv = [weights[f"{at}.self_attn.{name}_proj"] for name in projections_of(shape)]
        layer = Layer(
            qkv=Linear(torch.cat(qkv)),
            o=Linear(weights[f"{at}.self_attn.o_proj"]),
            gate_up=Linear(torch.cat([weights[f"{at}.mlp.{name}_proj"] for name in ("gate", "up")])),
            down=Linear(weights[f"{at}.mlp.down_proj"]),
            norms={
                name.rpartition(".")[2]: config.norm_shift + weights[f"{at}.{name}"].float()
                for name in norms_of(config, i)
            },
            scalar=weights[f"{at}.layer_scalar"].item() if config.generation == 4 else 1.0,
        )
        if shape.per_layer_input:
            layer.per_layer_gate = Linear(weights[f"{at}.per_layer_input_gate"])
            layer.per_layer_projection = Linear(weights[f"{at}.per_layer_projection"])
        if shape.experts:
            layer.experts = Experts(weights, at, shape.active_experts)
        return layer

    @torch.inference_mode()
    def step(self, tokens: list[int], chunks: list[Chunk]) -> tuple[list[int], npt.NDArray[np.float32]]:
        """See `step.Model`."""
        config, device = self.config, self.device
        batch = _Batch(chunks, config, device)
        lora = self._stacked(chunks)
        ids = torch.tensor(tokens)
        x = self._embedded(self.embedding, ids.to(device), self.embedding_scale)
        per_layer = self._per_layer_inputs(x, ids, lora) if config.per_layer_input else None
        rotations = self._rotations(batch)
        for i, layer in enumerate(self.layers):
            if i == config.last_own + 1:  # no later token sees what is computed from here on
                x, per_layer = x[batch.outputs], per_layer[batch.outputs] if per_layer is not None else None
                if not len(x):
                    break
                batch = batch.of_outputs()
                lora, rotations = self._stacked(batch.chunks), self._rotations(batch)
            norms = layer.norms
            residual, x = x, self._norm(x, norms["input_layernorm"])
            x = self._attention(i, self._project(layer.qkv, x, lora, i, "qkv"), rotations[config.ropes[i]], batch)
            x = self._project(layer.o, x, lora, i, "o")
            if config.generation > 1:
                x = self._norm(x, norms["post_attention_layernorm"])
            x = residual + x
            residual = x
            x = self._norm(
                x, norms["pre_feedforward_layernorm" if config.generation > 1 else "post_attention_layernorm"]
            )
            gate, up = self._project(layer.gate_up, x, lora, i, "gate_up").chunk(2, -1)
            x = self._project(layer.down, F.gelu(gate, approximate="tanh") * up, lora, i, "down")
            if layer.experts:
                x = self._norm(x, norms["post_feedforward_layernorm_1"]) + self._experts(i, residual, lora)
            if config.generation > 1:
                x = self._norm(x, norms["post_feedforward_layernorm"])
            x = residual + x
            if layer.per_layer_gate and layer.per_layer_projection and per_layer is not None:
                gate = F.gelu(self._project(layer.per_layer_gate, x, lora, i, "per_layer_gate"), approximate="tanh")
                gate = gate * per_layer[:, i]
                y = self._project(layer.per_layer_projection, gate, lora, i, "per_layer_projection")
                x = x + self._norm(y, norms["post_per_layer_input_norm"])
            x = x * layer.scalar
        x = self.head(self._norm(x[batch.outputs], self.norm))
        if config.final_cap:
            x = torch.tanh(x / config.final_cap) * config.final_cap
        x[:, list(config.suppressed)] = -math.inf
        return x.argmax(-1).tolist(), x.cpu().numpy()

    def _embedded(self, table: Tensor, ids: Tensor, scale: float) -> Tensor:
        """Rows of a table, which may be of another dtype and on another device than this model: float32 [tokens, …]."""
        x = table[ids].to(self.device, self.head.dtype).float() * scale
        if self.head.dtype != torch.float32:
            x = x.to(self.head.dtype).float()  # transformers multiplies in the model's dtype
        return x

    def _per_layer_inputs(self, x: Tensor, ids: Tensor, lora: StackedStep | None) -> Tensor:
        """What each layer multiplies its gate by, of the embedding x and of a table: [tokens, layers, features]."""
        of_embedding = self._project(self.per_layer_model, x, lora, 0, "per_layer_model") * self.config.hidden**-0.5
        of_embedding = of_embedding.view(len(x), self.config.layers, -1)
        assert self.table is not None
        of_table = self._embedded(self.table, ids, self.table_scale).view_as(of_embedding)
        return (self._norm(of_embedding, self.per_layer_norm) + of_table) * 0.5**0.5

    def _rotations(self, batch: "_Batch") -> dict[Rope, tuple[Tensor, Tensor]]:
        """Cosines and sines of the tokens' angles, [tokens, 1, size / 2] each."""
        angles = {rope: batch.positions[:, None].float() * one for rope, one in self.frequencies.items()}
        return {rope: (one.cos()[:, None], one.sin()[:, None]) for rope, one in angles.items()}

    def _experts(self, i: int, x: Tensor, lora: StackedStep | None) -> Tensor:
        """The experts' part of layer `i`'s MLP for x [tokens, hidden], normed."""
        experts, norms = self.layers[i].experts, self.layers[i].norms
        assert experts
        routed = self._norm(x, experts.scale)
        scores = self._project(experts.router, routed, lora, i, "router")
        y = experts(self._norm(x, norms["pre_feedforward_layernorm_2"]), scores)
        return self._norm(y, norms["post_feedforward_layernorm_2"])

    def _stacked(self, chunks: list[Chunk]) -> StackedStep | None:
        """The stacked adapters for `chunks`, rebuilt only for a new adapter; None where all use the base."""
        needed = list({id(one.adapter): one.adapter for one in chunks if one.adapter}.values())
        if not needed:
            return None
        present = self.stack.adapters if self.stack else []
        if missing := [one for one in needed if one not in present]:
            spare = [one for one in present if one not in needed][: max(0, MAX_STACKED - len(needed))]
            self.stack = StackedAdapters(
                [one for one in present if one in needed] + missing + spare, self.config, self.device
            )
        assert self.stack
        return self.stack.for_step(chunks)

    def _norm(self, x: Tensor, weight: Tensor | float) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.eps) * weight

    @staticmethod
    def _project(linear: Linear, x: Tensor, lora: StackedStep | None, layer: int, projection: str) -> Tensor:
        y = linear(x)
        return lora.add(y, x, layer, projection) if lora is not None else y

    def _attention(self, i: int, qkv: Tensor, rotation: tuple[Tensor, Tensor], batch: "_Batch") -> Tensor:
        """Attention of layer `i`. Its keys and values are written first, so that chunks of one step may share blocks.

        Args:
            qkv: [tokens, (heads + 2 kv_heads) * head_size]; less where values are keys, or both are another layer's.

        Returns:
            [tokens, heads * head_size]
        """
        config, shape, norms = self.config, self.config.shapes[i], self.layers[i].norms
        heads, kv_heads, size = config.heads, shape.kv_heads, shape.head_dim
        own_keys, own_values = self.keys[shape.kv_source], self.values[shape.kv_source]
        q, *kv = qkv.view(len(qkv), -1, size).split([heads] + [kv_heads] * (len(projections_of(shape)) - 1), 1)
        q = _rotate(self._norm(q, norms["q_norm"]) if config.generation > 2 else q, *rotation)
        if kv:
            k, v = kv[0], kv[-1]
            k = _rotate(self._norm(k, norms["k_norm"]) if config.generation > 2 else k, *rotation)
            own_keys[batch.slots] = k
            own_values[batch.slots] = self._norm(v, 1.0) if config.generation == 4 else v
        out = torch.empty_like(q)
        for index, context, mask in batch.groups(config.windows[i]):
            # scores: [chunks, kv heads, tokens · queries per kv head, context]
            keys = own_keys[context].permute(0, 2, 3, 1)
            values = own_values[context].transpose(1, 2)
            n, t = index.shape
            queries = q[index].view(n, t, kv_heads, -1, size).transpose(1, 2)
            scores = torch.matmul(queries.reshape(n, kv_heads, -1, size), keys) * config.scale
            if config.attention_cap:
                scores = torch.tanh(scores / config.attention_cap) * config.attention_cap
            group = heads // kv_heads
            scores = scores.view(n, kv_heads, t, group, -1).masked_fill(mask[:, None, :, None], -math.inf)
            found = torch.matmul(scores.softmax(-1).view(n, kv_heads, t * group, -1), values)
            found = found.view(n, kv_heads, t, group, size).transpose(1, 2)
            out[index] = found.reshape(n, t, heads, size)
        return out.view(len(qkv), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class _Batch:
    """The positions and cache slots of a step's tokens, and what each may attend to."""

    def __init__(self, chunks: list[Chunk], config: GemmaConfig, device: torch.device) -> None:
        self.device = device
        self.positions = torch.cat([torch.arange(one.start, one.start + one.count) for one in chunks]).to(device)
        within = torch.arange(BLOCK)
        self.contexts = [(torch.tensor(list(one.blocks))[:, None] * BLOCK + within).view(-1) for one in chunks]
        self.slots = torch.cat(
            [slots[one.start : one.start + one.count] for slots, one in zip(self.contexts, chunks, strict=True)]
        ).to(device)
        self.outputs = torch.tensor(
            [one.first + one.count - 1 for one in chunks if one.output], dtype=torch.long, device=device
        )
        self.chunks, self.config = chunks, config
        self.cache: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def of_outputs(self) -> "_Batch":
        """The last token alone of each chunk that has an output."""
        wanted = [one for one in self.chunks if one.output]
        last = [replace(one, first=n, count=1, start=one.start + one.count - 1) for n, one in enumerate(wanted)]
        return _Batch(last, self.config, self.device)

    def groups(self, window: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of one token together, padded to the longest context; each longer chunk by itself.

        Returns:
            For each group the index [chunks, tokens] in the step, the context [chunks, keys] in the cache, and the mask
            [chunks, tokens, keys], true where a key is hidden.
        """
        if window not in self.cache:
            single = [n for n, one in enumerate(self.chunks) if one.count == 1]
            parts = [single] if single else []
            parts += [[n] for n, one in enumerate(self.chunks) if one.count > 1]
            self.cache[window] = [self._group(part, window) for part in parts]
        return self.cache[window]

    def _group(self, part: list[int], window: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = [self.chunks[n] for n in part]
        begins = [max(0, one.start - window + 1) if window else 0 for one in chosen]
        max_context = max(one.start + one.count - begin for one, begin in zip(chosen, begins, strict=True))
        context = torch.zeros(len(part), max_context, dtype=torch.long)
        positions = torch.full((len(part), max_context), 1 << 40)
        for line, (n, one, begin) in enumerate(zip(part, chosen, begins, strict=True)):
            length = one.start + one.count - begin
            context[line, :length] = self.contexts[n][begin : begin + length]
            positions[line, :length] = torch.arange(begin, begin + length)
        index = torch.stack([torch.arange(one.first, one.first + one.count) for one in chosen])
        own = torch.stack([torch.arange(one.start, one.start + one.count) for one in chosen])
        distance = own[:, :, None] - positions[:, None]
        mask = distance < 0
        if window:
            mask |= distance >= window
        return index.to(self.device), context.to(self.device), mask.to(self.device)
