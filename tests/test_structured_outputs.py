"""Structured answers: what a random model says under a mask matches, by judges that know nothing of the masks."""

import fcntl
import json
import os
import re
import signal
import termios
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import openai
import psutil
import pytest
import torch
from conftest import PATIENCE, tiny_gemma, until
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field
from test_engine import Engine, Line, write_adapter
from tiny_serving import Stack, serve_tiny
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer
from vllm_contract import Server

from serving.client import BASE, Client, InvalidRequest
from serving.client.adapter import PreparedRequest
from serving.client.async_client import _sampling_json
from serving.engine import grammar_check, sampling
from serving.engine.connections import Connections, Inbox
from serving.engine.gemma import Gemma
from serving.engine.grammar import Constraint, GrammarCompiler, token_bytes
from serving.engine.sampling import Sampler
from serving.openai_api import ApiError, ChatCompletion
from serving.protocol import LENGTH, STOP, UNAVAILABLE, Failed
from serving.sampling_parameters import RequestError, StructuredOutputs, read_sampling

TEXT = {"type": "string", "maxLength": 6}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"slang": TEXT, "uses": {"type": "integer"}, "new": {"type": "boolean"}},
        "required": ["slang", "uses"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    "enum": {"enum": ["no cap", "über", "😀", 7, None, {"a": [1]}]},
    "numbers": {
        "type": "array",
        "prefixItems": [{"type": "integer", "minimum": -3, "maximum": 12}, {"type": "number", "exclusiveMinimum": 0}],
        "items": False,
        "minItems": 2,
    },
    "nested": {
        "type": "object",
        "properties": {
            "a": {
                "type": "object",
                "properties": {"b": {"type": "array", "items": TEXT, "maxItems": 2}},
                "additionalProperties": False,
            }
        },
        "required": ["a"],
        "additionalProperties": False,
    },
    "anyOf": {"anyOf": [{"type": "null"}, TEXT, {"type": "array", "items": {"const": "x"}, "maxItems": 3}]},
    "$ref": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "name": TEXT,
                    "parts": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                },
                "required": ["name"],
                "additionalProperties": False,
            }
        },
    },
    "unicode": {"type": "object", "properties": {"größe 😀": {"type": "string", "pattern": "^[你好é]{1,3}$"}}}
    | {"additionalProperties": False},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{2,5}(-[0-9]+)?$"},
}
BALANCED = {"Lark": 'start: "(" start ")" | /[xé]/', "GBNF": 'root ::= "(" root ")" | [xé]'}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Gemma with a tokenizer of Gemma's kind, and an adapter."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_gemma("gemma3_text", torch.bfloat16, vocab_size=len(tokenizer) + 5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_adapter(folder, folder / "adapters/mine", 0, r=2, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture(scope="module")
def engine_of(base: Path) -> Callable[[], Engine]:
    model = Gemma(base, torch.float32, "cpu", 512)
    return lambda: Engine(base, model, 512)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer.from_file(str(base / "tokenizer.json"))


def answers(engine: Engine, count: int, **wanted: Any) -> list[str]:
    """What `count` requests in one batch are answered, with and without the adapter, with and without streaming."""
    common = {"temperature": 1.0, "max_tokens": 400, "structured_outputs": wanted}
    numbers = [
        engine.submit("Hi", "mine" if seed % 2 else None, stream=seed % 4 > 1, seed=seed, **common)
        for seed in range(count)
    ]
    engine.run()
    texts = []
    for number in numbers:
        assert engine.answer(number).finish_reason == STOP
        texts.append("".join(one.text for one in engine.sent[number] if not isinstance(one, Failed)))
    return texts


@pytest.mark.parametrize("kind", SCHEMAS)
def test_answers_are_valid_for_their_schema(kind: str, engine_of: Callable[[], Engine]) -> None:
    judge = Draft202012Validator(SCHEMAS[kind])
    texts = answers(engine_of(), 6, json=SCHEMAS[kind])
    for text in texts:
        judge.validate(json.loads(text))
    assert len(set(texts)) > 1


