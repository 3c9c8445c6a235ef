"""A PEFT adapter folder, `adapter_config.json` and `adapter_model.safetensors`: peft's, Unsloth's, TRL's, AutoModel's.

Names and shapes, for a linear layer [out, in] and rank r:

    base_model.model.model.layers.N.<layer>.lora_A.weight           [r, in]
    base_model.model.model.layers.N.<layer>.lora_B.weight           [out, r]
    base_model.model.model.layers.N.<layer>.lora_magnitude_vector   [out], DoRA

The E experts of a layer are two parameters of one module, which peft adapts by `target_parameters`; expert e has rows
e·r to e·r + r of A and columns e, e + E, e + 2E … of B:

    ….layers.N.experts.base_layer.lora_{A,B}.weight   [E·r, in], [out, E·r], of gate_up_proj
    ….layers.N.experts.lora_{A,B}.weight              the same of down_proj, or of the only one that is adapted

peft's class of a whole Gemma 4, which sees and hears, has `model.language_model.` for `model.` in all names. An adapter
of one class that is loaded onto the other changes nothing, and peft only warns: see `Adapter.whole`.

Names written by other tools are normalized to those of the text model: a whole model's (`language_model.`), a raw
state dict's (`lora_A.default.weight`), target modules as a pattern. Ranks and alphas by pattern are looked up under the
names that the file has, as peft does, and kept by layer (`patterns`). Values and dtypes stay. Only adapters that can be
merged into the base's matrices are accepted: no biases, no fully trained layers beside the LoRA, no variants of LoRA
that change the base or depend on the input.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from converters.byte_ranges import whole_file
from converters.checkpoint import Adapter, Checkpoint, LazyTensor, in_memory
from converters.hf import read_prompt, write_json
from converters.safetensors_file import read_tensors, write_tensors
from converters.torch_file import read_tensors as read_torch_file
from core.base_model import hub_origin
from core.errors import UserError
from core.files import read_json
from core.gemma_config import is_gemma4

TITLE = "PEFT adapter folder"
TRIED = "peft 0.21.2"
READS = {Adapter}
WRITES = {Adapter: ""}

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "conversion.json"
OLD_WEIGHTS = "adapter_model.bin"  # before peft wrote safetensors
HUB = "https://huggingface.co/"
PREFIX = "base_model.model."
# The layer, and which of its tensors.
LORA_TENSOR = re.compile(
    r"base_model\.model\.(model\.(?:layers\.\d+\.(?:(?:self_attn|mlp)\.\w+_proj|per_layer_input_gate|per_layer_projection"
    r"|router\.proj|experts(?:\.base_layer)?)|per_layer_model_projection))\.lora_(A|B|magnitude_vector)(?:\.weight)?"
)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")  # inner and outer of peft's two wrappers around one module
OF_TOWERS = re.compile(r"\.(vision_\w+|audio_\w+|multi_modal_projector|embed_vision|embed_audio)\.")
OF_THE_TEXT = re.compile(r"(?:model\\?\.language_model|language_model\\?\.model)(?=\\?\.(?:layers|per_layer_))")
# Settings that decide what a LoRA computes ...
COMPUTED: dict[str, Any] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": bool,
    "use_dora": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "target_parameters": list,
}
# ... and those that do not: origin, initialization, target modules (which the tensors show).
IRRELEVANT = {
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
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "velora_config",  # of the backward pass
    "fan_in_fan_out",  # of layers that no Gemma has
    "bias",  # a Gemma has none
}
BY_PEFT = (
    "let peft merge it, PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(OUT), and convert "
    "OUT"
)
ONLY_IN_PEFT = "no weights are the same as it, so that it runs in peft alone"
# What else there is → what it is, and what to do with it.
OTHERS = {
    "modules_to_save": f"whole layers were trained beside the LoRA: {BY_PEFT}",
    "trainable_token_indices": f"rows of the embedding were trained beside the LoRA: {BY_PEFT}",
    "lora_bias": f"it adds biases, which no Gemma has: {ONLY_IN_PEFT}",
    "layer_replication": f"it repeats layers of its base: {ONLY_IN_PEFT}",
    "alora_invocation_tokens": f"it is an activated LoRA, which acts only after certain tokens: {ONLY_IN_PEFT}",
    "arrow_config": f"it chooses among adapters for each token: {ONLY_IN_PEFT}",
    "use_qalora": f"it averages what goes into a layer: {ONLY_IN_PEFT}",
}
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # as init_lora_weights


def recognizes(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read(path: Path) -> Adapter:
    settings = read_json(path / CONFIG)
    given = {name: tensor.read() for name, tensor in _stored(path).items()}
    given = _without_towers(given, path)
    modules = {_module(peft_name(name)): _module(name) for name in given}
    tensors = {peft_name(name): tensor for name, tensor in given.items()}
    if len(tensors) < len(given):
        raise UserError(f"{path} holds tensors of one layer under several names; save the adapter again, with peft")
    base, dtype, quantization = recorded(path)
    if not (path / RECORD).exists():
        base = base_named(settings.get("base_model_name_or_path"), settings.get("revision"))
    return Adapter(
        lora_settings(settings, tensors, path / CONFIG, modules),
        tensors,
        base,
        None,
        read_prompt(path),
        dtype,
        quantization,
        as_stored=(settings, given),
    )


def write(content: Checkpoint | Adapter, target: Path) -> None:
    assert isinstance(content, Adapter)
    target.mkdir()
    named = whole_name if content.whole else str
    tensors = {named(name): in_memory(tensor) for name, tensor in content.tensors.items()}
    write_tensors(target / WEIGHTS, tensors)
    config = LoraConfig(task_type="CAUSAL_LM", **(_for_the_whole(content) if content.whole else content.peft))
    source = content.base.get("source", "")
    # A hub id where there is one, so that peft finds the base on any machine; but there, a Gemma 4 is a whole model.
    on_hub = source.startswith(HUB) and (content.whole or not is_gemma4(content.config or {}))
    config.base_model_name_or_path = source.removeprefix(HUB) if on_hub else content.base.get("folder", source)
    config.revision = content.base.get("revision") if on_hub else None
    config.inference_mode = True
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_json(target / CONFIG, values)
    if content.prompt:
        content.prompt.save(target)


def _stored(path: Path) -> Mapping[str, LazyTensor]:
    """The tensors of the folder, of a file of torch too, of which no pickle code is run."""
    if not (path / WEIGHTS).exists() and (path / OLD_WEIGHTS).exists():
        return read_torch_file(whole_file(path / OLD_WEIGHTS))
    if not (path / WEIGHTS).exists():
        raise UserError(f"{path / WEIGHTS} is missing; save the adapter again, with model.save_pretrained(FOLDER)")
    return read_tensors(path / WEIGHTS)


def _without_towers(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`tensors` without those on what sees or hears, which a training with texts alone leaves without effect.

    Raises:
        UserError: they have one.
    """
    towers = {name: part[1] for name in tensors if (part := OF_TOWERS.search(name)) and ".lora_" in name}
    if any(".lora_B" in name and tensors[name].any() for name in towers):
        raise UserError(
            f"{path} adapts what sees or hears too ({', '.join(sorted({*towers.values()}))}), and only text models are "
            f"converted; use it in peft, or train with target_modules that name language layers alone"
        )
    if towers:
        print(f"{path} has {len(towers)} tensors without effect, for {', '.join(sorted({*towers.values()}))}: left out")
    return {name: tensor for name, tensor in tensors.items() if name not in towers}


