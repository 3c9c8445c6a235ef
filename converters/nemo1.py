"""NeMo 1's `.nemo` of a Gemma 1 or 2, and of a LoRA for one: an uncompressed tar, or the folder that it unpacks to.

    model_config.yaml               sizes, tokenizer, and of a LoRA `peft.lora_tuning`
    model_weights.ckpt              what `torch.save` wrote: `model.decoder.layers.0.mlp.linear_fc2.weight` …
    mp_rank_RR/model_weights.ckpt   the same in parts, one for each tensor parallel rank; with pipeline parallel
    tp_rank_RR_pp_rank_PPP/…        ranks, each with its own layers, numbered from 0
    model_weights/                  or a distributed checkpoint, torch_dist or zarr
    *_tokenizer.model, tokenizer/   SentencePiece's model; what Hugging Face needs, of those that are written here

NeMo 1 does not support Gemma 3. It is written with `layernorm_zero_centered_gamma: true`, as NeMo's own converter of
Gemma 2 does: norms stay as they are, to the bit. Its converter of Gemma 1 adds 1 to them and rounds, which is undone as
far as it can be. A LoRA's layers have their own names there, see `ADAPTERS`; its canonical variant adds q's, k's and
v's own adapters, which are peft's as they are.
"""

import io
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import yaml

from converters.byte_ranges import ByteRange, files_below, members, parsing
from converters.checkpoint import Adapter, Checkpoint, LazyTensor
from converters.distributed import read_distributed, stack_layers, write_distributed
from converters.megatron_config import config_of, nemo_fields, read_prompt
from converters.megatron_layout import embedding_rows, from_megatron, merge_ranks, to_megatron
from converters.megatron_lora import from_megatron_lora
from converters.megatron_lora_writer import to_megatron_lora
from converters.torch_file import read_tensors
from core.errors import UserError
from core.prompt import PROMPT_FILE

TITLE = "NeMo 1 .nemo (Megatron layout)"
TRIED = "layout of NeMo 1's own converters, read and not run"
READS = {Checkpoint, Adapter}
WRITES = {Checkpoint: ".nemo", Adapter: ".nemo"}

CONFIG, WEIGHTS, TOKENIZER = "model_config.yaml", "model_weights", "tokenizer"
RANK = re.compile(r"(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/model_weights\.ckpt")
# NeMo 1's names of adapters → NeMo 2's.
ADAPTERS = {
    "self_attention.adapter_layer.lora_kqv_adapter": "self_attention.linear_qkv.adapter",
    "self_attention.adapter_layer.lora_dense_attention_adapter": "self_attention.linear_proj.adapter",
    "mlp.adapter_layer.lora_hto4h_adapter": "mlp.linear_fc1.adapter",
    "mlp.adapter_layer.lora_4htoh_adapter": "mlp.linear_fc2.adapter",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter": "self_attention.linear_qkv.adapter.adapter_q",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.k_adapter": "self_attention.linear_qkv.adapter.adapter_k",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.v_adapter": "self_attention.linear_qkv.adapter.adapter_v",
    **{
        f"mlp.adapter_layer.lora_unfused_hto4h_adapter.{part}_adapter": f"mlp.linear_fc1.adapter.adapter_{part}"
        for part in ("gate", "up")
    },
}
# NeMo 1's names of LoRA target modules.
TARGETS = {
    "linear_qkv": "attention_qkv",
    "linear_proj": "attention_dense",
    "linear_fc1": "mlp_fc1",
    "linear_fc2": "mlp_fc2",
}
# Fields of NeMo 2 that have the same name in NeMo 1, and those in its customization config.
SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "init_method_std",
    "layernorm_epsilon",
    "make_vocab_size_divisible_by",
    "rotary_base",
    "window_size",
    "share_embeddings_and_output_weights",
    "layernorm_zero_centered_gamma",
)
CUSTOM = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
# What makes a Megatron GPT a Gemma, of examples/nlp/language_modeling/conf/megatron_gemma{,2}_config.yaml.
GEMMA = {
    "mcore_gpt": True,
    "transformer_engine": True,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "apply_embedding_scaling": True,
    "normalization": "rmsnorm",
    "bias": False,
    "activation": "geglu",
    "openai_gelu": True,
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
    "transformer_block_type": "pre_ln",
    "normalize_attention_scores": True,
    "megatron_amp_O2": False,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
}


def recognizes(path: Path) -> bool:
    try:
        if path.is_dir() and not (path / CONFIG).is_file():  # do not list an arbitrary folder recursively
            return False
        parts = members(path)
        return CONFIG in parts and "num_attention_heads" in (yaml.safe_load(parts[CONFIG].read(1 << 22)) or {})
    except (UserError, OSError, yaml.YAMLError, UnicodeDecodeError, TypeError):
        return path.is_file() and path.suffix == ".nemo"  # `read` says what is wrong with it


