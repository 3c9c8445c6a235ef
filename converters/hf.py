"""A Hugging Face folder: `config.json`, safetensors (one file, or shards with an index), tokenizer, chat template.

Names and shapes, of Gemma 1, 2 and 3 text alike (h hidden, i intermediate, q and k heads of d, v vocabulary):

    model.embed_tokens.weight                               [v, h], also the output layer where embeddings are tied
    model.layers.N.self_attn.{q,k,v,o}_proj.weight          [q·d, h], [k·d, h], [k·d, h], [h, q·d]
    model.layers.N.mlp.{gate,up,down}_proj.weight           [i, h], [i, h], [h, i]
    model.layers.N.{input,post_attention}_layernorm.weight  [h], of which the model uses 1 + weight
    model.layers.N.{pre,post}_feedforward_layernorm.weight  [h], Gemma 2 and 3
    model.layers.N.self_attn.{q,k}_norm.weight              [d], Gemma 3
    model.norm.weight                                       [h]

The embedding is multiplied by √h as the model runs, not in the file. A checkpoint that also sees images (Gemma 3 4B and
larger) is read as its text model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from converters.checkpoint import Adapter, Checkpoint, Lazy
from converters.safetensors_file import read_tensors, write_tensors
from core.base_model import text_name
from core.errors import UserError
from core.prompt import PROMPT_FILE, Prompt

TITLE = "Hugging Face folder"
READS = {Checkpoint}
WRITES = {Checkpoint: ""}

INDEX = "model.safetensors.index.json"
# What goes along as it is. Weights of other formats, training states and model cards of the source do not.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "LICENSE*",
)
MAX_SHARD = "5GB"  # as save_pretrained has it


def recognizes(path: Path) -> bool:
    return (path / "config.json").is_file() and (any(path.glob("model*.safetensors")) or (path / INDEX).is_file())


def read(path: Path) -> Checkpoint:
    config = read_json(path / "config.json")
    if "quantization_config" in config:
        raise UserError(f"{path} is quantized; convert the whole model, and quantize the result")
    tensors: dict[str, Lazy] = {}
    for shard in _shards(path):
        for name, tensor in read_tensors(shard).items():
            if name in tensors:
                raise UserError(f"{shard} holds {name}, which another file of the folder holds too")
            tensors[name] = tensor
    if isinstance(config.get("text_config"), dict):
        config = {
            "architectures": ["Gemma3ForCausalLM"],
            "dtype": config.get("dtype") or config.get("torch_dtype"),
            **config["text_config"],
        }
        tensors = {new: tensor for name, tensor in tensors.items() if (new := text_name(name))}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" in tensors and config.get("tie_word_embeddings", True):
        head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if embedding and not torch.equal(head.read(), embedding.read()):
            raise UserError(
                f"{path}: lm_head.weight differs from the embedding, but config.json says that they are one. Set "
                f"tie_word_embeddings to false in it if both were trained, or remove lm_head.weight"
            )
    files = {file.name: file for pattern in COMPANIONS for file in sorted(path.glob(pattern)) if file.is_file()}
    return Checkpoint(config, tensors, files, read_prompt(path))


def write(content: Checkpoint | Adapter, target: Path) -> None:
    assert isinstance(content, Checkpoint)
    target.mkdir()
    plan = split_state_dict_into_shards_factory(
        dict(content.tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    for file, names in plan.filename_to_tensors.items():
        write_tensors(target / file, {name: content.tensors[name] for name in names})
    if plan.is_sharded:
        write_json(target / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    write_json(target / "config.json", content.config)
    for name, content_or_path in content.files.items():
        if isinstance(content_or_path, Path):
            shutil.copyfile(content_or_path, target / name)
        else:
            (target / name).write_bytes(content_or_path)
    if content.prompt:
        content.prompt.save(target)


def _shards(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        return sorted(folder.glob("model*.safetensors"))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map; copy or download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{folder / INDEX} names {name!r}, which is no file of its own folder")
    return [folder / name for name in sorted(set(weight_map.values()))]


def read_prompt(folder: Path) -> Prompt | None:
    """The project's `prompt.json` of an exported folder, or None where there is none."""
    if not (folder / PROMPT_FILE).exists():
        return None
    return as_prompt(read_json(folder / PROMPT_FILE), folder / PROMPT_FILE)


def as_prompt(values: Any, where: Path) -> Prompt:
    """
    Raises:
        UserError: `values` are not those of a Prompt.
    """
    try:
        texts = [values["template"], values["instruction"], values["response"], *values.get("fields", {}).values()]
        "".join(texts).encode()  # must all be texts, and writable
        return Prompt(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where} holds no prompt of this project ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: there is no such file, or no JSON object in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Copy or download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object. Copy or download it again")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
