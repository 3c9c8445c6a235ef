"""`make train RUNTIME=slurm`: what the job's script says, and what becomes of it on a real Slurm of two nodes.

The Slurm is tests/slurm_cluster.py's; without its packages (Debian's slurm-wlm and munge) those tests are skipped.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
import torch
from conftest import ROOT
from launcher import ENVIRONMENT, Launcher
from slurm_cluster import Cluster
from test_training import course, metrics, only_run

from converters.nemo_file import read_nemo
from training.checkpoints import step_of

BARE = {"PATH": os.environ["PATH"], "HF_TOKEN": "hf_secret"}


def write(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "docker/slurm.py", "commands.train", *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**BARE, "DRY_RUN": "1", **environment},
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def values(script: str, name: str, element: int = 0) -> list[str]:
    """What bash finds in an array that the script sets before it does anything."""
    head = script.partition("# What a job of")[0] + f'printf "%s\\n" "${{{name}[@]}}"'
    done = subprocess.run(
        ["bash", "-uc", head],
        text=True,
        capture_output=True,
        check=True,
        env={**BARE, "SLURM_ARRAY_TASK_ID": str(element)},
    )
    return done.stdout.splitlines()


# --- the script -----------------------------------------------------------------------------------------------------


def test_nodes_gpus_and_account_reach_slurm_and_the_training() -> None:
    script = write(
        "task=slang", NODES="4", GPUS_PER_NODE="8", PARTITION="h100", ACCOUNT="lab", QOS="high", TIME="2:00:00"
    )
    asked = options(script)
    assert (asked["nodes"], asked["gres"], asked["ntasks-per-node"]) == ("4", "gpu:8", "1")
    assert asked["signal"] == "B:USR1@120"
    assert (asked["partition"], asked["account"], asked["qos"], asked["time"]) == ("h100", "lab", "high", "2:00:00")
    arguments = values(script, "arguments")
    assert {"task=slang", "trainer.num_nodes=4", "trainer.devices=8", "trainer=gpu"} <= set(arguments)
    assert "hf_secret" not in script and "requeue" in asked and asked["open-mode"] == "append"

    plain = options(write())
    assert not {"gres", "partition", "account", "qos", "time", "array"} & plain.keys()


def test_arguments_reach_the_training_unchanged() -> None:
    odd = ["task.data.source=/a b/it's; rm -rf $HOME.csv", 'task.prompt.fields.tag="*"', "peft.target_modules=[q_proj]"]
    assert values(write(*odd), "arguments")[:3] == odd


def test_a_sweep_has_every_combination_and_a_data_folder_for_each_set_of_rows() -> None:
    script = write("task=slang", SWEEP="peft.r=4,8,16 task.train.learning_rate=1e-4,3e-4")
    assert options(script)["array"] == "0-5"
    chosen = [tuple(values(script, "arguments", n)[-2:]) for n in range(6)]
    assert chosen[0] == ("peft.r=4", "task.train.learning_rate=1e-4") and len(set(chosen)) == 6

    rows = write("task=slang", SWEEP="task.data.train_rows=10,20 peft.target_modules=[q_proj,k_proj],[v_proj]")
    folders = {values(rows, "arguments", n)[-1] for n in range(4)}
    assert len(folders) == 2 and all(folder.startswith("data_dir=data/slang-") for folder in folders)
    assert "peft.target_modules=[q_proj,k_proj]" in values(rows, "arguments", 0)


def test_a_container_mounts_the_project_and_files_outside_of_it(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").touch()
    (tmp_path / "scratch").mkdir()
    script = write(
        f"task.data.source={tmp_path}/mine.csv",
        f"runs_dir={tmp_path}/scratch/yet/to/be",
        CONTAINER="nvcr.io#nvidia/x:1",
    )
    image, mounts, workdir = values(script, "container")
    assert image == "--container-image=nvcr.io#nvidia/x:1" and workdir == f"--container-workdir={ROOT}"
    mounted = {mount.partition(":")[0] for mount in mounts.partition("=")[2].split(",")}
    assert {str(ROOT), str(tmp_path), f"{tmp_path}/scratch"} <= mounted
    assert values(script, "python")[0] == "bash" and values(script, "stamps") == [""]
    assert values(write(), "container") == [""]


def test_shellcheck_accepts_the_script() -> None:
    for environment in ({}, {"SWEEP": "seed=0,1"}, {"CONTAINER": "image", "NODES": "2"}):
        script = write("task=slang", **environment)
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if checker:
            done = subprocess.run([checker, "--severity=warning", "-"], input=script, text=True, capture_output=True)
            assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("environment", "arguments", "says"),
    [
        ({"NODES": "two", "DRY_RUN": "1"}, (), "NODES=two must be a whole number of at least 1"),
        ({"GPUS_PER_NODE": "8", "DRY_RUN": "1"}, ("trainer.devices=4",), "set only the first"),
        ({"SWEEP": "peft.r", "DRY_RUN": "1"}, (), "peft.r is not of the form key=value,value"),
        ({"PARTITION": "a\n#SBATCH --uid=0", "DRY_RUN": "1"}, (), "--partition contains a line break"),
        ({"PATH": ""}, (), "there is no sbatch here"),
    ],
)
def test_a_mistake_gets_one_sentence(environment: dict[str, str], arguments: tuple[str, ...], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "docker/slurm.py", "commands.train", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**BARE, **environment},
    )
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


# --- the jobs -------------------------------------------------------------------------------------------------------

STEPS = 91  # 50 rows by 4, 7 epochs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := slurm_cluster.missing():
        pytest.skip(f"no Slurm to try: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.environment |= ENVIRONMENT
        yield cluster


class Submitted:
    """`make train RUNTIME=slurm` of a tiny Gemma into `folder`, from submission to the end."""

    def __init__(self, cluster: Cluster, folder: Path, words: list[str], **environment: str) -> None:
        self.cluster, self.folder = cluster, folder
        folder.mkdir(exist_ok=True)
        with (folder / "said").open("ab") as said:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "docker/slurm.py",
                    "commands.train",
                    *words,
                    f"data_dir={folder}/data",
                    f"runs_dir={folder}/runs",
                ],
                cwd=ROOT,
                stdout=said,
                stderr=said,
                env={**cluster.environment, **environment},
            )

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    @property
    def number(self) -> str:
        return self.said.partition("Job ")[2].partition(":")[0].partition(" ")[0]

    @property
    def run(self) -> Path:
        (run,) = (file.parent for file in self.folder.glob("runs/slang/*/config.yaml"))
        return run

    def step(self) -> int:
        """Of the newest checkpoint."""
        checkpoints = list(self.folder.glob("runs/slang/*/checkpoints/step=*.ckpt"))
        return max(map(step_of, checkpoints), default=0)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        def or_ended() -> bool:
            assert self.process.poll() is None, self.said
            return happened()

        self.cluster.wait_for(or_ended)

    def start_now(self) -> None:
        """If it was put back into the queue, where it would wait for two minutes."""
        job = self.cluster.job(self.number)
        if job.get("Reason") == "BeginTime" and job["Restarts"] != "0":
            # Within the second in which a start was revoked, Slurm takes the next one's credential for it.
            time.sleep(5)
            self.cluster.ask("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def end(self) -> int:
        until = time.monotonic() + slurm_cluster.PATIENCE
        try:
            while self.process.poll() is None:
                assert time.monotonic() < until, self.said + self.cluster.ask("squeue")
                self.start_now()
                time.sleep(0.1)
            return self.process.returncode
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def words(source: Path, tiny_base: Path) -> list[str]:
    return [
        "task=slang",
        "trainer=cpu",
        f"task.data.source={source}",
        f"model.path={tiny_base}",
        "task.train.epochs=7",
        "task.train.batch_size=4",
        "task.train.learning_rate=1e-2",
        "task.train.evaluate_every=4",
        "task.prompt.fields.tag=x",
        "task.prompt.fields.condition=y",
        "task.generate.max_new_tokens=4",
    ]


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of four processes on one machine, which nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    local = [*words, f"data_dir={folder}/data", f"runs_dir={folder}/runs", "trainer.devices=4"]
    training = launcher.start(local, folder, environment={"GLOO_SOCKET_IFNAME": "lo"})
    assert training.end() == 0, training.said
    return only_run(folder)


def assert_same_end(one: Path, other: Path) -> None:
    assert course(one) == course(other)
    left, right = (read_nemo(run / "slang.nemo").adapter for run in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left), "the adapters differ"


@pytest.mark.slow
def test_a_job_that_is_preempted_out_of_time_and_loses_a_node_ends_like_an_uninterrupted_run(
    cluster: Cluster, undisturbed: Path, words: list[str], tmp_path: Path
) -> None:
    """To the last bit: two processes on each of two nodes, and four on one."""
    job = Submitted(cluster, tmp_path, words, NODES="2", GPUS_PER_NODE="2", TIME="30")

    def start_again(start: int) -> int:
        """Do not wait for Slurm to start it again by itself; the step that it has gone on from."""
        found: list[str] = []

        def goes_on() -> bool:
            job.start_now()  # again, if Slurm told this start what was meant for the one before: see train.sbatch
            found[:] = re.findall(rf"start {start},.*?Resuming from step (\d+) of {STEPS}", job.said, re.DOTALL)
            return bool(found)

        job.wait_for(goes_on)
        assert 0 < int(found[0]) < STEPS, job.said
        return int(found[0])

    job.wait_for(lambda: job.step() >= 8)
    urgent = cluster.ask(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    ).strip()
    cluster.wait_for(lambda: cluster.job(urgent)["JobState"] == "COMPLETED")
    resumed = start_again(2)
    assert f"stopped by SIGTERM after step {resumed}; checkpoint written" in job.said

    job.wait_for(lambda: job.step() > resumed)
    # What Slurm does by itself for --signal=B:USR1@120, up to half a minute later than asked for.
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    resumed = start_again(3)
    assert f"stopped by SIGUSR1 after step {resumed}; checkpoint written" in job.said
    assert "==> the time limit is near" in job.said

    job.wait_for(lambda: job.step() > resumed)
    starts = cluster.job(job.number)["Restarts"]
    cluster.lose_node("node2")
    job.wait_for(lambda: cluster.job(job.number)["Restarts"] != starts)
    cluster.start_node("node2")
    assert start_again(4) > resumed

    assert job.end() == 0, job.said
    assert "perplexity on 5 held-out rows" in job.said and job.said.endswith("--> is done\n")
    assert {file.name for file in job.run.glob("logs/*")} == {f"process{rank}.log" for rank in range(4)}
    assert_same_end(job.run, undisturbed)
    folder = tmp_path / "runs/slang/slurm"
    assert {file.name for file in folder.iterdir()} == {f"{job.number}.sbatch", f"{job.number}.log"}


@pytest.mark.slow
def test_a_sweep_produces_a_run_for_each_combination_and_one_table(
    cluster: Cluster, words: list[str], tmp_path: Path
) -> None:
    sweep = Submitted(cluster, tmp_path, [*words, "task.train.epochs=1"], SWEEP="peft.r=2,4")
    assert sweep.end() == 0, sweep.said
    runs = sorted(file.parent for file in tmp_path.glob("runs/slang/*/slang.nemo"))
    assert len(runs) == 2
    ranks = {
        tensor.shape[0]
        for run in runs
        for name, tensor in read_nemo(run / "slang.nemo").adapter.items()
        if "lora_A" in name
    }
    assert ranks == {2, 4}
    assert "--> [1] peft.r=4: is done" in sweep.said
    table = sweep.said.rpartition("is done")[2]
    assert all(run.name in table for run in runs) and "held-out perplexity" in table
    assert (tmp_path / "runs/slang/comparison.html").exists()
    assert all(metrics(run, "train_loss") for run in runs)


@pytest.mark.slow
def test_a_failed_job_reports_its_reason_and_exit_code(cluster: Cluster, words: list[str], tmp_path: Path) -> None:
    job = Submitted(cluster, tmp_path, [*words, "task.train.epoch=3"], NODES="2")
    assert job.end() == 2
    assert "unknown key task.train.epoch; did you mean task.train.epochs?" in job.said
    assert "ended with code 2" in job.said
    assert cluster.job(job.number)["Restarts"] == "0" and "Traceback" not in job.said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"PARTITION": "h100"},
            "Slurm refuses PARTITION=h100: Invalid partition name specified. There are batch (2 nodes",
        ),
        ({"NODES": "3"}, "Slurm refuses NODES=3"),
        ({"GPUS_PER_NODE": "9", "NODES": "2"}, "Slurm refuses NODES=2 GPUS_PER_NODE=9"),
        ({"PARTITION": "lab", "ACCOUNT": "other"}, "use this partition (lab allows lab"),
        ({"TIME": "soon"}, "Slurm refuses TIME=soon"),
        ({"TIME": "3-0"}, "cancelled: it asks for more time than its partition allows"),
    ],
)
def test_a_request_that_the_cluster_cannot_meet_gets_one_sentence(
    cluster: Cluster, words: list[str], tmp_path: Path, environment: dict[str, str], says: str
) -> None:
    job = Submitted(cluster, tmp_path, words, **environment)
    assert job.end() == 2
    assert says in job.said and job.said.count("error: ") == 1 and "Traceback" not in job.said
    assert "wrap" not in cluster.ask("squeue", "--noheader", "--name=slang") and not list(
        tmp_path.glob("**/.submitting*")
    )


@pytest.mark.slow
def test_ctrl_c_detaches_and_the_same_command_finds_the_job(cluster: Cluster, words: list[str], tmp_path: Path) -> None:
    other = cluster.ask(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"
    ).strip()
    cluster.wait_for(lambda: cluster.job(other)["JobState"] == "RUNNING")
    job = Submitted(cluster, tmp_path, words)
    job.wait_for(lambda: "waits in the queue" in job.said)
    job.process.send_signal(signal.SIGINT)
    assert job.end() == 130
    assert f"job {job.number} keeps running" in job.said and f"scancel {job.number}" in job.said

    again = Submitted(cluster, tmp_path, words)
    again.wait_for(lambda: f"Job {job.number} does this already" in again.said)
    assert set(cluster.ask("squeue", "--noheader", "--format=%i").split()) == {other, job.number}
    cluster.ask("scancel", job.number)
    assert again.end() == 1 and "CANCELLED" in again.said
    cluster.ask("scancel", other)
    cluster.wait_for(lambda: not cluster.ask("squeue", "--noheader"))


@pytest.mark.slow
def test_the_cluster_leaves_no_processes_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    if reason := slurm_cluster.missing():
        pytest.skip(f"no Slurm to try: {reason}")
    folder = tmp_path_factory.mktemp("short")
    with Cluster(folder) as cluster:
        assert cluster.ask("srun", "--nodes=2", "--gres=gpu:3", "printenv", "CUDA_VISIBLE_DEVICES") == "0,1,2\n" * 2
        job = cluster.ask("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 600").strip()
        cluster.wait_for(lambda: f"{job}.0 " in cluster.ask("squeue", "--noheader", "--steps"))
        assert len(cluster.processes()) > 5
    assert not cluster.processes()
