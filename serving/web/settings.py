"""What the operator of the site decides, and the key that its sign-in cookies are signed with."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """The site's settings.

    Attributes:
        triton: address of the model server, as serving.client takes it.
        runs, data: folders of `make train` and `make data`.
        storage: folder for what visitors keep and for the site's own key.
        hosts: names by which the site may be called; others are refused, which stops DNS rebinding.
        password: asked of every visitor unless empty.
        clean: refuse explicit terms in questions and mask them in answers.
        at_once, in_all: answers streaming to one visitor, and to all of them, see guard.VisitorLimits.
    """

    triton: str = "127.0.0.1:8001"
    runs: Path = Path("runs")
    data: Path = Path("data")
    storage: Path = Path("data/web")
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    password: str = ""
    clean: bool = False
    at_once: int = 3
    in_all: int = 64


def session_key(storage: Path) -> bytes:
    """The 32 secret bytes in `storage/session.key`, created on first use and readable by this user alone."""
    file = storage / "session.key"
    if not file.exists():
        storage.mkdir(parents=True, exist_ok=True)
        partial = storage / f".session.key.{secrets.token_hex(8)}"
        with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
            out.write(secrets.token_bytes(32))
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(partial, file)  # unlike a rename, this never replaces the key of a site that started meanwhile
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    return file.read_bytes()
