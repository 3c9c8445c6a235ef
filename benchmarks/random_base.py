"""A base model with random weights: as fast as the real one, for a machine that has no access to a gated repository.

Its losses mean nothing; its speed and memory are those of the architecture.
"""

import shutil
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import writing_folder

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
}


def random_base(name: str, tokenizer_folder: Path, models_dir: Path) -> Path:
    """`<models_dir>/random-<name>`, made on first use: bfloat16 weights, and the tokenizer of `tokenizer_folder`.

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
    config = AutoConfig.for_model(family, **options, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    with writing_folder(folder) as partial:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(partial)
        for file in tokenizer_folder.glob("tokenizer*"):
            shutil.copy(file, partial)
    return folder
