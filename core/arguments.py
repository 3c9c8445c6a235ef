"""The one way to write a command's arguments: `key=value`, checked against a typed model.

    class Options(Arguments):
        port: int = Field(8080, ge=1, description="port to listen on")

    options = parse(Options, ["port=8081"])

It needs only pydantic, so that commands of the serving environment can use it. Commands on the configuration's tree
call `core.configuration.load_config(argv, Options)`.
"""

import sys
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from core.errors import UserError
from core.validation import did_you_mean, sentence

Options = TypeVar("Options", bound="Arguments")
HELP = ("-h", "--help", "help")


class Arguments(BaseModel):
    """A command's own arguments. Texts are taken as they are; lists are separated by commas."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


def parse(options: type[Options], argv: Sequence[str], sections: Sequence[type[BaseModel]] = ()) -> Options:
    """The arguments in `argv`; `--help` prints what there is, and ends the program.

    Args:
        sections: what else the command takes, for `--help`.

    Raises:
        UserError: with a sentence for each argument that is unknown, malformed, missing or wrong.
    """
    if any(word in HELP for word in argv):
        print(describe(options, sections))
        sys.exit(0)
    given, wrong = dict[str, Any](), list[str]()
    for word in argv:
        name, is_assignment, text = word.partition("=")
        if name not in options.model_fields:
            hint = did_you_mean([name], options.model_fields) or f". Known: {', '.join(options.model_fields) or 'none'}"
            wrong.append(f"argument {word}: unknown name {name}{hint}; arguments are written key=value")
        elif not is_assignment:
            wrong.append(f"argument {word}: has no value; write {name}=VALUE")
        else:
            is_list = get_origin(options.model_fields[name].annotation) in (list, tuple)
            given[name] = [part for part in text.split(",") if part] if is_list else text
    try:
        parsed = options.model_validate(given)
    except ValidationError as error:
        for each in error.errors():
            name = str(each["loc"][0]) if each["loc"] else ""
            if not name:  # several that do not go together
                wrong.append(str(each["ctx"]["error"]))
            elif each["type"] == "missing":
                wrong.append(f"argument {name} is missing: {options.model_fields[name].description}")
            else:
                text = given[name]
                word = f"{name}={','.join(text) if isinstance(text, list) else text}"
                wrong.append(f"argument {word}: {sentence(name, each)}")
    if wrong:
        raise UserError(*wrong)
    return parsed


def own_arguments(options: type[Arguments], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """`argv` dealt to a command's own `options`, with the request for help, and to the configuration."""
    own = [word for word in argv if word in HELP or word.partition("=")[0] in options.model_fields]
    return own, [word for word in argv if word not in own]


def describe(options: type[Arguments], sections: Sequence[type[BaseModel]] = ()) -> str:
    """What `--help` prints: what the command is for, and its arguments with types, defaults and meanings."""
    command = "__main__" if options is Arguments else options.__module__
    parts = [(sys.modules[command].__doc__ or "").strip()]
    if options.model_fields:
        parts.append("Arguments, each as key=value:\n" + _table(options))
    for section in sections:
        parts.append("Keys of the configuration (their defaults: docs/configuration.md):\n" + _table(section))
    return "\n\n".join(parts)


def _table(model: type[BaseModel], above: str = "") -> str:
    lines = []
    for name, field in model.model_fields.items():
        section = next((kind for kind in _kinds(field.annotation) if _is_model(kind)), None)
        if section:
            lines.append(_table(section, f"{above}{name}."))
            continue
        default = "" if field.is_required() or above else f" (default: {default_of(field)})"
        text = f"{field.description or ''}{default}"
        lines.append(f"  {above}{name}  <{type_name(field)}>")
        lines.append(textwrap.indent(textwrap.fill(text, 104), "      "))
    return "\n".join(lines)


def type_name(field: FieldInfo) -> str:
    """The type of a field as a person reads it, with its range: `whole number, 1 or more`, `cpu | gpu`."""
    limits = [
        said.format(f"{value:g}")
        for limit in field.metadata
        for name, said in (("ge", "{} or more"), ("gt", "above {}"), ("le", "{} or less"), ("lt", "below {}"))
        if (value := getattr(limit, name, None)) is not None
    ]
    return ", ".join([" | ".join(dict.fromkeys(map(_name, _kinds(field.annotation)))), *limits])


def default_of(field: FieldInfo) -> str:
    """A field's default as it is written on the command line."""
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "none"
    if isinstance(default, list | tuple):
        return ",".join(map(str, default)) or "none"
    return str(default).lower() if isinstance(default, bool) else str(default) or "empty"


def _kinds(annotation: Any) -> list[Any]:
    if hasattr(annotation, "__value__"):
        annotation = annotation.__value__
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for each in get_args(annotation) for kind in _kinds(each)]
    if hasattr(annotation, "__metadata__"):  # Annotated[…]
        return _kinds(annotation.__origin__)
    return [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        return f"list of {_name(_kinds(get_args(kind)[0])[0])}"
    if get_origin(kind) is dict:
        return "section"
    known = {str: "text", int: "whole number", float: "number", bool: "true | false", Path: "path", Any: "any"}
    return known.get(kind, "null" if kind is type(None) else str(getattr(kind, "__name__", kind)))
