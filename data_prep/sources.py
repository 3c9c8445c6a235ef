"""Where a table comes from: a file on this machine, or a data set of the Hugging Face hub.

    SOURCE=reviews.csv
    SOURCE=hf:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]

The parts of the second are those of `datasets.load_dataset(OWNER/NAME, CONFIG, revision=…, split=…)`; the split is
`train` unless named. `datasets` says which files a split is made of and huggingface_hub fetches them, resumably, into
its cache; then they are read as files of this machine are. The revision is first resolved to a commit, which is
recorded. Code in a repository is never run.
"""

import hashlib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.progress import Progress
from data_prep.read_table import Names, Row, Table, open_table

_HUB = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[^:@\s]+))?(?::(?P<split>[\w.-]+))?"
)
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
        """What changes when the rows do: the sha256 of the file; None where there is none."""
        return _hash([self.path]) if self.path.is_file() else None

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def record(self) -> dict[str, Any]:
        """Its part of the manifest."""
        return {"name": self.name, "sha256": self.version, "bytes": self.path.stat().st_size}


@dataclass(frozen=True)
class HubTable:
    """A split of a data set of the Hugging Face hub; `config` and `revision` are "" where the user named none."""

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
        """The same, at the commit that it is at now."""
        return replace(self, revision=self.version)

    @cached_property
    def version(self) -> str:
        """The commit that `revision` stands for now."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision  # needs no network
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.repository, revision=self.revision or None, timeout=20).sha)
        except Exception as error:
            raise self._in_words(error) from None

    @cached_property
    def _paths(self) -> list[str]:
        """The paths, in the repository, of the split's files."""
        from datasets import load_dataset_builder

        logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a card without metadata is no matter
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
        """The split's files in huggingface_hub's cache, fetched where they are not there yet."""
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
        """Its part of the manifest; `files` are paths in the repository, `sha256` is of all of them, one by one."""
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
        """What went wrong between this machine and the hub, for a user; anything else is raised again."""
        import httpx2  # what huggingface_hub speaks through
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
        from huggingface_hub import errors, get_token

        page = f"https://huggingface.co/datasets/{self.repository}"
        token = "a token is set" if get_token() else "no token is set: export HF_TOKEN=hf_..."
        if isinstance(error, errors.GatedRepoError) or "is a gated dataset" in str(error):
            return UserError(
                f"{self.repository} is gated, and {token}. Accept its terms at {page} with your account, make a read "
                f"token at https://huggingface.co/settings/tokens, then: export HF_TOKEN=hf_..."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return UserError(f"{self.repository} has no revision '{self.revision}'; see {page}/commits/main")
        if isinstance(error, (errors.RepositoryNotFoundError, DatasetNotFoundError)):
            return UserError(f"{page} is not there, or is private ({token})")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return UserError(f"{self} is on the Hugging Face hub, which HF_HUB_OFFLINE forbids to ask")
        unreachable = isinstance(error, errors.LocalEntryNotFoundError)
        kinds = (DatasetsError, FileNotFoundError, ValueError, RuntimeError)  # no files, many configs, a script
        if isinstance(error, kinds) and not unreachable:
            return UserError(f"{page} cannot be read as a table: {str(error).strip()[:600]}")
        if isinstance(error, errors.HfHubHTTPError) and not unreachable:
            status = getattr(error.response, "status_code", "?")
            return UserError(f"the hub answered {status} for {page} ({token}). Try again later")
        if isinstance(error, (OSError, httpx2.HTTPError)):
            return UserError(
                f"{page} cannot be reached ({type(error).__name__}). What has arrived is kept: the same command goes "
                f"on from there. Rows that are prepared need no network where SOURCE names their commit, the revision "
                f"in manifest.json: hf:{self.repository}@COMMIT"
            )
        raise error


Source = LocalFile | HubTable


def find_source(text: str) -> Source:
    """What `SOURCE=text` names; nothing is opened or fetched yet.

    Raises:
        UserError: it begins with `hf:` and does not go on as it must.
    """
    if not text.startswith("hf:"):
        return LocalFile(Path(text).expanduser())
    named = _HUB.fullmatch(text)
    if named is None:
        raise UserError(
            f"{text} names no data set of the Hugging Face hub. Write hf:OWNER/NAME, and where it is needed the "
            f"config, revision and split: hf:OWNER/NAME/CONFIG@REVISION:SPLIT"
        )
    return HubTable(named["repository"], named["config"] or "", named["revision"] or "", named["split"] or "train")


def open_source(source: Source, names: Names, required: Sequence[str]) -> Table:
    """As `open_table`, of all files of a source as if they were one."""
    first, *others = source.files
    table = open_table(first, names, required)
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
                current = open_table(file, names or {field: [field] for field in table.columns}, required)
            for row in current.rows:
                number += 1
                yield row._replace(number=number)

    return Table(
        table.form, table.encoding, table.columns, rows(), lambda: done + current.bytes_read(), lambda: current.close()
    )


def _hash(files: Sequence[Path]) -> str:
    """The sha256 of a file, or of the bytes of several, one after the other."""
    digest, done = hashlib.sha256(), 0
    with Progress(f"Hashing {files[0].name}", sum(file.stat().st_size for file in files)) as progress:
        for path in files:
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    done += len(chunk)
                    progress.at(done)
    return digest.hexdigest()
