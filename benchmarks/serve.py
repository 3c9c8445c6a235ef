"""Serving speed of the embedded engine and its peers: same base, same adapter, same prompts, in interleaved rounds.

    python -m benchmarks.serve                                   (a part of `make bench`)
    python -m benchmarks.serve systems=ours,transformers streams=1,8 tokens=32 rounds=3
    python -m benchmarks.serve random=gemma-4-e2b layers=10 systems=ours,transformers streams=1,8

Peers may have environments of their own: OPENVINO_PYTHON with OPENVINO_MODEL, the base exported by optimum-cli;
XLLAMACPP_PYTHON with LLAMA_CPP_LORA, LLAMA_CPP_MODEL and LLAMA_CPP_MODEL_Q8, GGUF files; VLLM_PYTHON.
The table names what is missing.

Every system has a process of its own, and only one computes at a time. Writes
benchmarks/results/serving/<machine>-<model>.json, and the table in docs/serving.md. After each round, what there is so
far is in <…>.partial.json, which an interrupted benchmark leaves and no page shows.
"""

import atexit
import csv
import json
import os
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
from typing import Annotated, Any, Literal

from benchmarks.worker import ROOT, NotRun, Shares, Worker, find_python, leave_out

RANK = 8  # of a random adapter, and what it adapts
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A list that is longer than any answer, with strings, a choice and a number in each entry.
TERMS = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "slang": {"type": "string"},
            "kind": {"enum": ["noun", "verb", "adjective"]},
            "uses": {"type": "integer"},
            "description": {"type": "string"},
        },
        "required": ["slang", "kind", "uses", "description"],
        "additionalProperties": False,
    },
}
# When each token of a request arrived, in seconds since the requests were sent.
Arrivals = list[float]
Serve = Callable[[list[str]], list[Arrivals]]


