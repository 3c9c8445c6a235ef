"""The thorough evaluation on a tiny run: what is asked, kept, measured, judged, compared, and refused."""

import html
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import exp, log
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny_gemma4 import tiny_gemma4, tiny_tokenizer4
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from commands import compare as compare_command
from commands import report as report_command
from commands.train import main as train
from core.artifacts import Evaluation, Generation, Measurement, MetricResult, Metrics
from core.configuration import load_config, plain
from core.errors import UserError
from core.files import read_lines
from core.load_model import add_lora
from core.prompt import Prompt
from core.run_folder import Run
from core.tasks import having
from evaluation import compare_runs, few_rows, generations, judge, report
from evaluation.gate import NOT_BETTER, pass_gate, pass_scores
from evaluation.generations import generate
from evaluation.questions import check, held_out_questions, listed_questions
from evaluation.sampling import SampledToken, sample
from tasks.slang.novelty import FILE

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = Prompt(**plain(load_config(["task=slang"]).task.prompt))
ENDS = Prompt("Q: {instruction}\nA: {response}", "{ask}", "{say}")
TURNS = Prompt(load_config(["+prompt=gemma-turns"]).task.prompt.template, "{ask}", "{say}")


def words_for(source: Path, tiny_base: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"task.data.source={source}",
        f"model.path={tiny_base}",
        f"data_dir={folder}/data",
        f"runs_dir={folder}/runs",
        "task.train.epochs=2",
        "task.train.batch_size=16",
        "task.train.learning_rate=1e-2",
        "task.generate.max_new_tokens=8",
        "task.evaluate.questions=[{},{context: Rain},{context: Snow},{context: Fog},{context: Hail},{context: Wind}]",
        "task.evaluate.seeds=2",
        "task.evaluate.held_out=3",
        *more,
    ]


@pytest.fixture(scope="module")
def words(source: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What names a finished run, trained in this process."""
    words = words_for(source, tiny_base, tmp_path_factory.mktemp("evaluation"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: {})  # once is enough, and drawing takes longest
        assert train(words) == 0
    assert report_command.main(words) == 0
    return words


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: {})


@pytest.fixture
def finished(words: list[str]) -> Run:
    (folder,) = Path(load_config(words).runs_dir).glob("slang/*/")
    return Run.read(folder)


# --- sampling -------------------------------------------------------------------------------------------------


def test_who_else_is_in_a_batch_changes_nothing(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    sampling = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    texts = ["Slang", "A much longer text about the rain in the tents: 12345", "Slang", "At the beach"]
    together = sample(model, tokenizer, ENDS, texts, [0, 0, 1, 0], sampling)
    alone = [
        sample(model, tokenizer, ENDS, [text], [seed], sampling)[0]
        for text, seed in zip(texts, [0, 0, 1, 0], strict=True)
    ]
    assert together == alone
    assert together[0].text != together[2].text  # another seed


@pytest.mark.parametrize("adapted", [False, True])
def test_answers_are_those_of_transformers_itself(tiny_base: Path, adapted: bool) -> None:
    """However few rows are multiplied, and however many answers are made at once."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    if adapted:
        torch.manual_seed(0)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
        model = add_lora(model, settings).eval()
    texts, counted = ["Slang", "A longer text about the rain", "At the beach", "Rain"], list[int]()
    own = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        output = model.generate(input_ids=ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
        own.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    sampling = {"max_new_tokens": 12, "temperature": 0.0}
    together = sample(model, tokenizer, ENDS, texts, [0] * 4, sampling, counted.append)
    assert [answer.text for answer in together] == own
    assert set(counted) == {4} and sum(counted) <= 4 * 12, "one pass for a token of all answers"
    assert sample(model, tokenizer, ENDS, texts[:1], [0], sampling)[0].text == own[0]


@pytest.mark.parametrize("outputs", [96, few_rows.BLOCK + 64])
def test_products_of_few_rows_are_those_of_torch(outputs: int) -> None:
    layer = nn.Linear(64, outputs, bias=False)
    with torch.inference_mode(), few_rows.fast_for_few_rows(nn.Sequential(layer)):
        for shape in [(1, 1), (3, 1), (1, few_rows.FEW), (2, few_rows.FEW), (0, 1)]:
            x = torch.randn(*shape, 64)
            expected = x @ layer.weight.T
            assert layer(x).is_contiguous() and torch.allclose(layer(x), expected, atol=1e-6)
    assert "forward" not in vars(layer), "outside, it is as it was"
    with few_rows.fast_for_few_rows(nn.Linear(8, 8).bfloat16()) as nothing:
        assert nothing is None


def test_what_is_drawn_is_what_transformers_would_draw_from() -> None:
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 2
    wanted = scores
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)):
        wanted = warper(None, wanted)
    likely, draws = torch.softmax(wanted, -1)[0], 4000
    chosen = SampledToken([Random(n) for n in range(draws)], 0.7, 12, 0.8)(None, scores.expand(draws, -1)).argmax(-1)
    found = torch.bincount(chosen, minlength=50) / draws
    assert set(found.nonzero().flatten().tolist()) == set(likely.nonzero().flatten().tolist())
    assert (found - likely).abs().max() < 4 * (0.25 / draws) ** 0.5  # four standard deviations at most
    assert SampledToken([Random(0)], temperature=0.0)(None, scores).argmax() == scores.argmax()


