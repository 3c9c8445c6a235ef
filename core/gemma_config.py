"""A Gemma's config.json as plain JSON: its family and licence, and Gemma 4's two dialects, which are written together.

In Gemma 4, full-attention layers have heads of another size. Google's files and transformers up to 5.14 say so in two
keys of the whole model, `global_head_dim` and `num_global_key_value_heads`; transformers from 5.15 on writes
`per_layer_config`, by the layer's number, and leaves the old keys out. Readers of other projects know one or the other,
transformers reads both side by side: so both are written (see `write_both_dialects`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import UserError
from core.layer_shapes import FULL, SLIDING

Json = dict[str, Any]
GLOBAL_HEAD_DIM = 512  # of a Gemma 4 whose config.json does not say


@dataclass(frozen=True)
class Family:
    """A generation of Gemma.

    Attributes:
        title: as people call it.
        licence: its key in `core.licence.LICENCES`.
        text: the class of transformers that is the text model alone, for `architectures`.
    """

    title: str
    licence: str
    text: str


# By the `model_type` of the text model: what can be trained here.
FAMILIES = {
    "gemma": Family("Gemma 1", "gemma", "GemmaForCausalLM"),
    "gemma2": Family("Gemma 2", "gemma", "Gemma2ForCausalLM"),
    "gemma3_text": Family("Gemma 3", "gemma", "Gemma3ForCausalLM"),
    "gemma4_text": Family("Gemma 4", "apache-2.0", "Gemma4ForCausalLM"),
    "gemma4_unified_text": Family("Gemma 4", "apache-2.0", "Gemma4UnifiedForCausalLM"),
}
# The `model_type` of a model that also sees or hears: that of the text model inside it.
WHOLE = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
REFUSED = {  # why not
    "gemma3n": "its layers carry four streams and sparse activations, which nothing here computes",
    "vaultgemma": "it could be trained, but nothing here converts or serves it",
}


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family of a text or whole model's config.json; `where` is for the message.

    Raises:
        UserError: it is none that is trained here.
    """
    kind = str(config.get("model_type"))
    text = WHOLE.get(kind, kind) if is_whole(config) == (kind in WHOLE) else ""
    if text in FAMILIES and text_config(config).get("model_type", text) == text:
        return FAMILIES[text]
    known = f"Gemma 1, 2, 3 and 4 (model_type {', '.join([*FAMILIES, *WHOLE])})"
    why = REFUSED.get(kind.removesuffix("_text"))
    says = f"a {kind} model: {why}" if why else f"a model of model_type {kind!r}, which is unknown here"
    raise UserError(f"{where} holds {says}. What is trained: {known}")


def is_whole(config: Mapping[str, Any]) -> bool:
    """Whether it is of a model with towers for images or audio, whose text model stands in `text_config`."""
    return isinstance(config.get("text_config"), dict)


def text_config(config: Mapping[str, Any]) -> Json:
    """The part that describes the text model; the whole of it where that is all."""
    return dict(config["text_config"]) if is_whole(config) else dict(config)


def is_gemma4(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, of a whole model or of its text model, is a Gemma 4's, "unified" included."""
    family = FAMILIES.get(str(text_config(config).get("model_type")))
    return family is not None and family.title == "Gemma 4"


def write_both_dialects(config: Mapping[str, Any]) -> Json:
    """A copy of a Gemma 4's config.json that both kinds of readers understand; that of any other model as it is.

    Args:
        config: of a text model or of a whole one, in either dialect or in both. Keys of layers may be zero-padded.
            Where the dialects disagree, `per_layer_config` counts, as for transformers.

    Raises:
        UserError: layers differ in a way that the old dialect cannot say.
    """
    if not is_gemma4(config):
        return dict(config)
    if is_whole(config):
        return {**config, "text_config": write_both_dialects(config["text_config"])}
    kinds, shape = layer_types(config), _full_attention(config)
    mine = {name: value for name, value in shape.items() if value != config.get(name)}
    return {
        **config,
        "layer_types": kinds,
        "global_head_dim": shape["head_dim"],
        "num_global_key_value_heads": shape["num_key_value_heads"] if config.get("attention_k_eq_v") else None,
        "per_layer_config": {str(number): mine for number, kind in enumerate(kinds) if kind == FULL and mine},
    }


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """`full_attention` or `sliding_attention` for each layer of a Gemma 4's text model."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    count = int(config["num_hidden_layers"])
    return [FULL if number % 6 == 5 or number == count - 1 else SLIDING for number in range(count)]


def _full_attention(config: Mapping[str, Any]) -> Json:
    """`head_dim` and `num_key_value_heads` of the full-attention layers, from whichever dialect is there."""
    shape = {name: config.get(name) for name in ("head_dim", "num_key_value_heads")}
    overrides = config.get("per_layer_config")
    if overrides is None:
        shape["head_dim"] = config.get("global_head_dim") or GLOBAL_HEAD_DIM
        if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads"):
            shape["num_key_value_heads"] = config["num_global_key_value_heads"]
        return shape
    by_layer = {int(number): values for number, values in overrides.items()}
    layers = [{**shape, **by_layer.get(number, {})} for number in range(len(layer_types(config)))]
    full = [layer for layer, kind in zip(layers, layer_types(config), strict=True) if kind == FULL] or [shape]
    sliding = [layer for layer, kind in zip(layers, layer_types(config), strict=True) if kind == SLIDING]
    tells = config.get("attention_k_eq_v") or full[0]["num_key_value_heads"] == shape["num_key_value_heads"]
    if any(layer != full[0] for layer in full) or any(layer != shape for layer in sliding) or not tells:
        raise UserError(
            "per_layer_config of this config.json makes layers differ in more than the heads of full attention, which "
            "no Gemma 4 does; use the published config.json"
        )
    return full[0]
