"""A training step on a GPU that is not there: what it would do wrong on one.

    python -m benchmarks.fake_gpu                                       (every size of Gemma, LoRA and checkpointing)
    python -m benchmarks.fake_gpu models=gemma-3-1b,gemma-4-e2b task.train.gradient_checkpointing=true

Two whole steps of `make train` (Lightning's loop, the model as `GemmaLoRA` makes it, packed batches, forward and
backward pass, clipping, optimizer) run on torch's fake tensors, which have a device, a dtype and a shape but no
numbers. What ends them is told with its place: a tensor on the wrong device, dtypes or shapes that do not fit, a host
sync (a number, or a size that depends on numbers, which the CPU would wait for), and a tensor that is still in main
memory when a step needs it.

It needs no driver, but a C++ compiler (fake_cuda.cpp). It says nothing of speed and numbers, of several GPUs, and of
what torch.compile makes: FlexAttention runs uncompiled. 4-bit weights need bitsandbytes' CUDA library.
"""

import ctypes
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.random_base import ARCHITECTURES
from core.arguments import Arguments
from core.errors import UserError, run

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
MODELS = [name for name in ARCHITECTURES if not name.endswith("-cut")]
STEPS = 2
ROWS = [(40, 20), (40, 35), (0, 90), (0, 700)]  # tokens of a shared prompt, and of the rest


class Options(Arguments):
    models: list[str] = Field(MODELS, min_length=1, description="architectures, by their names in random_base.py")


def main(argv: list[str]) -> None:
    load_fake_cuda()  # before torch is imported
    from core.configuration import load_config
    from core.machine import loading, quiet_libraries

    _, options = load_config(argv, Options)
    others = [word for word in argv if not word.startswith("models=")]
    if unknown := [name for name in options.models if name not in ARCHITECTURES]:
        raise UserError(f"models={unknown[0]} is unknown. Known: {', '.join(ARCHITECTURES)}")
    if any(word.startswith("model=") for word in others):
        raise UserError("model=: the architectures are named by models=")
    print("Loading NeMo (some seconds)", flush=True)
    with loading():
        quiet_libraries()
    wrong = 0
    for name in options.models:
        for words in [others] if others else [[], ["task.train.gradient_checkpointing=true"]]:
            begin = time.monotonic()
            found = fault(name, words)
            wrong += found is not None
            what = " ".join([name, *words])
            print(f"{what:64}{time.monotonic() - begin:5.0f} s  {found or 'nothing wrong'}", flush=True)
    if wrong:
        raise UserError(f"{wrong} of the lines above would fail or wait on a GPU")


def load_fake_cuda() -> None:
    """Make torch, which must not have been imported, take CUDA for a device; a CUDA build of it does by itself.

    Raises:
        UserError: there is no C++ compiler.
    """
    assert "torch" not in sys.modules
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    torch = Path(spec.origin).parent
    if (torch / "lib/libtorch_cuda.so").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "fake_cuda.so"
        command = ["c++", "-std=c++20", "-fPIC", "-shared", str(SOURCE), "-o", str(built), f"-I{torch / 'include'}"]
        command += [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except FileNotFoundError:
            raise UserError("no C++ compiler is installed (c++): install g++ or clang") from None
        except subprocess.CalledProcessError as error:
            raise UserError(f"{SOURCE.name} cannot be compiled: {error.stderr.decode().splitlines()[0]}") from None
        ctypes.CDLL(str(built), ctypes.RTLD_GLOBAL)


def fault(name: str, words: list[str], **changes: Any) -> str | None:
    """What is wrong with the steps of the architecture `name` with the overrides `words`; None: nothing.

    Args:
        changes: to the architecture, for a smaller one of its kind.
    """
    from core.configuration import load_config

    config = load_config([*words, "trainer.accelerator=gpu"])
    family, architecture = ARCHITECTURES[name]
    with tempfile.TemporaryDirectory() as folder:
        written = architecture | changes | {"model_type": family, "bos_token_id": 2, "eos_token_id": 1}
        (Path(folder) / "config.json").write_text(json.dumps(written))
        try:
            run_steps(config, Path(folder))
        except Exception as error:  # whatever it is, it is what this looks for
            frames = traceback.extract_tb(error.__traceback__)
            last = next(
                frame for frame in reversed(frames) if not {"torch", SOURCE.parent.name} & {*Path(frame.filename).parts}
            )
            said = str(error).splitlines() or [type(error).__name__]
            return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}, {last.line}: {said[0]}"
    return None


