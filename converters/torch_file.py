"""Files of `torch.save`, alone or inside another file, tensor by tensor: read lazily, and written one at a time.

Such a file is a zip archive of uncompressed records: `data.pkl`, which describes the tensors, and `data/0`, `data/1` …
with their bytes. Only `data.pkl` is unpickled, with `weights_only=True` and onto the device "meta": it gives shapes,
dtypes, and the offset of each storage. A record is read when its tensor is needed, and verified by the archive's CRC.
"""

import io
import os
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from isal import isal_zlib
from torch import Tensor
from torch._subclasses import FakeTensorMode

from converters.byte_ranges import ByteRange, parsing
from converters.checkpoint import LazyTensor
from converters.safetensors_file import as_bytes
from core.errors import UserError

MAX_PICKLE = 64 * 2**20  # bytes, enough to describe a hundred thousand tensors


def read_tensors(byte_range: ByteRange) -> dict[str, LazyTensor]:
    """The tensors of a file, by key; nested keys are joined with dots, and a single tensor has the key "".

    Raises:
        UserError: damaged, of PyTorch before 1.6, of a big-endian machine; it would run code, or holds no tensors.
    """
    # Transformer Engine's older `_extra_state` are BytesIO objects; otherwise only torch's default classes are allowed.
    with parsing(byte_range.name), byte_range.open() as file, torch.serialization.safe_globals([io.BytesIO]):
        records = _records(file, byte_range)
        try:
            structure = torch.load(file, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = re.split(r"\. |\n", str(error).partition("WeightsUnpickler error: ")[2])[0]
            raise UserError(
                f"{byte_range.name} is refused: it holds more than tensors, and would run code ({reason})"
            ) from None
        found = {key: _lazy(tensor, records, byte_range, key) for key, tensor in _tensors(structure)}
    if not found:
        raise UserError(f"{byte_range.name} holds something else than tensors by name")
    return found


def _records(file: BinaryIO, byte_range: ByteRange) -> dict[int, tuple[int, int]]:
    """Offset of a record → (size, CRC). Compressed records are refused: they could expand to any size."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise UserError(f"{byte_range.name} is refused: its record {record.filename!r} is compressed")
            if "/data/" not in record.filename:  # torch.load reads these, without checking a CRC
                if record.file_size > MAX_PICKLE:
                    raise UserError(f"{byte_range.name} is refused: {record.filename!r} has {record.file_size:,} bytes")
                if archive.read(record) != b"little" and record.filename.endswith("/byteorder"):
                    raise UserError(f"{byte_range.name} was written on a big-endian machine; save it again on another")
            found[_data_offset(file, record)] = (record.file_size, record.CRC)
    file.seek(0)
    return found


def _data_offset(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    file.seek(record.header_offset + 26)  # lengths in the local header, whose padding the directory does not have
    name, extra = struct.unpack("<HH", file.read(4))
    return record.header_offset + 30 + name + extra


def _tensors(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, Mapping):
        for name, content in value.items():
            yield from _tensors(content, f"{key}.{name}" if key else f"{name}")


def _lazy(tensor: Tensor, records: Mapping[int, tuple[int, int]], byte_range: ByteRange, key: str) -> LazyTensor:
    where = f"{byte_range.name}: {key or 'its tensor'}"
    if tensor.layout != torch.strided:
        raise UserError(f"{where} is sparse, which no weight of a Gemma is")
    storage, shape, stride, start = tensor.untyped_storage(), tensor.shape, tensor.stride(), tensor.storage_offset()
    offset: int = getattr(storage, "_checkpoint_offset", -1)
    size, crc = records.get(offset, (-1, 0))
    last = start + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if size != storage.nbytes() or (tensor.numel() and (last + 1) * tensor.itemsize > size):
        raise UserError(f"{where} does not lie in the file as it says. Copy or download it again")

    def read() -> Tensor:
        values = torch.empty(size, dtype=torch.uint8)
        with parsing(where), byte_range.part(offset, size).open() as file:
            if file.readinto(values.numpy().data) != size or isal_zlib.crc32(values.numpy().data) != crc:
                raise UserError(f"{where} has damaged bytes. Copy or download the file again")
            return values.view(tensor.dtype).as_strided(shape, stride, start)

    return LazyTensor(tuple(shape), tensor.dtype, read)


def write_tensors(
    tensors: Mapping[str, LazyTensor], file: BinaryIO, header: Callable[[int], bytes] = lambda size: b""
) -> None:
    """Write what `torch.save` writes for `tensors` at the current position of `file`, after `header(size)`.

    torch writes the archive with empty records to a temporary sparse file. The bytes between the records are then
    copied from it, and the tensors are written into the records, one in memory at a time.
    """
    with FakeTensorMode():
        empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=Path(file.name).parent) as folder:
        layout = Path(folder) / "archive.pt"
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, layout)
        size = layout.stat().st_size
        places = {
            name: tensor.untyped_storage()._checkpoint_offset
            for name, tensor in torch.load(layout, map_location="meta", weights_only=True).items()
        }
        file.write(header(size))
        begin = file.tell()
        checksums: dict[int, int] = {}
        with layout.open("rb") as source:
            for name in sorted(places, key=places.__getitem__):
                _copy(source, file, begin + places[name] - file.tell())
                content = as_bytes(tensors[name].read())
                checksums[places[name]] = isal_zlib.crc32(content)
                source.seek(file.write(content), os.SEEK_CUR)
            _copy(source, file, begin + size - file.tell())
            end = file.tell()
            for place, value in _checksum_places(source, checksums):
                file.seek(begin + place)
                file.write(struct.pack("<I", value))
            file.seek(end)


def write_tensor(tensor: Tensor, file: BinaryIO) -> None:
    """Write what `torch.save` writes for `tensor` at the current position of `file`.

    What is around the values is made once for each shape.
    """
    head, tail, places = _around(tuple(tensor.shape), tensor.dtype)
    content, end = as_bytes(tensor), bytearray(tail)
    for place in places:
        struct.pack_into("<I", end, place, isal_zlib.crc32(content))
    file.writelines([head, content, end])


@lru_cache(maxsize=256)
def _around(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes, list[int]]:
    """What `torch.save` writes before and after the values of such a tensor; where its checksum is in the latter."""
    with FakeTensorMode():
        empty = torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        layout = Path(folder) / "archive.pt"  # sparse
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, layout)
        begin = torch.load(layout, map_location="meta", weights_only=True).untyped_storage()._checkpoint_offset
        end = begin + empty.nbytes
        with layout.open("rb") as source:
            head = source.read(begin)
            source.seek(end)
            tail = source.read()
            return head, tail, [place - end for place, _ in _checksum_places(source, {begin: 0})]


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        size -= target.write(source.read(min(size, 2**20)))


def _checksum_places(layout: BinaryIO, checksums: Mapping[int, int]) -> list[tuple[int, int]]:
    """(offset, CRC) of both places of each record's CRC: after its bytes, and in the directory at the end."""
    places = []
    with zipfile.ZipFile(layout) as archive:
        at = archive.start_dir
        for record in archive.infolist():
            data = _data_offset(layout, record)
            if data in checksums:
                places += [(at + 16, checksums[data])]  # PKZIP APPNOTE 4.3.12
                layout.seek(data + record.file_size)
                if layout.read(4) == b"PK\x07\x08":  # 4.3.9, the data descriptor
                    places += [(data + record.file_size + 4, checksums[data])]
            layout.seek(at + 28)
            at += 46 + sum(struct.unpack("<HHH", layout.read(6)))
    return places
