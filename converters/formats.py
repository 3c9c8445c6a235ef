"""What can be converted to what: every format with the file that knows it.

A format's file holds

    TITLE = "…"                                   what it is, for the table of --help
    READS = {Checkpoint, Adapter}                 which of them it can be read as
    WRITES = {Checkpoint: "", Adapter: ".gguf"}   which it can hold, and how such a file's name ends; "" is a folder
    recognizes(path) -> bool                      whether `path` looks like one; reads little and raises nothing
    read(path) -> Checkpoint | Adapter            raises UserError where it is damaged, hostile or of another family
    write(content, target) -> None                fills `target`, which does not exist: a file, or a folder it makes

and, where they apply,

    DTYPES = ("bf16", "q8_0")                     what `write(content, target, dtype)` stores, the default first
    TOLERANCE = {"mean_kl_divergence": 0.005}     by how much what it holds may differ from the source. Without it,
                                                  every tensor's bits must come back

`write` raises UserError where the format cannot hold the content.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from core.errors import UserError

# In this order a source is asked what it is. Imported when needed: some need packages of their own.
FORMATS = ("nemo", "hf", "adapter", "gguf", "nemo1", "nemo2", "keras", "google")
MERGED = "merged"  # not a format: an adapter folded into its base, then "hf"


def module_of(name: str) -> ModuleType:
    return import_module(f"converters.{name}")


def detect(path: Path) -> str:
    """
    Raises:
        UserError: there is nothing at `path`, or nothing that any format knows.
    """
    if not path.exists():
        raise UserError(f"there is no {path}")
    for name in FORMATS:
        if module_of(name).recognizes(path):
            return name
    raise UserError(f"{path} is of no known format. Known: {', '.join(FORMATS)}")
