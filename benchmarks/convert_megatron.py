"""Speed of writing a Megatron-Bridge run folder and of its proof: this project beside `cp` and a forward pass.

    python -m benchmarks.convert_megatron           (the base model of the default configuration)

Each part is timed by itself, in one process whose imports are not counted: `cp` of the model's file, the conversion up
to what is written (reading and validation included), the proof, and one forward pass of both sides with the tokenizer
that it needs. Several rounds in turn; the best of each counts, as whatever else the machine does makes it only longer.
Memory is measured before, of whole commands in both directions on a synthetic model as wide as Gemma 3 27B
(benchmarks/convert.py). Writes benchmarks/results/convert_megatron.json and the tables in docs/converters.md.

AutoBridge of megatron-bridge is not among them: 0.6.2 needs Transformer Engine when it is imported, which wants CUDA.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.figures import RESULTS, refresh
from core.arguments import Arguments, parse
from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import UserError, run
from core.files import write_json
from core.machine import describe_environment, let_waiting_threads_sleep

MINUTES = 10  # for each conversion of the large model


class Options(Arguments):
    rounds: int = Field(3, ge=1, description="of which the best counts")
    layers: int = Field(2, ge=1, le=62, description="of Gemma 3 27B's 62, of the model whose memory is measured")


def main(argv: list[str]) -> None:
    options = parse(Options, argv)
    let_waiting_threads_sleep()  # before torch is imported, as the command does
    base = ensure_base_model(load_config().model).resolve()
    Path("exports").mkdir(exist_ok=True)
    memory = peaks(options.layers)  # first, as a process begins with its parent's peak in its books
    best: dict[str, float] = {}
    for turn in range(options.rounds):
        with tempfile.TemporaryDirectory(dir="exports") as scratch:
            for part, seconds in measure(base, Path(scratch)).items():
                best[part] = min(best.get(part, seconds), seconds)
        print(f"round {turn + 1} of {options.rounds}: {best}", flush=True)
    result = {
        "command": " ".join(["python -m benchmarks.convert_megatron", *argv]),
        "machine": describe_environment().machine,
        "finished": f"{datetime.now(UTC):%Y-%m-%d}",
        "model": base.name,
        "gigabytes": round((base / "model.safetensors").stat().st_size / 1e9, 2),
        "seconds": {part: round(seconds, 2) for part, seconds in best.items()},
        "memory": memory,
    }
    file = RESULTS / "convert_megatron.json"
    write_json(file, result)
    print(f"written: {file}, {', '.join(refresh())}")


def peaks(layers: int) -> dict[str, Any]:
    """Memory at the peak, in GiB, of converting a model of `layers` layers to Megatron-Bridge and back, proofs
    included."""
    from benchmarks.convert import measured, write_sparse
    from converters import hf

    with tempfile.TemporaryDirectory(dir="exports") as scratch:
        base = write_sparse(Path(scratch) / "base", layers)
        largest = max(tensor.nbytes for tensor in hf.read(base).tensors.values())
        found: dict[str, Any] = {"layers": layers, "allowed": round(2 * largest / 2**30 + 1, 2)}
        for source, to in ((base, "megatron"), (Path(scratch) / "megatron", "hf")):
            words = [f"source={source}", f"to={to}", f"out={scratch}/{to}"]
            took = measured([sys.executable, "-m", "commands.convert", *words], MINUTES * 60)
            if took is None:
                raise UserError(f"to={to}: not done in {MINUTES} minutes")
            found[f"to={to}"] = round(took[2], 2)
            print(f"to={to}: {found[f'to={to}']} GiB at the peak, {found['allowed']} allowed", flush=True)
    return found


def measure(base: Path, scratch: Path) -> dict[str, float]:
    """Seconds of each part."""
    from converters import hf, megatron
    from converters.checkpoint import Checkpoint
    from converters.layerwise_forward import logits
    from converters.prove import probe_texts, prove
    from converters.validation import check_shapes, validated

    def read(module: Any, folder: Path) -> Checkpoint:
        content: Checkpoint = module.read(folder)
        check_shapes(content, folder)
        content.tensors = validated(content.tensors, folder)
        return content

    def timed(work: Callable[[], object]) -> float:
        os.sync()  # what the part before has written is on the disk
        begun = time.monotonic()
        work()
        return time.monotonic() - begun

    copy = ["cp", "--sparse=never", "--reflink=never", f"{base}/model.safetensors", f"{scratch}/copy"]
    run_folder = scratch / "run"
    found = {
        "cp": timed(lambda: subprocess.run(copy, check=True)),
        "written": timed(lambda: megatron.write(read(hf, base), run_folder)),
    }
    source, target = read(hf, base), read(megatron, run_folder)

    def forward() -> None:
        texts = probe_texts(source, target)
        for side in (source, target):
            logits(side, texts)

    found["forward of both sides"] = timed(forward)
    found["proof"] = timed(lambda: prove(source, target, None, None))
    shutil.rmtree(run_folder)
    return found


if __name__ == "__main__":
    run(main)
