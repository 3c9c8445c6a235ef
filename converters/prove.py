"""The proof of a conversion: both sides are run on the same prompts and must say the same.

What was written is opened again by plain transformers and peft, the way its user will open it.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from converters.nemo_file import NemoFile
from nemo_configs.command_line import UserError

# An adapter is the same numbers in another file: its logits must not differ at all. Merging rounds each weight once,
# to bfloat16's 8 bits, which moves logits a little: the mean divergence of the predicted distributions must stay
# far below what separates the fine-tuned model from its base.
LIMITS = {"adapter": {"max_logit_difference": 0.0}, "merged": {"mean_kl_divergence": 0.005}}
SHARE_OF_TRAINING = 0.1  # and at most this share of the divergence between base and fine-tuned model

PROBES = (
    "The rain had stopped by the time the train left the station.",
    "My friend texted me that the concert was",
    "def area(radius):\n    return",
    "¿Qué vas a hacer este fin de semana?",
)


def prove(kind: str, nemo: NemoFile, base_folder: Path, folder: Path) -> dict[str, Any]:
    """Compare the `.nemo` on its base with the converted `folder` (`kind`: adapter or merged).

    Returns:
        Maximal and mean absolute logit difference, mean KL divergence in nats a token, top-1 agreement, and the
        divergence between base and fine-tuned model to hold them against.

    Raises:
        UserError: a tensor is not finite, or a difference is beyond its limit.
    """
    check_tensors(folder)
    # Both sides on the CPU, where a model of any size fits and the same sum has the same bits.
    source, tokenizer = nemo.load_onto(base_folder, "cpu")
    probes = [nemo.prompt.wrap(nemo.prompt.write_instruction()), *PROBES]
    # Both sides in float32: the comparison is to show the conversion's rounding, not that of the products.
    expected = logits(source.float(), tokenizer, probes)
    with source.disable_adapter():
        base = logits(source, tokenizer, probes)
    del source
    found = logits(reopen(kind, nemo, base_folder, folder).float(), AutoTokenizer.from_pretrained(
        base_folder if kind == "adapter" else folder), probes)  # fmt: skip
    trained = divergence(expected, base)
    result = {
        "probes": len(probes),
        "tokens": len(expected),
        "max_logit_difference": (expected - found).abs().max().item(),
        "mean_logit_difference": (expected - found).abs().mean().item(),
        "mean_kl_divergence": divergence(expected, found),
        "top1_agreement": (expected.argmax(-1) == found.argmax(-1)).float().mean().item(),
        "mean_kl_divergence_of_training": trained,
    }
    limits = dict(LIMITS[kind])
    if "mean_kl_divergence" in limits:
        limits["mean_kl_divergence"] = min(limits["mean_kl_divergence"], SHARE_OF_TRAINING * trained)
    for name, limit in limits.items():
        if not result[name] <= limit:  # also NaN
            raise UserError(
                f"the conversion is not faithful: {name} is {result[name]:.2g}, at most {limit:.2g} allowed"
            )
    return {**result, "limits": limits}


def reopen(kind: str, nemo: NemoFile, base_folder: Path, folder: Path) -> PreTrainedModel | PeftModel:
    if kind == "merged":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    # In the dtype of training, which need not be that of the files.
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=getattr(torch, nemo.dtype))
    return PeftModel.from_pretrained(base, folder).eval()


def logits(model: PreTrainedModel | PeftModel, tokenizer: Any, probes: list[str]) -> Tensor:
    """[tokens, vocabulary], float32 on the CPU, of all probes one after another."""
    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt").to(model.device)).logits[0] for text in probes]
    return torch.cat(rows).float().cpu()


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean Kullback-Leibler divergence KL(expected ‖ found) in nats a token."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def check_tensors(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, safe_open is not a dict
                if not math.isfinite(file.get_tensor(name).float().sum().item()):
                    raise UserError(f"{name} in {path.name} holds values that are not finite")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n")
