"""The configuration of KerasHub's Gemmas: `config.json` of a preset, from and to that of transformers.

KerasHub decides by itself which layers have full attention (one in two, one in six), and has no field for
max_position_embeddings. A `.weights.h5` alone has no configuration: it is the one that Google published for this number
of layers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from converters import keras_gemma4
from converters.checkpoint import LazyTensor
from converters.gguf_metadata import CLASSES as ARCHITECTURES
from converters.gguf_metadata import GELU
from core.errors import UserError

CLASSES = {"gemma": "GemmaBackbone", "gemma2": "GemmaBackbone", "gemma3_text": "Gemma3Backbone"}
CLASSES |= dict.fromkeys(keras_gemma4.FAMILIES, "Gemma4Backbone")
EVERY = {"gemma2": 2, "gemma3_text": 6}  # one layer in so many has full attention
# What Google published and the weights do not show, for a family and by number of layers.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {
        "attention_logit_soft_cap": 50.0,
        "final_logit_soft_cap": 30.0,
        "use_sliding_window_attention": True,
        "sliding_window_size": 4096,
    },
    "gemma3_text": {
        "use_sliding_window_attention": True,
        "sliding_window_size": 1024,
        "global_rope_scaling_factor": 8.0,
    },
}
SMALL = {"sliding_window_size": 512, "global_rope_scaling_factor": 1.0}
OF_LAYERS: dict[str, dict[int, dict[str, Any]]] = {
    "gemma": {18: {}, 28: {}},
    "gemma2": {26: {}, 42: {}, 46: {"query_head_dim_normalize": False}},
    "gemma3_text": {18: SMALL, 26: SMALL, 34: {}, 48: {}, 62: {"query_head_dim_normalize": False}},
}
CONTEXT = {18: 32_768, 26: 32_768}  # max_position_embeddings of Gemma 3 270M and 1B; the others have 131,072


def published(
    family: str, tensors: Mapping[str, LazyTensor], heads: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, Any]:
    """The configuration of a file without one, with KerasHub's names: sizes from its tensors, the rest as published."""
    layers = sum(name.endswith("self_attn.q_proj.weight") for name in tensors)
    if family in keras_gemma4.FAMILIES:
        raise UserError(
            f"{path} is a Gemma 4's, whose settings are in config.json of the KerasHub preset: convert that folder"
        )
    if layers not in OF_LAYERS[family]:
        raise UserError(
            f"{path} has {layers} layers, as no published {family} has. Its settings are in config.json of "
            f"the KerasHub preset: convert that folder"
        )
    try:
        (vocabulary, width), (inner, _) = (
            tensors[name].shape for name in ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight")
        )
        (queries, _, head_dim), (keys, *_) = heads["q_proj"], heads["k_proj"]
    except (KeyError, ValueError):
        raise UserError(f"{path} is no whole Gemma: parts of it or of its first layer are missing") from None
    sizes = {
        "vocabulary_size": vocabulary,
        "num_layers": layers,
        "num_query_heads": queries,
        "head_dim": head_dim,
        "num_key_value_heads": keys,
        "hidden_dim": width,
        "intermediate_dim": inner if family == "gemma3_text" else 2 * inner,
    }
    return sizes | PUBLISHED[family] | OF_LAYERS[family][layers]


