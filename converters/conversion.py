"""One conversion from its source to a folder with its proof: read, checked, written, read again, compared, recorded."""

import hashlib
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from converters import hf
from converters.checkpoint import Adapter, Checkpoint
from converters.checks import check_shapes, checked
from converters.formats import MERGED, detect, module_of
from converters.merge_lora import merge, refuse_misfit, refuse_other_base, updates
from converters.prove import MERGED_LIMITS, prove
from core.artifacts import Conversion, Proof
from core.base_model import describe, ensure_base_model
from core.configuration import CONFIG_DIR
from core.errors import UserError
from core.progress import Progress

TERMS_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PACKAGES = ("torch", "transformers", "peft", "safetensors", "gguf", "h5py")
PASSES = 8  # over the weights: read and written, hashed, compared, run, on both sides


def fill(folder: Path, source_name: Path | str, to: str, base_name: Path | str | None, dtype: str | None) -> Proof:
    """Make `folder`, which does not exist: the converted model, licence notice, `conversion.json`. Returns the proof.

    See `commands.convert.convert`.
    """
    begun = time.monotonic()
    path = fetched(source_name)
    origin = detect(path)
    module = module_of("hf" if to == MERGED else to)
    source = opened(origin, path)
    if to == "hf" and isinstance(source, Adapter):
        to = MERGED
    base = opened_base(source, base_name) if isinstance(source, Adapter) else None
    if isinstance(source, Adapter) and base:
        refuse_other_base(source, base, path)
        refuse_misfit(updates(source, path), base, path)
        source.base = {**base.origin, **source.base, "folder": base.origin["folder"]}
        source.config = base.config
    elif to == MERGED:
        raise UserError(
            f"{path} is a whole model, there is nothing to merge; --to hf makes a Hugging Face folder of it"
        )
    kind = Checkpoint if to == MERGED else type(source)
    if kind not in module.WRITES:
        what, can = ("an adapter", MERGED) if kind is Adapter else ("a whole model", "hf")
        raise UserError(f"{path} is {what}, which {to} does not hold; --to {can} does")
    if dtype and dtype not in getattr(module, "DTYPES", ()):
        known = ", ".join(getattr(module, "DTYPES", ())) or "none, it keeps those of the source"
        raise UserError(f"--dtype {dtype} is unknown to {to}. Known: {known}")

    whole = source if isinstance(source, Checkpoint) else base
    assert whole
    with Progress("Converting", PASSES * sum(tensor.nbytes for tensor in whole.tensors.values())) as progress:
        done = 0

        def seen(size: int) -> None:
            nonlocal done
            done += size
            progress.at(done)

        whole.tensors = checked(whole.tensors, path if whole is source else Path(whole.origin["folder"]), seen)
        content: Checkpoint | Adapter = source
        if to == MERGED and base and isinstance(source, Adapter):
            content = merge(base, source, path)
            content.tensors = checked(content.tensors, path)
        suffix = module.WRITES[kind]
        place = folder / f"{Path(source_name).stem}{suffix}" if suffix else folder
        with written(folder):
            place.parent.mkdir(parents=True, exist_ok=True)
            module.write(content, place, *([dtype] if dtype else []))
            (folder / "NOTICE").write_text(TERMS_NOTICE)
            if content.prompt:
                content.prompt.save(folder)

        seconds_to_write = time.monotonic() - begun
        target = opened("hf" if to == MERGED else to, place)
        if isinstance(target, Checkpoint):
            target.tensors = checked(target.tensors, place, seen)
        if target.prompt != content.prompt:
            raise UserError("the conversion is not faithful: the prompt came back changed")
        proof = prove(source, target, base, MERGED_LIMITS if to == MERGED else getattr(module, "TOLERANCE", None))
        adapter = source if isinstance(source, Adapter) else Adapter({}, {})
        record = Conversion(
            source=path.name,
            source_sha256=digest(path, seen),
            source_format=origin,
            to=to,
            base={key: value for key, value in adapter.base.items() if key != "folder"},
            dtype=adapter.dtype,
            quantization=adapter.quantization,
            proof=proof,
            files={str(file.relative_to(folder)): digest(file, seen) for file in files_of(folder)},
            packages={name: version(name) for name in PACKAGES if name in sys.modules},
            seconds_to_write=round(seconds_to_write, 1),
            seconds=round(time.monotonic() - begun, 1),
            peak_memory_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        )
    with written(folder):
        record.write(folder / "conversion.json")
    return proof


def fetched(name: Path | str) -> Path:
    """The path of a source: `name` itself, or the folder of the hub's model of that name, downloaded on first use."""
    path = Path(name)
    if path.exists() or path.parent.exists() or not HUB_NAME.fullmatch(str(name)):
        return path
    files = sorted((CONFIG_DIR / "model").glob("*.yaml"))
    known = next((model for file in files if (model := OmegaConf.load(file)).repo == str(name)), None)
    model = known or OmegaConf.create(
        {
            "name": str(name).replace("/", "--"),
            "repo": str(name),
            "revision": "main",
            "embedded": False,
            "path": None,
            "models_dir": "models",
            "max_perplexity": 1000,
        }
    )
    return ensure_base_model(cast(DictConfig, model))


def opened(format_name: str, path: Path) -> Checkpoint | Adapter:
    """
    Raises:
        UserError: it is damaged, or no Gemma.
    """
    content: Checkpoint | Adapter = module_of(format_name).read(path)
    if isinstance(content, Checkpoint):
        check_shapes(content, path)
    if content.prompt is None:  # a file may have it beside it
        content.prompt = hf.read_prompt(path.parent if path.is_file() else path)
    return content


def opened_base(adapter: Adapter, name: Path | str | None) -> Checkpoint:
    """The base of `adapter`, with its hash and folder in `origin`."""
    known = Path(adapter.base.get("name") or "").name
    folder = fetched(name) if name else Path("models") / known
    if not name and not folder.exists() and Path(adapter.base.get("source", "")).is_dir():
        folder = Path(adapter.base["source"])
    if not (folder / "config.json").exists():
        missing = f"the base model {known} is not in {folder}" if known or name else "the adapter does not say its base"
        raise UserError(f"{missing}; name its folder with --base")
    base = opened("hf", folder)
    assert isinstance(base, Checkpoint)
    base.origin = {**describe(folder), "folder": str(folder)}
    return base


@contextmanager
def written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        there = next(parent for parent in folder.absolute().parents if parent.exists())
        free = shutil.disk_usage(there).free / 1e9
        raise UserError(
            f"{folder.parent} could not be written to: {error.strerror or error}; {free:.1f} GB are free "
            f"there. Nothing of the target was left"
        ) from None


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def digest(path: Path, seen: Callable[[int], None]) -> str:
    """SHA-256 of a file; of a folder, of the lines `hash  name` of its files, as `sha256sum` prints them."""
    total = hashlib.sha256()
    if path.is_dir():
        for file in files_of(path):
            total.update(f"{digest(file, seen)}  {file.relative_to(path)}\n".encode())
        return total.hexdigest()
    with path.open("rb") as content:
        while block := content.read(2**22):
            total.update(block)
            seen(len(block))
    return total.hexdigest()
