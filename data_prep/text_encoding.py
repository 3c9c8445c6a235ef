"""In which encoding a file is written, or what it is if it is no text.

A byte order mark is believed; a file that is UTF-8 to its last byte is UTF-8; for the rest a sample around the first
byte that is not is given to charset-normalizer.
"""

import codecs
from io import BufferedReader
from pathlib import Path

from core.errors import UserError

SAMPLE = 65_536  # bytes

# What people hand over in place of a table, by its first bytes.
_BINARY = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive or an Excel workbook (save the sheet as CSV UTF-8)",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook (save the sheet as CSV UTF-8)",
    b"\x1f\x8b": "a gzip archive (unpack it with gunzip)",
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
    """The codec of a text file, and Python's name for what to do with bytes that do not fit it.

    Raises:
        UserError: no such file, a folder, nothing in it, not text.
    """
    if not path.exists():
        raise UserError(f"no such file: {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a CSV, TSV, JSONL or Parquet file in it")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; write its rows to one first")
    with path.open("rb") as file:
        head = file.read(SAMPLE)
        if not head.strip():
            raise UserError(f"{path} is empty")
        for mark, encoding in _BOMS.items():
            if head.startswith(mark):
                return encoding, CP1252_STRAYS if encoding == "utf-8-sig" else "replace"
        for magic, kind in _BINARY.items():
            if head.startswith(magic):
                raise UserError(f"{path} is {kind}, not a CSV, TSV, JSONL or Parquet file")
        odd = len(head.translate(None, bytes(range(32, 256)) + b"\t\n\v\f\r\x00"))
        if odd > len(head) / 50:
            raise UserError(f"{path} looks like a binary file, not a CSV, TSV, JSONL or Parquet file")
        bad = _first_byte_not_utf8(head, file)
        if bad is None:
            return "utf-8", "strict"
        file.seek(max(0, bad - SAMPLE // 2))
        return _guess(file.read(SAMPLE), path)


def _first_byte_not_utf8(head: bytes, file: BufferedReader) -> int | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, chunk = 0, head
    while chunk:
        waiting = len(decoder.getstate()[0])  # the first bytes of a character cut by the chunk's end
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            return position - waiting + error.start
        position += len(chunk)
        chunk = file.read(1 << 20)
    return position if decoder.getstate()[0] else None


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
    # A few accents fit a dozen code pages equally well; of these, cp1252 is what Windows and Excel write.
    clean = min(match.chaos for match in found)
    western = any(match.encoding == "cp1252" and match.chaos <= clean + 0.02 for match in found)
    return ("cp1252" if western else best.encoding), "replace"


CP1252_STRAYS = "data_prep.cp1252_strays"


def _decode_strays(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


codecs.register_error(CP1252_STRAYS, _decode_strays)
