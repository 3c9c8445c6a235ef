"""Tiny random Gemma 4 models of every kind, with every mechanism of the real ones at work, and a tokenizer for them.

Layer patterns, flags and the ids of control tokens are the published ones; sizes are small and rows exceed the window.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import pieces, tokenizer_of
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    Gemma4VisionConfig,
    GemmaTokenizer,
    PreTrainedModel,
)

from core.layer_shapes import FULL, SLIDING

CONTROL = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    4: "<mask>",
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
}
VOCABULARY = 1024
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "max_position_embeddings": 1024,
    "sliding_window": 16,
    "final_logit_softcapping": 30.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SMALL = COMMON | {  # E2B: per-layer embeddings, borrowed keys and values, a wider MLP in the borrowing layers
    "num_key_value_heads": 1,
    "num_hidden_layers": 10,
    "layer_types": [SLIDING, SLIDING, SLIDING, SLIDING, FULL] * 2,
    "num_kv_shared_layers": 5,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
LARGE = COMMON | {  # 31B: values are keys in the full-attention layers, which have fewer heads for them
    "hidden_size_per_layer_input": 0,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "num_hidden_layers": 6,
    "layer_types": [SLIDING] * 5 + [FULL],
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
}
EXPERTS = LARGE | {
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
UNIFIED = {name: value for name, value in LARGE.items() if name != "hidden_size_per_layer_input"} | {
    "num_global_key_value_heads": 1
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_clipped_linears": True,
    "position_embedding_size": 64,
}
KINDS = {  # text models, by the size whose mechanisms they have
    "e2b": lambda **sizes: Gemma4ForCausalLM(Gemma4TextConfig(**SMALL | sizes)),
    "e4b": lambda **sizes: Gemma4ForCausalLM(
        Gemma4TextConfig(**SMALL | {"num_key_value_heads": 2, "use_double_wide_mlp": False} | sizes)
    ),
    "12b": lambda **sizes: Gemma4UnifiedForCausalLM(Gemma4UnifiedTextConfig(**UNIFIED | sizes)),
    "26b-a4b": lambda **sizes: Gemma4ForCausalLM(Gemma4TextConfig(**EXPERTS | sizes)),
    "31b": lambda **sizes: Gemma4ForCausalLM(Gemma4TextConfig(**LARGE | sizes)),
}
WHOLE = {  # as published, with what sees and hears: e2b with a vision tower of clipped linears, 12b with projections
    "e2b": lambda **sizes: Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=SMALL | sizes, vision_config=Gemma4VisionConfig(**VISION))
    ),
    "12b": lambda **sizes: Gemma4UnifiedForConditionalGeneration(Gemma4UnifiedConfig(text_config=UNIFIED | sizes)),
}


def tiny_gemma4(kind: str, dtype: torch.dtype = torch.float32, whole: bool = False, **sizes: Any) -> PreTrainedModel:
    """A random Gemma 4 of `kind`, in which no norm, scalar or buffer is one or zero; `whole` with its towers.

    Args:
        sizes: keys of the text model's configuration in place of the tiny ones.
    """
    torch.manual_seed(0)
    model = (WHOLE if whole else KINDS)[kind](**sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" not in name and whole:
                continue  # towers: only their bytes matter
            if "norm" in name or name.endswith(("router.scale", "per_expert_scale")):
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def even_gemma4(kind: str, **sizes: Any) -> PreTrainedModel:
    """`tiny_gemma4` of the text model, with attention as even as a trained model's, for comparisons of gradients.

    The scale of attention is 1: with q_norms around 1, scores are so far apart that transformers' own gradients in
    float32 are 1e-3 from those in float64. Trained models keep the usual 1/√size in q_norm. For the same reason the
    per-layer inputs have 32 features: of 8, all may be near zero after the GELU, and a norm divides by them.
    """
    model = tiny_gemma4(kind, **({"hidden_size_per_layer_input": 32} if kind.startswith("e") else {}) | sizes)
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data *= layer.self_attn.head_dim**-0.5
    return model


@cache
def tiny_tokenizer4() -> GemmaTokenizer:
    """A tokenizer of Gemma's own kind, with Gemma 4's control tokens at their own ids and bytes as a last resort."""
    tokens = [CONTROL.get(number, f"<unused{number}>") for number in range(107)]
    tokens += ["\n", *(f"<0x{byte:02X}>" for byte in range(256))]  # "\n" is 107
    tokens += [piece for piece in pieces() if piece not in tokens]
    tokens += [f"<unused{number}>" for number in range(len(tokens), VOCABULARY)]
    return tokenizer_of(tokens, [CONTROL[number] for number in sorted(CONTROL)[5:]])


def tiny_folder4(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16, whole: bool = False) -> Path:
    """`folder` with a tiny Gemma 4 of `kind` and its tokenizer, as Hugging Face keeps them."""
    tiny_gemma4(kind, dtype, whole).save_pretrained(folder)
    tiny_tokenizer4().save_pretrained(folder)
    return folder
