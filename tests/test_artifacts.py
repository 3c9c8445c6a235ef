"""Artifacts: old ones are still read, unknown formats are refused, and a damaged file is named with its field."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands import artifact_reference
from core.artifacts import ARTIFACTS, Conversion, Evaluation, Generation, Manifest, Metrics, MetricsLine, Record
from core.errors import UserError
from core.files import write_json
from core.run_folder import Run

# A run folder as the code wrote it when its files had no format numbers.
OLD_RUN = {
    "config.yaml": "task: {name: slang}\nmodel: {name: gemma-3-270m}\npeft: {name: lora}\ndata_dir: data/slang\n",
    "data_manifest.json": """{
  "task": "slang",
  "fingerprint": "6c1f",
  "source": {
    "name": "slang.csv", "sha256": "ab12", "bytes": 2048,
    "form": "csv", "encoding": "utf-8", "columns": {"slang": "Slang", "context": null}
  },
  "rows_in": 120, "rows_out": 100, "dropped": {"explicit term": 20}, "merged": 0, "repaired": 3, "notes": {},
  "splits": {
    "training": {
      "rows": 80, "bytes": 9000, "sha256": "t",
      "tokens": {"total": 8000, "learned": 4000, "mean": 100.0, "max": 180, "counted_rows": 80}
    },
    "validation": {"rows": 10, "bytes": 900, "sha256": "v"},
    "test": {"rows": 10, "bytes": 900, "sha256": "e", "source_rows": 10}
  },
  "seed": 0, "tokenizer_sha256": null
}""",
    "environment.json": """{
  "command": "python -m commands.train task=slang", "commit": "c0ffee", "python": "3.11.7",
  "packages": {"torch": "2.13.0"}, "cpu": "A Processor", "cores": 2, "memory_gib": 23.5, "gpus": [], "base": "ba5e"
}""",
    "metrics.jsonl": """{"step": 1, "epoch": 0, "train_loss": 3.5, "grad_norm": 2, "seconds": 2.0}
{"step": 2, "epoch": 0, "train_loss": NaN, "learning_rate": 0.0001, "grad_norm": 1.5, "seconds": 4.0, "steps": 2}
{"step": 2, "epoch": 0, "val_loss": 3.0}
{"step": 3, "epoch": 0, "train_""",
    "evaluation.json": """{
  "held_out_rows": 2, "rows_over_max_length": {"training": 1}, "questions": ["Make a word for rain."],
  "before": {"loss": 3.5, "perplexity": 33.1, "rows": [[35.0, 10], [17.5, 5]], "answers": ["-"]},
  "after": {"loss": 3, "perplexity": 20.1, "rows": [[30.0, 10], [15.0, 5]], "answers": ["Slang: drip"]},
  "training_seconds": 6.0, "peak_memory_gib": 2.5, "memory_estimate_gib": 2.4, "finished": "2026-11-21T10:20:30+00:00"
}""",
    "metrics.json": """{
  "sampling": {"temperature": 0.7, "max_new_tokens": 120}, "settings": {"seeds": 1, "metrics": null},
  "held_out": {
    "loss": {"before": [3.5, 3.4, 3.6], "after": [3.0, 2.9, 3.1], "difference": [-0.5, -0.6, -0.4]},
    "perplexity": {"before": [33.1, 30.0, 36.6], "after": [20.1, 18.2, 22.2]},
    "gain": [0.39, 0.33, 0.45]
  },
  "metrics": [{
    "name": "ended", "title": "Ended by itself", "better": "higher", "unit": "yes/no", "explanation": "Answers …",
    "questions": 1, "before": [0.0, null, null], "after": [1.0, null, null], "difference": [1.0, null, null],
    "reference": null
  }],
  "scores": {"0123": {"ended": 1.0}}, "judge": {}
}""",
}


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    for name, text in OLD_RUN.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_run_from_before_there_were_formats_is_read(old_run: Path) -> None:
    run = Run.read(old_run)
    assert run.evaluation.format == 1 and run.manifest and run.environment and run.metrics
    assert run.evaluation.after.loss == 3 and run.evaluation.before.rows[1] == (17.5, 5)
    assert run.manifest.splits["training"].tokens.mean == 100 and run.manifest.splits["test"].tokens is None  # type: ignore
    assert run.environment.machine == "A Processor, 2 cores"
    assert run.metrics.held_out and run.metrics.held_out.gain[0] == 0.39 and run.metrics.judge is None
    assert [line.step for line in run.steps] == [1, 2] and [line.val_loss for line in run.validations] == [3.0]
    assert run.seconds == 6 and run.step_seconds == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [("data_manifest.json", Manifest), ("evaluation.json", Evaluation), ("metrics.json", Metrics)],
)
def test_written_again_a_file_has_the_keys_it_had_and_its_format(old_run: Path, name: str, kind: Any) -> None:
    before = json.loads((old_run / name).read_text())
    kind.read(old_run / name).write(old_run / name)
    assert json.loads((old_run / name).read_text()) == {"format": 1, **before}


