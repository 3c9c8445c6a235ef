"""The registry of formats. Each is a module of this folder, which has

    TITLE = "…"                                   description for the table of --help
    TRIED = "peft 0.21.2"                         with which versions of outside tools what it writes was tried
    READS = {Checkpoint, Adapter}                 what it can be read as
    WRITES = {Checkpoint: "", Adapter: ".gguf"}   what it can store, and the suffix of such a file; "" is a folder
    recognizes(path) -> bool                      whether `path` looks like one; reads little, never raises
    read(path) -> Checkpoint | Adapter            raises UserError if it is damaged, hostile or of another family
    write(content, target) -> None                creates `target`, a file or a folder, which does not exist

and, where they apply,

    DTYPES = ("bf16", "q8_0")                     values of `write(content, target, dtype)`, the default first
    SHARDS = True                                 `write(content, target, shards=n)` divides the weights among n files
    TOLERANCE = {"mean_kl_divergence": 0.005}     how much the target may differ from the source. Without it,
                                                  every tensor must be identical, bit by bit

`write` raises UserError if the format cannot represent the content.
"""

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

from core.errors import UserError

# In the order of detection. Imported on demand: some need packages of their own.
FORMATS = ("nemo", "hf", "mlx", "adapter", "gguf", "nemo1", "nemo2", "megatron", "keras", "google")
FILES = {".nemo", ".gguf", ".h5", ".ckpt"}  # suffixes of models that are one file
PART = re.compile(r"-(\d{5})-of-(\d{5})$")  # ends the name, without suffix, of a part of a divided GGUF
# What other tools leave in a folder → what it is, and what to do with it.
FOREIGN = {
    "pytorch_model*.bin": "a model as pickles, which are not read; save it with model.save_pretrained(FOLDER), which "
    "writes safetensors",
    "pytorch_model_fsdp_*": "the shards of a training with FSDP; join them with accelerate merge-weights FOLDER OUT",
    "*/.metadata": "the shards of a distributed training; join them with the tool that trained it, for FSDP of "
    "accelerate: accelerate merge-weights FOLDER OUT",
    "global_step*": "the shards of a training with DeepSpeed; join them with its own zero_to_fp32.py",
    "lit_model.pth*": "a checkpoint of LitGPT; litgpt convert_from_litgpt writes one for transformers",
    "*.npz": "weights of MLX as npz; save them with a newer mlx_lm, which writes safetensors",
}
MERGED = "merged"  # not a format: an adapter merged into its base, then "hf"


def module_of(name: str) -> ModuleType:
    return import_module(f"converters.{name}")


def name_of(source: Path | str) -> str:
    """The last part of a source's path or name, also where it is given as `.` or `..`."""
    path = Path(source)
    return path.name if path.name.strip(".") else path.resolve().name


def model_in(path: Path) -> Path:
    """`path`, or the model file in a folder that is no model itself: one that `convert` wrote, or a run's.

    Raises:
        UserError: it holds several, or something that is known but no format.
    """
    if not path.is_dir() or any(module_of(name).recognizes(path) for name in FORMATS):
        return path
    found = [file for file in sorted(path.iterdir()) if file.suffix in FILES and PART.sub("", file.stem) == file.stem]
    found += [file for file in sorted(path.iterdir()) if (part := PART.search(file.stem)) and int(part[1]) == 1]
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} models: {', '.join(file.name for file in found)}. Name one of them")
    if found:
        return found[0]
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda folder: (len(folder.name), folder.name))
    if checkpoints:
        last = checkpoints[-1]
        raise UserError(
            f"{path} is a training's output folder with {len(checkpoints)} checkpoints, "
            f"{', '.join(folder.name for folder in checkpoints[:3])}{' …' * (len(checkpoints) > 3)}; name one of them, "
            f"such as the last, {last}"
        )
    # Adapters that peft keeps under names, the formats that one model was converted to, snapshots in the hub's cache.
    within = [folder for pattern in ("*", "snapshots/*") for folder in sorted(path.glob(pattern)) if folder.is_dir()]
    models = [str(folder) for folder in within if any(module_of(name).recognizes(folder) for name in FORMATS)]
    if models:
        raise UserError(
            f"{path} is no model itself, but holds some: {', '.join(models[:5])}{' …' * (len(models) > 5)}. Name one "
            f"of them"
        )
    for pattern, what in FOREIGN.items():
        if any(path.glob(pattern)):
            raise UserError(f"{path} holds {what}")
    return path


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
