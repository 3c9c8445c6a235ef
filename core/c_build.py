"""C sources compiled for the processor that they find themselves on: once, then taken from the user's cache.

Training and serving (serving/engine/kernels.py) have one each. The standard library is all that this needs.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from core.files import commit

FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC"]


class NoLibrary(Exception):
    """Why there is no compiled library: no compiler, or one that failed."""


def compiled(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """`source`, a C file, as a library.

    Args:
        source: the file.
        flags: of the compiler, after FLAGS: `-march=x86-64-v3` replaces this processor as the target. Those in the
            environment's KERNEL_CFLAGS come last; `make sanitize` sets them. The linker gets none: what an OpenMP
            region or a sanitizer calls comes from the library that the process has loaded already.

    Raises:
        NoLibrary: there is no compiler, it failed, or what it made cannot be loaded.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoLibrary("no C compiler is installed (gcc or clang)")
    flags = [*FLAGS, *flags, *shlex.split(os.environ.get("KERNEL_CFLAGS", ""))]
    texts = (file.read_text() for file in (source, *sorted(source.parent.glob("*.h"))))
    about = "\n".join((*texts, *flags, compiler, platform.machine(), processor_flags()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-nemo"
    name = f"{source.parent.name}-{source.stem}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    built = cache / f"{name}.so"
    if not built.exists():
        partial, parts = built.with_suffix(f".{os.getpid()}"), built.with_suffix(f".{os.getpid()}.o")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            compile_ = [compiler, *flags, "-c", str(source), "-o", str(parts)]
            for command in (compile_, [compiler, "-shared", "-pthread", str(parts), "-o", str(partial), "-lm"]):
                # `make sanitize` preloads runtimes that are for this process and would slow the compiler down
                subprocess.run(command, check=True, capture_output=True, env=os.environ | {"LD_PRELOAD": ""})
            commit(partial, built)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip().splitlines()
            raise NoLibrary(f"{compiler} could not compile {source.name}: {said[0] if said else error}") from None
        finally:
            partial.unlink(missing_ok=True)
            parts.unlink(missing_ok=True)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise NoLibrary(str(error)) from None


def processor_flags() -> str:
    """What the processor can do, as Linux lists it; elsewhere its name."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()
