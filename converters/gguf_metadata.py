"""The metadata of a GGUF: read safely, and converted from and to a Gemma's `config.json`.

What has no field follows llama.cpp's definition of the architecture: one layer in two (Gemma 2) or six (Gemma 3) has
full attention unless the file has another pattern, and attention logits scaled by 1/√(d/n) in the two 27B models, by
1/√h in all others.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    Keys,
    ReaderTensor,
    RopeScalingType,
)
from transformers import AutoConfig, PretrainedConfig

from converters import gguf_gemma4
from core.errors import UserError

FAMILIES = {
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "gemma4_unified_text": MODEL_ARCH.GEMMA4,
    "gemma4_text": MODEL_ARCH.GEMMA4,
}
CLASSES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
}
PATTERN = {"gemma2": 2, "gemma3_text": 6}
# The same function in all Gemmas; the first were published under another name.
GELU = ("gelu_pytorch_tanh", "gelu", None)
LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
SIZES = {
    "max_position_embeddings": Keys.LLM.CONTEXT_LENGTH,
    "hidden_size": Keys.LLM.EMBEDDING_LENGTH,
    "num_hidden_layers": Keys.LLM.BLOCK_COUNT,
    "intermediate_size": Keys.LLM.FEED_FORWARD_LENGTH,
    "num_attention_heads": Keys.Attention.HEAD_COUNT,
    "num_key_value_heads": Keys.Attention.HEAD_COUNT_KV,
    "head_dim": Keys.Attention.KEY_LENGTH,
    "sliding_window": Keys.Attention.SLIDING_WINDOW,
}
NUMBERS = {
    "rms_norm_eps": Keys.Attention.LAYERNORM_RMS_EPS,
    "attn_logit_softcapping": Keys.LLM.ATTN_LOGIT_SOFTCAPPING,
    "final_logit_softcapping": Keys.LLM.FINAL_LOGIT_SOFTCAPPING,
}
TOKENS = {
    "bos_token_id": Keys.Tokenizer.BOS_ID,
    "eos_token_id": Keys.Tokenizer.EOS_ID,
    "pad_token_id": Keys.Tokenizer.PAD_ID,
}
MAX_STRINGS = 1 << 22  # strings in a list: sixteen times Gemma's vocabulary


class Header(GGUFReader):
    """The package's reader, which by itself reads past the end of a file, and reads numeric lists element by
    element."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise EOFError("it ends too early")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        number = self.gguf_scalar_to_np.get(GGUFValueType(kind[0]))
        if number is not None:
            values = self._get(orig_offs + 12, number, length[0])
            return 12 + values.nbytes, [kind, length, values], [2], [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
        if kind[0] != GGUFValueType.STRING or length[0] > MAX_STRINGS:
            raise ValueError(f"a list of {length[0]} entries of type {kind[0]}")
        return super()._get_field_parts(orig_offs, raw_type)


def read_config(fields: Mapping[str, Any], family: str, stored: Mapping[str, ReaderTensor]) -> dict[str, Any]:
    """`config.json` from the `fields` and the tensors of a file.

    Its dtype is that of the matrices, bfloat16 where they are quantized.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, or is not what it should be.
    """
    if family in gguf_gemma4.FAMILIES:
        family, found = gguf_gemma4.read_settings(fields, stored)
    else:
        found = _read_settings(fields, family, stored)
    matrices = {
        tensor.tensor_type
        for name, tensor in stored.items()
        if len(tensor.shape) > 1 and not name.endswith(gguf_gemma4.ROUTER)
    }
    dtype = torch.float32 if matrices <= set(PLAIN) else torch.bfloat16
    if len(matrices) == 1:
        dtype = PLAIN.get(next(iter(matrices)), dtype)
    found |= {name: fields[key] for name, key in TOKENS.items() if key in fields}
    found |= {"dtype": str(dtype).removeprefix("torch."), "vocab_size": int(stored["token_embd.weight"].shape[1])}
    return json.loads(AutoConfig.for_model(family, **found).to_json_string()) | {"architectures": [CLASSES[family]]}


def _read_settings(fields: Mapping[str, Any], family: str, stored: Mapping[str, ReaderTensor]) -> dict[str, Any]:
    arch = MODEL_ARCH_NAMES[FAMILIES[family]]

    def field(key: str, default: Any = None) -> Any:
        return fields.get(key.format(arch=arch), default)

    found: dict[str, Any] = {name: field(key) for name, key in SIZES.items() if field(key) is not None}
    if not all(type(value) is int and value > 0 for value in found.values()):
        raise ValueError(f"a size is no positive number: {found}")
    # The shortest decimal that is this float32: 1e-06, not 9.999999974752427e-07.
    found |= {name: float(str(np.float32(field(key)))) for name, key in NUMBERS.items() if field(key) is not None}
    layers = found["num_hidden_layers"]
    if layers > len(stored):
        raise ValueError(f"{layers} layers in {len(stored)} tensors")
    base = float(field(Keys.Rope.FREQ_BASE, 1e6 if family == "gemma3_text" else 1e4))
    scaling: dict[str, Any] = {"rope_type": str(field(Keys.Rope.SCALING_TYPE, "none")).replace("none", "default")}
    if scaling["rope_type"] != "default":
        scaling["factor"] = float(field(Keys.Rope.SCALING_FACTOR))
    found["rope_parameters"] = {**scaling, "rope_theta": base}
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": float(field(Keys.Rope.FREQ_BASE_SWA, 1e4))}
        found["rope_parameters"] = {"full_attention": found["rope_parameters"], "sliding_attention": local}
    if family in PATTERN:
        every = field(Keys.Attention.SLIDING_WINDOW_PATTERN, PATTERN[family])
        found["layer_types"] = layer_types(int(every), layers)
        found["query_pre_attn_scalar"] = attention_scalar(family, found)
    return found


def add_config(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """
    Raises:
        UserError: the model does something that llama.cpp does not do in a model of its architecture.
    """
    _check_expressible(config)
    if config.model_type in gguf_gemma4.FAMILIES:
        gguf_gemma4.add_config(writer, config)
        return
    for names, add in ((SIZES, writer.add_uint32), (NUMBERS, writer.add_float32)):
        for name, key in names.items():
            if getattr(config, name, None) is not None:
                add(key.format(arch=writer.arch), getattr(config, name))
    writer.add_value_length(config.head_dim)
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_freq_base(rope["rope_theta"])
    every = _pattern(config) if config.model_type in PATTERN else None
    if every is not None and every != PATTERN[config.model_type]:
        writer.add_sliding_window_pattern(every)


def _check_expressible(config: PretrainedConfig) -> None:
    family = config.model_type
    found = gguf_gemma4.missing(config) if family in gguf_gemma4.FAMILIES else _missing(config)
    if missing := [what for what, there in found.items() if there]:
        raise UserError(f"llama.cpp has no field for what this {family} needs: {', '.join(missing)}")


def _missing(config: PretrainedConfig) -> dict[str, bool]:
    family, rope = config.model_type, config.rope_parameters
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    caps = [getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping")]
    found = {
        "another activation": activation not in GELU,
        "biases": config.attention_bias,
        "attention to later tokens": bool(getattr(config, "use_bidirectional_attention", False)),
        "another scaling of RoPE": rope.get("sliding_attention", rope)["rope_type"] != "default"
        or rope.get("full_attention", rope)["rope_type"] not in ("default", "linear"),
        "another soft-capping": any((cap is not None) != (family == "gemma2") for cap in caps),
    }
    if family in PATTERN:
        scalar = attention_scalar(family, config.to_dict())
        found["layers whose kinds follow no period"] = _pattern(config) is None
        found[f"a query_pre_attn_scalar that is not {scalar}"] = config.query_pre_attn_scalar != scalar
    return found


def attention_scalar(family: str, config: Mapping[str, Any]) -> int:
    if config["num_hidden_layers"] == LAYERS_OF_27B[family]:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def layer_types(every: int, layers: int) -> list[str]:
    """The last of `every` layers sees everything; of 0: none."""
    return ["sliding_attention" if not every or n % every < every - 1 else "full_attention" for n in range(layers)]


def _pattern(config: PretrainedConfig) -> int | None:
    layers = config.num_hidden_layers
    tried = (PATTERN[config.model_type], *range(layers + 1))
    return next((every for every in tried if layer_types(every, layers) == config.layer_types), None)
