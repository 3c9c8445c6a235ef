"""From a table to a fine-tuned Gemma: the whole recipe, top to bottom.

    python -m commands.train task=slang                              (what `make train TASK=slang` calls)
    python -m commands.train task=slang task.data.source=mine.csv seed=1
    python -m commands.train task=slang experiment=attempt2

A run is named by its configuration and its data. The same command given again continues a run that was stopped, and
only shows one that is finished; anything changed starts another. Told to stop by SIGTERM or SIGUSR1, it writes a
checkpoint and leaves with code 75: a scheduler may start the same command again. With `task.evaluate.min_gain` it ends
with code 3 where held-out perplexity fell by less.
"""

import errno
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from core.artifacts import Before, Environment, Evaluation
from core.base_model import describe, ensure_base_model
from core.configuration import load_config, plain, write_config
from core.errors import UserError, run
from core.files import write_whole
from core.machine import describe_environment, loading, quiet_libraries
from core.progress import Progress
from core.run_folder import read_metrics
from core.schema import Config
from data_prep.data_folder import read_manifest
from data_prep.prepare import prepare
from evaluation.gate import pass_gate
from evaluation.questions import check, held_out_questions, listed_questions
from training import automodel
from training.fingerprint import check_records, describe_unfinished_run, differences, name_run, run_fingerprint
from training.launcher import check_processes, check_tensor_parallel, join, launch, node_rank, open_store, release
from training.signals import Stopped, StopSignals

if TYPE_CHECKING:
    from torch.distributed import TCPStore

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

FORM = ("instructions", "kernels", "dtype")  # fields of an Environment: how the numbers are computed
SAMPLES = 3  # questions asked before and after; `make report` asks more


def main(argv: list[str]) -> int:
    config = load_config(argv)
    print(
        f"Training {config.model.name} with {config.peft.name} on {config.task.name}, on this machine's "
        f"{config.trainer.accelerator.upper()}"
    )
    settings = check(config)
    store = None
    if config.engine == "automodel":
        automodel.check(config)  # it starts its processes itself
    else:
        processes = check_processes(config)
        if node_rank(config) > 0:
            join(config)
            return 0
        store = open_store(config) if processes > 1 else None
    base_folder = ensure_base_model(config.model)
    check_tensor_parallel(config, base_folder)
    data_folder = prepare(config, base_folder / "tokenizer.json")
    identity = run_fingerprint(config, base_folder, data_folder)
    run_folder = name_run(config, base_folder, identity)
    if (run_folder / "report.html").exists():
        print(
            f"{run_folder} is finished: this configuration on this data has been trained. Change something, for "
            f"example ARGS=seed=1, to train another"
        )
        release(config, store)
        return show_result(run_folder, settings["min_gain"])
    check_records(run_folder, identity)
    if other := describe_unfinished_run(run_folder, identity):
        print(other)
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {run_folder}: {error.strerror}; name another runs_dir") from None
    try:
        with FileLock(run_folder / ".lock", timeout=0):
            train(config, base_folder, data_folder, run_folder, identity, StopSignals(), store)
    except Timeout:
        raise UserError(f"another process is training {run_folder}. Wait for it, or stop it") from None
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except (OSError, RuntimeError) as error:
        # torch's own writer, which NeMo's archives go through, knows no errno.
        if getattr(error, "errno", None) not in NO_ROOM and "PytorchStreamWriter failed" not in str(error):
            raise
        why = getattr(error, "strerror", error)
        raise UserError(
            f"no room to write in {run_folder}: {why}. The checkpoint before is kept whole. Make room, and run "
            "the same command to resume"
        ) from None
    return show_result(run_folder, settings["min_gain"])