def read(path: Path) -> Checkpoint | Adapter:
    """
    Raises:
        UserError: damaged, incomplete or hostile; a model of another kind.
    """
    parts = members(path)
    if CONFIG not in parts:
        raise UserError(f"{path} has no {CONFIG}: it is no whole .nemo")
    where = parts[CONFIG].name
    with parsing(where):
        config = yaml.safe_load(parts[CONFIG].read())
        custom = config.get("mcore_customization_config") or {}
        family = (
            "gemma2" if custom.get("attn_logit_softcapping") or config.get("name") == "megatron_gemma2" else "gemma"
        )
        if not config.get("apply_embedding_scaling") or config.get("normalization") != "rmsnorm":
            raise UserError(f"{where} is not of a Gemma: its embedding is not scaled, or its norms are of another kind")
        fields = {key: config[key] for key in SAME if key in config}
        fields |= {key: custom[key] for key in CUSTOM if key in custom} | {"seq_length": config["encoder_seq_length"]}
        lora = (config.get("peft") or {}).get("lora_tuning") or {}
    tokenizer = files_below(parts, TOKENIZER)
    tensors = _tensors(parts, f"{path}")
    with parsing(where):
        hf = config_of(family, fields, tokenizer, embedding_rows(tensors))
    prompt = read_prompt(parts.get(PROMPT_FILE))
    adapters = {name: lazy for name, lazy in tensors.items() if ".adapter." in name}
    if adapters:
        with parsing(where):
            alpha, dropout = lora.get("alpha"), float(lora.get("adapter_dropout") or 0.0)
            base = lora.get("base") or {}
        adapter = from_megatron_lora(adapters, hf, alpha, dropout)
        adapter.base, adapter.prompt = base, prompt
        return adapter
    files = {
        name: byte_range.read() for name, byte_range in tokenizer.items() if name != "config.json" and "/" not in name
    }
    for name, byte_range in parts.items():
        if name.endswith("tokenizer.model") and "/" not in name:  # NeMo puts a hash before it
            files["tokenizer.model"] = byte_range.read()
    zero_centered = bool(fields.get("layernorm_zero_centered_gamma"))
    return Checkpoint(hf, from_megatron(tensors, hf, zero_centered), files, prompt)


def _tensors(parts: Mapping[str, ByteRange], name: str) -> dict[str, LazyTensor]:
    """The tensors of the full model, with layers numbered across pipeline ranks and adapters under NeMo 2's names."""
    ranks: dict[int, dict[int, dict[str, LazyTensor]]] = defaultdict(dict)  # pipeline rank → tensor rank → its tensors
    if f"{WEIGHTS}.ckpt" in parts:
        ranks[0][0] = read_tensors(parts[f"{WEIGHTS}.ckpt"])
    elif any(part.startswith(f"{WEIGHTS}/") for part in parts):
        ranks[0][0] = read_distributed(files_below(parts, WEIGHTS), f"{name}: {WEIGHTS}")
    for part, byte_range in parts.items():
        if match := RANK.fullmatch(part):
            ranks[int(match[3] or 0)][int(match[1] or match[2])] = read_tensors(byte_range)
    width = max((len(stage) for stage in ranks.values()), default=0)
    if not width or set(ranks) != set(range(len(ranks))) or any(set(s) != set(range(width)) for s in ranks.values()):
        raise UserError(f"{name} does not have the weights of all ranks (model_weights.ckpt, or every mp_rank_00/…)")
    found: dict[str, LazyTensor] = {}
    layers = 0
    for stage in range(len(ranks)):
        merged = merge_ranks(
            [
                {_renamed(key): lazy for key, lazy in ranks[stage][rank].items() if not key.endswith("_extra_state")}
                for rank in range(width)
            ]
        )
        numbered = {key: re.match(r"((?:m\w+\.)*decoder\.layers\.)(\d+)(\..+)", key) for key in merged}
        for key, match in numbered.items():
            found.setdefault(f"{match[1]}{int(match[2]) + layers}{match[3]}" if match else key, merged[key])
        layers += 1 + max((int(match[2]) for match in numbered.values() if match), default=-1)
    return found


def _renamed(key: str) -> str:
    for theirs, ours in ADAPTERS.items():
        key = key.replace(f".{theirs}.", f".{ours}.")
    return key


