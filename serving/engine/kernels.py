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

from core.c_build import NoLibrary, compiled
from serving.engine import UserError
from serving.engine.adapters import Adapter
from serving.engine.architecture import Config, Rows, Weights, norms_of
from serving.engine.kv_cache import BLOCK

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ["-fopenmp-simd", "-fno-signed-zeros", "-pthread"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SITES = ("qkv", "o", "gate_up", "down")


class NoKernels(Exception):
    """Why kernels.c cannot be used here."""


class _Matrix(c.Structure):
    _fields_ = (("rows", c.c_int32), ("columns", c.c_int32), ("weight", c.c_void_p), ("scales", c.c_void_p))


class _Layer(c.Structure):
    _fields_ = (
        ("site", _Matrix * 4),
        ("input_norm", c.c_void_p),
        ("after_attention_norm", c.c_void_p),
        ("before_mlp_norm", c.c_void_p),
        ("after_mlp_norm", c.c_void_p),
        ("q_norm", c.c_void_p),
        ("k_norm", c.c_void_p),
        ("rope", c.c_int32),
        ("window", c.c_int32),
    )


class _Lora(c.Structure):
    _fields_ = (("rank", c.c_int32), ("a", c.c_void_p), ("b", c.c_void_p))


class _Model(c.Structure):
    _fields_ = (
        *(
            (name, c.c_int32)
            for name in ("layers", "vocabulary", "hidden", "intermediate", "heads", "kv_heads", "head_size")
        ),
        *((name, c.c_float) for name in ("eps", "scale", "attention_cap", "final_cap", "embedding_scale")),
        ("layer", c.POINTER(_Layer)),
        ("frequencies", c.c_void_p),
        ("ropes", c.c_int32),
        ("head", _Matrix),
        ("embedding", c.c_void_p),
        ("norm", c.c_void_p),
        ("keys", c.c_void_p),
        ("values", c.c_void_p),
        ("slots", c.c_int64),
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
        ("row", c.POINTER(_Rows)),
        ("best", c.c_void_p),
        ("logits", c.c_void_p),
    )


class KernelGemma:
    """A model and its key/value cache; see `architecture.Model`."""

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
        self.config = config = Config.read(folder)
        heads = config.heads * config.head_size, (config.heads + 2 * config.kv_heads) * config.head_size
        wide = config.hidden, *heads, config.intermediate
        if any(one % 32 for one in wide) or config.head_size % 16:
            raise NoKernels(f"widths {wide} are not multiples of 32, or heads of {config.head_size} not of 16")
        self.library = _load()
        weights = Weights(folder, torch.bfloat16, torch.device("cpu"))
        self.kept: list[Any] = []  # what C points at
        embedding = self._keep(weights["embed_tokens"])
        ropes = sorted(set(config.ropes))
        frequencies = self._keep(torch.stack([_frequencies(config, *rope) for rope in ropes]))
        layers = (_Layer * config.layers)(
            *(self._layer(weights, i, ropes.index(config.ropes[i]), int8) for i in range(config.layers))
        )
        shape = config.layers, blocks * BLOCK, config.kv_heads, config.head_size
        self.model = _Model(
            config.layers,
            config.vocabulary,
            config.hidden,
            config.intermediate,
            config.heads,
            config.kv_heads,
            config.head_size,
            config.eps,
            config.scale,
            config.attention_cap,
            config.final_cap,
            config.hidden**0.5,
            layers,
            frequencies.data_ptr(),
            len(ropes),
            self._matrix(embedding, int8),
            embedding.data_ptr(),
            self._keep(1 + weights["norm"].float()).data_ptr(),
            self._keep(torch.zeros(shape)).data_ptr(),
            self._keep(torch.zeros(shape)).data_ptr(),
            blocks * BLOCK,
        )
        self.kept.append(layers)
        self.loras: weakref.WeakKeyDictionary[Adapter, tuple[Any, list[Tensor]]] = weakref.WeakKeyDictionary()
        self.pool = self.library.start_threads(threads, amx)
        if not self.pool:
            raise UserError("there is no memory for the engine's threads")
        weakref.finalize(self, self.library.stop_threads, self.pool)
        self.amx = bool(self.library.uses_amx(self.pool))

    def step(self, tokens: list[int], rows: list[Rows]) -> tuple[list[int], npt.NDArray[np.float32]]:
        """See `architecture.Model`."""
        wanted = sum(one.wanted > 0 for one in rows)
        logits = np.empty((wanted, self.config.vocabulary), np.float32)
        best, token = np.empty(wanted, np.int32), np.array(tokens, np.int32)
        blocks = [np.array(one.blocks, np.int32) for one in rows]
        table = (_Rows * len(rows))(
            *(
                _Rows(one.first, one.count, one.start, one.wanted, block.ctypes.data, self._lora(one.adapter))
                for one, block in zip(rows, blocks, strict=True)
            )
        )
        step = _Step(len(tokens), len(rows), token.ctypes.data, table, best.ctypes.data, logits.ctypes.data)
        if self.library.run_step(self.pool, c.byref(self.model), c.byref(step)):
            raise MemoryError
        return best.tolist(), logits

    def _keep(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor

    def _layer(self, weights: Weights, i: int, rope: int, int8: bool) -> _Layer:
        at = f"layers.{i}"
        gate, up = (weights[f"{at}.mlp.{name}_proj"] for name in ("gate", "up"))
        inputs = gate.shape[1]
        sites = [
            torch.cat([weights[f"{at}.self_attn.{name}_proj"] for name in "qkv"]),
            weights[f"{at}.self_attn.o_proj"],
            torch.stack((gate.view(-1, 16, inputs), up.view(-1, 16, inputs)), 1).view(-1, inputs),
            weights[f"{at}.mlp.down_proj"],
        ]
        norms = {name: self._keep(1 + weights[f"{at}.{name}"].float()).data_ptr() for name in norms_of(self.config)}
        after = norms["post_attention_layernorm"]
        first = self.config.generation == 1  # its norm after attention is the one before the MLP
        return _Layer(
            (_Matrix * 4)(*(self._matrix(site, int8) for site in sites)),
            norms["input_layernorm"],
            None if first else after,
            after if first else norms["pre_feedforward_layernorm"],
            norms.get("post_feedforward_layernorm"),
            norms.get("self_attn.q_norm"),
            norms.get("self_attn.k_norm"),
            rope,
            self.config.windows[i],
        )

    def _matrix(self, weight: Tensor, int8: bool) -> _Matrix:
        """[outputs, inputs] in the order in which kernels.c reads it, outputs filled up with zeros."""
        rows, columns = weight.shape
        if rows % 32:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, 32 - rows % 32))
        scales = None
        if int8:
            scales = self._keep((weight.abs().amax(1).float() / 127).clamp_min(1e-30))
            parts = zip(weight.split(4096), scales.split(4096), strict=True)  # a large matrix is not copied as float32
            weight = torch.cat([(part.float() / scale[:, None]).round().to(torch.int8) for part, scale in parts])
        packed = self._keep(weight.view(-1, 2, 16, columns // 32, 16, 2).permute(0, 3, 1, 4, 2, 5))
        return _Matrix(len(weight), columns, packed.data_ptr(), scales.data_ptr() if scales is not None else None)

    def _lora(self, adapter: Adapter | None) -> int | None:
        """The address of an adapter's matrices, which live as long as the adapter does."""
        if adapter is None:
            return None
        if adapter not in self.loras:
            table, kept = (_Lora * (self.config.layers * len(MODULES)))(), []
            for layer in range(self.config.layers):
                for number, module in enumerate(MODULES):
                    if (inner := adapter.inner.get((layer, module))) is None:
                        continue
                    inner, outer = inner.contiguous(), adapter.outer[layer, module].T.contiguous()
                    kept += [inner, outer]
                    table[layer * len(MODULES) + number] = _Lora(len(inner), inner.data_ptr(), outer.data_ptr())
            self.loras[adapter] = table, kept
        return c.addressof(self.loras[adapter][0])


def _frequencies(config: Config, theta: float, factor: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, config.head_size, 2, dtype=torch.float) / config.head_size) / factor


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
