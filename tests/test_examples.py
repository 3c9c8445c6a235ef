"""Every file of examples/ is run as its first lines say, on a tiny random Gemma."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from tiny_serving import PROMPTS, serve_tiny
from transformers import AutoModelForCausalLM

from converters.convert import convert
from converters.nemo_file import read_nemo

EXAMPLES = ROOT / "examples"
SCENE = "You missed the last bus home and it starts to rain."


def run(*argv: object, path: str = "", **environment: str) -> str:
    """Run a program in the repository; what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "ARGS")}
    inherited |= {"OMP_NUM_THREADS": "1", "PATH": f"{path}{os.pathsep}{os.environ['PATH']}", **environment}
    result = subprocess.run(
        [str(word) for word in argv], cwd=ROOT, env=inherited, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def tiny_settings(tiny_base: Path, tmp_path: Path) -> list[str]:
    """Settings that train the tiny base in seconds and leave the repository as it is."""
    return [
        f"model.path={tiny_base}",
        f"data_dir={tmp_path}/data",
        f"runs_dir={tmp_path}/runs",
        "task.train.batch_size=8",
        "task.generate.max_new_tokens=4",
    ]


@pytest.fixture
def make_without_installing(tmp_path: Path) -> str:
    """A folder with a `make` that takes the environment as it is: the tests run in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "make").write_text(f'#!/bin/sh\nexec {shutil.which("make")} -o .venv/train.stamp "$@"\n')
    (folder / "make").chmod(0o755)
    return str(folder)


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
def test_train_on_your_csv(tiny_settings: list[str], make_without_installing: str, tmp_path: Path) -> None:
    printed = run(EXAMPLES / "train_on_your_csv.sh", *tiny_settings, path=make_without_installing, RUNTIME="local")
    assert "Example 1 of" in printed and "perplexity on" in printed
    rows = table(EXAMPLES / "bike_slang.csv")
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert manifest["rows_in"] == manifest["rows_out"] == len(rows)
    (trained,) = (tmp_path / "runs/slang").iterdir()
    assert (trained / "slang.nemo").exists() and (trained / "report.html").exists()


@pytest.mark.slow
def test_add_a_task(tiny_settings: list[str], make_without_installing: str, tmp_path: Path) -> None:
    run(EXAMPLES / "add_a_task/run.sh", *tiny_settings, path=make_without_installing, RUNTIME="local")
    places = {place["place"]: place for place in table(EXAMPLES / "add_a_task/places.csv")}
    rows = [
        json.loads(line)
        for split in ("training", "validation", "test")
        for line in (tmp_path / f"data/{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == 7 * len(places)
    for row in rows:
        name, rest = row["input"].removeprefix("Can I visit the ").split(" on ")
        day, hour = rest.removesuffix(":00?").split(" at ")
        place = places[name]
        is_open = day != place["closed_on"] and int(place["opens"]) <= int(hour) < int(place["closes"])
        assert row["output"].startswith("Yes" if is_open else "No")
    (trained,) = (tmp_path / "runs/opening_hours").iterdir()
    assert (trained / "opening_hours.nemo").exists() and (trained / "report.html").exists()


@pytest.mark.slow
def test_load_in_transformers(tiny_base: Path, tmp_path: Path) -> None:
    """The example answers as the archive that it was converted from, asked by this project."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "slang")
    PROMPTS["slang"].save(tmp_path / "slang")
    convert(tmp_path / "slang", "nemo", tmp_path / "archive", tiny_base)
    archive = tmp_path / "archive/slang.nemo"
    convert(archive, "adapter", tmp_path / "adapter", tiny_base)
    # -I: neither the working directory nor PYTHONPATH is searched, so nothing of this project can be imported
    printed = run(sys.executable, "-I", EXAMPLES / "load_in_transformers.py", tiny_base, tmp_path / "adapter", SCENE)

    model, tokenizer = read_nemo(archive).load_onto(tiny_base, as_trained=True)
    question = PROMPTS["slang"].wrap(PROMPTS["slang"].write_instruction(context=SCENE))
    inputs = tokenizer(question, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=80, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert printed == answer + "\n"


@pytest.mark.slow
def test_call_the_server(tiny_base: Path, tmp_path: Path) -> None:
    # the package as the wheel has it: serving/client with the prompt's own files in it
    package = shutil.copytree(ROOT / "serving/client", tmp_path / "packages/gemma_client")
    for name in ("prompt.py", "gemma4_turns.py", "gemma4_answers.py"):
        shutil.copy(ROOT / "core" / name, package / name)
    with serve_tiny(tiny_base, tmp_path) as stack:
        program = [EXAMPLES / "call_the_server.py", stack.grpc, f"{stack.gateway}/v1"]
        printed = run(sys.executable, *program, PYTHONPATH=str(package.parent))
    assert set(PROMPTS) <= set(printed.splitlines()[0].removeprefix("Adapters: ").split(", "))
    answered = printed.partition(" tokens):\n")[2]
    through_openai = printed.partition("through the OpenAI API:\n")[2].rstrip("\n")
    assert through_openai and answered.startswith(through_openai)


RUN_BY = {
    "train_on_your_csv.sh": test_train_on_your_csv,
    "bike_slang.csv": test_train_on_your_csv,
    "call_the_server.py": test_call_the_server,
    "load_in_transformers.py": test_load_in_transformers,
    "add_a_task/run.sh": test_add_a_task,
    "add_a_task/places.csv": test_add_a_task,
    "add_a_task/nemo_configs/task/opening_hours.yaml": test_add_a_task,
    "add_a_task/tasks/opening_hours/rows.py": test_add_a_task,
}


def test_every_file_is_run_and_every_program_is_short_and_described() -> None:
    files = {str(file.relative_to(EXAMPLES)) for file in EXAMPLES.rglob("*") if file.is_file()}
    assert {file for file in files if "__pycache__" not in file} == {"README.md", *RUN_BY}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in RUN_BY:
        assert Path(file).name in readme
        if file.endswith((".py", ".sh")):
            assert len((EXAMPLES / file).read_text(encoding="utf-8").splitlines()) < 60, file
