"""Plans training on a cluster: memory, communication and time of a step, by the model in benchmarks/scaling_model.py.

    python -m benchmarks.scaling                                        (MODELS on 8, 64 and 512 H100)
    python -m benchmarks.scaling model=gemma-3-12b gpus=8,16 gpu=A100 step_tokens=262144 peft.r=32

Prints the table; without arguments, also writes those of MODELS, with a plot of the first, to docs/scaling.md. It is a
plan and not a measurement: that document says what is checked against real runs and what is assumed.
"""

import sys
from typing import Any

from benchmarks import scaling_docs
from benchmarks.scaling_model import GPUS, STRATEGIES, ModelBytes, Options, Plan, architecture_of, model_bytes, plan
from core.arguments import own_arguments, parse
from core.configuration import load_config
from core.errors import UserError, run
from core.schema import Config

MODELS = ("gemma-2-27b", "gemma-4-31b", "gemma-4-26b-a4b")


def main(argv: list[str]) -> None:
    own, overrides = own_arguments(Options, argv)
    options = parse(Options, own, (Config,))
    if any(override.startswith("model=") for override in overrides):
        models = [overrides]
    else:
        models = [[f"model={name}", *overrides] for name in (MODELS[:1] if argv else MODELS)]
    found = []
    for chosen in models:
        plans, sentences = plan_all(options, chosen)
        scaling_docs.show(plans, sentences)
        found.append((load_config(chosen).model.name, plans, sentences))
    if not argv:
        print(f"written: {scaling_docs.write(found)}")


def plan_all(options: Options, overrides: list[str]) -> tuple[list[Plan], list[str]]:
    """Every strategy on every number of GPUs, and sentences on them and on what was refused."""
    if not any("gradient_checkpointing=" in override for override in overrides):
        overrides = ["task.train.gradient_checkpointing=true", *overrides]
    config = load_config(overrides)
    sizes = model_bytes(architecture_of(config), 0)
    plans: list[Plan] = []
    refused: dict[str, list[int]] = {}  # why → on how many GPUs
    for gpus in options.gpus:
        for strategy, (kind, peft) in STRATEGIES.items():
            print(f"{config.model.name}, {gpus} GPUs, {strategy}", file=sys.stderr, flush=True)
            try:
                plans.append(plan(options, overrides, gpus, strategy, kind, peft))
            except UserError as error:
                refused.setdefault(f"{strategy}: {error}", []).append(gpus)
    sentences = [f"On {', '.join(map(str, gpus))} GPUs not {why}." for why, gpus in refused.items()]
    return plans, facts(options, config, sizes, plans) + sentences


def facts(options: Options, config: Any, sizes: ModelBytes, plans: list[Plan]) -> list[str]:
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