def test_any_json_object(engine_of: Callable[[], Engine]) -> None:
    engine = engine_of()
    numbers = [
        engine.submit("Hi", temperature=1, seed=seed, max_tokens=300, structured_outputs={"json_object": True})
        for seed in range(8)
    ]
    engine.run()
    ended = [done.text for number in numbers if (done := engine.answer(number)).finish_reason == STOP]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{4}-(0[1-9]|1[0-2])", r"(ja|nein), (😀|é){1,3}!?", r"a/b\\c\"[^\x00-\x7f]{2}"]
)
def test_answers_match_their_expression(pattern: str, engine_of: Callable[[], Engine]) -> None:
    for text in answers(engine_of(), 6, regex=pattern):
        assert re.fullmatch(pattern, text), text


def test_answers_are_one_of_the_choices(engine_of: Callable[[], Engine]) -> None:
    choices = ["red", "redder", " two  words ", 'a"b\\c\n/{}', "über 😀", "</s>", "<eos>", "DEL: \x7f"]
    texts = answers(engine_of(), 24, choice=choices)
    assert set(texts) <= set(choices) and len(set(texts)) > 2


@pytest.mark.parametrize("notation", BALANCED)
def test_answers_are_of_the_grammar(notation: str, engine_of: Callable[[], Engine]) -> None:
    texts = answers(engine_of(), 6, grammar=BALANCED[notation])
    for text in texts:
        opened = text.count("(")
        assert re.fullmatch(rf"[(]{{{opened}}}[xé][)]{{{opened}}}", text), text
    assert len(set(texts)) > 1


def test_the_two_ways_to_apply_a_mask_choose_alike(
    engine_of: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for few in (0, 1 << 20):  # never, and always, by picking out the tokens that it has
        monkeypatch.setattr(sampling, "FEW", few)
        texts.append(answers(engine_of(), 6, json=SCHEMAS["object"]))
        greedy = {"temperature": 0, "max_tokens": 40, "structured_outputs": {"json": SCHEMAS["object"]}}
        texts[-1] += [engine_of().ask("Hi", **one).text for one in (greedy, greedy | {"ignore_eos": True})]
    assert texts[0] == texts[1]


# --- masks -----------------------------------------------------------------------------------------------------------
def test_tokens_have_the_bytes_that_the_tokenizer_decodes_them_to(tokenizer: Tokenizer) -> None:
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    start = tokenizer.encode("x", add_special_tokens=False).ids[0]
    for name, number in tokenizer.get_vocab().items():
        if number not in special:
            decoded = tokenizer.decode([start, number])[1:].encode()
            assert token_bytes(name).decode(errors="replace").encode() == decoded, name


def allowed(constraint: Constraint) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(constraint.mask(), bitorder="little")).tolist())


def test_a_mask_has_what_can_be_completed_and_ends_where_the_answer_may(tokenizer: Tokenizer) -> None:
    """Against all tokens tried one by one, on every way through a small language."""
    language = [one.encode() for one in ("the", "the train", "this", "then 你", "then 你好")]
    eos = (1, 5)
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    texts = {number: token_bytes(name) for name, number in tokenizer.get_vocab().items() if number not in special}
    compiler = GrammarCompiler(tokenizer, eos)
    wanted = StructuredOutputs(choice=tuple(one.decode() for one in language))

    def walk(tokens: list[int], said: bytes) -> int:
        constraint = compiler.compile(wanted)
        for token in tokens:
            constraint.accept(token)
        assert constraint.is_complete == (not any(one != said and one.startswith(said) for one in language))
        going_on = {n for n, text in texts.items() if any(one.startswith(said + text) for one in language)}
        assert allowed(constraint) == going_on | (set(eos) if said in language else set())
        return 1 + sum(walk([*tokens, token], said + texts[token]) for token in going_on if len(tokens) < 3)

    assert walk([], b"") > 30