def test_an_answer_says_whether_it_came_to_its_end(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def speak(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        """The first row ends at once, the second never."""
        logits[0, :, tokenizer.eos_token_id] = logits[1, :, 300] = 1e4
        return logits

    model.lm_head.register_forward_hook(speak)
    answers = sample(model, tokenizer, ENDS, ["a", "b"], [0, 0], {"max_new_tokens": 5})
    assert [answer.ended for answer in answers] == [True, False]
    assert answers[0].text == "" != answers[1].text


def test_a_gemma_4_ends_at_every_token_that_its_settings_name_and_its_thoughts_are_no_answer() -> None:
    model, tokenizer = tiny_gemma4("e2b"), tiny_tokenizer4()
    model.generation_config.eos_token_id = [1, 106, 50]
    prompt = Prompt("<|turn>user\n{instruction}<turn|>\n<|turn>model\n{response}<turn|>", "{ask}", "{say}")
    said = ["<|channel>thought\nrain\n<channel|>The train", "The", "train", "rain"]
    answers = [
        tokenizer(text + end, add_special_tokens=False).input_ids
        for text, end in zip(said, ["<turn|>", "<eos>", "<|tool_response>", "<|tool>" * 30], strict=True)
    ]
    place = iter(range(30))

    def speak(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        token = next(place)
        for row, answer in enumerate(answers):
            logits[row, :, answer[min(token, len(answer) - 1)]] = 1e4
        return logits

    model.lm_head.register_forward_hook(speak)
    found = sample(model, tokenizer, prompt, [prompt.wrap("a")] * 4, [0] * 4, {"max_new_tokens": 30})
    assert [one.text for one in found] == ["The train", "The", "train", "rain"]
    assert [one.ended for one in found] == [True, True, True, False]


# --- questions ------------------------------------------------------------------------------------------------


def test_a_question_is_a_text_or_fields_or_a_dialogue() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    text, defaults, fields = listed_questions(["Say it.", {}, {"context": "Rain."}], PROMPT)
    assert text.text_in == "Instruction:\nSay it.\n\nResponse:\n" and text.fields == {}
    assert defaults.asked == PROMPT.write_instruction() and defaults.fields["context"].startswith("You're hanging out")
    assert fields.asked == PROMPT.write_instruction(context="Rain.") and fields.id == "question 3"
    (dialogue,) = listed_questions([{"messages": messages}], TURNS)
    assert dialogue.text_in == TURNS.wrap_dialogue(messages)
    assert dialogue.asked == "user: Hi\nassistant: Hello!\nuser: Bye"


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ({"contxt": "Rain."}, "no field contxt. Known: condition, context, tag"),
        (7, "question 1: give a text"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "question 1 cannot be asked"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(question: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        listed_questions([question], PROMPT)


def test_held_out_rows_are_spread_and_asked_up_to_the_last_answer(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    rows = [{"input": f"ask {n}", "output": f"say {n}"} for n in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = held_out_questions(file, 4, ENDS)
    assert [(it.id, it.text_in, it.reference) for it in questions[:2]] == [
        ("row 1", "Q: ask 0\nA: ", "say 0"),
        ("row 3", "Q: ask 2\nA: ", "say 2"),
    ]
    assert [it.row for it in questions] == [1, 3, 6, 8] and len(held_out_questions(file, 99, ENDS)) == 10
    assert held_out_questions(file, 0, ENDS) == []
    turns = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("model", "b"), ("user", "c"), ("model", "d"))
    ]
    file.write_text(json.dumps({"messages": turns}))
    (question,) = held_out_questions(file, 1, TURNS)
    assert question.text_in == TURNS.wrap_dialogue(turns[:3]) and question.reference == "d"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("task.evaluate.seeds=0", "seeds must be 1 or more"),
        ("task.evaluate.held_out=-1", "held_out must be 0 or more"),
        ("task.evaluate.metrics=films", f"films is unknown. Known: {', '.join(having('metrics'))}, null"),
        ("task.evaluate.min_gain=5", "min_gain must be below 1, not 5"),
        ("task.evaluate.min_scores.new=0.5", "min_scores: there is no metric new. Known: .*, new_term, "),
        ("task.evaluate.min_scores.new_term=many", "min_scores.new_term"),
    ],
)
def test_a_wrong_setting_is_named(word: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(load_config([word]))


# --- a run ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_texts_are_asked_together_as_far_as_they_fit(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def sizes(lengths: list[int]) -> list[int]:
        due = [
            Generation(id=str(n), side="after", question="", asked="", text_in="a " * length, seed=0)
            for n, length in enumerate(lengths)
        ]
        return [len(batch) for batch in generations._batches(due, tokenizer, 10)]

    assert sizes([5] * 34) == [34] and sizes([]) == []
    assert sizes([5] * (generations.BATCH + 1)) == [generations.BATCH, 1]
    assert sizes([100_000, 5, 5]) == [2, 1], "a long text alone, the others first"


def test_both_models_are_asked_the_same_with_every_seed(finished: Run, words: list[str]) -> None:
    lines = read_lines(finished.folder / "generations.jsonl")
    questions = len(load_config(words).task.evaluate.questions)
    sides = {side: [line for line in lines if line["side"] == side] for side in ("before", "after")}
    keys = [[(line["question"], line["text_in"], line["seed"]) for line in sides[side]] for side in sides]
    assert keys[0] == keys[1] and len(set(keys[0])) == 2 * questions + 3
    assert [line["text"] for line in sides["before"]] != [line["text"] for line in sides["after"]]
    rows = [line for line in sides["after"] if "row" in line]
    held_out = (finished.data_folder() / "test.jsonl").read_text().splitlines()
    assert len(rows) == 3 and all(json.loads(held_out[line["row"] - 1])["output"] == line["reference"] for line in rows)


def test_a_stopped_call_goes_on_where_it_was(finished: Run, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config, file = load_config(words), finished.folder / "generations.jsonl"
    whole = file.read_text()
    lines = whole.split("\n")
    file.write_text("\n".join(lines[2:-2]) + "\n" + lines[0][:40])  # two answers are missing, one was cut by a kill
    asked = []
    monkeypatch.setattr("evaluation.sampling.sample", lambda *given: asked.extend(given[3]) or sample(*given))
    questions = listed_questions(plain(config.task.evaluate)["questions"], PROMPT)
    questions += held_out_questions(finished.data_folder() / "test.jsonl", 3, PROMPT)
    generate(finished, config, questions)
    assert len(asked) == 3 and file.read_text().count("\n") == len(lines) - 1
    assert {line["id"] for line in read_lines(file)} == {json.loads(line)["id"] for line in lines[:-1]}
    asked.clear()
    generate(finished, config, questions)
    assert not asked
    config = load_config([*words, "task.generate.temperature=0.1"])  # other answers
    generate(finished, config, questions[:1])
    assert len(asked) == 4
    file.write_text(whole)


def test_the_report_shows_what_was_measured(finished: Run) -> None:
    metrics = json.loads((finished.folder / "metrics.json").read_text())
    page = html.unescape((finished.folder / "report.html").read_text())
    names = [metric["name"] for metric in metrics["metrics"]]
    assert {"chrf", "rouge_l", "well_formed", "distinct_2", "copied_words", "new_term", "fits_scene"} <= set(names)
    assert all(metric["title"] in page and metric["explanation"][:30] in page for metric in metrics["metrics"])
    loss = metrics["held_out"]["loss"]["after"]
    assert loss[0] == pytest.approx(finished.evaluation.after.loss, abs=1e-3) and loss[1] < loss[0] < loss[2]
    assert "with other seeds" in page and "What changed, in metrics" in page and "<script" not in page
    assert not list(finished.folder.glob("*.partial"))


def test_similar_answers_have_their_differences_marked() -> None:
    _, marked = report._marked("the rain is <cold> today", "the rain is <warm> today")
    assert marked == "the rain is <mark>&lt;warm&gt;</mark> today"
    assert report._marked("a b", "c d") == ("a b", "c d")


def test_other_rows_than_the_run_s_are_refused(finished: Run, words: list[str], tmp_path: Path) -> None:
    manifest = finished.data_folder() / "manifest.json"
    kept = manifest.read_text()
    changed = json.loads(kept)
    changed["splits"]["test"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"does not hold the examples that .* as many, but not the same; .* make data"):
        report_command.main(words)
    changed["splits"]["training"]["rows"] += 5
    manifest.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"the run had [\d /]+ rows in its splits, and [\d /]+ are there"):
        report_command.main(words)
    with pytest.raises(UserError) as error:
        report_command.main([*words, "task.data.train_rows=7", "task.data.split.seed=3"])
    assert "the run had task.data.train_rows=null, which is 7 now" in str(error.value)
    assert "the run had task.data.split.seed=0, which is 3 now" in str(error.value)
    assert "ARGS='task.data.split.seed=0 task.data.train_rows=null'" in str(error.value)
    manifest.write_text(kept)


def test_a_run_of_another_task_is_named(finished: Run, words: list[str]) -> None:
    config = finished.folder / "config.yaml"
    kept = config.read_text()
    config.write_text(kept.replace("name: slang\n", "name: films\n", 1))
    with pytest.raises(UserError, match="is a run of films: make report TASK=films"):
        report_command.main([*words, f"+run={finished.folder}"])
    config.write_text(kept)


# --- the gate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "min_gain", "code"),
    [
        (15.0, None, 0),
        (15.0, 0.25, 0),
        (15.0, 0.26, NOT_BETTER),
        (21.0, 0.0, NOT_BETTER),
        (21.0, -0.1, 0),
        (float("nan"), 0.0, NOT_BETTER),
    ],
)
def test_a_fine_tune_that_is_not_better_enough_does_not_pass(
    after: float, min_gain: float | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before, now = (Measurement(loss=log(value), perplexity=value) for value in (20.0, after))
    assert pass_gate(Evaluation(held_out_rows=4, before=before, after=now), min_gain) == code
    assert ("not good enough" in capsys.readouterr().err) == bool(code)


def test_answers_that_score_too_little_do_not_pass(capsys: pytest.CaptureFixture[str]) -> None:
    change = {"before": (0.1, None, None), "after": (0.6, 0.45, 0.73)}
    new = MetricResult(name="new_term", title="New term", better="higher", unit="yes/no", questions=46, **change)
    assert pass_scores(Metrics(metrics=[new]), {}) == pass_scores(Metrics(metrics=[new]), {"new_term": 0.6}) == 0
    assert capsys.readouterr().err == ""
    assert pass_scores(Metrics(metrics=[new]), {"new_term": 0.61}) == NOT_BETTER
    said = "new_term is 0.6 (95% interval 0.45 to 0.73) over 46 questions, and task.evaluate.min_scores requires 0.61"
    assert said in capsys.readouterr().err
    assert pass_scores(Metrics(metrics=[new]), {"chrf": 0.0, "new_term": 0.5}) == NOT_BETTER
    assert "chrf, which task.evaluate.min_scores names, applies to no question" in capsys.readouterr().err


@pytest.mark.usefixtures("no_plots")
def test_train_and_report_end_with_the_gate_s_code(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        train([*words, "task.evaluate.min_gain=0.999"]) == 3
    )  # the same run: what is asked afterwards changes nothing
    assert "is finished" in capsys.readouterr().out
    assert report_command.main([*words, "task.evaluate.min_gain=0.999"]) == 3
    assert "requires 99.9%. The run is kept" in capsys.readouterr().err
    assert report_command.main([*words, "task.evaluate.min_gain=0.001", "task.evaluate.min_scores.ended=1.1"]) == 3
    assert "ended is 0" in capsys.readouterr().err
    assert report_command.main([*words, "task.evaluate.min_gain=0.001", "task.evaluate.min_scores.ended=0"]) == 0


def test_a_run_carries_the_list_of_known_slang(finished: Run) -> None:
    assert (finished.folder / FILE).read_bytes() == (finished.data_folder() / FILE).read_bytes() != b""


# --- the judge ------------------------------------------------------------------------------------------------

Reply = Callable[[str, str], "tuple[int, str]"]  # answers A and B → status, what the judge says


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict[str, Any]], list[Reply]]]:
    """A real server of chat completions: its address, the requests it got, and how it replies, for good at last."""
    seen: list[dict[str, Any]] = []
    replies: list[Reply] = []

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
            a, b = body["messages"][1]["content"].partition("# Answer A\n")[2].split("\n\n# Answer B\n")
            status, text = (replies.pop(0) if len(replies) > 1 else replies[0])(a, b)
            self.send_response(status)
            self.end_headers()
            reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            self.wfile.write(json.dumps(reply).encode() if status == 200 else text.encode())

        def log_message(self, *given: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen, replies
    server.shutdown()
    server.server_close()


def pairs(count: int = 4) -> list[Generation]:
    return [
        Generation(
            id=f"{side} {n}",
            side=side,
            question=f"question {n // 2}",
            seed=n % 2,
            text_in="Say it.",
            text=f"{'good' if side == 'after' else 'bad'} {n}",
        )
        for side in ("before", "after")
        for n in range(count)
    ]


def config_of(url: str, *more: str) -> Any:
    return load_config([f"judge.url={url}", "judge.model=a-judge", *more])


def prefers(word: str) -> Reply:
    return lambda a, b: (200, "A" if word in a else "B")


def test_a_preference_counts_where_both_orders_agree(endpoint: Any, tmp_path: Path, monkeypatch: Any) -> None:
    url, seen, replies = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    replies.append(prefers("good"))
    result = judge.judge(tmp_path, config_of(url), pairs())
    assert (result.pairs, result.after, result.before, result.tie) == (4, 4, 0, 0)
    assert result.preference == (1, None, None) and result.model == "a-judge"
    assert len(seen) == 8 and all(one["path"] == "/v1/chat/completions" and one["model"] == "a-judge" for one in seen)
    assert seen[0]["key"] == "Bearer a-secret" and "a-secret" not in (tmp_path / judge.FILE).read_text()
    # Once judged, nothing is asked again: with the address or without.
    assert judge.judge(tmp_path, config_of(url), pairs()) == result == judge.judge(tmp_path, load_config(), pairs())
    assert len(seen) == 8
    assert judge.judge(tmp_path, load_config(), pairs(6)) is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (lambda a, b: (200, "A"), "disagreed"),
        (lambda a, b: (200, "I cannot judge this."), "no_verdict"),
        (lambda a, b: (200, ""), "no_verdict"),
        (lambda a, b: (200, "A and B are both fine, A"), "no_verdict"),
    ],
)
def test_everything_else_is_a_tie_and_said(reply: Reply, reason: str, endpoint: Any, tmp_path: Path) -> None:
    url, _, replies = endpoint
    replies.append(reply)
    result = judge.judge(tmp_path, config_of(url), pairs())
    assert result.tie == getattr(result, reason) == 4 and result.preference == (0, None, None)


