"""Several processes train what one trains, end what they began, and leave nothing hanging when one of them dies."""

import gc
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from conftest import FAMILIES, tiny_gemma, until
from datasets import Dataset
from launcher import Launcher, Training
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_gemma4 import KINDS as KINDS_4
from tiny_gemma4 import even_gemma4, tiny_gemma4
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import GemmaConfig

from converters.nemo_file import read_nemo
from core.configuration import load_config
from core.errors import UserError
from training.batches import Batches, loss_sum
from training.distribute import AdapterParallel, shard_base, split_base
from training.fused_layers import fuse_layers
from training.launcher import check_processes, check_tensor_parallel
from training.packed_attention import use_packed_attention
from training.signals import EXIT_LOST

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = ("ddp", "fsdp2", "tp")
EXPERTS = "26b-a4b with adapters on its experts"
LOOPBACK = ("GLOO_SOCKET_IFNAME", "lo")  # the machine that tests may not know its own name


def tiny_lora(family: str) -> PeftModel:
    experts = {}
    if family == EXPERTS:
        base = even_gemma4("26b-a4b")
        experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    elif family in KINDS_4:
        base = even_gemma4(family, **{"num_global_key_value_heads": 2} if family == "26b-a4b" else {})
    else:
        base = tiny_gemma(family, vocab_size=600)
    base.loss_sum = MethodType(loss_sum, base)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **experts))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fuse_layers(model)
    use_packed_attention(base)
    return model


def rows() -> Dataset:
    """Five rows of very different lengths: two processes cut them into unequally many micro-batches."""
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 70, 12, 41, 23]
    ids = [torch.randint(3, 600, (length,), generator=generator).tolist() for length in lengths]
    learned = [[[first, length]] for first, length in zip([5, 3, 6, 20, 1], lengths, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "length": lengths, "target_ranges": learned})


def adapters(model: PeftModel) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def take_step(model: PeftModel, share: tuple[int, int]) -> torch.Tensor:
    """Gradients of one step over all rows, and this process's part of its loss."""
    model.zero_grad()
    (step,) = Batches(rows(), 8, 60, seed=0, rank=share[0], world_size=share[1])
    total = torch.zeros(())
    for batch in step.micro_batches:
        loss = model.get_base_model().loss_sum(batch) / step.target_tokens
        loss.backward()
        total += loss.detach()
    return total


def held_bytes() -> int:
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            local = thing.to_local() if isinstance(thing, torch.distributed.tensor.DTensor) else thing
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def take_steps_like(
    kind: str, family: str, mesh: DeviceMesh, expected: torch.Tensor, gradients: list[torch.Tensor]
) -> PeftModel:
    model = tiny_lora(family)
    strategy = AdapterParallel(kind)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    if kind == "fsdp2":
        shard_base(model.get_base_model(), mesh)
    elif kind == "tp":
        split_base(model.get_base_model(), mesh.get_group())
    for _ in range(2 if kind == "fsdp2" else 1):  # once more: what was gathered and freed is gathered again
        total = take_step(model, strategy.share)
        total = strategy.sum_step(adapters(model), total)
        torch.testing.assert_close(total, expected)
        for parameter, gradient in zip(adapters(model), gradients, strict=True):
            atol = max(1e-6, 1e-5 * gradient.abs().max().item())
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=atol)
    model.zero_grad()
    return model


