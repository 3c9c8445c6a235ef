"""The forward pass of Gemma 1, 2 and 3 (text) over a step's tokens, whoever they belong to.

A step is a flat list of tokens of many requests: one of each that is answering, chunks of prompts that are still being
read. Only attention looks at whose they are. Keys and values lie in blocks (kv_cache.py), in float32.

Semantics are those of transformers' modeling_gemma*.py: RMS norm by 1 + weight in float32, embeddings times √hidden
rounded to the model's dtype, rotary embeddings by halves, sliding windows, soft caps, the output layer tied to the
embedding. Everything between the matrix products is float32.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from serving.engine import UserError
from serving.engine.kv_cache import BLOCK

FAMILIES = {"gemma": 1, "gemma2": 2, "gemma3_text": 3}


@dataclass(frozen=True)
class Config:
    """An architecture, as config.json of the Hugging Face folder tells it."""

    generation: int  # 1, 2 or 3
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    scale: float  # of attention scores
    windows: tuple[int, ...]  # of each layer: how many tokens back it sees, itself included; 0: all
    ropes: tuple[tuple[float, float], ...]  # of each layer: theta, and what positions are divided by
    attention_cap: float  # 0: none
    final_cap: float
    longest: int  # tokens of a prompt and its answer together

    @classmethod
    def read(cls, folder: Path) -> "Config":
        """
        Raises:
            UserError: not a Gemma 1, 2 or 3, or one with something that this engine does not know.
        """
        try:
            raw = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}/config.json cannot be read: {error}. Give the folder of a Hugging Face "
                            "model: --base FOLDER") from None  # fmt: skip
        raw = raw.get("text_config", raw)
        family = FAMILIES.get(raw.get("model_type", ""))
        if not family:
            raise UserError(f"{folder} holds a '{raw.get('model_type')}', not one of {', '.join(FAMILIES)}")
        layers, head_size = raw["num_hidden_layers"], raw.get("head_dim", 256)
        default_kinds = {
            1: ["full_attention"] * layers,
            2: [("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
            3: [("full_attention" if (i + 1) % 6 == 0 else "sliding_attention") for i in range(layers)],
        }[family]
        kinds = raw.get("layer_types") or default_kinds if family > 1 else default_kinds
        for name in ("attention_bias", "use_bidirectional_attention"):
            if raw.get(name):
                raise UserError(f"{folder}/config.json: {name} is not supported")
        ropes = {kind: _rope(raw, kind, folder) for kind in set(kinds)}
        return cls(
            generation=family, vocabulary=raw["vocab_size"], hidden=raw["hidden_size"],
            intermediate=raw["intermediate_size"], layers=layers, heads=raw["num_attention_heads"],
            kv_heads=raw["num_key_value_heads"], head_size=head_size, eps=raw.get("rms_norm_eps", 1e-6),
            scale=(raw.get("query_pre_attn_scalar", 256) if family > 1 else head_size) ** -0.5,
            windows=tuple(raw.get("sliding_window") or 0 if kind == "sliding_attention" else 0 for kind in kinds),
            ropes=tuple(ropes[kind] for kind in kinds),
            attention_cap=(raw.get("attn_logit_softcapping") or 0.0) if family == 2 else 0.0,
            final_cap=(raw.get("final_logit_softcapping") or 0.0) if family > 1 else 0.0,
            longest=raw.get("max_position_embeddings", 8192),
        )  # fmt: skip


def _rope(raw: dict[str, Any], kind: str, folder: Path) -> tuple[float, float]:
    """Theta and the factor of `kind` of layers, as transformers 4 and 5 write them."""
    given = raw.get("rope_parameters") or {}
    given = given.get(kind, given)
    scaling = (raw.get("rope_scaling") if kind == "full_attention" else None) or given
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name not in ("default", "linear"):
        raise UserError(f"{folder}/config.json: rotary embeddings of type '{name}' are not supported")
    local = raw.get("model_type") == "gemma3_text" and kind == "sliding_attention"
    theta = raw.get("rope_local_base_freq", 10_000.0) if local else raw.get("rope_theta")
    if theta is None:
        theta = 1_000_000.0 if raw.get("model_type") == "gemma3_text" else 10_000.0
    return float(given.get("rope_theta", theta)), float(scaling.get("factor", 1.0)) if name == "linear" else 1.0


@dataclass
class Rows:
    """One request's share of a step: tokens that follow each other.

    Attributes:
        first: the index of its first token in the step.
        count: how many tokens.
        start: the position of the first; so many keys and values lie in the cache already.
        blocks: of the cache, in the order of positions.
        wanted: whether the last token's logits are asked for.
        adapter: its place in the step's stack of adapters; -1 for the base.
    """

    first: int
    count: int
    start: int
    blocks: Sequence[int]
    wanted: bool
    adapter: int = -1


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
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if config.generation > 1 else []
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if config.generation > 2 else []
        self.embedding = weights["embed_tokens"]
        if self.embedding.shape != (config.vocabulary, config.hidden):
            raise UserError(f"{folder}: embed_tokens is {list(self.embedding.shape)}, config.json says otherwise")
        self.head = Linear(self.embedding)
        self.embedding_scale = torch.tensor(config.hidden**0.5, dtype=dtype).item()
        self.norm = 1 + weights["norm"].float()
        self.layers = [
            Layer(
                qkv=Linear(torch.cat([weights[f"layers.{i}.self_attn.{name}_proj"] for name in "qkv"])),
                o=Linear(weights[f"layers.{i}.self_attn.o_proj"]),
                gate_up=Linear(torch.cat([weights[f"layers.{i}.mlp.{name}_proj"] for name in ("gate", "up")])),
                down=Linear(weights[f"layers.{i}.mlp.down_proj"]),
                norms={name.rpartition(".")[2]: 1 + weights[f"layers.{i}.{name}"].float() for name in norms},
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

    @torch.inference_mode()
    def step(self, tokens: list[int], rows: list[Rows], stack: Any = None) -> Tensor:
        """
        Args:
            tokens: of all requests of this step.
            rows: which belong together; they cover `tokens` in order.
            stack: of adapters (adapters.Stack), which `rows[i].adapter` counts in; None: no row has any.

        Returns:
            [rows with `wanted`, vocabulary], float32, on the CPU: the logits after their last token.
        """
        config, device = self.config, self.device
        places = _Places(rows, config, device)
        stack = stack and stack.of(rows)
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
        return x.cpu()

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


class Weights:
    """Tensors of a Hugging Face folder by the end of their name, one at a time: `weights["layers.0.mlp.up_proj"]`."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} has no *.safetensors. Give the folder of a Hugging Face model: --base FOLDER")
        self.places: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, "pt")
            except Exception as error:  # of safetensors' own class, or of the system
                raise UserError(f"{file} cannot be read: {error}") from None
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                self.places[self._short(name)] = opened, name

    @staticmethod
    def _short(name: str) -> str:
        """Without what wrappers put before it: `model.language_model.layers…`, `language_model.model.layers…`."""
        for start in ("layers.", "embed_tokens.", "norm."):
            at = name.find(start)
            if at == 0 or (at > 0 and name[at - 1] == "." and "vision" not in name[:at]):
                return name[at:].removesuffix(".weight")
        return name

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.places:
            raise UserError(f"{self.folder} has no tensor …{name}.weight: it is not a whole Gemma")
        opened, full = self.places[name]
        return opened.get_tensor(full).to(self.device, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)
