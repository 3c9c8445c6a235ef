"""From a command's arguments to one typed configuration, or to the sentences that say what is wrong.

Commands on this tree take overrides such as `task=slang model=gemma-2-2b task.train.epochs=5 experiment=attempt2`.
Hydra composes the files of `nemo_configs/` with them; the result is checked against `core/schema.py` before anything is
loaded. No Hydra or OmegaConf object leaves this module.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import Container, DictConfig, ListConfig
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel

from core.arguments import Arguments, own_arguments, parse
from core.base_turns import with_turns_of_its_base
from core.checks import Keys, Problem, all_keys, check, dotted, section_of
from core.errors import UserError
from core.files import write_whole
from core.schema import Config, Section
from core.tasks import CONFIG_DIR, foreign_config_dirs
from core.validation import did_you_mean

GROUPS = ("task", "model", "peft", "trainer", "experiment", "prompt")
FILTERS = "task.data.filters."
PATHS = ("task.data.source", "model.path", "data_dir", "runs_dir", "run")
Options = TypeVar("Options", bound=Arguments)


def config_dirs() -> list[Path]:
    """`nemo_configs/`, and those of tasks that lie outside this repository."""
    return [CONFIG_DIR, *foreign_config_dirs()]


def names(group: str) -> list[str]:
    """The names a config group knows, e.g. `names("task")` → `["slang", ...]`."""
    return sorted({path.stem for folder in config_dirs() for path in (folder / group).glob("*.yaml")})


@overload
def load_config(argv: Sequence[str] = ()) -> Config: ...
@overload
def load_config(argv: Sequence[str], options: type[Options]) -> tuple[Config, Options]: ...
def load_config(argv: Sequence[str] = (), options: type[Options] | None = None) -> Config | tuple[Config, Options]:
    """The configuration that `argv` asks for, checked and with every reference resolved.

    `trainer` follows the machine unless named: `gpu` where CUDA is usable, else `cpu`. A prompt with turns has those of
    the base model (core/base_turns.py).

    Args:
        argv: overrides of the tree, and `key=value` for fields of `options`.
        options: the command's own arguments, which are given back beside the configuration.

    Raises:
        UserError: with a sentence for each unknown name or key, malformed argument, missing or wrong value.
    """
    own, overrides = own_arguments(options or Arguments, argv)
    parsed = parse(options or Arguments, own, sections=(Config,))
    words = [_quoted(_as_known(word)) for word in overrides]
    given = _parse_overrides(words, list(options.model_fields) if options else [])
    is_named = any(override.key_or_group == "trainer" for override in given)
    words = [_as_hydra_takes_it(override) for override in given]
    config = _composed(words if is_named else [*words, "trainer=cpu"], given)
    if not is_named and _has_gpu():
        config = _composed([*words, "trainer=gpu"], given)
    config = with_turns_of_its_base(config)
    return (config, cast(Options, parsed)) if options else config


def plain(section: Section) -> dict[str, Any]:
    """A section as an ordinary dictionary of the keys that were given: optional ones that nobody set are not in it."""
    return section.model_dump(exclude_unset=True)


def write_config(config: Config, file: Path) -> None:
    """`config` as plain YAML: what stands in it are values, and no references."""
    write_whole(file, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def read_config(file: Path) -> Config:
    """What `write_config` wrote, also of an older version: keys that are no more are dropped, new ones get the value
    that `load_config()` has.

    Raises:
        UserError: a value that is refused today.
    """
    old = yaml.safe_load(file.read_text(encoding="utf-8"))
    today = plain(load_config(["trainer=cpu"]))
    tree = _renewed(Config, old, today)
    module = tree["task"]["data"].get("module")
    if module and module in old["task"]["data"]:
        tree["task"]["data"][module] = old["task"]["data"][module]
    config, problems = check(tree)
    if problems:
        raise UserError(*(f"{file}: {problem.says}" for problem in problems))
    return cast(Config, config)


def escaped(tree: Any) -> Any:
    """`tree` for OmegaConf, to which `${price}` in a text would be a reference: as `\\${price}` it is text."""
    return _in_texts(tree, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def unescaped(tree: Any) -> Any:
    """The inverse of `escaped`."""
    return _in_texts(tree, lambda text: re.sub(r"(\\*)\\\$\{", lambda found: found[1][::2] + "${", text))


# --- composing --------------------------------------------------------------------------------------------------


def _parse_overrides(words: list[str], own: list[str]) -> list[Override]:
    """
    Raises:
        UserError: with a sentence for each word that is no override, or that names what is not there.
    """
    parser, given, wrong = OverridesParser.create(), [], list[str]()
    for word in words:
        root = re.split(r"[.=@/]", word.lstrip("+~"))[0]
        hint = "" if root in (*GROUPS, *Config.model_fields) else did_you_mean([root], own)
        if hint or root == "hydra":  # what else is unknown, the schema says
            wrong.append(f"argument {_short(word)}: unknown key {root}{hint}")
            continue
        if "=" not in word and not word.startswith("~"):
            hint = did_you_mean([word.lstrip("-")], [*own, *GROUPS, *all_keys(Config)])
            wrong.append(f"argument {_short(word)}: arguments are written key=value{hint}")
            continue
        try:
            override = parser.parse_override(word)
            override.value()
        except (OverrideParseException, HydraException) as error:
            hint = "put a text with special signs in quotes: key=\"'text'\""
            wrong.append(f"argument {_short(word)}: is malformed ({_first_line(error)}); {hint}")
            continue
        if override.is_sweep_override():
            hint = "a text with commas stands in quotes: key=\"'a,b'\""
            wrong.append(f"argument {_short(word)}: takes one value; {hint}")
        elif not override.is_delete() and _is_group(override) and not isinstance(name := override.value(), list):
            known = names(override.key_or_group)
            if name not in known:
                says = f"unknown {override.key_or_group} '{name}'. Known: {', '.join(known)}"
                wrong.append(f"argument {_short(word)}: {says}{did_you_mean([str(name)], known)}")
        given.append(override)
    if wrong:
        raise UserError(*wrong)
    return given


def _is_group(override: Override) -> bool:
    return override.key_or_group in GROUPS


def _as_hydra_takes_it(override: Override) -> str:
    """Without Hydra's distinction of `key=`, `+key=` and `++key=`: whether a key may be there, the schema says."""
    word = str(override.input_line)
    if override.is_delete():
        return word
    if _is_group(override):
        return f"+{word}" if override.type == OverrideType.CHANGE and override.key_or_group == "experiment" else word
    return f"++{word.lstrip('+')}"