def run_steps(config: Any, base_folder: Path) -> None:
    """`STEPS` steps of a run of `config` on a fake GPU, with a base of the architecture in `base_folder`.

    Raises:
        Exception: of whatever kind, what would go wrong.
    """
    import torch
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.accelerators import CUDAAccelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from torch import Tensor, nn
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import AutoConfig, AutoModelForCausalLM

    from training import gemma_lora, packed_attention, packing
    from training.batches import Batches, MicroBatch, Step
    from training.fit import TrainingSchedule, training_config

    fake = FakeTensorMode()
    copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    class Watch(TorchDispatchMode):
        """Refuses what fake tensors allow: copies to main memory, and operations on a tensor that is there."""

        supports_higher_order_operators = True  # FlexAttention is one

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            if any(one.is_cuda for one in given):
                if func in copies and not out.is_cuda:
                    raise RuntimeError(f"{func} copies from the GPU to main memory, and waits for it")
                if func not in copies and any(one.ndim for one in given if not one.is_cuda):
                    raise RuntimeError(f"{func} is given a tensor in main memory")
            return out

    class FakeAccelerator(CUDAAccelerator):
        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return devices

        @staticmethod
        def get_parallel_devices(devices: Any) -> list[torch.device]:
            return [torch.device("cuda", 0)]

        def setup_device(self, device: torch.device) -> None:
            """There is no driver to tell of it."""

    class FakeGPU(SingleDeviceStrategy):
        def model_to_device(self) -> None:
            with fake:
                super().model_to_device()

        def batch_to_device(self, batch: Step, *args: Any, **kwargs: Any) -> Any:
            def faked(one: MicroBatch) -> MicroBatch:
                return replace(
                    one,
                    input_ids=fake.from_tensor(one.input_ids),
                    layout=replace(one.layout, positions=fake.from_tensor(one.layout.positions)),
                    logit_positions=fake.from_tensor(one.logit_positions),
                    targets=fake.from_tensor(one.targets),
                )

            with fake:
                return super().batch_to_device(replace(batch, micro_batches=[*map(faked, batch.micro_batches)]))

        def teardown(self) -> None:
            pass

    class InTheStep(Callback):
        modes = ExitStack()

        def on_train_batch_start(self, *args: Any) -> None:
            self.modes = ExitStack()
            self.modes.enter_context(fake)
            self.modes.enter_context(Watch())

        def on_train_batch_end(self, *args: Any) -> None:
            self.modes.close()

        def on_exception(self, *args: Any) -> None:
            self.modes.close()

    class Schedule:
        """Without a length, which Lightning would put into a tensor on the GPU."""

        def __init__(self, steps: TrainingSchedule) -> None:
            self.steps = steps

        def __iter__(self) -> Iterator[Step]:
            return iter(self.steps)

    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        """nn.Module's, which exchanges the contents of fake parameters, and cannot: their mode refers to them weakly
        (github.com/pytorch/pytorch/issues/148977)."""
        for child in self.children() if recurse else ():
            child._apply(function)
        for name, old in self._parameters.items():
            if old is not None:
                with torch.no_grad():
                    new = function(old)
                if new is not old:
                    self._parameters[name] = moved.setdefault(id(old), (old, nn.Parameter(new, old.requires_grad)))[1]
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer if buffer is None else function(buffer)
        return self

    def load_base(folder: Path, dtype: torch.dtype, quantization: Any, device: torch.device) -> nn.Module:
        if quantization:
            raise UserError("4-bit weights need bitsandbytes' CUDA library")
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)

    samples = _samples(config.task.train.max_length)
    schedule = TrainingSchedule(Batches(samples, len(samples), 512, 0), STEPS)
    ours = {
        (gemma_lora, "load_base"): load_base,
        (gemma_lora, "weights_dtype"): lambda: torch.bfloat16,
        (packed_attention, "compiled"): lambda function: function,
        (packing, "compiled"): lambda function: function,
        (torch, "compile"): lambda function, **kwargs: function,  # FlexAttention calls it when it is not compiled
        (torch.cuda, "get_device_capability"): lambda *args: (9, 0),  # transformers' experts want to know
        (nn.Module, "_apply"): apply,
        (gemma_lora.GemmaLoRA, "log_dict"): lambda *args, **kwargs: None,  # Lightning copies a metric's storage
    }
    before = {place: getattr(*place) for place in ours}
    try:
        for (owner, attribute), value in ours.items():
            setattr(owner, attribute, value)
        trainer = Trainer(
            devices=1,
            strategy=FakeGPU(torch.device("cuda", 0), accelerator=FakeAccelerator()),
            max_epochs=1,
            limit_val_batches=0,
            callbacks=[InTheStep()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        with fake:
            model = gemma_lora.GemmaLoRA(training_config(config, base_folder, STEPS), trainer)
        trainer.fit(model, Schedule(schedule))
        if trainer.global_step != STEPS:
            raise RuntimeError(f"{trainer.global_step} of {STEPS} steps were taken")
    finally:
        for (owner, attribute), value in before.items():
            setattr(owner, attribute, value)


def _samples(longest: int) -> Any:
    from datasets import Dataset

    rows = []
    for number, (prompt, rest) in enumerate(ROWS):
        ids = [2, *range(10, 10 + prompt), *range(100 + number, 100 + number + rest)][:longest]
        rows.append({"input_ids": ids, "length": len(ids), "target_ranges": [[len(ids) // 2, len(ids)]]})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    run(main)
