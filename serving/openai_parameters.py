"""OpenAI's parameters and vLLM's: which become sampling parameters, how, and which are refused."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "min_tokens",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "skip_special_tokens",
    "stop_token_ids",
    "include_stop_str_in_output",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
    "logprobs",
    "truncate_prompt_tokens",
)
# Values that are none, which an engine may refuse: vLLM does an empty list of allowed tokens.
NOTHING: Mapping[str, Any] = {
    "stop": [],
    "stop_token_ids": [],
    "logit_bias": {},
    "allowed_token_ids": [],
    "bad_words": [],
}
# Unsupported parameters that would change the answer, each with the values that are harmless.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "top_logprobs": (0,),  # a field of chat completions
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "echo": (False,),  # a field of completions
    "modalities": (["text"],),
    "audio": (),
    "prompt_embeds": (),
    "guided_json": (),  # vLLM's old names for parts of structured_outputs
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "truncation_side": ("left",),
    "continue_final_message": (False,),  # a field of chat completions
    "add_generation_prompt": (True,),  # false only with the former
    "add_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "include_reasoning": (True,),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "watermarking": (False,),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "vllm_xargs": ({},),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "thinking_token_budget": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# What changes no answer here: bookkeeping, and hints for servers that have what they are about.
IGNORED = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "parallel_tool_calls",
        "priority",
        "request_id",
        "cache_salt",
        "session_id",
        "stream_interval",
        "return_mm_kwargs",
        "routed_experts_prompt_start",
    }
)


def is_harmless(name: str, value: Any) -> bool:
    """Whether the unsupported parameter `name` changes nothing with this value; 0 is not False here, nor 1 True."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in REFUSED.get(name, ()))


def unknown(name: str, known: Iterable[str]) -> str:
    """What is said of a parameter that nobody knows."""
    meant = get_close_matches(name, [*known, *REFUSED, *IGNORED], 1)
    return f"unknown parameter {name[:60]!r}" + (f"; did you mean {meant[0]}?" if meant else "; leave it out")


def as_sent(message: str, sent: Mapping[str, Any]) -> str:
    """An error message about sampling parameters, with the names of those of `sent` that became them."""
    if _of_response_format(sent.get("response_format")):
        message = message.replace("structured_outputs.json_object", "response_format")
        message = message.replace("structured_outputs.json", "response_format.json_schema.schema")
        message = message.replace("structured_outputs", "response_format")
    if sent.get("max_completion_tokens") is not None:
        message = re.sub(r"\bmax_tokens\b", "max_completion_tokens", message)
    return message


def structured_outputs(response_format: Any, given: Any) -> dict[str, Any] | None:
    """What an answer must be, as the sampling parameter of that name.

    Args:
        response_format: OpenAI's parameter.
        given: vLLM's `structured_outputs`; what it holds is checked where the sampling parameter is read.

    Raises:
        ValueError: one of them is wrong, or both are given; the message begins with its name.
    """
    found = _of_response_format(response_format)
    if given is None:
        return found
    if found:
        raise ValueError("response_format: give it or structured_outputs, not both")
    if not isinstance(given, dict):
        raise ValueError('structured_outputs: it is an object, such as {"choice": ["yes", "no"]}')
    return given


def _of_response_format(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    value = {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else {}
    kind = value.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise ValueError('response_format: its "type" is one of "text", "json_object", "json_schema"')
    if unknown := value.keys() - {"type", "json_schema"} or (kind != "json_schema" and value.keys() - {"type"}):
        raise ValueError(f'response_format: "{min(unknown)}" is not supported with the type "{kind}"')
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    schema = value.get("json_schema")
    schema = schema.get("schema") if isinstance(schema, dict) else None
    if not isinstance(schema, dict):
        raise ValueError('response_format: "json_schema" is {"name": "…", "schema": {…}}, with a JSON Schema')
    return {"json": schema}
