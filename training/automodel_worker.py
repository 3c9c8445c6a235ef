"""The process inside `.venv-automodel`: NeMo AutoModel's own fine-tuning recipe under torchrun.

    .venv-automodel/bin/python -m training.automodel_worker recipe.yaml 1

The last argument is the number of processes. `training/automodel.py` writes the YAML, starts this and reads the
results. With a GPU nothing of AutoModel is replaced; without one, `run_on_cpu` is the whole difference.
"""

import ctypes
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch


class TokenizedSamples(torch.utils.data.Dataset):
    """Samples that this project has tokenized, a JSON line `{"input_ids", "target_ranges"}` each (`training.batches`).

    AutoModel shifts labels in its data sets, not in its losses: the label of a position is the next token, or -100
    where that is not a target.

    Args:
        file: the JSON lines.
    """

    def __init__(self, file: str) -> None:
        self.samples = [json.loads(line) for line in Path(file).read_text().splitlines()]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self.samples[index]["input_ids"]
        labels = [-100] * (len(ids) - 1)
        for first, end in self.samples[index]["target_ranges"]:
            labels[first - 1 : end - 1] = ids[first:end]
        return {"input_ids": ids[:-1], "labels": labels, "attention_mask": [1] * len(labels)}


def run_on_cpu() -> None:
    """Patch AutoModel 0.7.0's recipe, which takes CUDA for granted, to run without it.

    Its calls for the cache, peak memory and the current device return what is true of a CPU, and its processes get a
    device. Model, data, loss, optimizer and checkpoints are AutoModel's own.
    """
    from nemo_automodel._transformers import auto_model
    from nemo_automodel.recipes.llm import train_ft

    cpu = torch.device("cpu")
    for name in ("reset_peak_memory_stats", "empty_cache", "synchronize"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.max_memory_allocated = lambda *_: peak_memory_bytes()
    torch.cuda.current_device = lambda: 0

    initialize = train_ft.initialize_distributed
    train_ft.initialize_distributed = lambda **options: dataclasses.replace(initialize(**options), device=cpu)
    place = auto_model.apply_model_infrastructure
    auto_model.apply_model_infrastructure = lambda **options: place(**{**options, "device": cpu})


def peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def launch(recipe_file: str, processes: str) -> None:
    """Run torchrun on this machine."""
    from torch.distributed import run

    run.main(["--standalone", "--nproc-per-node", processes, "-m", "training.automodel_worker", recipe_file])


def load_recipe(recipe_file: str) -> Any:
    """AutoModel's recipe, set up in this process, whose rank and world size are in torchrun's environment variables."""
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes.llm import train_ft

    import training.automodel_worker  # noqa: F401  AutoModel's loader trusts a `_target_` that is already imported

    if not torch.cuda.is_available():
        run_on_cpu()

    class Recipe(train_ft.TrainFinetuneRecipeForNextTokenPrediction):
        def log_train_metrics(self, log_data: Any) -> None:
            super().log_train_metrics(log_data)
            self.metric_logger_train.flush()  # else it buffers a hundred steps, and no progress is seen

    recipe = Recipe(load_yaml_config(recipe_file))
    recipe.setup()
    return recipe


if __name__ == "__main__":
    if sys.platform == "linux":  # die with the parent, however that ends: two processes must never write one run
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if "LOCAL_RANK" in os.environ:
        load_recipe(sys.argv[1]).run_train_validation_loop()
    else:
        launch(sys.argv[1], sys.argv[2])