def write(content: Checkpoint | Adapter, target: Path) -> None:
    """
    Raises:
        UserError: a Gemma 3, or what Megatron has no place for.
    """
    hf = content.config or {}
    if hf.get("model_type") == "gemma3_text":
        raise UserError("NeMo 1 does not support Gemma 3; write it for NeMo 2, to=nemo2")
    lora: dict[str, Any] = {}
    if isinstance(content, Adapter):
        tensors, rank, alpha = to_megatron_lora(content)
        lora = {
            "peft": {
                "peft_scheme": "lora",
                "lora_tuning": {
                    "target_modules": sorted(
                        {TARGETS[name.split(".adapter.")[0].rpartition(".")[2]] for name in tensors}
                    ),
                    "adapter_dim": rank,
                    "alpha": int(alpha) if alpha == int(alpha) else alpha,
                    "variant": "nemo",
                    "adapter_dropout": content.peft.get("lora_dropout", 0.0),
                    "column_init_method": "normal",
                    "row_init_method": "zero",
                    "layer_selection": None,
                    "weight_tying": False,
                    "base": content.base,
                },
            }
        }
        if content.peft.get("use_dora"):
            raise UserError("NeMo 1 has no DoRA; write it for NeMo 2, to=nemo2")
    else:
        weights = {f"model.{name}": lazy for name, lazy in to_megatron(content.tensors, hf).items()}
    files = {
        **({} if isinstance(content, Adapter) else content.files),
        "config.json": json.dumps(hf, indent=2).encode(),
    }
    with tarfile.open(target, "x:", format=tarfile.GNU_FORMAT) as tar:
        config = _model_config(hf, content.base if isinstance(content, Adapter) else content.origin, files) | lora
        for name, data in {
            CONFIG: yaml.safe_dump(config, sort_keys=False).encode(),
            **{f"{TOKENIZER}/{name}": data for name, data in files.items()},
        }.items():
            with _member(tar, name) as file:
                file.write(data.read_bytes() if isinstance(data, Path) else data)
        if content.prompt:
            with _member(tar, PROMPT_FILE) as file:
                file.write(json.dumps(vars(content.prompt), ensure_ascii=False).encode())
        if isinstance(content, Adapter):
            theirs = {ours: name for name, ours in ADAPTERS.items()}
            named = {
                re.sub(r"(?<=\d\.)(.+\.adapter)(?=\.)", lambda match: theirs[match[1]], f"model.{name}"): tensor
                for name, tensor in tensors.items()
            }
            with _member(tar, f"{WEIGHTS}.ckpt") as file:
                torch.save(named, file)
        else:
            write_distributed(stack_layers(weights), lambda name: _member(tar, f"{WEIGHTS}/{name}"))


def _model_config(
    hf: Mapping[str, Any], origin: Mapping[str, str], files: Mapping[str, bytes | Path]
) -> dict[str, Any]:
    fields = nemo_fields(hf)
    hub = "https://huggingface.co/"
    source = origin.get("source", "")
    sentencepiece = "tokenizer.model" in files
    config = {
        "name": "megatron_gemma2" if hf["model_type"] == "gemma2" else "megatron_gemma",
        **GEMMA,
        **{key: list(value) if isinstance(value := fields[key], tuple) else value for key in SAME if key in fields},
        "encoder_seq_length": fields["seq_length"],
        "max_position_embeddings": fields["seq_length"],
        "tokenizer": {
            "library": "sentencepiece" if sentencepiece else "huggingface",
            "type": None if sentencepiece or not source.startswith(hub) else source.removeprefix(hub),
            "model": f"nemo:{TOKENIZER}/tokenizer.model" if sentencepiece else None,
            "sentencepiece_legacy": False,
        },
    }
    custom = {key: fields[key] for key in CUSTOM if key in fields}
    return config | ({"mcore_customization_config": custom} if custom else {})


@contextmanager
def _member(tar: tarfile.TarFile, name: str) -> Iterator[BinaryIO]:
    """A member of `tar` that is written as a stream; its header, which has the length, is filled in afterwards."""
    file = cast(Any, tar.fileobj)
    start = tar.offset
    file.write(bytes(tarfile.BLOCKSIZE))
    yield cast(BinaryIO, _Appending(file, start + tarfile.BLOCKSIZE))
    end = file.tell()
    info = tarfile.TarInfo(f"./{name}")
    info.size = end - start - tarfile.BLOCKSIZE
    header = info.tobuf(tarfile.GNU_FORMAT)
    file.write(bytes(-end % tarfile.BLOCKSIZE))
    tar.offset = file.tell()
    file.seek(start)
    file.write(header)
    file.seek(tar.offset)


class _Appending(io.RawIOBase):
    """`file` from `start` on, for appending, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int):
        self._file, self._start = file, start

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell() - self._start

    def writable(self) -> bool:
        return True
