"""Wrong values are refused with a sentence that names them and where they are; right ones arrive."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from conftest import ROOT, fit_here
from omegaconf import OmegaConf
from pydantic import Field
from transformers import AutoTokenizer

from core import configuration
from core.arguments import Arguments, describe, parse
from core.configuration import (
    escaped,
    load_config,
    names,
    plain,
    read_config,
    unescaped,
    write_config,
)
from core.errors import UserError
from core.prompt import Prompt
from data_prep.new_task import new_task
from data_prep.prepare import prepare

FILMS = """\
name: films
data:
  source: films.csv
  columns: { title: [title], price: [price] }
  required: [title, price]
  key: title
prompt:
  instruction: "What does {title} cost?"
  response: "{price}"
"""


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `nemo_configs/` in which files may be written."""
    folder = tmp_path / "nemo_configs"
    for group in ("", "task", "model", "peft", "trainer", "experiment", "prompt"):
        (folder / group).mkdir()
        for file in (configuration.CONFIG_DIR / group).glob("*.yaml"):
            (folder / group / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(configuration, "CONFIG_DIR", folder)
    return folder


def refused(words: list[str]) -> list[str]:
    with pytest.raises(UserError) as error:
        load_config(words)
    return [str(line) for line in error.value.args]


# --- the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("task.train.epohcs=3", "unknown key task.train.epohcs; did you mean task.train.epochs?"),
        ("+task.train.epohcs=3", "unknown key task.train.epohcs; did you mean task.train.epochs?"),
        ("learning_rate=1e-3", "unknown key learning_rate; did you mean task.train.learning_rate?"),
        ("sede=1", "unknown key sede; did you mean seed?"),
        ("task.name=other", "task.name is other; it must be the name of the file, slang"),
        ("peft.quantization.load_in_8bit=true", "unknown key peft.quantization.load_in_8bit; did you mean"),
        ("task.train={epochs: 3, epoch: 2}", "unknown key task.train.epoch; did you mean task.train.epochs?"),
        ("task.train.epochs=two", "task.train.epochs must be a whole number, not 'two'"),
        ("task.train.epochs=2.5", "task.train.epochs must be a whole number, not 2.5"),
        ("task.train.epochs=true", "task.train.epochs must be a whole number, not true"),
        ("task.train.epochs=null", "task.train.epochs must be a whole number, not null"),
        ("task.train.epochs_on.cpu=some", "task.train.epochs_on.cpu must be a whole number, not 'some'"),
        ("task.train.learning_rate=fast", "task.train.learning_rate must be a number, not 'fast'"),
        ("task.train.learning_rate=nan", "task.train.learning_rate must be a number, not nan"),
        ("task.train.learning_rate=-1", "task.train.learning_rate must be 0 or more, not -1"),
        ("task.train.batch_size=0", "task.train.batch_size must be 1 or more, not 0"),
        ("task.train.warmup_ratio=2", "task.train.warmup_ratio must be 1 or less, not 2"),
        ("task.train.schedule=Cosine", "task.train.schedule=Cosine is unknown. Known: CosineAnnealing"),
        ("task.train.optimizer=adam", "task.train.optimizer=adam is unknown. Known: adamw, paged_adamw_32bit; did you"),
        ("task.train.gradient_checkpointing=maybe", "must be true or false, not 'maybe'"),
        ("task.data.split.test=0", "task.data.split.test must be above 0, not 0"),
        ("task.data.columns.example=example", "must be a list such as [a, b], not 'example'"),
        ("task.data.source=''", "task.data.source must not be empty"),
        ("task.data.source=???", "task.data.source has no value"),
        ("task.data.reviews.title=X", "task.data.reviews is for task.data.module=reviews, which is slang here"),
        ("task.evaluate.questions=[7]", "task.evaluate.questions[0] must be a text, fields of the prompt"),
        ("task.prompt.fields.tag=7", 'task.prompt.fields.tag must be text, not 7; write it in quotes: "7"'),
        ("trainer.micro_batch_tokens=-5", "trainer.micro_batch_tokens must be 1 or more, not -5"),
        ("trainer.strategy=zero3", "trainer.strategy=zero3 is unknown. Known: auto, ddp, fsdp2, tp"),
        ("trainer.accelerator=tpu", "trainer.accelerator=tpu is unknown. Known: cpu, gpu"),
        ("engine=lightening", "engine=lightening is unknown. Known: lightning, automodel; did you mean lightning?"),
        ("peft.r=lots", "peft.r must be a whole number, not 'lots'"),
        ("peft.target_modules=[1]", "peft.target_modules must be a list of names such as [q_proj, v_proj]"),
        ("peft.quantization.bnb_4bit_quant_type=nf5", "nf5 is unknown. Known: nf4, fp4"),
        ("seed=-1", "seed must be 0 or more, not -1"),
        ("judge.timeout=0", "judge.timeout must be above 0, not 0"),
        ("task=slagn", "unknown task 'slagn'. Known: chat, slang, squid_game, text; did you mean slang?"),
        ("model=gema-3-270m", "did you mean gemma-3-270m?"),
        ("experiment=attempt9", "unknown experiment 'attempt9'. Known: attempt1"),
        ("task.train.epochs=1,2", "takes one value"),
        ("task.data.columns={a:", "is malformed"),
        ("seed", "arguments are written key=value; did you mean seed?"),
        ("--seed", "arguments are written key=value; did you mean seed?"),
        ("task.prompt.response='for ${price}'", r"for the text ${price} itself write \${price}"),
    ],
)
def test_a_wrong_argument_is_named_with_what_would_be_right(word: str, says: str) -> None:
    (line,) = refused(["peft=qlora" if "quantization" in word else "peft=lora", word])
    assert says in line
    assert line.startswith("argument ") and word.lstrip("+").partition("=")[0] in line


