"""`convert`: the entry point for commands and other stages. It leaves a proven target folder, or none."""

import shutil
from pathlib import Path

from converters.formats import FORMATS, MERGED, module_of
from core.errors import UserError
from core.files import beside, commit, restore
from core.machine import let_waiting_threads_sleep, loading
from core.progress import Progress


def table() -> str:
    """The table of conversions for --help, in Markdown, from the formats' declarations."""
    from converters.checkpoint import Adapter, Checkpoint

    modules = {name: module_of(name) for name in FORMATS}
    lines = ["| to | is | from | tried with |", "|---|---|---|---|"]
    for name, module in modules.items():
        for kind, word in ((Checkpoint, "whole model"), (Adapter, "adapter")):
            if kind in module.WRITES:
                sources = ", ".join(
                    other for other, theirs in modules.items() if kind in theirs.READS and other != name
                )
                lines.append(f"| {name} | {module.TITLE}, {word} | {sources} | {module.TRIED} |")
    adapters = ", ".join(name for name, module in modules.items() if Adapter in module.READS)
    merged = f"| {MERGED} | Hugging Face folder, adapter folded into its base | {adapters} | {modules['hf'].TRIED} |"
    return "\n".join([*lines, merged])


def convert(
    source: Path | str,
    to: str,
    target: Path,
    base: Path | str | None = None,
    dtype: str | None = None,
    whole: bool | None = None,
    shards: int | None = None,
) -> None:
    """Convert `source` to the folder `target`, and prove that the target is equivalent.

    Example: `convert("runs/slang/…/slang.nemo", "adapter", Path("exports/slang/adapter"))`

    Args:
        source: a file or folder of any format, or a model name on the hub.
        to: one of formats.FORMATS, or "merged": an adapter merged into its base, as a Hugging Face folder.
        target: must not exist, or be the target of an earlier conversion, of which `source` and `base` are no part.
        base: of an adapter, unless the adapter names it: a Hugging Face folder, or a name on the hub.
        dtype: one of the format's DTYPES.
        whole: whether an adapter is named for, or merged into, the whole model that sees and hears, rather than its
            text model; None: as the base of a Gemma 4 is.
        shards: the number of files that the weights are divided among, where the format has any number.

    Raises:
        UserError: an unreadable source, a format that cannot hold it, a missing or wrong base, a target in the way, a
            full disk, an unfaithful conversion.
    """
    is_ours = target.is_dir() and ((target / "conversion.json").exists() or not any(target.iterdir()))
    if target.exists() and not is_ours:
        raise UserError(f"{target} exists and was not made by this command; name another with out=FOLDER")
    for read in (source, base):
        if read and target.exists() and target.resolve() in (Path(read).resolve(), *Path(read).resolve().parents):
            raise UserError(f"{target} would be replaced, and {read} is read from there; name another with out=FOLDER")
    print(f"Converting {source} to {target} and comparing both sides", flush=True)
    let_waiting_threads_sleep()
    with Progress("Loading transformers and peft", None), loading():
        from converters.conversion import disk_errors, write_proven

    restore(target)
    partial = beside(target, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        proof = write_proven(partial, source, to, base, dtype, whole, shards)
        with disk_errors(partial):
            commit(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"{target}: {proof.tensors_with_the_same_bits} of {proof.tensors} tensors have the same bits; largest "
        f"logit difference {proof.max_logit_difference:.2g}, KL divergence {proof.mean_kl_divergence:.2g} "
        f"nats a token, top-1 agreement {proof.top1_agreement:.1%}"
    )