# --- systems, each in a process of its own -------------------------------------------------------------------------
def ours(
    job: dict[str, Any],
    names: tuple[str, ...] = ("one",),
    dtype: str = "bfloat16",
    schema: dict[str, Any] | None = None,
) -> Serve:
    """The engine behind its socket, with prefix caching, as in serving."""
    folder = Path(tempfile.mkdtemp(dir=job["scratch"]))
    for name in names:  # the same weights under another name are another adapter
        shutil.copytree(job["adapter"], folder / "adapters" / name)
    python = ROOT / ".venv-serve/bin/python"
    arguments = ["--base", job["base"], "--adapters", str(folder / "adapters"), "--socket", str(folder / "s")]
    engine = subprocess.Popen(
        [str(python if python.exists() else sys.executable), "-m", "serving.engine", *arguments, "--dtype", dtype],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(engine.terminate)
    assert engine.stdout and engine.stdout.readline(), "the engine has not started"
    line = socket.socket(socket.AF_UNIX)
    line.connect(str(folder / "s"))
    messages = line.makefile("rb")
    sampling = {"temperature": 0, "max_tokens": job["tokens"], "ignore_eos": True}
    if schema:
        sampling["structured_outputs"] = {"json": schema}

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
            message = json.loads(messages.readline())
            if "id" in message:
                assert "error" not in message, message
                seen = arrivals[message["id"]]
                made = message.get("tokens", message.get("output_tokens"))
                seen += [time.perf_counter() - started] * (made - len(seen))
                open_ -= "done" in message
        return arrivals

    return serve


def transformers(job: dict[str, Any], together: bool = False) -> Serve:
    """`generate` with peft in float32: one request after another, or all in one padded batch."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation import BaseStreamer

    tokenizer = AutoTokenizer.from_pretrained(job["base"], padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()

    class TokenTimes(BaseStreamer):
        def __init__(self) -> None:
            self.times: Arrivals = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    def serve(prompts: list[str]) -> list[Arrivals]:
        started, arrivals = time.perf_counter(), []
        for some in [prompts] if together else [[prompt] for prompt in prompts]:
            times = TokenTimes()
            inputs = tokenizer(some, return_tensors="pt", padding=True)
            model.generate(
                **inputs, do_sample=False, min_new_tokens=job["tokens"], max_new_tokens=job["tokens"], streamer=times
            )
            arrivals += [[at - started for at in times.times[1:]]] * len(some)  # the first is the prompt
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


def llama_cpp(job: dict[str, Any], model: str = "LLAMA_CPP_MODEL") -> Serve:
    """llama.cpp's server with continuous batching; $`model` and $LLAMA_CPP_LORA are GGUF files.

    python -m commands.convert source=models/gemma-3-270m to=gguf dtype=bf16 out=base
    python -m commands.convert source=models/gemma-3-270m to=gguf dtype=q8_0 out=base-q8
    python -m commands.convert source=exports/slang/adapter to=gguf base=models/gemma-3-270m out=lora
    """
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp as llama

    many = max(job["streams"])
    params = llama.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = os.environ[model], many, many * 512
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

            def on_message(message: Any) -> bool:
                if any(one.get("text") for one in message.get("choices", ())):
                    arrivals.append(time.perf_counter() - started)
                return False

            server.handle_completions(
                {"prompt": prompt, "max_tokens": job["tokens"], "temperature": 0, "stream": True, "ignore_eos": True},
                on_message,
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


# ours-mixed: three adapters in turn; ours-structured: JSON of `TERMS`; ours-int8, llama.cpp-q8: 8-bit weights;
# transformers: one request after another; transformers-batch: all in one padded batch. Each: its function, the package
# that it needs, the virtual environment that may have it, and the most concurrent requests that it is measured with.
SYSTEMS: dict[str, tuple[Callable[[dict[str, Any]], Serve], str, str, int]] = {
    "ours": (ours, "tokenizers", ".venv-serve", 1 << 20),
    "ours-mixed": (lambda job: ours(job, ("one", "two", "three")), "tokenizers", ".venv-serve", 1 << 20),
    "ours-structured": (lambda job: ours(job, schema=TERMS), "tokenizers", ".venv-serve", 1 << 20),
    "ours-int8": (lambda job: ours(job, dtype="int8"), "tokenizers", ".venv-serve", 1 << 20),
    # sequential: the same speed with 32 requests as with 8, but takes minutes
    "transformers": (transformers, "peft", ".venv", 8),
    "transformers-batch": (lambda job: transformers(job, together=True), "peft", ".venv", 1 << 20),
    "openvino-genai": (openvino, "openvino_genai", ".venv-openvino", 1 << 20),
    "llama.cpp": (llama_cpp, "xllamacpp", ".venv-llama-cpp", 8),
    "llama.cpp-q8": (lambda job: llama_cpp(job, "LLAMA_CPP_MODEL_Q8"), "xllamacpp", ".venv-llama-cpp", 8),
    "vllm": (vllm, "vllm", ".venv-vllm", 8),
}
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "openvino-genai", "xllamacpp", "vllm")


def run_worker(name: str, job: dict[str, Any]) -> None:
    """A system's process: prints its versions, then for each line of prompts on stdin the arrivals of their tokens."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print to stdout
    serve = SYSTEMS[name][0](job)
    versions: dict[str, str] = {}
    for package in PACKAGES:
        if package.replace("-", "_") in sys.modules or name.startswith("ours"):
            installed = _version(package)
            versions |= {package: installed} if installed else {}
    print(json.dumps({"ready": versions}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


# --- the rounds ----------------------------------------------------------------------------------------------------
class ServingWorker(Worker):
    """The process of a system in SYSTEMS, which answers a JSON line of prompts with the arrivals of their tokens."""

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        """
        Raises:
            NotRun: its package is not installed.
        """
        _, package, environment, _ = SYSTEMS[name]
        variable = package.removesuffix("_genai").upper() + "_PYTHON"  # OPENVINO_PYTHON, XLLAMACPP_PYTHON, VLLM_PYTHON
        interpreters = [os.environ.get(variable, ""), str(ROOT / environment / "bin/python"), sys.executable]
        python = find_python(package, interpreters, environment)
        command = [python, "-m", "benchmarks.serve", "worker", name, json.dumps(job)]
        super().__init__(command, Path(job["scratch"]) / f"{name}.log")

    def serve(self, prompts: list[str], seconds: float) -> list[Arrivals]:
        self.send(json.dumps(prompts))
        arrivals: list[Arrivals] = self.receive(seconds)
        return arrivals


def read_prompts(adapter: Path, count: int) -> list[str]:
    """`count` prompts: the adapter's own template around different contexts of the shipped table."""
    from core.prompt import Prompt

    prompt = Prompt(**json.loads((adapter / "prompt.json").read_text()))
    with (ROOT / "tasks/slang/slang.csv").open(newline="", encoding="utf-8") as file:
        contexts = [row["Context"] for row in csv.DictReader(file)]
    return [prompt.wrap(prompt.write_instruction(context=contexts[n % len(contexts)])) for n in range(count)]


def random_model(name: str, layers: int | None, tokenizer_folder: Path, scratch: Path) -> tuple[Path, Path]:
    """Random weights in the published shape of `name`, or in its first `layers`, and a random adapter for them.

    Of layers that borrow keys and values, the cut model has about the same share.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from benchmarks.random_base import ARCHITECTURES, random_base
    from core.configuration import load_config, plain
    from core.prompt import Prompt
    from serving.engine.architecture import GemmaConfig

    changes: dict[str, Any] = {}
    if layers and name in ARCHITECTURES:
        given = ARCHITECTURES[name][1]
        changes["num_hidden_layers"] = layers
        if kinds := given.get("layer_types", [])[:layers]:
            changes["layer_types"] = kinds
        if shared := given.get("num_kv_shared_layers"):
            shared = shared * layers // given["num_hidden_layers"]
            while {*kinds[: layers - shared]} != {*kinds}:  # each kind has a layer to borrow from
                shared -= 1
            changes["num_kv_shared_layers"] = shared
    base, adapter = random_base(name, tokenizer_folder, scratch, **changes), scratch / "adapter"
    tensors = {}
    for number, shape in enumerate(GemmaConfig.read(base).shapes):
        for module, (inputs, outputs) in shape.linear().items():
            if module.startswith(("self_attn.", "mlp.")):
                at = f"base_model.model.model.layers.{number}.{module}"
                tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.02
                tensors[f"{at}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.02
    LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=ADAPTED).save_pretrained(adapter)
    save_file(tensors, adapter / "adapter_model.safetensors")
    Prompt(**plain(load_config(["task=slang"]).task.prompt)).save(adapter)
    return base, adapter


def summary(rounds: list[list[Arrivals]]) -> dict[str, Any]:
    """Median speed over rounds and each round's, and latencies over all tokens of all rounds, in seconds."""
    rates = [sum(map(len, one)) / max(times[-1] for times in one) for one in rounds]
    gaps = sorted(b - a for one in rounds for times in one for a, b in pairwise(times))
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_of_rounds": rates,
        "ttft_p50": statistics.median(times[0] for one in rounds for times in one),
        "gap_p50": gaps[len(gaps) // 2],
        "gap_p99": gaps[min(len(gaps) - 1, len(gaps) * 99 // 100)],
    }


def measure(given: Any, scratch: Path, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Load all systems, then measure them in interleaved rounds; `keep` gets what there is after each round."""
    from core.machine import short_machine_name  # a peer's environment may have no pydantic

    streams, rounds = given.streams, given.rounds
    job = {
        "base": str(given.base.resolve()),
        "adapter": str(given.adapter.resolve()),
        "tokens": given.tokens,
        "streams": streams,
        "scratch": str(scratch),
    }
    prompts = read_prompts(given.adapter, sum(streams) * (rounds + 1))
    systems: dict[str, Any] = {}
    running: dict[str, ServingWorker] = {}
    names = list(dict.fromkeys(given.systems))
    shares = Shares(names, given.minutes * 60)

    def result() -> dict[str, Any]:
        return {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": short_machine_name(),
            "model": given.base.name,
            "tokens": job["tokens"],
            "rounds": rounds,
            "minutes": given.minutes,
            "streams": streams,
            "systems": {name: _with_summaries(system) for name, system in systems.items()},
            "left_out": left_out(systems, rounds),
        }

    try:
        for name in names:
            try:
                print(f"  {name}: loading", flush=True)
                running[name] = ServingWorker(name, job)
                with shares.used_by(name) as left:
                    ready = running[name].receive(left)["ready"]
                systems[name] = {"versions": ready, "arrivals": {n: [] for n in streams if n <= SYSTEMS[name][3]}}
            except NotRun as reason:
                leave_out(name, reason, False, systems, running, shares)
        for round_ in range(rounds + 1):
            for n in streams:
                start = round_ * sum(streams) + sum(one for one in streams if one < n)
                for name, worker in list(running.items()):
                    if n > SYSTEMS[name][3] or (round_ == 0 and n > 8):
                        continue
                    try:
                        with shares.used_by(name) as left:
                            arrivals = worker.serve(prompts[start : start + n], left)
                        print(
                            f"  {name}, {n} at once: {summary([arrivals])['tokens_per_second']:,.1f} tokens/s"
                            f"{', warm-up' if not round_ else ''}",
                            flush=True,
                        )
                        if round_:
                            systems[name]["arrivals"][n].append(arrivals)
                    except NotRun as reason:
                        has_rounds = any(systems[name]["arrivals"].values())
                        leave_out(name, reason, has_rounds, systems, running, shares)
            if round_:
                keep(result())
    finally:
        for worker in running.values():
            worker.stop()
    return result()


def _with_summaries(system: dict[str, Any]) -> dict[str, Any]:
    """`system` as the result file has it: summaries in place of arrivals."""
    found = {name: value for name, value in system.items() if name not in ("arrivals", "stopped")}
    if "arrivals" in system:
        found["streams"] = {str(n): summary(rounds) for n, rounds in system["arrivals"].items() if rounds}
    return found


def left_out(systems: dict[str, Any], rounds: int) -> list[str]:
    """What the measured `systems` lack of `rounds` with each number of requests, in words."""
    found = []
    for name, system in systems.items():
        lacking = {n: rounds - len(done) for n, done in system.get("arrivals", {}).items() if len(done) < rounds}
        if lacking:
            lacks = ", ".join(f"{missing} with {n} at once" for n, missing in lacking.items())
            found.append(f"{name}: of {rounds} rounds {lacks}{system.get('stopped', '')}")
    return found


# --- the table -----------------------------------------------------------------------------------------------------
def options() -> Any:
    """The arguments of this command. A peer's environment, which runs this file too, may have no pydantic."""
    from pydantic import Field

    from core.arguments import Arguments

    class Options(Arguments):
        systems: list[Literal[tuple(SYSTEMS)]] = Field(  # type: ignore[valid-type]
            list(SYSTEMS), description="those to measure"
        )
        streams: list[Annotated[int, Field(ge=1)]] = Field([1, 4, 8, 32], description="requests that come at once")
        tokens: int = Field(32, ge=1, description="of each answer, whose ends are ignored")
        rounds: int = Field(3, ge=1, description="counted ones, whose median is the result, after one that is not")
        base: Path = Field(Path("models/gemma-3-270m"), description="folder of the base model")
        adapter: Path = Field(Path("exports/slang/adapter"), description="folder of the adapter")
        random: str | None = Field(
            None, description="an architecture of random_base.py with random weights, and a random adapter, instead"
        )
        layers: int | None = Field(None, ge=1, description="of that architecture, its first ones alone")
        minutes: float = Field(
            30,
            gt=0,
            description="for everything: a system that has used its share is stopped, and what it lacks is said",
        )
        processor: Literal["avx2"] | None = Field(None, description="measure as on an ordinary one: without AVX-512")

    return Options


def main(argv: list[str]) -> None:
    from benchmarks.figures import partial_file, publish, result_file
    from benchmarks.table import serving_table
    from core.arguments import parse
    from core.errors import UserError
    from core.files import write_json
    from core.machine import confine_to_avx2

    given = parse(options(), argv)
    if given.processor:
        confine_to_avx2()
    for name in ("base", *([] if given.random else ["adapter"])):
        if not (folder := getattr(given, name)).is_dir():
            raise UserError(f"{name}={folder} is no folder. First: make train TASK=slang; make convert TASK=slang")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        if given.random:
            base, adapter = random_model(given.random, given.layers, given.base, Path(scratch))
            given = given.model_copy(update={"base": base, "adapter": adapter})
        file: Path | None = None

        def keep(result: dict[str, Any]) -> None:
            nonlocal file
            result["model"] += f", {given.layers} layers" if given.layers else ""
            result["command"] = shlex.join(["python", "-m", "benchmarks.serve", *argv])
            file = result_file("serving", result["machine"], result["model"])
            write_json(partial_file(file), result)

        try:
            result = measure(given, Path(scratch), keep)
        except KeyboardInterrupt:
            if file:
                print(f"\nWhat was measured until now: {partial_file(file)}", flush=True)
            raise
    keep(result)
    assert file
    print("\n".join(serving_table(result)), f"\n{publish(file)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        run_worker(sys.argv[2], json.loads(sys.argv[3]))
    else:
        from core.errors import run

        run(main)
