"""Ask the base model and the fine-tuned one the same thing, side by side.

    python -m commands.generate task=slang context="You missed the last bus home." seed=3
    (what `make generate TASK=slang CONTEXT="…" CONDITION="…"` calls)

`name=text` for a field of the task's prompt replaces its default. The newest finished run is asked, or run=FOLDER.
"""

from pydantic import Field, create_model

from core.arguments import Arguments
from core.configuration import load_config, plain
from core.errors import run
from core.machine import loading
from core.progress import Progress
from core.run_folder import Run, base_of, newest_run


def options_of(argv: list[str]) -> type[Arguments]:
    """The arguments of this command: the fields of the task's prompt, which may hold any text."""
    task = load_config([word for word in argv if word.startswith("task=")]).task
    about = {name: f"this field of the prompt; by default: {text.strip()}" for name, text in task.prompt.fields.items()}
    fields = {name: (str | None, Field(None, description=text)) for name, text in about.items()}
    return create_model("Options", __base__=Arguments, __module__=__name__, **fields)  # type: ignore[call-overload]


def main(argv: list[str]) -> None:
    config, options = load_config(argv, options_of(argv))
    asked = Run.read(newest_run(config))
    print(f"Asking {asked.folder.name}", flush=True)

    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    with Progress("Loading transformers", None), loading():
        from converters.nemo_file import read_nemo
        from evaluation.compare import answer, without_adapter

    nemo = read_nemo(asked.archive)
    model, tokenizer = nemo.load_onto(base_of(asked, config))
    instruction = nemo.prompt.write_instruction(**options.model_dump(exclude_unset=True))
    sampling = plain(config.task.generate)
    longest = sampling["max_new_tokens"]
    with Progress("Asking the fine-tuned model", longest) as progress:
        tuned = answer(model, tokenizer, nemo.prompt, instruction, sampling, config.seed, progress.advance)
    with Progress("Asking the base model", longest) as progress, without_adapter(model):
        base = answer(model, tokenizer, nemo.prompt, instruction, sampling, config.seed, progress.advance)
    console.print(Text(instruction), style="dim")
    side = max(30, (console.width - 2) // 2)
    console.print(
        Columns(
            [
                Panel(Text(base), title=f"{nemo.base['name']}, before", width=side),
                Panel(Text(tuned), title=f"fine-tuned, seed {config.seed}", width=side, border_style="green"),
            ],
            padding=(0, 1),
        )
    )
    labels = nemo.prompt.labels()
    for name, text in nemo.prompt.read_response(tuned).items():
        console.print(Text.assemble((f"{labels[name]} ", "bold"), text))


if __name__ == "__main__":
    run(main)
