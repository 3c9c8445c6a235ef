"""Every key of the configuration with its type, its range and its meaning: the one place for all three.

`nemo_configs/` holds the values; `core/configuration.py` checks them against these models before anything is loaded,
and `python -m commands.config_reference` makes docs/configuration.md from them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) else value


def _as_given(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """A whole number stays one, as it stands in the fingerprint of a run."""
    check(value)
    return value


def _question(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ValueError("must be a text, fields of the prompt such as {context: …}, or {messages: […]}")
    return value


def _modules(value: Any) -> Any:
    is_list = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    if not is_list and not (isinstance(value, str) and value):
        raise ValueError("must be a list of names such as [q_proj, v_proj], or one regular expression")
    return value


# A number may stand where text is wanted: `experiment_name=5`, `filters: { rating: 5 }`.
Text = Annotated[str, BeforeValidator(_as_text)]
Number = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_as_given)]
NonEmpty = Annotated[Text, Field(min_length=1)]
FolderName = Annotated[Text, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
OptionalFolderName = Annotated[Text, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$")]
Question = Annotated[str | dict[str, Any], BeforeValidator(_question)]
Modules = Annotated[str | list[str], BeforeValidator(_modules)]

Accelerator = Literal["cpu", "gpu"]
Optimizer = Literal["adamw", "paged_adamw_32bit"]
Schedule = Literal[  # those of NeMo's that need no more than a length, a warm-up and a lowest rate
    "CosineAnnealing",
    "InverseSquareRootAnnealing",
    "PolynomialDecayAnnealing",
    "PolynomialHoldDecayAnnealing",
    "SquareAnnealing",
    "SquareRootAnnealing",
    "T5InverseSquareRootAnnealing",
    "WarmupAnnealing",
    "WarmupHoldPolicy",
    "WarmupPolicy",
]


class Section(BaseModel):
    """A section of the configuration: keys that are not declared are refused, values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# --- the task ---------------------------------------------------------------------------------------------------


class SplitConfig(Section):
    validation: Number = Field(gt=0, lt=1, description="share of rows held out to watch training with")
    test: Number = Field(gt=0, lt=1, description="share of rows held out to measure the model with")
    seed: int = Field(0, description="another seed deals all rows anew")


class DataConfig(Section):
    """`task.data`. A task module's own options stand beside these, under the module's name."""

    model_config = ConfigDict(extra="allow")  # core/configuration.py lets in no other key than the module's

    source: NonEmpty = Field(
        description="a CSV, TSV, JSONL, Parquet or Arrow file, a folder or pattern of them, or hf:OWNER/NAME of the hub"
    )
    module: Text | None = Field(None, description="a folder of tasks/ for what columns alone cannot say")
    columns: dict[str, list[Text]] = Field(
        description="field: the headers that its column may have, in any case and order; the first one found is used"
    )
    required: list[Text] = Field(description="a row in which one of these fields is empty is left out")
    key: Annotated[list[Text], BeforeValidator(lambda key: [key] if isinstance(key, str) else key)] = Field(
        min_length=1,
        description="rows in which this field, or these together, are the same count as one; the split is its hash",
    )
    same_key: Literal["rows", "joined"] = Field(
        "rows",
        description="rows of one key that say different things, such as homonyms: each stays a row, or joined makes "
        "one of them, with all meanings",
    )
    cells: dict[str, Literal["line", "json", "lettered", "numbered"]] = Field(
        {},
        description="field: line makes one line of its text, json reads lists and objects as text, too; lettered and "
        'numbered make lines such as "A. one" and "0. one" of a list of choices',
    )
    filters: dict[str, Text] = Field(
        {}, description='field: what a row must have to stay; ">=3" compares numbers, else a regular expression'
    )
    split: SplitConfig
    max_chars: int = Field(ge=1, description="a row of more characters is left out and counted")
    drop_explicit: bool = Field(False, description="leave out rows with an explicit term")
    train_fields: list[Text] | None = Field(
        None, description="train on these fields only; held-out rows keep all. null: all"
    )
    train_rows: int | None = Field(None, ge=1, description="train on this many rows at most; held-out rows stay")
    max_tokens: int | None = Field(None, ge=1, description="longer dialogues are cut (module chat)")

    @property
    def options(self) -> Any:
        """The module's own options, an `Options` of its `rows.py`; None where they are not given."""
        return getattr(self, self.module, None) if self.module else None


