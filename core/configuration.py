"""From the words of a command line to one resolved configuration, or to a sentence that says what is wrong.

Every command (`python -m commands.data`, `training`, `evaluation`, `converters`) takes Hydra overrides such as
`task=slang model=gemma-2-2b task.train.epochs=5 +experiment=attempt2`, so a run is described the same way
everywhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import UserError

PATHS = ("task.data.source", "model.path", "data_dir", "runs_dir", "run")
CONFIG_DIR = Path(__file__).resolve().parents[1] / "nemo_configs"


def names(group: str) -> list[str]:
    """The names a config group knows, e.g. `names("task")` → `["slang", ...]`."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def load_config(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose `config.yaml` with `overrides` and resolve every interpolation.

    `trainer` follows the machine unless named: `gpu` where CUDA is usable, else `cpu`.

    Raises:
        UserError: an unknown name or key, a malformed override, or a value that is missing.
    """
    words = [_quoted(word) for word in overrides]
    if not any(word.startswith("trainer=") for word in words):
        words.append(f"trainer={_device()}")
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = compose("config", overrides=words)
        OmegaConf.resolve(config)
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        raise UserError(f"unknown {group} '{name}'. Known: {', '.join(names(group))}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration: {error}") from None
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise UserError(f"configuration: no value for {', '.join(sorted(missing))}")
    return config


def _quoted(word: str) -> str:
    """A path may hold signs that mean something in an override."""
    name, is_assignment, value = word.partition("=")
    if not is_assignment or name.lstrip("+") not in PATHS or value[:1] in ("'", '"'):
        return word
    return "{}='{}'".format(name, value.replace("\\", "\\\\").replace("'", "\\'"))


def plain(config: DictConfig) -> dict[str, Any]:
    """A section of the configuration as an ordinary dictionary."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _device() -> str:
    # Most commands need no tensor: do not wait seconds for torch where no NVIDIA driver is loaded.
    if not Path("/proc/driver/nvidia/version").exists() and not Path("/dev/nvidiactl").exists():
        return "cpu"
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"
