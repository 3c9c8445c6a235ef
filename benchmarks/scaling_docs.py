"""The plans of benchmarks/scaling.py as a table in the terminal, and as docs/scaling.md with docs/scaling.png."""
# ruff: noqa: E501 -- rows of a Markdown table

from pathlib import Path

from benchmarks.scaling_model import COMPUTE_EFFICIENCY, HOP_SECONDS, LINK_EFFICIENCY, USABLE_MEMORY, Plan
from benchmarks.table import save
from core.files import write_whole

DOCS, PLOT = Path("docs/scaling.md"), Path("docs/scaling.png")
HEADER = [
    "GPUs",
    "strategy",
    "weights",
    "adapter",
    "optimizer",
    "activations",
    "logits",
    "GiB of each GPU",
    "fits",
    "micro-batches",
    "GB sent",
    "seconds",
    "tokens/s",
    "efficiency",
    "MFU",
]

TEXT = """# On a cluster: a plan

**Nothing on this page has been measured.** It is calculated by a stated model, for machines that this project has not run on;
`{command}` writes it, and prints the same for any model and cluster:

    python -m benchmarks.scaling model=gemma-3-12b gpus=8,16 gpu=A100 step_tokens=262144 peft.r=32

{facts}

![Planned memory of each GPU, and planned efficiency](scaling.png)

Memory in GiB of each GPU; `GB sent` by each GPU in a step; `efficiency` is the time of the arithmetic alone over the
time with communication; MFU counts what any implementation must compute, so that recomputation lowers it.

{table}

{others}

## Choosing a strategy

- **The base fits on one GPU beside its activations: `ddp`.** A step ends with one all-reduce of the adapters'
  gradients, and communicates nothing else. This is the effect of LoRA: the usual reason to shard, gradients and optimizer
  states of all weights, is gone, and the all-reduce is hundreds of times smaller, so that even a slow network keeps up.
- **It does not fit, or longer samples need the memory: `fsdp2`.** Each layer is gathered while the one before is
  computed. The time of a gather depends on the model and not on the tokens, so it is hidden by large micro-batches and
  exposed where a step's tokens are divided among very many GPUs.
- **It does not fit and GPUs are few: `PEFT=qlora` with `ddp`.** Weights take a quarter. The model below leaves out the
  cost of dequantizing at every use; `fsdp2` and `tp` cannot divide such a base. It does little for a model of experts,
  which stay whole: 42.5 GiB of Gemma 4 26B-A4B.
- **`tp`** waits for an all-reduce after every attention and every MLP, which grows with the tokens; in this plan it is
  never the fastest that fits. It is for samples so long that one GPU cannot hold a layer's activations, within a machine
  only.
- **How many GPUs:** the tokens of a step are chosen for training quality, not for the cluster. A data set of 10,000
  samples of 512 tokens has five steps of this size in an epoch; with a tenth of the tokens in a step, a tenth of the GPUs
  do the same.

## The model

Of a step of *n* GPUs, *g* in a machine, *m* micro-batches:

| | formula | source |
|---|---|---|
| memory | `training/memory.py`, the estimate of every run before it starts | tests/test_memory.py, tests/test_scaling.py |
| arithmetic | `training/flops.py`, and the layers' forward pass again with gradient checkpointing; at {reached} of the peak | torch's FlopCounterMode agrees: tests/test_benchmarks.py, tests/test_scaling.py |
| all-gather of *S* bytes | *S*(*n* − 1)/*n* sent by each GPU, in a ring of *n* − 1 hops | Patarasuk and Yuan, 2009 |
| all-reduce of *S* bytes | 2*S*(*n* − 1)/*n* sent by each, 2 log₂ *n* hops in a tree | the same; Sanders, Speck and Träff, 2009; NCCL 2.4 |
| bandwidth | {link} of NVLink's in a machine; between machines of the smaller of NVLink's and *g* network cards' | a ring enters each machine once, and NCCL makes one per card |
| ddp | *m* · compute + all-reduce(adapters) | one all-reduce per step: `AdapterParallel.sum_step` |
| fsdp2 | *m* · (max(forward, gathers) + max(backward, gathers) + the first layer and the embedding) + all-reduce(adapters) | `shard_base`: 2 gathers of each layer, 1 of the embedding; Zhao et al., 2023 |
| tp | *m* · (compute / *g* + output layer + 4, with checkpointing 6, all-reduces of the hidden states in each layer) + all-reduce(adapters) | `split_base`; Shoeybi et al., 2019, section 3 |

Peaks are NVIDIA's dense bfloat16 figures (H100 SXM 989 TFLOP/s, A100 312), NVLink 450 and 300 GB/s each way, one
network card a GPU of 400 and 200 Gb/s (user guides of DGX H100 and DGX A100).

**Assumed**: {reached} of the peak in arithmetic (Narayanan et al., 2021, reached 44–52% of an A100's with
everything included; short samples, LoRA's small products and the narrow matrices of experts may reach less, and Gemma 2's
soft-capped attention has no fused kernel here); {link} of the links; {hop} µs a hop; {room} of a GPU's memory is usable. **Left out**: reading data,
validation, checkpoints, stragglers, other jobs on the network, failures. Ratios between strategies are more reliable than
seconds.

**Checked against real runs**, with processes on one CPU: how much of the base each process holds, the number and size of
the collectives of each strategy, and the FLOPs (tests/test_scaling.py); the memory of one process (tests/test_memory.py). Parameters are those of the published models: 26,047,480,320 outside of Gemma 2 27B's embedding,
as its report says; 30.7 billion, and 25.2 billion of which a token uses 3.8, as Gemma 4's model card says.
"""


