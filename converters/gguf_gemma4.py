"""What the GGUF of a Gemma 4 (llama.cpp's architecture "gemma4") has beside those of Gemma 1 to 3.

All sizes are that architecture, the 12B ("unified") too. Weights are stored as they are: the norms have no 1 to add.
Layers differ, so some fields have an entry for each:

- `attention.sliding_window_pattern` [layers] of bool: the layer has a sliding window.
- `attention.key_length` and `value_length` are those of full attention; with `_swa`, of a sliding window.
- `attention.head_count_kv` and `feed_forward_length`: a number, or [layers] where they vary.
- `attention.shared_kv_layers`: the number of last layers that borrow keys and values. They have no tensors for these.

Values that are keys (`attention_k_eq_v`) have no tensor either. The frequencies of a proportional RoPE are divided by
`rope_freqs.weight` [half a head of full attention]: 1 where it rotates, 1e30 where it does not. The experts' matrices
have transformers' shapes [experts, out, in], gate above up, and the router is in float32 always.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, Keys, ReaderTensor, TensorNameMap
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from core.errors import UserError
from core.layer_shapes import FULL, SLIDING, layer_shapes

FAMILIES = ("gemma4_text", "gemma4_unified_text")
FAMILY = "gemma_nemo.model_type"  # which of the two it was: to llama.cpp they are one architecture
ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.GEMMA4]
SUPPRESS = "tokenizer.ggml.suppress_tokens"  # the gguf package has no name for it
ROPE_FREQS = "rope_freqs.weight"
UNROTATED = 1e30
ROUTER = ".ffn_gate_inp.weight"
KEYS_AND_VALUES = re.compile(r"blk\.(\d{1,4})\.attn_(?:k|v|k_norm)\.weight")
# Where a LoRA would have another effect than in training → why; gone into the weights, it has the right one.
UNADAPTED = {
    "per_layer_model_projection": "which llama.cpp does not look for",
    "experts.down_proj": "which llama.cpp scales as it does the experts in some versions and not in others",
}
SCALES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
SIZES = {
    "max_position_embeddings": Keys.LLM.CONTEXT_LENGTH,
    "hidden_size": Keys.LLM.EMBEDDING_LENGTH,
    "num_hidden_layers": Keys.LLM.BLOCK_COUNT,
    "num_attention_heads": Keys.Attention.HEAD_COUNT,
    "sliding_window": Keys.Attention.SLIDING_WINDOW,
    "head_dim": Keys.Attention.KEY_LENGTH_SWA,
    "global_head_dim": Keys.Attention.KEY_LENGTH,
}
OF_EXPERTS = {
    "num_experts": Keys.LLM.EXPERT_COUNT,
    "top_k_experts": Keys.LLM.EXPERT_USED_COUNT,
    "moe_intermediate_size": Keys.LLM.EXPERT_FEED_FORWARD_LENGTH,
}


def with_everything(layers: int) -> dict[str, Any]:
    """`config.json` of a model that has every tensor that a Gemma 4 of some size has."""
    experts = {"enable_moe_block": True, "num_experts": 1, "top_k_experts": 1, "moe_intermediate_size": 1}
    return {"model_type": FAMILIES[0], "num_hidden_layers": layers, "layer_types": [FULL] * layers, **experts}


def tensor_name(name: str, known: TensorNameMap) -> str:
    """llama.cpp's name of the tensor that transformers calls `name`."""
    for ending, theirs in SCALES.items():
        if name.endswith(ending):
            return f"blk.{name.split('.')[2]}.{theirs}"
    return f"{known.get_name(name.removesuffix('.weight'))}.weight"


def is_borrowed(name: str, config: Mapping[str, Any]) -> bool:
    """Whether llama.cpp's tensor `name` makes keys and values of a layer that borrows them: no one reads it."""
    found = KEYS_AND_VALUES.fullmatch(name)
    return found is not None and int(found[1]) >= config["num_hidden_layers"] - config["num_kv_shared_layers"]