def test_a_verdict_stands_on_the_last_line(endpoint: Any, tmp_path: Path) -> None:
    url, _, replies = endpoint
    replies.append(lambda a, b: (200, f"A is longer, B is short.\n\nVerdict: **{'A' if 'bad' in a else 'b'}**."))
    assert judge.judge(tmp_path, config_of(url), pairs()).before == 4


def test_a_failure_that_passes_is_tried_again_and_one_that_stays_keeps_what_was_judged(
    endpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen, replies = endpoint
    monkeypatch.setattr(judge, "LONGEST_WAIT", 0.01)
    replies += [lambda a, b: (503, "busy"), prefers("good"), prefers("good"), lambda a, b: (500, "out of order")]
    with pytest.raises(UserError, match=r"failed 4 times: it answers 500: out of order.*run the same command again"):
        judge.judge(tmp_path, config_of(url), pairs())
    assert len(read_lines(tmp_path / judge.FILE)) == 1 and len(seen) == 3 + 4
    replies[:] = [prefers("good")]
    assert judge.judge(tmp_path, config_of(url), pairs()).after == 4 and len(seen) == 7 + 6


@pytest.mark.parametrize(("status", "says"), [(401, "Set OPENAI_API_KEY"), (404, "refuses with 404: no such model")])
def test_a_refusal_is_said_at_once(status: int, says: str, endpoint: Any, tmp_path: Path) -> None:
    url, seen, replies = endpoint
    replies.append(lambda a, b: (status, "no such model"))
    with pytest.raises(UserError, match=says):
        judge.judge(tmp_path, config_of(url), pairs())
    assert len(seen) == 1


def test_an_address_without_a_judge_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "LONGEST_WAIT", 0.01)
    with pytest.raises(UserError, match="failed 4 times: ConnectError"):
        judge.judge(tmp_path, config_of("http://127.0.0.1:9/v1"), pairs())
    with pytest.raises(UserError, match="no address of an endpoint"):
        judge.judge(tmp_path, config_of("127.0.0.1/v1"), pairs())
    with pytest.raises(UserError, match=r"judge\.model"):
        judge.judge(tmp_path, load_config(["judge.url=http://127.0.0.1:9/v1"]), pairs())