def read_config(settings: Any, family: str, tensors: Mapping[str, LazyTensor], where: Path) -> dict[str, Any]:
    """`config.json` of transformers from the `settings` of a backbone of KerasHub."""
    try:
        layers, heads, head_dim = settings["num_layers"], settings["num_query_heads"], settings["head_dim"]
        of_4 = family in keras_gemma4.FAMILIES
        fused = 1 if of_4 or family == "gemma3_text" else 2
        found = {
            "vocab_size": settings["vocabulary_size"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": settings["num_key_value_heads"],
            "hidden_size": settings["hidden_dim"],
            "intermediate_size": settings["intermediate_dim"] // fused,
            "head_dim": head_dim,
            "rms_norm_eps": settings.get("layer_norm_epsilon", 1e-6),
            "dtype": str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        }
        caps = {
            "attn_logit_softcapping": settings.get("attention_logit_soft_cap"),
            "final_logit_softcapping": settings.get("final_logit_soft_cap"),
        }
        window = settings.get("use_sliding_window_attention", False)
        if settings.get("is_embedding_model") or settings.get("use_bidirectional_attention"):
            raise UserError(f"{where} is of an embedding model, which does not generate text")
        if of_4:
            found |= keras_gemma4.read_settings(settings)
        elif family == "gemma":
            if window or any(caps.values()):
                raise UserError(
                    f"{where} asks a Gemma 1 for sliding windows or soft-capping, which transformers' has not"
                )
        else:
            found |= caps | {
                "sliding_window": settings["sliding_window_size"],
                "layer_types": _layer_types(family, layers, window),
                "query_pre_attn_scalar": head_dim
                if settings.get("query_head_dim_normalize", True)
                else found["hidden_size"] // heads,
            }
        if family == "gemma3_text":
            found["rope_parameters"] = {
                "full_attention": _rope(1e6, settings.get("global_rope_scaling_factor", 1.0)),
                "sliding_attention": _rope(1e4, settings.get("local_rope_scaling_factor", 1.0)),
            }
            found["max_position_embeddings"] = CONTEXT.get(layers, 131_072)
        tokens = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}  # of every Gemma
        config = AutoConfig.for_model(family, **found, **tokens)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{where} does not describe a Gemma of KerasHub ({type(error).__name__}: {error})") from None
    return json.loads(config.to_json_string()) | {"architectures": [ARCHITECTURES[family]]}


def _rope(theta: float, factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    return {**scaling, "rope_theta": theta}


def _layer_types(family: str, layers: int, window: bool) -> list[str]:
    every = EVERY[family]
    return ["sliding_attention" if window and n % every < every - 1 else "full_attention" for n in range(layers)]


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """The configuration of a backbone, with KerasHub's names.

    Raises:
        UserError: the model needs something that KerasHub has no setting for.
    """
    family = config.model_type
    of_4 = family in keras_gemma4.FAMILIES
    found, missing = keras_gemma4.settings_of(config) if of_4 else _settings_of(config)
    if named := [what for what, there in missing.items() if there]:
        raise UserError(f"KerasHub has no setting for what this {family} needs: {', '.join(named)}")
    return found


def _settings_of(config: PretrainedConfig) -> tuple[dict[str, Any], dict[str, bool]]:
    family, rope = config.model_type, config.rope_parameters
    of_3 = family == "gemma3_text"
    found = {
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_query_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_dim": config.hidden_size,
        "intermediate_dim": config.intermediate_size * (1 if of_3 else 2),
        "head_dim": config.head_dim,
        "layer_norm_epsilon": config.rms_norm_eps,
        "dropout": 0,
        "dtype": str(config.dtype).removeprefix("torch."),
    }
    local, whole = rope.get("sliding_attention", rope), rope.get("full_attention", rope)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    missing = {
        "another activation": activation not in GELU,
        "biases": config.attention_bias,
        "attention to later tokens": bool(getattr(config, "use_bidirectional_attention", False)),
        "another RoPE": (local["rope_theta"], whole["rope_theta"]) != (1e4, 1e6 if of_3 else 1e4)
        or any(part["rope_type"] not in (("default", "linear") if of_3 else ("default",)) for part in (local, whole)),
    }
    if family != "gemma":
        window = "sliding_attention" in config.layer_types
        scalars = {config.head_dim: True, config.hidden_size // config.num_attention_heads: False}
        found |= {
            "query_head_dim_normalize": scalars.get(config.query_pre_attn_scalar),
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "attention_logit_soft_cap": config.attn_logit_softcapping,
            "final_logit_soft_cap": config.final_logit_softcapping,
            "use_sliding_window_attention": window,
            "sliding_window_size": config.sliding_window,
        }
        missing["another query_pre_attn_scalar"] = config.query_pre_attn_scalar not in scalars
        missing["another order of layers that see everything"] = (
            _layer_types(family, config.num_hidden_layers, window) != config.layer_types
        )
    if of_3:
        found |= {
            "image_size": None,
            "vision_encoder": None,
            "use_query_key_norm": True,
            "local_rope_scaling_factor": local.get("factor", 1.0),
            "global_rope_scaling_factor": whole.get("factor", 1.0),
        }
    return found, missing
