"""Gemma on a CPU by kernels.c: compiled once on the machine that runs it, one call a step.

A step cannot take less than the time in which memory gives all weights: see docs/serving.md for this one beside others.
"""

import ctypes as c
import platform
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from core.c_build import NoLibrary, compiled
from core.errors import UserError
from core.layer_shapes import LayerShape
from serving.engine.adapters import LoraAdapter
from serving.engine.architecture import GemmaConfig, Weights, norms_of, projections_of
from serving.engine.kv_cache import BLOCK
from serving.engine.step import Chunk

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ["-fopenmp-simd", "-fno-signed-zeros", "-pthread"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")
MODULES = (  # in the order of kernels.c
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection", "router.proj"),
)


class NoKernels(Exception):
    """Why kernels.c cannot be used here."""


class _Matrix(c.Structure):
    _fields_ = (("rows", c.c_int32), ("columns", c.c_int32), ("weight", c.c_void_p), ("scales", c.c_void_p))


class _Layer(c.Structure):
    _fields_ = (
        ("site", _Matrix * 7),
        *(
            (name, c.c_void_p)
            for name in (
                *("input_norm", "after_attention_norm", "before_mlp_norm", "after_mlp_norm", "q_norm", "k_norm"),
                *("per_layer_norm", "dense_norm", "before_experts_norm", "experts_norm"),
                *("router_norm", "router", "expert_scale", "expert", "keys", "values"),
            )
        ),
        *((name, c.c_int32) for name in ("kv_heads", "head_size", "has_k", "has_v", "rope", "window")),
        ("scalar", c.c_float),
    )


class _Lora(c.Structure):
    _fields_ = (("rank", c.c_int32), ("a", c.c_void_p), ("b", c.c_void_p))


class _Model(c.Structure):
    _fields_ = (
        *(
            (name, c.c_int32)
            for name in (
                *("layers", "vocabulary", "hidden", "heads", "last_own", "experts", "active_experts"),
                *("values_are_normed", "features", "padded"),
            )
        ),
        *((name, c.c_float) for name in ("eps", "scale", "attention_cap", "final_cap", "embedding_scale")),
        ("layer", c.POINTER(_Layer)),
        ("frequencies", c.c_void_p),
        ("ropes", c.c_int32),
        ("rope_width", c.c_int32),
        ("head", _Matrix),
        ("embedding", c.c_void_p),
        ("norm", c.c_void_p),
        ("per_layer_norm", c.c_void_p),
        ("suppressed", c.c_void_p),
        ("suppressed_count", c.c_int32),
    )


class _Rows(c.Structure):
    _fields_ = (
        ("first", c.c_int32),
        ("count", c.c_int32),
        ("start", c.c_int32),
        ("wanted", c.c_int32),
        ("blocks", c.c_void_p),
        ("lora", c.c_void_p),
    )


class _Step(c.Structure):
    _fields_ = (
        ("tokens", c.c_int32),
        ("rows", c.c_int32),
        ("token", c.c_void_p),
        ("per_layer", c.c_void_p),
        ("row", c.POINTER(_Rows)),
        ("best", c.c_void_p),
        ("logits", c.c_void_p),
    )


class KernelGemma:
    """A model and its key/value cache; see `step.Model`."""

    def __init__(self, folder: Path, blocks: int, threads: int, *, int8: bool = False, amx: bool = True) -> None:
        """
        Args:
            folder: of Hugging Face format, safetensors.
            blocks: of the cache, each of `BLOCK` tokens.
            int8: round weights to 8 bits, each output's by its largest. Half the memory, not exact.
            amx: use it where it is there.

        Raises:
            NoKernels: no compiler, or widths that are no multiples of what the kernels work in.
            UserError: the folder is not a whole Gemma.
        """
        self.config = config = GemmaConfig.read(folder)
        rows = {rows for shape in config.shapes for rows in _widths(config, shape)}
        sizes = {shape.head_dim for shape in config.shapes}
        if any(one % 32 for one in rows) or any(one % 16 for one in sizes):
            raise NoKernels(f"widths {sorted(rows)} are not all multiples of 32, or heads of {sorted(sizes)} not of 16")
        self.library = _load()
        weights = Weights(folder, torch.bfloat16, torch.device("cpu"))
        self.kept: list[Any] = []  # what C points at
        embedding = self._keep(weights["embed_tokens"])
        ropes, width = sorted(set(config.ropes)), max(sizes)
        frequencies = self._keep(torch.stack([pad(one.frequencies(), (0, (width - one.size) // 2)) for one in ropes]))
        self.caches = {
            number: [self._keep(torch.zeros(blocks * BLOCK, shape.kv_heads, shape.head_dim)) for _ in range(2)]
            for number, shape in enumerate(config.shapes)
            if shape.kv_source == number
        }
        layers = (_Layer * config.layers)(
            *(self._layer(weights, i, ropes.index(config.ropes[i]), int8) for i in range(config.layers))
        )
        self.table: Tensor | None = None
        self.features, norm = config.per_layer_input, None
        if self.features:
            self.table = weights.mapped("embed_tokens_per_layer")
            norm = self._keep(_filled(weights["per_layer_projection_norm"].float())).data_ptr()
        suppressed = self._keep(torch.tensor(config.suppressed, dtype=torch.int32))
        self.model = _Model(
            layers=config.layers,
            vocabulary=config.vocabulary,
            hidden=config.hidden,
            heads=config.heads,
            last_own=config.last_own,
            experts=config.shapes[0].experts,
            active_experts=config.shapes[0].active_experts,
            values_are_normed=config.generation == 4,
            features=self.features,
            padded=_multiple(self.features),
            eps=config.eps,
            scale=config.scale,
            attention_cap=config.attention_cap,
            final_cap=config.final_cap,
            embedding_scale=config.hidden**0.5,
            layer=layers,
            frequencies=frequencies.data_ptr(),
            ropes=len(ropes),
            rope_width=width,
            head=self._matrix(embedding, int8),
            embedding=embedding.data_ptr(),
            norm=self._keep(config.norm_shift + weights["norm"].float()).data_ptr(),
            per_layer_norm=norm,
            suppressed=suppressed.data_ptr(),
            suppressed_count=len(suppressed),
        )
        self.kept.append(layers)
        self.loras: weakref.WeakKeyDictionary[LoraAdapter, tuple[Any, list[Tensor]]] = weakref.WeakKeyDictionary()
        self.pool = self.library.start_threads(threads, amx)
        if not self.pool:
            raise UserError("there is no memory for the engine's threads")
        weakref.finalize(self, self.library.stop_threads, self.pool)
        self.amx = bool(self.library.uses_amx(self.pool))

    def step(self, tokens: list[int], chunks: list[Chunk]) -> tuple[list[int], npt.NDArray[np.float32]]:
        """See `step.Model`."""
        wanted = sum(one.output > 0 for one in chunks)
        logits = np.empty((wanted, self.config.vocabulary), np.float32)
        best, token = np.empty(wanted, np.int32), np.array(tokens, np.int32)
        blocks = [np.array(one.blocks, np.int32) for one in chunks]
        table = (_Rows * len(chunks))(
            *(
                _Rows(one.first, one.count, one.start, one.output, block.ctypes.data, self._lora(one.adapter))
                for one, block in zip(chunks, blocks, strict=True)
            )
        )
        of_table = self._of_table(tokens)
        step = _Step(
            tokens=len(tokens),
            rows=len(chunks),
            token=token.ctypes.data,
            per_layer=None if of_table is None else of_table.data_ptr(),
            row=table,
            best=best.ctypes.data,
            logits=logits.ctypes.data,
        )
        if self.library.run_step(self.pool, c.byref(self.model), c.byref(step)):
            raise MemoryError
        return best.tolist(), logits

    def _keep(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor

    def _of_table(self, tokens: list[int]) -> Tensor | None:
        """The per-layer embeddings of tokens, [tokens, layers, padded features] in float32."""
        if self.table is None:
            return None
        found = self.table[torch.tensor(tokens)].float() * self.features**0.5
        return _filled(found.view(len(tokens), self.config.layers, -1)).contiguous()

    def _layer(self, weights: Weights, i: int, rope: int, int8: bool) -> _Layer:
        at, config, shape = f"layers.{i}", self.config, self.config.shapes[i]
        sites = [
            torch.cat([weights[f"{at}.self_attn.{name}_proj"] for name in projections_of(shape)]),
            weights[f"{at}.self_attn.o_proj"],
            _interleaved(*(weights[f"{at}.mlp.{name}_proj"] for name in ("gate", "up"))),
            weights[f"{at}.mlp.down_proj"],
        ]
        if shape.per_layer_input:
            sites += [weights[f"{at}.per_layer_input_gate"], _filled(weights[f"{at}.per_layer_projection"])]
            if not i:
                projection = weights["per_layer_model_projection"].view(config.layers, -1, config.hidden)
                sites.append(_filled(projection, rows=True).view(-1, config.hidden))
        norms = {
            name: self._keep(config.norm_shift + weights[f"{at}.{name}"].float()).data_ptr()
            for name in norms_of(config, i)
        }
        after = norms["post_attention_layernorm"]
        first = config.generation == 1  # its norm after attention is the one before the MLP
        keys, values = self.caches[shape.kv_source]
        return _Layer(
            site=(_Matrix * 7)(*(self._matrix(site, int8) for site in sites)),
            input_norm=norms["input_layernorm"],
            after_attention_norm=None if first else after,
            before_mlp_norm=after if first else norms["pre_feedforward_layernorm"],
            after_mlp_norm=norms.get("post_feedforward_layernorm"),
            q_norm=norms.get("self_attn.q_norm"),
            k_norm=norms.get("self_attn.k_norm"),
            per_layer_norm=norms.get("post_per_layer_input_norm"),
            dense_norm=norms.get("post_feedforward_layernorm_1"),
            before_experts_norm=norms.get("pre_feedforward_layernorm_2"),
            experts_norm=norms.get("post_feedforward_layernorm_2"),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            kv_heads=shape.kv_heads,
            head_size=shape.head_dim,
            has_k=shape.has_k_proj,
            has_v=shape.has_v_proj,
            rope=rope,
            window=config.windows[i],
            scalar=weights[f"{at}.layer_scalar"].item() if config.generation == 4 else 1.0,
            **(self._experts(weights, at, int8) if shape.experts else {}),
        )

    def _experts(self, weights: Weights, at: str, int8: bool) -> dict[str, int]:
        """A layer's router and experts, as fields of `_Layer`."""
        matrices = []
        gates_and_ups, downs = weights[f"{at}.experts.gate_up_proj"], weights[f"{at}.experts.down_proj"]
        for gate_up, down in zip(gates_and_ups, downs, strict=True):
            gate, up = (_filled(one, rows=True) for one in gate_up.chunk(2))
            matrices += [self._matrix(_interleaved(gate, up), int8), self._matrix(_filled(down), int8)]
        table = (_Matrix * len(matrices))(*matrices)
        self.kept.append(table)
        router_norm = weights[f"{at}.router.scale"].float() * self.config.hidden**-0.5
        return {
            "router_norm": self._keep(router_norm).data_ptr(),
            "router": self._keep(weights[f"{at}.router.proj"].float()).data_ptr(),
            "expert_scale": self._keep(weights[f"{at}.router.per_expert_scale"].float()).data_ptr(),
            "expert": c.addressof(table),
        }

    def _matrix(self, weight: Tensor, int8: bool) -> _Matrix:
        """[outputs, inputs] in the order in which kernels.c reads it, outputs filled up with zeros."""
        columns = weight.shape[1]
        weight = _filled(weight, rows=True)
        scales = None
        if int8:
            scales = self._keep((weight.abs().amax(1).float() / 127).clamp_min(1e-30))
            parts = zip(weight.split(4096), scales.split(4096), strict=True)  # a large matrix is not copied as float32
            weight = torch.cat([(part.float() / scale[:, None]).round().to(torch.int8) for part, scale in parts])
        packed = self._keep(weight.view(-1, 2, 16, columns // 32, 16, 2).permute(0, 3, 1, 4, 2, 5))
        return _Matrix(len(weight), columns, packed.data_ptr(), scales.data_ptr() if scales is not None else None)

    def _lora(self, adapter: LoraAdapter | None) -> int | None:
        """The address of an adapter's matrices, which live as long as the adapter does."""
        if adapter is None:
            return None
        if adapter not in self.loras:
            table, kept = (_Lora * (self.config.layers * len(MODULES)))(), []
            for layer in range(self.config.layers):
                for number, module in enumerate(MODULES):
                    if (inner := adapter.lora_a.get((layer, module))) is None:
                        continue
                    outer = adapter.lora_b[layer, module].T
                    if module == "per_layer_input_gate":
                        outer = _filled(outer)
                    elif module == "per_layer_projection":
                        inner = _filled(inner)
                    elif module == "per_layer_model_projection":
                        outer = _filled(outer.reshape(len(outer), self.config.layers, -1)).flatten(1)
                    inner, outer = inner.contiguous(), outer.contiguous()
                    kept += [inner, outer]
                    table[layer * len(MODULES) + number] = _Lora(len(inner), inner.data_ptr(), outer.data_ptr())
            self.loras[adapter] = table, kept
        return c.addressof(self.loras[adapter][0])


def _widths(config: GemmaConfig, shape: LayerShape) -> tuple[int, ...]:
    """Rows and columns of a layer's matrices, but for those that are filled up with zeros."""
    queries, keys = config.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return config.hidden, queries, queries + keys * (len(projections_of(shape)) - 1), shape.inner


def _multiple(number: int) -> int:
    return -(-number // 32) * 32


def _filled(weight: Tensor, *, rows: bool = False) -> Tensor:
    """With zeros up to a multiple of 32 columns, or rows."""
    missing = _multiple(weight.shape[-1 - rows]) - weight.shape[-1 - rows]
    return pad(weight, (0, 0, 0, missing) if rows else (0, missing)) if missing else weight


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """16 rows of one and 16 of the other in turn."""
    inputs = gate.shape[1]
    return torch.stack((gate.view(-1, 16, inputs), up.view(-1, 16, inputs)), 1).view(-1, inputs)


def _load() -> c.CDLL:
    """kernels.c, compiled for this processor: once, then taken from the user's cache.

    Raises:
        NoKernels: there is no compiler, or it failed.
    """
    try:
        library = compiled(SOURCE, FLAGS)
    except NoLibrary as reason:
        raise NoKernels(f"{reason}; with kernels, answers come several times as fast") from None
    library.start_threads.restype = c.c_void_p
    library.start_threads.argtypes = c.c_int, c.c_int
    library.stop_threads.argtypes = (c.c_void_p,)
    library.stop_threads.restype = None
    library.uses_amx.argtypes = (c.c_void_p,)
    library.run_step.argtypes = c.c_void_p, c.c_void_p, c.c_void_p
    return library
