"""The forward pass of Gemma 1, 2 and 3 (text) over a step's tokens, whoever they belong to.

A step is a flat list of tokens of many requests: one of each that is decoding, and chunks of prompts (chunked prefill).
Only attention distinguishes requests. Keys and values are in float32, in blocks (kv_cache.py).

The arithmetic is that of transformers' modeling_gemma*.py: RMS norm by 1 + weight in float32, embeddings times √hidden
rounded to the model's dtype, rotary embeddings by halves, sliding windows, soft caps, the output layer tied to the
embedding. Everything between the matrix products is float32.

This is the implementation in plain torch: for GPUs, float32 weights, and machines without a C compiler. kernels.py has
the one for CPUs.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from serving.engine.architecture import GemmaConfig, Weights, norms_of
from serving.engine.kv_cache import BLOCK
from serving.engine.stacked_lora import StackedAdapters, StackedStep
from serving.engine.step import Chunk

MAX_STACKED = 8  # adapters that stay stacked although a step does not need them


@dataclass
class Layer:
    """Weights of one layer. Norms are 1 + weight, in float32; projections with the same input are concatenated."""

    qkv: "Linear"
    o: "Linear"
    gate_up: "Linear"
    down: "Linear"
    norms: dict[str, Tensor] = field(default_factory=dict)


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
        self.norm = 1 + weights["norm"].float()
        self.layers = [
            Layer(
                qkv=Linear(torch.cat([weights[f"layers.{i}.self_attn.{name}_proj"] for name in "qkv"])),
                o=Linear(weights[f"layers.{i}.self_attn.o_proj"]),
                gate_up=Linear(torch.cat([weights[f"layers.{i}.mlp.{name}_proj"] for name in ("gate", "up")])),
                down=Linear(weights[f"layers.{i}.mlp.down_proj"]),
                norms={name.rpartition(".")[2]: 1 + weights[f"layers.{i}.{name}"].float() for name in norms_of(config)},
            )
            for i in range(config.layers)
        ]
        frequency = torch.arange(0, config.head_size, 2, dtype=torch.float) / config.head_size
        self.frequencies = {
            (theta, factor): (1.0 / theta**frequency / factor).to(self.device) for theta, factor in set(config.ropes)
        }
        shape = config.layers, blocks * BLOCK, config.kv_heads, config.head_size
        self.keys = torch.zeros(shape, device=self.device)
        self.values = torch.zeros(shape, device=self.device)
        self.stack: StackedAdapters | None = None

    @torch.inference_mode()
    def step(self, tokens: list[int], chunks: list[Chunk]) -> tuple[list[int], npt.NDArray[np.float32]]:
        """See `step.Model`."""
        config, device = self.config, self.device
        batch = _Batch(chunks, config, device)
        lora = self._stacked(chunks)
        x = self.embedding[torch.tensor(tokens, device=device)].float() * self.embedding_scale
        if self.embedding.dtype != torch.float32:
            x = x.to(self.embedding.dtype).float()  # transformers multiplies in the model's dtype
        rotations = {}
        for rope, frequency in self.frequencies.items():
            angles = batch.positions[:, None].float() * frequency
            rotations[rope] = angles.cos()[:, None], angles.sin()[:, None]
        for i, layer in enumerate(self.layers):
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
            if config.generation > 1:
                x = self._norm(x, norms["post_feedforward_layernorm"])
            x = residual + x
        x = self.head(self._norm(x[batch.outputs], self.norm))
        if config.final_cap:
            x = torch.tanh(x / config.final_cap) * config.final_cap
        return x.argmax(-1).tolist(), x.cpu().numpy()

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

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.eps) * weight

    @staticmethod
    def _project(linear: Linear, x: Tensor, lora: StackedStep | None, layer: int, projection: str) -> Tensor:
        y = linear(x)
        return lora.add(y, x, layer, projection) if lora is not None else y

    def _attention(self, i: int, qkv: Tensor, rotation: tuple[Tensor, Tensor], batch: "_Batch") -> Tensor:
        """Attention of layer `i`. Its keys and values are written first, so that chunks of one step may share blocks.

        Args:
            qkv: [tokens, (heads + 2 kv_heads) * head_size]

        Returns:
            [tokens, heads * head_size]
        """
        config = self.config
        q, k, v = qkv.view(len(qkv), -1, config.head_size).split((config.heads, config.kv_heads, config.kv_heads), 1)
        if config.generation > 2:
            q, k = (self._norm(one, self.layers[i].norms[name]) for one, name in ((q, "q_norm"), (k, "k_norm")))
        q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        self.keys[i, batch.slots] = k
        self.values[i, batch.slots] = v
        out = torch.empty_like(q)
        for index, context, mask in batch.groups(config.windows[i]):
            # scores: [chunks, kv heads, tokens · queries per kv head, context]
            keys = self.keys[i, context].permute(0, 2, 3, 1)
            values = self.values[i, context].transpose(1, 2)
            n, t = index.shape
            queries = q[index].view(n, t, config.kv_heads, -1, config.head_size).transpose(1, 2)
            scores = torch.matmul(queries.reshape(n, config.kv_heads, -1, config.head_size), keys) * config.scale
            if config.attention_cap:
                scores = torch.tanh(scores / config.attention_cap) * config.attention_cap
            group = config.heads // config.kv_heads
            scores = scores.view(n, config.kv_heads, t, group, -1).masked_fill(mask[:, None, :, None], -math.inf)
            found = torch.matmul(scores.softmax(-1).view(n, config.kv_heads, t * group, -1), values)
            found = found.view(n, config.kv_heads, t, group, config.head_size).transpose(1, 2)
            out[index] = found.reshape(n, t, config.heads, config.head_size)
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
        self.chunks = chunks
        self.cache: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

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
