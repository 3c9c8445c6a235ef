"""One conversion: read the source, validate it, write the target, read that again, compare, and record the proof."""

import hashlib
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from converters import hf
from converters.adapter import lora_settings, name_targets
from converters.checkpoint import Adapter, Checkpoint
from converters.formats import MERGED, PART, detect, model_in, module_of, name_of
from converters.merge_lora import check_base, check_fit, lora_updates, merge
from converters.prove import MERGED_LIMITS, compare_beside, place_in_peft, prove, same_bits
from converters.validation import check_shapes, validated
from core.artifacts import Conversion, Proof
from core.base_model import describe, ensure_base_model
from core.configuration import CONFIG_DIR
from core.errors import UserError
from core.files import read_json
from core.gemma_config import is_gemma4, is_whole
from core.licence import licence_name, write_notices
from core.progress import Progress
from core.schema import ModelConfig

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PACKAGES = ("torch", "transformers", "peft", "safetensors", "gguf", "h5py")
PASSES = 8  # over the weights, for the progress bar: read, write, hash, compare and run, on both sides


def write_proven(
    folder: Path,
    source_name: Path | str,
    to: str,
    base_name: Path | str | None,
    dtype: str | None,
    whole: bool | None,
    shards: int | None,
) -> Proof:
    """Create `folder` with the converted model, the licence notice and `conversion.json`.

    Arguments and errors are those of `convert.convert`.

    Returns:
        The proof, as `prove.prove` returns it.
    """
    begun = time.monotonic()
    path = model_in(resolve_source(source_name))
    origin = detect(path)
    module = module_of("hf" if to == MERGED else to)
    source = read_source(origin, path)
    if to == "hf" and isinstance(source, Adapter):
        to = MERGED
    if whole is not None and (isinstance(source, Checkpoint) or to not in ("adapter", MERGED)):
        raise UserError(f"whole={str(whole).lower()} is for an adapter: with to=adapter, or to=merged")
    base = read_base(source, base_name) if isinstance(source, Adapter) else None
    if isinstance(source, Adapter) and base:
        check_same_base(source, base, path)
        leave_out_borrowed(source, base.config, path)
        updates = lora_updates(source, path)
        check_fit(updates, base, path)
        source.peft = name_targets(source.peft, updates, base.tensors)
        origin_of_base = base.origin if base.whole is None else {**base.origin, "sha256": ""}  # its text model has none
        source.base = {**origin_of_base, **source.base, "folder": base.origin["folder"]}
        choose_model(source, base, to, whole)
        source.config = base.config
    elif to == MERGED:
        raise UserError(f"{path} is a whole model, there is nothing to merge; to=hf makes a Hugging Face folder of it")
    kind = Checkpoint if to == MERGED else type(source)
    if kind not in module.WRITES:
        what, can = ("an adapter", MERGED) if kind is Adapter else ("a whole model", "hf")
        raise UserError(f"{path} is {what}, which {to} does not hold; to={can} does")
    if dtype and dtype not in getattr(module, "DTYPES", ()):
        known = ", ".join(getattr(module, "DTYPES", ())) or "none, it keeps those of the source"
        raise UserError(f"dtype={dtype} is unknown to {to}. Known: {known}")
    if shards and not getattr(module, "SHARDS", False):
        raise UserError(f"shards={shards} is for to=megatron; {to} decides itself how many files a model has")
    choices = {name: value for name, value in (("dtype", dtype), ("shards", shards)) if value}

    model = source if isinstance(source, Checkpoint) else base
    assert model
    with Progress("Converting", PASSES * sum(tensor.nbytes for tensor in model.tensors.values())) as progress:
        done = 0

        def seen(size: int) -> None:
            nonlocal done
            done += size
            progress.at(done)

        model.tensors = validated(model.tensors, path if model is source else Path(model.origin["folder"]), seen)
        content: Checkpoint | Adapter = source
        if to == MERGED and base and isinstance(source, Adapter):
            content = merge(base, source, path)
            content.tensors = validated(content.tensors, path)
        suffix = module.WRITES[kind]
        stem = PART.sub("", path.stem.removesuffix(".lora")) if path.is_file() else name_of(source_name)
        place = folder / f"{stem}{suffix}" if suffix else folder
        with disk_errors(folder):
            place.parent.mkdir(parents=True, exist_ok=True)
            module.write(content, place, **choices)
            write_notices(licence_name(model.config, path), folder)
            if content.prompt:
                content.prompt.save(folder)

        seconds_to_write = time.monotonic() - begun
        target = read_source("hf" if to == MERGED else to, place)
        if isinstance(target, Checkpoint):
            target.tensors = validated(target.tensors, place, seen)
        elif base:
            target.peft = name_targets(target.peft, lora_updates(target, place), base.tensors)
        if target.prompt != content.prompt:
            raise UserError("the conversion is not faithful: the prompt came back changed")
        proof = prove(source, target, base, MERGED_LIMITS if to == MERGED else getattr(module, "TOLERANCE", None))
        if isinstance(content, Checkpoint) and content.whole:
            beside = compare_beside(content.whole, place, content.tensors.keys())
            proof.tensors += beside
            proof.tensors_with_the_same_bits += beside
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
        if isinstance(content, Adapter) and to == "adapter" and (content.whole or is_gemma4(content.config or {})):
            record.loads_on = place_in_peft(place, content)
    with disk_errors(folder):
        record.write(folder / "conversion.json")
    return proof


