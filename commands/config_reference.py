"""Write docs/configuration.md: every key of the configuration and every argument of the commands, from their models.

python -m commands.config_reference
"""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from core import tasks
from core.arguments import Arguments, default_of, parse, type_name
from core.checks import section_of
from core.configuration import CONFIG_DIR, names
from core.errors import run
from core.schema import Config

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
COMMANDS = Path(__file__).resolve().parent
TABLE = "| {} | type | default | meaning |\n|---|---|---|---|"
HEAD = """\
# Configuration and arguments

Made by `python -m commands.config_reference` from `core/schema.py`, `nemo_configs/` and the commands; do not edit.

Commands take arguments as `key=value`, such as `python -m commands.train task=slang task.train.epochs=5`, or
`make train TASK=slang ARGS="task.train.epochs=5 seed=1"`. A value with spaces, commas or brackets stands in quotes
inside the shell's: `"task.prompt.fields.context='Rain, again.'"`. `--help` lists a command's arguments.

Defaults are those of `nemo_configs/config.yaml` and `task_defaults.yaml`, with `model=gemma-3-270m`, `peft=lora` and
`trainer=cpu`. A default in the form `${{key}}` is the value of that other key. Files that may be named instead:

{groups}

A text may hold `{{field}}`, and a dollar sign; where a dollar sign stands before a brace, write `\\${{` (in YAML
`'It costs \\${{price}}'`, or `"It costs \\\\${{price}}"` between double quotes). `${{price}}` alone is a reference to a
key `price`. A file of your own in `nemo_configs/task/`, `model/`, `peft/` or `experiment/` is checked like these.
"""


def main(argv: list[str]) -> None:
    parse(Arguments, argv)
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"written: {TARGET}")


def reference() -> str:
    groups = ("task", "model", "peft", "trainer", "experiment", "prompt")
    parts = [HEAD.format(groups="\n".join(f"- `{group}=` {', '.join(names(group))}" for group in groups))]
    parts += ["## Configuration", *sections(Config, defaults(), "")]
    for module in tasks.having("options"):
        options = tasks.part_of(module, "options", "task.data.module").Options
        parts += [f"Of tasks with `task.data.module={module}`:", "\n".join(table(options, {}, f"task.data.{module}"))]
    parts += ["## Arguments of the commands", *commands()]
    return "\n\n".join(parts) + "\n"


def defaults() -> dict[str, Any]:
    """What `nemo_configs/` gives every task, references unresolved."""
    tree = _read("config")
    tree["task"] = _read("task_defaults")
    for entry in tree.pop("defaults"):
        if isinstance(entry, dict) and "task" not in entry:
            tree |= {group: _read(f"{group}/{name}") for group, name in entry.items()}
    return tree


def sections(model: type[BaseModel], values: dict[str, Any], above: str) -> Iterator[str]:
    """A table for `model` and one for each of its sections."""
    lines = table(model, values, above)
    if len(lines) > 1:
        yield f"### {above or 'At the root'}"
        yield "\n".join(lines)
    for name in model.model_fields:
        if section := section_of(model, name):
            yield from sections(section, values.get(name) or {}, f"{above}.{name}".lstrip("."))


def table(model: type[BaseModel], values: dict[str, Any], above: str) -> list[str]:
    """The head and a line for each key that is no section."""
    lines = [TABLE.format("key")]
    for name, field in model.model_fields.items():
        if section_of(model, name):
            continue
        default = _shown(values[name]) if name in values else default_of(field)
        lines.append(_line(f"{above}.{name}".lstrip("."), field, default))
    return lines


def commands() -> Iterator[str]:
    for file in sorted(COMMANDS.glob("*.py")):
        if file.stem == "__init__":
            continue
        command = import_module(f"commands.{file.stem}")
        yield f"### commands.{file.stem}\n\n{(command.__doc__ or '').partition(chr(10))[0]}"
        options = getattr(command, "Options", None)
        if options:
            lines = [_line(name, field, default_of(field)) for name, field in options.model_fields.items()]
            yield "\n".join([TABLE.format("argument"), *lines])
        if hasattr(command, "load_config") and not hasattr(command, "parse"):
            yield "And any key of the configuration." if options else "Any key of the configuration."


def _line(name: str, field: FieldInfo, default: str) -> str:
    cells = (f"`{name}`", type_name(field), default if default == "required" else f"`{default}`", field.description)
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _shown(value: Any) -> str:
    """A value in one line of YAML."""
    if isinstance(value, str):
        return value if value and "\n" not in value else json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _read(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    return read


if __name__ == "__main__":
    run(main)
