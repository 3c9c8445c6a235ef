"""Do what the README's first command does, and record what it came to on this machine, for the table in the README.

    python -m benchmarks.default_run                     (a few minutes; a quarter of an hour without AVX-512)
    python -m benchmarks.default_run processor=avx2

The run lies in a temporary folder; an environment and the base model have to be there. Writes
benchmarks/results/default-run/<machine>.json. A run that takes longer than `minutes` is stopped, and what it came to is
in <machine>.partial.json, which no page shows.
"""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.figures import partial_file, result_file
from core.arguments import Arguments, parse
from core.artifacts import Environment, Evaluation
from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import UserError, run
from core.files import write_json
from core.machine import confine_to_avx2
from core.run_folder import read_metrics


class Options(Arguments):
    minutes: float = Field(60, gt=0, description="after which the run is stopped")
    processor: Literal["avx2"] | None = Field(None, description="measure as on an ordinary one: without AVX-512")


def main(argv: list[str]) -> None:
    options = parse(Options, argv)
    if options.processor:
        confine_to_avx2()
    ensure_base_model(load_config().model)
    with tempfile.TemporaryDirectory(prefix="default-run-") as scratch:
        folders = [f"data_dir={scratch}/data", f"runs_dir={scratch}/runs"]
        began = time.monotonic()
        training = subprocess.Popen([sys.executable, "-m", "commands.train", *folders])
        try:
            training.wait(options.minutes * 60)
        except subprocess.TimeoutExpired:
            training.terminate()  # it writes a checkpoint after the step that it is in
            training.wait()
        except KeyboardInterrupt:  # which it got too
            training.wait()
        result = summary(Path(scratch) / "runs", time.monotonic() - began)
    result["command"] = shlex.join(["python", "-m", "benchmarks.default_run", *argv])
    file = result_file("default-run", result["machine"])
    if "lacks" in result:
        file = partial_file(file)
    else:
        partial_file(file).unlink(missing_ok=True)
    write_json(file, result)
    print(f"written: {file}" + (f", which lacks {result['lacks']}" if "lacks" in result else ""))


def summary(runs: Path, seconds: float) -> dict[str, Any]:
    """What the only run in `runs` came to, and `"lacks"` where it did not end by itself.

    Args:
        seconds: that the whole command took.
    """
    files = list(runs.glob("*/*/environment.json"))
    if not files:
        raise UserError("the run ended before it had begun to train; see its output above")
    folder = files[0].parent
    environment = Environment.read(files[0])
    steps = read_metrics(folder)[0]
    result = {
        "machine": environment.machine,
        "commit": environment.commit,
        "packages": environment.packages,
        "steps": steps[-1].step if steps else 0,
        "training_seconds": round(sum(line.seconds or 0 for line in steps), 1),
        "seconds_in_all": round(seconds, 1),
    }
    evaluation = Evaluation.read_if_there(folder / "evaluation.json")
    if evaluation is None:
        return result | {"lacks": f"what comes after step {result['steps']} of the training"}
    return result | {
        "finished": evaluation.finished,
        "peak_memory_gib": evaluation.peak_memory_gib,
        "perplexity_before": evaluation.before.perplexity,
        "perplexity_after": evaluation.after.perplexity,
        "held_out_rows": evaluation.held_out_rows,
    }


if __name__ == "__main__":
    run(main)
