"""KerasHub's Gemmas: presets and `.weights.h5` files, read and written. KerasHub's LoRA files are in `keras_lora`.

A preset is a folder with `config.json` (of the backbone, with Keras' names), `model.weights.h5` or its shards, and the
SentencePiece model in `assets/tokenizer/`. A `.weights.h5` alone has neither family nor configuration: the family is
inferred from its norms, and the configuration is the one that Google published for this number of layers.

The layout compared with transformers' (see `hf`), with d hidden_size, f intermediate_size, n query heads, k key and
value heads, and h values a head:

- `layers/gemma_decoder_block_3/<part>/vars/0` for layer 3, without a number for layer 0, `gemma3_decoder_block` in
  Gemma 3; numbers are indices in the list of layers.
- `query` [n, d, h], `key` and `value` [k, d, h], `attention_output` [n, h, d]: one matrix per head, for row
  vectors, as are `gating_ffw` and `gating_ffw_2` [d, f] and `ffw_linear` [f, d]. Norms [d] and the embedding are as
  transformers'. `intermediate_dim` of Gemma 1 and 2 counts gate and up together: 2·f.
- bfloat16 is stored as two opaque bytes with an attribute `dtype`.

What is different in Gemma 4 is in `keras_gemma4`.

The files of transformers' tokenizer are in a folder `transformers`, because KerasHub has a `tokenizer.json` of its own.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from converters import keras_gemma4, keras_lora
from converters.checkpoint import Adapter, Checkpoint, LazyTensor
from converters.hf import read_prompt, write_json
from converters.keras_config import CLASSES, published, read_config, settings_of
from converters.keras_h5 import SIGNATURE, dataset, dtype_of, open_h5, tensor_of, write_tensor
from converters.vocabulary import read_vocabulary, to_sentencepiece, tokenizer_from_sentencepiece
from core.errors import UserError
from core.files import read_json
from core.layer_shapes import layer_shapes
from core.progress import Progress

TITLE = "KerasHub preset or .weights.h5; LoRA of KerasHub (.lora.h5)"
TRIED = "keras-hub 0.32.0"
READS = {Checkpoint, Adapter}
WRITES = {Checkpoint: "", Adapter: ".lora.h5"}

CONFIG, WEIGHTS, SHARDS = "config.json", "model.weights.h5", "model.weights.json"
SENTENCEPIECE = "assets/tokenizer/vocabulary.spm"
COMPANIONS = "transformers"  # folder of the files that KerasHub has no place for
# A file of a whole task has the backbone inside.
ROOTS = ("layers/gemma_backbone/", "layers/gemma3_backbone/", "layers/gemma4_backbone/", "backbone/", "")
BLOCK = re.compile(r"gemma(?:3|4_text)?_decoder_block(?:_(\d+))?")
BLOCKS = {"gemma": "gemma_decoder_block", "gemma2": "gemma_decoder_block", "gemma3_text": "gemma3_decoder_block"}
BLOCKS |= dict.fromkeys(keras_gemma4.FAMILIES, keras_gemma4.BLOCK)
# Tokens for what a whole model sees and hears, by the name of the tokenizer's setting.
OF_TOWERS = {
    "Gemma3Backbone": {"vision": {"<start_of_image>", "<img>", "<end_of_image>"}},
    "Gemma4Backbone": {
        "vision": {"<|image>", "<|image|>", "<image|>"},
        "audio": {"<|audio>", "<|audio|>", "<audio|>"},
        "video": {"<|video|>"},
    },
}
MODULES = {"GemmaBackbone": "gemma.gemma", "Gemma3Backbone": "gemma3.gemma3", "Gemma4Backbone": "gemma4.gemma4"}
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


class Layout(NamedTuple):
    """KerasHub's layout of a tensor: its number of dimensions, and the conversions from and to transformers', for a
    layer's size of a head."""

    dimensions: int
    to_hf: Callable[[Tensor], Tensor]
    to_keras: Callable[[Tensor, int], Tensor]


