"""A base model with random weights: as fast as the real one, for a machine that has no access to a gated repository.

Its losses mean nothing; its speed and memory are those of the architecture.
"""

import shutil
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import writing_folder
from core.layer_shapes import FULL, SLIDING

GEMMA_4: dict[str, Any] = {  # that all sizes of Gemma 4 have in common
    "vocab_size": 262_144,
    "head_dim": 256,
    "global_head_dim": 512,
    "final_logit_softcapping": 30.0,
}
SMALL_4 = GEMMA_4 | {
    "num_attention_heads": 8,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
}
LARGE_4 = GEMMA_4 | {
    "sliding_window": 1024,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
    "max_position_embeddings": 262_144,
}
# As the published configurations: https://huggingface.co/google/gemma-2-2b/blob/main/config.json and its like.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-2b": (
        "gemma",
        {
            "vocab_size": 256_000,
            "hidden_size": 2048,
            "intermediate_size": 16_384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
        },
    ),
    "gemma-7b": (
        "gemma",
        {
            "vocab_size": 256_000,
            "hidden_size": 3072,
            "intermediate_size": 24_576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
        },
    ),
    "gemma-2-2b": (
        "gemma2",
        {
            "vocab_size": 256_000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma-2-9b": (
        "gemma2",
        {
            "vocab_size": 256_000,
            "hidden_size": 3584,
            "intermediate_size": 14_336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma-2-27b": (
        "gemma2",
        {
            "vocab_size": 256_000,
            "hidden_size": 4608,
            "intermediate_size": 36_864,
            "num_hidden_layers": 46,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 144,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma-3-1b": (
        "gemma3_text",
        {
            "vocab_size": 262_144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
        },
    ),
    "gemma-3-4b": (
        "gemma3_text",
        {
            "vocab_size": 262_208,
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
        },
    ),
    "gemma-3-12b": (
        "gemma3_text",
        {
            "vocab_size": 262_208,
            "hidden_size": 3840,
            "intermediate_size": 15_360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "sliding_window": 1024,
        },
    ),
    "gemma-3-27b": (
        "gemma3_text",
        {
            "vocab_size": 262_208,
            "hidden_size": 5376,
            "intermediate_size": 21_504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 1024,
            "query_pre_attn_scalar": 168,
        },
    ),
    "gemma-4-e2b": (
        "gemma4_text",
        SMALL_4
        | {
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 35,
            "layer_types": [*[SLIDING] * 4, FULL] * 7,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma-4-e4b": (
        "gemma4_text",
        SMALL_4
        | {
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 42,
            "layer_types": [*[SLIDING] * 5, FULL] * 7,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 18,
            "use_double_wide_mlp": False,
        },
    ),
    "gemma-4-12b": (
        "gemma4_unified_text",
        LARGE_4
        | {
            "hidden_size": 3840,
            "intermediate_size": 15_360,
            "num_hidden_layers": 48,
            "layer_types": [*[SLIDING] * 5, FULL] * 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 1,
        },
    ),
    "gemma-4-26b-a4b": (
        "gemma4_text",
        LARGE_4
        | {
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "num_hidden_layers": 30,
            "layer_types": [*[SLIDING] * 5, FULL] * 5,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
        },
    ),
    "gemma-4-31b": (
        "gemma4_text",
        LARGE_4
        | {
            "hidden_size": 5376,
            "intermediate_size": 21_504,
            "num_hidden_layers": 60,
            "layer_types": [*[SLIDING] * 5, FULL] * 10,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "hidden_size_per_layer_input": 0,
        },
    ),
}
# With the same mechanisms and head sizes, small enough for a few steps of plain transformers in float32 on two cores.
CUT_4: dict[str, Any] = {
    "vocab_size": 32_768,
    "vocab_size_per_layer_input": 32_768,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
}
CUT_SMALL_4 = CUT_4 | {
    "num_hidden_layers": 10,
    "layer_types": [*[SLIDING] * 4, FULL] * 2,
    "num_kv_shared_layers": 5,
    "hidden_size_per_layer_input": 64,
}
CUT_LARGE_4 = CUT_4 | {"num_hidden_layers": 6, "layer_types": [*[SLIDING] * 5, FULL], "num_key_value_heads": 2}
CUT_EXPERTS_4 = {"num_global_key_value_heads": 1, "num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 256}
for _name, _changes in {
    "e2b": CUT_SMALL_4,
    "e4b": CUT_SMALL_4,
    "12b": CUT_LARGE_4,
    "26b-a4b": CUT_LARGE_4 | CUT_EXPERTS_4,
    "31b": CUT_LARGE_4 | {"num_key_value_heads": 4, "num_global_key_value_heads": 2},
}.items():
    _family, _options = ARCHITECTURES[f"gemma-4-{_name}"]
    ARCHITECTURES[f"gemma-4-{_name}-cut"] = _family, _options | _changes


def random_base(name: str, tokenizer_folder: Path, models_dir: Path, **changes: Any) -> Path:
    """`<models_dir>/random-<name>`, made on first use: bfloat16 weights, and the tokenizer of `tokenizer_folder`.

    Args:
        changes: to the published configuration, for a smaller model of the same kind.

    Raises:
        UserError: an unknown architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in ARCHITECTURES:
        raise UserError(f"random={name} is unknown. Known: {', '.join(ARCHITECTURES)}")
    folder = models_dir / f"random-{name}"
    if folder.exists():
        return folder
    family, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **options | changes, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    with writing_folder(folder) as partial:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(partial)
        for file in tokenizer_folder.glob("tokenizer*"):
            shutil.copy(file, partial)
    return folder