def experts_to_peft(
    layer: str, lora_a: Tensor, lora_b: Tensor, adapted: Collection[str]
) -> tuple[str, tuple[Tensor, Tensor]]:
    """peft's module and factors of the LoRA of experts.

    Args:
        layer: `model.layers.0.experts.gate_up_proj`, one of all that are `adapted`.
        lora_a, lora_b: [experts, r, in] and [experts, out, r].

    Returns:
        The module (see `adapter`), and the factors [experts · r, in] and [out, r · experts].
    """
    module, _, name = layer.rpartition(".")
    inner = name == "gate_up_proj" and f"{module}.down_proj" in adapted
    factors = lora_a.flatten(0, 1), lora_b.permute(1, 2, 0).flatten(1)
    return (f"{module}.base_layer" if inner else module), factors


def suppressed(files: Mapping[str, bytes | Path]) -> list[int]:
    """The tokens that the model must never write, by its `generation_config.json`: the ends of an image and of audio.

    Raises:
        UserError: that file is damaged.
    """
    file = files.get("generation_config.json", b"{}")
    try:
        found = json.loads(file.read_bytes() if isinstance(file, Path) else file).get("suppress_tokens") or []
        return [int(number) for number in found]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"generation_config.json is damaged ({error}); copy or download it again") from None


def ends_of_turn(fields: Mapping[str, Any]) -> list[int]:
    """The token after which a tool is called: a turn may end with it too."""
    tokens = fields[Keys.Tokenizer.LIST]
    return [tokens.index("<|tool_response>")] if "<|tool_response>" in tokens else []


def rope_freqs(config: PretrainedConfig) -> Tensor:
    half = next(shape.head_dim for shape in layer_shapes(config) if shape.kind == FULL) // 2
    found = torch.full((half,), UNROTATED)
    found[: int(config.rope_parameters[FULL].get("partial_rotary_factor", 1.0) * half)] = 1.0
    return found


