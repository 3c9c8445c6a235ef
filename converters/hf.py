"""A Hugging Face folder: `config.json`, safetensors (one file, or shards with an index), tokenizer, chat template.

Names and shapes, of the text models of all Gemmas (h hidden, i intermediate, q and k heads of d, v vocabulary):

    model.embed_tokens.weight                               [v, h], also the output layer where embeddings are tied
    model.layers.N.self_attn.{q,k,v,o}_proj.weight          [q·d, h], [k·d, h], [k·d, h], [h, q·d]
    model.layers.N.mlp.{gate,up,down}_proj.weight           [i, h], [i, h], [h, i]
    model.layers.N.{input,post_attention}_layernorm.weight  [h], of which the model uses 1 + weight
    model.layers.N.{pre,post}_feedforward_layernorm.weight  [h], Gemma 2 and 3
    model.layers.N.self_attn.{q,k}_norm.weight              [d], Gemma 3 and 4
    model.norm.weight                                       [h]

The embedding is multiplied by √h at run time, not in the file. Gemma 4 uses its norms' weights as they are, not 1 +
weight, and has in all sizes, in the small ones (layers borrow keys and values, and each adds an embedding of p) and in
the one with E experts of f:

    model.layers.N.layer_scalar                             [1]
    model.embed_tokens_per_layer.weight                     [v, layers · p]
    model.per_layer_model_projection.weight                 [layers · p, h]
    model.per_layer_projection_norm.weight                  [p]
    model.layers.N.per_layer_input_gate.weight              [p, h]
    model.layers.N.per_layer_projection.weight              [h, p]
    model.layers.N.post_per_layer_input_norm.weight         [h]
    model.layers.N.experts.{gate_up,down}_proj              [E, 2f, h], [E, h, f]
    model.layers.N.router.{proj.weight,scale,…}             [E, h], [h], and per_expert_scale [E]

k_proj, v_proj and k_norm are missing in layers that borrow, v_proj where values are the keys; core/layer_shapes.py
says which. Google's files have them all the same in layers that borrow: nothing reads them, and they are left out.

Of a multimodal checkpoint (Gemma 3 4B and larger, all of Gemma 4) the text model is read. What was merged into that of
a Gemma 4 can be put back into the whole: see `Checkpoint.whole`.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from converters.checkpoint import Adapter, Checkpoint, LazyTensor
from converters.safetensors_file import read_tensors, write_tensors, write_with
from core import text_model
from core.errors import UserError
from core.files import read_json
from core.gemma_config import FAMILIES, is_whole, text_config, write_both_dialects
from core.prompt import PROMPT_FILE, Prompt
from core.text_model import BORROWED, INDEX, text_name

TITLE = "Hugging Face folder"
TRIED = "transformers 5.23.0"
READS = {Checkpoint}
WRITES = {Checkpoint: ""}

# Copied unchanged. Weights in other formats, training states and model cards of the source are not.
COMPANIONS = (*text_model.COMPANIONS, "vocab*", "LICENSE*")
OF_THE_WHOLE = (INDEX, "*processor_config.json")  # copied too where a whole model is written
MAX_SHARD = "5GB"  # as save_pretrained has it


def recognizes(path: Path) -> bool:
    return (path / "config.json").is_file() and (any(path.glob("model*.safetensors")) or (path / INDEX).is_file())


def read(path: Path) -> Checkpoint:
    config = read_json(path / "config.json")
    if "quantization_config" in config:
        raise UserError(f"{path} is quantized; convert the unquantized model, and quantize the result")
    tensors: dict[str, LazyTensor] = {}
    for shard in _shards(path):
        for name, tensor in read_tensors(shard).items():
            if name in tensors:
                raise UserError(f"{shard} holds {name}, which another file of the folder holds too")
            tensors[name] = tensor
    if is_whole(config):
        text, dtype = text_config(config), config.get("dtype") or config.get("torch_dtype")
        family = FAMILIES.get(str(text.get("model_type")))  # any other is refused when shapes are checked
        config = {**text, "dtype": text.get("dtype") or dtype, "architectures": [family.text] if family else []}
        tensors = {new: tensor for name, tensor in tensors.items() if (new := text_name(name))}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if unused := borrowed(config, tensors):
        print(f"{path} has {len(unused)} tensors that nothing reads, of layers that borrow keys and values: left out")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    if "lm_head.weight" in tensors and config.get("tie_word_embeddings", True):
        head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if embedding and not torch.equal(head.read(), embedding.read()):
            raise UserError(
                f"{path}: lm_head.weight differs from the embedding, but config.json says that they are tied. Set "
                f"tie_word_embeddings to false in it if both were trained, or remove lm_head.weight"
            )
    files = {file.name: file for pattern in COMPANIONS for file in sorted(path.glob(pattern)) if file.is_file()}
    return Checkpoint(config, tensors, files, read_prompt(path))


def borrowed(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Those of `names` that nothing reads: of keys and values, in layers that take those of an earlier layer."""
    layers, sharing = config.get("num_hidden_layers"), config.get("num_kv_shared_layers")
    if not isinstance(layers, int) or not isinstance(sharing, int):
        return set()
    return {name for name in names if (part := BORROWED.fullmatch(name)) and int(part[1]) >= layers - sharing}


def write(content: Checkpoint | Adapter, target: Path) -> None:
    assert isinstance(content, Checkpoint)
    target.mkdir()
    if content.whole:
        _write_whole(content, content.whole, target)
        return
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
    write_json(target / "config.json", write_both_dialects(content.config))
    for name, content_or_path in content.files.items():
        if isinstance(content_or_path, Path):
            shutil.copyfile(content_or_path, target / name)
        else:
            (target / name).write_bytes(content_or_path)
    if content.prompt:
        content.prompt.save(target)


def _write_whole(content: Checkpoint, whole: Path, target: Path) -> None:
    """The folder `whole` again, with the values of `content` in the text model's tensors."""
    for shard in _shards(whole):
        named = {name: text_name(name) or "" for name in read_tensors(shard)}
        values = {name: content.tensors[new] for name, new in named.items() if new in content.tensors}
        write_with(shard, target / shard.name, values)
    write_json(target / "config.json", write_both_dialects(read_json(whole / "config.json")))
    for file in sorted(file for pattern in (*COMPANIONS, *OF_THE_WHOLE) for file in whole.glob(pattern)):
        shutil.copyfile(file, target / file.name)
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
    """The prompt in this project's `prompt.json` of an exported folder, or None."""
    if not (folder / PROMPT_FILE).exists():
        return None
    return parse_prompt(read_json(folder / PROMPT_FILE), folder / PROMPT_FILE)


def parse_prompt(values: Any, where: Path) -> Prompt:
    """A Prompt of untrusted `values`; `where` is for the error message.

    Raises:
        UserError: they are not those of a Prompt.
    """
    try:
        texts = [values["template"], values["instruction"], values["response"], *values.get("fields", {}).values()]
        "".join(texts).encode()  # must all be text that UTF-8 can encode
        return Prompt(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where} holds no prompt of this project ({error})") from None


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
