"""Slang that visitors kept: an SQLite file with search and votes, and a CSV that `make data TASK=slang SOURCE=…` takes.

    python -m tasks.slang.dictionary kept.csv      what all visitors kept and did not vote down, as training rows

Visitors see only what they kept themselves; a random cookie identifies them. Only what the model really said can be
kept: an answer comes with a token that the site has signed, so that nobody can write training rows through the site.
"""

import base64
import binascii
import csv
import hmac
import io
import json
import secrets
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi import Path as InPath
from pydantic import BaseModel, Field

from core.files import write_whole
from data_prep.formula_cells import plain_cell, spreadsheet_cell
from serving.web.guard import cookie_of
from serving.web.settings import Settings

FILE_NAME = "dictionary.sqlite3"  # in the site's storage
MOST = 500  # entries of one visitor
MOST_IN_ALL = 50_000
COLUMNS = ("Slang", "Description", "Example", "Context")  # the names that nemo_configs/task/slang.yaml knows
TABLES = """
create table if not exists entry (
    id integer primary key, visitor text not null, kept text not null default (datetime('now')),
    slang text not null, description text not null, example text not null, context text not null,
    thumb integer not null default 0, unique (visitor, slang, description, example, context));
create table if not exists key (signs blob not null);
"""
router = APIRouter()


@dataclass(frozen=True)
class DictionaryEntry:
    slang: str
    description: str
    example: str
    context: str


class Dictionary:
    """The SQLite file. Every method opens it anew, so that any thread may call it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with self._open() as database:
            database.execute("pragma journal_mode = wal")
            database.executescript(TABLES)
            database.execute("insert into key select ? where not exists (select * from key)", (secrets.token_bytes(),))
            self.key: bytes = database.execute("select signs from key").fetchone()[0]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._file, timeout=10)
        database.row_factory = sqlite3.Row
        try:
            with database:
                yield database
        finally:
            database.close()

    def token_of(self, entry: DictionaryEntry) -> str:
        """The token that lets a visitor keep `entry`: its text, signed."""
        text = json.dumps(asdict(entry)).encode()
        return base64.urlsafe_b64encode(hmac.digest(self.key, text, sha256) + text).decode()

    def entry_of(self, token: str) -> DictionaryEntry:
        """The entry in a token. Raises ValueError if this site did not sign it."""
        try:
            raw = base64.urlsafe_b64decode(token)
        except (binascii.Error, ValueError):
            raise ValueError("no token") from None
        signature, text = raw[:32], raw[32:]
        if not hmac.compare_digest(signature, hmac.digest(self.key, text, sha256)):
            raise ValueError("signed by somebody else")
        return DictionaryEntry(**json.loads(text))

    def keep(self, visitor: str, entry: DictionaryEntry, thumb: int) -> int:
        """Store an entry, or the thumb of an existing one; return its number. Raises OverflowError if full."""
        with self._open() as database:
            mine, all_of_them = (
                database.execute(f"select count(*) from entry {where}", values).fetchone()[0]
                for where, values in (("where visitor = ?", (visitor,)), ("", ()))
            )
            if mine >= MOST or all_of_them >= MOST_IN_ALL:
                raise OverflowError
            return database.execute(
                "insert into entry (visitor, slang, description, example, context, thumb) values (?, ?, ?, ?, ?, ?) "
                "on conflict do update set thumb = excluded.thumb returning id",
                (visitor, *astuple(entry), thumb),
            ).fetchone()[0]

    def find(self, visitor: str, words: str = "") -> list[dict[str, Any]]:
        """The visitor's entries that contain all of `words`, newest first."""
        query = "select id, kept, slang, description, example, context, thumb from entry where visitor = ?"
        values = [visitor]
        for word in words.split()[:8]:
            query += " and instr(lower(slang || ' ' || description || ' ' || example || ' ' || context), lower(?))"
            values.append(word)
        with self._open() as database:
            return [dict(row) for row in database.execute(f"{query} order by id desc", values)]

    def vote(self, visitor: str, number: int, thumb: int) -> bool:
        """Set an entry's thumb. Returns whether the visitor has such an entry."""
        with self._open() as database:
            done = database.execute("update entry set thumb = ? where id = ? and visitor = ?", (thumb, number, visitor))
            return done.rowcount > 0

    def remove(self, visitor: str, number: int) -> bool:
        with self._open() as database:
            return database.execute("delete from entry where id = ? and visitor = ?", (number, visitor)).rowcount > 0

    def rows(self, visitor: str | None = None) -> list[DictionaryEntry]:
        """Distinct entries that were kept and not voted down, oldest first; of all visitors if `visitor` is None."""
        with self._open() as database:
            found = database.execute(
                "select slang, description, example, context from entry "
                "where thumb >= 0 and (?1 is null or visitor = ?1) "
                "group by slang, description, example, context order by min(id)",
                (visitor,),
            )
            return [DictionaryEntry(*row) for row in found]


