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
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from converters import keras_lora
from converters.checkpoint import Adapter, Checkpoint, Lazy
from converters.gguf_metadata import GELU
from converters.hf import read_json, read_prompt, write_json
from converters.keras_h5 import SIGNATURE, dataset, dtype_of, opened, tensor_of, write_tensor
from converters.vocabulary import of_sentencepiece, read_vocabulary, to_sentencepiece
from data_prep.progress import Progress
from nemo_configs.command_line import UserError

TITLE = "KerasHub preset or .weights.h5; LoRA of KerasHub (.lora.h5)"
READS = {Checkpoint, Adapter}
WRITES = {Checkpoint: "", Adapter: ".lora.h5"}

CONFIG, WEIGHTS, SHARDS = "config.json", "model.weights.h5", "model.weights.json"
SENTENCEPIECE = "assets/tokenizer/vocabulary.spm"
COMPANIONS = "transformers"  # folder of what KerasHub has no place for
CLASSES = {"gemma": "GemmaBackbone", "gemma2": "GemmaBackbone", "gemma3_text": "Gemma3Backbone"}
ROOTS = ("", "backbone/", "layers/gemma_backbone/", "layers/gemma3_backbone/")  # a backbone's file, or a whole task's
BLOCK = re.compile(r"gemma3?_decoder_block(?:_(\d+))?")
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
ARCHITECTURES = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
EVERY = {"gemma2": 2, "gemma3_text": 6}  # which layer sees everything
# What Google published and no weight shows, for all of a family and by the number of layers.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {"attention_logit_soft_cap": 50.0, "final_logit_soft_cap": 30.0, "use_sliding_window_attention": True,
               "sliding_window_size": 4096},
    "gemma3_text": {"use_sliding_window_attention": True, "sliding_window_size": 1024, "global_rope_scaling_factor": 8.0},
}  # fmt: skip
SMALL = {"sliding_window_size": 512, "global_rope_scaling_factor": 1.0}
OF_LAYERS: dict[str, dict[int, dict[str, Any]]] = {
    "gemma": {18: {}, 28: {}},
    "gemma2": {26: {}, 42: {}, 46: {"query_head_dim_normalize": False}},
    "gemma3_text": {18: SMALL, 26: SMALL, 34: {}, 48: {}, 62: {"query_head_dim_normalize": False}},
}
CONTEXT = {18: 32_768, 26: 32_768}  # of Gemma 3 270M and 1B; the longest text of others is transformers' default


class Layout(NamedTuple):
    """How a matrix lies with KerasHub: in so many dimensions, and its way to transformers' [out, in] and back."""

    dimensions: int
    to_ours: Callable[[Tensor], Tensor]
    to_keras: Callable[[Tensor, PretrainedConfig], Tensor]


_HEADS_OUT = Layout(
    3,
    lambda w: w.transpose(1, 2).flatten(0, 1),
    lambda w, config: w.unflatten(0, (-1, config.head_dim)).transpose(1, 2),
)
_TRANSPOSED = Layout(2, lambda w: w.T, lambda w, config: w.T)
LAYOUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), _HEADS_OUT),
    "o_proj": Layout(3, lambda w: w.flatten(0, 1).T, lambda w, config: w.T.unflatten(0, (-1, config.head_dim))),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), _TRANSPOSED),
}


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
    tensors, family, heads = _read_weights([path])
    config = _config(_published(family, tensors, heads, path), family, tensors, path)
    return Checkpoint(config, tensors, origin={"name": path.name.split(".")[0]})


def _read_preset(folder: Path) -> Checkpoint:
    settings = read_json(folder / CONFIG)
    tensors, family, _ = _read_weights(_weight_files(folder))
    config = _config(settings.get("config"), family, tensors, folder / CONFIG)
    if settings.get("class_name") != CLASSES[family]:
        raise UserError(f"{folder / CONFIG} is of {settings.get('class_name')}, and the weights are of a {family}")
    files: dict[str, bytes | Path] = {
        file.name: file for file in sorted((folder / COMPANIONS).glob("*")) if file.is_file()
    }
    if not files and (folder / SENTENCEPIECE).is_file():
        files = {**of_sentencepiece((folder / SENTENCEPIECE).read_bytes(), folder / SENTENCEPIECE)}
    return Checkpoint(config, tensors, files, read_prompt(folder), {"name": folder.resolve().name})


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / SHARDS).exists():
        return [folder / WEIGHTS]
    found = read_json(folder / SHARDS).get("weight_map")
    names = (
        {name for entry in found.values() for name in ([entry] if isinstance(entry, str) else entry)}
        if found
        else set()
    )
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{folder / SHARDS} names files that are not of its own folder, or none")
    return [folder / name for name in sorted(names)]


