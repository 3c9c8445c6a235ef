"""Plans training on a cluster: memory, communication and time of a step, by the model in benchmarks/scaling_model.py.

    python -m benchmarks.scaling                                        (Gemma 2 27B on 8, 64 and 512 H100)
    python -m benchmarks.scaling model=gemma-3-12b gpus=8,16 gpu=A100 step_tokens=262144 peft.r=32

Arguments of its own, in addition to those of the configuration:
    gpus          numbers of GPUs, comma-separated; default 8,64,512
    gpu           their kind: H100 (the default), H200, A100
    per_node      GPUs of a machine; default 8
    step_tokens   tokens of an optimizer step, over all GPUs; default 1048576
    length        tokens of a sample, half of them target tokens; default 512

Prints the table; without arguments, also writes it with its plot to docs/scaling.md. It is a plan and not a
measurement: that document says what is checked against real runs and what is assumed.
"""

import sys
from typing import Any

from benchmarks import scaling_docs
from benchmarks.scaling_model import (
    GPUS,
    STRATEGIES,
    ModelBytes,
    Plan,
    ScalingOptions,
    architecture_of,
    model_bytes,
    plan,
)
from core.configuration import load_config
from core.errors import UserError, run


def main(argv: list[str]) -> None:
    options, overrides = ScalingOptions.parse(argv)
    if not any(override.startswith("model=") for override in overrides):
        overrides = ["model=gemma-2-27b", *overrides]
    if not any("gradient_checkpointing=" in override for override in overrides):
        overrides = ["task.train.gradient_checkpointing=true", *overrides]
    config = load_config(overrides)
    sizes = model_bytes(architecture_of(config), 0)
    plans, refused = [], []
    for gpus in options.gpus:
        for strategy, (kind, peft) in STRATEGIES.items():
            print(f"{gpus} GPUs, {strategy}", file=sys.stderr, flush=True)
            try:
                plans.append(plan(options, overrides, gpus, strategy, kind, peft))
            except UserError as error:
                refused.append(f"{gpus} GPUs, {strategy}: {error}")
    sentences = facts(options, config, sizes, plans) + refused
    scaling_docs.show(plans, sentences)
    if not argv:
        print(f"written: {scaling_docs.write(plans, sentences)}")


def facts(options: ScalingOptions, config: Any, sizes: ModelBytes, plans: list[Plan]) -> list[str]:
    """Sentences on the model and the cluster, and on the fastest strategy."""
    whole = sizes.layers * sizes.layer + sizes.rest
    found = [
        f"{config.model.name}: {whole / 2 / 1e9:.1f} billion weights, {whole / 1e9:.1f} GB in bfloat16; LoRA of rank "
        f"{config.peft.r}; {options.gpu} with {GPUS[options.gpu].memory:.0f} GiB, {options.per_node} in a machine; "
        f"{options.step_tokens:,} tokens per step, in samples of {options.length}, half of their tokens targets; "
        f"gradient checkpointing {'on' if config.task.train.gradient_checkpointing else 'off'}."
    ]
    if plans:
        adapter = plans[0].memory["adapter"] / 3 * 2**30
        found.append(
            f"At the end of a step {adapter / 1e9:.2f} GB of adapter gradients (float32) are summed. Training all "
            f"weights would sum {whole / 1e9:.0f} GB (bfloat16), {whole / adapter:,.0f} times as much."
        )
    for gpus in dict.fromkeys(one.gpus for one in plans):
        fitting = [one for one in plans if one.gpus == gpus and one.fits and "qlora" not in one.strategy]
        if fitting:
            best = max(fitting, key=lambda one: one.tokens_per_second)
            found.append(
                f"On {gpus} GPUs {best.strategy} is the fastest in this model that fits, with "
                f"{best.seconds:.2f} s a step."
            )
        else:
            found.append(f"On {gpus} GPUs nothing fits with a bfloat16 base.")
    return found


if __name__ == "__main__":
    run(main)