def train(
    config: Config,
    base_folder: Path,
    data_folder: Path,
    run_folder: Path,
    identity: dict[str, Any],
    signals: StopSignals,
    store: "TCPStore | None",
) -> None:
    """Fill `run_folder`; each file appears whole or not at all."""
    print("Loading NeMo (some seconds)", flush=True)
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch loads OpenMP: a thread that waits for others looks again for some microseconds, then sleeps.
        # By default it would burn the processor that the other threads, or other programs, need to get on.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with Progress("Loading NeMo", None), loading():
        quiet_libraries()
        import torch

        from converters.nemo_file import read_nemo
        from core.load_model import load_base, load_tokenizer
        from core.prompt import Prompt
        from core.text_model import check_text_model
        from evaluation import report
        from evaluation.compare import measure
        from training.batches import Batches, tokenize
        from training.fit import fit
        from training.gemma_lora import weights_dtype
        from training.memory import check_memory, release_memory
        from training.progress import peak_memory_gib

    check_text_model(base_folder)
    record(config, base_folder, data_folder, run_folder)

    with Progress("Loading the tokenizer", None):
        tokenizer = load_tokenizer(base_folder)
    prompt = Prompt(**plain(config.task.prompt))
    splits: dict[str, Any] = {}
    left_out: dict[str, int] = {}
    for name in ("training", "validation", "test"):
        rows, too_long = tokenize(
            data_folder / f"{name}.jsonl",
            tokenizer,
            prompt,
            config.task.train.max_length,
            cache=data_folder / ".tokens",
        )
        splits[name], left_out[name] = rows, too_long
        if too_long:
            print(f"{name}: left out {too_long} rows longer than task.train.max_length={config.task.train.max_length}")
    need = check_memory(config, base_folder, splits["training"], weights_dtype())
    asked = listed_questions(plain(config.task.evaluate)["questions"], prompt)[:1]
    asked += held_out_questions(data_folder / "test.jsonl", SAMPLES - len(asked), prompt)
    held_out = Batches(splits["test"], 32, config.trainer.micro_batch_tokens, seed=None)
    measured = held_out, asked, plain(config.task.generate), config.seed

    before_file = run_folder / "before.json"
    if not before_file.exists():
        print("Asking the base model first", flush=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        quantization = plain(config.peft.quantization) if config.peft.quantization else None
        base = load_base(base_folder, weights_dtype(), quantization, device).to(device).eval()
        measure(base, tokenizer, prompt, *measured).write(before_file)
        del base
        release_memory()
    before = Before.read(before_file)
    print(f"  before: perplexity {before.perplexity:.2f} on {len(splits['test'])} held-out rows. It answers:")
    print(indent(before.answers[0]), flush=True)

    archive = run_folder / f"{config.task.name}.nemo"
    peak_of_workers = 0.0
    if archive.exists():
        release(config, store)
    elif config.engine == "automodel":
        automodel.fit(config, base_folder, splits["training"], splits["validation"], run_folder, archive)
    elif store:
        peak_of_workers = launch(config, store, run_folder, base_folder, data_folder)
    else:
        fit(config, base_folder, splits["training"], splits["validation"], run_folder, archive, identity, signals)

    release_memory()
    print("Asking the fine-tuned model", flush=True)
    model, tokenizer = read_nemo(archive).load_onto(base_folder, as_trained=True)
    after = measure(model, tokenizer, prompt, *measured)
    steps = read_metrics(run_folder)[0]
    if config.engine == "automodel":
        peak_of_workers = max(line.memory_gib or 0 for line in steps)
    Evaluation(
        held_out_rows=len(splits["test"]),
        rows_over_max_length=left_out,
        questions=[question.asked for question in asked],
        before=before,
        after=after,
        training_seconds=round(sum(line.seconds or 0 for line in steps), 1),
        peak_memory_gib=round(max(peak_memory_gib(), peak_of_workers), 2),
        memory_estimate_gib=round(need, 2),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    ).write(run_folder / "evaluation.json")
    report.write(run_folder)


def record(config: Config, base_folder: Path, data_folder: Path, run_folder: Path) -> None:
    """Write down what the run is made of; say what is no longer as it was when the run began."""
    from training import kernels
    from training.gemma_lora import weights_dtype

    file = run_folder / "environment.json"
    environment = describe_environment()
    environment.base = describe(base_folder)["sha256"]
    environment.dtype = str(weights_dtype()).removeprefix("torch.")
    if config.engine == "automodel":
        environment.packages |= automodel.package_versions()
    elif not environment.gpus:
        environment.kernels = kernels.form(weights_dtype())
    if then := Environment.read_if_there(file):
        was, now = (
            {**made.packages, **made.model_dump(include={"cpu", "gpus", *FORM})} for made in (then, environment)
        )
        for name in FORM:  # not in what was recorded before there were such fields
            now[name] = now[name] if was[name] else ""
        if changes := differences(was, now):
            print(
                f"warning: this run began with other software or hardware: {changes}. It goes on, but the last "
                "digits may not be those of a run that was never stopped"
            )
    write_config(config, run_folder / "config.yaml")
    write_whole(run_folder / "data_manifest.json", (data_folder / "manifest.json").read_bytes())
    for name in read_manifest(data_folder).carried:
        write_whole(run_folder / name, (data_folder / name).read_bytes())
    environment.write(file)


def show_result(run_folder: Path, min_gain: float | None) -> int:
    """Print what came of a run; 0, or the exit code of one that gained less than `min_gain`."""
    result = Evaluation.read(run_folder / "evaluation.json")
    print(f"\nThe fine-tuned model answers:\n{indent(result.after.answers[0])}\n")
    print(
        f"perplexity on {result.held_out_rows} held-out rows: {result.before.perplexity:.2f} before, "
        f"{result.after.perplexity:.2f} after {(result.training_seconds or 0) / 60:.1f} minutes of training, at most "
        f"{result.peak_memory_gib or 0:.1f} GiB of memory ({result.memory_estimate_gib or 0:.1f} expected)"
    )
    print(f"model:  {next(run_folder.glob('*.nemo'))}\nreport: {run_folder / 'report.html'}")
    return pass_gate(result, min_gain)


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


if __name__ == "__main__":
    run(main)
