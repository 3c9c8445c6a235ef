"""Ask the base model and the fine-tuned one the same thing, side by side.

    python -m commands.generate task=slang context="You missed the last bus home." seed=3
    (what `make generate TASK=slang CONTEXT="…" CONDITION="…"` calls)

`name=text` for a field of the task's prompt replaces its default. The newest finished run is asked, or +run=FOLDER.
"""

from core.configuration import load_config, plain
from core.errors import run
from core.run_folder import Run, base_of, newest_run


def main(words: list[str]) -> None:
    given, overrides = {}, []
    fields = load_config([word for word in words if word.startswith("task=")]).task.prompt.fields
    for word in words:  # a prompt field may hold any text, so it does not go through the override grammar
        name, _, text = word.partition("=")
        if name in fields:
            given[name] = text
        else:
            overrides.append(word)
    config = load_config(overrides)
    asked = Run.read(newest_run(config))
    print(f"Asking {asked.folder.name}", flush=True)

    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    with console.status("loading"):
        from converters.nemo_file import read_nemo
        from evaluation.compare import answer, without_adapter

        nemo = read_nemo(asked.archive)
        model, tokenizer = nemo.load_onto(base_of(asked, config))
    instruction = nemo.prompt.write_instruction(**given)
    sampling = plain(config.task.generate)
    with console.status("asking the fine-tuned model"):
        tuned = answer(model, tokenizer, nemo.prompt, instruction, sampling, config.seed)
    with console.status("asking the base model"), without_adapter(model):
        base = answer(model, tokenizer, nemo.prompt, instruction, sampling, config.seed)
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