def recorded(path: Path) -> tuple[dict[str, str], str | None, dict[str, Any] | None]:
    """The base with its hash, the dtype and the quantization of training, if `path` is an export of this project."""
    if not (path / RECORD).exists():
        return {}, None, None
    record: dict[str, Any] = read_json(path / RECORD)
    base: Any = record.get("base")
    dtype, quantization = record.get("dtype"), record.get("quantization")
    known = isinstance(base, dict) and isinstance(dtype, str | None)  # an adapter from KerasHub has no dtype
    if not known or not all(isinstance(text, str) for text in base.values()):
        raise UserError(f"{path / RECORD} is damaged; delete it to read the adapter as one of another tool")
    return base, dtype, quantization if isinstance(quantization, dict) else None


def base_named(name: Any, revision: Any) -> dict[str, str]:
    """The base that a configuration names, on the hub or as a folder, without a hash; empty if it names none."""
    if not isinstance(name, str) or not name:
        return {}
    if origin := hub_origin(Path(name)):
        return {"name": origin.name, "source": origin.source, "revision": origin.revision}
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    base = {"name": Path(name).name, "source": HUB + name if on_hub else name}
    return {**base, "revision": revision} if isinstance(revision, str) else base


def peft_name(name: str) -> str:
    """peft's name of a tensor of the text model, from the name that another tool gave it."""
    name = OF_THE_TEXT.sub("model", name.replace(".default.", ".").removesuffix(".default"))
    name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    return name if name.startswith(PREFIX) else PREFIX + name


