"""The embedded engine: one Gemma, many LoRA adapters, continuous batching.

    python -m serving.engine --base models/gemma-3-270m --adapters exports/serve/adapters --socket engine.sock

A request's way through the files:

    __main__.py      the process: command line, signals, the loop that generates
    connections.py   the Unix socket: JSON lines in, JSON lines out (serving/protocol.py)
    scheduler.py     which tokens of which requests make a step; prefix cache; failures
    kv_cache.py      blocks of the key/value cache, shared by equal prefixes
    step.py          what a step is given and what it returns
        kernels.py       the forward pass on a CPU, by kernels.c
        gemma.py         the forward pass in plain torch, with stacked_lora.py for the adapters
        architecture.py  sizes and weights of a Gemma
    adapters.py      PEFT folders, watched while the engine runs
    grammar.py       which tokens may come next in a structured answer
        grammar_check.py a process that tries grammars first, and may be lost
    sampling.py      from logits to the next token
    detokenizer.py   from tokens to text, stop strings
"""