def test_the_most_likely_of_the_allowed_tokens_is_chosen(tokenizer: Tokenizer) -> None:
    compiler, dice = GrammarCompiler(tokenizer, (1,)), np.random.default_rng(0)
    for pattern in ("[0-9]{20}", r"[^\n]{20,}", "(the train|x)*"):
        sampling, _ = read_sampling({"temperature": 0, "structured_outputs": {"regex": pattern}})
        assert sampling.structured_outputs
        one = Sampler(sampling, [], (1,), compiler.compile(sampling.structured_outputs))
        while one.chosen < 12 and one.constraint and not one.constraint.is_complete:
            logits = dice.standard_normal(tokenizer.get_vocab_size()).astype(np.float32)
            token = one.choose(int(logits.argmax()), logits.copy())
            assert token == max(allowed(one.constraint), key=logits.__getitem__)
            one.accept(token)
        assert one.chosen


def test_neither_side_of_a_batch_changes_the_other(engine_of: Callable[[], Engine]) -> None:
    plain = [
        {"temperature": 0},
        {"temperature": 1, "seed": 1},
        {"temperature": 1, "seed": 2, "repetition_penalty": 1.3},
    ]
    bound = [{**one, "structured_outputs": {"json": SCHEMAS["object"]}, "max_tokens": 60} for one in plain]
    prompt = "The rain had stopped by the time the train left the station"
    alone = [engine_of().ask(prompt, "mine", **one).text for one in (*plain, *bound)]
    engine = engine_of()  # whose later requests share the blocks of the first one's prompt
    numbers = [engine.submit(prompt, "mine", **one) for one in (*plain, *bound)]
    engine.run()
    assert [engine.answer(number).text for number in numbers] == alone
    assert [engine.ask(prompt, "mine", **one).text for one in (*plain, *bound)] == alone
    assert engine.scheduler.counts["cached_tokens"]


def test_the_reason_of_an_end_is_right(engine_of: Callable[[], Engine]) -> None:
    engine = engine_of()

    def ask(**sampling: Any) -> tuple[str, str]:
        done = engine.ask("Hi", **sampling)
        return done.text, done.finish_reason

    one = {"structured_outputs": {"choice": ["the train"]}}
    assert ask(**one) == ("the train", STOP)
    assert (
        ask(**one, min_tokens=12) == ask(**one, ignore_eos=True) == ("the train", STOP)
    )  # there is nothing more to say
    text, reason = ask(**one, max_tokens=1)
    assert "the train".startswith(text) and text != "the train" and reason == LENGTH
    assert ask(**one, stop="tr") == ("the ", STOP)
    digits = {"structured_outputs": {"regex": "[0-9]*"}, "temperature": 1, "max_tokens": 40}
    short = [ask(**digits, seed=seed) for seed in range(20)]
    assert {reason for _, reason in short} == {STOP} or any(len(text) < 30 for text, _ in short)
    for seed in range(5):
        assert ask(**digits, seed=seed, min_tokens=30)[0] >= "0" * 30
        assert len(ask(**digits, seed=seed, ignore_eos=True)[0]) == 40