class PromptConfig(Section):
    template: str = Field(
        description="the whole text of a row: {instruction} once, {response} at its end. For a dollar sign before a "
        "brace write \\${"
    )
    instruction: str = Field(description="what the model is asked, with {field} for a cell of the row")
    response: str = Field(description="what it learns to answer, with {field} for a cell of the row")
    fields: dict[str, str] = Field(description="values for fields that a row or a caller leaves out")


class EpochsPerAccelerator(Section):
    cpu: int = Field(ge=1, description="epochs on a CPU")
    gpu: int = Field(ge=1, description="epochs on GPUs")


class RowsPerAccelerator(Section):
    cpu: int = Field(ge=1, description="rows on a CPU")
    gpu: int = Field(ge=1, description="rows on GPUs")


class StepsPerAccelerator(Section):
    cpu: int = Field(ge=1, description="steps on a CPU")
    gpu: int = Field(ge=1, description="steps on GPUs")


class TrainConfig(Section):
    epochs_on: EpochsPerAccelerator
    epochs: int = Field(ge=1, description="passes over the training rows")
    batch_size_on: RowsPerAccelerator
    batch_size: int = Field(ge=1, description="rows of a batch, over all processes")
    accumulation: int = Field(ge=1, description="batches of an optimizer step, which is a mean over all their tokens")
    optimizer: Optimizer = Field(description="paged_adamw_32bit moves its state to main memory when the GPU is full")
    learning_rate: Number = Field(ge=0, description="the highest, reached after the warm-up")
    schedule: Schedule = Field(description="how the learning rate falls; WarmupAnnealing is linear")
    warmup_ratio: Number = Field(ge=0, le=1, description="share of the steps in which the learning rate rises")
    weight_decay: Number = Field(ge=0, description="of AdamW")
    clip: Number = Field(gt=0, description="largest norm of the gradient")
    gradient_checkpointing: bool = Field(description="recompute activations rather than keep them: less memory, slower")
    max_length: int = Field(ge=1, description="tokens; longer rows are left out and counted")
    evaluate_every: int | None = Field(ge=0, description="steps between two validations; null: those of an epoch")
    evaluate_every_tokens: int | None = Field(ge=0, description="the same in tokens, to the nearest step")
    early_stopping: int | None = Field(
        ge=0, description="stop after this many validations without a lower loss, and keep the best weights"
    )
    log_every_on: StepsPerAccelerator
    log_every: int = Field(ge=1, description="steps per line of metrics.jsonl and per point of TensorBoard")


class GenerateConfig(Section):
    max_new_tokens: int = Field(ge=1, description="tokens of an answer at most")
    temperature: Number | None = Field(ge=0, description="0 takes the likeliest token")
    top_p: Number | None = Field(gt=0, le=1, description="share of probability that is sampled from")
    top_k: int | None = Field(ge=0, description="likeliest tokens that are sampled from; 0: all")
    min_p: Number | None = Field(None, ge=0, le=1, description="lowest probability, as a share of the likeliest's")
    repetition_penalty: Number | None = Field(None, gt=0, description="above 1: tokens that were said are less likely")
    no_repeat_ngram_size: int | None = Field(None, ge=0, description="n-grams of this size occur once at most")


class EvaluateConfig(Section):
    questions: list[Question] = Field(
        description="each a text, fields of the prompt such as {context: …} ({}: their defaults), or {messages: […]}"
    )
    seeds: int = Field(ge=1, description="answers to each question")
    held_out: int = Field(ge=0, description="held-out rows that are asked too")
    metrics: Text | None = Field(description="a folder of tasks/ with metrics beside the usual ones")
    min_gain: Number | None = Field(
        lt=1, description="share by which perplexity must fall, e.g. 0.05; else train and report end with code 3"
    )
    min_scores: dict[str, Number] = Field(
        {}, description="metric: the least that the fine-tuned model's answers must score, else report ends with code 3"
    )