def resolve_source(name: Path | str) -> Path:
    """The path of a source: `name` itself, or the folder of the hub model of that name, downloaded on first use."""
    path = Path(name)
    if path.exists() or path.parent.exists() or not HUB_NAME.fullmatch(str(name)):
        return path
    models = (
        yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((CONFIG_DIR / "model").glob("*.yaml"))
    )
    known = next((model for model in models if model["repo"] == str(name)), None)
    model = known or {
        "name": str(name).replace("/", "--"),
        "repo": str(name),
        "revision": "main",
        "embedded": False,
        "path": None,
        "models_dir": "models",
        "max_perplexity": 1000,
    }
    return ensure_base_model(ModelConfig(**{key: value for key, value in model.items() if key != "defaults"}))


def read_source(format_name: str, path: Path) -> Checkpoint | Adapter:
    """Read `path` in the format `format_name`, and validate its shapes.

    Raises:
        UserError: it is damaged, or not a Gemma.
    """
    content: Checkpoint | Adapter = module_of(format_name).read(path)
    if isinstance(content, Checkpoint):
        check_shapes(content, path)
    if content.prompt is None:  # a file may have its prompt.json beside it
        content.prompt = hf.read_prompt(path.parent if path.is_file() else path)
    return content


def read_base(adapter: Adapter, name: Path | str | None) -> Checkpoint:
    """The base of `adapter`, from `name` or from what the adapter says; its hash and folder are in `origin`.

    Raises:
        UserError: it is not there, or the adapter does not name it.
    """
    known = Path(adapter.base.get("name") or "").name
    folder = resolve_source(name) if name else own_base(adapter)
    if not (folder / "config.json").exists():
        missing = f"the base model {known} is not in {folder}" if known or name else "the adapter does not say its base"
        raise UserError(f"{missing}; name its folder with base=FOLDER")
    base = read_source("hf", folder)
    assert isinstance(base, Checkpoint)
    base.origin = {**describe(folder), "folder": str(folder)}
    if is_gemma4(base.config) and is_whole(read_json(folder / "config.json")):
        base.whole = folder
    return base


def own_base(adapter: Adapter) -> Path:
    """Where the base that `adapter` names lies on this machine, or would."""
    folder = Path("models") / Path(adapter.base.get("name") or "").name
    named = (Path(place) for key in ("folder", "source") if (place := adapter.base.get(key)))
    return folder if (folder / "config.json").exists() else next((place for place in named if place.is_dir()), folder)


def check_same_base(adapter: Adapter, base: Checkpoint, path: Path) -> None:
    """Check that `adapter` was trained on `base`, if it has a hash of what it was trained on.

    Raises:
        UserError: it was not; or it was trained on a text model that cannot be compared with that of a whole `base`.
    """
    wanted, own = adapter.base.get("sha256"), own_base(adapter)
    if base.whole is None or wanted in (None, "", base.origin["sha256"]):
        check_base(adapter, base, path)
        return
    if not (own / "config.json").exists() or describe(own)["sha256"] != wanted:
        raise UserError(
            f"{path} was trained on the text model {adapter.base.get('name')}, which must be in {own} too, to see that "
            f"{base.whole} holds the same weights"
        )
    text = hf.read(own).tensors
    differing = [name for name in text if name not in base.tensors or not same_bits(text[name], base.tensors[name])]
    if differing:
        raise UserError(f"{path} was trained on {own}, whose {differing[0]} is another than in {base.whole}")


def leave_out_borrowed(adapter: Adapter, config: Mapping[str, Any], path: Path) -> None:
    """Drop what older tools train in layers that borrow keys and values: updates of projections that nothing reads."""
    if unused := hf.borrowed(config, adapter.tensors):
        print(f"{path} has {len(unused)} tensors for layers that borrow keys and values, which nothing reads: left out")
        adapter.tensors = {name: tensor for name, tensor in adapter.tensors.items() if name not in unused}
        adapter.peft = lora_settings(adapter.peft, adapter.tensors, path)


def choose_model(adapter: Adapter, base: Checkpoint, to: str, whole: bool | None) -> None:
    """Decide whether the result is for the whole Gemma 4, which sees and hears, or for its text model: as the base is,
    unless `whole` says otherwise.

    Raises:
        UserError: a whole model is asked for, and the base is none.
    """
    chosen = base.whole is not None if whole is None else whole
    if chosen and to == MERGED and base.whole is None:
        raise UserError(
            f"{base.origin['folder']} is no whole Gemma 4; name the folder of one, with image and sound: base=FOLDER"
        )
    adapter.whole = chosen
    base.whole = base.whole if chosen else None


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failure to write into one sentence with the free space.

    Raises:
        UserError: in place of an OSError.
    """
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
    """SHA-256 of a file; of a folder, that of the lines `hash  name` of its files, as `sha256sum` prints them."""
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
