"""From finished runs to what Triton serves: `exports/serve`, made in the training environment. `make serve` calls it.

    python -m commands.prepare_serving tasks=slang,squid_game
    python -m commands.prepare_serving default=slang            the base alone where slang has no finished run
    python -m commands.prepare_serving tasks=slang engine=vllm  the same folder for NVIDIA's container

The newest finished run of each task becomes a PEFT adapter through `converters`, at exports/<task>/adapter; one that
was made from that very run is taken as it is. Where a server runs already, its tasks stay and these join them.
"""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from core.arguments import Arguments, parse
from core.artifacts import Conversion, ServedAdapter
from core.base_model import ensure_base_model, licence_of
from core.configuration import load_config, plain
from core.errors import UserError, run
from core.files import read_json
from core.prompt import EOS, Prompt
from core.run_folder import Run, base_of, newest_run
from serving.repository import put_adapter, remove_adapter, write_repository, write_vllm_repository
from serving.state import State

FOLDER = Path("exports/serve")
DEFAULT_MODEL = "gemma-3-270m"
SAMPLING = {"max_new_tokens": "max_tokens"}  # transformers' name: vLLM's
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "repetition_penalty")


class Options(Arguments):
    tasks: list[str] = Field([], description="those to serve; each needs a finished run")
    default: str | None = Field(None, description="a task to serve where none is named, if it has a finished run")
    model: str | None = Field(
        None, description="the base: of the runs, or served alone where there is none, then gemma-3-270m by default"
    )
    engine: Literal["embedded", "vllm"] = Field("embedded", description="what generates")
    folder: Path = Field(FOLDER, description="what Triton will serve")


def main(argv: list[str]) -> None:
    options = parse(Options, argv)
    prepare(options.tasks, options.default, options.model, options.engine, options.folder)


def prepare(tasks: list[str], default: str | None, model: str | None, engine: str, folder: Path) -> None:
    """
    Raises:
        UserError: a named task without a finished run, tasks of several bases or of another one than `model`, a server
            that serves another base.
    """
    runs = [newest(task) for task in tasks] or [found for found in [newest_or_none(default)] if found]
    bases = {found.task: base_of(found, load_config([f"task={found.task}"])).resolve() for found in runs}
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{task} on {base.name}" for task, base in bases.items())
        raise UserError(
            f"all tasks that are served together share one base, but these are {listed}. Train one of "
            f"them again, MODEL=…, or serve them one after the other"
        )
    for found in runs:
        if model and (name := found.config["model"]["name"]) != model:
            raise UserError(
                f"the newest run of {found.task} is on {name}, not on MODEL={model}. Leave MODEL out to serve it, or "
                f"train on that base: make train TASK={found.task} MODEL={model}"
            )
    wanted = load_config([f"model={model or DEFAULT_MODEL}"]).model
    base = next(iter(bases.values()), None) or ensure_base_model(wanted).resolve()
    is_running = State(folder / "state").is_taken()
    if is_running and engine == "vllm":
        raise UserError(f"a server is running from {folder}; stop it first, its repository would be written anew")
    if is_running and (folder / "base").resolve() != base:
        raise UserError(
            f"the running server has the base {(folder / 'base').resolve().name}, and these tasks "
            f"{base.name}; stop it first"
        )
    adapters = {found.task: adapter_of(found, base) for found in runs}
    (folder / "adapters").mkdir(parents=True, exist_ok=True)
    if not is_running:
        for other in (folder / "adapters").iterdir():
            if other.name not in adapters:
                remove_adapter(other)
    for found in runs:
        config = read_json(base / "config.json") if engine == "vllm" else None
        put_adapter(folder, adapters[found.task], serving_of(found, adapters[found.task], base), config)
    if engine == "vllm":
        write_vllm_repository(folder, base)
        print(
            f"{folder} holds what NVIDIA's Triton with the vLLM backend serves, from {base.name}: "
            f"{', '.join(adapters) or 'the base alone'}. Run it where there is an NVIDIA GPU:"
        )
        print("  make up ENGINE=vllm" + (f" TASKS={','.join(adapters)}" if adapters else ""))
    elif not is_running:
        write_repository(folder, base)


def newest(task: str) -> Run:
    return Run.read(newest_run(load_config([f"task={task}"])))


def newest_or_none(task: str | None) -> Run | None:
    if not task:
        return None
    try:
        return newest(task)
    except UserError as error:
        print(f"{error}\nUntil then the base is served alone.", flush=True)
        return None


def adapter_of(found: Run, base: Path) -> Path:
    """The run's adapter as a PEFT folder, made unless it was made from this run already."""
    from converters.convert import convert

    target = Path("exports") / found.task / "adapter"
    record = target / "conversion.json"
    with found.archive.open("rb") as archive:
        digest = hashlib.file_digest(archive, "sha256").hexdigest()
    made = Conversion.read_if_there(record)
    if not made or made.source_sha256 != digest:
        convert(found.archive, "adapter", target, base)
    return target


def serving_of(found: Run, adapter: Path, base: Path) -> ServedAdapter:
    """`serving.json`: what a client needs to ask this adapter as it was trained, beside its prompt."""
    prompt, task = Prompt.load(adapter), found.config["task"]
    # The task's title and sampling of today count; its run may be older than they are.
    today = load_config([f"task={found.task}"]).task
    given = plain(today.generate)
    given = {SAMPLING.get(name, name): value for name, value in given.items()}
    sampling = {name: given[name] for name in SAMPLED if given.get(name) is not None}
    if prompt.end not in ("", EOS):
        sampling["stop"] = [prompt.end]
    field = next((name for name in task["data"]["columns"] if f"{{{name}}}" in prompt.instruction), None)
    return ServedAdapter(
        name=found.task,
        task=found.task,
        title=task.get("title") or today.title or found.task.replace("_", " ").capitalize(),
        base=base.name,
        sampling=sampling,
        run=found.folder.name,
        licence=licence_of(base),
        has_turns=bool(prompt.end),
        field=field,
    )


if __name__ == "__main__":
    run(main)
