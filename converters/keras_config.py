"""The settings of KerasHub's Gemmas: `config.json` of a preset, to and from that of transformers.

KerasHub numbers the kinds of its layers by itself (one in two, one in six sees everything), and has no field for the
longest text. A `.weights.h5` alone has no settings at all: they are those that Google published for so many layers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from converters.checkpoint import Lazy
from converters.gguf_metadata import CLASSES as ARCHITECTURES
from converters.gguf_metadata import GELU
from core.errors import UserError

CLASSES = {"gemma": "GemmaBackbone", "gemma2": "GemmaBackbone", "gemma3_text": "Gemma3Backbone"}
EVERY = {"gemma2": 2, "gemma3_text": 6}  # which layer sees everything
# What Google published and no weight shows, for all of a family and by the number of layers.
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
CONTEXT = {18: 32_768, 26: 32_768}  # of Gemma 3 270M and 1B; the longest text of others is transformers' default


def published(
    family: str, tensors: Mapping[str, Lazy], heads: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, Any]:
    """The settings of a file without any, in KerasHub's words: sizes by its tensors, the rest as Google published."""
    layers = sum(name.endswith("self_attn.q_proj.weight") for name in tensors)
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


def read_config(settings: Any, family: str, tensors: Mapping[str, Lazy], where: Path) -> dict[str, Any]:
    """`config.json` of transformers from the `settings` of a backbone of KerasHub."""
    try:
        layers, heads, head_dim = settings["num_layers"], settings["num_query_heads"], settings["head_dim"]
        fused = 1 if family == "gemma3_text" else 2
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
            raise UserError(f"{where} is of an embedding model, which writes no text")
        if family == "gemma":
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
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{where} does not describe a Gemma of KerasHub ({type(error).__name__}: {error})") from None
    return json.loads(config.to_json_string()) | {"architectures": [ARCHITECTURES[family]]}


def _rope(theta: float, factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    return {**scaling, "rope_theta": theta}


def _layer_types(family: str, layers: int, window: bool) -> list[str]:
    every = EVERY[family]
    return ["sliding_attention" if window and n % every < every - 1 else "full_attention" for n in range(layers)]


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """A backbone's settings in KerasHub's words."""
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
    if named := [what for what, there in missing.items() if there]:
        raise UserError(f"KerasHub has no setting for what this {family} needs: {', '.join(named)}")
    return found
