"""What KerasHub's preset of a Gemma 4 has beside those of Gemma 1 to 3 (see `keras`): places, and its configuration.

All sizes are one class there, the 12B ("unified") too: its text model is a 31B's. With E experts of f values:

- `embedding` and `dense` are the table of per-layer embeddings and the projection [d, layers · p] that is added to it.
  Its norm comes before the last one in `rms_normalization`, `rms_normalization_1`.
- `layer_scalar` [1] of a layer is a number, in the layer's own `vars/0`.
- `moe_expert_bank/vars` 0 to 3: gate and up [E, d, f], which are one tensor in transformers, down [E, f, d], and a
  scale for each expert [E]. `moe_router/vars/0` is the router's scale [d], `moe_router/proj` its matrix [d, E].
- A layer that borrows keys and values has no places for them, and one whose values are its keys none for values.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

from converters.checkpoint import LazyTensor
from core.layer_shapes import FULL, SLIDING, layer_shapes

FAMILIES = ("gemma4_text", "gemma4_unified_text")
BLOCK = "gemma4_text_decoder_block"
# transformers' name of a tensor of a layer → KerasHub's places, in the order in which they are joined.
PARTS = {
    "layer_scalar": ["vars/0"],
    "per_layer_input_gate.weight": ["per_layer_input_gate/vars/0"],
    "per_layer_projection.weight": ["per_layer_up_proj/vars/0"],
    "post_per_layer_input_norm.weight": ["post_per_layer_input_norm/vars/0"],
    "post_feedforward_layernorm_1.weight": ["post_ffw_norm_dense/vars/0"],
    "pre_feedforward_layernorm_2.weight": ["pre_ffw_norm_moe/vars/0"],
    "post_feedforward_layernorm_2.weight": ["post_ffw_norm_moe_path/vars/0"],
    "router.scale": ["moe_router/vars/0"],
    "router.proj.weight": ["moe_router/proj/vars/0"],
    "router.per_expert_scale": ["moe_expert_bank/vars/3"],
    "experts.gate_up_proj": ["moe_expert_bank/vars/0", "moe_expert_bank/vars/1"],
    "experts.down_proj": ["moe_expert_bank/vars/2"],
}
CONTEXT = {True: 131_072, False: 262_144}  # max_position_embeddings as published: with per-layer embeddings, without


def places(layers: Iterable[str]) -> dict[str, list[str]]:
    """transformers' names of the tensors outside the layers → KerasHub's places, with `layers` in the file."""
    found = {"model.embed_tokens.weight": ["reversible_embedding/vars/0"]}
    if "embedding" not in layers:
        return found | {"model.norm.weight": ["rms_normalization/vars/0"]}
    return found | {
        "model.embed_tokens_per_layer.weight": ["embedding/vars/0"],
        "model.per_layer_model_projection.weight": ["dense/vars/0"],
        "model.per_layer_projection_norm.weight": ["rms_normalization/vars/0"],
        "model.norm.weight": ["rms_normalization_1/vars/0"],
    }


def read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the `config.json` of the other families, from KerasHub's `settings`.

    Raises:
        KeyError, TypeError, ValueError: a setting is missing or of the wrong kind.
    """
    full, per_layer = settings["num_global_key_value_heads"], settings["hidden_size_per_layer_input"]
    if not settings["use_sliding_window_attention"] or settings["attention_logit_soft_cap"]:
        raise ValueError("sliding windows and no soft-capping of attention were expected of a Gemma 4")
    found = {
        "layer_types": settings["layer_types"],
        "sliding_window": settings["sliding_window_size"],
        "global_head_dim": settings["global_head_dim"] or settings["head_dim"],
        "attention_k_eq_v": full is not None,
        "num_global_key_value_heads": full,
        "num_kv_shared_layers": settings["num_kv_shared_layers"],
        "use_double_wide_mlp": settings["use_double_wide_mlp"],
        "hidden_size_per_layer_input": per_layer,
        "final_logit_softcapping": settings["final_logit_soft_cap"],
        "use_bidirectional_attention": "vision" if settings["use_vision_bidirectional_attention"] else None,
        "max_position_embeddings": CONTEXT[per_layer > 0],
        "rope_parameters": {
            FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": settings["global_rope_partial_rotary_factor"],
                "rope_theta": settings["global_rope_wavelength"] or 1e6,
            },
            SLIDING: {"rope_type": "default", "rope_theta": settings["local_rope_wavelength"] or 1e4},
        },
    }
    if settings["local_rope_scaling_factor"] != 1 or settings["global_rope_scaling_factor"] != 1:
        raise ValueError("a scaled RoPE, as no Gemma 4 has")
    if per_layer:
        found["vocab_size_per_layer_input"] = settings["vocab_size_per_layer_input"] or settings["vocabulary_size"]
    if settings["enable_moe_block"]:
        found |= {
            "enable_moe_block": True,
            "num_experts": settings["num_experts"],
            "top_k_experts": settings["num_experts_per_token"],
            "moe_intermediate_size": settings["expert_intermediate_dim"],
        }
    return found


