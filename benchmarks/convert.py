"""Memory and speed of merging an adapter into its base: this project, `cp`, and transformers with peft.

    python -m benchmarks.convert                    (the base model of the default configuration)
    python -m benchmarks.convert layers=2,6         (how many of Gemma 3 27B's 62 layers the synthetic models have)

The synthetic models have Gemma 3 27B's widths and zeros for weights, in sparse files; the merged ones are as large as
they say, so that layers=62 needs 55 GB of disk. Peak memory is the kernel's figure for the whole process, asked for by
its parent. Writes benchmarks/results/convert.json and the table in docs/converters.md. After each model, what there is
so far is in convert.partial.json, which an interrupted benchmark leaves and no page shows.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import save_file

from benchmarks.figures import RESULTS, partial_file, refresh
from converters import hf
from converters.layerwise_forward import empty_model
from core.arguments import Arguments, parse
from core.artifacts import Conversion
from core.base_model import ensure_base_model
from core.configuration import load_config
from core.errors import UserError, run
from core.files import write_json
from core.machine import describe_environment

# https://huggingface.co/google/gemma-3-27b-pt/blob/main/config.json, its text_config
GEMMA_3_27B = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262_144,
    "hidden_size": 5376,
    "intermediate_size": 21_504,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "dtype": "bfloat16",
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEERS = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)
AutoTokenizer.from_pretrained(base).save_pretrained(target)
"""


class Options(Arguments):
    layers: list[Annotated[int, Field(ge=1, le=62)]] = Field([2, 6], description="of Gemma 3 27B's 62")
    minutes: float = Field(10, gt=0, description="of each conversion, after which it is stopped and left out")


def main(argv: list[str]) -> None:
    options = parse(Options, argv)
    real = ensure_base_model(load_config().model).resolve()
    file = RESULTS / "convert.json"
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []

    def keep() -> None:
        result = {
            "command": " ".join(["python -m benchmarks.convert", *argv]),
            "machine": describe_environment().machine,
            "finished": f"{datetime.now(UTC):%Y-%m-%d}",
            "rows": rows,
            "left_out": left_out + [f"{model}: not measured yet" for model in models.values()],
        }
        write_json(partial_file(file), result)

    models = {count: f"gemma-3-27b, {count} of 62 layers" if count else real.name for count in [0, *options.layers]}
    Path("exports").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="exports") as scratch:
        for count in list(models):
            folder = Path(scratch) / models.pop(count)
            folder.mkdir()
            base = write_sparse(folder / "base", count) if count else real
            write_adapter(base, folder / "adapter")
            rows += compare(base, folder, not count, options.minutes * 60, left_out)
            shutil.rmtree(folder)
            keep()
    partial_file(file).replace(file)
    print(f"written: {file}, {', '.join(refresh())}")


def compare(base: Path, folder: Path, with_peers: bool, seconds: float, left_out: list[str]) -> list[dict[str, Any]]:
    """A row for each system, as benchmarks/figures.py shows it.

    Each system reads the base anew; what it wrote is removed before the next.

    Args:
        seconds: of each system; of one that takes longer, `left_out` gets a sentence.
    """
    python, target = sys.executable, folder / "merged"
    systems: dict[str, Sequence[str | Path]] = {
        "cp": ["cp", "-r", "--sparse=never", "--reflink=never", base, target],
        "ours": [
            python,
            "-m",
            "commands.convert",
            f"source={folder}/adapter",
            "to=merged",
            f"base={base}",
            f"out={target}",
        ],
    }
    if with_peers:
        systems["transformers, peft"] = [python, "-c", PEERS, base, folder / "adapter", target]
    tensors = hf.read(base).tensors.values()
    allowed = 2 * max(tensor.nbytes for tensor in tensors) / 2**30 + 1
    size = sum(tensor.nbytes for tensor in tensors) / 1e9
    rows = []
    copied = 0.0
    for name, command in systems.items():
        took = measured(command, seconds)
        if took is None:
            left_out.append(f"{folder.name} by {name}: not done in {seconds / 60:g} minutes")
            print(left_out[-1], flush=True)
            shutil.rmtree(target, ignore_errors=True)
            continue
        lasted, busy, peak = took
        copied = copied or (busy if name == "cp" else 0)
        record = target / "conversion.json"
        row = {
            "model": folder.name,
            "by": name,
            "gigabytes": round(size, 1),
            "seconds": round(lasted, 1),
            "seconds_to_write": Conversion.read(record).seconds_to_write if record.exists() else None,
            "processor_seconds": round(busy, 1),
            "times_cp": round(busy / copied, 1) if copied else None,
            # A process begins with its parent's peak in its books, so that cp's would be this one's.
            "peak_gib": round(peak, 2) if name != "cp" else None,
            "allowed_gib": round(allowed, 2) if name != "cp" else None,
        }
        rows.append(row)
        print(row, flush=True)
        shutil.rmtree(target)
    return rows


def measured(command: Sequence[str | Path], seconds: float) -> tuple[float, float, float] | None:
    """Wall-clock seconds, CPU seconds, and peak memory in GiB of `command`; None: it took more than `seconds`, and was
    stopped."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    limit = threading.Timer(seconds, process.kill)
    limit.start()
    _, status, usage = os.wait4(process.pid, 0)
    limit.cancel()
    if status == signal.SIGKILL and time.monotonic() - begun >= seconds:
        return None
    if status:
        raise UserError(f"{' '.join(map(str, command[:3]))} … failed; see its output above")
    return time.monotonic() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def write_sparse(folder: Path, layers: int) -> Path:
    """A model with `layers` of Gemma 3 27B's layers, all zeros, in a sparse file."""
    from converters.safetensors_file import header

    config = {**GEMMA_3_27B, "num_hidden_layers": layers}
    folder.mkdir()
    hf.write_json(folder / "config.json", config)
    shapes = {name: tensor.to(torch.bfloat16) for name, tensor in empty_model(config).state_dict().items()}
    shapes.pop("lm_head.weight")  # is the embedding
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header(shapes))
        file.truncate(file.tell() + sum(tensor.nbytes for tensor in shapes.values()))
    return folder


def write_adapter(base: Path, folder: Path) -> None:
    """A random adapter of rank 8 on every linear layer of `base`."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in hf.read(base).tensors.items():
        layer = name.removesuffix(".weight")
        if layer.endswith(tuple(TARGETS)):
            tensors[f"base_model.model.{layer}.lora_A.weight"] = (
                torch.randn(8, weight.shape[1], generator=generator) * 0.02
            )
            tensors[f"base_model.model.{layer}.lora_B.weight"] = (
                torch.randn(weight.shape[0], 8, generator=generator) * 0.02
            )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": TARGETS,
        "base_model_name_or_path": str(base),
    }
    hf.write_json(folder / "adapter_config.json", settings)


if __name__ == "__main__":
    run(main)
