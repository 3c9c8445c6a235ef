"""NeMo AutoModel as the engine: its recipe from our configuration, our tokens, and its adapter back as our `.nemo`.

The slow tests run the real recipe and are skipped without `.venv-automodel`. CI leaves it out for its 2.5 GB:
`make automodel-env` installs it.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import PATIENCE, ROOT, until
from launcher import ENVIRONMENT
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from converters.nemo_file import read_nemo
from core.configuration import load_config, plain
from core.errors import UserError
from core.prompt import Prompt
from core.run_folder import read_metrics
from training import automodel
from training.automodel_worker import TokenizedSamples
from training.batches import Batches, held_out_loss, tokenize

needs_automodel = pytest.mark.skipif(
    not (automodel.ENVIRONMENT / "automodel.stamp").exists(),
    reason="NeMo AutoModel is not installed (2.5 GB, not in CI): make automodel-env",
)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = [{"input": f"A scene {'by the sea ' * n}", "output": f"Slang: wave{n}\nExample: it waves"} for n in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_automodel_trains_on_the_same_target_tokens(
    rows_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prompt = Prompt(**plain(load_config().task.prompt))
    rows, _ = tokenize(rows_file, tokenizer, prompt, 512, cache=tmp_path / "cache")
    automodel.write_samples(rows, tmp_path / "tokens.jsonl")
    theirs = TokenizedSamples(str(tmp_path / "tokens.jsonl"))
    assert len(theirs) == len(rows)
    for step, item in zip(Batches(rows, 1, 4096, seed=None), theirs, strict=True):
        (ours,) = step.micro_batches
        read, learned = item["input_ids"], [place for place, label in enumerate(item["labels"]) if label != -100]
        assert read[0] == tokenizer.bos_token_id and read == ours.input_ids[0, : len(read)].tolist()
        assert learned == ours.logit_positions.tolist()
        assert [item["labels"][place] for place in learned] == ours.targets.tolist()
        assert item["labels"][-1] == tokenizer.eos_token_id
        assert len(item["attention_mask"]) == len(item["labels"]) == len(read)


def test_the_recipe_has_the_settings_of_the_configuration(tiny_base: Path, tmp_path: Path) -> None:
    config = load_config(
        [
            "engine=automodel",
            "seed=7",
            "peft.r=4",
            "peft.lora_alpha=12",
            "peft.lora_dropout=0.1",
            "peft.target_modules=[q_proj,v_proj]",
            "task.train.batch_size=12",
            "task.train.epochs=5",
            "trainer=cpu",
            "task.train.learning_rate=3e-4",
            "task.train.clip=0.3",
            "task.train.weight_decay=0.001",
            "trainer.devices=2",
            "task.train.warmup_ratio=0.2",
        ]
    )
    recipe = automodel.write_recipe(config, tiny_base, tmp_path, lengths=[200, 300] * 10)
    assert recipe["seed"] == 7
    steps = recipe["step_scheduler"]
    assert (steps["global_batch_size"], steps["num_epochs"], steps["val_every_steps"]) == (12, 5, 2)
    assert steps["local_batch_size"] == 3  # 3 rows of 300 tokens are under 1,024; 6 rows a process are dealt evenly
    lora = recipe["peft"]
    assert (lora["dim"], lora["alpha"], lora["dropout"]) == (4, 12, 0.1)
    assert lora["target_modules"] == ["*.q_proj", "*.v_proj"]
    assert recipe["optimizer"]["lr"] == 3e-4 and recipe["optimizer"]["weight_decay"] == 0.001
    assert recipe["clip_grad_norm"]["max_norm"] == 0.3
    rate = recipe["lr_scheduler"]
    assert (rate["lr_warmup_steps"], rate["lr_decay_steps"]) == (2, 10)
    assert rate["init_lr"] == pytest.approx(1e-4)
    assert recipe["model"]["pretrained_model_name_or_path"] == str(tiny_base)
    assert recipe["dist_env"]["backend"] == "gloo"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("+peft.use_rslora=true", "peft.use_rslora"),
        ("peft.bias=all", "peft.bias"),
        ("peft.target_modules=all-linear", "peft.target_modules"),
        ("trainer.num_nodes=2", "one machine"),
        ("trainer.devices=3", "dealt out evenly"),
    ],
)
def test_settings_that_the_recipe_cannot_apply_are_refused_at_once(word: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        automodel.check(load_config(["engine=automodel", "trainer=cpu", word]))


def test_a_missing_environment_is_reported_with_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automodel, "ENVIRONMENT", tmp_path / "nowhere")
    with pytest.raises(UserError, match="make automodel-env"):
        automodel.check(load_config(["engine=automodel", "trainer=cpu"]))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            [sys.executable, "-m", "commands.train", "engine=nosuch"],
            "engine=nosuch is unknown. Known: lightning, automodel",
        ),
        (["make", "train", "ENGINE=nosuch"], "ENGINE=nosuch is unknown. Known: lightning automodel"),
    ],
)
def test_an_unknown_engine_is_refused_with_the_known_ones(words: list[str], says: str) -> None:
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


def test_the_log_of_the_recipe_becomes_our_metrics(tmp_path: Path) -> None:
    def step(number: int, loss: float) -> str:
        return json.dumps(
            {
                "step": number,
                "epoch": 0,
                "loss": loss,
                "grad_norm": 1.5,
                "lr": 1e-3,
                "mem": 2.0,
                "tps": 500.0,
                "num_tokens_per_step": 250,
                "num_label_tokens": 99,
            }
        )

    # Stopped after its third step, resumed from the second, and read while a line is being written.
    lines = [step(0, 4.0), step(1, 3.0), step(2, 9.0), step(2, 2.0), step(3, 1.0)[:20]]
    (tmp_path / "training.jsonl").write_text("\n".join(lines))
    (tmp_path / "validation.jsonl").write_text(json.dumps({"step": 1, "epoch": 0, "val_loss": 3.5}) + "\n")
    read = automodel.read_log(tmp_path)
    assert [(line.step, line.train_loss, line.val_loss) for line in read] == [
        (1, 4.0, None),
        (2, 3.0, None),
        (2, None, 3.5),
        (3, 2.0, None),
    ]
    assert read[0].to_dict() == {
        "format": 1,
        "step": 1,
        "epoch": 0,
        "train_loss": 4.0,
        "learning_rate": 1e-3,
        "grad_norm": 1.5,
        "tokens_per_second": 500.0,
        "seconds": 0.5,
        "memory_gib": 2.0,
    }


def command(tiny_base: Path, folder: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "commands.train",
        f"model.path={tiny_base}",
        f"data_dir={folder}/data",
        f"runs_dir={folder}/runs",
        "task.data.train_rows=24",
        "task.train.epochs=4",
        "task.train.batch_size=24",
        "task.train.learning_rate=1e-2",
        "task.generate.max_new_tokens=4",
        "engine=automodel",
        "trainer=cpu",
        *more,
    ]


def train(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


@pytest.mark.slow
@needs_automodel
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_of_the_real_recipe_is_a_complete_run(devices: int, tiny_base: Path, tmp_path: Path) -> None:
    result = train(command(tiny_base, tmp_path, f"trainer.devices={devices}"))
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs" / "slang").iterdir()
    assert "-lora-automodel-" in run.name
    for name in ("config.yaml", "environment.json", "evaluation.json", "report.html", "automodel/recipe.yaml"):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").iterdir())
    steps, validations = read_metrics(run)
    assert [line.step for line in steps] == [1, 2, 3, 4] and [line.step for line in validations] == [1, 2, 3, 4]

    # The adapter begins as nothing, and the first step holds every row: its loss is the base model's on our tokens.
    prompt = Prompt(**plain(load_config().task.prompt))
    words = AutoTokenizer.from_pretrained(tiny_base)
    rows, _ = tokenize(tmp_path / "data/training.jsonl", words, prompt, 512, cache=tmp_path / "cache")
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).eval()
    assert steps[0].train_loss == pytest.approx(held_out_loss(base, Batches(rows, 24, 4096, seed=None)), rel=5e-3)

    nemo = read_nemo(run / "slang.nemo")
    assert len(nemo.adapter) == 2 * 7 * 3 and all(t.dtype == torch.float32 for t in nemo.adapter.values())
    assert any(tensor.any() for name, tensor in nemo.adapter.items() if "lora_B" in name)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["after"]["perplexity"] < evaluation["before"]["perplexity"]
    # What the recipe measured in its own process is what the archive gives back in ours.
    held_out, _ = tokenize(tmp_path / "data/validation.jsonl", words, prompt, 512, cache=tmp_path / "cache")
    model, _ = nemo.load_onto(tiny_base, "cpu")
    ours = held_out_loss(model.get_base_model(), Batches(held_out, 24, 4096, seed=None))
    assert validations[-1].val_loss == pytest.approx(ours, rel=5e-3)


@pytest.mark.slow
@needs_automodel
def test_a_killed_run_leaves_no_process_and_resumes(tiny_base: Path, tmp_path: Path) -> None:
    words = command(tiny_base, tmp_path, "task.train.epochs=40")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while not list(tmp_path.glob("runs/slang/*/automodel/checkpoints/LATEST")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = (tmp_path / "runs" / "slang").iterdir()
    log = run / "automodel" / "checkpoints" / "training.jsonl"

    def is_gone() -> bool:
        running = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        return not any(str(tmp_path) in word for words in running for word in words)

    until(is_gone)
    assert log.exists() and not (run / "slang.nemo").exists()

    result = train(words)
    assert result.returncode == 0, result.stderr
    assert "Resuming from" in result.stdout and "Loading checkpoint" in (run / "automodel/recipe.log").read_text()
    assert [line.step for line in read_metrics(run)[0]] == list(range(1, 41))
    assert read_nemo(run / "slang.nemo").adapter


@pytest.mark.slow
@needs_automodel
def test_a_failed_recipe_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recipe failed") as said:
        automodel.run_recipe({"seed": 0, "model": {"_target_": "nowhere.at_all"}}, tmp_path, devices=1)
    assert "nowhere" in str(said.value) and "Error" in str(said.value) and "exitcode" not in str(said.value)
    assert str(tmp_path / "recipe.log") in str(said.value)