def add_config(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Add all fields of a model in which `missing` finds nothing."""
    shapes, rope = layer_shapes(config), config.rope_parameters
    full, sliding = (next(shape for shape in shapes if shape.kind == kind) for kind in (FULL, SLIDING))

    def one_or_all(values: list[int]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else values

    writer.add_string(FAMILY, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(one_or_all([shape.inner for shape in shapes]))
    writer.add_embedding_length_per_layer_input(full.per_layer_input)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(one_or_all([shape.kv_heads for shape in shapes]))
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([shape.kind == SLIDING for shape in shapes])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope[FULL]["rope_theta"])
    writer.add_rope_freq_base_swa(rope[SLIDING]["rope_theta"])
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)  # without the field, llama.cpp caps at 30
    if full.experts:
        writer.add_expert_count(full.experts)
        writer.add_expert_used_count(full.active_experts)
        writer.add_expert_feed_forward_length(full.expert_inner)


def missing(config: PretrainedConfig) -> dict[str, bool]:
    """What llama.cpp cannot do or has no field for → whether this model needs it."""
    shapes, rope = layer_shapes(config), config.rope_parameters
    # llama.cpp lends the last keys and values of its own by position: full attention's, and those one layer before.
    lender = {
        FULL: len(shapes) - config.num_kv_shared_layers - 1,
        SLIDING: len(shapes) - config.num_kv_shared_layers - 2,
    }
    return {
        "another activation": config.hidden_activation != "gelu_pytorch_tanh",
        "biases": config.attention_bias,
        "attention to later tokens": config.use_bidirectional_attention == "all",
        "layers of one kind only": {shape.kind for shape in shapes} != {FULL, SLIDING},
        "keys and values borrowed from other layers than the last two": any(
            shape.kv_source != number and shape.kv_source != lender[shape.kind] for number, shape in enumerate(shapes)
        ),
        "another scaling of RoPE": rope[FULL]["rope_type"] not in ("default", "proportional")
        or rope[FULL].get("factor", 1.0) != 1.0
        or (rope[FULL]["rope_type"] == "default" and rope[FULL].get("partial_rotary_factor", 1.0) != 1.0)
        or rope[SLIDING]["rope_type"] != "default"
        or rope[SLIDING].get("partial_rotary_factor", 1.0) != 1.0,
        "a per-layer embedding of another vocabulary": bool(shapes[0].per_layer_input)
        and config.vocab_size_per_layer_input != config.vocab_size,
    }


def read_settings(fields: Mapping[str, Any], stored: Mapping[str, ReaderTensor]) -> tuple[str, dict[str, Any]]:
    """The family and the settings of its `config.json`, but for dtype and vocabulary, from the fields of a file.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, or is not what it should be.
    """

    def field(key: str, default: Any = None) -> Any:
        return fields.get(key.format(arch=ARCH), default)

    found: dict[str, Any] = {name: field(key) for name, key in SIZES.items()}
    if experts := field(Keys.LLM.EXPERT_COUNT, 0):
        found |= {name: field(key) for name, key in OF_EXPERTS.items()} | {"enable_moe_block": True}
    if not all(type(value) is int and value > 0 for name, value in found.items() if name != "enable_moe_block"):
        raise ValueError(f"a size is no positive number: {found}")
    layers, window = found["num_hidden_layers"], field(Keys.Attention.SLIDING_WINDOW_PATTERN)
    if layers > len(stored) or not isinstance(window, list) or len(window) != layers:
        raise ValueError(f"{layers} layers, in {len(stored)} tensors and a pattern of {window!r:.80}")
    inner, pairs = (field(key) for key in (Keys.LLM.FEED_FORWARD_LENGTH, Keys.Attention.HEAD_COUNT_KV))
    inner, pairs = (value if isinstance(value, list) else [value] * layers for value in (inner, pairs))
    shared, full = field(Keys.Attention.SHARED_KV_LAYERS, 0), window.index(False)
    found |= {
        "layer_types": [SLIDING if one else FULL for one in window],
        "num_kv_shared_layers": shared,
        "intermediate_size": inner[0],
        "use_double_wide_mlp": bool(shared) and inner[-1] != inner[0],
        "num_key_value_heads": pairs[window.index(True)],
        "num_global_key_value_heads": pairs[full],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in stored,
        "rms_norm_eps": float(str(np.float32(field(Keys.Attention.LAYERNORM_RMS_EPS)))),
        "final_logit_softcapping": field(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, 30.0) or None,
        "rope_parameters": {
            FULL: _proportional(stored[ROPE_FREQS], float(field(Keys.Rope.FREQ_BASE, 1e6))),
            SLIDING: {"rope_type": "default", "rope_theta": float(field(Keys.Rope.FREQ_BASE_SWA, 1e4))},
        },
    }
    per_layer = field(Keys.LLM.EMBD_LENGTH_PER_LAYER_INP, 0)
    family = str(fields.get(FAMILY, FAMILIES[0]))
    if family not in FAMILIES or (family != FAMILIES[0] and (per_layer or experts)):
        raise ValueError(f"{FAMILY} is {family!r:.40}")
    # It only matters for images; this is how the published sizes differ in it.
    found["use_bidirectional_attention"] = None if per_layer else "vision"
    if family == FAMILIES[0]:
        found["hidden_size_per_layer_input"] = per_layer
        if per_layer:
            found["vocab_size_per_layer_input"] = int(stored["per_layer_token_embd.weight"].shape[1])
    shapes = layer_shapes(AutoConfig.for_model(family, **found))
    if [shape.inner for shape in shapes] != inner or [shape.kv_heads for shape in shapes] != pairs:
        raise ValueError("its layers' sizes are those of no Gemma 4")
    return family, found


def _proportional(freqs: ReaderTensor, theta: float) -> dict[str, Any]:
    values = np.asarray(freqs.data)
    rotated = int((values == 1).sum())
    if freqs.tensor_type != GGMLQuantizationType.F32 or not (values[:rotated] == 1).all():
        raise ValueError(f"{ROPE_FREQS} is no proportional RoPE's")
    if not (values[rotated:] >= np.float32(UNROTATED) * 0.99).all():
        raise ValueError(f"{ROPE_FREQS} is no proportional RoPE's")
    return {"rope_type": "proportional", "partial_rotary_factor": rotated / len(values), "rope_theta": theta}
