"""A forward pass by transformers with one decoder layer in memory at a time, so that a model of any size fits.

The model is built on the meta device. Hooks load the weights of a decoder layer in float32 just before it runs and
unload them after it; only the tokens' rows of the embeddings are used; the output layer is computed in blocks of the
vocabulary. An adapter is applied by peft, in memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from converters.adapter import PREFIX
from converters.checkpoint import Adapter, Checkpoint, LazyTensor, in_memory

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
    model = empty_model(checkpoint.config)
    body, config = model.model, model.config
    tensors = dict(checkpoint.tensors)
    body.rotary_emb = type(body.rotary_emb)(config)
    if adapter:
        settings = LoraConfig(task_type="CAUSAL_LM", **adapter.peft)
        get_peft_model(model, settings, low_cpu_mem_usage=True)  # wraps the layers in place
        tensors |= {name.removeprefix(PREFIX): in_memory(tensor) for name, tensor in adapter.tensors.items()}
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


def _rows(table: LazyTensor, texts: Sequence[Tensor], width: int) -> Tensor:
    """The rows of `table` for `texts`, times the root of the `width` of an embedding: [texts, tokens, columns]."""
    values = table.read()
    rows = [values[ids].float() * width**0.5 for ids in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _load_on_demand(layer: nn.Module, tensors: Mapping[str, LazyTensor], prefix: str) -> None:
    names = {}
    for name in layer.state_dict():  # parameters, and buffers that are saved: Gemma 4's layer_scalar
        # Of adapted experts, which are two parameters of one module, the inner one's LoRA has base_layer in its name.
        theirs = prefix + (name if ".lora_" in name else name.replace("base_layer.", "")).replace(".default", "")
        names[name] = theirs.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")

    def load(*_: Any) -> None:
        weights = {name: tensors[theirs].read().float() for name, theirs in names.items()}
        layer.load_state_dict(weights, assign=True)

    def unload(*_: Any) -> None:
        empty = {name: torch.empty(tensors[theirs].shape, device="meta") for name, theirs in names.items()}
        layer.load_state_dict(empty, assign=True)

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
