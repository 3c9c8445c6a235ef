"""A training as a Slurm job: writes the sbatch script, submits it, and shows its log until it ends.

    NODES=2 GPUS_PER_NODE=8 PARTITION=h100 TIME=4:00:00 python3 -m docker.slurm commands.train task=slang peft.r=16
                                         (what `make train TASK=slang RUNTIME=slurm NODES=2 … ARGS=peft.r=16` calls)

From the environment: NODES, GPUS_PER_NODE, CPUS_PER_NODE, PARTITION, ACCOUNT, QOS, TIME; CONTAINER=image runs it in an
image by pyxis; SWEEP="peft.r=4,8 seed=0,1" is an array of one job for each combination; DRY_RUN=1 prints the script.
What else sbatch can do, it reads from variables of its own (SBATCH_CONSTRAINT, SBATCH_MEM_PER_NODE, …).

Script and log lie in runs/<task>/slurm/<job>.{sbatch,log}. What a job does stands in docker/train.sbatch. Its name has
a hash of that: the same command given again follows a job that waits or runs, and submits another otherwise.

Needs only Python 3.9 and Slurm's own commands, as a login node has them. Neither submitit (it starts a pickled Python
function, ours is a command) nor NeMo-Run (500 MB of dependencies, its launcher is torchrun) would save a line of what
is here: signals, requeue and the wait for the end are Slurm's.
"""

from __future__ import annotations

import getpass
import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from docker import UserError

PROJECT = Path(__file__).resolve().parent.parent
PATHS = ("task.data.source", "model.path", "data_dir", "runs_dir")  # words that name a file or folder
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "PREEMPTED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
)
# Why a job waits that no waiting mends (too few nodes may be mended: some are down). Slurm says others in words,
# "… use this partition (h100 allows lab)".
HOPELESS = {
    "PartitionTimeLimit": "it asks for more time than its partition allows",
    "AccountNotAllowed": "its account may not use its partition",
    "QOSNotAllowed": "its QOS may not use its partition",
    "InvalidAccount": "its account does not exist",
    "InvalidQOS": "its QOS does not exist",
}
# Of docker/train.Dockerfile's image, or of another: enroot's hooks may replace an image's PATH.
IMAGE_PYTHON = ["bash", "-c", 'PATH="/opt/gemma-nemo/.venv/bin:$PATH" exec python "$@"', "-"]
CPUS = 4  # for each process, where CPUS_PER_NODE says nothing: the training, its checkpoints, the GPU's driver


def main(words: list[str]) -> int:
    if words[:1] != ["commands.train"]:
        raise UserError("RUNTIME=slurm is for `make train`; the rest runs here, or on a node you are logged in to")
    words = words[1:]
    runs = Path(value_of(words, "runs_dir") or "runs")
    folder = (PROJECT / runs / (value_of(words, "task") or "slang") / "slurm").absolute()
    elements = sweep(os.environ.get("SWEEP", ""), words)
    name, script = write_script(words, elements, folder)
    if os.environ.get("DRY_RUN"):
        print(script, end="")
        return 0
    if not shutil.which("sbatch"):
        raise UserError(
            "there is no sbatch here: RUNTIME=slurm is for a login node of a Slurm cluster. DRY_RUN=1 "
            "shows the script that it would submit"
        )
    user = f"--user={getpass.getuser()}"
    if queued := ask("squeue", "--noheader", user, f"--name={name}", "--format=%F").split():
        job = queued[0]
        print(f"Job {job} does this already", flush=True)
    else:
        job = submit(script, folder)
        print(f"Job {job}: {folder}/{job}.sbatch" + (f", {len(elements)} trainings" if elements else ""), flush=True)
    return follow(job, folder, elements)


def value_of(words: list[str], key: str) -> str:
    """What the last `key=…` of `words` says, or ''."""
    return next((word[len(key) + 1 :] for word in reversed(words) if word.startswith(f"{key}=")), "")


