"""What the stages leave on disk for each other: one model for each JSON file, with a format number.

A file is read by its model, `Manifest.read(file)`, and written by it, `manifest.write(file)`. A file without a number
was written before there was one and is of format 1. Readers refuse a format that they do not know, and name the file
and the field where a value is wrong. Keys that a model does not have are kept. `python -m commands.artifact_reference`
makes docs/artifacts.md from the models.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapSerializer

from core.errors import UserError
from core.files import to_line, write_json

T = TypeVar("T")
# An object that is missing is written as {}, which readers of the plain JSON may look keys up in.
OrEmpty = Annotated[
    T | None,
    BeforeValidator(lambda value: None if value == {} else value),
    WrapSerializer(lambda value, serialize: {} if value is None else serialize(value)),
]
# Value, low, high; without bounds for a single unit. A list will do: JSON that went through a validator has no tuples.
Estimate = Annotated[tuple[float, float | None, float | None], Field(strict=False)]


class Record(BaseModel):
    """An object in an artifact."""

    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)

    def to_dict(self) -> dict[str, Any]:
        """What was set, as JSON holds it; defaults of fields that were not set are left out."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Artifact(Record):
    """A JSON file, or a line of a JSONL file.

    Attributes:
        WHERE: where it is found, for the reference.
    """

    WHERE: ClassVar[str]
    FORMAT: ClassVar[int] = 1

    format: int = Field(default=1, description="number of this form; a file without one is of format 1")

    def to_dict(self) -> dict[str, Any]:
        return {"format": self.FORMAT, **super().to_dict()}

    def to_line(self) -> str:
        return to_line(self.to_dict())

    def write(self, file: Path) -> None:
        """Replace `file`, whole or not at all. Raises OSError where that fails."""
        write_json(file, self.to_dict())

    @classmethod
    def read(cls, file: Path) -> Self:
        """
        Raises:
            UserError: the file is missing or damaged, a value is wrong, or the format is unknown.
        """
        try:
            return cls.parse(file.read_text(encoding="utf-8"), str(file))
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is damaged: {error}") from None

    @classmethod
    def read_if_there(cls, file: Path) -> Self | None:
        """As `read`; None where there is no file."""
        return cls.read(file) if file.exists() else None

    @classmethod
    def read_lines(cls, file: Path) -> list[Self]:
        """The lines of a JSONL file, none where there is no file; one that a kill cut short is left out.

        Raises:
            UserError: as `read`.
        """
        try:
            lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is damaged: {error}") from None
        return [cls.parse(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if _is_json(line)]

    @classmethod
    def parse(cls, text: str, place: str) -> Self:
        """As `read`, of a text; `place` is what an error calls it."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UserError(f"{place} is damaged, it is not JSON: {error}") from None
        found = value.get("format", 1) if isinstance(value, dict) else 1
        if found != cls.FORMAT:
            raise UserError(
                f"{place} is of format {found!r}, but this version reads format {cls.FORMAT}; use the version that "
                "wrote it, or make it again with this one"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the whole"
            value = "" if first["type"] == "missing" else f", not {first['input']!r:.60}"
            raise UserError(f"{place} is damaged: {field}: {first['msg'].lower()}{value}") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


# --- data -----------------------------------------------------------------------------------------------------


class Source(Record):
    """The table that a data folder was made from."""

    name: str = Field(description="file name, the name of a folder or pattern, or hf:OWNER/NAME")
    sha256: str = Field(
        default="",
        description="of the file, or of a data set's files one by one; of a folder or pattern that of the lines which "
        "sha256sum writes of its files",
    )
    bytes: int | None = Field(default=None, description="its size")
    form: str | None = Field(default=None, description="such as csv or json lines, detected from its contents")
    encoding: str | None = Field(default=None, description="of a text file, detected from its contents")
    columns: Mapping[str, str | None] = Field(default={}, description="field of the task → column of the table")
    unused: list[str] = Field(default=[], description="its other columns")
    notes: list[str] = Field(default=[], description="what was read otherwise than a table usually is, in words")
    repository: str | None = Field(default=None, description="of a data set on the Hugging Face hub: its name")
    config: str | None = Field(default=None, description="... its configuration")
    revision: str | None = Field(default=None, description="... its commit")
    split: str | None = Field(default=None, description="... its split")
    files: list[str] | None = Field(
        default=None,
        description="... its files, as paths in the repository; of a folder or pattern as paths in the folder",
    )


class TokenCounts(Record):
    """Tokens of a split's examples, counted in its first ones."""

    total: int | None = Field(default=None, description="tokens of all counted examples")
    learned: int | None = Field(default=None, description="target tokens among them, those with a loss")
    mean: float = Field(description="tokens of an example, on average")
    max: int = Field(description="tokens of the longest counted example")
    counted_rows: int = Field(description="how many examples were counted")


class Split(Record):
    """A file of examples: `<name>.jsonl`."""

    rows: int = Field(description="number of examples, one a line")
    bytes: int | None = Field(default=None, description="size of the file")
    sha256: str = Field(default="", description="of the file")
    tokens: TokenCounts | None = Field(default=None, description="missing where no tokenizer was given")
    source_rows: int | None = Field(default=None, description="rows of the table, where they are not the examples")


class Alike(Record):
    """What became of rows that are alike."""

    repeats: int = Field(default=0, description="rows merged into an earlier one of their key that says all they say")
    meanings: int = Field(default=0, description="rows kept beside an earlier one of their key, with another meaning")
    variants: int = Field(
        default=0, description="rows kept beside an earlier one of their key and meaning, with other cells or wording"
    )
    joined: int = Field(
        default=0, description="rows made one with an earlier one of their key, which has both meanings"
    )
    groups: int = Field(default=0, description="groups of near-duplicates and of rows of one key, each in one split")
    grouped_rows: int = Field(default=0, description="rows in these groups")
    largest_group: int = Field(default=0, description="rows of the largest")
    moved: int = Field(default=0, description="rows in another split than the hash of their key says, as groups decide")
    formula_rows: int | None = Field(
        default=None, description="rows compared without the words that most of their group share, as it was too large"
    )


class Manifest(Artifact):
    """What went into a data folder and what came out."""

    WHERE = "manifest.json in a data folder; data_manifest.json in a run folder"

    task: str = Field(default="", description="name of the task")
    fingerprint: str = Field(default="", description="hash of all that decides the content")
    source: Source = Field(description="the table")
    rows_in: int = Field(description="rows of the table")
    rows_out: int = Field(description="rows that were kept")
    dropped: dict[str, int] = Field(default={}, description="reason → number of rows; dropped.jsonl lists them")
    merged: int = Field(default=0, description="rows merged into an earlier one with the same key")
    alike: Alike | None = Field(default=None, description="repeats and near-duplicates; missing in old manifests")
    repaired: int = Field(default=0, description="cells whose encoding, quotes or control characters were repaired")
    notes: dict[str, int] = Field(default={}, description="what a task's own reader counted, in words")
    splits: dict[str, Split] = Field(description="training, validation and test")
    carried: list[str] = Field(default=[], description="files of the task's own that each run keeps a copy of")
    seed: int | None = Field(default=None, description="of the hash that assigns rows to splits")
    tokenizer_sha256: str | None = Field(default=None, description="of the tokenizer.json that counted the tokens")


# --- training -------------------------------------------------------------------------------------------------


class Environment(Artifact):
    """The machine and the software of a run."""

    WHERE = "environment.json in a run folder"

    command: str = Field(default="", description="what was called")
    commit: str = Field(default="", description="of this project, with -dirty where files differ from it")
    python: str = Field(default="", description="version")
    packages: dict[str, str] = Field(default={}, description="package → version")
    cpu: str = Field(default="", description="model name of the processor")
    confined: str = Field(default="", description="to which of its instructions the environment confined it")
    instructions: str = Field(default="", description="those that torch computes with, such as AVX2 or AVX512")
    kernels: str = Field(default="", description="form of training/kernels.c, such as AVX2; of a run on a CPU")
    dtype: str = Field(default="", description="of the frozen weights")
    cores: int | None = Field(default=None, description="logical processors")
    memory_gib: float | None = Field(default=None, description="main memory")
    gpus: list[str] = Field(default=[], description="names, one for each")
    base: str = Field(default="", description="sha256 of the base model, see core.base_model.describe")

    @property
    def machine(self) -> str:
        """In one line: its GPUs, else its processor."""
        processor = (self.cpu, f"{self.cores} cores", *filter(None, [self.confined]))
        return ", ".join(self.gpus or (processor if self.cpu else ()))


class MetricsLine(Artifact):
    """What is measured during training: each line is of steps (`train_loss`) or of a validation (`val_loss`)."""

    WHERE = "a line of metrics.jsonl in a run folder"

    step: int = Field(description="optimizer steps done, from 1")
    epoch: int = Field(default=0, description="from 0")
    train_loss: float | None = Field(default=None, description="mean cross-entropy of a target token, in nats")
    val_loss: float | None = Field(default=None, description="the same of the validation split, after this step")
    learning_rate: float | None = Field(default=None, description="of this step")
    grad_norm: float | None = Field(default=None, description="L2 norm of the gradient before clipping")
    steps: int = Field(default=1, description="steps since the line before, which the following are measured over")
    seconds: float | None = Field(default=None, description="their time, without validations")
    tokens_per_second: float | None = Field(default=None, description="of all examples, by all processes")
    padding: float | None = Field(default=None, description="share of the computed positions that hold no token")
    memory_gib: float | None = Field(default=None, description="held by the process: GPU memory, else main memory")
    mfu: float | None = Field(default=None, description="model FLOPs utilisation, on a GPU whose peak is known")


class Measurement(Record):
    """How one model does on the test split."""

    loss: float = Field(description="mean cross-entropy of a target token, in nats")
    perplexity: float = Field(description="e to the power of the loss")
    rows: list[tuple[float, int]] = Field(default=[], description="[cross-entropy, target tokens] of each example")
    answers: list[str] = Field(default=[], description="one answer to each of the questions")


class Before(Measurement, Artifact):
    """How the base model does; kept so that a resumed run need not ask again."""

    WHERE = "before.json in a run folder"


class Evaluation(Artifact):
    """What training changed. A run is finished when it has this file."""

    WHERE = "evaluation.json in a run folder"

    held_out_rows: int = Field(description="examples of the test split")
    rows_over_max_length: dict[str, int] = Field(default={}, description="split → examples left out as too long")
    questions: list[str] = Field(default=[], description="what both models were asked")
    before: Measurement = Field(description="of the base model")
    after: Measurement = Field(description="of the fine-tuned model")
    training_seconds: float | None = Field(default=None, description="without validations")
    peak_memory_gib: float | None = Field(default=None, description="the most that one process has held")
    memory_estimate_gib: float | None = Field(default=None, description="what was expected before the run")
    finished: str = Field(default="", description="date and time, ISO 8601, UTC")


# --- evaluation -----------------------------------------------------------------------------------------------


class Generation(Artifact):
    """An answer of one model to one question with one seed."""

    WHERE = "a line of generations.jsonl in a run folder"

    id: str = Field(description="hash of all that decides the answer")
    side: Literal["before", "after", "reference"] = Field(
        description="before: of the base model; after: of the fine-tuned one; reference: in memory only"
    )
    question: str = Field(description="such as question 2, or row 17 for a line of test.jsonl")
    asked: str = Field(default="", description="the instruction, or the dialogue, as a person reads it")
    text_in: str = Field(description="everything that the model was given")
    seed: int = Field(description="of the sampling")
    fields: dict[str, str] = Field(default={}, description="values of the prompt's fields, where they are known")
    reference: str | None = Field(default=None, description="an example's own answer")
    row: int | None = Field(default=None, description="line of test.jsonl, from 1")
    text: str = Field(default="", description="the answer")
    ended: bool = Field(default=True, description="whether the model ended it, rather than the limit of tokens")


class Judgement(Artifact):
    """What the judge said about a pair of answers, in both orders."""

    WHERE = "a line of judgements.jsonl in a run folder"

    pair: str = Field(description="ids of the two answers")
    model: str = Field(description="the judge")
    question: str = Field(description="as in generations.jsonl")
    seed: int = Field(description="of both answers")
    verdict: Literal["before", "after", "tie"] = Field(description="which answer is the better one")
    why: str = Field(description="orders agree, orders disagree, or no verdict")
    said: list[str] = Field(description="the judge's replies: base model's answer first, then last")


class Preference(Record):
    """The judge's verdicts, counted."""

    model: str = Field(description="the judge")
    pairs: int = Field(description="pairs of answers")
    after: int = Field(description="decided for the fine-tuned model")
    before: int = Field(description="decided for the base model")
    tie: int = Field(description="undecided")
    disagreed: int = Field(description="ties because the two orders disagree")
    no_verdict: int = Field(description="ties because a reply was no verdict")
    preference: Estimate = Field(description="(after - before) / pairs, [value, low, high] over questions")


class Change(Record):
    """A quantity of both models, each [value, low, high] with the bounds of a 95% interval."""

    before: Estimate = Field(description="of the base model")
    after: Estimate = Field(description="of the fine-tuned model")
    difference: Estimate = Field(default=(0.0, None, None), description="after - before, with a paired interval")


class HeldOut(Record):
    """Loss and perplexity on the test split, with intervals over examples."""

    loss: Change = Field(description="mean cross-entropy of a target token, in nats")
    perplexity: Change = Field(description="without a difference")
    gain: Estimate = Field(description="share by which perplexity fell")


class MetricResult(Change):
    """A metric of both models' answers."""

    name: str = Field(description="of its function in evaluation/metrics.py or tasks/<task>/metrics.py")
    title: str = Field(description="as the report shows it")
    better: Literal["higher", "lower", ""] = Field(description="which way is better; empty where neither is")
    unit: str = Field(description="% for a share from 0 to 1, yes/no for a share of answers, else what is counted")
    explanation: str = Field(default="", description="what the report says about it")
    questions: int = Field(description="questions that it applies to")
    reference: float | None = Field(default=None, description="score of the examples' own answers")


class LabelCounts(Record):
    """A label of a task whose answers are labels."""

    label: str = Field(description="as the rows spell it")
    training: int = Field(description="training rows with it")
    asked: int = Field(description="asked rows with it")
    before: Estimate | None = Field(default=None, description="share of these that the base model labels so (recall)")
    after: Estimate | None = Field(default=None, description="the same of the fine-tuned model")


class Labels(Record):
    """How both models label held-out rows, where a task's answers are a few labels."""

    questions: int = Field(description="held-out rows that were asked")
    labels: list[LabelCounts] = Field(description="in the order of the matrices")
    usual: Estimate = Field(description="share of the rows that the most frequent training label is right for")
    accuracy: Change = Field(description="share of the rows that are labelled right")
    f1: Change = Field(description="macro F1: the mean over labels that are true of some row")
    confusion_before: list[list[int]] = Field(
        description="of the base model: a row for each true label, a column for each named one; the last names none"
    )
    confusion_after: list[list[int]] = Field(description="the same of the fine-tuned model")


class Metrics(Artifact):
    """What `make report` measured on the answers of both models."""

    WHERE = "metrics.json in a run folder"

    sampling: dict[str, Any] = Field(default={}, description="task.generate of the configuration")
    settings: dict[str, Any] = Field(default={}, description="task.evaluate of the configuration")
    held_out: OrEmpty[HeldOut] = Field(default=None, description="{} for a run without the losses of each example")
    metrics: list[MetricResult] = Field(default=[], description="one for each metric that applies")
    scores: dict[str, dict[str, float]] = Field(default={}, description="id of an answer → name of a metric → score")
    judge: OrEmpty[Preference] = Field(default=None, description="{} where nothing was judged")
    labels: Labels | None = Field(default=None, description="missing or null where the answers are no labels")


# --- base models and conversions ------------------------------------------------------------------------------


class BaseRecord(Artifact):
    """Where a base model came from, and what its files must be."""

    WHERE = "base.json in a folder of models/"

    name: str = Field(description="as in nemo_configs/model/")
    source: str = Field(default="local folder", description="address or package that it was fetched from")
    revision: str = Field(default="", description="commit on the hub, or hash of the packaged file")
    self_check_perplexity: float | None = Field(default=None, description="on a plain English text, at its acceptance")
    files: dict[str, str] = Field(default={}, description="file → sha256")
    sizes: dict[str, int] = Field(default={}, description="file → bytes; checked on every start")


class Proof(Record):
    """How what was written, read again, differs from the source. Logits are those of the same prompts on both sides."""

    tensors: int = Field(description="tensors compared")
    tensors_with_the_same_bits: int = Field(description="identical ones among them")
    probes: int = Field(description="prompts")
    tokens: int = Field(description="tokens of all prompts")
    max_logit_difference: float = Field(description="largest absolute difference")
    mean_logit_difference: float = Field(description="mean absolute difference")
    mean_kl_divergence: float = Field(description="KL(source ‖ target) of the predictions, in nats a token")
    top1_agreement: float = Field(description="share of tokens whose likeliest successor is the same")
    mean_kl_divergence_of_training: float | None = Field(
        default=None, description="of a merged adapter: base to fine-tuned"
    )
    limits: dict[str, float] = Field(default={}, description="name of a difference → the most that was accepted")


class Conversion(Artifact):
    """A conversion between checkpoint formats, and its proof."""

    WHERE = "conversion.json in a folder that commands.convert made"

    source: str = Field(description="name of the file or folder")
    source_sha256: str = Field(description="of the file; of a folder, of the lines that sha256sum prints")
    source_format: str = Field(
        validation_alias="from", serialization_alias="from", description="format, detected from its contents"
    )
    to: str = Field(description="format of the target")
    base: dict[str, Any] = Field(default={}, description="of an adapter: name, source, revision and sha256 of its base")
    dtype: str | None = Field(default=None, description="of an adapter: what its base was trained in")
    quantization: dict[str, Any] | None = Field(default=None, description="of an adapter: 4-bit settings of its base")
    loads_on: str | None = Field(
        default=None, description="of an adapter for a Gemma 4: the class of transformers that peft applies it to"
    )
    proof: Proof = Field(description="what was compared, and how far the sides differ")
    files: dict[str, str] = Field(default={}, description="file of the target → sha256")
    packages: dict[str, str] = Field(default={}, description="package → version")
    seconds_to_write: float | None = Field(default=None, description="from the start until the target was written")
    seconds: float | None = Field(default=None, description="of all, with the proof")
    peak_memory_gib: float | None = Field(default=None, description="main memory of the process at most")


# --- serving --------------------------------------------------------------------------------------------------


class ServedAdapter(Artifact):
    """What a client needs to ask an adapter as it was trained, beside its prompt.json."""

    WHERE = "serving.json in exports/serve/adapters/<name>"

    name: str = Field(description="that a request asks for")
    task: str = Field(default="", description="that it was trained on")
    title: str = Field(default="", description="as the website shows it")
    base: str = Field(default="", description="name of the base model's folder")
    sampling: dict[str, Any] = Field(default={}, description="the task's sampling, in the names of vLLM's parameters")
    run: str = Field(default="", description="name of the run folder")
    licence: str = Field(default="gemma", description="of the base, as the hub calls it")
    has_turns: bool = Field(default=False, description="whether it is given whole dialogues")
    field: str | None = Field(default=None, description="field of the prompt that a question fills; null for the whole")


class EngineStats(Artifact):
    """What the embedded engine says of itself."""

    WHERE = 'the answer to {"op": "stats"} on the engine\'s socket'

    running: int = Field(description="requests that generate")
    waiting: int = Field(description="requests in the queue")
    kv_tokens: int = Field(description="tokens that the KV cache holds")
    kv_capacity: int = Field(description="tokens that it has room for")
    adapters: list[str] = Field(default=[], description="names of those that are served")
    broken: dict[str, str] = Field(default={}, description="adapter that cannot be read → why")
    tokens: dict[str, int] = Field(default={}, description="adapter, or nothing for the base → tokens generated")
    counts: dict[str, int] = Field(default={}, description="requests by how they ended, and tokens, since the start")
    uptime: float | None = Field(default=None, description="seconds since the start")
    base: str = Field(default="", description="name of the base model's folder")
    dtype: str = Field(default="", description="of the base's weights")
    threads: int | None = Field(default=None, description="that compute")
    memory: dict[str, int] = Field(
        default={}, description="bytes of keys and values when the cache is full, and of a table that stays in its file"
    )
    pid: int | None = Field(default=None, description="process id")


class ServerStatus(Artifact):
    """What a running server leaves for other commands to see."""

    WHERE = "status.json in exports/serve/state"

    pid: int = Field(description="process id of the supervisor")
    host: str = Field(default="", description="address that it listens on")
    http_port: int | None = Field(default=None, description="of Triton's HTTP API")
    grpc_port: int | None = Field(default=None, description="of Triton's gRPC API")
    metrics_port: int | None = Field(default=None, description="of Triton's metrics")
    gateway_port: int | None = Field(default=None, description="of the gateway, the OpenAI-compatible server")
    base: str = Field(default="", description="name of the base model's folder")
    restarts: dict[str, int] = Field(default={}, description="process → how often it was restarted")
    options: dict[str, Any] = Field(default={}, description="arguments of `commands.serve` that it runs with")
    unwritten: str = Field(default="", description="since when this file could not be written, and why, the last time")


ARTIFACTS: tuple[type[Artifact], ...] = (
    Manifest,
    Environment,
    MetricsLine,
    Before,
    Evaluation,
    Generation,
    Metrics,
    Judgement,
    BaseRecord,
    Conversion,
    ServedAdapter,
    EngineStats,
    ServerStatus,
)