def test_all_that_is_wrong_is_said_at_once() -> None:
    lines = refused(["task.train.epochs=two", "learnig_rate=1", "peft.r=0"])
    assert {line.partition(":")[0] for line in lines} == {
        "argument task.train.epochs=two",
        "argument learnig_rate=1",
        "argument peft.r=0",
    }
    assert len(refused(["task=slagn", "model=gema", "seed"])) == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "data", "report", "publish"])
def test_a_command_answers_before_anything_heavy_is_loaded(command: str) -> None:
    code = f"""
import sys
from commands.{command} import main
from core.errors import run
try:
    run(main)
finally:
    print([name for name in ("torch", "transformers", "datasets", "nemo") if name in sys.modules])
"""
    words = ["task.train.epochs=two", "trainer.devices=0"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "[]\n"
    first, second = done.stderr.splitlines()
    assert first == "error: argument task.train.epochs=two: task.train.epochs must be a whole number, not 'two'"
    assert second == "error: argument trainer.devices=0: trainer.devices must be 1 or more, not 0"


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "lines"),
    [
        (
            "train: {epoch: 50,\n  learnig_rate: 1.0}\n",
            [
                "films.yaml:10: unknown key task.train.epoch; did you mean task.train.epochs?",
                "films.yaml:11: unknown key task.train.learnig_rate; did you mean task.train.learning_rate?",
            ],
        ),
        ("train:\n  batch_size: many\n", ["films.yaml:11: task.train.batch_size must be a whole number, not 'many'"]),
        ("train:\n  clip: 0\n", ["films.yaml:11: task.train.clip must be above 0, not 0"]),
        (
            "evaluate:\n  questions:\n    - Fine?\n    - 7\n",
            ["films.yaml:13: task.evaluate.questions[1] must be a text, fields of the prompt such as"],
        ),
        ("generate: 7\n", ["films.yaml:10: task.generate must be a section of keys such as {key: value}, not 7"]),
        ("evalaute: {}\n", ["films.yaml:10: unknown key task.evalaute; did you mean task.evaluate?"]),
        ("train: {epochs: [\n", ["films.yaml:11: this is not YAML"]),
        ("train:\n\tepochs: 3\n", ["films.yaml:11: this is not YAML", "write spaces in place of the tab"]),
        ('evaluate:\n  questions: ["\\${price}"]\n', ["films.yaml:11: this is not YAML", r"is written \\${"]),
        (
            "evaluate:\n  questions: ['Is ${price} much?']\n",
            [
                r"films.yaml:11: task.evaluate.questions[0] refers to price",
                r"for the text ${price} itself write \${price}",
            ],
        ),
    ],
)
def test_a_wrong_key_or_value_in_a_task_is_named_with_file_and_line(configs: Path, more: str, lines: list[str]) -> None:
    (configs / "task/films.yaml").write_text(FILMS + more, encoding="utf-8")
    said = refused(["task=films"])
    for line in lines:
        assert any(line in one for one in said), said
    assert all(one.startswith("nemo_configs/task/films.yaml:") for one in said)


