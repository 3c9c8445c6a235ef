"""Tables as other programs store them: JSON in every layout, under any name, and packed files."""

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest

from core.errors import UserError
from data_prep import read_json, unpack
from data_prep.read_table import open_table

NAMES = {"question": ["question"], "answer": ["answer"]}
FRAME = pandas.DataFrame(
    {
        "question": [f"Why {n}, é?\n- {{[\"',]}}" for n in range(40)],
        "answer": [f'So "{n}".\n\n    x = [{n}]' for n in range(40)],
    }
)
ROWS = [list(row) for row in FRAME.itertuples(index=False)]
RECORDS: list[dict[str, str]] = FRAME.to_dict("records")
CSV = FRAME.to_csv(index=False).encode()


def read(path: Path, names: dict[str, list[str]] | None = NAMES) -> list[list[str] | None]:
    table = open_table(path, names, list(names or ()))
    try:
        return [row.cells for row in table.rows]
    finally:
        assert table.bytes_read() <= path.stat().st_size
        table.close()


# --- JSON -----------------------------------------------------------------------------------------------------


def lined(rows: list[dict[str, str]], **how: Any) -> str:
    return "\n".join(json.dumps(row, **how) for row in rows)


LAYOUTS: dict[str, str] = {
    **{
        f"pandas' {orient}": FRAME.to_json(orient=orient)
        for orient in ("records", "columns", "index", "split", "table")
    },
    **{f"{orient} in lines": FRAME.to_json(orient=orient, indent=2) for orient in ("records", "columns", "split")},
    "JSON Lines": lined(RECORDS),
    "objects of many lines": lined(RECORDS, indent=2),
    "data": json.dumps({"data": RECORDS}),
    "a version and rows": json.dumps({"version": "2", "total": 40, "rows": RECORDS}),
    "the hub's rows": json.dumps(
        {
            "features": [{"name": "question"}, {"name": "answer"}],
            "rows": [{"row_idx": n, "row": row, "truncated_cells": []} for n, row in enumerate(RECORDS)],
        }
    ),
    "columns as lists": json.dumps(FRAME.to_dict("list")),
    "columns in data": json.dumps({"data": FRAME.to_dict("list")}),
    "pandas' columns of one table": json.dumps({"result": json.loads(FRAME.to_json())}),
    "rows in an object of an object": json.dumps({"result": {"items": RECORDS}}),
    "lines that Python printed": "\n".join(map(str, RECORDS)),
    "a list of lists with a header": json.dumps([["question", "answer"], *ROWS]),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "txt"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_of_any_layout_is_read_as_rows_whatever_the_file_is_called(
    tmp_path: Path, layout: str, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text(LAYOUTS[layout])
    assert read(path) == ROWS
    if layout != "a list of lists with a header":  # nobody knows that it is one
        found = [row[-2:] for row in read(path, None) if row]
        assert found == ROWS, "a table that no task describes has the same rows, with its index as a column at most"


def test_json_is_read_in_any_encoding(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.json").write_bytes(FRAME.to_json(orient="records", force_ascii=False).encode(encoding))
        assert read(tmp_path / "a.json") == ROWS


def test_cells_without_names_are_numbered_columns(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(FRAME.to_json(orient="values"))
    table = open_table(tmp_path / "a.json", None, ())
    assert table.columns == {"column 1": "column 1", "column 2": "column 2"}
    assert [row.cells for row in table.rows] == ROWS
    table.close()
    assert read(tmp_path / "a.json", {"question": ["column 1"], "answer": ["column 2"]}) == ROWS
    with pytest.raises(UserError, match=r"no column for question or answer\. Columns found: 'column 1', 'column 2'"):
        read(tmp_path / "a.json")


def test_the_cells_of_a_sheet_are_named_by_its_first_row(tmp_path: Path) -> None:
    sheet = {"range": "A1:B41", "majorDimension": "ROWS", "values": [["Question", "Answer"], *ROWS]}
    (tmp_path / "a.json").write_text(json.dumps(sheet))
    assert read(tmp_path / "a.json") == ROWS


def test_an_object_of_texts_is_a_table_of_two_columns(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(dict(ROWS)))
    assert read(tmp_path / "a.json", None) == ROWS
    assert read(tmp_path / "a.json", {"question": ["key"], "answer": ["value"]}) == ROWS


def test_an_object_of_named_rows_keeps_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({f"term {n}": row for n, row in enumerate(RECORDS)}))
    rows = read(tmp_path / "a.json", {"term": ["key"], **NAMES})
    assert rows == [[f"term {n}", *row] for n, row in enumerate(ROWS)]


def test_a_long_list_on_one_line_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [{"question": f"{n} " * 300, "answer": "a"} for n in range(3000)]
    (tmp_path / "a.json").write_text(json.dumps(long))
    assert (tmp_path / "a.json").stat().st_size > 3_000_000, "more than a line may have"
    monkeypatch.setattr(read_json, "WHOLE", 10)  # of which no more is ever held
    monkeypatch.setattr(read_json, "LONGEST", 100_000)
    table = open_table(tmp_path / "a.json", NAMES, list(NAMES))
    assert [row.cells for row in table.rows] == [list(row.values()) for row in long]
    table.close()


def test_rows_of_a_list_are_numbered_by_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=1))
    table = open_table(tmp_path / "a.json", NAMES, list(NAMES))
    assert [(row.number, row.line) for row in table.rows] == [(n, 4 * n - 2) for n in range(1, 41)]
    table.close()


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([TALK, TALK]),
        json.dumps(TALK) + "\n" + json.dumps(TALK),
        json.dumps([{"messages": TALK}, {"messages": TALK}]),
        json.dumps({"data": [{"messages": TALK}, {"messages": TALK}]}),
        json.dumps({"messages": [TALK, TALK]}),
        json.dumps({"messages": {"0": TALK, "1": TALK}}),
        json.dumps({"data": [TALK, TALK]}),
        f"{{'messages': {TALK}}}\n{{'messages': {TALK}}}",
    ],
)
def test_lists_of_messages_are_dialogues(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert [json.loads(row[0]) for row in read(tmp_path / "a.json", {"messages": ["messages"]}) if row] == [TALK, TALK]


def test_one_dialogue_is_one_row(tmp_path: Path) -> None:
    for text in (json.dumps({"messages": TALK}), json.dumps({"messages": TALK}, indent=1), json.dumps(TALK)):
        (tmp_path / "a.json").write_text(text)
        (row,) = read(tmp_path / "a.json", {"messages": ["messages"]})
        assert row and json.loads(row[0]) == TALK


BAD_JSON = {
    "cut": (json.dumps(RECORDS)[:-40], "line 1 is not a JSON object: "),
    "cut after a row": (json.dumps(RECORDS)[:-1], "ends within its list of rows, after line 1: it was cut"),
    "no JSON": ('[{"question": "a",\n "answer": b}]', "line 1 is not a JSON object: "),
    "numbers": ("[1, 2]", "line 1 is not a JSON object: 1"),
    "more after it": (json.dumps(RECORDS) + "\nx", "line 2 is not a JSON object: x"),
    "nothing": ("[]", "has no rows: its JSON is empty"),
    "an empty object": ("{}", "has no rows: its JSON is empty"),
    "two lists": (
        json.dumps({"train": RECORDS, "test": RECORDS[:3]}),
        "lists of rows: train (40), test (3). Write one of them to a file: jq -c '.\"train\"[]' a.json > train.jsonl",
    ),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_cannot_be_read_is_said_in_words(tmp_path: Path, name: str) -> None:
    text, message = BAD_JSON[name]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.json")
    assert message in str(error.value) and str(tmp_path / "a.json") in str(error.value)


def test_what_is_too_large_to_be_read_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_json, "WHOLE", 1000)
    monkeypatch.setattr(read_json, "CHUNK", 100)
    (tmp_path / "a.json").write_text(json.dumps({"data": RECORDS}))
    with pytest.raises(UserError, match=r"a JSON value of over 1,000 characters.* Write one object a line"):
        read(tmp_path / "a.json")


# --- packed ---------------------------------------------------------------------------------------------------


def with_arrow(codec: str) -> Callable[[bytes], bytes]:
    def packed(data: bytes) -> bytes:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return bytes(sink.getvalue())

    return packed


def zipped(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return sink.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": with_arrow("zstd"),
    "lz4": with_arrow("lz4"),
}


@pytest.mark.parametrize("suffix", PACK)
def test_packed_files_are_read_as_what_is_in_them(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.csv.{suffix}"
    path.write_bytes(PACK[suffix](CSV))
    assert read(path) == ROWS
    path.write_bytes(PACK[suffix](CSV[:300]) + PACK[suffix](CSV[300:]))  # packed by several processes
    assert read(path) == ROWS
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(PACK[suffix](json.dumps(RECORDS).encode("utf-16")))
    assert read(tmp_path / f"a.jsonl.{suffix}") == ROWS
    (tmp_path / "plain").write_bytes("question,answer\nnaïve,crème brûlée\n".encode("cp1252") * 20_000)
    (tmp_path / suffix).write_bytes(PACK[suffix]((tmp_path / "plain").read_bytes()))  # a name that says nothing
    assert read(tmp_path / suffix) == read(tmp_path / "plain") and ["naïve", "crème brûlée"] in read(tmp_path / suffix)


def test_the_one_table_of_a_zip_archive_is_read(tmp_path: Path) -> None:
    added = {"__MACOSX/in/._rows.csv": b"\x00\x05\x16\x07", "in/.DS_Store": b"x"}
    for name, data in (("in/rows.csv", CSV), ("rows.json", json.dumps(RECORDS).encode())):
        (tmp_path / "a.zip").write_bytes(zipped({"in/": b"", name: data, **added}))
        assert read(tmp_path / "a.zip") == ROWS


NOT_READ: dict[str, tuple[bytes, str]] = {
    "two.zip": (
        zipped({"train.csv": CSV, "test.csv": CSV}),
        "holds 2 files (train.csv, test.csv); unpack it and name one of them: unzip two.zip train.csv",
    ),
    "none.zip": (zipped({}), "is a zip archive without a file in it"),
    "a.xlsx": (
        zipped({"[Content_Types].xml": b"", "xl/workbook.xml": b""}),
        "soffice --headless --convert-to csv a.xlsx",
    ),
    "a.docx": (zipped({"word/document.xml": b""}), "is a Word document"),
    "a.ods": (zipped({"mimetype": b"", "content.xml": b""}), "is an OpenDocument file; save the sheet as CSV UTF-8"),
    "damaged.zip": (b"PK\x03\x04" + b"x" * 500, "is a zip archive that cannot be unpacked"),
    **{
        f"cut.{suffix}": (pack(CSV)[:-12], "that cannot be unpacked")
        for suffix, pack in PACK.items()
        if suffix != "bz2"
    },
    "cut.bz2": (bz2.compress(random.Random(0).randbytes(1000).hex().encode())[:-12], "is a bzip2 archive that cannot"),
    "twice.gz": (gzip.compress(gzip.compress(CSV)), "holds a gzip archive (unpack the outer one first)"),
    "a.tar.gz": (
        gzip.compress(b"a.csv" + bytes(252) + b"ustar" + bytes(300)),
        "is a tar archive; unpack it and name one of its files: tar -xf a.tar.gz",
    ),
    "a.parquet.gz": (gzip.compress(b"PAR1" + bytes(9)), "holds a Parquet file (unpack it first"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "is a 7z archive (unpack it with 7z x)"),
    "empty.gz": (gzip.compress(b""), "is empty"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_cannot_be_unpacked_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    data, message = NOT_READ[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value)


def test_an_encrypted_zip_archive_is_refused(tmp_path: Path) -> None:
    data = bytearray(zipped({"a.csv": CSV}))
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + place] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"is encrypted; unpack it first: unzip a\.zip"):
        read(tmp_path / "a.zip")


@pytest.mark.parametrize("suffix", [*PACK, "zip"])
def test_a_file_that_unpacks_to_too_much_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(unpack, "USUAL", 100_000)
    monkeypatch.setattr(unpack, "TIMES", 20)
    many = b"question,answer\n" + b"why,so\n" * 100_000
    (tmp_path / f"a.{suffix}").write_bytes(zipped({"a.csv": many}) if suffix == "zip" else PACK[suffix](many))
    with pytest.raises(UserError, match=r"unpacks to .* bytes, more than a table of its size can have") as error:
        read(tmp_path / f"a.{suffix}")
    assert f" a.{suffix}" in str(error.value)
    # A zip archive that lies about the size of its file is stopped where it goes beyond it.
    if suffix == "zip":
        lie = bytearray(zipped({"a.csv": many}))
        for magic, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
            lie[lie.index(magic) + place : lie.index(magic) + place + 4] = (50_000).to_bytes(4, "little")
        (tmp_path / "a.zip").write_bytes(lie)
        with pytest.raises(UserError, match=r"cannot be unpacked|unpacks to"):
            read(tmp_path / "a.zip")