def compare_with_one_process(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for family in (*FAMILIES, *KINDS_4, EXPERTS):
        alone = tiny_lora(family)
        expected = take_step(alone, (0, 1))
        gradients = [parameter.grad for parameter in adapters(alone)]
        whole = sum(parameter.nbytes for parameter in alone.parameters() if not parameter.requires_grad)
        del alone
        for kind in KINDS:
            if kind == "tp" and family in ("e2b", "12b", EXPERTS):
                continue  # refused: one head for keys and values in some layers, and adapters that it does not divide
            gc.collect()
            before = held_bytes()
            model = take_steps_like(kind, family, mesh, expected, gradients)
            gc.collect()
            held = (held_bytes() - before - sum(parameter.nbytes for parameter in adapters(model))) / whole
            # tp copies the embeddings and the experts
            low, high = {"ddp": (1, 1.01), "fsdp2": (0.5, 0.55), "tp": (0.5, 0.9)}[kind]
            assert low <= held <= high, f"{family} {kind}: a process holds {held} of the base"
            del model
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every strategy and family, with micro-batches of no row; of a sharded base, half lies in each process."""
    for name, value in (("OMP_NUM_THREADS", "1"), LOOPBACK):
        monkeypatch.setenv(name, value)
    counts = [
        len(next(iter(Batches(rows(), 8, 60, 0, rank=rank, world_size=2))).micro_batches[-1].targets) for rank in (0, 1)
    ]
    assert min(counts) == 0 < max(counts), "no process is left without rows: the test is too weak"
    torch.multiprocessing.spawn(compare_with_one_process, (str(tmp_path),), nprocs=2)


def test_a_model_that_cannot_be_divided_is_refused_with_an_alternative() -> None:
    base = tiny_gemma("gemma2", vocab_size=600)
    dora = get_peft_model(base, LoraConfig(r=4, use_dora=True, target_modules=TARGETS, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="strategy=fsdp2 supports any"):
        split_base(dora.get_base_model(), group=None)
    base = tiny_gemma("gemma2", vocab_size=600)
    base.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), False)
    for divide in (shard_base, split_base):
        with pytest.raises(UserError, match="strategy=ddp, which copies it"):
            divide(base, None)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("source") / "tiny.csv"
    lines = [
        f"lum{n}ami,To dor{n * 7 % 60} a vex{n * 11 % 60}ix{' often' * (n % 9)}.,I lum{n}ami it.,At zol{n}."
        for n in range(60)
    ]
    file.write_text("Slang,Description,Example,Context\n" + "\n".join(lines) + "\n")
    return file


Start = Callable[..., Training]


@pytest.fixture(scope="module")
def start(launcher: Launcher, source: Path, tiny_base: Path) -> Start:
    """Starts the training of a folder's run; its worker processes are what `commands.train` itself starts."""

    def start(folder: Path, *more: str, said: str = "", **environment: str) -> Training:
        words = [
            f"task.data.source={source}",
            f"model.path={tiny_base}",
            f"data_dir={folder}/data",
            f"runs_dir={folder}/runs",
            "task.train.epochs=2",
            "task.train.batch_size=4",
            "task.generate.max_new_tokens=4",
            *more,
        ]
        return launcher.start(words, folder / said, environment=dict([LOOPBACK], **environment))

    return start


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs" / "slang").iterdir()
    return run


def losses(run: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], kind): line[kind] for line in lines for kind in ("train_loss", "val_loss") if kind in line}


def wait_for_steps(training: Training, folder: Path, steps: int) -> None:
    training.wait_until(
        lambda: list(folder.glob("runs/slang/*/metrics.jsonl")) and len(losses(only_run(folder))) >= steps
    )


def workers(training: Training) -> dict[int, int]:
    """Process ids of the training processes, by rank."""
    found = {}
    for pid in Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        found.update({rank: int(pid) for rank in ranks})
    return found


def assert_gone(pids: list[int]) -> None:
    until(lambda: all("Z (" in _state(pid) for pid in pids))


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text().partition("State:")[2].splitlines()[0]
    except OSError:
        return "Z ("


def assert_same_result(run: Path, alone: Path) -> None:
    one, other = losses(alone), losses(run)
    assert one.keys() == other.keys()
    for step, kind in one:
        # In bfloat16, one step of four rows differs by its roundings; exact equality is tested in float32 above.
        tolerance = 1e-3 if kind == "val_loss" else 5e-3
        assert other[step, kind] == pytest.approx(one[step, kind], abs=tolerance), (step, kind)
    measured, expected = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, alone))
    assert measured["before"] == expected["before"]
    assert measured["after"]["perplexity"] == pytest.approx(expected["after"]["perplexity"], rel=3e-3)
    adapter, whole = (read_nemo(folder / "slang.nemo").adapter for folder in (run, alone))
    assert {name: tensor.shape for name, tensor in adapter.items()} == {n: t.shape for n, t in whole.items()}