class TaskConfig(Section):
    name: FolderName = Field(description="names the folders of data and runs")
    title: Text | None = Field(None, description="what people call the served adapter; null: its name")
    data: DataConfig
    prompt: PromptConfig
    train: TrainConfig
    generate: GenerateConfig
    evaluate: EvaluateConfig


# --- everything else --------------------------------------------------------------------------------------------


class ModelConfig(Section):
    name: FolderName = Field(description="names the base model's folder")
    repo: Text = Field(description="its repository on the Hugging Face hub")
    revision: Text = Field(description="commit, tag or branch of that repository")
    revision_note: Text | None = Field(None, description="what is not sure about it; said before a download")
    licence: Literal["gemma", "apache-2.0"] | None = Field(
        None, description="of the repository: gemma is gated there. A folder of your own has that of its config.json"
    )
    embedded: bool = Field(description="built from Python packages (4-bit weights, dequantized), not downloaded")
    path: Text | None = Field(description="a Hugging Face folder on disk that is used instead")
    models_dir: NonEmpty = Field(description="folder of all base models")
    max_perplexity: Number = Field(gt=0, description="of the self-check text; above it the weights are refused")


class QuantizationConfig(Section):
    """Keys of transformers' BitsAndBytesConfig."""

    load_in_4bit: bool = Field(description="linear layers of the base in 4 bits")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("fp4", description="the 4-bit type")
    bnb_4bit_use_double_quant: bool = Field(False, description="quantize the scales too")


class PeftConfig(Section):
    name: FolderName = Field(description="part of the run folder's name")
    r: int = Field(ge=1, description="rank")
    lora_alpha: Number = Field(gt=0, description="the update is scaled by lora_alpha / r")
    lora_dropout: Number = Field(ge=0, lt=1, description="share of inputs that are dropped in training")
    bias: Literal["none", "all", "lora_only"] = Field(description="which biases are trained")
    target_modules: Modules = Field(
        description="names of the layers that get an adapter, or one regular expression; all-linear takes all but the "
        "router of experts"
    )
    target_parameters: list[Text] | None = Field(
        None, description="weights of experts that get one too: experts.gate_up_proj, experts.down_proj"
    )
    use_rslora: bool = Field(description="scale by lora_alpha / √r instead")
    use_dora: bool = Field(description="learn magnitude and direction apart; slower")
    quantization: QuantizationConfig | None = Field(description="null: the base as it is")
    optimizer: Optimizer = Field(description="default of task.train.optimizer")


class TrainerConfig(Section):
    accelerator: Accelerator = Field(description="what computes")
    devices: int = Field(ge=1, description="processes, or GPUs, of a machine")
    num_nodes: int = Field(ge=1, description="machines; each needs MASTER_ADDR, MASTER_PORT and NODE_RANK")
    strategy: Literal["auto", "ddp", "fsdp2", "tp"] = Field(
        description="fsdp2 shards the base, tp splits it by heads; auto: ddp for several devices"
    )
    micro_batch_tokens: int = Field(ge=1, description="tokens in memory at once; does not change the result")
    table_in_main_memory: bool = Field(
        False, description="on GPUs: leave the table of per-layer embeddings (Gemma 4 E2B, E4B) in main memory"
    )
    wandb: bool = Field(description="log to Weights & Biases too, with the key in WANDB_API_KEY")


class JudgeConfig(Section):
    url: Text | None = Field(description="an OpenAI-compatible endpoint; its key comes from OPENAI_API_KEY")
    model: Text | None = Field(description="the name that the endpoint knows the judge by")
    timeout: Number = Field(gt=0, description="seconds")


class Config(Section):
    """The whole configuration of a run."""

    engine: Literal["lightning", "automodel"] = Field(description="what trains: NeMo on Lightning, or NeMo AutoModel")
    seed: int = Field(ge=0, le=2**32 - 1, description="of everything that is random")
    data_dir: NonEmpty = Field(description="folder of the prepared data")
    runs_dir: NonEmpty = Field(description="folder of all runs")
    experiment_name: OptionalFolderName = Field(description="part of the run folder's name")
    run: NonEmpty | None = Field(None, description="folder of a finished run, used in place of the newest")
    task: TaskConfig
    model: ModelConfig
    peft: PeftConfig
    trainer: TrainerConfig
    judge: JudgeConfig
