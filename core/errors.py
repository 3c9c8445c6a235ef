"""How a command ends: a user's mistake is one sentence and an exit code, never a traceback."""

import logging
import os
import sys
import warnings
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's or of the machine's: its text says what, where and what to do."""

    exit_code = 2


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call `main(sys.argv[1:])` and exit: 0 when done, 2 on a `UserError` that names no other code, 130 on Ctrl-C; no
    traceback for those."""
    # Libraries' remarks about their own future, and progress bars in a log file, hide what a user needs to read.
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