@pytest.mark.parametrize("left_out", ["source", "columns", "key"])
def test_a_key_that_a_task_lacks_is_named_with_the_section_that_lacks_it(configs: Path, left_out: str) -> None:
    text = "".join(line for line in FILMS.splitlines(keepends=True) if not line.startswith(f"  {left_out}:"))
    (configs / "task/films.yaml").write_text(text, encoding="utf-8")
    assert refused(["task=films"]) == [f"nemo_configs/task/films.yaml:2: task.data.{left_out} has no value"]


@pytest.mark.parametrize(
    ("file", "old", "new", "words", "says"),
    [
        (
            "model/gemma-3-270m.yaml",
            "embedded: true",
            "embeded: true",
            [],
            "did you mean model.embedded?",
        ),
        ("peft/lora.yaml", "r: 8", "r: eight", [], "peft/lora.yaml:3: peft.r must be a whole number, not 'eight'"),
        (
            "trainer/cpu.yaml",
            "devices: 1",
            "device: 1",
            [],
            "did you mean trainer.devices?",
        ),
        (
            "experiment/attempt1.yaml",
            "epochs: 1",
            "epoch: 1",
            ["experiment=attempt1"],
            "attempt1.yaml:11: unknown key",
        ),
        ("config.yaml", "seed: 0", "seed: zero", [], "nemo_configs/config.yaml:12: seed must be a whole number"),
        ("task_defaults.yaml", "seeds: 3", "seeds: 0", [], "task.evaluate.seeds must be 1 or more, not 0"),
        (
            "task/squid_game.yaml",
            "kind: series",
            "kinds: series",
            ["task=squid_game"],
            "squid_game.yaml:12: unknown key",
        ),
        ("task/slang.yaml", "name: slang\n", "defaults: [chta, _self_]\nname: slang\n", [], "did you mean chat?"),
    ],
)
def test_every_file_is_checked(configs: Path, file: str, old: str, new: str, words: list[str], says: str) -> None:
    text = (configs / file).read_text(encoding="utf-8")
    assert text.count(old) >= 1
    (configs / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    assert any(says in line for line in refused(["trainer=cpu", *words]))


# --- what is right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("seed=3", "seed", 3),
        ("task.train.epochs=5", "task.train.epochs", 5),
        ("+task.train.epochs=5", "task.train.epochs", 5),
        ("++task.train.epochs=5", "task.train.epochs", 5),
        ("task.train.epochs_on.cpu=7", "task.train.epochs", 7),
        ("task.train.learning_rate=1e-3", "task.train.learning_rate", 0.001),
        ("task.train.clip=1", "task.train.clip", 1),
        ("task.train.evaluate_every=null", "task.train.evaluate_every", None),
        ("task.train.early_stopping=2", "task.train.early_stopping", 2),
        ("task.train.schedule=WarmupAnnealing", "task.train.schedule", "WarmupAnnealing"),
        ("peft.target_modules=all-linear", "peft.target_modules", "all-linear"),
        ("peft.target_modules=[q_proj]", "peft.target_modules", ["q_proj"]),
        ("peft.lora_alpha=8.5", "peft.lora_alpha", 8.5),
        ("task.data.train_fields=[slang,description]", "task.data.train_fields", ["slang", "description"]),
        ("task.data.columns.example=[]", "task.data.columns.example", []),
        ("task.data.filters.example=3", "task.data.filters.example", "3"),
        ("task.data.source=/a path/with, signs=[1].csv", "task.data.source", "/a path/with, signs=[1].csv"),
        ("experiment_name=5", "experiment_name", "5"),
        ("run=runs/slang/it's", "run", "runs/slang/it's"),
        ("+run=x", "run", "x"),
        ("task.evaluate.questions=[Hi,{context: rain}]", "task.evaluate.questions", ["Hi", {"context": "rain"}]),
        ("task.evaluate.min_gain=-0.5", "task.evaluate.min_gain", -0.5),
        ("task.generate.repetition_penalty=1.1", "task.generate.repetition_penalty", 1.1),
        ("judge.url=http://127.0.0.1:8000/v1", "judge.url", "http://127.0.0.1:8000/v1"),
        (r"task.prompt.response='\${slang}'", "task.prompt.response", "${slang}"),
        ("experiment=attempt1", "peft.r", 4),
        ("+experiment=attempt1", "data_dir", "data/slang-attempt1"),
    ],
)
def test_a_right_value_arrives(word: str, path: str, value: object) -> None:
    found: Any = load_config(["trainer=cpu", word])
    for name in path.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value and type(found) is type(value)


