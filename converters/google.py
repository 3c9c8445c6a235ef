"""Google's own PyTorch checkpoints of Gemma (gemma_pytorch): `gemma-2b.ckpt`, or shards with an index. Read only.

A file is `torch.save({"model_state_dict": …})`, of which no pickle code is run. Names and layouts are transformers',
except these, with n, k and h as in `keras`:

- `self_attn.qkv_proj` [(n + 2k)·h, d]: queries, keys and values concatenated.
- `embedder`, in Gemma 3 `text_token_embedder`; `query_norm` and `key_norm`.
- Rotary tables (`freqs_cis`) and the vision tower, which a text model does not have.

A checkpoint has no configuration: it is the one that Google published for a model with this number of layers. The
tokenizer is the `tokenizer.model` beside the file. Files for JAX (Orbax, as Flax and kauldron write them) are not read,
but named as what they are.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.byte_ranges import whole_file
from converters.checkpoint import Checkpoint, LazyTensor
from converters.keras_config import published, read_config
from converters.torch_file import MAX_PICKLE, read_tensors
from converters.vocabulary import tokenizer_from_sentencepiece
from core.errors import UserError
from core.files import read_json

TITLE = "Google's PyTorch checkpoint (gemma_pytorch)"
READS = {Checkpoint}
WRITES: dict[type, str] = {}

STATE = "model_state_dict."  # where a file has its tensors; a shard may have them at the top
INDEX = "pytorch_model.bin.index.json"
RENAMED = {"embedder.weight": "model.embed_tokens.weight", "text_token_embedder.weight": "model.embed_tokens.weight"}
OF_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")  # files of JAX's checkpoints
LEFT_OUT = re.compile(r"(.*\.)?(local_|global_)?freqs_cis|siglip_vision_model\..*|mm_.*")
SIZE_OF_27B = {46: 128, 62: 128}  # layers → values a head has, 256 in all others


def recognizes(path: Path) -> bool:
    """A file, or a folder of shards, with a fused projection of this format's name; or a folder for JAX."""
    if path.is_dir():
        if _is_for_jax(path):
            return True
        index = path / INDEX
        return index.is_file() and index.stat().st_size < MAX_PICKLE and b"self_attn.qkv_proj" in index.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            found = [record for record in archive.infolist() if record.filename.endswith("/data.pkl")]
            small = len(found) == 1 and found[0].file_size <= MAX_PICKLE
            return small and b"self_attn.qkv_proj" in archive.read(found[0])
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError):
        return False


def read(path: Path) -> Checkpoint:
    """
    Raises:
        UserError: damaged, hostile, quantized, for JAX, or not a Gemma of a size that Google published.
    """
    if path.is_dir() and _is_for_jax(path):
        raise UserError(
            f"{path} is a checkpoint for JAX (Orbax, of Flax or kauldron), which is not read here; take the same "
            f"model's Hugging Face folder, which Google publishes beside it"
        )
    found: dict[str, LazyTensor] = {}
    for file in _files(path):
        tensors = read_tensors(whole_file(file))
        nested = {name.removeprefix(STATE): lazy for name, lazy in tensors.items() if name.startswith(STATE)}
        found |= nested or tensors
    if any(name.endswith("weight_scaler") for name in found):
        raise UserError(f"{path} is quantized to 8 bits; convert the checkpoint that is not (without -quant)")
    layers = sum(name.endswith("self_attn.qkv_proj.weight") for name in found)
    size = SIZE_OF_27B.get(layers, 256)
    tensors = {}
    heads: dict[str, tuple[int, ...]] = {}
    for name, tensor in found.items():
        if LEFT_OUT.fullmatch(name):
            continue
        if name.endswith("self_attn.qkv_proj.weight"):
            counts = _head_counts(tensor, found.get(name.replace("qkv_proj", "o_proj")), size, f"{path}: {name}")
            heads |= {f"{part}_proj": (count, 0, size) for part, count in zip("qkv", counts, strict=True)}
            tensors |= _split(name, tensor, [count * size for count in counts])
        else:
            ours = name.replace("query_norm", "q_norm").replace("key_norm", "k_norm")
            tensors[RENAMED.get(ours, ours)] = tensor
    family = _family(tensors)
    config = read_config(published(family, tensors, heads, path), family, tensors, path)
    tokenizer = (path if path.is_dir() else path.parent) / "tokenizer.model"
    files = tokenizer_from_sentencepiece(tokenizer.read_bytes(), tokenizer) if tokenizer.is_file() else {}
    return Checkpoint(config, tensors, {**files}, origin={"name": path.stem})


def _is_for_jax(folder: Path) -> bool:
    return any((folder / name).is_file() for name in OF_ORBAX)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    names = set(read_json(path / INDEX).get("weight_map", {}).values())
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{path / INDEX} names files that are not of its own folder, or none")
    return [path / name for name in sorted(names)]


def _head_counts(fused: Tensor | LazyTensor, out: LazyTensor | None, size: int, where: str) -> tuple[int, int, int]:
    """Heads of queries, keys and values: the first from the output projection, the others from the fused rows."""
    if out is None or len(fused.shape) != 2 or len(out.shape) != 2:
        raise UserError(f"{where} has no o_proj beside it, or is no matrix")
    queries, others = out.shape[1] // size, fused.shape[0] // size - out.shape[1] // size
    if others <= 0 or others % 2 or (queries + others) * size != fused.shape[0]:
        raise UserError(f"{where} has {fused.shape[0]} rows, which are no heads of {size} values")
    return queries, others // 2, others // 2


def _split(name: str, fused: LazyTensor, rows: list[int]) -> dict[str, LazyTensor]:
    found, begin = {}, 0
    for part, count in zip("qkv", rows, strict=True):

        def read(begin: int = begin, count: int = count) -> Tensor:
            return fused.read()[begin : begin + count].clone()

        found[name.replace("qkv_proj", f"{part}_proj")] = LazyTensor((count, fused.shape[1]), fused.dtype, read)
        begin += count
    return found


def _family(tensors: Mapping[str, Any]) -> str:
    if "model.layers.0.self_attn.q_norm.weight" in tensors:
        return "gemma3_text"
    return "gemma2" if "model.layers.0.post_feedforward_layernorm.weight" in tensors else "gemma"
