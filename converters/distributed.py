"""Megatron's distributed checkpoints: a folder whose tensors are whole, whatever number of GPUs wrote their pieces.

    metadata.json            {"sharded_backend": "torch_dist" or "zarr", …}
    common.pt                what is no tensor; nothing of a model
    .metadata, *.distcp      torch_dist: an index, and files in which each piece is what `torch.save` writes
    <key>/.zarray, <key>/0.0 zarr: one folder a tensor, one file a piece

All layers of a kind are one tensor [layers, …] under a key without a number, `decoder.layers.mlp.linear_fc2.weight`;
newer ones may number them. Here they are always numbered. Read and written piece by piece.
"""

import collections
import io
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner

from converters.checkpoint import Lazy
from converters.spans import Span, damaged
from converters.torch_file import read_tensors
from core.errors import UserError

CONFIG, COMMON, INDEX, DATA = "metadata.json", "common.pt", ".metadata", "__0_0.distcp"
LAYERS = re.compile(r"(.*\bdecoder\.layers\.)(\d+\.)?(.+)")
MOST_LAYERS = 1000
ZARR_DTYPES = {"bfloat16": torch.bfloat16, "<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}

Open = Callable[[str], AbstractContextManager[BinaryIO]]  # a file's name → the file, open for writing


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: where it begins, and what is in it, of its full number of dimensions."""

    start: tuple[int, ...]
    content: Lazy


def read_distributed(parts: Mapping[str, Span], name: str) -> dict[str, Lazy]:
    """Every tensor of a checkpoint whose files are `parts`; `name` is what to call it in a message.

    Raises:
        UserError: damaged, incomplete or hostile; of another backend.
    """
    if CONFIG not in parts:
        raise UserError(f"{name} has no {CONFIG}, which every distributed checkpoint of Megatron has")
    with damaged(f"{parts[CONFIG].name}"):
        backend = json.loads(parts[CONFIG].read())["sharded_backend"]
    if backend not in ("torch_dist", "zarr"):
        raise UserError(f"{name} is of the backend {backend!r}; torch_dist and zarr are known")
    if backend == "torch_dist" and INDEX not in parts:
        raise UserError(f"{name} has no {INDEX}: it is no whole checkpoint")
    found: dict[str, Lazy] = {}
    for key, shape, dtype, pieces in (_torch_dist if backend == "torch_dist" else _zarr)(parts):
        match = LAYERS.fullmatch(key)
        if match and not match[2] and shape:
            if shape[0] > MOST_LAYERS:
                raise UserError(f"{name} is damaged: {key} says that it has {shape[0]:,} layers")
            for layer in range(shape[0]):
                read = partial(_read_layer, layer, shape[1:], pieces, dtype, f"{name}: {key}, layer {layer}")
                found[f"{match[1]}{layer}.{match[3]}"] = Lazy(shape[1:], dtype, read)
        else:
            read = partial(_read_box, (0,) * len(shape), shape, pieces, dtype, f"{name}: {key}")
            found[key] = Lazy(shape, dtype, read)
    return found


Found = tuple[str, tuple[int, ...], torch.dtype, list[Piece]]


def _torch_dist(parts: Mapping[str, Span]) -> Iterator[Found]:
    index, places = read_index(parts[INDEX]), collections.defaultdict(list)
    with damaged(parts[INDEX].name):
        for item, place in index.storage_data.items():
            places[item.fqn].append((item.offset, place))
        for key, entry in index.state_dict_metadata.items():
            if isinstance(entry, metadata.TensorStorageMetadata):
                sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
                pieces = [
                    Piece(tuple(start), _slice(parts, place, sizes[tuple(start)], entry.properties.dtype, key))
                    for start, place in places[key]
                ]
                yield key, tuple(entry.size), entry.properties.dtype, pieces


# What the index of a distributed checkpoint is made of: records without behaviour. Megatron adds its ranks' plans.
RECORDS = (
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.MetadataIndex,
    metadata.TensorProperties,
    metadata.StorageMeta,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    collections.OrderedDict,
    planner.SavePlan,
    planner.WriteItem,
    planner.WriteItemType,
    planner.TensorWriteData,
    planner.BytesIOWriteData,
)
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
ALLOWED: dict[tuple[str, str], Any] = {
    **{(record.__module__, record.__name__): record for record in RECORDS},
    **{("torch", f"{dtype}".removeprefix("torch.")): dtype for dtype in DTYPES},
    **{
        (module, name): PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath")
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda _: torch.strided,
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(f"it asks for {module}.{name}, which no checkpoint's index needs: not one to trust")
        return ALLOWED[module, name]


def read_index(span: Span) -> metadata.Metadata:
    """The `.metadata` of a checkpoint of torch.distributed.checkpoint.

    Raises:
        UserError: damaged, or asking for anything but the classes of such an index.
    """
    with damaged(span.name):
        try:
            index = _MetadataUnpickler(io.BytesIO(span.read())).load()
        except UserError as error:
            raise UserError(f"{span.name}: {error}") from None
        if not isinstance(index, metadata.Metadata) or not isinstance(index.storage_data, dict):
            raise UserError(f"{span.name} is no index of a distributed checkpoint")
        return index


def _slice(parts: Mapping[str, Span], place: Any, shape: tuple[int, ...], dtype: torch.dtype, key: str) -> Lazy:
    if place.transform_descriptors:
        raise UserError(f"{key} was stored with {place.transform_descriptors}, which is not known here")
    if place.relative_path not in parts:
        raise UserError(f"{place.relative_path} is missing, which holds a part of {key}: the checkpoint is not whole")
    span = parts[place.relative_path].part(place.offset, place.length)

    def read() -> Tensor:
        tensors = list(read_tensors(span).values())
        if [(tensor.shape, tensor.dtype) for tensor in tensors] != [(shape, dtype)]:
            raise UserError(f"{span.name} is damaged: a part of {key} has another shape or dtype than its index says")
        return tensors[0].read()

    return Lazy(shape, dtype, read)


def _zarr(parts: Mapping[str, Span]) -> Iterator[Found]:
    for path in parts:
        if not path.endswith("/.zarray"):
            continue
        key = path.removesuffix("/.zarray")
        with damaged(parts[path].name):
            array = json.loads(parts[path].read())
            shape, chunk = tuple(array["shape"]), tuple(array["chunks"])
            if array["compressor"] or array["filters"] or array["order"] != "C" or array["dtype"] not in ZARR_DTYPES:
                raise UserError(f"{parts[path].name} is stored in a way that Megatron never does")
            dtype, separator = ZARR_DTYPES[array["dtype"]], array.get("dimension_separator", ".")
            pieces = []
            for place in itertools.product(*[range(math.ceil(n / c)) for n, c in zip(shape, chunk, strict=True)]):
                file = f"{key}/{separator.join(map(str, place)) or '0'}"
                if file not in parts:
                    raise UserError(f"{file} is missing: the checkpoint is not whole")
                start = tuple(number * step for number, step in zip(place, chunk, strict=True))
                pieces.append(Piece(start, Lazy(chunk, dtype, partial(_read_raw, parts[file], chunk, dtype))))
        yield key, shape, dtype, pieces


def _read_raw(span: Span, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    expected = torch.Size(shape).numel() * dtype.itemsize
    if span.length != expected:
        raise UserError(f"{span.name} is cut off: it has {span.length:,} bytes in place of {expected:,}")
    return torch.frombuffer(bytearray(span.read(limit=span.length)), dtype=dtype).reshape(shape)


def _read_layer(layer: int, shape: tuple[int, ...], pieces: Iterable[Piece], dtype: torch.dtype, name: str) -> Tensor:
    return _read_box((layer, *[0] * len(shape)), (1, *shape), pieces, dtype, name)[0]


def _read_box(
    start: tuple[int, ...], shape: tuple[int, ...], pieces: Iterable[Piece], dtype: torch.dtype, name: str
) -> Tensor:
    """The box of `shape` at `start`, put together from the pieces that it meets."""
    box, out, filled = list(zip(start, shape, strict=True)), None, 0
    for piece in pieces:
        meets = [
            (max(a, p), min(a + n, p + size))
            for (a, n), p, size in zip(box, piece.start, piece.content.shape, strict=True)
        ]
        if any(first >= last for first, last in meets):
            continue
        source = tuple(slice(first - p, last - p) for (first, last), p in zip(meets, piece.start, strict=True))
        target = tuple(slice(first - a, last - a) for (first, last), a in zip(meets, start, strict=True))
        content = piece.content.read()[source]
        if content.shape == shape:
            return content  # most often one piece is all: no second copy in memory
        out = torch.empty(shape, dtype=dtype) if out is None else out
        out[target] = content
        filled += content.numel()
    if out is None or filled != out.numel():
        raise UserError(f"{name} is not whole: pieces of it are missing")
    return out


def write_distributed(tensors: Mapping[str, Lazy], open_file: Open) -> None:
    """Write `tensors` (layers numbered from 0, all of them) as torch_dist, one layer of a tensor a piece.

    Args:
        open_file: makes a file of a name that is given to it.
    """
    entries: dict[str, metadata.TensorStorageMetadata] = {}
    places: dict[metadata.MetadataIndex, Any] = {}
    layers = 1 + max([int(match[2][:-1]) for key in tensors if (match := LAYERS.fullmatch(key)) and match[2]] + [-1])
    with open_file(DATA) as file:
        for name, lazy in tensors.items():
            match = LAYERS.fullmatch(name)
            key = f"{match[1]}{match[3]}" if match else name
            start = (int(match[2][:-1]), *[0] * len(lazy.shape)) if match else (0,) * len(lazy.shape)
            tensor = lazy.read().reshape((1, *lazy.shape) if match else lazy.shape)
            offset = file.tell()
            # A slice would bring along the whole storage that it was cut from.
            torch.save(tensor if tensor.untyped_storage().nbytes() == lazy.nbytes else tensor.clone(), file)
            size = torch.Size((layers, *lazy.shape) if match else lazy.shape)
            properties = metadata.TensorProperties(dtype=lazy.dtype)
            entry = entries.setdefault(key, metadata.TensorStorageMetadata(properties, size, []))
            index = metadata.MetadataIndex(key, start, len(entry.chunks))
            entry.chunks.append(metadata.ChunkStorageMetadata(torch.Size(start), tensor.shape))
            places[index] = filesystem._StorageInfo(DATA, offset, file.tell() - offset)
    index_of_all = metadata.Metadata(dict(entries), {key: (key,) for key in entries}, places, metadata.StorageMeta())
    with open_file(INDEX) as file:
        file.write(pickle.dumps(index_of_all))
    with open_file(COMMON) as file:
        torch.save({}, file)
    with open_file(CONFIG) as file:
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        file.write(json.dumps({**backend, "common_backend": "torch", "common_backend_version": 1}).encode())
