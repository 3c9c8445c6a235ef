"""Tokens in and out: prompts that are tokens, prompts cut to their last ones, and what the model thought of each."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from conftest import PATIENCE, tiny_gemma
from test_engine import Engine
from tiny_serving import GREEDY, SERVING_PYTHON, Stack, serve_tiny
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from vllm_contract import Refused, Server

from serving.client import Answer, Client, InvalidRequest, TokenLogprob, TooLong
from serving.engine.gemma import Gemma
from serving.engine.logprobs import token_logprobs
from serving.engine.sampling import Sampler
from serving.openai_api import ApiError, ChatCompletion, Completion, TextCompletion
from serving.openai_responses import ModelResponse
from serving.protocol import Delta, Done, Failed, RequestError, read_generate, read_sampling

PROMPT = "No cap, that fit is bussin"
DRAWN: dict[str, Any] = {"temperature": 1, "seed": 3, "max_tokens": 12}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_gemma("gemma3_text", torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine_of(base: Path) -> Callable[[], Engine]:
    model = Gemma(base, torch.float32, "cpu", 64)
    return lambda: Engine(base, model)


@pytest.mark.parametrize(
    "sampling",
    [{}, {**DRAWN, "repetition_penalty": 1.5, "logit_bias": {"7": 9}}, {"structured_outputs": {"regex": "[a-z ]{9}"}}],
)
def test_logprobs_are_those_of_the_model_itself(
    engine_of: Callable[[], Engine], base: Path, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, chosen = engine_of(), list[int]()
    accept = Sampler.accept
    monkeypatch.setattr(Sampler, "accept", lambda self, token: (chosen.append(token), accept(self, token))[1])
    plain = engine.ask(PROMPT, **sampling)
    assert plain.logprobs is None
    chosen.clear()
    number = engine.submit(PROMPT, stream=True, logprobs=3, **sampling)
    engine.run()
    messages = engine.sent[number]
    assert "".join(one.text for one in messages if isinstance(one, Delta | Done)) == plain.text
    found = [token for one in messages if isinstance(one, Delta | Done) for token in one.logprobs or ()]
    assert [next(iter(token)) for token in found] == chosen and len(found) == plain.output_tokens

    prompt = engine.tokenizer.encode(PROMPT).ids
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        expected = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for place, (tokens, token) in enumerate(zip(found, chosen, strict=True)):
        likeliest = expected[place].topk(3).indices.tolist()
        assert set(tokens) == {token, *likeliest}
        for one, about in tokens.items():
            assert about["logprob"] == pytest.approx(float(expected[place, one]), abs=1e-4)
            assert about["rank"] == int((expected[place] > expected[place, one]).sum()) + 1
            assert about["decoded_token"] == engine.tokenizer.decode([one], skip_special_tokens=False)


def test_text_and_its_logprobs_come_together(engine_of: Callable[[], Engine]) -> None:
    """What is held back, since it may begin a stop string, comes with the text that follows."""
    engine = engine_of()
    text = engine.ask(PROMPT, **DRAWN).text
    number = engine.submit(PROMPT, stream=True, logprobs=0, stop=[text[2:6] + "\N{SNOWMAN}"], **DRAWN)
    engine.run()
    told = 0
    for one in engine.sent[number]:
        assert isinstance(one, Delta | Done) and one.logprobs is not None
        told += len(one.logprobs)
        assert told == (one.tokens if isinstance(one, Delta) else one.output_tokens)
        assert all(len(tokens) == 1 for tokens in one.logprobs)


def test_a_token_that_is_a_byte_has_its_byte() -> None:
    class Bytes:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return "\N{REPLACEMENT CHARACTER}"

        def id_to_token(self, token: int) -> str:
            return f"<0x{0xE0 + token:02X}>"

    found = token_logprobs(Bytes(), np.array([0, 1, 2], np.float32), 0, 1)
    assert found[0]["bytes"] == [0xE0] and found[2]["bytes"] == [0xE2] and list(found) == [0, 2]
    assert math.exp(found[2]["logprob"]) == pytest.approx(math.e**2 / (1 + math.e + math.e**2))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["a"], "not of tokens"),
        ([1, -1], "not of tokens"),
        ([True], "not of tokens"),
        ([], "the prompt is empty"),
        (5, "neither a text nor a list of tokens"),
    ],
)
def test_a_prompt_that_is_no_list_of_tokens_is_refused(prompt: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_generate({"id": 1, "prompt": prompt})


def test_tokens_of_a_prompt_that_the_model_does_not_have_are_refused(engine_of: Callable[[], Engine]) -> None:
    engine = engine_of()
    monkey = Tokenizer.from_str(engine.tokenizer.to_str())
    engine.tokenizer = monkey
    number = len(engine.sent)
    vocabulary = engine.scheduler.model.config.vocabulary
    monkey.add_tokens([f"<extra{n}>" for n in range(3)])
    engine.submit("<extra2>")
    failed = engine.sent[number][-1]
    assert isinstance(failed, Failed) and failed.error.endswith(f"this model's are below {vocabulary}")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": [[1], [2]], "echo": True}, "echo: only a prompt that is a text"),
        ({"prompt": "Hi", "echo": True, "logprobs": 1}, "echo: not together with logprobs"),
        ({"prompt": "Hi", "logprobs": 21}, "logprobs: .* less than or equal to 20"),
    ],
)
def test_what_is_no_prompt_and_what_does_not_go_together_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError, match=words):
        TextCompletion.read(json.dumps({"model": "gemma", **fields}).encode())


@pytest.mark.parametrize("wrong", [[], {}])
@pytest.mark.parametrize(
    "name",
    ["truncate_prompt_tokens", "include_stop_str_in_output", "skip_special_tokens", "stop_token_ids", "logit_bias"],
)
def test_an_empty_list_or_object_is_none_only_of_what_may_be_one(name: str, wrong: Any) -> None:
    sampling = TextCompletion.read(json.dumps({"model": "gemma", "prompt": "Hi", name: wrong}).encode()).sampling
    if (name, wrong) in [("stop_token_ids", []), ("logit_bias", {})]:
        assert sampling == {}
    else:
        with pytest.raises(RequestError, match=f"^{name} is n"):
            read_sampling(sampling)


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (TextCompletion, {"prompt": [9]}, "prompt"),
        (ChatCompletion, {"messages": []}, "messages"),
        (ModelResponse, {"input": "Hi"}, "input"),
    ],
)
def test_what_is_said_of_the_prompt_names_the_parameter_it_came_from(
    kind: type[Completion], fields: dict[str, Any], param: str
) -> None:
    form = kind.read(json.dumps({"model": "gemma", **fields}).encode())
    for error in (InvalidRequest("the prompt has the token 9"), TooLong("the prompt has 9 tokens and max_tokens is 9")):
        assert form.named_as_sent(ApiError.of(error)).param == param


def test_offsets_count_a_character_in_bytes_once() -> None:
    text = "né \N{MELTING FACE}\N{ROBOT FACE}!"
    one_by_one = [bytes([byte]) for byte in text[3:5].encode()]
    pieces = [("né", text[:2].encode()), (" ", b" "), *(("\ufffd", byte) for byte in one_by_one), ("!", b"!")]
    tokens = [[TokenLogprob(number, said, -1.0, 1, byte)] for number, (said, byte) in enumerate(pieces)]
    form = TextCompletion.read(b'{"model": "gemma", "prompt": "Hi", "logprobs": 0}')
    answer = Answer(text, "stop", 2, len(tokens), logprobs=tokens)
    whole = form.logprobs_of(0, answer, 0, len(tokens))
    last = form.logprobs_of(0, answer, len(tokens) - 1, len(tokens))
    assert whole and last and whole["text_offset"] == [0, 2, 3, 4, 4, 4, 4, 5, 5, 5, 5]
    assert last["text_offset"] == [text.index("!")]


def test_lists_are_one_prompt_or_several() -> None:
    def prompts(value: Any) -> list[Any]:
        return TextCompletion.read(json.dumps({"model": "gemma", "prompt": value}).encode()).prompts()

    assert prompts([1, 2]) == [[1, 2]] and prompts([[1, 2], [3], "x"]) == [[1, 2], [3], "x"]


# --- over every protocol ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stack(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if not SERVING_PYTHON.exists():
        pytest.skip("needs the serving environment: make serve-env")
    with serve_tiny(tiny_base, tmp_path_factory.mktemp("tokens")) as running:
        yield running


@pytest.fixture
def api(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.gateway}/v1", api_key="-", max_retries=2)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_base / "tokenizer.json"))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_nvidias_outputs_hold_them(stack: Stack, protocol: str) -> None:
    server, returns = Server(stack.http, stack.grpc), {"return_logprobs": True, "return_cumulative_logprob": True}
    sampling = {**GREEDY, "logprobs": 2, "lora_name": "slang"}
    (whole,) = server.ask(protocol, "Hi", sampling, exclude_input_in_output=True, **returns)
    tokens = json.loads(whole["logprobs"])
    assert len(tokens) == GREEDY["max_tokens"] and all(len(one) == 2 for one in tokens)  # greedy: chosen is likeliest
    assert whole["text_output"] == "".join(next(iter(one.values()))["decoded_token"] for one in tokens)
    total = sum(next(iter(one.values()))["logprob"] for one in tokens)
    assert whole["cumulative_logprob"] == pytest.approx(total, rel=1e-5)
    parts = server.ask(protocol, "Hi", sampling, stream=True, **returns)
    assert [one for part in parts for one in json.loads(part["logprobs"])] == tokens and len(parts) > 2
    assert parts[-1]["cumulative_logprob"] == pytest.approx(total, rel=1e-5)
    (without,) = server.ask(protocol, "Hi", GREEDY, return_logprobs=True)
    assert json.loads(without["logprobs"]) is None
    (summed,) = server.ask(protocol, "Hi", {**GREEDY, "lora_name": "slang"}, return_cumulative_logprob=True)
    assert summed["cumulative_logprob"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_client_has_them(stack: Stack, tokenizer: Tokenizer, scheme: str) -> None:
    with Client(stack.http if scheme == "http" else stack.grpc) as client:
        answer = client.generate("Hi", "slang", logprobs=2, **GREEDY)
        assert len(answer.logprobs) == answer.output_tokens
        assert "".join(chosen.token for chosen, *_ in answer.logprobs) == answer.text
        for chosen, second in answer.logprobs:
            assert (chosen.rank, second.rank) == (1, 2) and 0 > chosen.logprob >= second.logprob
            assert tokenizer.decode([chosen.id]) == chosen.token
        assert client.generate("Hi", "slang", **GREEDY).logprobs == []
        stream = client.stream("Hi", "slang", logprobs=2, **GREEDY)
        assert "".join(stream) == answer.text and stream.answer.logprobs == answer.logprobs
        assert client.generate(tokenizer.encode("Hi").ids, "slang", **GREEDY).text == answer.text
        with pytest.raises(InvalidRequest, match="the prompt has the token 99999; this model's are below"):
            client.generate([2, 99_999], **GREEDY)
        with pytest.raises(InvalidRequest, match="neither a text nor a list of tokens"):
            client.generate([2, -1], **GREEDY)
        with pytest.raises(InvalidRequest, match="logprobs is 21; it is from 0 to 20"):
            client.generate("Hi", logprobs=21, **GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_chat_completions_have_them_whole_and_in_a_stream(api: openai.OpenAI, n: int) -> None:
    asked: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "Hi!"}], "n": n, **DRAWN}
    whole = api.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    streamed: dict[int, list[Any]] = {number: [] for number in range(n)}
    texts = dict.fromkeys(range(n), "")
    for chunk in api.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            streamed[choice.index] += choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
    for choice in whole.choices:
        assert choice.logprobs and choice.logprobs.content
        content = choice.logprobs.content
        assert streamed[choice.index] == content and texts[choice.index] == choice.message.content
        assert len(content) == DRAWN["max_tokens"]
        for token in content:
            assert len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob >= max(token.logprob, token.top_logprobs[1].logprob)
    assert api.chat.completions.create(**asked).choices[0].logprobs is None


@pytest.mark.slow
def test_completions_have_them_in_the_older_form(api: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "slang", "prompt": "Once upon", "logprobs": 2, **DRAWN}
    whole = api.completions.create(**asked).choices[0]
    found = whole.logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert len(found.tokens) == DRAWN["max_tokens"]
    assert found.text_offset == [len("".join(found.tokens[:at])) for at in range(len(found.tokens))]
    for token, logprob, likeliest in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert likeliest[token] == logprob and 1 <= len(likeliest) <= 3
    parts = [chunk.choices[0].logprobs for chunk in api.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts if part for one in getattr(part, name)] == getattr(found, name)


@pytest.mark.slow
def test_prompts_are_tokens_or_are_cut_to_their_end(api: openai.OpenAI, stack: Stack, tokenizer: Tokenizer) -> None:
    def ask(prompt: Any, **others: Any) -> tuple[list[str], int]:
        answer = api.completions.create(model="slang", prompt=prompt, **GREEDY, extra_body=others)
        assert answer.usage
        return [choice.text for choice in answer.choices], answer.usage.prompt_tokens

    text = "Once upon a time, on a bus that never came, somebody said: no cap."
    tokens = tokenizer.encode(text).ids
    bos = tokens[0]
    assert bos == tokenizer.token_to_id("<bos>")
    assert ask(tokens) == ask(text) and ask([tokens, text]) == (ask(text)[0] * 2, 2 * len(tokens))
    cut = ask([bos, *tokens[-6:]])
    assert ask(text, truncate_prompt_tokens=7) == cut != ask(text)  # <bos> stays
    assert ask(tokens, truncate_prompt_tokens=7) == ask(tokens[-7:]) != cut
    assert ask(text, truncate_prompt_tokens=1000) == ask(text)
    long = text * 600  # more than the window holds
    with pytest.raises(openai.BadRequestError, match="together they may be at most"):
        ask(long)
    assert ask(long, truncate_prompt_tokens=-1)[1] > 16_000
    with pytest.raises(openai.BadRequestError, match="truncate_prompt_tokens is 0"):
        ask(text, truncate_prompt_tokens=0)
    two = httpx.post(
        f"{stack.http}/v2/models/gemma/generate", json={"text_input": "a", "prompt_token_ids": [2]}, timeout=PATIENCE
    )
    assert two.status_code == 400 and "are two prompts; leave one empty" in two.json()["error"]


@pytest.mark.slow
def test_an_answer_cannot_begin_with_a_prompt_of_tokens(stack: Stack) -> None:
    with pytest.raises(Refused, match="begins with its prompt only where that is a text"):
        Server(stack.http, stack.grpc).ask("grpc", "", GREEDY, prompt_token_ids=np.array([2, 5], np.int32))