@pytest.mark.usefixtures("no_plots")
def test_the_report_shows_the_judge(finished: Run, words: list[str], endpoint: Any) -> None:
    url, _, replies = endpoint
    replies.append(lambda a, b: (200, "tie"))
    assert report_command.main([*words, f"judge.url={url}", "judge.model=a-judge"]) == 0
    assert "a-judge compared 15 pairs of answers" in (finished.folder / "report.html").read_text()


# --- comparison -----------------------------------------------------------------------------------------------


def copy_of(finished: Run, name: str, **changes: Any) -> Run:
    """A run beside `finished` whose files say other things."""
    folder = finished.folder.parent / name
    folder.mkdir()
    for file in ("config.yaml", "data_manifest.json", "environment.json", "evaluation.json", "metrics.jsonl"):
        (folder / file).write_text((finished.folder / file).read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["after"] |= changes.get("after", {})
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    manifest = json.loads((folder / "data_manifest.json").read_text())
    manifest["splits"]["test"] |= changes.get("test", {})
    (folder / "data_manifest.json").write_text(json.dumps(manifest))
    return Run.read(folder)


@pytest.fixture
def three(finished: Run) -> Iterator[tuple[Run, Run, Run]]:
    """A run; one whose every row is a nat worse; and one measured on other rows."""
    worse = [[nats + 1, tokens] for nats, tokens in finished.evaluation.after.rows]
    loss = sum(nats for nats, _ in worse) / sum(tokens for _, tokens in worse)
    copies = (
        copy_of(finished, "worse", after={"rows": worse, "loss": loss, "perplexity": exp(loss)}),
        copy_of(finished, "elsewhere", test={"sha256": "e" * 64}),
    )
    yield finished, *copies
    for copy in copies:
        for file in copy.folder.iterdir():
            file.unlink()
        copy.folder.rmdir()


def test_runs_on_other_rows_stand_apart(three: tuple[Run, Run, Run]) -> None:
    best, worse, elsewhere = three
    first, second = compare_runs.compare([worse, elsewhere, best])
    assert first.runs == [best, worse] and second.runs == [elsewhere]
    table = {title: texts for title, *texts in first.lines}
    behind = table["loss above the best"]
    assert behind[0] == "the best" and behind[1].startswith("+0.") and "(+0." in behind[1]
    facts = compare_runs.facts(best)
    steps = [json.loads(line) for line in (best.folder / "metrics.jsonl").read_text().splitlines()]
    assert facts["rank"] == "8" and facts["steps"] == str(max(line["step"] for line in steps))
    assert facts["held-out perplexity"] == f"{best.evaluation.after.perplexity:.2f}"
    assert table["Well-formed"][0] and not table["Well-formed"][1]
    assert "Well-formed" not in [title for title, *_ in second.lines]
    assert any("Answers not measured yet" in note and "worse" in note for note in first.notes)


def test_models_with_other_tokens_are_not_compared_by_the_token(finished: Run) -> None:
    other = replace(finished, evaluation=finished.evaluation.model_copy(deep=True))
    nats, tokens = other.evaluation.after.rows[0]
    other.evaluation.after.rows[0] = nats, tokens + 1
    assert compare_runs.behind(other, finished) == ""
    (group,) = compare_runs.compare([finished, other])
    assert any("per token" in note for note in group.notes)


def test_the_comparison_is_one_page_without_scripts(
    three: tuple[Run, Run, Run], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    compare_command.main(words)
    out = capsys.readouterr().out
    page = (three[0].folder.parent / "comparison.html").read_text()
    assert out.strip().endswith("comparison.html") and page.count("sha256 ") == 2
    assert "<script" not in page and 'src="' not in page
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids)) > 0
    chosen = compare_runs.choose(load_config(words), f"{three[0].folder.name} {three[1].folder}")
    assert [one.folder for one in chosen] == [one.folder for one in three[:2]]
    with pytest.raises(UserError, match="no-such is not a finished run"):
        compare_command.main([*words, "runs=no-such"])


@pytest.mark.slow
def test_the_commands_as_a_user_gives_them(words: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def call(module: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"commands.{module}", *words, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)

    report_again, refused = call("report"), call("report", "task.evaluate.min_gain=0.999")
    assert report_again.returncode == 0 and report_again.stdout.strip().endswith("report.html"), report_again.stderr
    assert refused.returncode == 3 and "Traceback" not in refused.stderr
    assert call("compare").returncode == 0
    wrong = call("report", "judge.url=http://127.0.0.1:9/v1")
    assert wrong.returncode == 2 and "judge.model" in wrong.stderr and "Traceback" not in wrong.stderr