def _read_weights(files: list[Path]) -> tuple[dict[str, Lazy], str, dict[str, tuple[int, ...]]]:
    """The tensors under transformers' names and in their shapes, their family, and KerasHub's shapes in layer 0."""
    tensors: dict[str, Lazy] = {}
    first: dict[str, tuple[int, ...]] = {}
    for path in files:
        with opened(path) as file:
            root = next((root for root in ROOTS if isinstance(file.get(f"{root}layers"), h5py.Group)), None)
            if root is None:
                raise UserError(f"{path} holds no layers of a Gemma of KerasHub")
            for name, place in _places(file[f"{root}layers"]).items():
                found = dataset(file, f"{root}layers/{place}/vars/0")
                if found is not None:
                    tensors[name] = _lazy(path, found, name)
                    if name.startswith("model.layers.0.self_attn"):
                        first[name.split(".")[-2]] = found.shape
    if "q_norm" in first:
        return tensors, "gemma3_text", first
    if "model.layers.0.post_feedforward_layernorm.weight" in tensors:
        return tensors, "gemma2", first
    # With one norm before the MLP, it is the one that transformers names by what comes before it.
    names = {name: name.replace("pre_feedforward_layernorm", "post_attention_layernorm") for name in tensors}
    return {names[name]: tensor for name, tensor in tensors.items()}, "gemma", first


def _places(layers: Iterable[str]) -> dict[str, str]:
    """transformers' name → KerasHub's place below `layers`, of all that the Gemma in this file can have."""
    found = {"model.embed_tokens.weight": "reversible_embedding", "model.norm.weight": "rms_normalization"}
    for place in layers:
        if block := BLOCK.fullmatch(place):
            found |= {f"model.layers.{block[1] or 0}.{name}.weight": f"{place}/{part}" for name, part in PARTS.items()}
    return found


def _lazy(path: Path, found: h5py.Dataset, name: str) -> Lazy:
    layout, place, shape = LAYOUTS.get(name.split(".")[-2]), found.name.strip("/"), found.shape
    if layout is not None:
        if len(shape) != layout.dimensions:
            raise UserError(f"{path}: {place} has shape {list(shape)}, with other dimensions than {name} has")
        shape = tuple(layout.to_ours(torch.empty(shape, device="meta")).shape)

    def read() -> Tensor:
        with opened(path) as file:
            found = dataset(file, place)
            assert found is not None  # it was there
            tensor = tensor_of(found)
        return layout.to_ours(tensor).contiguous() if layout else tensor

    return Lazy(shape, dtype_of(found), read)


def _published(
    family: str, tensors: Mapping[str, Lazy], heads: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, Any]:
    """The settings of a file that has none, in KerasHub's words: sizes by its tensors, the rest as Google published it."""
    layers = sum(name.endswith("self_attn.q_proj.weight") for name in tensors)
    if layers not in OF_LAYERS[family]:
        raise UserError(f"{path} has {layers} layers, as no published {family} has, and its settings stand in config.json "
                        f"of the KerasHub preset: convert that folder")  # fmt: skip
    try:
        (vocabulary, width), (inner, _) = (
            tensors[name].shape for name in ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight")
        )
        (queries, _, head_dim), (keys, *_) = heads["q_proj"], heads["k_proj"]
    except (KeyError, ValueError):
        raise UserError(f"{path} is no whole Gemma: parts of it or of its first layer are missing") from None
    sizes = {"vocabulary_size": vocabulary, "num_layers": layers, "num_query_heads": queries, "head_dim": head_dim,
             "num_key_value_heads": keys, "hidden_dim": width,
             "intermediate_dim": inner if family == "gemma3_text" else 2 * inner}  # fmt: skip
    return sizes | PUBLISHED[family] | OF_LAYERS[family][layers]


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
                raise UserError(
                    f"{where} asks a Gemma 1 for sliding windows or soft-capping, which transformers' has not"
                )
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
    return json.loads(config.to_json_string()) | {"architectures": [ARCHITECTURES[family]]}


