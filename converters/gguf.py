"""GGUF, llama.cpp's format: models in F32, F16, BF16 or Q8_0, and LoRA adapters, read and written.

Every quantization that the `gguf` package can dequantize is read, into bfloat16: Q4_0 … Q8_0, K-quants, I-quants.

The layout compared with transformers' (see `hf`):

- Names are llama.cpp's: `blk.3.attn_q.weight` for `model.layers.3.self_attn.q_proj.weight`, see `gguf.TensorNameMap`.
  Shapes, row order and head order are the same.
- Norms hold w + 1, in float32, since llama.cpp multiplies by the weight itself. That sum keeps 23 fractional bits:
  it is exact for weights of float16 models down to 2**-13 in size, and of bfloat16 models down to 2**-16.
- The output layer is the embedding and is not stored twice. The embedding has a row for every listed token.
- A LoRA's two factors are `blk.3.attn_q.weight.lora_a` [r, in] and `.lora_b` [out, r]; its alpha is one number for
  the whole file, and each update is scaled by alpha / r with the tensor's own r.

What is different in Gemma 4, whose norms are stored as they are, is in `gguf_gemma4`.

A model in several files (`…-00001-of-00003.gguf`, as llama.cpp's gguf-split leaves it) has its fields in the first; all
of them are read, whichever is named.

The prompt and the origin, for which llama.cpp has no field, are stored as JSON under keys of this project.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    ReaderTensor,
    dequantize,
    get_tensor_name_map,
    quantize,
)
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from converters import gguf_gemma4
from converters.adapter import PREFIX, lora_settings
from converters.checkpoint import Adapter, Checkpoint, LazyTensor, in_memory
from converters.formats import PART
from converters.gguf_metadata import FAMILIES, PLAIN, Header, add_config, read_config
from converters.hf import parse_prompt
from converters.layerwise_forward import empty_model
from converters.merge_lora import lora_updates, weight_name
from converters.vocabulary import add_to_gguf, read_vocabulary, tokenizer_from_gguf
from core.errors import UserError
from core.progress import Progress
from core.prompt import Prompt

TITLE = "GGUF file of llama.cpp: a model, or a LoRA adapter"
TRIED = "gguf 0.19.0, llama.cpp in xllamacpp 2026.10.11549"
READS = {Checkpoint, Adapter}
WRITES = {Checkpoint: ".gguf", Adapter: ".gguf"}
DTYPES = ("source", "f32", "f16", "bf16", "q8_0")
TOLERANCE = {"mean_kl_divergence": 0.005}  # Q8_0 rounds; see above for norms in float32

# How matrices are stored, by `dtype` or the source's dtype, and the file type that llama.cpp shows for it.
KINDS = {
    "f32": GGMLQuantizationType.F32,
    torch.float32: GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    torch.float16: GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    torch.bfloat16: GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
PROMPT, ORIGIN = "gemma_nemo.prompt", "gemma_nemo.origin"
BLOCK = re.compile(r"^blk\.(0|[1-9]\d{0,3})\.")
CHUNK = 1 << 24  # values converted at a time


def recognizes(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def read(path: Path) -> Checkpoint | Adapter:
    """
    Raises:
        UserError: not a whole GGUF of a text Gemma, or one whose tensors are not those that its fields describe.
    """
    parts = _parts(path)
    file = parts[0]
    headers = [_header(part) for part in parts]
    header, fields = headers[0], {key: field.contents() for key, field in headers[0].fields.items()}
    if len(parts) != (count := fields.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1)):
        raise UserError(
            f"{file} is one of {count} parts; give the parts the names that llama.cpp's gguf-split gives them"
        )
    families = {MODEL_ARCH_NAMES[arch]: family for family, arch in FAMILIES.items()}
    family = families.get(str(fields.get(Keys.General.ARCHITECTURE)))
    if family is None:
        raise UserError(
            f"{file} is of architecture {fields.get(Keys.General.ARCHITECTURE)!r}, not of {', '.join(families)}"
        )
    try:
        if fields.get(Keys.General.TYPE) == GGUFType.ADAPTER:
            return _read_adapter(file, header, fields, family)
        stored = {
            tensor.name: (part, tensor) for part, one in zip(parts, headers, strict=True) for tensor in one.tensors
        }
        if len(stored) != fields.get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, len(stored)):
            raise UserError(f"{file} and its other parts do not hold as many tensors as it says; copy them again")
        return _read_model(file, stored, fields, family)
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
        StrictDataclassError,
    ) as error:
        raise UserError(f"{file}: a field is missing or of the wrong kind ({type(error).__name__}: {error})") from None


def _parts(path: Path) -> list[Path]:
    """The files of the model that `path` is, or is a part of, in order."""
    if not (part := PART.search(path.stem)) or not int(part[2]):
        return [path]
    name = path.stem.removesuffix(part[0])
    found = [path.with_name(f"{name}-{number:05d}-of-{part[2]}.gguf") for number in range(1, int(part[2]) + 1)]
    if missing := [file.name for file in found if not file.is_file()]:
        raise UserError(f"{path} is one of {len(found)} parts, and {missing[0]} is not beside it; copy that too")
    return found


def _header(file: Path) -> GGUFReader:
    try:
        header = Header(file)
        for field in header.fields.values():
            field.contents()
    # The reader has no exceptions of its own: damage raises whichever of Python's or numpy's it causes.
    except Exception as error:
        raise UserError(f"{file} is not a complete GGUF file ({type(error).__name__}: {error})") from None
    if header.byte_order != "I":
        raise UserError(f"{file} is big-endian, which only llama.cpp on such a machine reads")
    return header


def _read_model(
    file: Path, parts: Mapping[str, tuple[Path, ReaderTensor]], fields: Mapping[str, Any], family: str
) -> Checkpoint:
    stored = {name: tensor for name, (_, tensor) in parts.items()}
    config = read_config(fields, family, stored)
    if "output.weight" in stored:
        config["tie_word_embeddings"] = False
    family = config["model_type"]
    names = {llama: name for name, llama in _names(family, config["num_hidden_layers"]).items()}
    of_4 = family in gguf_gemma4.FAMILIES
    dtype = getattr(torch, config["dtype"])
    tensors: dict[str, LazyTensor] = {}
    for llama, tensor in stored.items():
        name = names.get(llama)
        if of_4 and (llama == gguf_gemma4.ROPE_FREQS or gguf_gemma4.is_borrowed(llama, config)):
            continue
        if name is None:
            raise UserError(f"{file} has a tensor {llama}, which no {family} of so many layers has")
        shape = tuple(reversed(tensor.shape.tolist()))
        read_it = partial(
            _read_tensor, parts[llama][0], tensor, shape, dtype, not of_4 and name.endswith("norm.weight")
        )
        tensors[name] = LazyTensor(shape, dtype, read_it)
    # An instruction-tuned model ends a turn with another token than EOS.
    stops = [config["eos_token_id"]]
    if Keys.Tokenizer.CHAT_TEMPLATE in fields and Keys.Tokenizer.EOT_ID in fields:
        stops = sorted({*stops, fields[Keys.Tokenizer.EOT_ID], *(gguf_gemma4.ends_of_turn(fields) if of_4 else ())})
    config["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    generation = GenerationConfig.from_model_config(AutoConfig.for_model(**config))
    generation.suppress_tokens = fields.get(gguf_gemma4.SUPPRESS)
    return Checkpoint(
        config=config,
        tensors=tensors,
        files=tokenizer_from_gguf(file) | {"generation_config.json": generation.to_json_string().encode()},
        prompt=_read_prompt(file, fields),
        origin=_read_origin(file, fields)
        or {"name": str(fields.get(Keys.General.NAME, file.stem)), "source": file.name},
    )


def _read_tensor(file: Path, tensor: ReaderTensor, shape: tuple[int, ...], dtype: torch.dtype, norm: bool) -> Tensor:
    """A tensor in `dtype`, read and dequantized some rows at a time."""
    kind, into = tensor.tensor_type, torch.empty(shape, dtype=dtype)
    rows = into.view(-1, shape[-1])
    row_bytes = int(tensor.n_bytes) // len(rows)
    step = max(1, CHUNK // shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        raw = np.fromfile(file, np.uint8, len(part) * row_bytes, offset=int(tensor.data_offset) + start * row_bytes)
        if raw.size != len(part) * row_bytes:
            raise UserError(f"{file} ends within {tensor.name}")
        if kind in PLAIN:
            values = torch.from_numpy(raw).view(PLAIN[kind]).view(part.shape)
        else:
            values = torch.from_numpy(dequantize(raw.reshape(len(part), row_bytes), kind))
        part.copy_(values - 1 if norm else values)
    return into


def _read_adapter(file: Path, header: GGUFReader, fields: Mapping[str, Any], family: str) -> Adapter:
    if fields.get(Keys.Adapter.TYPE) != "lora":
        raise UserError(f"{file} is an adapter of type {fields.get(Keys.Adapter.TYPE)!r}, not a LoRA")
    if Keys.Adapter.ALORA_INVOCATION_TOKENS in fields:
        raise UserError(
            f"{file} is an activated LoRA (aLoRA), which acts only after certain tokens: it cannot be "
            f"converted; use it in llama.cpp, or train a plain LoRA"
        )
    stored = {tensor.name: tensor for tensor in header.tensors}
    hugging_face = {llama: name for name, llama in _names(family, 1).items()}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        weight, _, factor = name.rpartition(".lora_")
        # Any layer may be the only one that is adapted: its names are those of the first, with another number.
        weight, number = BLOCK.sub("blk.0.", weight), BLOCK.match(weight)
        layer = hugging_face.get(weight, "").removesuffix(".weight")
        layer = layer.replace(".0.", f".{number[1]}.", 1) if number else layer
        if not layer or factor not in ("a", "b") or len(tensor.shape) != (3 if ".experts." in layer else 2):
            raise UserError(f"{file}: {name} is no LoRA of a {family}'s layer")
        if tensor.tensor_type not in PLAIN:
            raise UserError(f"{file}: {name} is quantized, which no adapter of peft is")
        shape = tuple(reversed(tensor.shape.tolist()))
        layers.setdefault(layer, {})[factor] = _read_tensor(file, tensor, shape, PLAIN[tensor.tensor_type], False)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, found in layers.items():
        if (
            len(found) != 2
            or found["a"].shape[-2] != found["b"].shape[-1]
            or len({len(x.shape) for x in found.values()}) != 1
        ):
            raise UserError(f"{file}: the two factors of {layer} do not fit each other")
        module, factors, ranks[layer] = layer, (found["a"], found["b"]), found["b"].shape[-1]
        if ".experts." in layer:
            module, factors = gguf_gemma4.experts_to_peft(layer, *factors, layers)
        for which, factor_ in zip("AB", factors, strict=True):
            tensors[f"{PREFIX}{module}.lora_{which}.weight"] = factor_
    if not ranks:
        raise UserError(f"{file} is an adapter without tensors")
    rank, alpha = max(ranks.values()), float(fields[Keys.Adapter.LORA_ALPHA])
    if not (math.isfinite(alpha) and alpha):
        raise UserError(f"{file}: {Keys.Adapter.LORA_ALPHA} is {alpha}")
    settings: dict[str, Any] = {"r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "bias": "none"}
    # Each update is scaled by alpha / r with its own r, so that only ranks differ between layers.
    if smaller := {layer: r for layer, r in ranks.items() if r != rank}:
        settings["rank_pattern"] = smaller
    if adapted := sorted({layer.split(".", 3)[3] for layer in layers if ".experts." in layer}):
        settings["target_parameters"] = adapted
    peft = lora_settings(settings, tensors, file)
    return Adapter(peft, tensors, base=_read_origin(file, fields), prompt=_read_prompt(file, fields))


def write(content: Checkpoint | Adapter, target: Path, dtype: str = "source") -> None:
    """Write the file `target`.

    Args:
        dtype: of the matrices, one of `DTYPES`; by default the source's, so that nothing is rounded.

    Raises:
        UserError: llama.cpp has no field for something that the model needs, or no tokenizer comes with it.
    """
    if isinstance(content, Adapter):
        _write_adapter(content, target)
        return
    if content.config.get("model_type") not in FAMILIES:
        raise UserError(
            f"no GGUF of a {content.config.get('model_type')} is known here; of {', '.join(FAMILIES)} one is"
        )
    config = AutoConfig.for_model(**content.config)
    of_4 = config.model_type in gguf_gemma4.FAMILIES
    kind = KINDS[content.tensors["model.embed_tokens.weight"].dtype if dtype == "source" else dtype]
    writer = _writer(target, config.model_type, GGUFType.MODEL, FILE_TYPES[kind], content.prompt, content.origin)
    add_config(writer, config)
    add_to_gguf(writer, read_vocabulary(content.files, config))
    if of_4 and (suppressed := gguf_gemma4.suppressed(content.files)):
        writer.add_array(gguf_gemma4.SUPPRESS, suppressed)
    names = _names(config.model_type, config.num_hidden_layers)
    tensors = {}
    if of_4:
        tensors[gguf_gemma4.ROPE_FREQS] = in_memory(gguf_gemma4.rope_freqs(config))
    for name, lazy in content.tensors.items():
        if name.endswith("norm.weight") and not of_4:
            lazy = LazyTensor(lazy.shape, torch.float32, lambda lazy=lazy: lazy.read().float() + 1)  # type: ignore[misc]
        tensors[names[name]] = lazy
    matrices = [n for n, lazy in tensors.items() if len(lazy.shape) > 1 and not n.endswith(gguf_gemma4.ROUTER)]
    _write_tensors(writer, tensors, dict.fromkeys(matrices, kind))


def _writer(
    target: Path, family: str, of: str, file_type: LlamaFileType, prompt: Prompt | None, origin: Mapping[str, str]
) -> GGUFWriter:
    writer = GGUFWriter(target, MODEL_ARCH_NAMES[FAMILIES[family]])
    writer.add_type(of)
    writer.add_name(origin.get("name", target.stem))
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if prompt is not None:
        writer.add_string(PROMPT, json.dumps(asdict(prompt), ensure_ascii=False))
    if origin:
        writer.add_string(ORIGIN, json.dumps(dict(origin), ensure_ascii=False))
    return writer


def _write_adapter(adapter: Adapter, target: Path) -> None:
    family = (adapter.config or {}).get("model_type")
    if family not in FAMILIES:
        raise UserError("an adapter in GGUF names the family of its base; give the folder of that Gemma: base=FOLDER")
    if adapter.peft.get("use_dora"):
        raise UserError("llama.cpp has no DoRA: convert to=merged, and that folder to=gguf")
    found = lora_updates(adapter, target)
    for layer in found:
        if reason := next((why for name, why in gguf_gemma4.UNADAPTED.items() if layer.endswith(name)), None):
            raise UserError(f"{layer} has a LoRA, {reason}: convert to=merged, and that folder to=gguf")
    names = _names(family, 1 + max(int(layer.split(".")[2]) for layer in found))
    # There is one alpha for the whole file: where layers differ in alpha, the ratio is multiplied into B.
    alpha = max(update.scale * update.lora_a.shape[-2] for update in found.values())
    tensors: dict[str, LazyTensor] = {}
    for layer, update in found.items():
        ratio = update.scale * update.lora_a.shape[-2] / alpha
        for factor, tensor in (
            ("a", update.lora_a),
            ("b", update.lora_b if ratio == 1 else update.lora_b.float() * ratio),
        ):
            tensors[f"{names[weight_name(layer)]}.lora_{factor}"] = in_memory(tensor.contiguous())
    kinds = {name: KINDS[lazy.dtype] for name, lazy in tensors.items()}
    file_type = FILE_TYPES[next(iter(kinds.values()))]
    writer = _writer(target, family, GGUFType.ADAPTER, file_type, adapter.prompt, adapter.base)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    _write_tensors(writer, tensors, kinds)


def _write_tensors(
    writer: GGUFWriter, tensors: Mapping[str, LazyTensor], kinds: Mapping[str, GGMLQuantizationType]
) -> None:
    """Fill the writer's file, one tensor in memory at a time. Those without a kind are stored in float32."""
    kinds = {name: kinds.get(name, GGMLQuantizationType.F32) for name in tensors}
    for name, lazy in tensors.items():
        row_bytes = _row_bytes(lazy.shape[-1], kinds[name], name)
        size = row_bytes * (lazy.nbytes // lazy.dtype.itemsize // lazy.shape[-1])
        # This dtype is ignored in favour of `raw_dtype`.
        writer.add_tensor_info(name, lazy.shape, np.dtype(np.float32), size, kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with Progress("Writing", sum(lazy.nbytes for lazy in tensors.values())) as progress:
            done = 0
            for name, lazy in tensors.items():
                writer.write_tensor_data(_encoded(lazy.read(), kinds[name], name))
                done += lazy.nbytes
                progress.at(done)
    finally:
        writer.close()


def _row_bytes(values: int, kind: GGMLQuantizationType, name: str) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    if values % block:
        raise UserError(
            f"{name} has rows of {values} values, which {kind.name} cannot divide by {block}; use dtype=bf16"
        )
    return values // block * size


def _encoded(tensor: Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """The bytes of `tensor` as `kind`, rounded some rows at a time."""
    if PLAIN.get(kind) == tensor.dtype:
        return tensor.contiguous().view(-1).view(torch.uint8).numpy()
    rows = tensor.view(-1, tensor.shape[-1])
    into = np.empty((len(rows), _row_bytes(rows.shape[1], kind, name)), np.uint8)
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if kind in PLAIN:
            rounded = part.to(PLAIN[kind])
            if not torch.isfinite(rounded).all():
                raise UserError(f"{name} holds values that {kind.name} cannot hold; use dtype=bf16")
            into[start : start + step] = rounded.view(torch.uint8).numpy()
        else:
            into[start : start + step] = quantize(part.float().numpy(), kind)
    return into


def _names(family: str, layers: int) -> dict[str, str]:
    """Transformers' name of a tensor (`model.layers.0.mlp.up_proj.weight`) → llama.cpp's (`blk.0.ffn_up.weight`)."""
    known = get_tensor_name_map(FAMILIES[family], layers)
    of_4 = family in gguf_gemma4.FAMILIES
    config = gguf_gemma4.with_everything(layers) if of_4 else {"model_type": family, "num_hidden_layers": layers}
    model = empty_model({**config, "tie_word_embeddings": False})
    if of_4:
        return {name: gguf_gemma4.tensor_name(name, known) for name in model.state_dict()}
    return {name: f"{known.get_name(name.removesuffix('.weight'))}.weight" for name in model.state_dict()}


def _read_prompt(file: Path, fields: Mapping[str, Any]) -> Prompt | None:
    return parse_prompt(_json_field(file, fields, PROMPT), file) if PROMPT in fields else None


def _read_origin(file: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    found = _json_field(file, fields, ORIGIN) if ORIGIN in fields else {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"{file}: {ORIGIN} is damaged")
    return found


def _json_field(file: Path, fields: Mapping[str, Any], key: str) -> Any:
    try:
        return json.loads(fields[key])
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{file}: {key} is damaged") from None
