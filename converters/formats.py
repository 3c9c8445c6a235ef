"""The registry of formats. Each is a module of this folder, which has

    TITLE = "…"                                   description for the table of --help
    READS = {Checkpoint, Adapter}                 what it can be read as
    WRITES = {Checkpoint: "", Adapter: ".gguf"}   what it can store, and the suffix of such a file; "" is a folder
    recognizes(path) -> bool                      whether `path` looks like one; reads little, never raises
    read(path) -> Checkpoint | Adapter            raises UserError if it is damaged, hostile or of another family
    write(content, target) -> None                creates `target`, a file or a folder, which does not exist

and, where they apply,

    DTYPES = ("bf16", "q8_0")                     values of `write(content, target, dtype)`, the default first
    TOLERANCE = {"mean_kl_divergence": 0.005}     how much the target may differ from the source. Without it,
                                                  every tensor must be identical, bit by bit

`write` raises UserError if the format cannot represent the content.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from core.errors import UserError

# In the order of detection. Imported on demand: some need packages of their own.
FORMATS = ("nemo", "hf", "adapter", "gguf", "nemo1", "nemo2", "keras", "google")
MERGED = "merged"  # not a format: an adapter merged into its base, then "hf"


def module_of(name: str) -> ModuleType:
    return import_module(f"converters.{name}")


def detect(path: Path) -> str:
    """The name of the format of `path`, from its contents.

    Raises:
        UserError: there is nothing at `path`, or its format is unknown.
    """
    if not path.exists():
        raise UserError(f"there is no {path}")
    for name in FORMATS:
        if module_of(name).recognizes(path):
            return name
    raise UserError(f"{path} is of no known format. Known: {', '.join(FORMATS)}")
