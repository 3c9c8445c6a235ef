"""Whether each adapter changes what the base says: an engine that drops its tensors answers as the base, with no error.

That has happened in vLLM where names were those of another class's layers (its issues 34186, 41754, 48019). So the
gateway of the vLLM variant asks both the same, sampled with the same seeds: the same probabilities give the same words.
An adapter that changes one token in twenty leaves an answer of `TOKENS` tokens as it was less than once in ten times,
and `MOST` of `SEEDS` once in hundreds. They need not be all: in an engine that computes the two in other batches,
rounding may change a word.
"""

from typing import Any

from serving.client import AsyncClient

QUESTION = "What did you see on your way here this morning?"
SEEDS = range(4)
MOST = 3
TOKENS = 48


async def changes_nothing(client: AsyncClient, adapter: str) -> bool:
    """Whether the answers of `adapter`, asked as it was trained, are those of its base.

    Raises:
        ServingError: an answer is an error.
    """
    equal = 0
    for seed in SEEDS:
        # All tokens may be drawn, not the likeliest alone, and the end is one like the others: small changes show.
        asked: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        asked |= {"stop": [], "ignore_eos": True, "seed": seed, "max_tokens": TOKENS}
        base = await client.ask(adapter, QUESTION, base=True, **asked)
        tuned = await client.ask(adapter, QUESTION, **asked)
        equal += base.text == tuned.text
    return equal >= MOST