def number(name: str, default: int, least: int = 1) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text} must be a whole number from {least}")
    return int(text)


# --- the script ---------------------------------------------------------------------------------------------------


def sweep(text: str, words: list[str]) -> list[list[str]]:
    """`peft.r=4,8 seed=0,1` → `[["peft.r=4", "seed=0"], ["peft.r=4", "seed=1"], …]`; [] for no sweep.

    What changes the rows, or how they are read, gets data folders of its own.
    """
    axes = []
    for axis in shlex.split(text):
        key, assigned, values = axis.partition("=")
        listed = list(dict.fromkeys(re.split(r",(?![^\[]*\])", values)))  # a list in brackets is one value
        if not key or not assigned or not all(listed):
            raise UserError(f"SWEEP: {axis} is not key=value,value. For example SWEEP='peft.r=4,8 seed=0,1'")
        if key in ("data_dir", "runs_dir"):
            raise UserError(f"SWEEP: {key} is where the runs' own files lie: give it in ARGS, once for all")
        axes.append([f"{key}={value}" for value in listed])
    elements = [list(chosen) for chosen in itertools.product(*axes)] if axes else []
    data = value_of(words, "data_dir") or f"data/{value_of(words, 'task') or 'slang'}"
    for element in elements:
        own = [word for word in element if not word.startswith(("peft", "trainer.", "task.train.", "seed="))]
        if own:
            element.append(f"data_dir={data}-" + re.sub(r"[^\w.=-]+", "_", "-".join(own)))
    return elements


def write_script(words: list[str], elements: list[list[str]], folder: Path) -> tuple[str, str]:
    """The name of a job that trains by `words`, and its sbatch script."""
    nodes, gpus = number("NODES", 1), number("GPUS_PER_NODE", number("GPUS", 0, least=0), least=0)
    devices = value_of(words, "trainer.devices") or str(gpus or 1)
    if gpus and value_of(words, "trainer.devices") not in ("", str(gpus)):
        raise UserError(f"GPUS_PER_NODE={gpus} and trainer.devices={devices}: give the first alone")
    if not devices.isdecimal():
        raise UserError(f"trainer.devices={devices} must be a whole number from 1")
    words = [*words, f"trainer.num_nodes={nodes}"]
    if not value_of(words, "trainer.devices"):
        words.append(f"trainer.devices={devices}")
    if gpus and not value_of(words, "trainer"):
        words.append("trainer=gpu")  # a node whose driver is broken must not train on its CPU
    container = os.environ.get("CONTAINER", "")
    stamps = [".venv-automodel/automodel.stamp"] if value_of(words, "engine") == "automodel" else []
    options = {
        "nodes": nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": number("CPUS_PER_NODE", CPUS * int(devices)),
        "gres": f"gpu:{gpus}" if gpus else "",
        "partition": os.environ.get("PARTITION"),
        "account": os.environ.get("ACCOUNT"),
        "qos": os.environ.get("QOS"),
        "time": os.environ.get("TIME"),
        "array": f"0-{len(elements) - 1}" if elements else "",
        "output": str(folder).replace("%", "%%") + ("/%A_%a.log" if elements else "/%j.log"),
        "open-mode": "append",  # of one log, however often the job starts
        "signal": "B:USR1@120",  # seconds before the end of its time, to write a checkpoint in
        "export": "ALL",  # HF_TOKEN and the like, which stand in no file
    }
    for option, value in options.items():
        if "\n" in str(value):
            raise UserError(f"--{option} has a line break in it: {value!r}")
    python = IMAGE_PYTHON if container else [".venv/bin/python"]
    values = [
        f"project={shlex.quote(str(PROJECT))}",
        f"folder={shlex.quote(str(folder))}",
        f"runs={shlex.quote(str(folder.parent))}",
        f"words=({shlex.join(words)})",
        f"python=({shlex.join(python)})",
        f"container=({shlex.join(container_options(container, words)) if container else ''})",
        f"stamps=({'' if container else shlex.join(['.venv/train.stamp', *stamps])})",
    ]
    if elements:
        choices = [f"    {n}) words+=({shlex.join(element)}) ;;" for n, element in enumerate(elements)]
        values += ["case $SLURM_ARRAY_TASK_ID in", *choices, "esac"]
    header = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items() if value]
    ours = "# shellcheck disable=SC2016,SC2054 # what follows are other programs' words"
    body = ["#SBATCH --requeue", "", ours, *values, "", (PROJECT / "docker/train.sbatch").read_text()]
    text = "\n".join([*header, *body])
    name = f"{folder.parent.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name, f"#!/bin/bash\n#SBATCH --job-name={shlex.quote(name)}\n{text}"


