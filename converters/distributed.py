"""Megatron's distributed checkpoints: folders of sharded tensors, independent of the number of GPUs that wrote them.

    metadata.json            {"sharded_backend": "torch_dist" or "zarr", …}
    common.pt                everything but tensors; nothing of a model
    .metadata, *.distcp      torch_dist: an index, and files in which each shard is what `torch.save` writes
    <key>/.zarray, <key>/0.0 zarr: one folder per tensor, one file per shard

A parameter of all layers is one tensor [layers, …] under a key without a number,
`decoder.layers.mlp.linear_fc2.weight`; newer checkpoints may number the layers. Here they are always numbered. Tensors
are read and written shard by shard.
"""

import collections
import contextlib
import io
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner

from converters.byte_ranges import ByteRange, parsing
from converters.checkpoint import LazyTensor, read_ahead
from converters.torch_file import read_tensors, write_tensor
from core.errors import UserError

CONFIG, COMMON, INDEX, DATA = "metadata.json", "common.pt", ".metadata", "__{}_0.distcp"
LAYERS = re.compile(r"(.*\bdecoder\.layers\.)(\d+\.)?(.+)")
MOST_LAYERS = 1000
ZARR_DTYPES = {"bfloat16": torch.bfloat16, "<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}

OpenFile = Callable[[str], AbstractContextManager[BinaryIO]]  # a file's name → the file, open for writing


@dataclass(frozen=True)
class Shard:
    """A box of a tensor: the indices of its first element, and its content, which has all dimensions of the tensor."""

    start: tuple[int, ...]
    content: LazyTensor


def read_distributed(parts: Mapping[str, ByteRange], name: str) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint whose files are `parts`; `name` is for error messages.

    Raises:
        UserError: damaged, incomplete or hostile; of another backend.
    """
    if CONFIG not in parts:
        raise UserError(f"{name} has no {CONFIG}, which every distributed checkpoint of Megatron has")
    with parsing(f"{parts[CONFIG].name}"):
        backend = json.loads(parts[CONFIG].read())["sharded_backend"]
    if backend not in ("torch_dist", "zarr"):
        raise UserError(f"{name} is of the backend {backend!r}; torch_dist and zarr are known")
    if backend == "torch_dist" and INDEX not in parts:
        raise UserError(f"{name} has no {INDEX}: it is no whole checkpoint")
    found: dict[str, LazyTensor] = {}
    for key, shape, dtype, shards in (_torch_dist if backend == "torch_dist" else _zarr)(parts):
        match = LAYERS.fullmatch(key)
        if match and not match[2] and shape:
            if shape[0] > MOST_LAYERS:
                raise UserError(f"{name} is damaged: {key} says that it has {shape[0]:,} layers")
            for layer in range(shape[0]):
                read = partial(_read_layer, layer, shape[1:], shards, dtype, f"{name}: {key}, layer {layer}")
                found[f"{match[1]}{layer}.{match[3]}"] = LazyTensor(shape[1:], dtype, read)
        else:
            read = partial(_read_box, (0,) * len(shape), shape, shards, dtype, f"{name}: {key}")
            found[key] = LazyTensor(shape, dtype, read)
    return found


Box = tuple[tuple[int, int], ...]  # first index and the one after the last, in each dimension
ShardedTensor = tuple[str, tuple[int, ...], torch.dtype, list[Shard]]


def _torch_dist(parts: Mapping[str, ByteRange]) -> Iterator[ShardedTensor]:
    """
    Raises:
        UserError: damaged. One bit may make an index name the place of another shard of the same shape, which no
            comparison of what is read with what is written would show.
    """
    index, places = read_index(parts[INDEX]), collections.defaultdict(list)
    with parsing(parts[INDEX].name):
        taken = set()
        for item, place in index.storage_data.items():
            if item.offset is None:  # no tensor
                continue
            if (at := (place.relative_path, place.offset)) in taken:
                raise UserError(f"{parts[INDEX].name} is damaged: a part of {item.fqn} has the place of another")
            taken.add(at)
            places[item.fqn].append((item.offset, place))
        for key, entry in index.state_dict_metadata.items():
            if isinstance(entry, metadata.TensorStorageMetadata):
                shape, dtype = tuple(entry.size), entry.properties.dtype
                if not isinstance(key, str) or not all(type(length) is int and length >= 0 for length in shape):
                    raise ValueError(f"{key} has the shape {shape}")
                sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
                shards = [
                    Shard(tuple(start), _slice(parts, place, sizes[tuple(start)], dtype, key))
                    for start, place in places[key]
                ]
                yield key, shape, dtype, shards


# The classes in the index of a distributed checkpoint, all of them plain records. Megatron adds its ranks' save plans.
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


# Python's own, as C's cannot be told what BUILD may change: it would set attributes of the classes themselves, also of
# PurePosixPath, which all paths of this process have. And there the number of a memo may reserve any amount of memory.
Unpickler: Any = pickle._Unpickler


class _MetadataUnpickler(Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(Unpickler.dispatch)

    def load_build(self) -> None:
        if type(self.stack[-2]) not in RECORDS:
            raise UserError("it changes what is no record of its own: not one to trust")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(f"it asks for {module}.{name}, which no checkpoint's index needs: not one to trust")
        return ALLOWED[module, name]


def read_index(byte_range: ByteRange) -> metadata.Metadata:
    """The `.metadata` of a checkpoint of torch.distributed.checkpoint.

    Raises:
        UserError: damaged, or asking for anything but the classes of such an index.
    """
    with parsing(byte_range.name):
        try:
            index = _MetadataUnpickler(io.BytesIO(byte_range.read())).load()
        except UserError as error:
            raise UserError(f"{byte_range.name}: {error}") from None
        if not isinstance(index, metadata.Metadata) or not isinstance(index.storage_data, dict):
            raise UserError(f"{byte_range.name} is no index of a distributed checkpoint")
        return index


def _slice(
    parts: Mapping[str, ByteRange], place: Any, shape: tuple[int, ...], dtype: torch.dtype, key: str
) -> LazyTensor:
    if place.transform_descriptors:
        raise UserError(f"{key} was stored with {place.transform_descriptors}, which is not known here")
    if place.relative_path not in parts:
        raise UserError(f"{place.relative_path} is missing, which holds a part of {key}: the checkpoint is not whole")
    byte_range = parts[place.relative_path].part(place.offset, place.length)

    def read() -> Tensor:
        tensors = list(read_tensors(byte_range).values())
        if [(tensor.shape, tensor.dtype) for tensor in tensors] != [(shape, dtype)]:
            raise UserError(
                f"{byte_range.name} is damaged: a part of {key} has another shape or dtype than its index says"
            )
        return tensors[0].read()

    return LazyTensor(shape, dtype, read)


def _zarr(parts: Mapping[str, ByteRange]) -> Iterator[ShardedTensor]:
    for path in parts:
        if not path.endswith("/.zarray"):
            continue
        key = path.removesuffix("/.zarray")
        with parsing(parts[path].name):
            array = json.loads(parts[path].read())
            shape, chunk = tuple(array["shape"]), tuple(array["chunks"])
            if array["compressor"] or array["filters"] or array["order"] != "C" or array["dtype"] not in ZARR_DTYPES:
                raise UserError(f"{parts[path].name} is stored in a way that Megatron never does")
            dtype, separator = ZARR_DTYPES[array["dtype"]], array.get("dimension_separator", ".")
            shards = []
            for place in itertools.product(*[range(math.ceil(n / c)) for n, c in zip(shape, chunk, strict=True)]):
                file = f"{key}/{separator.join(map(str, place)) or '0'}"
                if file not in parts:
                    raise UserError(f"{file} is missing: the checkpoint is not whole")
                start = tuple(number * step for number, step in zip(place, chunk, strict=True))
                shards.append(Shard(start, LazyTensor(chunk, dtype, partial(_read_raw, parts[file], chunk, dtype))))
        yield key, shape, dtype, shards


def _read_raw(byte_range: ByteRange, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    expected = torch.Size(shape).numel() * dtype.itemsize
    if byte_range.length != expected:
        raise UserError(f"{byte_range.name} is cut off: it has {byte_range.length:,} bytes in place of {expected:,}")
    return torch.frombuffer(bytearray(byte_range.read(limit=byte_range.length)), dtype=dtype).reshape(shape)


def _read_layer(layer: int, shape: tuple[int, ...], shards: Iterable[Shard], dtype: torch.dtype, name: str) -> Tensor:
    return _read_box((layer, *[0] * len(shape)), (1, *shape), shards, dtype, name)[0]


def _read_box(
    start: tuple[int, ...], shape: tuple[int, ...], shards: Iterable[Shard], dtype: torch.dtype, name: str
) -> Tensor:
    """The box of `shape` at `start`, assembled from the shards that overlap it.

    Raises:
        UserError: they do not cover it, or one another.
    """
    end = tuple(first + length for first, length in zip(start, shape, strict=True))
    found: list[tuple[Shard, Box]] = []
    for shard in shards:
        own = [(first, first + length) for first, length in zip(shard.start, shard.content.shape, strict=True)]
        overlap = tuple((max(a, p), min(b, q)) for a, b, (p, q) in zip(start, end, own, strict=True))
        if any(first >= last for first, last in overlap):
            continue
        if any(all(p < b and a < q for (a, b), (p, q) in zip(overlap, box, strict=True)) for _, box in found):
            raise UserError(f"{name} is damaged: shards of it overlap")
        found.append((shard, overlap))
    if sum(math.prod(last - first for first, last in box) for _, box in found) != math.prod(shape):
        raise UserError(f"{name} is not whole: shards of it are missing")
    out = None
    for shard, overlap in found:
        source = tuple(slice(first - p, last - p) for (first, last), p in zip(overlap, shard.start, strict=True))
        content = shard.content.read()[source]
        if content.shape == shape:
            return content  # most often it is one shard: no second copy in memory
        out = torch.empty(shape, dtype=dtype) if out is None else out
        out[tuple(slice(first - a, last - a) for (first, last), a in zip(overlap, start, strict=True))] = content
    return torch.empty(shape, dtype=dtype) if out is None else out


@dataclass(frozen=True)
class Piece:
    """What is written of the tensor `key`: all of it, or one of the `count` that are stacked along a first dimension,
    such as its layers."""

    key: str
    content: LazyTensor
    index: int | None = None
    count: int = 0


def stack_layers(tensors: Mapping[str, LazyTensor]) -> list[Piece]:
    """`tensors`, with all layers numbered from 0, as a checkpoint has them: one tensor over the layers."""
    found = {name: match for name in tensors if (match := LAYERS.fullmatch(name)) and match[2]}
    counts = collections.Counter(match[1] + match[3] for match in found.values())
    pieces = []
    for name, lazy in tensors.items():
        match = found.get(name)
        key = match[1] + match[3] if match else name
        pieces.append(Piece(key, lazy, int(match[2][:-1]) if match else None, counts[key]))
    return pieces


def write_distributed(
    pieces: Sequence[Piece],
    open_file: OpenFile,
    files: int = 1,
    objects: Iterable[str] = (),
    common: Mapping[str, Any] | None = None,
) -> None:
    """Write `pieces` as torch_dist.

    Args:
        open_file: opens a new file of the given name for writing, one at a time.
        files: among how many the bytes are divided evenly, a tensor at its rows where need be.
        objects: names of what is no tensor; each is written as None, in the first file.
        common: what common.pt holds: numbers and words.
    """
    index = metadata.Metadata({}, {name: (name,) for name in objects}, {}, metadata.StorageMeta())
    share = math.ceil(sum(piece.content.nbytes for piece in pieces) / files)
    with contextlib.ExitStack() as opened:
        number, name, file = 0, DATA.format(0), opened.enter_context(open_file(DATA.format(0)))
        for key in index.planner_data:  # all of them are one place
            if file.tell() == 0:
                torch.save([None], file)
            index.state_dict_metadata[key] = metadata.BytesStorageMetadata()
            index.storage_data[metadata.MetadataIndex(key)] = filesystem._StorageInfo(name, 0, file.tell())
        for piece, tensor in zip(pieces, read_ahead(piece.content for piece in pieces), strict=True):
            row = 0
            while row < len(tensor):
                if file.tell() >= share and number + 1 < files:
                    opened.close()
                    number, name = number + 1, DATA.format(number + 1)
                    file = opened.enter_context(open_file(name))
                begin, rest = file.tell(), tensor[row:]
                if number + 1 < files:
                    rest = rest[: max(1, (share - begin) // rest[0].nbytes)]
                write_tensor(rest if piece.index is None else rest[None], file)
                _note(index, piece, row, rest, filesystem._StorageInfo(name, begin, file.tell() - begin))
                row += len(rest)
    with open_file(INDEX) as file:
        file.write(pickle.dumps(index))
    with open_file(COMMON) as file:
        torch.save(dict(common or {}), file)
    with open_file(CONFIG) as file:
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        file.write(json.dumps({**backend, "common_backend": "torch", "common_backend_version": 1}).encode())


def _note(index: metadata.Metadata, piece: Piece, row: int, part: Tensor, place: filesystem._StorageInfo) -> None:
    """Note in `index` that `place` has the rows of `piece` from `row` on, which are `part`."""
    stack = () if piece.index is None else (piece.index,)
    whole = torch.Size((piece.count, *piece.content.shape) if stack else piece.content.shape)
    start = torch.Size((*stack, row, *[0] * (part.dim() - 1)))
    size = torch.Size((1, *part.shape) if stack else part.shape)
    entry = index.state_dict_metadata.setdefault(
        piece.key, metadata.TensorStorageMetadata(metadata.TensorProperties(dtype=part.dtype), whole, [])
    )
    assert isinstance(entry, metadata.TensorStorageMetadata)
    if entry.properties.dtype != part.dtype:
        raise UserError(
            f"{piece.key} is one tensor of all layers in this format, and some are {entry.properties.dtype}, others "
            f"{part.dtype}. Save the model in one dtype first"
        )
    index.planner_data[piece.key] = (piece.key,)
    index.storage_data[metadata.MetadataIndex(piece.key, start, len(entry.chunks))] = place
    entry.chunks.append(metadata.ChunkStorageMetadata(start, size))
