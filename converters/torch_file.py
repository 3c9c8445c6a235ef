"""A file of `torch.save`, alone or inside another file, tensor by tensor: read lazily, and written so too.

Such a file is a zip archive of uncompressed records: `data.pkl`, which says what the tensors are, and `data/0`,
`data/1` … with their bytes. Only the former is unpickled, with `weights_only=True` and onto the device "meta": shapes,
dtypes, and where in the file a storage begins. A record is read when its tensor is asked for, and checked against the
archive's CRC, so that a flipped bit is found.
"""

import io
import os
import pickle
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from converters.checkpoint import Lazy
from converters.safetensors_file import as_bytes
from converters.spans import Span, damaged
from core.errors import UserError

MAX_PICKLE = 64 * 2**20  # bytes: what names a hundred thousand tensors


def read_tensors(span: Span) -> dict[str, Lazy]:
    """The tensors of a file: their keys, joined with dots where they are nested, → tensors. A tensor alone is `""`.

    Raises:
        UserError: damaged, of PyTorch before 1.6, of a big-endian machine; it would run code, or holds no tensors.
    """
    # Transformer Engine's older `_extra_state` are BytesIO objects; nothing else is allowed that is not by default.
    with damaged(span.name), span.open() as file, torch.serialization.safe_globals([io.BytesIO]):
        records = _records(file, span)
        try:
            structure = torch.load(file, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = re.split(r"\. |\n", str(error).partition("WeightsUnpickler error: ")[2])[0]
            raise UserError(
                f"{span.name} is refused: it holds more than tensors, and would run code ({reason})"
            ) from None
        found = {key: _lazy(tensor, records, span, key) for key, tensor in _tensors(structure)}
    if not found:
        raise UserError(f"{span.name} holds something else than tensors by name")
    return found


def _records(file: BinaryIO, span: Span) -> dict[int, tuple[int, int]]:
    """Where a record's bytes begin → their number and CRC. Refuses what is packed: it could unpack to any size."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise UserError(f"{span.name} is refused: its record {record.filename!r} is compressed")
            if "/data/" not in record.filename:  # what torch.load reads, which checks no CRC
                if record.file_size > MAX_PICKLE:
                    raise UserError(f"{span.name} is refused: {record.filename!r} has {record.file_size:,} bytes")
                if archive.read(record) != b"little" and record.filename.endswith("/byteorder"):
                    raise UserError(f"{span.name} was written on a big-endian machine; save it again on another")
            found[_data_offset(file, record)] = (record.file_size, record.CRC)
    file.seek(0)
    return found


def _data_offset(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    file.seek(record.header_offset + 26)  # the local header's lengths: its padding is not in the directory
    name, extra = struct.unpack("<HH", file.read(4))
    return record.header_offset + 30 + name + extra


def _tensors(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, Mapping):
        for name, content in value.items():
            yield from _tensors(content, f"{key}.{name}" if key else f"{name}")


def _lazy(tensor: Tensor, records: Mapping[int, tuple[int, int]], span: Span, key: str) -> Lazy:
    where = f"{span.name}: {key or 'its tensor'}"
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
        with damaged(where), span.part(offset, size).open() as file:
            if file.readinto(values.numpy().data) != size or zlib.crc32(values.numpy().data) != crc:
                raise UserError(f"{where} has damaged bytes. Copy or download the file again")
            return values.view(tensor.dtype).as_strided(shape, stride, start)

    return Lazy(tuple(shape), tensor.dtype, read)


def write_tensors(
    tensors: Mapping[str, Lazy], file: BinaryIO, header: Callable[[int], bytes] = lambda size: b""
) -> None:
    """Write to `file`, where it stands, what `torch.save` writes for `tensors`, after a `header` made for its size.

    torch lays out the archive with empty records, which a file system with sparse files does not store. Its bytes are
    then copied between the records, and the tensors into them.
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
                checksums[places[name]] = zlib.crc32(content)
                source.seek(file.write(content), os.SEEK_CUR)
            _copy(source, file, begin + size - file.tell())
            end = file.tell()
            for place, value in _checksum_places(source, checksums):
                file.seek(begin + place)
                file.write(struct.pack("<I", value))
            file.seek(end)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        size -= target.write(source.read(min(size, 2**20)))


def _checksum_places(layout: BinaryIO, checksums: Mapping[int, int]) -> list[tuple[int, int]]:
    """Where in the archive each record's CRC stands, twice: after its bytes, and in the directory at the end."""
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