def csv_of(entries: Iterable[DictionaryEntry], as_cell: Callable[[str], str]) -> str:
    """The entries as CSV, each text by one of the two forms of data_prep/formula_cells.py."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(map(as_cell, astuple(entry)) for entry in entries)
    return text.getvalue()


# --- over HTTP -----------------------------------------------------------------------------------------------

COOKIE, YEAR = "visitor", 365 * 24 * 3600


def visitor(request: Request) -> str:
    """The visitor's cookie, which they have if they kept something before; else ""."""
    name = cookie_of(request.scope, COOKIE)
    return name if len(name) == 32 and name.isalnum() else ""


def new_visitor(request: Request, response: Response) -> str:
    """The visitor's cookie; it is set when they keep their first entry, so that they find it again."""
    name = visitor(request)
    if not name:
        name = secrets.token_hex(16)
        response.set_cookie(COOKIE, name, YEAR, httponly=True, samesite="lax", secure=request.url.scheme == "https")
    return name


@cache
def dictionary_of(settings: Settings) -> Dictionary:
    """The dictionary of a site; its file is created on first use."""
    return Dictionary(settings.storage / FILE_NAME)


def _store(request: Request) -> Dictionary:
    return dictionary_of(request.app.state.settings)


Store = Annotated[Dictionary, Depends(_store)]
Visitor = Annotated[str, Depends(visitor)]
Number = Annotated[int, InPath(ge=1, lt=2**63)]
Thumb = Literal[-1, 0, 1]


class Keep(BaseModel):
    token: str = Field(max_length=20_000)
    thumb: Thumb = 0


class Vote(BaseModel):
    thumb: Thumb


@router.get("/api/dictionary")
def find(store: Store, who: Visitor, q: Annotated[str, Query(max_length=200)] = "") -> list[dict[str, Any]]:
    return store.find(who, q)


@router.post("/api/dictionary")
def keep(store: Store, wanted: Keep, who: Annotated[str, Depends(new_visitor)]) -> dict[str, int]:
    try:
        return {"id": store.keep(who, store.entry_of(wanted.token), wanted.thumb)}
    except ValueError:
        raise HTTPException(400, "Only what the model said on this site can be kept.") from None
    except OverflowError:
        raise HTTPException(409, f"Your dictionary is full ({MOST} entries). Remove some first.") from None


@router.put("/api/dictionary/{number}")
def vote(store: Store, number: Number, wanted: Vote, who: Visitor) -> dict[str, int]:
    if not store.vote(who, number, wanted.thumb):
        raise HTTPException(404, "Your dictionary has no such entry.")
    return {"thumb": wanted.thumb}


@router.delete("/api/dictionary/{number}", status_code=204)
def remove(store: Store, number: Number, who: Visitor) -> None:
    if not store.remove(who, number):
        raise HTTPException(404, "Your dictionary has no such entry.")


@router.get("/dictionary.csv")
def export(store: Store, who: Visitor) -> Response:
    headers = {"content-disposition": 'attachment; filename="my_slang.csv"', "x-robots-tag": "noindex"}
    return Response(csv_of(store.rows(who), spreadsheet_cell), media_type="text/csv; charset=utf-8", headers=headers)


def main() -> None:
    default = str(Settings.storage / FILE_NAME)
    if len(sys.argv) not in (2, 3) or not Path(database := (sys.argv[2:] or [default])[0]).is_file():
        sys.exit("usage: python -m tasks.slang.dictionary OUT.csv [DICTIONARY]: writes what visitors kept")
    entries = Dictionary(Path(database)).rows()
    write_whole(Path(sys.argv[1]), csv_of(entries, plain_cell))
    print(f"{sys.argv[1]}: {len(entries)} rows. Train on them: make train TASK=slang SOURCE={sys.argv[1]}")


if __name__ == "__main__":
    main()