@pytest.fixture(scope="module")
def alone(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    training = start(folder)
    assert training.end() == 0, training.said
    return only_run(folder)


@pytest.fixture(scope="module")
def two_machines(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same command on two machines, of which both happen to be this one."""
    folder = tmp_path_factory.mktemp("machines")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    second = start(folder, "trainer.num_nodes=2", said="second", NODE_RANK="1", **address)
    first = start(folder, "trainer.num_nodes=2", said="first", NODE_RANK="0", **address)
    for machine in (first, second):
        assert machine.end() == 0, machine.said
    return only_run(folder)


@pytest.mark.slow
def test_two_machines_give_the_result_of_one(two_machines: Path, alone: Path) -> None:
    assert_same_result(two_machines, alone)
    logs = [file.read_text() for file in two_machines.rglob("*") if file.suffix in (".log", ".txt")]
    assert logs and not any("without SLURM" in text for text in logs)  # NeMo's error, which is none


@pytest.mark.slow
def test_a_run_stops_when_a_process_is_killed_and_can_be_resumed(start: Start, tmp_path: Path, alone: Path) -> None:
    sharded = ("trainer.devices=2", "trainer.strategy=fsdp2")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    training = start(killed, *sharded)
    wait_for_steps(training, killed, len(losses(alone)) // 2)
    pids = workers(training)
    os.kill(pids[1], signal.SIGKILL)
    assert training.end() == EXIT_LOST, training.said
    assert "training process 1 of 2 was killed by SIGKILL" in training.said and "Traceback" not in training.said
    assert_gone(list(pids.values()))

    training = start(killed, *sharded)
    assert training.end() == 0 and "Resuming from step" in training.said, training.said
    assert_same_result(only_run(killed), alone)
    training = start(whole, *sharded)
    assert training.end() == 0, training.said
    one, other = (read_nemo(only_run(folder) / "slang.nemo").adapter for folder in (killed, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_an_interrupted_run_says_how_and_resumes_with_another_number_of_processes(
    start: Start, tmp_path: Path, alone: Path
) -> None:
    steps = len(losses(alone))
    for strategy, number, code, after in (  # half of the steps are left for the last signal to come in time
        ("tp", signal.SIGINT, 130, steps // 6),
        ("ddp", signal.SIGTERM, 75, steps // 3),  # what a scheduler takes as "start it again"
        ("fsdp2", signal.SIGUSR1, 75, steps // 2),
    ):
        training = start(tmp_path, "trainer.devices=2", f"trainer.strategy={strategy}")
        wait_for_steps(training, tmp_path, after)
        pids = workers(training)
        training.send(number)
        assert training.end() == code and "Traceback" not in training.said, training.said
        assert training.said.lower().count("run the same command to resume") == 1
        assert_gone(list(pids.values()))
    training = start(tmp_path)
    assert training.end() == 0, training.said
    assert_same_result(only_run(tmp_path), alone)


@pytest.mark.slow
def test_an_error_is_reported_once_and_no_process_outlives_its_parent(start: Start, tmp_path: Path) -> None:
    training = start(tmp_path / "nan", "trainer.devices=2", "task.train.learning_rate=1e30", "task.train.clip=1e30")
    assert training.end() == 2
    assert training.said.count("the loss became") == 1 and "Traceback" not in training.said

    training = start(tmp_path / "killed", "trainer.devices=2")
    wait_for_steps(training, tmp_path / "killed", 1)
    pids = workers(training)
    assert sorted(pids) == [0, 1]
    training.send(signal.SIGKILL)
    assert_gone(list(pids.values()))
    assert training.end() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.strategy=zero3", "Known: auto, ddp, fsdp2, tp"),
        ("trainer.strategy=fsdp2", "trainer.devices=2 or more"),
        ("trainer.devices=0", "must be 1 or more"),
        ("trainer.devices=two", "must be a whole number"),
        ("trainer.num_nodes=2", "MASTER_ADDR, MASTER_PORT, NODE_RANK must be set"),
    ],
)
def test_an_invalid_number_of_processes_is_refused(override: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=says):
        check_processes(load_config(["trainer=cpu", override]))


@pytest.mark.parametrize(
    ("model", "devices", "says"),
    [
        (1, 2, "cannot be split"),
        (4, 3, "may be 2 or 4"),
        (4, 2, None),
        (4, 4, None),
        ("e2b", 2, "1 key/value heads, so it cannot be split"),
        ("12b", 2, "1 key/value heads in some layers, so it cannot be split"),
        ("31b", 4, "2 key/value heads in some layers, so trainer.devices may be 2"),
        ("31b", 2, None),
    ],
)
def test_tensor_parallelism_lists_the_sizes_that_the_heads_of_every_layer_allow(
    model: int | str, devices: int, says: str | None, tmp_path: Path
) -> None:
    """`model` is a Gemma 4, or a Gemma 1 by its number of key/value heads."""
    gemma1 = {"num_attention_heads": 8, "intermediate_size": 64}
    architecture = (
        tiny_gemma4(model).config if isinstance(model, str) else GemmaConfig(num_key_value_heads=model, **gemma1)
    )
    architecture.save_pretrained(tmp_path)
    config = load_config(["trainer=cpu", f"trainer.devices={devices}", "trainer.strategy=tp"])
    if says is None:
        check_tensor_parallel(config, tmp_path)
    else:
        with pytest.raises(UserError, match=says):
            check_tensor_parallel(config, tmp_path)
