"""Starts trainings without their seconds of imports: it imports once, and each training is a fork of it.

python tests/launcher.py      reads {"words", "said", "die_in_write", "largest_file"} a line, answers its process
                              id, and when that has ended, its exit code (or minus the signal)
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commands.train import main
from core.machine import quiet_libraries


def import_everything() -> None:
    quiet_libraries()
    import transformers.models.gemma3.modeling_gemma3  # noqa: F401

    import training.fit  # noqa: F401


def child(words: list[str], said: str, die_in_write: str = "", largest_file: int = 0) -> int:
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore
    if die_in_write:
        die_at(die_in_write)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["commands.train", *words]
    from core.errors import run

    try:
        run(main)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 1


def die_at(where: str) -> None:
    """SIGKILL inside the second checkpoint write: half of its bytes written, all but not synced, or not yet renamed."""
    from training.checkpoints import SafeCheckpointIO

    save, writes = SafeCheckpointIO.save_checkpoint, []

    def dying(self: SafeCheckpointIO, checkpoint: dict[str, object], path: Path, storage_options: object) -> None:
        writes.append(path)
        if len(writes) < 2:
            return save(self, checkpoint, path, storage_options)
        fsync = os.fsync
        if where == "half":
            os.fsync = lambda handle: (os.ftruncate(handle, os.fstat(handle).st_size // 2), fsync(handle), die())  # type: ignore
        elif where == "unsynced":
            os.fsync = lambda handle: die()  # type: ignore
        save(self, checkpoint, path, storage_options)
        die()  # written and synced, but under its other name

    SafeCheckpointIO.save_checkpoint = dying  # type: ignore


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    import_everything()
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os._exit(child(**json.loads(line)))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