def _module(name: str) -> str:
    """The name of the module that has the tensor `name`, without what peft puts around it."""
    return re.sub(r"\.lora_(?:A|B|magnitude_vector)(?:\..*)?$", "", name.removeprefix(PREFIX))


def whole_name(name: str) -> str:
    """The name of a layer or tensor in the class of a whole model, from its name in that of the text model."""
    return re.sub(r"(^|\.|\^)model(?=\\?\.(?:layers|per_layer_))", r"\1model.language_model", name)


def _for_the_whole(content: Adapter) -> dict[str, Any]:
    """The settings of an adapter for the whole model, with every layer by its full name: towers have a q_proj too."""
    layers = {LORA_TENSOR.sub(r"\1", name) for name in content.tensors}
    patterns: dict[str, Any] = {
        key: {whole_name(name): value for name, value in content.peft[key].items()}
        for key in ("rank_pattern", "alpha_pattern")
        if key in content.peft
    }
    targets = sorted(whole_name(layer) for layer in layers if ".experts" not in layer)
    return {**content.peft, **patterns, "target_modules": targets}


def lora_settings(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path, modules: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The settings that decide what the LoRA of `tensors` computes, with its layers as `target_modules`.

    Args:
        settings: of an `adapter_config.json`.
        where: for error messages.
        modules: layer → the name under which the file has it, which patterns of ranks and alphas are made for.

    Raises:
        UserError: it cannot be merged into the base's matrices, or a value has a wrong type.
    """
    kind = settings.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        raise UserError(f"{where}: peft_type is {kind}, and only LoRA is converted; if peft can, {BY_PEFT}")
    initialization = settings.get("init_lora_weights", True)
    if isinstance(initialization, str) and initialization.lower().startswith(CHANGE_THE_BASE):
        raise UserError(
            f"{where}: init_lora_weights is {initialization!r}, which changes the base too. Save it with "
            f"path_initial_model_for_weight_conversion, which makes a plain LoRA, and convert that"
        )
    for key, value in settings.items():
        if value and key not in IRRELEVANT and key not in COMPUTED:
            what = OTHERS.get(key, f"only plain LoRA, rsLoRA and DoRA are converted; if peft can, {BY_PEFT}")
            raise UserError(f"{where}: {key} is set ({_shown(value)}); {what}")
    peft = {key: settings[key] for key in COMPUTED if settings.get(key) is not None}
    for key, value in peft.items():
        if not isinstance(value, COMPUTED[key]) or (isinstance(value, bool) and COMPUTED[key] is not bool):
            raise UserError(f"{where}: {key} is {_shown(value)}, which is no value for it")
    given = {key: peft.pop(key, {}) for key in ("rank_pattern", "alpha_pattern")}
    for key, values in given.items():
        for name, value in values.items():
            if not _is_quick(name) or isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{where}: {key} has {name[:60]!r}; a layer's name or a simple pattern was expected")
            if not 0 < value <= 65_536:
                raise UserError(f"{where}: {key} has {value} for {name[:60]!r}; a positive number was expected")
    if not 0 < peft.get("r", 0) <= 65_536 or not 0 < abs(peft.get("lora_alpha", 0)) <= 65_536:
        raise UserError(f"{where}: r and lora_alpha must be given and positive, and at most 65,536")
    for name in tensors:
        if not LORA_TENSOR.fullmatch(name):
            raise UserError(
                f"{where.parent}: {name} is not part of a LoRA on a linear layer of Gemma, and nothing else is "
                f"converted; {BY_PEFT}"
            )
    layers = {LORA_TENSOR.sub(r"\1", name) for name in tensors}
    peft.pop("target_parameters", None)
    if any(".experts" in layer for layer in layers):
        peft["target_parameters"] = _target_parameters(settings.get("target_parameters") or [], layers, where)
    theirs = {adapted(layer, peft): adapted((modules or {}).get(layer, layer), peft) for layer in layers}
    for (key, values), default in zip(given.items(), (peft["r"], peft["lora_alpha"]), strict=True):
        found = {layer: values.get(get_pattern_key(values.keys(), name), default) for layer, name in theirs.items()}
        peft |= {key: by_layer} if (by_layer := patterns(found, default)) else {}
    targets = target_modules(layer for layer in layers if ".experts" not in layer)
    return {**peft, "bias": "none", "target_modules": targets}


def adapted(module: str, peft: Mapping[str, Any]) -> str:
    """What the LoRA of `module` adapts: the module itself, or the parameter of experts, of which the inner wrapper
    holds the first of two."""
    if not module.removesuffix(".base_layer").endswith(".experts"):
        return module
    names = {target.rpartition(".")[2] for target in peft.get("target_parameters") or []}
    inner = module.endswith(".base_layer")
    name = "gate_up_proj" if inner or names == {"gate_up_proj"} else "down_proj"
    return f"{module.removesuffix('.base_layer')}.{name}"


def patterns(values: Mapping[str, float], default: float) -> dict[str, float]:
    """peft's `rank_pattern` or `alpha_pattern` for `values` by layer, of which each names its layers and no other: by
    the last part of their names where all layers of that name agree, else by the whole names."""
    agreed: dict[str, set[float]] = {}
    for layer, value in values.items():
        agreed.setdefault(layer.rpartition(".")[2], set()).add(value)
    named = ((layer.rpartition(".")[2], layer, value) for layer, value in sorted(values.items()) if value != default)
    return {short if len(agreed[short]) == 1 else layer: value for short, layer, value in named}


def _is_quick(pattern: str) -> bool:
    """Whether `pattern` is a regular expression that cannot take forever on a layer's name: without repeated groups."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(pattern) <= 500 and not re.search(r"\)[*+{]", pattern) and len(re.findall(r"[*+{]", pattern)) <= 5


def _target_parameters(given: list[Any], layers: set[str], where: Path) -> list[str]:
    """Which parameters of the experts the LoRA of `layers` adapts, as peft names them: `experts.down_proj` …

    Raises:
        UserError: the tensors are not those of `given`, the adapter's own target_parameters.
    """
    found = [name for name in EXPERTS if any(f".{target}".endswith(f".{name}") for target in given)]
    both = {layer.removesuffix(".base_layer") for layer in layers if layer.endswith(".experts.base_layer")}
    some = {layer for layer in layers if layer.endswith(".experts")}
    unknown = [target for target in given if not str(target).endswith(EXPERTS)]
    if unknown or not found or both != (some if len(found) == 2 else set()):
        raise UserError(
            f"{where}: target_parameters is {str(given)[:80]}, which does not say what the LoRA of the experts in "
            f"{WEIGHTS} adapts; {' and '.join(EXPERTS)} are known"
        )
    return target_modules(layer.removesuffix("experts") + name for layer in some for name in found)


def _shown(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float) else type(value).__name__


def name_targets(peft: Mapping[str, Any], layers: Iterable[str], weights: Iterable[str]) -> dict[str, Any]:
    """The settings `peft`, with targets that name `layers` and no other layer of a base with these `weights`.

    Args:
        layers: linear layers, and parameters of experts (`model.layers.0.experts.down_proj`).
        weights: names of the base's tensors.
    """
    layers, known = set(layers), [name.removesuffix(".weight") for name in weights]
    experts = {layer for layer in layers if ".experts." in layer}
    parameters = {"target_parameters": target_modules(experts, known)} if experts else {}
    return {**peft, "target_modules": target_modules(layers - experts, known), **parameters}


def target_modules(layers: Iterable[str], known: Iterable[str] | None = None) -> list[str]:
    """peft's `target_modules` for `layers` (`model.layers.0.self_attn.q_proj` …): short names where these are all that
    the base has of that name, else full names.

    Args:
        known: layers of the base; without them, all decoder layers are taken to have what one of `layers` names.
    """
    full = set(layers)
    places = _places(full)
    if known is None:
        every = set().union(*places.values()) - {""}
        has = {name: numbers if "" in numbers else every for name, numbers in places.items()}
    else:
        has = _places(known)
    if all(numbers == has.get(name) for name, numbers in places.items()):
        return sorted(places)
    return sorted(full)


def _places(layers: Iterable[str]) -> dict[str, set[str]]:
    """Short name → the numbers of the decoder layers that have it, or {""} for what is in none."""
    places: dict[str, set[str]] = {}
    for layer in layers:
        part = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(.+)", layer)
        places.setdefault(part[2] if part else layer, set()).add(part[1] if part else "")
    return places
