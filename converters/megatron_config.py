"""The configuration of a Gemma in NeMo's names and in Hugging Face's, converted both ways.

The names are those of NeMo 2's GemmaConfig, Gemma2Config and Gemma3Config; nemo1.py has the differences of NeMo 1.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from converters.byte_ranges import ByteRange, parsing
from converters.distributed import MOST_LAYERS
from converters.megatron_layout import FAMILIES, full_config
from core.errors import UserError
from core.prompt import Prompt


def nemo_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of NeMo 2's GemmaConfig, Gemma2Config or Gemma3Config for transformers' `config.json`.

    Raises:
        UserError: another family, or a mechanism that NeMo's Gemmas do not have.
    """
    text = full_config(config)
    rope = text.rope_parameters
    divisor = math.gcd(text.vocab_size, 128)  # so that nothing is padded
    fields = {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": text.head_dim,
        "init_method_std": text.initializer_range,
        "layernorm_epsilon": text.rms_norm_eps,
        "seq_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "make_vocab_size_divisible_by": divisor,
        "share_embeddings_and_output_weights": True,
        "layernorm_zero_centered_gamma": True,
    }
    layers = list(getattr(text, "layer_types", []))
    if text.model_type == "gemma3_text":
        local, everywhere = rope["sliding_attention"], rope["full_attention"]
        period = layers.index("full_attention") + 1 if "full_attention" in layers else max(6, len(layers) + 1)
        expected = ["full_attention" if n % period == 0 else "sliding_attention" for n in range(1, len(layers) + 1)]
        scaling = {"default": 1.0, "linear": everywhere.get("factor")}.get(everywhere["rope_type"])
        fields |= {
            "rotary_base": (_whole(local["rope_theta"]), _whole(everywhere["rope_theta"])),
            "rope_scaling_factor": scaling,
            "window_size": text.sliding_window,
            "interleaved_attn_pattern": (period - 1, 1),
            "is_vision_language": False,
            "softmax_scale": None if text.query_pre_attn_scalar == text.head_dim else text.query_pre_attn_scalar**-0.5,
        }
        odd = scaling is None or layers != expected or text.final_logit_softcapping or text.attn_logit_softcapping
    else:
        fields["rotary_base"] = _whole(rope["rope_theta"])
        odd = rope["rope_type"] != "default"
    if text.model_type == "gemma2":
        expected = ["full_attention" if n % 2 else "sliding_attention" for n in range(len(layers))]
        fields |= {
            "window_size": (text.sliding_window, 0),
            "query_pre_attn_scalar": _whole(text.query_pre_attn_scalar),
            "attn_logit_softcapping": text.attn_logit_softcapping,
            "final_logit_softcapping": text.final_logit_softcapping,
        }
        odd = odd or layers != expected
    if odd or not text.tie_word_embeddings or text.attention_bias:
        raise UserError("the model's attention, positions or output layer are of a kind that NeMo's Gemmas do not have")
    return fields


def layer_count(fields: Mapping[str, Any]) -> int:
    """`num_layers`, before lists of that length are made.

    Raises:
        ValueError: no Gemma has so many.
    """
    count = fields["num_layers"]
    if type(count) is not int or not 0 < count <= MOST_LAYERS:
        raise ValueError(f"num_layers is {str(count)[:40]}")
    return count


def hf_config(family: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `nemo_fields`: `config.json` under names that transformers 4 and 5 both read."""
    config: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "head_dim": fields.get("kv_channels") or fields["hidden_size"] // fields["num_attention_heads"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": fields["hidden_size"],
        "initializer_range": fields.get("init_method_std", 0.02),
        "intermediate_size": fields["ffn_hidden_size"],
        "max_position_embeddings": fields["seq_length"],
        "num_attention_heads": fields["num_attention_heads"],
        "num_hidden_layers": layer_count(fields),
        "num_key_value_heads": fields.get("num_query_groups") or fields["num_attention_heads"],
        "rms_norm_eps": fields["layernorm_epsilon"],
    }
    if fields["vocab_size"]:  # not known of an adapter for NeMo 1
        config["vocab_size"] = fields["vocab_size"]
    if family == "gemma3_text":
        local, everywhere = fields["rotary_base"]
        head, scale, factor = config["head_dim"], fields.get("softmax_scale"), fields.get("rope_scaling_factor") or 1.0
        period = sum(fields.get("interleaved_attn_pattern") or (5, 1))
        return config | {
            "rope_theta": everywhere,
            "rope_local_base_freq": local,
            "sliding_window": fields["window_size"],
            "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
            "query_pre_attn_scalar": head if scale is None else _whole(round(scale**-2, 6)),
            "layer_types": [
                "full_attention" if n % period == 0 else "sliding_attention"
                for n in range(1, config["num_hidden_layers"] + 1)
            ],
        }
    config["rope_theta"] = fields.get("rotary_base", 10_000)
    if family == "gemma2":
        config |= {
            "sliding_window": fields["window_size"][0],
            **{
                key: fields[key]
                for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
            },
        }
    return config


def config_of(
    family: str, fields: Mapping[str, Any], files: Mapping[str, ByteRange], rows: int | None
) -> dict[str, Any]:
    """`config.json` of a checkpoint: the one among its files if it agrees with `fields`, else one made from `fields`.

    Args:
        fields: as `nemo_fields`; NeMo 1 has no `vocab_size` among them.
        files: of its tokenizer, from which the vocabulary size may be read.
        rows: of its embedding, which may be padded; None if it has none.
    """
    kept = json_file(files, "config.json")
    size = fields.get("vocab_size") or kept.get("vocab_size") or _vocabulary(json_file(files, "tokenizer.json")) or rows
    config = hf_config(family, {**fields, "vocab_size": size})
    try:
        with parsing("config.json"):
            return kept if kept and nemo_fields(kept) == nemo_fields(config) else config
    except UserError:  # it is of something else
        return config


def json_file(files: Mapping[str, ByteRange], name: str) -> dict[str, Any]:
    """The content of the JSON file `name` among `files`; empty if it is not there."""
    if name not in files:
        return {}
    with parsing(files[name].name):
        return dict(json.loads(files[name].read()))


def _vocabulary(tokenizer: Mapping[str, Any]) -> int | None:
    """The vocabulary size of a `tokenizer.json`, or None."""
    if not tokenizer:
        return None
    with parsing("tokenizer.json"):
        ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
        return int(max(ids)) + 1


def read_prompt(byte_range: ByteRange | None) -> Prompt | None:
    if byte_range is None:
        return None
    with parsing(byte_range.name):
        return Prompt(**json.loads(byte_range.read()))


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