def _rope(theta: float, factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    return {**scaling, "rope_theta": theta}


def _layer_types(family: str, layers: int, window: bool) -> list[str]:
    every = EVERY[family]
    return ["sliding_attention" if window and n % every < every - 1 else "full_attention" for n in range(layers)]


def write(content: Checkpoint | Adapter, target: Path) -> None:
    """
    Raises:
        UserError: KerasHub has no setting for something that the model needs, or no place for its tokenizer.
    """
    if isinstance(content, Adapter):
        keras_lora.write(content, target)
        return
    family = content.config.get("model_type")
    if family not in CLASSES:
        raise UserError(f"model_type is {family!r}; KerasHub is known here for {', '.join(CLASSES)}")
    if "lm_head.weight" in content.tensors:
        raise UserError("this model has an output layer of its own; KerasHub's Gemmas use the embedding for it")
    config = AutoConfig.for_model(**content.config)
    settings = _settings(config)
    target.mkdir()
    keras = "keras_hub.src.models." + ("gemma3.gemma3_backbone" if family == "gemma3_text" else "gemma.gemma_backbone")
    write_json(target / CONFIG, _object(keras, CLASSES[family], settings))
    if content.files:
        _write_tokenizer(content, config, target)
    if content.prompt:
        content.prompt.save(target)
    places = {
        name: place for name, place in _all_places(family, config.num_hidden_layers).items() if name in content.tensors
    }
    if missing := content.tensors.keys() - places.keys():
        raise UserError(f"KerasHub has no place for {sorted(missing)[0]} in a {family}")
    with (
        h5py.File(target / WEIGHTS, "w") as file,
        Progress("Writing", sum(t.nbytes for t in content.tensors.values())) as progress,
    ):
        done = 0
        for name, place in places.items():
            layout, tensor = LAYOUTS.get(name.split(".")[-2]), content.tensors[name].read()
            write_tensor(file, f"layers/{place}/vars/0", layout.to_keras(tensor, config) if layout else tensor)
            done += content.tensors[name].nbytes
            progress.at(done)


def _all_places(family: str, layers: int) -> dict[str, str]:
    block = "gemma3_decoder_block" if family == "gemma3_text" else "gemma_decoder_block"
    found = _places([f"{block}_{number}" if number else block for number in range(layers)])
    if family != "gemma":
        return found
    renamed = {name for name in found if "feedforward_layernorm" in name or "post_attention_layernorm" in name}
    other = {name.replace("pre_feedforward", "post_attention"): found[name] for name in renamed if "pre_feed" in name}
    return {name: place for name, place in found.items() if name not in renamed} | other


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    """A backbone's settings in KerasHub's words."""
    family, rope = config.model_type, config.rope_parameters
    of_3 = family == "gemma3_text"
    found = {
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_query_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_dim": config.hidden_size,
        "intermediate_dim": config.intermediate_size * (1 if of_3 else 2),
        "head_dim": config.head_dim,
        "layer_norm_epsilon": config.rms_norm_eps,
        "dropout": 0,
        "dtype": str(config.dtype).removeprefix("torch."),
    }
    local, whole = rope.get("sliding_attention", rope), rope.get("full_attention", rope)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    missing = {
        "another activation": activation not in GELU,
        "biases": config.attention_bias,
        "attention to later tokens": bool(getattr(config, "use_bidirectional_attention", False)),
        "another RoPE": (local["rope_theta"], whole["rope_theta"]) != (1e4, 1e6 if of_3 else 1e4)
        or any(part["rope_type"] not in (("default", "linear") if of_3 else ("default",)) for part in (local, whole)),
    }
    if family != "gemma":
        window = "sliding_attention" in config.layer_types
        scalars = {config.head_dim: True, config.hidden_size // config.num_attention_heads: False}
        found |= {
            "query_head_dim_normalize": scalars.get(config.query_pre_attn_scalar),
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "attention_logit_soft_cap": config.attn_logit_softcapping,
            "final_logit_soft_cap": config.final_logit_softcapping,
            "use_sliding_window_attention": window,
            "sliding_window_size": config.sliding_window,
        }
        missing["another query_pre_attn_scalar"] = config.query_pre_attn_scalar not in scalars
        missing["another order of layers that see everything"] = (
            _layer_types(family, config.num_hidden_layers, window) != config.layer_types
        )
    if of_3:
        found |= {"image_size": None, "vision_encoder": None, "use_query_key_norm": True,
                  "local_rope_scaling_factor": local.get("factor", 1.0),
                  "global_rope_scaling_factor": whole.get("factor", 1.0)}  # fmt: skip
    if named := [what for what, there in missing.items() if there]:
        raise UserError(f"KerasHub has no setting for what this {family} needs: {', '.join(named)}")
    return found


def _object(module: str, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    package = module.split(".")[0]
    return {"module": module, "class_name": name, "config": dict(config), "registered_name": f"{package}>{name}"}


def _write_tokenizer(content: Checkpoint, config: PretrainedConfig, target: Path) -> None:
    given = content.files.get("tokenizer.model")
    model = given.read_bytes() if isinstance(given, Path) else given
    if model is None:
        model = to_sentencepiece(read_vocabulary(content.files, config))
    (target / SENTENCEPIECE).parent.mkdir(parents=True)
    (target / SENTENCEPIECE).write_bytes(model)
    family = "gemma3" if config.model_type == "gemma3_text" else "gemma"
    settings = {"proto": None, "sequence_length": None, "add_bos": False, "add_eos": False, "dtype": "int32"}
    name = "Gemma3Tokenizer" if family == "gemma3" else "GemmaTokenizer"
    write_json(target / "tokenizer.json", _object(f"keras_hub.src.models.{family}.{family}_tokenizer", name, settings))
    (target / COMPANIONS).mkdir()
    for name, file in content.files.items():
        (target / COMPANIONS / name).write_bytes(file.read_bytes() if isinstance(file, Path) else file)
