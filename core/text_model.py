"""The text model inside a whole one that also sees or hears, cut out exactly: bytes are copied, none is computed with.

Published Gemma 3 (4B and larger) and Gemma 4 models are whole ones. Their text model has all its weights under one
prefix, and its configuration in `text_config`; transformers would load the text class from such a folder with random
weights and no more than a note. Here its tensors get the names of the text class, whatever is missing or of another
shape is an error, and what is left out is said. Memory holds no more than a block of `BLOCK` bytes.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import read_json, write_json, writing
from core.gemma_config import family_of, is_whole, text_config, write_both_dialects
from core.layer_shapes import layer_shapes

INDEX = "model.safetensors.index.json"
BLOCK = 1 << 24
# What a folder needs beside weights and config.json, as it is: stop tokens stand in generation_config.json.
COMPANIONS = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
PREFIXES = (("model.language_model.", "model."), ("language_model.", ""))
# Keys and values of a layer, in a model or in peft's names of an adapter: too many where the layer borrows them.
BORROWED = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d+)\.self_attn\.[kv]_(?:proj|norm)\..+")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, by its header: the bytes from `begin` to `end` of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def text_name(name: str) -> str | None:
    """The name in the text model of a whole model's tensor; None if it is of a tower."""
    for prefix, replacement in PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name if name == "lm_head.weight" else None


def cut_text_model(source: Path, target: Path) -> None:
    """Write the text model of the whole model in `source` to `target`, or do nothing where it is a text model already.

    Args:
        target: a folder; it may be `source`, which is then reduced file by file.

    Raises:
        UserError: a file is damaged, a tensor of the text model is missing or of another shape than config.json says.
    """
    config = read_json(source / "config.json")
    if not is_whole(config):
        return
    text, expected = _text_config(source, config)
    borrowing = {number for number, layer in enumerate(layer_shapes(text)) if layer.kv_source != number}
    shards = {file: read_header(file) for file in weight_files(source)}
    kept = _kept(shards, expected, source)
    weight_map = {new: file.name for file, names in kept.items() for new in names.values()}
    for line in left_out(shards, kept, borrowing):
        print(f"  {line}")
    for file, tensors in shards.items():
        if kept[file]:
            _copy_tensors(file, target / file.name, [(t, kept[file][t.name]) for t in tensors if t.name in kept[file]])
        elif source == target:
            file.unlink()
    if (source / INDEX).exists():
        size = sum(t.nbytes for file, tensors in shards.items() for t in tensors if t.name in kept[file])
        write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    if source != target:
        for file in (file for pattern in COMPANIONS for file in sorted(source.glob(pattern)) if file.is_file()):
            with writing(target / file.name) as partial:
                partial.write_bytes(file.read_bytes())
    text.save_pretrained(target)
    written = read_json(target / "config.json")
    if (both := write_both_dialects(written)) != written:
        write_json(target / "config.json", both)


