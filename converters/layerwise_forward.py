"""A forward pass by transformers with one decoder layer in memory at a time, so that a model of any size fits.

The model is built on the meta device. Hooks load the weights of a decoder layer in float32 just before it runs and
unload them after it; only the tokens' rows of the embeddings are used; the output layer is computed in blocks of the
vocabulary.

An adapter is applied by peft, in memory. Where its file is one for peft, peft gets settings and names as they stand
there, on the class that the names are of: what this project makes of them is what a proof has to find out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from converters.adapter import LORA_TENSOR, PREFIX, peft_name
from converters.checkpoint import Adapter, Checkpoint, LazyTensor
from core.gemma_config import WHOLE

# What peft needs to know of a trained adapter: how its values were initialized, and dropout, decide nothing any more.
DECIDING = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
LORA = re.compile(r"lora_(A|B|magnitude_vector)(?:\.weight)?$")
FAMILIES = ("gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text")
BLOCK = 16_384  # rows of the output layer at a time: 350 MB of float32 for the widest Gemma


def empty_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """The model of `config` on the meta device; raises whatever transformers raises for an invalid configuration."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))).eval()


@torch.inference_mode()
def logits(checkpoint: Checkpoint, texts: Sequence[Tensor], adapter: Adapter | None = None) -> Tensor:
    """The logits of `checkpoint`, with `adapter` if given, after each token of each text.

    Args:
        texts: token ids, each [tokens], int64.

    Returns:
        [tokens of all texts, vocabulary], float32.
    """
    body: Any = adapted_body(checkpoint.config, adapter) if adapter else empty_model(checkpoint.config).model
    config, tensors = body.config, checkpoint.tensors
    body.rotary_emb = type(body.rotary_emb)(config)
    for name, part in body.named_children():
        if name == "layers":
            for number, layer in enumerate(part):
                _load_on_demand(layer, tensors, f"model.layers.{number}.")
        elif name != "rotary_emb" and not isinstance(part, nn.Embedding):
            _load_on_demand(part, tensors, f"model.{name}.")

    # All texts in one batch, so that each layer is read once. Padding comes last, where causal attention does not see
    # it.
    inputs = {"inputs_embeds": _rows(tensors["model.embed_tokens.weight"], texts, config.hidden_size)}
    if width := getattr(config, "hidden_size_per_layer_input", 0):  # Gemma 4: what each layer adds for a token
        added = _rows(tensors["model.embed_tokens_per_layer.weight"], texts, width)
        inputs["per_layer_inputs"] = added.unflatten(-1, (-1, width))
    hidden = body(**inputs, use_cache=False).last_hidden_state
    ends = torch.cat([states[: len(ids)] for states, ids in zip(hidden, texts, strict=True)])
    return _output(ends, checkpoint, getattr(config, "final_logit_softcapping", None))


def adapted_body(config: Mapping[str, Any], adapter: Adapter) -> nn.Module:
    """The layers of a text model of `config` on the meta device, with the LoRA of `adapter` in memory in float32.

    Raises:
        ValueError: peft has no place for a tensor, or no tensor for a place.
    """
    if adapter.as_stored:
        settings, given = adapter.as_stored
        # Of what is left out, nothing reads; other tools leave out peft's own prefix, or add the adapter's name.
        kept = {
            name.replace(".default", ""): value for name, value in given.items() if peft_name(name) in adapter.tensors
        }
        tensors = {name if name.startswith(PREFIX) else PREFIX + name: value for name, value in kept.items()}
        try:
            return _by_peft(config, settings, tensors)
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError):
            adapter.as_stored = None  # peft cannot load it as it stands: a tool has changed its names or settings
    layers = {LORA_TENSOR.sub(r"\1", name) for name in adapter.tensors}
    targets = sorted(layer for layer in layers if ".experts" not in layer)
    return _by_peft(config, {**adapter.peft, "target_modules": targets}, adapter.tensors)


def _by_peft(config: Mapping[str, Any], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    prefix = f"{PREFIX}model."
    model: Any
    if any(name.startswith(f"{PREFIX}model.language_model.") for name in tensors):
        kind = next(name for name, text in WHOLE.items() if text == config["model_type"])
        prefix, model = f"{PREFIX}model.language_model.", empty_model({"model_type": kind, "text_config": dict(config)})
        body = model.model.language_model
    elif any(name.startswith(f"{PREFIX}language_model.model.") for name in tensors):
        prefix, model = f"{PREFIX}language_model.model.", nn.Module()  # the whole model of transformers before 4.52
        model.language_model = empty_model(config)
        body = model.language_model.model
    else:
        model = empty_model(config)
        body = model.model
    lora = LoraConfig(**{name: settings[name] for name in DECIDING if settings.get(name)})
    adapted = get_peft_model(model, lora, low_cpu_mem_usage=True).eval()  # wraps the layers in place
    # Not by peft's own loader, which then moves what it has loaded to the base's place, the meta device.
    named = {LORA.sub(r"lora_\1.default.weight", name): tensor.float() for name, tensor in tensors.items()}
    loaded = adapted.load_state_dict(named, strict=False, assign=True)
    lost = [*loaded.unexpected_keys]
    lost += [name for name in loaded.missing_keys if ".lora_" in name and name.startswith(prefix)]
    if lost:
        raise ValueError(f"peft finds no {lost[0]}")
    return body


def _rows(table: LazyTensor, texts: Sequence[Tensor], width: int) -> Tensor:
    """The rows of `table` for `texts`, times the root of the `width` of an embedding: [texts, tokens, columns]."""
    values = table.read()
    rows = [values[ids].float() * width**0.5 for ids in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _load_on_demand(layer: nn.Module, tensors: Mapping[str, LazyTensor], prefix: str) -> None:
    # Parameters of the base, and buffers that are saved: Gemma 4's layer_scalar. peft wraps what it adapts.
    names = {
        name: prefix + name.replace("base_layer.", "") for name in layer.state_dict() if ".lora_" not in f".{name}"
    }

    def load(*_: Any) -> None:
        weights = {name: tensors[theirs].read().float() for name, theirs in names.items()}
        layer.load_state_dict(weights, strict=False, assign=True)

    def unload(*_: Any) -> None:
        empty = {name: torch.empty(tensors[theirs].shape, device="meta") for name, theirs in names.items()}
        layer.load_state_dict(empty, strict=False, assign=True)

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(unload)


def _output(hidden: Tensor, checkpoint: Checkpoint, cap: float | None) -> Tensor:
    head = checkpoint.tensors.get("lm_head.weight") or checkpoint.tensors["model.embed_tokens.weight"]
    weight = head.read()
    found = torch.empty(len(hidden), len(weight))
    for begin in range(0, len(weight), BLOCK):
        block = hidden @ weight[begin : begin + BLOCK].float().T
        found[:, begin : begin + BLOCK] = torch.tanh(block / cap) * cap if cap else block
    return found