def show(plans: list[Plan], sentences: list[str]) -> None:
    rows = [HEADER, *map(line, plans)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADER))]
    for cells in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    print("\n" + "\n".join(sentences))


def write(found: list[tuple[str, list[Plan], list[str]]]) -> Path:
    """
    Args:
        found: name, plans and sentences of each model; the first is at the top, with a plot.
    """
    (_, plans, sentences), *others = found
    text = TEXT.format(
        command="python -m benchmarks.scaling",
        facts=listed(sentences),
        reached=f"{COMPUTE_EFFICIENCY:.0%}",
        link=f"{LINK_EFFICIENCY:.0%}",
        hop=f"{HOP_SECONDS * 1e6:.0f}",
        room=f"{USABLE_MEMORY:.0%}",
        table=table(plans),
        others="\n\n".join(f"## {name}\n\n{listed(facts)}\n\n{table(rows)}" for name, rows, facts in others),
    )
    plot(plans)
    write_whole(DOCS, text)
    return DOCS


def listed(sentences: list[str]) -> str:
    return "\n".join(f"- {one}" for one in sentences)


def table(plans: list[Plan]) -> str:
    rows = [HEADER, ["---"] * len(HEADER), *map(line, plans)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def line(one: Plan) -> list[str]:
    parts = [f"{one.memory[part]:.1f}" for part in HEADER[2:7]]
    return [
        str(one.gpus),
        one.strategy,
        *parts,
        f"{sum(one.memory.values()):.1f}",
        "yes" if one.fits else "no",
        str(one.micro_batches),
        f"{one.sent / 1e9:.1f}",
        f"{one.seconds:.2f}",
        f"{one.tokens_per_second:,.0f}",
        f"{one.efficiency:.0%}",
        f"{one.mfu:.0%}",
    ]


def plot(plans: list[Plan]) -> None:
    """Memory of each GPU by part, and efficiency over the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    names = [f"{one.gpus} × {one.strategy}" for one in plans]
    bottom = [0.0] * len(plans)
    for part, color in zip(HEADER[2:7], ("#2a7f62", "#8fc1a9", "#d8b365", "#9aa5b1", "#5e6b78"), strict=True):
        sizes = [one.memory[part] for one in plans]
        left.barh(names, sizes, left=bottom, color=color, label=part)
        bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    left.invert_yaxis()
    left.set_xlabel("GiB of each GPU, planned", fontsize=8)
    left.legend(fontsize=7, frameon=False)
    for strategy in dict.fromkeys(one.strategy for one in plans):
        of_it = [one for one in plans if one.strategy == strategy]
        style = "-" if all(one.fits for one in of_it) else "--"
        right.plot([one.gpus for one in of_it], [one.efficiency for one in of_it], style, marker="o", label=strategy)
    right.set_xscale("log", base=2)
    right.set_xticks(sorted({one.gpus for one in plans}), labels=[str(n) for n in sorted({one.gpus for one in plans})])
    right.set_ylim(0, 1.05)
    right.set_xlabel("GPUs, the step's tokens being the same", fontsize=8)
    right.set_ylabel("efficiency, planned (dashed: does not fit)", fontsize=8)
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, PLOT)