def check_text_model(folder: Path) -> None:
    """Check that the text model in `folder` has every tensor that its config.json makes, each in the right shape.

    transformers would fill what is missing with random values, with no more than a note.

    Raises:
        UserError: a file is damaged, a tensor is missing or of another shape, config.json describes no model.
    """
    _, expected = _text_config(folder, read_json(folder / "config.json"))
    _kept({file: read_header(file) for file in weight_files(folder)}, expected, folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        UserError: the index is damaged, names a file outside the folder, or one that is missing.
    """
    if not (folder / INDEX).exists():
        return sorted(folder.glob("*.safetensors"))
    names = set((read_json(folder / INDEX).get("weight_map") or {}).values())
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / INDEX} names {name!r}, which is not in its folder; copy or download it again")
    return [folder / name for name in sorted(names)]


def read_header(file: Path) -> list[Tensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        UserError: it is damaged or cut off.
    """
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if not 0 < length <= file.stat().st_size - 8:
                raise ValueError("its header is cut off")
            entries = {name: one for name, one in json.loads(content.read(length)).items() if name != "__metadata__"}
        tensors = [Tensor(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
        if any(not 0 <= t.begin <= t.end for t in tensors) or (tensors and _data(file) + tensors[-1].end > _size(file)):
            raise ValueError("its data are cut off")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}). Copy or download it again") from None
    return tensors


def left_out(shards: dict[Path, list[Tensor]], kept: dict[Path, dict[str, str]], borrowing: set[int]) -> list[str]:
    """A line for each part of a whole model that its text model is without: its name, tensors and size.

    Args:
        kept: names of tensors that stay, for each file.
        borrowing: numbers of the layers that have no keys and values of their own.
    """
    parts = dict[str, list[Tensor]]()
    for file, tensors in shards.items():
        for tensor in tensors:
            if tensor.name not in kept[file]:
                parts.setdefault(_part(tensor.name, borrowing), []).append(tensor)
    return [
        f"left out: {part}, {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors) / 1e6:,.1f} MB"
        for part, tensors in parts.items()
    ]


def _part(name: str, borrowing: set[int]) -> str:
    new = text_name(name)
    if new is None:
        return name.removeprefix("model.").partition(".")[0]  # vision_tower, audio_tower, embed_vision ...
    found = BORROWED.fullmatch(new)
    if found and int(found[1]) in borrowing:
        return "k_proj, v_proj and k_norm of the layers that borrow keys and values, where nothing reads them"
    return f"{new}, which this text model does not have"


def _text_config(source: Path, config: dict[str, Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """transformers' configuration of the text model, and the shape of each of its tensors; the tied head is none.

    Raises:
        UserError: the model is quantized, or its config.json describes none.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    family = family_of(config, source)
    if "quantization_config" in config or "quantization_config" in text_config(config):
        raise UserError(f"{source} is quantized; use the folder of the unquantized model")
    try:
        whole = AutoConfig.from_pretrained(source)
        text = whole.get_text_config()
        text.architectures = [family.text]
        text.tie_word_embeddings = bool(getattr(whole, "tie_word_embeddings", True))
        text.dtype = whole.dtype or text.dtype
        ends = config.get("eos_token_id")
        if family.title == "Gemma 4" and ends is not None and not (source / "generation_config.json").exists():
            text.eos_token_id = ends  # the whole model's, which may be several, is named nowhere else
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(text).state_dict()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise UserError(f"{source / 'config.json'} describes no model: {' '.join(str(error).split())}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if text.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return text, shapes


def _kept(
    shards: dict[Path, list[Tensor]], expected: dict[str, tuple[int, ...]], source: Path
) -> dict[Path, dict[str, str]]:
    """For each file: name in the whole model → name in the text model, of the tensors that the latter has.

    Raises:
        UserError: one is missing, there twice, or of another shape.
    """
    kept: dict[Path, dict[str, str]] = {file: {} for file in shards}
    found: dict[str, Tensor] = {}
    for file, tensors in shards.items():
        for tensor in tensors:
            new = tensor.name if tensor.name in expected else text_name(tensor.name)
            if new is None or new not in expected:
                continue
            if new in found:
                raise UserError(f"{file} holds {tensor.name}, which is {found[new].name} again; download it anew")
            if tensor.shape != expected[new]:
                made = list(expected[new])
                raise UserError(f"{file}: {tensor.name} has shape {list(tensor.shape)}, config.json makes it {made}")
            kept[file][tensor.name], found[new] = new, tensor
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(
            f"{source} lacks {len(missing)} tensors of its text model, {missing[0]} among them; copy it again"
        )
    return kept


def _copy_tensors(file: Path, target: Path, tensors: list[tuple[Tensor, str]]) -> None:
    """Write `tensors` of `file`, each with its new name, to the safetensors file `target`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, name in tensors:
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    start = _data(file)
    with file.open("rb") as content, writing(target) as partial, partial.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for tensor, _ in tensors:
            content.seek(start + tensor.begin)
            left = tensor.nbytes
            while left:
                block = content.read(min(BLOCK, left))
                if not block:
                    raise UserError(f"{file} is cut off. Copy or download it again")
                out.write(block)
                left -= len(block)


def _data(file: Path) -> int:
    """Where the data begin, after the header."""
    with file.open("rb") as content:
        return 8 + int.from_bytes(content.read(8), "little")


def _size(file: Path) -> int:
    return file.stat().st_size
