"""Opens files that are packed: gzip, bzip2, xz, Zstandard and LZ4, and zip archives of one file.

They are unpacked as they are read, nothing is written to the disk. What unpacks to much more than a table can is
stopped: a few bytes can stand for any number of gigabytes.
"""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from core.errors import UserError

# Tables shrink to a fifth or a twentieth, the most monotonous logs to a hundredth.
USUAL, TIMES = 1 << 30, 200  # bytes that any file may unpack to, and how many times its size a larger one


@dataclass(frozen=True)
class Packing:
    """A way to pack a file.

    Attributes:
        name: with its article.
        open: gives the unpacked bytes of a file.
        command: unpacks it, its name to follow.
    """

    name: str
    magic: bytes
    open: Callable[[BinaryIO], Any]
    command: str


def _open_with_arrow(codec: str) -> Callable[[BinaryIO], Any]:
    def opened(file: BinaryIO) -> Any:
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file), codec)

    return opened


def _open_member(file: BinaryIO) -> Any:
    archive = zipfile.ZipFile(file)
    return archive.open(_members(archive)[0])


PACKINGS = (
    Packing("a gzip archive", b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file), "gunzip -k"),
    Packing("a bzip2 archive", b"BZh", bz2.BZ2File, "bunzip2 -k"),
    Packing("an xz archive", b"\xfd7zXZ\x00", lzma.LZMAFile, "unxz -k"),
    Packing("a Zstandard archive", b"\x28\xb5\x2f\xfd", _open_with_arrow("zstd"), "zstd -d"),
    Packing("an LZ4 archive", b"\x04\x22\x4d\x18", _open_with_arrow("lz4"), "lz4 -d"),
    Packing("a zip archive", b"PK\x03\x04", _open_member, "unzip"),
)
# What else is a zip archive, by a file in it.
OFFICE = {
    "xl/workbook.xml": "an Excel workbook; save the sheet as CSV UTF-8",
    "xl/workbook.bin": "an Excel workbook; save the sheet as CSV UTF-8",
    "word/document.xml": "a Word document; write its rows to a CSV",
    "content.xml": "an OpenDocument file; save the sheet as CSV UTF-8",
}


def packing_of(path: Path) -> Packing | None:
    """How a file is packed, if it is.

    Raises:
        UserError: it is a zip archive of other than one file, encrypted, or of an office program.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"PK\x05\x06"):
        raise UserError(f"{path} is a zip archive without a file in it")
    packing = next((packing for packing in PACKINGS if head.startswith(packing.magic)), None)
    if packing and packing.open is _open_member:
        _check_zip(path)
    return packing


def inner_name(path: Path) -> str:
    """The name of the file in a packed one: `rows.csv` of rows.csv.gz, and of rows.zip what its member is called."""
    packing = packing_of(path)
    if packing and packing.open is _open_member:
        with zipfile.ZipFile(path) as archive:
            return PurePosixPath(_members(archive)[0].filename).name
    return path.stem if packing else path.name


def open_unpacked(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked. Its `fileno` is that of the file itself, whose position tells the progress.

    Raises:
        UserError: see `packing_of`; and while it is read, where it is damaged or unpacks to more than a table.
    """
    packing = packing_of(path)
    file = path.open("rb")
    return io.BufferedReader(_Unpacking(path, packing, file), 1 << 18) if packing else file


class _Unpacking(io.RawIOBase):
    def __init__(self, path: Path, packing: Packing, file: BinaryIO) -> None:
        self._path, self._packing, self._file, self._unpacked = path, packing, file, 0
        self._most = max(USUAL, TIMES * path.stat().st_size)
        try:
            self._stream = packing.open(file)
        except BaseException:
            file.close()
            raise

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def readinto(self, buffer: Any) -> int:
        try:
            read = bytes(self._stream.read(len(buffer)))
        except UserError:
            raise
        except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError) as error:
            why = str(error).partition("\n")[0][:150]
            raise UserError(f"{self._path} is {self._packing.name} that cannot be unpacked: {why}") from None
        self._unpacked += len(read)
        if self._unpacked > self._most:
            raise UserError(
                f"{self._path} unpacks to over {self._most:,} bytes, more than a table of its size can have. If it is "
                f"one, unpack it first: {self._packing.command} {self._path.name}"
            )
        buffer[: len(read)] = read
        return len(read)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._file.close()
        super().close()


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in an archive, but for what macOS and Windows add."""
    hidden = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")
    found = [member for member in archive.infolist() if not member.is_dir()]
    return [member for member in found if not set(PurePosixPath(member.filename).parts) & set(hidden)]


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is a zip archive that cannot be unpacked: {error}") from None
    names = [member.filename for member in members]
    for inside, what in OFFICE.items():
        if inside in names:
            command = f", or: soffice --headless --convert-to csv {path.name}" if "sheet" in what else ""
            raise UserError(f"{path} is {what}{command}")
    if len(members) != 1:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        example = f": unzip {path.name} {names[0]}" if names else ""
        raise UserError(f"{path} holds {len(names)} files ({listed}); unpack it and name one of them{example}")
    if members[0].flag_bits & 1:
        raise UserError(f"{path} is encrypted; unpack it first: unzip {path.name}")
    most = max(USUAL, TIMES * path.stat().st_size)
    if members[0].file_size > most:
        raise UserError(
            f"{path} unpacks to {members[0].file_size:,} bytes, more than a table of its size can have. If it is one, "
            f"unpack it first: unzip {path.name}"
        )