def test_keys_that_a_model_does_not_have_are_kept(old_run: Path) -> None:
    file = old_run / "data_manifest.json"
    manifest = json.loads(file.read_text())
    manifest["approved"] = manifest["source"]["licence"] = "yes"
    write_json(file, manifest)
    assert Manifest.read(file).to_dict() == {"format": 1, **manifest}


@pytest.mark.parametrize("name", ["data_manifest.json", "environment.json", "evaluation.json", "metrics.json"])
@pytest.mark.parametrize("number", [2, "1.0", None])
def test_an_unknown_format_is_refused_with_what_to_do(old_run: Path, name: str, number: Any) -> None:
    file = old_run / name
    write_json(file, {**json.loads(file.read_text()), "format": number})
    with pytest.raises(UserError) as refused:
        Run.read(old_run)
    said = str(refused.value)
    assert said.startswith(f"{file} is of format {number!r}") and "reads format 1" in said and "make it again" in said


def test_an_unknown_format_of_a_line_is_refused_by_its_number(old_run: Path) -> None:
    with (old_run / "metrics.jsonl").open("a") as file:
        file.write('\n{"format": 2, "step": 4, "train_loss": 1.0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 5 is of format 2"):
        Run.read(old_run)


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        (
            "evaluation.json",
            '"held_out_rows": 2',
            '"held_out_rows": "two"',
            "held_out_rows: .*integer, not 'two'",
        ),
        ("evaluation.json", '"loss": 3,', "", "after.loss: field required"),
        ("evaluation.json", "[17.5, 5]", "[17.5, 5.5]", r"before.rows.1.1: .*valid integer, not 5\.5"),
        ("data_manifest.json", '"rows": 80', '"rows": null', "splits.training.rows: .*valid integer, not None"),
        ("environment.json", '"gpus": []', '"gpus": "none"', "gpus: .*valid array, not 'none'"),
        ("metrics.json", '"better": "higher"', '"better": "more"', "metrics.0.better: .*not 'more'"),
        ("metrics.json", "[0.39, 0.33, 0.45]", "[0.39]", "held_out.gain.1: field required"),
        ("metrics.jsonl", '"step": 1', '"step": "1"', "step: .*integer, not '1'"),
        ("metrics.json", '"sampling": {', '"sampling": ', "it is not JSON"),
    ],
)
def test_a_damaged_file_is_named_with_its_field(old_run: Path, name: str, old: str, new: str, says: str) -> None:
    file = old_run / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=rf"^{file}.* is damaged.*{says}"):
        Run.read(old_run)


@pytest.mark.parametrize("content", ["", "[]", "null", '"text"', "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_what_is_no_artifact_at_all_is_named(old_run: Path, content: str) -> None:
    file = old_run / "evaluation.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=f"^{file} is damaged"):
        Run.read(old_run)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"task: [", "is damaged: while parsing"),
        (b"task: caf\xe9", "is damaged: 'utf-8' codec"),
        (b"task: {name: slang}", "is damaged: it has no section model"),
        (b"text", "is damaged: it has no section task, model"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_damaged_configuration_is_named(old_run: Path, content: bytes | None, says: str) -> None:
    file = old_run / "config.yaml"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        Run.read(old_run)
    assert str(refused.value).startswith(f"{file} {says}")


def test_lines_that_are_not_text_are_named(old_run: Path) -> None:
    (old_run / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        Run.read(old_run)


def test_a_missing_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.json cannot be read: No such file"):
        Evaluation.read(tmp_path / "evaluation.json")
    assert Evaluation.read_if_there(tmp_path / "evaluation.json") is None
    assert MetricsLine.read_lines(tmp_path / "metrics.jsonl") == []


def test_what_is_not_known_is_not_written() -> None:
    answer = Generation(id="1", side="after", question="question 1", text_in="Hi", seed=0, text="Yo", ended=True)
    assert json.loads(answer.to_line()) == {
        "format": 1,
        "id": "1",
        "side": "after",
        "question": "question 1",
        "text_in": "Hi",
        "seed": 0,
        "text": "Yo",
        "ended": True,
    }
    nothing_judged = Metrics(sampling={}, settings={}, held_out=None, metrics=[], scores={}, judge=None)
    assert nothing_judged.to_dict()["judge"] == nothing_judged.to_dict()["held_out"] == {}


def test_a_key_may_be_a_word_of_the_language() -> None:
    names = {field.serialization_alias or name for name, field in Conversion.model_fields.items()}
    assert "from" in names and "source_format" not in names


def test_every_key_has_a_meaning() -> None:
    for artifact in ARTIFACTS:
        for record in (artifact, *artifact_reference.records(artifact)):
            assert issubclass(record, Record) and record.__doc__
            for name, field in record.model_fields.items():
                assert field.description, f"{record.__name__}.{name}"


def test_the_reference_is_up_to_date() -> None:
    file = Path(__file__).resolve().parent.parent / artifact_reference.DOCS
    assert file.read_text(encoding="utf-8") == artifact_reference.reference(), (
        "make it again: python -m commands.artifact_reference"
    )
