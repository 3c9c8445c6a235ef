"""A Gemma run by transformers with one decoder layer in memory at a time, so that a model of any size runs anywhere.

The model is built without weights. Each decoder layer gets its own, in float32, just before it computes and gives them
up after it; of the embedding, the rows of the tokens; the output layer goes through by blocks of the vocabulary. An
adapter is peft's own, in memory, around the layers that it changes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from converters.adapter import PREFIX
from converters.checkpoint import Adapter, Checkpoint, LazyTensor, in_memory

FAMILIES = ("gemma", "gemma2", "gemma3_text")
BLOCK = 16_384  # rows of the output layer at a time: 350 MB of float32 for the widest Gemma


def empty_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """The model of `config` without weights (on the meta device); raises what transformers raises for a wrong one."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))).eval()


@torch.inference_mode()
def logits(checkpoint: Checkpoint, texts: Sequence[Tensor], adapter: Adapter | None = None) -> Tensor:
    """
    Args:
        texts: token ids, each [tokens].

    Returns:
        [tokens, vocabulary] in float32, of all texts one after another.
    """
    model = empty_model(checkpoint.config)
    body, config = model.model, model.config
    tensors = dict(checkpoint.tensors)
    body.rotary_emb = type(body.rotary_emb)(config)
    if adapter:
        settings = LoraConfig(task_type="CAUSAL_LM", **adapter.peft)
        get_peft_model(model, settings, low_cpu_mem_usage=True)  # wraps the layers in place
        tensors |= {name.removeprefix(PREFIX): in_memory(tensor) for name, tensor in adapter.tensors.items()}
    for number, layer in enumerate(body.layers):
        _load_when_it_computes(layer, tensors, f"model.layers.{number}.")
    body.norm.weight = nn.Parameter(tensors["model.norm.weight"].read().float())

    embedding = tensors["model.embed_tokens.weight"].read()
    rows = [embedding[ids].float() * config.hidden_size**0.5 for ids in texts]
    del embedding
    # All texts at once, as each layer is read once. What fills up a shorter one comes after it, where it is not seen.
    hidden = body(inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True), use_cache=False).last_hidden_state
    ends = torch.cat([states[: len(ids)] for states, ids in zip(hidden, texts, strict=True)])
    return _output(ends, checkpoint, getattr(config, "final_logit_softcapping", None))


def _load_when_it_computes(layer: nn.Module, tensors: Mapping[str, LazyTensor], prefix: str) -> None:
    names = {}
    for name, _ in layer.named_parameters():
        theirs = prefix + name.replace("base_layer.", "").replace(".default", "")
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
