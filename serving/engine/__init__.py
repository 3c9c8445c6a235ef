"""The embedded engine: one Gemma, many LoRA adapters, requests that join and leave at every step.

python -m serving.engine --base models/gemma-3-270m --adapters exports/serve/adapters --socket engine.sock

__main__.py     the process: command line, signals, the loop that generates
connections.py  the Unix socket: lines in, lines out
scheduler.py    which tokens of which requests make a step; prefix cache; what a failure costs
kv_cache.py     blocks of the key/value cache, shared by equal beginnings
    architecture.py what a Gemma is, and what a step is made of
    kernels.py      the forward pass on a CPU, by kernels.c
    gemma.py        the forward pass in plain torch
adapters.py     PEFT folders, watched while it runs
sampling.py     from logits to the next token
detokenizer.py  from tokens to text, stop strings
"""


class UserError(Exception):
    """A mistake of the user's or of the machine's: its text says what, where and what to do."""