# --- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("[1]", "structured_outputs is not an object"),
        ("{", "structured_outputs is not JSON"),
        ({}, "structured_outputs has nothing; give one of json, json_object, regex, choice, grammar"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs has regex, choice; give one of"),
        ({"structural_tag": "x"}, "structured_outputs.structural_tag is not supported"),
        ({"json": 3}, "structured_outputs.json is not an object: 3"),
        ({"choice": []}, "structured_outputs.choice is not a list of texts"),
        ({"regex": ""}, "structured_outputs.regex is not a text, or is empty"),
        ({"regex": "\ud800"}, "structured_outputs.regex cannot be written as JSON"),
        ({"regex": "a" * 70_000}, "structured_outputs.regex has 70,002 bytes, more than 65,536"),
        ({"json": json.loads('{"items": ' * 900 + "1" + "}" * 900)}, "structured_outputs.json is nested more than 100"),
        ({"json": {"minimum": float("inf")}}, "structured_outputs.json cannot be written as JSON"),
    ],
)
def test_what_is_no_structure_is_refused_where_it_is_read(given: Any, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        read_sampling({"structured_outputs": given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"json": {"type": "objet"}}, "structured_outputs.json: Invalid type: objet"),
        (
            {"json": {"type": "object", "properties": {"a/b": {"items": {"type": "array", "uniqueItems": True}}}}},
            'structured_outputs.json at /properties/a~1b/items: not supported: ["uniqueItems"]',
        ),
        ({"json": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/no"}]}}, "at /anyOf/1: Pointer '/$defs/no' does not"),
        ({"json": {"type": "array", "minItems": 5, "maxItems": 2}}, "minItems (5) is greater than maxItems (2)"),
        ({"regex": "[a-"}, 'structured_outputs.regex: invalid regex "[a-" (in regex): regex parse error'),
        ({"regex": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"grammar": "start: word"}, 'structured_outputs.grammar: at 1(8): unknown name: "word"'),
        ({"grammar": "start: <[99999]>"}, "structured_outputs.grammar: at 1(8): Token range end too large: 99999"),
        ({"grammar": 'root ::= "a" | word'}, "structured_outputs.grammar: Rule 'word' not found"),
    ],
)
def test_a_wrong_schema_is_refused_with_what_is_wrong_and_where(
    given: dict[str, Any], words: str, tokenizer: Tokenizer
) -> None:
    sampling, _ = read_sampling({"structured_outputs": given})
    assert sampling.structured_outputs
    with pytest.raises(RequestError, match=f"{re.escape(words)}[^\n]*$"):
        GrammarCompiler(tokenizer, (1,)).compile(sampling.structured_outputs)


@pytest.mark.slow
def test_a_schema_that_would_be_compiled_for_hours_is_refused(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, (1,))
    parts = [{"properties": {f"k{n % 7}": {"type": "string", "pattern": f"a.*{n}"}}} for n in range(400)]
    with pytest.raises(RequestError, match="takes too long to compile, or too much memory"):
        compiler.compile(StructuredOutputs(json={"allOf": parts}))
    assert compiler.compile(StructuredOutputs(choice=("a",)))  # the next one is compiled


def test_the_checking_process_is_of_the_engines_session_and_outlives_ctrl_c(tokenizer: Tokenizer) -> None:
    compiler, wanted = GrammarCompiler(tokenizer, (1,)), StructuredOutputs(choice=("a",))
    others = {*psutil.Process().children()}
    compiler.compile(wanted)
    assert compiler._checker._process
    (checker,) = {*psutil.Process().children()} - others
    assert os.getsid(checker.pid) == os.getsid(0)  # the supervisor kills and reaps what is of the engine's session
    checker.send_signal(signal.SIGINT)
    assert compiler.compile(wanted) and checker.is_running() and checker.status() != psutil.STATUS_ZOMBIE
    checker.suspend()
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(compiler.compile, wanted)
        unread, asked = array("i", [0]), compiler._checker._process.stdin
        until(lambda: fcntl.ioctl(asked, termios.FIONREAD, unread) == 0 and unread[0])
        checker.kill()  # by somebody who needs the memory
        with pytest.raises(RequestError, match="was ended; ask again") as ended:
            compiling.result()
    assert ended.value.code == UNAVAILABLE and compiler.compile(wanted)


def test_a_grammar_that_costs_too_much_fails_alone(
    engine_of: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    plain = engine.ask("Hi").text
    monkeypatch.setattr(grammar_check, "LIMITS", grammar_check.LLParserLimits(step_max_items=100, verbose_errors=False))
    hard = engine.submit("Hi", structured_outputs={"grammar": 'start: s\ns: s s | s s s | "a"'}, max_tokens=100)
    beside = engine.submit("Hi")
    engine.run()
    failed = engine.sent[hard][-1]
    assert isinstance(failed, Failed) and failed.code == "invalid"
    assert failed.error.startswith("structured_outputs.grammar is too complex")
    assert engine.answer(beside).text == plain and not engine.scheduler.pool.in_use


@pytest.mark.parametrize("given", [{"regex": "[a&&b]"}, {"json": {"$ref": "#"}}, {"grammar": "start: start"}])
def test_what_no_text_matches_is_told(given: dict[str, Any], engine_of: Callable[[], Engine]) -> None:
    engine = engine_of()
    number = engine.submit("Hi", structured_outputs=given)
    engine.run()
    failed = engine.sent[number][-1]
    assert isinstance(failed, Failed) and "no text matches it" in failed.error and failed.code == "invalid"


def test_nothing_is_compiled_for_a_client_that_has_left(
    engine_of: Callable[[], Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, may_compile, compiled = Inbox(), threading.Event(), list[str | None]()
    connections = Connections(tmp_path / "socket", engine_of().scheduler, inbox, dict)
    compile_grammar = connections.grammars.compile

    def slowly(wanted: StructuredOutputs) -> Constraint:
        compiled.append(wanted.regex)
        assert may_compile.wait(PATIENCE)
        return compile_grammar(wanted)

    monkeypatch.setattr(connections.grammars, "compile", slowly)
    line = Line(tmp_path / "socket")
    for number, regex in enumerate(["a", "b", "[a-"]):  # the last would be refused
        sampling = {"max_tokens": 4, "structured_outputs": {"regex": regex}}
        line.say({"op": "generate", "id": number, "prompt": "Hi", "sampling": sampling})
    until(lambda: compiled == ["a"])
    for number in (1, 2):
        line.say({"op": "cancel", "id": number})
        inbox.get(timeout=PATIENCE)()
    may_compile.set()
    for _ in range(3):
        inbox.get(timeout=PATIENCE)()
    connections.flush()
    assert [line.hear("done")["finish_reason"] for _ in range(2)] == ["cancelled"] * 2
    assert compiled == ["a"] and len(connections.scheduler.waiting) == 1
    line.close()


# --- through Triton ---------------------------------------------------------------------------------------------------
class Term(BaseModel):
    """A term of slang."""

    slang: Annotated[str, Field(max_length=8)]
    kind: Literal["verb", "noun"]
    score: Annotated[int, Field(ge=0, le=9)] | None


@pytest.fixture(scope="module")
def stack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serve_tiny(base, tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.mark.slow
def test_structured_answers_through_triton_and_the_gateway(stack: Stack) -> None:
    api = openai.OpenAI(base_url=f"{stack.gateway}/v1", api_key="-", max_retries=2)
    asked: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400}
    parsed = api.chat.completions.parse(**asked, response_format=Term).choices[0]
    assert isinstance(parsed.message.parsed, Term) and parsed.finish_reason == "stop"
    with api.chat.completions.stream(**asked, response_format=Term, seed=1) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Term)
    # what LangChain's with_structured_output sends, and the other ways
    schema = {"name": "any", "strict": True, "schema": SCHEMAS["anyOf"]}
    said = api.chat.completions.create(**asked, response_format={"type": "json_schema", "json_schema": schema})
    Draft202012Validator(SCHEMAS["anyOf"]).validate(json.loads(said.choices[0].message.content or ""))
    # "{" alone: nothing in this vocabulary begins and ends an object
    cut = api.chat.completions.create(**{**asked, "max_tokens": 1}, response_format={"type": "json_object"})
    assert cut.choices[0].finish_reason == "length"
    wanted = {"structured_outputs": {"choice": ["yes", "no 😀"]}}
    assert api.completions.create(model="gemma", prompt="Hi", extra_body=wanted).choices[0].text in ("yes", "no 😀")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"items": {"not": {}}}}}
    words = r'response_format.json_schema.schema at /items: not supported: \["not"\]'
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        api.chat.completions.create(**asked, response_format=bad)  # type: ignore[call-overload]
    assert refused.value.param == "response_format"
    with Client(stack.grpc) as client:
        for given in ({"regex": "[a-c]{3}"}, '{"regex": "[a-c]{3}"}'):
            assert re.fullmatch("[a-c]{3}", client.generate("Hi", "slang", structured_outputs=given).text)
    server = Server(stack.http, stack.grpc)
    for protocol in ("http", "grpc"):
        sampling = {"structured_outputs": {"json": SCHEMAS["numbers"]}, "max_tokens": 200, "temperature": 1}
        pieces = server.ask(protocol, "Hi", sampling, stream=True)
        Draft202012Validator(SCHEMAS["numbers"]).validate(json.loads("".join(one["text_output"] for one in pieces)))


