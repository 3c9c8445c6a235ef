"""Sampling parameters do what they say, and every one of OpenAI's and vLLM's is honoured or refused by name.

`python tests/test_parameters.py` writes docs/parameters.md.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_gemma
from test_engine import Engine
from tiny_tokenizer import tiny_tokenizer

from serving.client import AnswerPart
from serving.engine.gemma import Gemma
from serving.engine.grammar import CannotGoOn
from serving.engine.sampling import Sampler, bad_word_tokens
from serving.openai_api import ApiError, ChatCompletion, Completion, TextCompletion
from serving.openai_parameters import IGNORED, REFUSED, SAMPLING
from serving.protocol import STOP, Failed
from serving.sampling_parameters import RequestError, read_sampling

PAGE = ROOT / "docs/parameters.md"
HEAD = """# Parameters of the gateway

Made by `python tests/test_parameters.py`; a test holds it to what the gateway does. *yes*: it has its effect. *none*:
it is accepted and changes no answer. *refused*: 400 with its name, unless its value changes nothing. Names that stand
nowhere here are refused as unknown, with the one that is most like them. The column of vLLM is what the requests of its
own server declare, in its source at 002032ee2b; names that it does not know, it ignores.

| parameter | /v1/chat/completions | /v1/completions | vLLM | value that was tried |
|---|---|---|---|---|
"""
# Each with a value that changes answers, or has none that could, and what vLLM's server documents of it.
PARAMETERS: dict[str, tuple[Any, str]] = {
    "max_tokens": (7, "yes"),
    "max_completion_tokens": (7, "yes, chat"),
    "temperature": (0.5, "yes"),
    "top_p": (0.5, "yes"),
    "top_k": (5, "yes"),
    "min_p": (0.1, "yes"),
    "min_tokens": (3, "yes"),
    "stop": (["x"], "yes"),
    "stop_token_ids": ([5], "yes"),
    "include_stop_str_in_output": (True, "yes"),
    "ignore_eos": (True, "yes"),
    "seed": (1, "yes"),
    "presence_penalty": (0.5, "yes"),
    "frequency_penalty": (0.5, "yes"),
    "repetition_penalty": (1.5, "yes"),
    "logit_bias": ({"5": -100}, "yes"),
    "allowed_token_ids": ([5, 6], "yes"),
    "bad_words": (["cap"], "yes"),
    "skip_special_tokens": (False, "yes"),
    "response_format": ({"type": "json_object"}, "yes"),
    "structured_outputs": ({"regex": "a"}, "yes"),
    "stream": (True, "yes"),
    "stream_options": ({"include_usage": True}, "yes"),
    "tools": ([{"type": "function"}], "yes, chat"),
    "chat_template_kwargs": ({"enable_thinking": True}, "yes, chat"),
    "tool_choice": ("required", "yes, chat"),
    "n": (2, "yes"),
    "best_of": (2, "none"),
    "logprobs": (1, "yes"),
    "top_logprobs": (2, "yes, chat"),
    "prompt_logprobs": (1, "yes"),
    "echo": (True, "yes"),
    "suffix": ("x", "refused"),
    "use_beam_search": (True, "yes"),
    "length_penalty": (0.5, "yes"),
    "truncate_prompt_tokens": (5, "yes"),
    "continue_final_message": (True, "yes, chat"),
    "add_generation_prompt": (False, "yes, chat"),
    "add_special_tokens": (False, "yes"),
    "spaces_between_special_tokens": (False, "yes"),
    "return_token_ids": (True, "yes"),
    "return_tokens_as_token_ids": (True, "yes"),
    "include_reasoning": (False, "yes, chat"),
    "reasoning_effort": ("high", "yes, chat"),
    "chat_template": ("{{ x }}", "yes, chat"),
    "documents": ([{"text": "x"}], "yes, chat"),
    "prompt_embeds": ("x", "yes, completions"),
    "mm_processor_kwargs": ({}, "yes, chat"),
    "media_io_kwargs": ({}, "yes, chat"),
    "thinking_token_budget": (9, "yes"),
    "truncation_side": ("right", "yes"),
    "watermarking": (True, "yes"),
    "logprob_token_ids": ([5], "yes"),
    "repetition_detection": ({}, "yes"),
    "vllm_xargs": ({"a": 1}, "yes"),
    "kv_transfer_params": ({}, "yes"),
    "ec_transfer_params": ({}, "yes"),
    "return_prompt_text": (True, "yes, chat"),
    "return_token_offsets": (True, "none"),
    "guided_json": ({}, "none"),
    "guided_regex": ("a", "none"),
    "guided_choice": (["a"], "none"),
    "guided_grammar": ("a", "none"),
    "functions": ([{"name": "x"}], "none"),
    "function_call": ({"name": "x"}, "none"),
    "modalities": (["audio"], "none"),
    "audio": ({"voice": "x"}, "none"),
    "verbosity": ("high", "none"),
    "web_search_options": ({}, "none"),
    "user": ("me", "none"),
    "store": (True, "none"),
    "metadata": ({"a": "b"}, "none"),
    "service_tier": ("flex", "none"),
    "safety_identifier": ("x", "none"),
    "prompt_cache_key": ("x", "none"),
    "prompt_cache_retention": ("24h", "none"),
    "prediction": ({"type": "content", "content": "x"}, "none"),
    "parallel_tool_calls": (False, "yes, chat"),
    "priority": (1, "yes"),
    "request_id": ("x", "yes"),
    "cache_salt": ("x", "yes"),
    "session_id": ("x", "yes"),
    "stream_interval": (4, "yes"),
    "return_mm_kwargs": (False, "none"),
    "routed_experts_prompt_start": (1, "yes"),
}
REQUIRED: dict[type[Completion], dict[str, Any]] = {
    ChatCompletion: {"model": "gemma", "messages": [{"role": "user", "content": "Hi"}]},
    TextCompletion: {"model": "gemma", "prompt": "Hi"},
}


def effect(kind: type[Completion], name: str) -> str:
    """What the gateway makes of a parameter."""
    value, required = PARAMETERS[name][0], REQUIRED[kind]
    if kind is ChatCompletion and name == "logprobs":
        value = True  # with a number of its own
    if kind is ChatCompletion and name == "top_logprobs":
        required = required | {"logprobs": True}
    try:
        form = kind.read(json.dumps({**required, name: value}).encode())
    except ApiError as error:
        assert error.status == 400 and error.param == name and name in error.message
        return "refused"
    plain = kind.read(json.dumps(required).encode())
    return "none" if form.model_dump(exclude={*(form.model_extra or {})}) == plain.model_dump() else "yes"


def page() -> str:
    rows = []
    for name, (value, of_vllm) in PARAMETERS.items():
        effects = " | ".join(effect(kind, name) for kind in REQUIRED)
        rows.append(f"| `{name}` | {effects} | {of_vllm} | `{json.dumps(value)}` |\n")
    return HEAD + "".join(rows)


def test_the_table_of_parameters_is_what_the_gateway_does() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/test_parameters.py writes it"
    assert {*REFUSED, *IGNORED, *SAMPLING} <= set(PARAMETERS)
    known = {name for kind in REQUIRED for name in kind.model_fields} - {"model", "messages", "prompt"}
    assert known <= set(PARAMETERS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("temprature", "unknown parameter 'temprature'; did you mean temperature?"),
        ("top-p", "did you mean top_p?"),
        ("response_fromat", "did you mean response_format?"),
        ("zzzzzz", "unknown parameter 'zzzzzz'; leave it out"),
    ],
)
def test_a_misspelt_name_is_refused(name: str, words: str) -> None:
    for kind, required in REQUIRED.items():
        with pytest.raises(ApiError) as refused:
            kind.read(json.dumps({**required, name: 1}).encode())
        assert words in refused.value.message and (refused.value.status, refused.value.param) == (400, name)
        assert kind.read(json.dumps({**required, name: None}).encode()).sampling == {}


def test_echo_puts_the_prompt_before_an_answer_once() -> None:
    form = TextCompletion.read(b'{"model": "gemma", "prompt": "Hi", "echo": true}')
    places: tuple[Literal["whole", "first", "part"], ...] = ("whole", "first", "part")
    said = [form.choice(0, AnswerPart("!", ""), None, place)["text"] for place in places]
    assert said == ["Hi!", "Hi!", "!"]


def test_a_request_has_a_bounded_number_of_answers() -> None:
    body = {"model": "gemma", "prompt": ["a", "b", "c"], "n": 5}
    read = TextCompletion.read(json.dumps(body).encode())
    assert read.prompt == ["a", "b", "c"] and read.answers == 15
    with pytest.raises(ApiError, match="prompt: 18 answers are asked for; a request has at most 16"):
        TextCompletion.read(json.dumps({**body, "n": 6}).encode())


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
def test_n_answers_have_seeds_of_their_own(seed: int) -> None:
    form = TextCompletion.read(json.dumps({"model": "gemma", "prompt": "Hi", "n": 3, "seed": seed}).encode())
    seeds = [sampling["seed"] for sampling in form.samplings()]
    assert seeds[0] == seed and len({*seeds}) == 3
    assert [read_sampling({"seed": one})[0].seed for one in seeds] == seeds  # none is too large


def test_n_answers_without_a_seed_are_not_given_one() -> None:
    form = TextCompletion.read(b'{"model": "gemma", "prompt": "Hi", "n": 3, "seed": -1}')
    assert all(read_sampling(sampling)[0].seed is None for sampling in form.samplings())


@pytest.mark.parametrize(("name", "value"), [("tools", 0), ("best_of", True)])
def test_a_value_that_only_equals_a_harmless_one_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"{name} is not supported"):
        TextCompletion.read(json.dumps({"model": "gemma", "prompt": "Hi", name: value}).encode())


# --- what they do -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_gemma("gemma3_text", torch.bfloat16, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine_of(base: Path) -> Callable[[], Engine]:
    model = Gemma(base, torch.float32, "cpu", 64)
    return lambda: Engine(base, model)


def sampler(**given: Any) -> Sampler:
    return Sampler(read_sampling({"temperature": 0, **given})[0], [], (7,))


def test_biases_and_allowed_tokens_act_before_penalties() -> None:
    logits = np.array([0, 2, 3, -1, 1, 0, 0, 9], np.float32)
    one = sampler(logit_bias={"2": 1.5, 7: -100}, allowed_token_ids=[1, 2, 7], repetition_penalty=2)
    one.accept(2)
    changed = logits.copy()
    assert one.choose(0, changed) == 2
    assert changed.tolist() == [-np.inf, 2, (3 + 1.5) / 2, -np.inf, -np.inf, -np.inf, -np.inf, 9 - 100]
    drawn = sampler(allowed_token_ids=[1, 4], temperature=1, seed=0)
    assert {drawn.choose(0, logits.copy()) for _ in range(50)} == {1, 4}
    with pytest.raises(CannotGoOn, match="together forbid every token"):
        sampler(allowed_token_ids=[7], min_tokens=1).choose(0, logits.copy())


def test_bad_words_are_never_said(engine_of: Callable[[], Engine]) -> None:
    engine = engine_of()
    ids = engine.tokenizer.encode(engine.ask("Hi", max_tokens=8).text, add_special_tokens=False).ids
    word = engine.tokenizer.decode(ids[2:4]).strip()
    assert word and word in engine.ask("Hi", max_tokens=8).text
    tokens = bad_word_tokens(engine.tokenizer, [word])
    for seed in range(10):
        said = engine.ask("Hi", bad_words=[word], temperature=seed / 5, seed=seed, max_tokens=30)
        spoken = engine.tokenizer.encode(said.text, add_special_tokens=False).ids
        assert not any(tuple(spoken[at : at + len(one)]) == one for one in tokens for at in range(len(spoken)))
    assert word not in engine.ask("Hi", bad_words=[word], max_tokens=8).text


def test_tokens_and_texts_that_stop_an_answer_are_left_out_or_included(engine_of: Callable[[], Engine]) -> None:
    engine = engine_of()
    prompt, drawn = "No cap, that fit is bussin", {"temperature": 1, "seed": 1}
    said: list[int] = []
    accept = Sampler.accept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "accept", lambda self, token: (said.append(token), accept(self, token))[1])
        plain = engine.ask(prompt, **drawn)
    at = next(n for n in range(2, len(said)) if said[n] not in said[:n])
    decode = engine.tokenizer.decode
    for included, text in ((False, decode(said[:at])), (True, decode(said[: at + 1]))):
        ends = {"stop_token_ids": [said[at]], "include_stop_str_in_output": included, "ignore_eos": True}
        done = engine.ask(prompt, **drawn, **ends)
        assert (done.text, done.finish_reason, done.output_tokens) == (text, STOP, at + 1)
    later = engine.ask(prompt, **drawn, stop_token_ids=[said[at]], min_tokens=at + 2)
    assert later.output_tokens > at + 1 and not later.text.startswith(decode(said[: at + 1]))
    stop = plain.text[3:5]
    start = plain.text.index(stop)
    assert engine.ask(prompt, **drawn, stop=stop).text == plain.text[:start]
    assert engine.ask(prompt, **drawn, stop=stop, include_stop_str_in_output=True).text == plain.text[: start + 2]


def test_tokens_that_the_model_does_not_have_are_refused(engine_of: Callable[[], Engine]) -> None:
    engine = engine_of()
    for given in ({"stop_token_ids": [9999]}, {"logit_bias": {"9999": 1}}, {"allowed_token_ids": [1, 9999]}):
        failed = engine.sent[engine.submit("Hi", **given)][-1]
        assert isinstance(failed, Failed) and failed.error.startswith(f"{next(iter(given))} has the token 9999; this ")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stop_token_ids": 5}, "stop_token_ids is not a list of"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1; it is the number of a token"),
        ({"logit_bias": {"a": 1}}, "logit_bias is not a number: 'a'"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5 is 101.0; it is from -100 to 100"),
        ({"bad_words": [""]}, "bad_words is not a text"),
        ({"bad_words": ["a"], "structured_outputs": {"regex": "a"}}, "bad_words cannot be combined with"),
    ],
)
def test_wrong_values_are_reported_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_sampling(given)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
