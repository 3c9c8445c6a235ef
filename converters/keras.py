"""KerasHub's Gemmas: presets and `.weights.h5` files, both ways. The LoRA files of KerasHub are in `keras_lora`.

A preset is a folder of `config.json` (of the backbone, in Keras' own words), `model.weights.h5` or its shards, and the
SentencePiece model in `assets/tokenizer/`. A `.weights.h5` alone names no family and no settings: the family shows in
its norms, and the settings are those that Google published for a model of that many layers.

The layout, beside transformers' (`checkpoint.shapes`), with d, f, n, k and h as there:

- `layers/gemma_decoder_block_3/<part>/vars/0` for layer 3, without a number for layer 0, `gemma3_decoder_block` in
  Gemma 3; numbers are places in the list of layers.
- `query` [n, d, h], `key` and `value` [k, d, h], `attention_output` [n, h, d]: a head at a time, its matrix for row
  vectors, as are `gating_ffw` and `gating_ffw_2` [d, f] and `ffw_linear` [f, d]. Norms [d] and the embedding are as
  transformers'. `intermediate_dim` of Gemma 1 and 2 counts gate and up together: 2·f.
- bfloat16 stands as two opaque bytes with an attribute `dtype`.

KerasHub numbers its layers' kinds by itself (one in two, one in six sees everything) and has no field for the longest
text. The files of transformers' tokenizer lie in a folder `transformers`, since KerasHub has a `tokenizer.json` too.
"""

import json
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from converters import keras_lora
from converters.checkpoint import Adapter, Checkpoint, Lazy, shapes
from converters.hf import read_json, read_prompt, write_json
from converters.keras_h5 import open_h5, tensor_of, write_tensor
from converters.spm_vocabulary import sentencepiece_of, tokenizer_of
from data_prep.progress import Progress
from nemo_configs.command_line import UserError

TITLE = "KerasHub preset or .weights.h5; LoRA of KerasHub (.lora.h5)"
READS = {Checkpoint, Adapter}
WRITES = {Checkpoint: "", Adapter: ".lora.h5"}

CONFIG, WEIGHTS, SHARDS = "config.json", "model.weights.h5", "model.weights.json"
SENTENCEPIECE = "assets/tokenizer/vocabulary.spm"
COMPANIONS = "transformers"  # folder of what KerasHub has no place for
CLASSES = {"gemma": "GemmaBackbone", "gemma2": "GemmaBackbone", "gemma3_text": "Gemma3Backbone"}
EMBEDDING, FINAL_NORM = "layers/reversible_embedding/vars/0", "layers/rms_normalization/vars/0"
# transformers' name of a part of a layer → KerasHub's.
PARTS = {
    "input_layernorm": "pre_attention_norm",
    "self_attn.q_proj": "attention/query_dense",
    "self_attn.k_proj": "attention/key_dense",
    "self_attn.v_proj": "attention/value_dense",
    "self_attn.o_proj": "attention/output_dense",
    "self_attn.q_norm": "attention/query_norm",
    "self_attn.k_norm": "attention/key_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "gating_ffw",
    "mlp.up_proj": "gating_ffw_2",
    "mlp.down_proj": "ffw_linear",
}
EVERY = {"gemma2": 2, "gemma3_text": 6}  # which layer sees everything
# Layers → what Google published and no weight shows.
PUBLISHED: dict[str, dict[int, dict[str, Any]]] = {
    "gemma": {18: {}, 28: {}},
    "gemma2": {26: {}, 42: {}, 46: {"query_head_dim_normalize": False}},
    "gemma3_text": {
        18: {"sliding_window_size": 512},
        26: {"sliding_window_size": 512},
        34: {"sliding_window_size": 1024, "global_rope_scaling_factor": 8.0},
        48: {"sliding_window_size": 1024, "global_rope_scaling_factor": 8.0},
        62: {"sliding_window_size": 1024, "global_rope_scaling_factor": 8.0, "query_head_dim_normalize": False},
    },
}
CONTEXT = {18: 32_768, 26: 32_768}  # of Gemma 3 270M and 1B; the longest text of others is transformers' default


def recognizes(path: Path) -> bool:
    """A preset's folder, or an HDF5 file."""
    if path.is_dir():
        return (path / CONFIG).is_file() and ((path / WEIGHTS).is_file() or (path / SHARDS).is_file())
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def read(path: Path) -> Checkpoint | Adapter:
    """
    Raises:
        UserError: damaged, hostile, of another family, or without what its settings ask for.
    """
    if path.is_dir():
        return _read_preset(path)
    with opened(path) as file:
        of_lora = "lora" in file
    if of_lora:
        return keras_lora.read(path)
    tensors, family = _read_weights([path])
    return Checkpoint(_published(family, tensors, path), tensors, origin={"name": path.name.split(".")[0]})


