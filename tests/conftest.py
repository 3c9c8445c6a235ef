"""Real parts for the tests: the shipped base model, its tokenizer, and tiny random Gemmas of each family."""

import csv
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from launcher import Launcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from converters.checkpoint import Adapter, Checkpoint
from converters.validation import check_shapes, validated
from core.base_model import ensure_base_model
from core.checks import check
from core.configuration import load_config, names, plain
from core.errors import UserError
from core.schema import Config
from training.signals import StopSignals

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300.0  # seconds for what takes a few on a machine that has nothing else to do
FAMILIES = ("gemma", "gemma2", "gemma3_text")
# Small enough for a test, large enough that every mechanism of its family is at work: grouped queries, a sliding
# window shorter than the rows, soft-capping.
TINY = {
    "vocab_size": 262_144,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TINY_FAMILY = {
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
}

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what a shell's background job hands on to all its children
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first: none of them is begun when everything else has ended."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


internal_errors: list[str] = []


def pytest_internalerror(excrepr: object) -> None:
    internal_errors.append(str(excrepr))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """After an error of pytest's own: what failed before, which it leaves out, and the first one, which xdist hides."""
    if not internal_errors or hasattr(config, "workerinput"):
        return
    for report in config.pluginmanager.getplugin("terminalreporter").stats.get("failed", []):
        print(f"\nFAILED {report.nodeid}\n" + "\n".join(report.longreprtext.splitlines()[-15:]))
    print("\npytest's own first error:\n" + "\n".join(internal_errors[0].splitlines()[-15:]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """What a training in this process does with signals ends with its test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        return (yield)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def until(holds: Callable[[], object]) -> None:
    """Wait for a state, however slow or busy the machine is."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"not after {PATIENCE:.0f} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model gains nothing from more, and waits for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """The embedded Gemma 3 270M, built on first use."""
    return ensure_base_model(load_config().model).resolve()


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_folder)


def tiny_gemma(family: str, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    """A random Gemma of `family`, with weights of a trained model's spread, so that its outputs are not all alike."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TINY, **TINY_FAMILY[family], **options})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else 0.15)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny random Gemma 3, with a tokenizer of 600 entries that begins rows with <bos>."""
    folder = tmp_path_factory.mktemp("tiny-base")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(ROOT / "tasks/slang/slang.csv")], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder)
    tiny_gemma("gemma3_text", torch.bfloat16, vocab_size=600).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows whose every field differs in its words."""
    file = tmp_path_factory.mktemp("source") / "tiny.csv"
    words = [f"{a}{b}" for a in ("lum", "dor", "vex", "quan", "bri", "zol") for b in ("ami", "eto", "ix", "or", "usk")]
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(("Slang", "Description", "Example", "Context"))
        for n in range(60):
            one, two, three = (words[(n * k + n // 30) % 30] for k in (1, 7, 11))
            rows.writerow(
                [f"{one}{n}", f"To {two} a {three} {n} times.", f"I {one}{n} {three} {two}.", f"At {two} {n}."]
            )
    return file


def needs_task(name: str) -> pytest.MarkDecorator:
    """For a test of one task: skipped where the task has been deleted."""
    return pytest.mark.skipif(name not in names("task"), reason=f"needs the task {name}")


def fit_here(config: Config, base: Path, rows: Dataset, validation_rows: Dataset, folder: Path) -> None:
    """`training.fit.fit` into `folder`/slang.nemo, in this process."""
    from training.fit import fit

    fit(config, base, rows, validation_rows, folder, folder / "slang.nemo", {}, StopSignals())


def read_checked(module: ModuleType, path: Path) -> Adapter | Checkpoint:
    """What a format's file reads, checked as `python -m commands.convert` checks it."""
    found: Adapter | Checkpoint = module.read(path)
    if isinstance(found, Checkpoint):
        check_shapes(found, path)
        found.tensors = validated(found.tensors, path)
    return found


def typed(**sections: object) -> Config:
    """The configuration `load_config()` gives, with other values: `typed(data_dir="d", task={"data": {...}})`.

    Of a task's `data` and `prompt` nothing is left from the default task but what every task has.
    """
    tree = plain(load_config(["task=slang", "trainer=cpu"]))
    data, prompt = tree["task"]["data"], tree["task"]["prompt"]
    common = ("filters", "split", "max_chars", "drop_explicit", "train_fields", "train_rows")
    tree["task"] |= {
        "data": {"module": None, **{name: data[name] for name in common}},
        "prompt": {"template": prompt["template"], "fields": {}},
    }
    config, problems = check(_over(tree, sections))
    if problems:
        raise UserError(*(problem.says for problem in problems))
    assert config is not None
    return config


def _over(tree: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the values of `others`; sections are merged, but columns are not."""
    merged = dict(tree)
    for name, value in others.items():
        both = name != "columns" and isinstance(value, Mapping) and isinstance(tree.get(name), dict)
        merged[name] = _over(tree[name], value) if both else value
    return merged
