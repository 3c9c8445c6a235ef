"""What `torch.save` wrote, read without running what it holds and without reading what is not asked for.

Such a file is a zip with a pickled structure and one record for each storage. `torch.load(weights_only=True)` reads the
structure, under FakeTensorMode: shapes, dtypes, and where in the file a storage begins, but no data. A record is then
read when its tensor is asked for, through zipfile, which compares its checksum. So neither a `.ckpt` inside a `.nemo`
nor one tensor of a `.distcp` needs to be unpacked, and a flipped bit is found.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import filesystem, metadata, planner

from converters.checkpoint import Lazy
from converters.spans import Span, damaged
from nemo_configs.command_line import UserError

BLOCK = 1 << 24


def read_tensors(span: Span) -> dict[str, Lazy]:
    """The tensors of a file: their keys, joined with dots where they are nested, → tensors.

    Raises:
        UserError: damaged, of PyTorch before 1.6, or holding more than tensors and plain values.
    """
    # Transformer Engine's older `_extra_state` are BytesIO objects; nothing else is allowed that is not by default.
    with damaged(span.name), span.open() as file:
        records = _records(file, span)
        with FakeTensorMode(), torch.serialization.safe_globals([io.BytesIO]):
            structure = torch.load(file, map_location="cpu", weights_only=True)
        return {key: _lazy(tensor, records, span, key) for key, tensor in _tensors(structure)}


def _records(file: Any, span: Span) -> dict[int, zipfile.ZipInfo]:
    """Where a record's data begins → the record."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > span.length for info in infos):
            raise UserError(f"{span.name} is compressed, or says it is larger than it is: PyTorch's files are not")
        if any(archive.read(info) != b"little" for info in infos if info.filename.endswith("/byteorder")):
            raise UserError(f"{span.name} was written on a big-endian machine; save it again on another")
        found = {}
        for info in infos:
            file.seek(info.header_offset + 26)  # the local header's lengths: its padding is not in the directory
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            found[info.header_offset + 30 + name + extra] = info
    file.seek(0)
    return found


def _tensors(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, Mapping):
        for name, content in value.items():
            yield from _tensors(content, f"{key}.{name}" if key else f"{name}")


def _lazy(fake: Tensor, records: dict[int, zipfile.ZipInfo], span: Span, key: str) -> Lazy:
    shape, stride, offset = tuple(fake.shape), fake.stride(), fake.storage_offset()
    record = records.get(cast(int, fake.untyped_storage()._checkpoint_offset))
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if fake.numel() and (record is None or (last + 1) * fake.dtype.itemsize > record.file_size):
        raise UserError(f"{span.name} is damaged: {key or 'its tensor'} reaches beyond its data")

    def read() -> Tensor:
        if not fake.numel():
            return torch.empty(shape, dtype=fake.dtype)
        with damaged(f"{span.name}: {key or 'its tensor'}"), span.open() as file, zipfile.ZipFile(file) as archive:
            assert record is not None
            buffer = bytearray(record.file_size)
            with archive.open(record) as data:
                for start in range(0, len(buffer), BLOCK):
                    buffer[start : start + BLOCK] = data.read(BLOCK)
            return torch.frombuffer(buffer, dtype=fake.dtype).as_strided(shape, stride, offset)

    return Lazy(shape, fake.dtype, read)


# What the index of a distributed checkpoint is made of: records without behaviour. Megatron adds its ranks' plans.
RECORDS = (
    metadata.Metadata, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata,
    metadata.MetadataIndex, metadata.TensorProperties, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo, collections.OrderedDict, planner.SavePlan, planner.WriteItem, planner.WriteItemType,
    planner.TensorWriteData, planner.BytesIOWriteData,
)  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16,
          torch.int32, torch.int64, torch.bool)  # fmt: skip
ALLOWED: dict[tuple[str, str], Any] = {
    **{(record.__module__, record.__name__): record for record in RECORDS},
    **{("torch", f"{dtype}".removeprefix("torch.")): dtype for dtype in DTYPES},
    **{(module, name): PurePosixPath for module in ("pathlib", "pathlib._local")
       for name in ("Path", "PosixPath", "PurePosixPath")},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda _: torch.strided,
}  # fmt: skip


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
