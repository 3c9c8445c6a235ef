"""What the model thought of an answer's tokens, as vLLM tells it: by its own logits, before sampling parameters."""

from typing import Any

import numpy as np

from serving.engine.detokenizer import single_byte
from serving.engine.sampling import Floats, candidates
from serving.sampling_parameters import Sampling


def token_logprobs(tokenizer: Any, logits: Floats, token: int, count: int) -> dict[int, dict[str, Any]]:
    """The log-probabilities of `token`, which was chosen, and of the `count` most likely ones.

    Args:
        tokenizer: of the `tokenizers` library.
        logits: [vocabulary], the model's own.

    Returns:
        token → {"logprob", "rank", "decoded_token"}, `token` first; "rank": 1 for the most likely one. A token that is
        one byte of a character also has "bytes".
    """
    highest = logits.max()
    total = float(highest) + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    likely = candidates(logits, highest, Sampling(top_k=count))[0] if count else np.empty(0, np.int64)
    likely = likely[np.argsort(-logits[likely], kind="stable")][:count].tolist()
    ranks = {one: rank for rank, one in enumerate(likely, 1)}
    return {
        one: {
            "logprob": float(logits[one]) - total,
            "rank": ranks.get(one) or int(np.count_nonzero(logits > logits[one])) + 1,
            "decoded_token": tokenizer.decode([one], skip_special_tokens=False),
            **({"bytes": list(byte)} if (byte := single_byte(tokenizer.id_to_token(one))) else {}),
        }
        for one in dict.fromkeys([token, *likely])
    }