# --- OpenAI's parameters ---------------------------------------------------------------------------------------------
def read(**others: Any) -> ChatCompletion:
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], **others}
    return ChatCompletion.read(json.dumps(body).encode())


def test_both_dialects_become_one_sampling_parameter() -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert read(response_format=wanted).sampling == {"structured_outputs": {"json": schema}}
    assert read(response_format={"type": "json_object"}).sampling == {"structured_outputs": {"json_object": True}}
    assert read(structured_outputs={"choice": ["a"]}).sampling == {"structured_outputs": {"choice": ["a"]}}
    assert read(response_format={"type": "text", "json_schema": None}, structured_outputs=None).sampling == {}
    assert read(structured_outputs={}).sampling == {"structured_outputs": {}}  # which is refused


def test_errors_name_the_parameters_that_were_sent() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}

    def shown(message: str, **sent: Any) -> tuple[str, str | None]:
        error = read(**sent).named_as_sent(ApiError.of(InvalidRequest(message)))
        return error.message, error.param

    wrong = "structured_outputs.json at /a: no"
    assert shown(wrong, structured_outputs={"json": {}}) == (wrong, "structured_outputs")
    assert shown(wrong, structured_outputs={"json": {}}, response_format={"type": "text"})[0] == wrong
    said = "response_format.json_schema.schema at /a: no"
    assert shown(wrong, response_format=schema) == (said, "response_format")
    assert shown("max_tokens is 0", max_completion_tokens=0) == ("max_completion_tokens is 0", "max_completion_tokens")
    assert shown("max_tokens is 0", max_tokens=0) == ("max_tokens is 0", "max_tokens")


def test_the_client_sends_what_nvidias_vllm_backend_reads() -> None:
    """Its `from_dict` calls json.loads on the value, and wants a dict of the schema in there."""
    sent = _sampling_json(PreparedRequest("Hi", {"structured_outputs": {"json": SCHEMAS["array"]}}, BASE.prompt))
    assert json.loads(json.loads(sent)["structured_outputs"]) == {"json": SCHEMAS["array"]}
    assert read_sampling(sent)[0].structured_outputs == StructuredOutputs(json=SCHEMAS["array"])


@pytest.mark.parametrize(
    ("others", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", '"type" is one of'),
        ({"response_format": {"type": "xml"}}, "response_format", '"type" is one of'),
        ({"response_format": {"type": "json_schema"}}, "response_format", "with a JSON Schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", '"schema" is not supported'),
        ({"structured_outputs": "x"}, "structured_outputs", "it is an object"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
            "not both",
        ),
        ({"guided_json": {}}, "guided_json", "not supported"),
    ],
)
def test_wrong_formats_are_refused_by_name(others: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as refused:
        read(**others)
    assert refused.value.status == 400 and refused.value.param == param