def container_options(image: str, words: list[str]) -> list[str]:
    """pyxis's words: the image has Python and its packages, the project comes from here, at the same path as here."""
    named = [PROJECT / value for value in (value_of(words, key) for key in PATHS) if value and "://" not in value]
    named += [PROJECT / name for name in ("models", "data", "runs")]  # which may be links to a larger disk
    mounts = {str(PROJECT)}
    for path in named:
        # A file's folder; of a folder that is yet to be made, the one to make it in.
        place = next(place for place in (path.resolve(), *path.resolve().parents) if place.is_dir())
        if place != Path("/") and not place.is_relative_to(PROJECT):
            mounts.add(str(place))
    return [
        f"--container-image={image}",
        "--container-mounts=" + ",".join(f"{place}:{place}" for place in sorted(mounts)),
        f"--container-workdir={PROJECT}",
    ]


# --- Slurm --------------------------------------------------------------------------------------------------------


def ask(*command: str) -> str:
    """What one of Slurm's commands prints; '' where it is missing or does not answer."""
    try:
        return subprocess.run(command, text=True, capture_output=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def submit(script: str, folder: Path) -> str:
    """Hand `script` to Slurm, keep it as `folder`/<job>.sbatch, and return the job's number."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".submitting-{os.getpid()}.sbatch"
    file.write_text(script)
    try:
        for only_a_test in (["--test-only"], []):
            command = ["sbatch", "--parsable", *only_a_test, str(file)]
            done = subprocess.run(command, text=True, capture_output=True, timeout=120)
            if done.returncode:
                raise UserError(explain(done.stderr))
        job = done.stdout.strip().partition(";")[0]
        file.rename(folder / f"{job}.sbatch")
        return job
    except subprocess.TimeoutExpired:
        raise UserError("Slurm has not answered sbatch for two minutes. `scontrol ping` says how it is") from None
    finally:
        file.unlink(missing_ok=True)


def explain(answer: str) -> str:
    """What sbatch complains about, in one sentence with what there is instead."""
    lines = answer.strip().splitlines() or ["no reason given"]
    said = re.sub(r"^(sbatch: )?((error|fatal): )?(Batch job submission failed: |allocation failure: )?", "", lines[-1])
    if "controller" in said or "configuration source" in said:
        return f"Slurm does not answer: {said}. `scontrol ping` says more"
    # "Invalid account or account/partition combination" is about the account.
    named = [name for name in ("ACCOUNT", "QOS", "PARTITION", "TIME") if name.lower() in said.lower()]
    names = named[:1] or ["NODES", "GPUS_PER_NODE", "CPUS_PER_NODE", "PARTITION"]
    given = " ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
    text = f"Slurm refuses {given or 'the job'}: {said}. "
    if names == ["ACCOUNT"]:
        user = f"user={getpass.getuser()}"
        known = ask("sacctmgr", "--noheader", "--parsable2", "show", "associations", user, "format=account,partition")
        return text + f"Your accounts: {', '.join(sorted(set(known.replace('|', ' ').splitlines()))) or 'none'}"
    return text + f"There are {partitions()}"


def partitions() -> str:
    """What partitions the cluster has, of what nodes."""
    lines = ask("sinfo", "--noheader", "--format=%R (%D nodes of %c CPUs, %G, up to %l)").splitlines()
    return ", ".join(dict.fromkeys(" ".join(line.split()) for line in lines))


def states(job: str) -> list[dict[str, str]]:
    """What Slurm knows of a job, or of each element of an array: `[{"JobState": "RUNNING", …}]`."""
    records = ask("scontrol", "--oneliner", "show", "job", job).splitlines()
    return [dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", record)) for record in records if "JobState=" in record]


def exit_code(record: dict[str, str]) -> int:
    """0 where a job has completed; else its exit code, never 0."""
    if record["JobState"] == "COMPLETED":
        return 0
    code, _, number = record.get("ExitCode", "1:0").partition(":")
    return int(code) or (128 + int(number) if number.isdecimal() and int(number) else 1)


def follow(job: str, folder: Path, elements: list[list[str]]) -> int:
    """Show what becomes of a job until it has ended; its exit code, or the highest of an array's."""
    log = folder / (f"{job}_*.log" if elements else f"{job}.log")
    told: dict[str, str] = {}
    shown, changed, silent = 0, time.monotonic(), 0
    try:
        while True:
            records = states(job)
            silent = 0 if records else silent + 1
            if silent == 10:
                raise UserError(f"Slurm does not answer, or no longer knows job {job}. Its log: {log}")
            if not elements:
                shown = copy(log, shown)
            for record in records:
                which = record.get("ArrayTaskId", "")
                if told.get(which) != (news := tell(record)):
                    about = f"[{which}] {' '.join(elements[int(which)])}: " if which.isdecimal() else ""
                    print(f"--> {about}{news}", flush=True)
                    told[which], changed = news, time.monotonic()
            for reason in (record.get("Reason", "") for record in records):
                if reason in HOPELESS or "use_this_partition" in reason:
                    ask("scancel", job)
                    why = HOPELESS.get(reason, reason.replace("_", " "))
                    raise UserError(f"the job could never start, and is withdrawn: {why}. There are {partitions()}")
            if records and all(record["JobState"] in ENDED for record in records):
                break
            # Every second while something happens, every half a minute in a long training: the cluster has other users.
            until = time.monotonic() + min(30, 1 + (time.monotonic() - changed) / 10)
            while time.monotonic() < until:
                time.sleep(0.5)
                if not elements:
                    shown = copy(log, shown)
    except KeyboardInterrupt:
        print(
            f"\nDetached: job {job} goes on. The same command shows it again, and so does its log, {log}. To end it: "
            f"scancel {job}",
            file=sys.stderr,
        )
        return 130
    if elements:
        copy(folder / f"{job}.table", 0)
    code = max(exit_code(record) for record in records)
    if code and elements:
        print(f"Not all have ended well: see {log}", file=sys.stderr)
    return code


def tell(record: dict[str, str]) -> str:
    """A job's state in words."""
    state, reason = record["JobState"], record.get("Reason", "None")
    again = f", start {int(record['Restarts']) + 1}" if record.get("Restarts", "0") != "0" else ""
    if state == "PENDING":
        return "waits in the queue" + (f" ({reason})" if reason != "None" else "") + again
    if state in ("RUNNING", "COMPLETING"):
        return f"runs on {record.get('NodeList')}{again}"
    return "is done" if state == "COMPLETED" else f"{state}, code {exit_code(record)}"


def copy(log: Path, shown: int) -> int:
    """Print what `log` has beyond its first `shown` bytes; how many it has now. Opened anew, or NFS shows the old."""
    try:
        with log.open("rb") as file:
            file.seek(shown)
            new = file.read()
    except OSError:
        return shown
    sys.stdout.buffer.write(new)
    sys.stdout.buffer.flush()
    return shown + len(new)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; `squeue --me` says whether the job was submitted already", file=sys.stderr)
        sys.exit(130)