def test_a_file_that_is_not_utf8_is_named(configs: Path) -> None:
    (configs / "task/films.yaml").write_bytes(FILMS.encode() + b"# caf\xe9\n")
    assert refused(["task=films"]) == [
        "nemo_configs/task/films.yaml: is not UTF-8 (invalid continuation byte); save it as UTF-8"
    ]


@pytest.mark.parametrize("name", ["../evil", "a b", "", ".hidden", "caf\u00e9"])
def test_a_name_that_cannot_be_a_folder_s_is_refused(configs: Path, name: str) -> None:
    (configs / "task/films.yaml").write_text(FILMS.replace("name: films", f'name: "{name}"'), encoding="utf-8")
    (said,) = refused(["task=films"])
    assert said.startswith("nemo_configs/task/films.yaml:1: task.name ")
    if name:
        assert "experiment_name names a folder" in refused([f"experiment_name='{name}'"])[0]


@pytest.mark.parametrize("word", ["hydra.verbose=true", "+hydra.foo=1", "hydra/launcher=x", "~hydra.foo=1"])
def test_hydra_s_own_settings_are_no_keys(word: str) -> None:
    assert refused([word])[0].startswith(f"argument {word}: unknown key hydra")


# One of each generation at once, the others with the slow tests: each is a whole composition.
QUICK = ("gemma-2b", "gemma-2-2b", "gemma-3-270m", "gemma-4-e2b")


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in names("model")]
)
def test_every_file_of_the_project_passes(model: str) -> None:
    for task in ("slang", "squid_game", "chat"):
        config = load_config([f"task={task}", f"model={model}", "peft=qlora", "trainer=gpu"])
        assert config.model.name == model and config.peft.quantization is not None


