"""Detects the encoding of a text file, or what the file is if it is not text.

A byte order mark decides; a file that decodes as UTF-8 to its last byte is UTF-8; otherwise charset-normalizer is given
a sample around the first byte that does not.
"""

import codecs
from pathlib import Path
from typing import BinaryIO

from core.errors import UserError
from data_prep.unpack import PACKINGS, open_unpacked, packing_of

SAMPLE = 65_536  # bytes

# Files that people mistake for tables, by their first bytes.
_BINARY = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook (save the sheet as CSV UTF-8)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive (unpack it with 7z x)",
    b"Rar!": "a rar archive (unpack it with unrar x)",
    b"\x1f\x9d": "a compress archive (unpack it with uncompress)",
    **{packing.magic: f"{packing.name} (unpack the outer one first)" for packing in PACKINGS},
    b"PAR1": "a Parquet file (unpack it first; its columns are packed already)",
    b"SQLite format 3": "an SQLite database",
    b"\x7fELF": "a program",
}
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def encoding_of(path: Path) -> tuple[str, str]:
    """The codec of a text file, and the name of the error handler for bytes that do not fit it.

    Raises:
        UserError: there is no such file, it is a folder, empty, or not text.
    """
    if not path.exists():
        raise UserError(f"no such file: {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a CSV, TSV, JSONL or Parquet file in it")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; write its rows to one first")
    with open_unpacked(path) as file:
        head = file.read(SAMPLE)
        if not head.strip():
            raise UserError(f"{path} is empty")
        for mark, encoding in _BOMS.items():
            if head.startswith(mark):
                return encoding, CP1252_STRAYS if encoding == "utf-8-sig" else "replace"
        for magic, kind in _BINARY.items():
            if head.startswith(magic):
                raise UserError(
                    f"{path} {'holds' if packing_of(path) else 'is'} {kind}, not a CSV, TSV, JSONL or Parquet file"
                )
        if head[257:262] == b"ustar":
            raise UserError(f"{path} is a tar archive; unpack it and name one of its files: tar -xf {path.name}")
        odd = len(head.translate(None, bytes(range(32, 256)) + b"\t\n\v\f\r\x00"))
        if odd > len(head) / 50:
            raise UserError(f"{path} looks like a binary file, not a CSV, TSV, JSONL or Parquet file")
        sample = _around_what_is_not_utf8(head, file)
        return ("utf-8", "strict") if sample is None else _guess(sample, path)


def _around_what_is_not_utf8(head: bytes, file: BinaryIO) -> bytes | None:
    """`SAMPLE` bytes around the first that is not UTF-8; None if all are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    before, chunk = b"", head
    while chunk:
        waiting = len(decoder.getstate()[0])  # bytes of a character that the end of the chunk cut
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            first = max(0, len(before) - waiting + error.start - SAMPLE // 2)
            return (before + chunk + file.read(SAMPLE))[first : first + SAMPLE]
        before, chunk = (before + chunk)[-SAMPLE:], file.read(1 << 20)
    return before[-SAMPLE // 2 :] if decoder.getstate()[0] else None


def _guess(sample: bytes, path: Path) -> tuple[str, str]:
    text = sample.decode("utf-8", "surrogateescape")
    strays = sum("\udc80" <= char <= "\udcff" for char in text)
    if sum(char > "\x7f" for char in text) > 3 * strays:
        return "utf-8", CP1252_STRAYS  # UTF-8 into which a few bytes of a Windows file were pasted
    from charset_normalizer import from_bytes

    found = from_bytes(sample)
    best = found.best()
    if best is None:
        raise UserError(f"cannot tell the encoding of {path}. Save it as UTF-8")
    # A few accents fit a dozen code pages equally well; cp1252 is the one that Windows and Excel write.
    clean = min(match.chaos for match in found)
    western = any(match.encoding == "cp1252" and match.chaos <= clean + 0.02 for match in found)
    return ("cp1252" if western else best.encoding), "replace"


CP1252_STRAYS = "data_prep.cp1252_strays"


def _decode_strays(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


codecs.register_error(CP1252_STRAYS, _decode_strays)
