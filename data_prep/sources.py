"""Where a table comes from: a file on this machine, many of them, or a dataset on the Hugging Face hub.

    SOURCE=reviews.csv
    SOURCE=reviews/, SOURCE='reviews/part-*.parquet'       (find_files.py)
    SOURCE=hf:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]

The parts of the last form are the arguments of `datasets.load_dataset(OWNER/NAME, CONFIG, revision=…, split=…)`; the
split is `train` unless named. `datasets` determines the files of a split and huggingface_hub downloads them, resumably,
into its cache, from which they are read like local files. The revision is resolved to a commit first, which is
recorded. Code in a repository is never run.
"""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from glob import has_magic
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.machine import cores
from core.progress import Progress
from data_prep.find_files import files_of, is_pattern
from data_prep.read_table import Names, Row, Table, open_table

_HUB = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[^:@\s]+))?(?::(?P<split>[\w.-]+))?"
)
_WITHOUT_SCHEME = re.compile(r"(?i)(?:www\.[\w-]+\.|huggingface\.co/|hf\.co/|docs\.google\.com/|kaggle\.com/)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def version(self) -> str | None:
        """The sha256 of the file, which changes when its rows do; None if there is no such file."""
        return _hash([self.path]) if self.path.is_file() else None

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def record(self) -> dict[str, Any]:
        """Its part of the manifest."""
        return {"name": self.name, "sha256": self.version, "bytes": self.path.stat().st_size}


@dataclass(frozen=True)
class LocalFiles:
    """The files of a folder or a pattern on this machine, read as one table."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """The folder's name, or the pattern from its first part that is one: what stays when all is moved."""
        parts = Path(self.text).expanduser().resolve().parts
        magic = next((place for place, part in enumerate(parts) if has_magic(part)), len(parts) - 1)
        return str(Path(*parts[magic:]))

    @cached_property
    def version(self) -> str:
        """A hash of the names and the contents of all files."""
        lines = (f"{digest}  {name}\n" for digest, name in zip(_hash_each(self.files), self._names, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def _found(self) -> tuple[list[Path], int]:
        return files_of(self.text)

    @property
    def files(self) -> list[Path]:
        return self._found[0]

    @property
    def _names(self) -> list[str]:
        """The files' paths from the folder that all of them are in."""
        above = os.path.commonpath([file.parent for file in self.files])
        return [str(file.relative_to(above)) for file in self.files]

    @property
    def notes(self) -> list[str]:
        """What of it was left out, in words."""
        empty = self._found[1]
        return [f"{empty} empty file{'s' * (empty > 1)} left out"] if empty else []

    def record(self) -> dict[str, Any]:
        """Its part of the manifest; `sha256` is of the lines that sha256sum would write of the files."""
        size = sum(file.stat().st_size for file in self.files)
        return {"name": self.name, "files": self._names, "sha256": self.version, "bytes": size}


@dataclass(frozen=True)
class HubTable:
    """A split of a dataset on the Hugging Face hub; `config` and `revision` are "" if the user named none."""

    repository: str
    config: str
    revision: str
    split: str

    def __str__(self) -> str:
        config, revision = self.config and f"/{self.config}", self.revision and f"@{self.revision}"
        return f"hf:{self.repository}{config}{revision}:{self.split}"

    @property
    def name(self) -> str:
        return str(self)

    def pinned(self) -> "HubTable":
        """The same split at its current commit."""
        return replace(self, revision=self.version)

    @cached_property
    def version(self) -> str:
        """The commit that `revision` refers to now."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision  # needs no network
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.repository, revision=self.revision or None, timeout=20).sha)
        except Exception as error:
            raise self._in_words(error) from None

    @cached_property
    def _paths(self) -> list[str]:
        """The paths of the split's files in the repository."""
        from datasets import load_dataset_builder

        logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a card without metadata does no harm
        try:
            builder = load_dataset_builder(
                f"hf://datasets/{self.repository}", self.config or None, revision=self.version
            )
        except Exception as error:
            raise self._in_words(error) from None
        splits = builder.config.data_files or {}
        if self.split not in splits:
            known = ", ".join(f"hf:{self.repository}{self.config and f'/{self.config}'}:{split}" for split in splits)
            raise UserError(f"{self.repository} has no split '{self.split}'. Name one of these as SOURCE: {known}")
        inside = f"{self.repository}@{self.version}/"
        return [str(url).partition(inside)[2] for url in splits[self.split]]

    @cached_property
    def files(self) -> list[Path]:
        """The split's files in huggingface_hub's cache, downloaded if they are not there yet."""
        from huggingface_hub import hf_hub_download

        local = []
        for number, path in enumerate(self._paths, 1):
            print(f"Fetching {path} of {self.repository} ({number} of {len(self._paths)})", file=sys.stderr, flush=True)
            try:
                local.append(Path(hf_hub_download(self.repository, path, repo_type="dataset", revision=self.version)))
            except Exception as error:
                raise self._in_words(error) from None
        return local

    def record(self) -> dict[str, Any]:
        """Its part of the manifest; `files` are paths in the repository, `sha256` is of their concatenation."""
        return {
            "name": self.name,
            "repository": self.repository,
            "config": self.config or None,
            "revision": self.version,
            "split": self.split,
            "files": self._paths,
            "sha256": _hash(self.files),
            "bytes": sum(file.stat().st_size for file in self.files),
        }

    def _in_words(self, error: Exception) -> UserError:
        """A sentence for a user about what went wrong with the hub; any other error is raised again."""
        import httpx2  # huggingface_hub's HTTP client
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
        from huggingface_hub import errors, get_token

        page = f"https://huggingface.co/datasets/{self.repository}"
        token = "a token is set" if get_token() else "no token is set: export HF_TOKEN=hf_..."
        if isinstance(error, errors.GatedRepoError) or "is a gated dataset" in str(error):
            return UserError(
                f"{self.repository} is gated, and {token}. Accept its terms at {page} with your account, create a read "
                f"token at https://huggingface.co/settings/tokens, then: export HF_TOKEN=hf_..."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return UserError(f"{self.repository} has no revision '{self.revision}'; see {page}/commits/main")
        if isinstance(error, (errors.RepositoryNotFoundError, DatasetNotFoundError)):
            return UserError(f"{page} does not exist, or is private ({token})")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return UserError(f"{self} is on the Hugging Face hub, but HF_HUB_OFFLINE is set; unset it to download")
        unreachable = isinstance(error, errors.LocalEntryNotFoundError)
        kinds = (DatasetsError, FileNotFoundError, ValueError, RuntimeError)  # no files, many configs, a script
        if isinstance(error, kinds) and not unreachable:
            return UserError(f"{page} cannot be read as a table: {str(error).strip()[:600]}")
        if isinstance(error, errors.HfHubHTTPError) and not unreachable:
            status = getattr(error.response, "status_code", "?")
            return UserError(f"the hub answered {status} for {page} ({token}). Try again later")
        if isinstance(error, (OSError, httpx2.HTTPError)):
            return UserError(
                f"{page} cannot be reached ({type(error).__name__}). Run the same command again to resume the "
                f"download. Data that was prepared before needs no network if SOURCE names its commit, the revision in "
                f"manifest.json: hf:{self.repository}@COMMIT"
            )
        raise error


Source = LocalFile | LocalFiles | HubTable


def find_source(text: str) -> Source:
    """The source that `SOURCE=text` names; nothing is opened or downloaded yet.

    Raises:
        UserError: the text begins with `hf:` but does not follow the form above.
    """
    if _WITHOUT_SCHEME.match(text) and not Path(text).exists():  # as browsers show an address
        text = f"https://{text}"
    if address := re.match(r"(?i)([a-z][a-z0-9+.-]+)://", text):
        raise _is_address(text, address[1].lower())
    if not text.startswith("hf:"):
        return LocalFiles(text) if is_pattern(text) else LocalFile(Path(text).expanduser())
    named = _HUB.fullmatch(text)
    if named is None:
        raise UserError(
            f"{text} does not name a dataset on the Hugging Face hub. Write hf:OWNER/NAME, with config, revision "
            f"and split if needed: hf:OWNER/NAME/CONFIG@REVISION:SPLIT"
        )
    return HubTable(named["repository"], named["config"] or "", named["revision"] or "", named["split"] or "train")


def _is_address(text: str, scheme: str) -> UserError:
    """What to do about a SOURCE that is an address: nothing is fetched from one, but for data sets of the hub."""
    if named := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+)", text):
        return UserError(f"{text} is an address; a data set of the Hugging Face hub is named SOURCE=hf:{named[1]}")
    if "docs.google.com" in text or "kaggle.com" in text:
        return UserError(f"{text} is a page, not a table. Download it there as CSV, and name the file as SOURCE")
    if scheme == "file":
        return UserError(f"{text} is an address; name the file itself: SOURCE={text.partition('://')[2]}")
    fetch = {"s3": f"aws s3 cp '{text}' .", "gs": f"gcloud storage cp '{text}' ."}.get(scheme, f"curl -LO '{text}'")
    return UserError(
        f"{text} is an address, and SOURCE a file, a folder or hf:OWNER/NAME. Download it, then name the file: {fetch}"
    )


def open_source(source: Source, names: Names, required: Sequence[str], plain_text: str = "") -> Table:
    """Like `open_table`, with all files of a source read as one."""
    first, *others = source.files
    table = open_table(first, names, required, plain_text)
    if not others:
        return table
    done, current = 0, table

    def rows() -> Iterator[Row]:
        nonlocal done, current
        number = 0
        for file in (first, *others):
            if file is not first:
                done += current.bytes_read()
                current.close()
                current = open_table(file, names or {field: [field] for field in table.columns}, required, plain_text)
            for row in current.rows:
                number += 1
                yield row._replace(number=number)

    return replace(table, rows=rows(), bytes_read=lambda: done + current.bytes_read(), close=lambda: current.close())


def _hash_each(files: Sequence[Path]) -> list[str]:
    """The sha256 of each file, by all cores: hashlib lets other threads run."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        progress.advance(path.stat().st_size)
        return found

    size = sum(file.stat().st_size for file in files)
    with Progress(f"Hashing {len(files)} files", size) as progress, ThreadPoolExecutor(cores()) as threads:
        return list(threads.map(digest, files))


def _hash(files: Sequence[Path]) -> str:
    """The sha256 of a file, or of several files concatenated."""
    digest, done = hashlib.sha256(), 0
    with Progress(f"Hashing {files[0].name}", sum(file.stat().st_size for file in files)) as progress:
        for path in files:
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    done += len(chunk)
                    progress.at(done)
    return digest.hexdigest()
