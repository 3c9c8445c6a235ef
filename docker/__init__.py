"""The same commands in containers, on Slurm and on Kubernetes. What starts them needs nothing but the host's Python."""

from __future__ import annotations  # the host's Python may be older than the project's

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A mistake of the user's or of the machine's: its text says what, where and what to do."""


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """As `core.configuration.run`, for commands that start before anything is installed."""
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