def test_a_task_from_elsewhere_brings_options_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tasks/poems"
    folder.mkdir(parents=True)
    (folder / "rows.py").write_text("def row_fields(columns, prompt):\n    return columns\n")
    (folder / "options.py").write_text(
        "from core.schema import Section\n\n\nclass Options(Section):\n    lines: int\n    rhymes: bool = True\n"
    )
    (tmp_path / "nemo_configs/task").mkdir(parents=True)
    text = FILMS.replace("name: films", "name: poems").replace(
        "data:\n", "data:\n  module: poems\n  poems: {lines: 4}\n"
    )
    (tmp_path / "nemo_configs/task/poems.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    data = load_config(["task=poems"]).task.data
    assert data.options.lines == 4 and data.options.rhymes and plain(data)["poems"] == {"lines": 4}
    (line,) = refused(["task=poems", "task.data.poems.lines=few"])
    assert "task.data.poems.lines must be a whole number, not 'few'" in line
    (line,) = refused(["task=poems", "task.data.poems.line=4"])
    assert "unknown key task.data.poems.line; did you mean task.data.poems.lines?" in line


# --- a run's own file -------------------------------------------------------------------------------------------


def test_a_run_s_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    for words in (["task=squid_game", "peft=qlora"], ["task=chat", r"task.prompt.response='\${answer}'"]):
        config = load_config(words)
        write_config(config, tmp_path / "config.yaml")
        assert read_config(tmp_path / "config.yaml") == config
        assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == plain(config)


def test_the_configuration_of_an_old_run_is_still_read(tmp_path: Path) -> None:
    old = plain(load_config(["task=chat", "seed=5"]))
    old["task"]["train"]["adam_beta"] = 0.9
    old["was"] = {"once": "here"}
    del old["task"]["train"]["accumulation"], old["judge"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert read_config(tmp_path / "config.yaml") == load_config(["task=chat", "seed=5"])


# --- a dollar sign before a field -------------------------------------------------------------------------------


def test_escaped_texts_are_what_omegaconf_reads_as_the_texts_themselves() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices(["$", "{", "}", "\\", "a", "${", "\\${", "'", '"', " ", "\n"], k=8))
        assert unescaped(escaped(text)) == text
        assert OmegaConf.to_container(OmegaConf.create({"a": [escaped(text)]}), resolve=True) == {"a": [text]}


def test_a_price_goes_from_data_to_config_to_archive_and_back(configs: Path, tmp_path: Path, tiny_base: Path) -> None:
    from nemo.core import ModelPT

    from converters import nemo
    from converters.nemo_file import read_nemo
    from training.batches import tokenize

    (tmp_path / "films.csv").write_text(
        "title,price\n" + "".join(f"Film number {n} of {n * n},{n}\n" for n in range(60))
    )
    text = FILMS.replace("source: films.csv", f"source: {tmp_path}/films.csv")
    (configs / "task/films.yaml").write_text(text.replace('response: "{price}"', "response: 'It costs \\${price}'"))
    config = load_config(["task=films", "trainer=cpu", f"data_dir={tmp_path}/data", "task.train.epochs=1"])
    assert config.task.prompt.response == "It costs ${price}"
    folder = prepare(config, None)
    rows = (folder / "training.jsonl").read_text()
    assert '"output": "It costs $7"' in rows and "\\\\" not in rows
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml").task.prompt == config.task.prompt

    prompt, tokenizer = Prompt(**plain(config.task.prompt)), AutoTokenizer.from_pretrained(tiny_base)
    tokens, _ = tokenize(folder / "test.jsonl", tokenizer, prompt, 512, tmp_path / "cache")
    fit_here(config, tiny_base, tokens, tokens, tmp_path)
    archive = tmp_path / "slang.nemo"
    assert read_nemo(archive).prompt.response == "It costs ${price}"
    assert ModelPT.restore_from(str(archive), map_location="cpu").prompt.response == "It costs ${price}"
    nemo.write(nemo.read(archive), tmp_path / "again.nemo")
    assert read_nemo(tmp_path / "again.nemo").prompt.response == "It costs ${price}"


def test_a_table_with_references_in_it_becomes_a_task_that_says_them(configs: Path, tmp_path: Path) -> None:
    rows = "".join(f'"What is ${{seed}} {n}?",It is {n}.\n' for n in range(40))
    (tmp_path / "a.csv").write_text("question,answer\n" + rows)
    new_task("asked", str(tmp_path / "a.csv"))
    assert load_config(["task=asked"]).task.prompt.fields["question"].startswith("What is ${seed} ")


# --- a command's own arguments ----------------------------------------------------------------------------------


class Options(Arguments):
    port: int = Field(8080, ge=1, description="port to listen on")
    source: Path = Field(description="what to read")
    to: Literal["gguf", "hf"] = Field("hf", description="what to write")
    names: list[str] = Field([], description="those to take")
    sizes: list[Annotated[int, Field(ge=1)]] = Field([1, 2], description="how large")
    text: str | None = Field(None, description="anything")
    clean: bool = Field(False, description="whether it is")


def test_arguments_arrive_with_their_types() -> None:
    words = ["port=81", "source=a b/c=d", "to=gguf", "names=a,b", "sizes=3", "text=It's [here], ${now}", "clean=true"]
    given = parse(Options, words)
    assert given == Options(
        port=81, source=Path("a b/c=d"), to="gguf", names=["a", "b"], sizes=[3], text="It's [here], ${now}", clean=True
    )
    assert parse(Options, ["source=x"]).sizes == [1, 2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prot=1"], "argument prot=1: unknown name prot; did you mean port?"),
        (["--port=1"], "did you mean port?"),
        (["port=x"], "argument port=x: port must be a whole number, not 'x'"),
        (["port=0"], "argument port=0: port must be 1 or more, not '0'"),
        (["port"], "argument port: has no value; write port=VALUE"),
        (["to=ggfu"], "argument to=ggfu: to=ggfu is unknown. Known: gguf, hf; did you mean gguf?"),
        (["sizes=1,x"], "argument sizes=1,x: sizes must be a whole number, not 'x'"),
        (["clean=perhaps"], "clean must be true or false, not 'perhaps'"),
        ([], "argument source is missing: what to read"),
    ],
)
def test_a_wrong_argument_of_a_command_is_named(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        parse(Options, [*words, *(["source=x"] if words else [])])
    (line,) = error.value.args
    assert says in line


def test_help_lists_arguments_with_types_defaults_and_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(Options, ["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.strip() == describe(Options)
    for part in ("port  <whole number, 1 or more>", "port to listen on (default: 8080)", "gguf | hf", "what to read"):
        assert part in said


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "convert", "serve", "prepare_serving", "new_task"])
def test_a_command_says_what_it_takes(command: str) -> None:
    words = [sys.executable, "-m", f"commands.{command}", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0 and "  <" in done.stdout and "Traceback" not in done.stderr


def test_the_reference_says_what_the_schema_and_the_commands_say() -> None:
    from commands.config_reference import TARGET, reference

    assert TARGET.read_text(encoding="utf-8") == reference(), "run: python -m commands.config_reference"