_HEADS_OUT = Layout(
    3,
    lambda w: w.transpose(1, 2).flatten(0, 1),
    lambda w, head_dim: w.unflatten(0, (-1, head_dim)).transpose(1, 2),
)
_TRANSPOSED = Layout(2, lambda w: w.T, lambda w, _: w.T)
LAYOUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), _HEADS_OUT),
    "o_proj": Layout(3, lambda w: w.flatten(0, 1).T, lambda w, head_dim: w.T.unflatten(0, (-1, head_dim))),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "proj"), _TRANSPOSED),
    **dict.fromkeys(("per_layer_model_projection", "per_layer_input_gate", "per_layer_projection"), _TRANSPOSED),
    "experts": Layout(3, lambda w: w.transpose(1, 2), lambda w, _: w.transpose(1, 2)),
}
_SCALAR = Layout(0, lambda w: w.view(1), lambda w, _: w.view(()))


def _layout(name: str) -> Layout | None:
    """The layout of the tensor `name`; None where it is transformers' own."""
    return _SCALAR if name.endswith("layer_scalar") else LAYOUTS.get(name.split(".")[-2])


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
    with open_h5(path) as file:
        of_lora = "lora" in file
    if of_lora:
        return keras_lora.read(path)
    tensors, family, heads = _read_weights([path])
    config = read_config(published(family, tensors, heads, path), family, tensors, path)
    return Checkpoint(config, tensors, origin={"name": path.name.split(".")[0]})


def _read_preset(folder: Path) -> Checkpoint:
    settings = read_json(folder / CONFIG)
    tensors, family, _ = _read_weights(_weight_files(folder))
    config = read_config(settings.get("config"), family, tensors, folder / CONFIG)
    if settings.get("class_name") != CLASSES[family]:
        raise UserError(f"{folder / CONFIG} is of {settings.get('class_name')}, and the weights are of a {family}")
    files: dict[str, bytes | Path] = {
        file.name: file for file in sorted((folder / COMPANIONS).glob("*")) if file.is_file()
    }
    if not files and (folder / SENTENCEPIECE).is_file():
        files = {**tokenizer_from_sentencepiece((folder / SENTENCEPIECE).read_bytes(), folder / SENTENCEPIECE)}
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


def _read_weights(files: list[Path]) -> tuple[dict[str, LazyTensor], str, dict[str, tuple[int, ...]]]:
    """The tensors under transformers' names and in their shapes, their family, and KerasHub's shapes in layer 0."""
    tensors: dict[str, LazyTensor] = {}
    first: dict[str, tuple[int, ...]] = {}
    for path in files:
        with open_h5(path) as file:
            root = next((root for root in ROOTS if isinstance(file.get(f"{root}layers"), h5py.Group)), None)
            if root is None:
                raise UserError(f"{path} holds no layers of a Gemma of KerasHub")
            for name, places in _places(file[f"{root}layers"]).items():
                found = [part for place in places if (part := dataset(file, f"{root}layers/{place}")) is not None]
                if len(found) == len(places):
                    tensors[name] = _lazy(path, found, name)
                    if name.startswith("model.layers.0.self_attn"):
                        first[name.split(".")[-2]] = found[0].shape
    if keras_gemma4.is_of(tensors):
        return tensors, keras_gemma4.FAMILIES[0], first
    if "q_norm" in first:
        return tensors, "gemma3_text", first
    if "model.layers.0.post_feedforward_layernorm.weight" in tensors:
        return tensors, "gemma2", first
    # The only norm before the MLP is the one that transformers calls post_attention_layernorm.
    names = {name: name.replace("pre_feedforward_layernorm", "post_attention_layernorm") for name in tensors}
    return {names[name]: tensor for name, tensor in tensors.items()}, "gemma", first


def _places(layers: Collection[str]) -> dict[str, list[str]]:
    """transformers' name → KerasHub's places below `layers`, of all that the Gemma in this file can have."""
    found = {"model.embed_tokens.weight": ["reversible_embedding/vars/0"]}
    found |= {"model.norm.weight": ["rms_normalization/vars/0"]}
    if keras_gemma4.BLOCK in layers or any(place.startswith(keras_gemma4.BLOCK) for place in layers):
        found = keras_gemma4.places(layers)
    for place in layers:
        if block := BLOCK.fullmatch(place):
            layer = f"model.layers.{block[1] or 0}"
            found |= {f"{layer}.{name}.weight": [f"{place}/{part}/vars/0"] for name, part in PARTS.items()}
            if place.startswith(keras_gemma4.BLOCK):
                for name, parts in keras_gemma4.PARTS.items():
                    found[f"{layer}.{name}"] = [f"{place}/{part}" for part in parts]
    return found


