"""run_config.yaml of Megatron-Bridge: the provider of a Gemma, a class with its fields, from and to `config.json`.

The fields of Gemma 1 to 3 are those of NeMo 2 (megatron_config.py) but for what stands here. Gemma 4 has two classes,
for dense sizes and for experts, which say the same in different fields. What the classes have as defaults is not
written.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from converters.byte_ranges import parsing
from converters.megatron_config import hf_config, layer_count, nemo_fields
from converters.megatron_gemma4 import FAMILIES as GEMMA4
from core.errors import UserError
from core.gemma_config import FAMILIES, write_both_dialects
from core.layer_shapes import FULL, SLIDING

MODELS = "megatron.bridge.models"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
DENSE, EXPERTS = (f"{MODELS}.gemma.gemma4_provider.{name}" for name in ("Gemma4DenseProvider", "Gemma4ModelProvider"))
PROVIDERS = {
    "gemma": f"{MODELS}.gemma.gemma_provider.GemmaModelProvider",
    "gemma2": f"{MODELS}.gemma.gemma2_provider.Gemma2ModelProvider",
    "gemma3_text": f"{MODELS}.gemma.gemma3_provider.Gemma3ModelProvider",
}
# Also the classes of one size that older versions have, and those that also see, whose text model has the same fields.
KNOWN = {
    r"gemma\.gemma_provider\.(Code)?GemmaModelProvider(\d+B)?": "gemma",
    r"gemma\.gemma2_provider\.Gemma2ModelProvider(\d+B)?": "gemma2",
    r"gemma\.gemma3_provider\.Gemma3ModelProvider(\d+[BM])?": "gemma3_text",
    r"gemma_vl\.gemma3_vl_provider\.Gemma3VLModelProvider(\d+B)?": "gemma3_text",
    r"gemma\.gemma4_provider\.Gemma4(Dense|Model)Provider": "gemma4_text",
    r"gemma_vl\.gemma4_vl_provider\.Gemma4(DenseVL|VLModel)Provider": "gemma4_text",
}


def family_of(target: str) -> str:
    """The `model_type` of the text model of the provider `target`.

    Raises:
        UserError: it is of another model.
    """
    for pattern, family in KNOWN.items():
        if re.fullmatch(rf"{re.escape(MODELS)}\.{pattern}", target):
            return family
    raise UserError(f"a model of {target[:120]}; only the Gemmas of Megatron-Bridge are known")


def provider_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The class and the fields that say what `config`, transformers' `config.json`, does.

    Raises:
        UserError: another family, or a mechanism that Megatron-Bridge's Gemmas do not have.
    """
    family = config.get("model_type")
    target, fields = gemma4_fields(config) if family in GEMMA4 else (PROVIDERS.get(str(family)), _fields(config))
    as_yaml = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return {"_target_": target, **as_yaml}


def run_config(config: Mapping[str, Any], dtype: torch.dtype, origin: Mapping[str, str]) -> dict[str, Any]:
    """A run_config.yaml of what is written here: of one GPU, nothing but weights.

    Args:
        dtype: of the weights.
        origin: of the model, see `Checkpoint.origin`.

    Raises:
        UserError: as `provider_of`.
    """
    sizes = ("tensor_model", "pipeline_model", "context", "expert_model")
    return {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": {
            **provider_of(config),
            "hf_model_id": _hub_name(origin),
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            **{name: {"_target_": f"{dtype}", "_call_": False} for name in ("params_dtype", "autocast_dtype")},
            **{f"{size}_parallel_size": 1 for size in sizes},
        },
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            **dict.fromkeys(("save_optim", "save_rng", "fully_parallel_save"), False),
        },
        "tokenizer": {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": _hub_name(origin),
        },
        "peft": None,
    }


