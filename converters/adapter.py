"""A PEFT adapter folder, `adapter_config.json` and `adapter_model.safetensors`: peft's, Unsloth's, TRL's, AutoModel's.

Names and shapes, for a linear layer [out, in] and rank r:

    base_model.model.model.layers.N.<layer>.lora_A.weight           [r, in]
    base_model.model.model.layers.N.<layer>.lora_B.weight           [out, r]
    base_model.model.model.layers.N.<layer>.lora_magnitude_vector   [out], DoRA

Tools differ in the rest, and what they write is brought to these names: Unsloth's for a Gemma 3 that also sees images
(`language_model.`), a raw state dict's (`lora_A.default.weight`), target modules as a pattern. Values and dtypes stay.
Only what folds into the base's matrices is taken: no biases, no whole layers beside the LoRA, no variants of LoRA that
change the base or depend on the input.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from converters.checkpoint import Adapter, Checkpoint, of_memory
from converters.hf import read_json, read_prompt, write_json
from converters.safetensors_file import read_tensors, write_tensors
from core.errors import UserError

TITLE = "PEFT adapter folder"
READS = {Adapter}
WRITES = {Adapter: ""}

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "conversion.json"
HUB = "https://huggingface.co/"
PREFIX = "base_model.model."
# A layer's place, and which of its parts.
PART = re.compile(
    r"base_model\.model\.(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.lora_(A|B|magnitude_vector)(?:\.weight)?"
)
# Settings that say what a LoRA computes ...
COMPUTED: dict[str, Any] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "bias": str,
    "use_rslora": bool,
    "use_dora": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}
# ... and those that say nothing of it: where it comes from, how it began, which layers it has (its tensors tell).
SILENT = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "runtime_config",
    "qalora_group_size",
    "init_lora_weights",
    "ensure_weight_tying",
}
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # as init_lora_weights


def recognizes(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read(path: Path) -> Adapter:
    settings = read_json(path / CONFIG)
    if not (path / WEIGHTS).exists():
        raise UserError(f"{path / WEIGHTS} is missing; save the adapter with safe_serialization=True")
    tensors = {our_name(name): tensor.read() for name, tensor in read_tensors(path / WEIGHTS).items()}
    base: Any = _base_of(settings)
    dtype = quantization = None
    if (path / RECORD).exists():  # ours: it has the base's hash too
        ours = read_json(path / RECORD)
        base, dtype, quantization = (ours.get(key) for key in ("base", "dtype", "quantization"))
        known = isinstance(base, dict) and isinstance(dtype, str | None)  # KerasHub does not say a dtype
        if not known or not all(isinstance(text, str) for text in base.values()):
            raise UserError(f"{path / RECORD} is damaged; without it, the adapter is read as one of another tool's")
    return Adapter(
        plain_lora(settings, tensors, path / CONFIG),
        tensors,
        base,
        None,
        read_prompt(path),
        dtype,
        quantization if isinstance(quantization, dict) else None,
    )


def write(content: Checkpoint | Adapter, target: Path) -> None:
    assert isinstance(content, Adapter)
    target.mkdir()
    tensors = {name: of_memory(tensor) for name, tensor in content.tensors.items()}
    write_tensors(target / WEIGHTS, tensors)
    config = LoraConfig(task_type="CAUSAL_LM", **content.peft)
    source = content.base.get("source", "")
    # A hub id where there is one: peft then finds the base on any machine.
    on_hub = source.startswith(HUB)
    config.base_model_name_or_path = source.removeprefix(HUB) if on_hub else content.base.get("folder", source)
    config.revision = content.base.get("revision") if on_hub else None
    config.inference_mode = True
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_json(target / CONFIG, values)
    if content.prompt:
        content.prompt.save(target)


def _base_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """What `adapter_config.json` says of the base: a name on the hub, or a folder; no hash."""
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        return {}
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    base = {"name": Path(name).name, "source": HUB + name if on_hub else name}
    return {**base, "revision": revision} if isinstance(revision, str) else base


def our_name(name: str) -> str:
    """peft's name of a tensor, from what other tools call it."""
    name = (
        name.replace(".default.", ".").removesuffix(".default").replace("model.language_model.layers.", "model.layers.")
    )
    name = name.replace("language_model.model.layers.", "model.layers.")
    name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    return name if name.startswith(PREFIX) else PREFIX + name


def plain_lora(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """The keys of `settings` that say what the LoRA of `tensors` computes, with its layers as `target_modules`.

    Raises:
        UserError: it is of a kind that does not fold into the base's matrices; a value of a wrong type.
    """
    kind = settings.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        raise UserError(f"{where}: peft_type is {kind}; only LoRA can be converted")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{where}: bias is {settings['bias']!r}; only LoRA without biases can be converted")
    begun = settings.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower().startswith(CHANGE_THE_BASE):
        raise UserError(
            f"{where}: init_lora_weights is {begun!r}, which changes the base too. Save it with "
            f"path_initial_model_for_weight_conversion, which makes a plain LoRA, and convert that"
        )
    for key, value in settings.items():
        if value and key not in SILENT and key not in COMPUTED:
            raise UserError(
                f"{where}: {key} is set ({_shown(value)}); only plain LoRA, rsLoRA "
                f"and DoRA fold into a base and can be converted"
            )
    peft = {key: settings[key] for key in COMPUTED if settings.get(key) is not None}
    for key, value in peft.items():
        if not isinstance(value, COMPUTED[key]) or (isinstance(value, bool) and COMPUTED[key] is not bool):
            raise UserError(f"{where}: {key} is {_shown(value)}, which is no value for it")
    for key in ("rank_pattern", "alpha_pattern"):
        for name, value in peft.get(key, {}).items():  # a name, or its end: not any pattern that takes forever to match
            if not re.fullmatch(r"[\w.^\\]+", name) or not isinstance(value, int | float) or not 0 < value <= 65_536:
                raise UserError(f"{where}: {key} has {name[:60]!r}; a layer's name and a positive number were expected")
    if not 0 < peft.get("r", 0) <= 65_536 or not abs(peft.get("lora_alpha", 0)) > 0:
        raise UserError(f"{where}: r and lora_alpha must be given and positive")
    for name in tensors:
        if not PART.fullmatch(name):
            raise UserError(
                f"{where.parent}: {name} is not part of a LoRA on a linear layer of Gemma; such an adapter "
                f"cannot be folded into its base or converted"
            )
    return {**peft, "target_modules": targets(PART.sub(r"\1", name) for name in tensors)}


def _shown(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float) else type(value).__name__


def targets(layers: Iterable[str]) -> list[str]:
    """`target_modules` for `layers` (`model.layers.0.self_attn.q_proj` …): short names where every layer has them."""
    places: dict[str, set[str]] = {}
    full = set(layers)
    for layer in full:
        _, _, number, _, name = layer.split(".")
        places.setdefault(name, set()).add(number)
    everywhere = set().union(*places.values())
    if all(numbers == everywhere for numbers in places.values()):
        return sorted(places)
    return sorted(full)