def _lazy(path: Path, found: list[h5py.Dataset], name: str) -> LazyTensor:
    """The tensor `name` of the datasets `found` of a file; of two, the first has the upper rows."""
    layout, places = _layout(name), [part.name.strip("/") for part in found]

    def whole(parts: list[Tensor]) -> Tensor:
        return torch.cat([layout.to_hf(part) if layout else part for part in parts], -2 if len(parts) > 1 else 0)

    for part in found:
        if layout is not None and len(part.shape) != layout.dimensions:
            place = part.name.strip("/")
            raise UserError(f"{path}: {place} has shape {list(part.shape)}, with other dimensions than {name} has")
    try:
        shape = tuple(whole([torch.empty(part.shape, device="meta") for part in found]).shape)
    except RuntimeError:
        raise UserError(f"{path}: {' and '.join(places)} have shapes that do not fit each other") from None

    def read() -> Tensor:
        with open_h5(path) as file:
            parts = [tensor_of(part) for place in places if (part := dataset(file, place)) is not None]
        return whole(parts).contiguous()

    return LazyTensor(shape, dtype_of(found[0]), read)


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
    settings = settings_of(config)
    per_layer = "model.embed_tokens_per_layer.weight" in content.tensors
    known = _all_places(family, config.num_hidden_layers, per_layer)
    places = {name: there for name, there in known.items() if name in content.tensors}
    if missing := content.tensors.keys() - places.keys():
        raise UserError(f"KerasHub has no place for {sorted(missing)[0]} in a {family}")
    target.mkdir()
    name = CLASSES[family]
    write_json(target / CONFIG, _object(f"keras_hub.src.models.{MODULES[name]}_backbone", name, settings))
    if "tokenizer.json" in content.files:
        _write_tokenizer(content, config, target)
    if content.prompt:
        content.prompt.save(target)
    with (
        h5py.File(target / WEIGHTS, "w") as file,
        Progress("Writing", sum(t.nbytes for t in content.tensors.values())) as progress,
    ):
        done, sizes = 0, [shape.head_dim for shape in layer_shapes(config)]
        for name, there in places.items():
            layout, tensor = _layout(name), content.tensors[name].read()
            number = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
            for place, part in zip(there, tensor.chunk(len(there), -2 if len(there) > 1 else 0), strict=True):
                write_tensor(file, f"layers/{place}", layout.to_keras(part, sizes[number]) if layout else part)
            done += content.tensors[name].nbytes
            progress.at(done)


def _all_places(family: str, layers: int, per_layer: bool) -> dict[str, list[str]]:
    block = BLOCKS[family]
    blocks = [f"{block}_{number}" if number else block for number in range(layers)]
    found = _places([*blocks, "embedding"] if per_layer else blocks)
    if family != "gemma":
        return found
    renamed = {name for name in found if "feedforward_layernorm" in name or "post_attention_layernorm" in name}
    other = {name.replace("pre_feedforward", "post_attention"): found[name] for name in renamed if "pre_feed" in name}
    return {name: place for name, place in found.items() if name not in renamed} | other


def _object(module: str, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    package = module.split(".")[0]
    return {"module": module, "class_name": name, "config": dict(config), "registered_name": f"{package}>{name}"}


def _write_tokenizer(content: Checkpoint, config: PretrainedConfig, target: Path) -> None:
    vocabulary = read_vocabulary(content.files, config)
    given = content.files.get("tokenizer.model")
    model = given.read_bytes() if isinstance(given, Path) else given
    (target / SENTENCEPIECE).parent.mkdir(parents=True)
    (target / SENTENCEPIECE).write_bytes(model or to_sentencepiece(vocabulary))
    settings = {"proto": None, "sequence_length": None, "add_bos": False, "add_eos": False, "dtype": "int32"}
    backbone, tokens = CLASSES[config.model_type], set(vocabulary.tokens)
    for seen, needed in OF_TOWERS.get(backbone, {}).items():
        settings[f"has_{seen}_tokens"] = needed <= tokens
    name = backbone.replace("Backbone", "Tokenizer")
    write_json(
        target / "tokenizer.json", _object(f"keras_hub.src.models.{MODULES[backbone]}_tokenizer", name, settings)
    )
    (target / COMPANIONS).mkdir()
    for name, file in content.files.items():
        (target / COMPANIONS / name).write_bytes(file.read_bytes() if isinstance(file, Path) else file)
