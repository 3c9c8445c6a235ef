"""Where the bytes of a checkpoint's files lie: in a folder, or inside a tar that is never unpacked.

A `.nemo` of NeMo 1 may be larger than the disk has room for twice, and an archive from elsewhere may name paths outside
its folder. Here a file is a stretch of bytes of one that exists, read where it is.
"""

import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from core.errors import UserError


@dataclass(frozen=True)
class Span:
    """`length` bytes of the file `path` from `start` on; `name` is what to call them in a message."""

    name: str
    path: Path
    start: int
    length: int

    def open(self) -> io.BufferedReader:
        """The bytes as a seekable file of their own."""
        return io.BufferedReader(_Window(self))

    def read(self, limit: int = 1 << 28) -> bytes:
        """All of a small file.

        Raises:
            UserError: it is larger than `limit` bytes.
        """
        if self.length > limit:
            raise UserError(f"{self.name} has {self.length:,} bytes, more than any file of its kind needs")
        with self.open() as file:
            return file.read()

    def part(self, start: int, length: int) -> "Span":
        """
        Raises:
            UserError: it reaches beyond this span, as in a file that was cut off.
        """
        if start < 0 or length < 0 or start + length > self.length:
            raise UserError(f"{self.name} is cut off: it has {self.length:,} bytes, {start + length:,} are needed")
        return Span(self.name, self.path, self.start + start, length)


class _Window(io.RawIOBase):
    def __init__(self, span: Span):
        self._file, self._span, self._at = span.path.open("rb"), span, 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._span.start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(self._span.length - self._at, 0)])
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._span.length}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def damaged(name: str) -> Iterator[None]:
    """Whatever a parser raises on damaged bytes becomes one sentence: there is no end to what that may be.

    Raises:
        UserError: in place of any error.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError:  # most often a length that was damaged
        raise UserError(f"{name} is damaged, or needs more memory than there is") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} is damaged or not what its name says ({type(error).__name__}: {reason})") from None


def whole(path: Path) -> Span:
    """
    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    return Span(f"{path}", path, 0, path.stat().st_size)


def members(path: Path) -> dict[str, Span]:
    """The files of a folder, or of an uncompressed tar: name within it → its bytes.

    Raises:
        UserError: no such file; compressed, damaged or cut off; a name that leads outside or stands twice, a link, a
            device, a sparse file.
    """
    if path.is_dir():
        return {f"{file.relative_to(path)}": whole(file) for file in sorted(path.rglob("*")) if file.is_file()}
    found: dict[str, Span] = {}
    size = whole(path).length
    with damaged(f"{path}"), path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path} is compressed; unpack it (gunzip < {path.name} > plain.nemo) and name that file")
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(
                        f"{path} holds {member.name!r}, which leads outside of it: not a checkpoint to trust"
                    )
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{path} holds {member.name!r}, which is no plain file: not a checkpoint to trust")
                if f"{name}" in found:
                    raise UserError(f"{path} holds {member.name!r} twice: not a checkpoint to trust")
                if member.offset_data + member.size > size:
                    raise UserError(f"{path} is cut off within {member.name}: copy or download it again")
                found[f"{name}"] = Span(f"{path}:{name}", path, member.offset_data, member.size)
    return found


def below(parts: Mapping[str, Span], folder: str) -> dict[str, Span]:
    """Those of `parts` that lie in `folder`, under their names there."""
    inside = {PurePosixPath(name): span for name, span in parts.items()}
    return {f"{name.relative_to(folder)}": span for name, span in inside.items() if name.is_relative_to(folder)}