def _hub_name(origin: Mapping[str, str]) -> str | None:
    """owner/name on the hub of what `origin` describes."""
    for known in (origin.get("source", ""), origin.get("name", "")):
        if HUB_NAME.fullmatch(name := known.removeprefix("https://huggingface.co/")):
            return name
    return None


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = nemo_fields({**config, "tie_word_embeddings": True})
    fields["share_embeddings_and_output_weights"] = config.get("tie_word_embeddings", True)
    if config["model_type"] == "gemma2":  # keys before the query's own, as Transformer Engine counts
        fields["window_size"] = (fields["window_size"][0] - 1, 0)
    if config["model_type"] == "gemma3_text":
        fields["softmax_scale"] = fields["softmax_scale"] or fields["kv_channels"] ** -0.5
    return fields


def config_from(family: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `provider_of`: `config.json` of the model with these `fields`.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or of the wrong kind.
    """
    if family in GEMMA4:
        return _gemma4_config(fields)
    if family == "gemma2":
        # Up to 0.3.1 the window itself is written. Windows are even, so that an odd number is one less.
        window = fields["window_size"][0]
        fields = {**fields, "window_size": (window + window % 2, 0)}
    tied = fields.get("share_embeddings_and_output_weights", True)
    return hf_config(family, fields) | {"tie_word_embeddings": tied}


def gemma4_fields(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class for a Gemma 4 and its fields.

    Raises:
        UserError: a mechanism that the class does not have.
    """
    with parsing("the model's configuration"):
        config = write_both_dialects(
            json.loads(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_json_string())
        )
    kinds, rope, full = config["layer_types"], config["rope_parameters"], config["num_global_key_value_heads"]
    experts, inner = bool(config.get("enable_moe_block")), config["intermediate_size"]
    everywhere, local = rope[FULL], rope[SLIDING]
    equal = bool(config.get("attention_k_eq_v"))
    fields = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": inner,
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "init_method_std": config.get("initializer_range", 0.02),
        "layernorm_epsilon": config["rms_norm_eps"],
        "seq_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "make_vocab_size_divisible_by": 128,
        "share_embeddings_and_output_weights": config.get("tie_word_embeddings", True),
        "attention_k_eq_v": equal,
        "final_logit_softcapping": config["final_logit_softcapping"],
    }
    odd = {
        "another RoPE": everywhere.get("rope_type") != "proportional" or local.get("rope_type") != "default",
        "attention to later tokens": config.get("use_bidirectional_attention") == "all",
        "biases": bool(config.get("attention_bias")),
    }
    if experts:
        period = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
        odd["another order of layers that see everything"] = kinds != _interleaved(period - 1, 1, len(kinds))
        odd["per-layer embeddings"] = bool(config.get("hidden_size_per_layer_input"))
        odd["borrowed keys and values"] = bool(config.get("num_kv_shared_layers"))
        target = EXPERTS
        fields |= {
            "window_size": config["sliding_window"],
            "interleaved_attn_pattern": (period - 1, 1),
            "rotary_base": (local["rope_theta"], everywhere["rope_theta"]),
            "global_rotary_percent": everywhere.get("partial_rotary_factor", 1.0),
            "global_head_dim": config["global_head_dim"],
            "num_global_key_value_heads": full if equal else config["num_key_value_heads"],
            "softmax_scale": 1.0,
            "num_moe_experts": config["num_experts"],
            "moe_router_topk": config["top_k_experts"],
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "moe_shared_expert_intermediate_size": inner,
        }
    else:
        target = DENSE
        wide = config.get("hidden_size_per_layer_input") or 0
        fields |= {
            "window_size": (config["sliding_window"] - 1, 0),
            "window_attn_skip_freq": [kind == SLIDING for kind in kinds],
            "sliding_window_rope_base": local["rope_theta"],
            "full_attention_rope_base": everywhere["rope_theta"],
            "full_attention_rope_partial_factor": everywhere.get("partial_rotary_factor", 1.0),
            "global_kv_channels": config["global_head_dim"],
            "num_global_query_groups": full if equal else config["num_key_value_heads"],
            "num_kv_shared_layers": config.get("num_kv_shared_layers") or 0,
            "use_double_wide_mlp": bool(config.get("use_double_wide_mlp")),
            "per_layer_embed_dim": wide,
            "per_layer_embed_vocab_size": config["vocab_size_per_layer_input"] if wide else config["vocab_size"],
        }
    if named := [what for what, there in odd.items() if there]:
        raise UserError(f"Megatron-Bridge has no field for what this Gemma 4 needs: {', '.join(named)}")
    return target, fields