def _read_preset(folder: Path) -> Checkpoint:
    settings = read_json(folder / CONFIG)
    tensors, family = _read_weights(_weight_files(folder))
    config = _config(settings.get("config"), family, tensors, folder / CONFIG)
    if settings.get("class_name") != CLASSES[family]:
        raise UserError(f"{folder / CONFIG} is of {settings.get('class_name')}, and the weights are of a {family}")
    files: dict[str, bytes | Path] = {file.name: file for file in sorted((folder / COMPANIONS).glob("*")) if file.is_file()}
    if not files and (folder / SENTENCEPIECE).is_file():
        files = {**of_sentencepiece((folder / SENTENCEPIECE).read_bytes(), folder / SENTENCEPIECE)}
    return Checkpoint(config, tensors, files, read_prompt(folder), {"name": folder.resolve().name})


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / SHARDS).exists():
        return [folder / WEIGHTS]
    found = read_json(folder / SHARDS).get("weight_map")
    names = {name for entry in found.values() for name in ([entry] if isinstance(entry, str) else entry)} if found else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{folder / SHARDS} names files that are not of its own folder, or none")
    return [folder / name for name in sorted(names)]


def _read_weights(files: list[Path]) -> tuple[dict[str, Lazy], str]:
    """The tensors under transformers' names and in their shapes, and the family that they are of."""
    tensors: dict[str, Lazy] = {}
    for path in files:
        with opened(path) as file:
            root = next((root for root in ROOTS if isinstance(file.get(f"{root}layers"), h5py.Group)), None)
            if root is None:
                continue
            for name, place in _places(file[f"{root}layers"]).items():
                found = dataset(file, f"{root}layers/{place}/vars/0")
                if found is not None:
                    tensors[name] = _lazy(path, found, name)
    if "model.layers.0.self_attn.q_norm.weight" in tensors:
        return tensors, "gemma3_text"
    if "model.layers.0.post_feedforward_layernorm.weight" in tensors:
        return tensors, "gemma2"
    # With one norm before the MLP, it is the one that transformers names by what comes before it.
    renamed = {name.replace("pre_feedforward_layernorm", "post_attention_layernorm"): tensor for name, tensor in tensors.items()}
    return renamed, "gemma"


def _places(layers: h5py.Group) -> dict[str, str]:
    """transformers' name → KerasHub's place below `layers`, of all that the Gemma in this file can have."""
    found = {"model.embed_tokens.weight": "reversible_embedding", "model.norm.weight": "rms_normalization"}
    for place in layers:
        if block := BLOCK.fullmatch(place):
            found |= {f"model.layers.{block[1] or 0}.{name}.weight": f"{place}/{part}" for name, part in PARTS.items()}
    return found


def _lazy(path: Path, found: h5py.Dataset, name: str) -> Lazy:
    shape = found.shape
    layout = LAYOUTS.get(name.split(".")[-2])
    if layout is not None and len(shape) != layout.dimensions:
        raise UserError(f"{path}: {found.name} has shape {list(shape)}, which is none of {name}")
    shape = tuple(layout.to_ours(torch.empty(shape, device="meta")).shape) if layout else shape

    def read() -> Tensor:
        with opened(path) as file:
            tensor = tensor_of(file[found_name])
        return layout.to_ours(tensor).contiguous() if layout else tensor

    found_name = found.name
    return Lazy(shape, dtype_of(found), read)


def _config(settings: Any, family: str, tensors: Mapping[str, Lazy], where: Path) -> dict[str, Any]:
    """`config.json` of transformers from the `settings` of a backbone of KerasHub."""
    try:
        layers, heads, head_dim = settings["num_layers"], settings["num_query_heads"], settings["head_dim"]
        fused = 1 if family == "gemma3_text" else 2
        found = {
            "vocab_size": settings["vocabulary_size"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": settings["num_key_value_heads"],
            "hidden_size": settings["hidden_dim"],
            "intermediate_size": settings["intermediate_dim"] // fused,
            "head_dim": head_dim,
            "rms_norm_eps": settings.get("layer_norm_epsilon", 1e-6),
            "dtype": str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        }
        caps = {"attn_logit_softcapping": settings.get("attention_logit_soft_cap"),
                "final_logit_softcapping": settings.get("final_logit_soft_cap")}  # fmt: skip
        window = settings.get("use_sliding_window_attention", False)
        if settings.get("is_embedding_model") or settings.get("use_bidirectional_attention"):
            raise UserError(f"{where} is of an embedding model, which writes no text")
        if family == "gemma":
            if window or any(caps.values()):
                raise UserError(f"{where} asks a Gemma 1 for sliding windows or soft-capping, which transformers' has not")
        else:
            found |= caps | {
                "sliding_window": settings["sliding_window_size"],
                "layer_types": _layer_types(family, layers, window),
                "query_pre_attn_scalar": head_dim
                if settings.get("query_head_dim_normalize", True)
                else found["hidden_size"] // heads,
            }
        if family == "gemma3_text":
            found["rope_parameters"] = {
                "full_attention": _rope(1e6, settings.get("global_rope_scaling_factor", 1.0)),
                "sliding_attention": _rope(1e4, settings.get("local_rope_scaling_factor", 1.0)),
            }
            found["max_position_embeddings"] = CONTEXT.get(layers, 131_072)
        tokens = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}  # of every Gemma
        config = AutoConfig.for_model(family, **found, **tokens)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{where} does not describe a Gemma of KerasHub ({type(error).__name__}: {error})") from None
    return json.loads(config.to_json_string()) | {"architectures": [f"{config.__class__.__name__.replace('TextConfig', '').replace('Config', '')}ForCausalLM"]}


def _rope(theta: float, factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    return {**scaling, "rope_theta": theta}


def _layer_types(family: str, layers: int, window: bool) -> list[str]:
    every = EVERY[family]
    return ["sliding_attention" if window and n % every < every - 1 else "full_attention" for n in range(layers)]
