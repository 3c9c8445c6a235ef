"""safetensors files, tensor by tensor: read lazily, and written with one tensor in memory at a time.

The library's own `save_file` wants all tensors of a file at once. The format is eight bytes with the length of a JSON
header, the header, and the tensors' bytes end to end (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from converters.checkpoint import LazyTensor
from core.errors import UserError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 2**24  # bytes


def read_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file, by name.

    Raises:
        UserError: the file is damaged, or holds tensors other than 16 or 32-bit floats.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, safe_open is not a dict
        found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    with path.open("rb") as opened:  # the library has checked the header
        start = 8 + int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(start - 8))
    tensors = {}
    for name, (stored, shape) in found.items():
        if stored not in DTYPES:
            raise UserError(
                f"{path}: {name} is of {stored}; only whole models in {', '.join(DTYPES)} are converted: "
                f"convert the one that it was quantized from"
            )
        place = start + header[name]["data_offsets"][0]
        tensors[name] = LazyTensor(shape, DTYPES[stored], partial(_read_one, path, place, shape, DTYPES[stored]))
    return tensors


def _read_one(path: Path, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # Read, not mapped: mapped memory is fetched page by page, which takes several times as long.
    values = torch.empty(shape, dtype=dtype)
    content = as_bytes(values)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(place)
            done = 0
            while count := file.readinto(content[done:]):
                done += count
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    if done != len(content):
        raise UserError(f"{path} is damaged: it has become shorter. Copy or download it again")
    return values


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}). Copy or download it again") from None


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write the file `path`, one tensor in memory at a time."""
    with path.open("wb") as file:
        file.write(header(tensors))
        for name in _order(tensors):
            file.write(as_bytes(tensors[name].read()))


def write_with(source: Path, target: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write the file `target` as `source` is, byte for byte, but with the values of `tensors`, which have the shapes
    and dtypes that they have there."""
    with source.open("rb") as old, target.open("wb") as new:
        start = old.read(8)
        entries = old.read(int.from_bytes(start, "little"))
        new.write(start + entries)
        places = {name: entry["data_offsets"] for name, entry in json.loads(entries).items() if name != "__metadata__"}
        for name, (begin, end) in sorted(places.items(), key=lambda place: place[1]):
            if name in tensors:
                new.write(as_bytes(tensors[name].read()))
                old.seek(end - begin, os.SEEK_CUR)
            else:
                for at in range(begin, end, CHUNK):
                    new.write(old.read(min(CHUNK, end - at)))


def header(tensors: Mapping[str, LazyTensor | Tensor]) -> bytes:
    """The length and the JSON header that precede the bytes of `tensors`."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in _order(tensors):
        tensor, begin, end = tensors[name], end, end + tensors[name].nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(tensors: Mapping[str, LazyTensor | Tensor]) -> list[str]:
    """The library's order: wide dtypes first, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def as_bytes(tensor: Tensor) -> memoryview:
    """The values of `tensor`, row-major and little-endian, without a copy where they are stored so."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if math.prod(tensor.shape) else memoryview(b"")
