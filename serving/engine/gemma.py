"""The forward pass of Gemma 1, 2 and 3 (text) over a step's tokens, whoever they belong to.

A step is a flat list of tokens of many requests: one of each that is answering, chunks of prompts that are still being
read. Only attention looks at whose they are. Keys and values lie in blocks (kv_cache.py), in float32.

Semantics are those of transformers' modeling_gemma*.py: RMS norm by 1 + weight in float32, embeddings times √hidden
rounded to the model's dtype, rotary embeddings by halves, sliding windows, soft caps, the output layer tied to the
embedding. Everything between the matrix products is float32.

This is the form in plain torch: for GPUs, float32 weights, and machines without a C compiler. kernels.py has the
form for CPUs.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from serving.engine.adapters import Stack
from serving.engine.architecture import Config, Rows, Weights, norms_of
from serving.engine.kv_cache import BLOCK

STACKED = 8  # adapters that stay in the stack though no row of a step needs them


@dataclass
class Layer:
    """Weights of one layer. Norms are 1 + weight, in float32; products that take the same input are one."""

    qkv: "Linear"
    o: "Linear"
    gate_up: "Linear"
    down: "Linear"
    norms: dict[str, Tensor] = field(default_factory=dict)


class Linear:
    """x @ weightᵀ for float32 x, in the form that is quickest on this machine.

    float32 weights are multiplied as they are. bfloat16 weights are reordered once for oneDNN's AMX kernels, which
    read each of them once a step; x is rounded to bfloat16 for them.
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
    """A model and its key/value cache."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, blocks: int) -> None:
        """
        Args:
            folder: of Hugging Face format, safetensors.
            dtype: of the weights.
            device: "cpu" or "cuda".
            blocks: of the cache, each of `BLOCK` tokens.

        Raises:
            UserError: the folder is not a whole Gemma.
        """
        self.config = config = Config.read(folder)
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
        self.stack: Stack | None = None

    @torch.inference_mode()
    def step(self, tokens: list[int], rows: list[Rows]) -> tuple[list[int], npt.NDArray[np.float32]]:
        """
        Args:
            tokens: of all requests of this step.
            rows: which belong together; they cover `tokens` in order.

        Returns:
            Of rows with `wanted`, after their last token: the most likely token, and the logits, [rows, vocabulary].
        """
        config, device = self.config, self.device
        places = _Places(rows, config, device)
        stack = self._stacked(rows)
        x = self.embedding[torch.tensor(tokens, device=device)].float() * self.embedding_scale
        if self.embedding.dtype != torch.float32:
            x = x.to(self.embedding.dtype).float()  # transformers multiplies in the model's dtype
        turns = {}
        for rope, frequency in self.frequencies.items():
            angles = places.positions[:, None].float() * frequency
            turns[rope] = angles.cos()[:, None], angles.sin()[:, None]
        for i, layer in enumerate(self.layers):
            norms = layer.norms
            residual, x = x, self._norm(x, norms["input_layernorm"])
            x = self._attend(i, self._project(layer.qkv, x, stack, i, "qkv"), turns[config.ropes[i]], places)
            x = self._project(layer.o, x, stack, i, "o")
            if config.generation > 1:
                x = self._norm(x, norms["post_attention_layernorm"])
            x = residual + x
            residual = x
            x = self._norm(
                x, norms["pre_feedforward_layernorm" if config.generation > 1 else "post_attention_layernorm"]
            )
            gate, up = self._project(layer.gate_up, x, stack, i, "gate_up").chunk(2, -1)
            x = self._project(layer.down, F.gelu(gate, approximate="tanh") * up, stack, i, "down")
            if config.generation > 1:
                x = self._norm(x, norms["post_feedforward_layernorm"])
            x = residual + x
        x = self.head(self._norm(x[places.wanted], self.norm))
        if config.final_cap:
            x = torch.tanh(x / config.final_cap) * config.final_cap
        return x.argmax(-1).tolist(), x.cpu().numpy()

    def _stacked(self, rows: list[Rows]) -> Any:
        """The stack for these rows, made anew only for an adapter that is not in it. None: all rows are the base's."""
        needed = list({id(one.adapter): one.adapter for one in rows if one.adapter}.values())
        if not needed:
            return None
        present = self.stack.adapters if self.stack else []
        if missing := [one for one in needed if one not in present]:
            spare = [one for one in present if one not in needed][: max(0, STACKED - len(needed))]
            self.stack = Stack([one for one in present if one in needed] + missing + spare, self.config, self.device)
        assert self.stack
        return self.stack.of(rows)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.eps) * weight

    @staticmethod
    def _project(linear: Linear, x: Tensor, stack: Any, layer: int, site: str) -> Tensor:
        y = linear(x)
        return stack.add(y, x, layer, site) if stack is not None else y

    def _attend(self, i: int, qkv: Tensor, turn: tuple[Tensor, Tensor], places: "_Places") -> Tensor:
        """Attention of layer `i`; its keys and values are written first, so that rows of one step may share blocks.

        Args:
            qkv: [tokens, (heads + 2 kv_heads) * head_size]

        Returns:
            [tokens, heads * head_size]
        """
        config = self.config
        q, k, v = qkv.view(len(qkv), -1, config.head_size).split((config.heads, config.kv_heads, config.kv_heads), 1)
        if config.generation > 2:
            q, k = (self._norm(one, self.layers[i].norms[name]) for one, name in ((q, "q_norm"), (k, "k_norm")))
        q, k = _rotate(q, *turn), _rotate(k, *turn)
        self.keys[i, places.slots] = k
        self.values[i, places.slots] = v
        out = torch.empty_like(q)
        for index, context, mask in places.groups(config.windows[i]):
            # [rows, kv heads, queries a kv head and token, context]
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
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


class _Places:
    """Where a step's tokens stand, and what they may look at."""

    def __init__(self, rows: list[Rows], config: Config, device: torch.device) -> None:
        self.device = device
        self.positions = torch.cat([torch.arange(one.start, one.start + one.count) for one in rows]).to(device)
        within = torch.arange(BLOCK)
        self.contexts = [(torch.tensor(list(one.blocks))[:, None] * BLOCK + within).view(-1) for one in rows]
        self.slots = torch.cat(
            [slots[one.start : one.start + one.count] for slots, one in zip(self.contexts, rows, strict=True)]
        ).to(device)
        self.wanted = torch.tensor(
            [one.first + one.count - 1 for one in rows if one.wanted], dtype=torch.long, device=device
        )
        self.rows = rows
        self.cache: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def groups(self, window: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rows of one token together, padded to the longest; each longer one alone.

        Returns:
            (index [rows, tokens] in the step, context [rows, keys] in the cache, mask [rows, tokens, keys]: hidden)
        """
        if window not in self.cache:
            single = [n for n, one in enumerate(self.rows) if one.count == 1]
            parts = [single] if single else []
            parts += [[n] for n, one in enumerate(self.rows) if one.count > 1]
            self.cache[window] = [self._group(part, window) for part in parts]
        return self.cache[window]

    def _group(self, part: list[int], window: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = [self.rows[n] for n in part]
        begins = [max(0, one.start - window + 1) if window else 0 for one in chosen]
        longest = max(one.start + one.count - begin for one, begin in zip(chosen, begins, strict=True))
        context = torch.zeros(len(part), longest, dtype=torch.long)
        positions = torch.full((len(part), longest), 1 << 40)
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
