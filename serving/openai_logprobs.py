"""Log-probabilities in OpenAI's two forms: of chat completions, and of completions."""

from collections.abc import Sequence
from typing import Any

from serving.client import TokenLogprob


def of_chat(tokens: Sequence[list[TokenLogprob]], count: int) -> dict[str, Any]:
    """`logprobs` of a chat's choice; `count`: how many of the most likely tokens are shown in each place."""
    content = [
        _entry(chosen[0]) | {"top_logprobs": [_entry(one) for one in _likeliest(chosen, count)]} for chosen in tokens
    ]
    return {"content": content, "refusal": None}


def of_text(tokens: Sequence[list[TokenLogprob]], count: int, offset: int) -> dict[str, Any]:
    """`logprobs` of a completion's choice; `offset`: characters of the text before the first of `tokens`."""
    offsets = []
    for chosen, *_ in tokens:
        offsets.append(offset)
        offset += characters(chosen)
    return {
        "tokens": [chosen.token for chosen, *_ in tokens],
        "token_logprobs": [chosen.logprob for chosen, *_ in tokens],
        # By text, as OpenAI has it: of two tokens with one text the likelier is kept, and the chosen one of all.
        "top_logprobs": [
            {one.token: one.logprob for one in (*reversed(_likeliest(tokens_here, count)), tokens_here[0])}
            for tokens_here in tokens
        ],
        "text_offset": offsets,
    }


def characters(one: TokenLogprob) -> int:
    """How many it adds to the text; one in several bytes, each a token, comes with the first."""
    return len(one.token) if one.bytes is None else sum(byte & 0xC0 != 0x80 for byte in one.bytes)


def _likeliest(tokens: list[TokenLogprob], count: int) -> list[TokenLogprob]:
    return sorted(tokens, key=lambda one: one.rank)[:count]


def _entry(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "bytes": None if one.bytes is None else list(one.bytes)}
