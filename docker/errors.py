"""How a program of this folder ends. As core/errors.py, for the host's Python, which may be older than the project's.

The programs are run as files, `python3 docker/slurm.py ...`, and this folder is not a package, so that `import docker`
finds the Docker SDK where that is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A mistake of the user's or a fault of the machine: the message says what happened, where and what to do."""


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call `main(sys.argv[1:])` and exit: 0 when done, 2 on a `UserError`, 130 on Ctrl-C; no traceback for those."""
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