def _interleaved(sliding: int, full: int, count: int) -> list[str]:
    return [SLIDING if number % (sliding + full) < sliding else FULL for number in range(count)]


def _gemma4_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    window = fields["window_size"]
    config = {
        "architectures": [FAMILIES["gemma4_text"].text],
        "model_type": "gemma4_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": fields["attention_k_eq_v"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "final_logit_softcapping": fields["final_logit_softcapping"],
        "head_dim": fields["kv_channels"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": fields["hidden_size"],
        "initializer_range": fields.get("init_method_std", 0.02),
        "max_position_embeddings": fields["seq_length"],
        "num_attention_heads": fields["num_attention_heads"],
        "num_hidden_layers": layer_count(fields),
        "num_key_value_heads": fields["num_query_groups"],
        "rms_norm_eps": fields["layernorm_epsilon"],
        "sliding_window": window[0] + 1 if isinstance(window, list) else window,
        "tie_word_embeddings": fields.get("share_embeddings_and_output_weights", True),
        "vocab_size": fields["vocab_size"],
    }
    of_kind = _dense_config(fields) if "Dense" in fields["_target_"] else _experts_config(fields)
    return write_both_dialects({**config, **of_kind})


def _dense_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    count, every = fields["num_layers"], fields["window_attn_skip_freq"]
    listed = every if isinstance(every, list) else [number % every != 0 for number in range(1, count + 1)]
    return {
        "enable_moe_block": False,
        "global_head_dim": fields["global_kv_channels"],
        "hidden_size_per_layer_input": fields["per_layer_embed_dim"],
        "intermediate_size": fields["ffn_hidden_size"],
        "layer_types": [kind if isinstance(kind, str) else SLIDING if kind else FULL for kind in listed[:count]],
        "num_global_key_value_heads": fields["num_global_query_groups"],
        "num_kv_shared_layers": fields["num_kv_shared_layers"],
        "rope_parameters": _rope(
            fields["sliding_window_rope_base"],
            fields["full_attention_rope_base"],
            fields["full_attention_rope_partial_factor"],
        ),
        "use_double_wide_mlp": fields["use_double_wide_mlp"],
        "vocab_size_per_layer_input": fields["per_layer_embed_vocab_size"],
    }


def _experts_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    sliding, full = fields["interleaved_attn_pattern"]
    local, everywhere = fields["rotary_base"]
    return {
        "enable_moe_block": True,
        "global_head_dim": fields["global_head_dim"],
        "hidden_size_per_layer_input": 0,
        "intermediate_size": fields["moe_shared_expert_intermediate_size"],
        "layer_types": _interleaved(sliding, full, fields["num_layers"]),
        "moe_intermediate_size": fields["moe_ffn_hidden_size"],
        "num_experts": fields["num_moe_experts"],
        "num_global_key_value_heads": fields["num_global_key_value_heads"],
        "num_kv_shared_layers": 0,
        "rope_parameters": _rope(local, everywhere, fields["global_rotary_percent"]),
        "top_k_experts": fields["moe_router_topk"],
        "use_double_wide_mlp": False,
    }


def _rope(local: float, everywhere: float, factor: float) -> dict[str, Any]:
    return {
        FULL: {"partial_rotary_factor": factor, "rope_theta": everywhere, "rope_type": "proportional"},
        SLIDING: {"rope_theta": local, "rope_type": "default"},
    }