def settings_of(config: PretrainedConfig) -> tuple[dict[str, Any], dict[str, bool]]:
    """KerasHub's settings, and what it has none for → whether this model needs it."""
    shapes, rope = layer_shapes(config), config.rope_parameters
    kinds = {kind: next((shape for shape in shapes if shape.kind == kind), shapes[0]) for kind in (FULL, SLIDING)}
    full, sliding, equal = kinds[FULL], kinds[SLIDING], config.attention_k_eq_v
    factor = rope[FULL].get("partial_rotary_factor", 1.0)
    found = {
        "vocabulary_size": config.vocab_size,
        "image_size": None,
        "num_layers": len(shapes),
        "num_query_heads": config.num_attention_heads,
        "num_key_value_heads": sliding.kv_heads,
        "hidden_dim": config.hidden_size,
        "intermediate_dim": config.intermediate_size,
        "head_dim": sliding.head_dim,
        "query_head_dim_normalize": True,
        "attention_logit_soft_cap": None,
        "final_logit_soft_cap": config.final_logit_softcapping,
        "use_sliding_window_attention": True,
        "sliding_window_size": config.sliding_window,
        "layer_types": list(config.layer_types),
        "global_head_dim": full.head_dim,
        "local_rope_scaling_factor": 1.0,
        "global_rope_scaling_factor": 1.0,
        "vision_encoder": None,
        "audio_encoder": None,
        "use_bidirectional_attention": False,
        "use_vision_bidirectional_attention": config.use_bidirectional_attention == "vision",
        "layer_norm_epsilon": config.rms_norm_eps,
        "dropout": 0,
        "is_embedding_model": False,
        "num_kv_shared_layers": config.num_kv_shared_layers,
        "num_global_key_value_heads": full.kv_heads if equal else None,
        "hidden_size_per_layer_input": full.per_layer_input,
        "vocab_size_per_layer_input": config.vocab_size_per_layer_input if full.per_layer_input else None,
        "global_rope_wavelength": rope[FULL]["rope_theta"],
        "local_rope_wavelength": rope[SLIDING]["rope_theta"],
        "global_rope_partial_rotary_factor": factor,
        "use_double_wide_mlp": config.use_double_wide_mlp,
        "enable_moe_block": bool(full.experts),
        "num_experts": full.experts or None,
        "expert_intermediate_dim": full.expert_inner or None,
        "num_experts_per_token": full.active_experts or 8,
        "dtype": str(config.dtype).removeprefix("torch."),
    }
    missing = {
        "another activation": config.hidden_activation != "gelu_pytorch_tanh",
        "biases": config.attention_bias,
        "attention to later tokens": config.use_bidirectional_attention == "all",
        "layers of one kind only": full.kind == sliding.kind,
        "other heads of keys in full attention, without values that are keys": not equal
        and full.kv_heads != sliding.kv_heads,
        "another RoPE": rope[FULL]["rope_type"] != "proportional"
        or rope[FULL].get("factor", 1.0) != 1.0
        or factor * full.head_dim % 2 != 0
        or factor * full.head_dim < 2
        or rope[SLIDING]["rope_type"] != "default",
    }
    return found, missing


def is_of(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether `tensors` with transformers' names are those of a Gemma 4."""
    return "model.layers.0.layer_scalar" in tensors