def _composed(words: list[str], given: list[Override]) -> Config:
    if foreign := foreign_config_dirs():
        words = [*words, f"hydra.searchpath=[{','.join(_in_quotes(f'file://{folder}') for folder in foreign)}]"]
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = compose("config", overrides=words)
            problems = list[Problem]()
            tree = _resolved(composed, (), problems)
            config, refused = check(tree)
            problems = [*problems, *(one for one in refused if one.path not in {other.path for other in problems})]
            problems = problems or _wrong_task_name(tree["task"]["name"], words)
            if problems:
                raise UserError(*_located(problems, words, given))
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        known = names(group)
        raise UserError(f"unknown {group} '{name}'. Known: {', '.join(known)}{did_you_mean([name], known)}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        hint = "; between double quotes, \\${ is written \\\\${" if "escape character '$'" in str(error.problem) else ""
        if r"'\t'" in str(error.problem):
            hint = "; YAML is indented by spaces: write spaces in place of the tab"
        where = f"{_relative(Path(mark.name))}:{mark.line + 1}" if mark else "configuration"
        raise UserError(f"{where}: this is not YAML: {error.problem}{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{_relative(_not_utf8())}: is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration: {_first_line(error)}") from None
    assert config is not None
    return config


def _wrong_task_name(name: str, words: list[str]) -> list[Problem]:
    """Runs and exports are kept under the name in a task's file, and looked for under the name of that file."""
    file = next((file for file, _ in reversed(_files(words)) if file.parent.name == "task"), None)
    if file is None or file.stem == name:
        return []
    return [Problem(("task", "name"), f"task.name is {name}; it must be the name of the file, {file.stem}")]


def _resolved(node: Container, path: Keys, problems: list[Problem]) -> Any:
    """`node` as dictionaries, lists and values; what cannot be resolved is left out and told in `problems`."""
    found = list[tuple[Any, Any]]()
    keys: Iterator[Any] = iter(range(len(node))) if isinstance(node, ListConfig) else iter(cast(DictConfig, node))
    for key in keys:
        here = (*path, key)
        try:
            value = node[key]
        except MissingMandatoryValue:
            problems.append(Problem(here, f"{dotted(here)} has no value"))
        except InterpolationKeyError as error:
            name = re.search(r"'([^']*)'", str(error))
            refers = f"refers to {name[1] if name else 'a key'}, which is no key of the configuration"
            text = f"${{{name[1]}}}" if name else "a dollar sign before a brace"
            problems.append(Problem(here, f"{dotted(here)} {refers}; for the text {text} itself write \\{text}"))
        except OmegaConfBaseException as error:
            problems.append(Problem(here, f"{dotted(here)}: {_first_line(error)}; for the text ${{ itself write \\${{"))
        else:
            found.append((key, _resolved(value, here, problems) if isinstance(value, Container) else value))
    return [value for _, value in found] if isinstance(node, ListConfig) else dict(found)


def _as_known(word: str) -> str:
    """A model may be named as on the hub: `model=gemma-4-E2B`."""
    group, _, name = word.partition("=")
    return word.lower() if group == "model" and name.lower() in names("model") else word


def _quoted(word: str) -> str:
    """A path, and the rule of a filter, may hold signs that mean something in an override."""
    name, is_assignment, value = word.partition("=")
    is_text = name.lstrip("+") in PATHS or name.lstrip("+").startswith(FILTERS)
    if not is_assignment or not is_text or value[:1] in ("'", '"'):
        return word
    return f"{name}={_in_quotes(value)}"


def _in_quotes(text: str) -> str:
    return "'{}'".format(text.replace("\\", "\\\\").replace("'", "\\'"))


def _has_gpu() -> bool:
    # Most commands need no tensor: do not wait seconds for torch where no NVIDIA driver is loaded.
    if not Path("/proc/driver/nvidia/version").exists() and not Path("/dev/nvidiactl").exists():
        return False
    import torch

    return torch.cuda.is_available()


# --- what is wrong, and where -----------------------------------------------------------------------------------


def _located(problems: list[Problem], words: list[str], given: list[Override]) -> list[str]:
    """A line for each problem, which begins with the argument or the place in a file that it comes from.

    A value that only refers to another one is not told where that one is.
    """
    files = _files(words)
    lines, of_references = list[str](), list[str]()
    for problem in problems:
        argument = next((one for one in reversed(given) if _gives(one, problem.path)), None)
        if argument:
            lines.append(f"argument {_short(str(argument.input_line))}: {problem.says}")
            continue
        file, line, value = _place(files, problem.path)
        where = f"{_relative(file)}:{line}: " if file else ""
        pattern = r"\$\{[^}]*\$\{" if "refers to" in problem.says else r"(?<!\\)\$\{"
        is_reference = bool(re.search(pattern, value))
        (of_references if is_reference else lines).append(f"{where}{problem.says}")
    return list(dict.fromkeys(lines or of_references))


def _gives(override: Override, path: Keys) -> bool:
    """Whether the override sets the value at `path`, something that holds it, or something in it."""
    pairs = zip(override.key_or_group.split("."), map(str, path), strict=False)
    return not _is_group(override) and all(name == other for name, other in pairs)


def _files(words: list[str]) -> list[tuple[Path, Keys]]:
    """The files that were composed, the later ones over the earlier, each with its place in the tree."""
    loader = GlobalHydra.instance().config_loader()
    found = loader.compute_defaults_list(config_name="config", overrides=words, run_mode=RunMode.RUN)
    files = []
    for default in found.defaults:
        paths = [folder / f"{default.config_path}.yaml" for folder in config_dirs()]
        if file := next((path for path in paths if path.is_file()), None):
            package = default.package or ""
            files.append((file, tuple(package.split(".")) if package not in ("", "_global_") else ()))
    return files


def _place(files: list[tuple[Path, Keys]], path: Keys) -> tuple[Path | None, int, str]:
    """File, line and text of the value at `path`, or of the last section around it that a file has."""
    best: tuple[int, Path | None, int, str] = (-1, None, 0, "")
    for file, package in files:
        if path[: len(package)] != package:
            continue
        node, depth = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader), len(package)
        line, value = 1, ""
        for name in path[depth:]:
            if isinstance(node, yaml.MappingNode):
                pair = next(((key, inner) for key, inner in node.value if key.value == str(name)), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(name, int) and name < len(node.value):
                pair = (node.value[name], node.value[name])
            else:
                pair = None
            if pair is None:
                break
            line, node, depth = pair[0].start_mark.line + 1, pair[1], depth + 1
            value = node.value if isinstance(node, yaml.ScalarNode) else ""
        if depth >= best[0]:
            best = (depth, file, line, value if depth == len(path) else "")
    return best[1:]


def _not_utf8() -> Path:
    """The first configuration file that is not: the error that Hydra lets through does not name it."""
    for file in sorted(file for folder in config_dirs() for file in folder.rglob("*.yaml")):
        try:
            file.read_bytes().decode()
        except UnicodeDecodeError:
            return file
    return CONFIG_DIR


def _relative(file: Path) -> Path:
    return file.relative_to(CONFIG_DIR.parent) if file.is_relative_to(CONFIG_DIR.parent) else file


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # "In 'task/films': ConfigTypeError raised while composing config:" is followed by what went wrong.
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")


def _short(word: str) -> str:
    return word if len(word) <= 100 else f"{word[:100]}…"


def _in_texts(tree: Any, change: Any) -> Any:
    if isinstance(tree, str):
        return change(tree) if "${" in tree else tree
    if isinstance(tree, Mapping):
        return {key: _in_texts(value, change) for key, value in tree.items()}
    return [_in_texts(value, change) for value in tree] if isinstance(tree, list | tuple) else tree


def _renewed(model: type[BaseModel], old: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `old` for the keys that `model` has, with those of `today` for keys that `old` lacks."""
    tree = {}
    for name in model.model_fields:
        if name not in old and name not in today:
            continue
        value, section = old[name] if name in old else today[name], section_of(model, name)
        both = section and isinstance(value, dict) and isinstance(today.get(name), dict)
        tree[name] = _renewed(section, value, today[name]) if section and both else value
    return tree
