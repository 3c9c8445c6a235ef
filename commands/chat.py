"""Talk with a fine-tuned model in the terminal, or ask it what comes from a pipe, a line at a time.

    python -m commands.chat task=chat                (what `make chat TASK=chat` calls)
    printf 'hi\\nwho are you?\\n' | make chat TASK=chat
    python -m commands.chat task=chat run=FOLDER seed=3 task.generate.temperature=0.3

The newest finished run answers, or run=FOLDER. Where the task's prompt has turns, the model is given the whole
dialogue; where it asks one question, as slang's does, each line is one by itself. A line fills the field of the
prompt's instruction that is a column of the task's data (slang's `context`), or is the whole instruction.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from core.configuration import load_config, plain
from core.errors import run
from core.files import write_lines
from core.run_folder import Run, base_of, newest_run

if TYPE_CHECKING:
    from core.prompt import AnswerPart
    from evaluation.dialogue import Dialogue

HELP = """\
/reset        begin a new dialogue; a system text stays
/system TEXT  tell the model who it is; begins a new dialogue
/think        let the model think before it answers, or no longer
/save FILE    write the dialogue as JSON Lines, which make data takes as SOURCE
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer. To begin a message with a slash, put a space before it."""


def main(argv: list[str]) -> None:
    config = load_config(argv)
    asked = Run.read(newest_run(config))
    console = Console(highlight=False)
    with console.status("loading"):
        import torch

        from converters.nemo_file import read_nemo
        from evaluation.dialogue import Dialogue

        nemo = read_nemo(asked.archive)
        model, tokenizer = nemo.load_onto(base_of(asked, config))
        columns = asked.config["task"]["data"]["columns"]
        field = next((name for name in columns if f"{{{name}}}" in nemo.prompt.instruction), None)
        dialogue = Dialogue(model, tokenizer, nemo.prompt, plain(config.task.generate), field)
        torch.manual_seed(config.seed)
    _say(console, f"{asked.folder.name} is listening. /help lists the commands, Ctrl-D leaves.")
    if not dialogue.has_memory:
        about = f"what you type is the prompt's {field}, and " if field else ""
        _say(console, f"{about}each message stands by itself: this task's prompt has no turns")
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.stdin.isatty():
        import readline  # noqa: F401  (input() then has line editing and a history)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in _lines(console):
        if line.startswith("/"):
            command, _, text = line.partition(" ")
            if command == "/exit":
                return
            _say(console, _obey(dialogue, command, text.strip()))
        elif line.strip():
            _answer(dialogue, line.strip(), console)


def _lines(console: Console) -> Iterator[str]:
    """What the user types until Ctrl-D, or the lines of a pipe, shown as if they were typed."""
    while True:
        try:
            with _interruptible():
                line = input("you: ")
        except KeyboardInterrupt:
            console.print()
            _say(console, "Ctrl-D or /exit leaves")
            continue
        except EOFError:
            console.print()
            return
        if not sys.stdin.isatty():
            console.out(line, highlight=False)
        yield line.rstrip()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in here. Elsewhere there is nothing to stop, and a second one must not leave."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _answer(dialogue: "Dialogue", text: str, console: Console) -> None:
    forgotten = dialogue.forgotten
    try:
        with _interruptible():
            remark = dialogue.ask(text, partial(_show, console))
    except ValueError as error:
        _say(console, str(error))
        return
    except KeyboardInterrupt:  # after the answer's last word
        remark = ""
    console.print()
    if dialogue.forgotten > forgotten:
        remark = "; ".join(
            filter(
                None,
                [
                    remark,
                    "the dialogue no longer fits in the model's window: it was not given "
                    f"the oldest {dialogue.forgotten} exchanges",
                ],
            )
        )
    if remark:
        _say(console, remark)
    console.print()


def _show(console: Console, part: "AnswerPart") -> None:
    """A part of an answer as it comes; thoughts are dim."""
    console.out(part.thought, end="", highlight=False, style="dim")
    console.out(part.text, end="", highlight=False)


def _obey(dialogue: "Dialogue", command: str, text: str) -> str:
    """Do what a line that begins with a slash asks for; what there is to say about it."""
    match command:
        case "/help":
            return HELP
        case "/reset":
            dialogue.reset(dialogue.system)
            return "a new dialogue"
        case "/system":
            dialogue.reset(text)
            return "a new dialogue, with this system text" if text else "a new dialogue, without a system text"
        case "/think":
            if not dialogue.can_think:
                return "this model's prompt has no place for thoughts"
            dialogue.thinking = not dialogue.thinking
            return "the model thinks before it answers" if dialogue.thinking else "the model answers without thinking"
        case "/save":
            return _save(dialogue, text)
    return f"{command} is no command; /help lists them"


def _save(dialogue: "Dialogue", name: str) -> str:
    file = Path(name).expanduser()
    if not name:
        return "/save needs the name of a file, such as /save my_chat.jsonl"
    if not dialogue.messages:
        return "nothing was said yet, so there is nothing to save"
    if file.exists():
        return f"{file} is there already and is left as it is; give another name"
    rows = dialogue.rows()
    try:
        write_lines(file, rows)
    except OSError as error:
        return f"{file} cannot be written: {error.strerror}"
    return f"saved {len(rows)} {'dialogue' if len(rows) == 1 else 'dialogues'} to {file}"


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
