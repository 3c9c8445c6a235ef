"""A file of `torch.save`, alone or inside another file, tensor by tensor: read lazily, and written so too.

Such a file is a zip archive of uncompressed records: `data.pkl`, which says what the tensors are, and `data/0`,
`data/1` … with their bytes. Only the former is unpickled, with `weights_only=True`; each record's bytes are checked
against the archive's CRC as they are read, so that a flipped bit is found.
"""

import os
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from converters.checkpoint import Lazy
from converters.safetensors_file import as_bytes
from nemo_configs.command_line import UserError

MAX_PICKLE = 64 * 2**20  # bytes: what names a hundred thousand tensors


class Part:
    """Bytes `begin` to `begin + size` of a file, as a file of their own, for readers that seek and read."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise OSError("seek before the beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        self._file.seek(self._begin + self._at)
        found = self._file.read(left if size < 0 else min(size, left))
        self._at += len(found)
        return found

    def readline(self) -> bytes:  # torch.load asks whether there is one
        raise OSError("not a text")

    def readinto(self, buffer: Any) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def read_tensors(path: Path, begin: int = 0, size: int | None = None) -> dict[str, Lazy]:
    """The tensors of the file of `torch.save` that lies in `path` from byte `begin` on, by their names.

    Raises:
        UserError: it is damaged, or would run code, or holds something else than named tensors.
    """
    size = path.stat().st_size - begin if size is None else size
    try:
        with path.open("rb") as file:
            records = _records(Part(file, begin, size), path)
            state = torch.load(cast(BinaryIO, Part(file, begin, size)), map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it holds more than tensors, and would run code ({_short(error)})"
        ) from None
    except Exception as error:  # whatever a damaged archive makes the readers of zip and pickle raise
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} holds no whole file of torch.save ({type(error).__name__}: {_short(error)})") from None
    if isinstance(state, dict) and isinstance(state.get("model_state_dict"), dict):
        state = state["model_state_dict"]  # as Google's have them
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path} holds something else than tensors by name")
    return {name: _lazy(name, tensor, path, begin, records) for name, tensor in state.items()}


def _short(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]


def _records(part: Part, path: Path) -> dict[int, tuple[int, int]]:
    """Where a record's bytes begin → their number and CRC. Refuses what is packed: it could unpack to any size."""
    found = {}
    with zipfile.ZipFile(cast(BinaryIO, part)) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise UserError(f"{path} is refused: its record {record.filename!r} is compressed")
            if record.filename.endswith("data.pkl"):
                if record.file_size > MAX_PICKLE:
                    raise UserError(f"{path} is refused: its list of tensors has {record.file_size:,} bytes")
                archive.read(record)  # checks its CRC
            part.seek(record.header_offset + 26)
            name, extra = struct.unpack("<HH", part.read(4))
            found[record.header_offset + 30 + name + extra] = (record.file_size, record.CRC)
    return found


def _lazy(name: str, tensor: Tensor, path: Path, begin: int, records: Mapping[int, tuple[int, int]]) -> Lazy:
    storage = tensor.untyped_storage()
    offset: int = getattr(storage, "_checkpoint_offset", -1)
    size, crc = records.get(offset, (-1, 0))
    last = tensor.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if size != storage.nbytes() or (tensor.numel() and not (last + 1) * tensor.itemsize <= size) or tensor.is_sparse:
        raise UserError(f"{path}: {name} does not lie in the file as it says. Copy or download it again")

    def read() -> Tensor:
        with path.open("rb") as file:
            file.seek(begin + offset)
            values = torch.empty(size, dtype=torch.uint8)
            if file.readinto(values.numpy().data) != size or zlib.crc32(values.numpy().data) != crc:
                raise UserError(f"{path}: the bytes of {name} are damaged. Copy or download it again")
        return values.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return Lazy(tuple(tensor.shape), tensor.dtype, read)


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
        places = {name: tensor.untyped_storage()._checkpoint_offset
                  for name, tensor in torch.load(layout, map_location="meta", weights_only=True).items()}  # fmt: skip
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
            layout.seek(record.header_offset + 26)
            name, extra = struct.unpack("<HH", layout.read(4))
            data = record.header_offset + 30 + name + extra
            if data in checksums:
                places += [(at + 16, checksums[data])]  # PKZIP APPNOTE 4.3.12
                layout.seek(data + record.file_size)
                if layout.read(4) == b"PK\x07\x08":  # 4.3.9, the data descriptor
                    places += [(data + record.file_size + 4, checksums[data])]
            layout.seek(at + 28)
            at += 46 + sum(struct.unpack("<HHH", layout.read(6)))
    return places
