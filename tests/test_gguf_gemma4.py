"""A GGUF of a Gemma 4 is what llama.cpp reads, of every size, and gives back what it was made of.

Where xllamacpp is installed, llama.cpp itself runs the files (`run_llama_cpp.py`).
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, read_checked
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from peft import LoraConfig, PeftModel, get_peft_model
from test_gguf import copy_of, finish
from tiny_gemma4 import KINDS, tiny_folder4, tiny_gemma4, tiny_tokenizer4
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma4TextConfig

from benchmarks.worker import NotRun, find_python
from converters import adapter as adapter_folder
from converters import gguf, gguf_gemma4, hf
from converters.checkpoint import Adapter, Checkpoint, in_memory
from converters.gguf_metadata import add_config
from core.errors import UserError
from core.layer_shapes import FULL, SLIDING

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "{{ bos_token }}<|turn>user\n{{ messages[0].content }}<turn|>\n"
IDS = [2, *range(300, 340)]  # rows longer than the window of 16
SHOWN = {48, 49, 50, 51, 52, 100, 101}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of every kind and dtype, each made when it is first asked for."""

    class Folders(dict[tuple[str, torch.dtype], Path]):
        def __missing__(self, key: tuple[str, torch.dtype]) -> Path:
            kind, dtype = key
            self[key] = tiny_folder4(kind, tmp_path_factory.mktemp(kind), dtype)
            (self[key] / "chat_template.jinja").write_text(TEMPLATE)
            return self[key]

    return Folders()


read = partial(read_checked, gguf)


def fields_of(path: Path) -> dict[str, Any]:
    return {key: value.contents() for key, value in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_preserves_every_bit_and_setting(
    kind: str, dtype: torch.dtype, folders: Any, tmp_path: Path
) -> None:
    expected = hf.read(folders[kind, dtype])
    gguf.write(expected, tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    assert isinstance(found, Checkpoint) and set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name].read(), tensor.read()), name
    old_dialect = {"global_head_dim", "num_global_key_value_heads"}
    keys = (expected.config.keys() | found.config.keys()) - {"eos_token_id", *old_dialect}
    assert {key: found.config.get(key) for key in keys} == {key: expected.config.get(key) for key in keys}
    assert found.config["eos_token_id"] == [1, 50, 106]  # it may end with its turn, or to call a tool
    assert found.files["tokenizer.json"] == (folders[kind, dtype] / "tokenizer.json").read_bytes()
    assert found.files["chat_template.jinja"].decode() == TEMPLATE


PUBLISHED = {  # as config.json of the published models has it
    "e2b": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "sliding_window": 512,
    },
    "31b": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 262_144,
    },
    "26b-a4b": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "max_position_embeddings": 262_144,
    },
}
FIELDS = {
    "e2b": {
        "context_length": 131_072,
        "block_count": 35,
        "attention.head_count_kv": 1,
        "attention.shared_kv_layers": 20,
        "attention.sliding_window": 512,
        "attention.sliding_window_pattern": ([True] * 4 + [False]) * 7,
        "feed_forward_length": [6144] * 15 + [12_288] * 20,
        "embedding_length_per_layer_input": 256,
    },
    "31b": {
        "context_length": 262_144,
        "block_count": 60,
        "attention.head_count_kv": ([16] * 5 + [4]) * 10,
        "attention.shared_kv_layers": 0,
        "attention.sliding_window": 1024,
        "attention.sliding_window_pattern": ([True] * 5 + [False]) * 10,
        "feed_forward_length": 21_504,
        "embedding_length_per_layer_input": 0,
    },
    "26b-a4b": {
        "attention.head_count_kv": ([8] * 5 + [2]) * 5,
        "feed_forward_length": 2112,
        "expert_count": 128,
        "expert_used_count": 8,
        "expert_feed_forward_length": 704,
    },
}
OF_ALL = {
    "attention.key_length": 512,
    "attention.value_length": 512,
    "attention.key_length_swa": 256,
    "attention.value_length_swa": 256,
    "rope.dimension_count": 512,
    "rope.dimension_count_swa": 256,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 1e4,
    "final_logit_softcapping": 30.0,
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_fields_of_the_published_sizes_are_those_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    config = Gemma4TextConfig(final_logit_softcapping=30.0, **PUBLISHED[kind])
    writer = GGUFWriter(tmp_path / "model.gguf", "gemma4")
    add_config(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = fields_of(tmp_path / "model.gguf")
    assert {name: fields[f"gemma4.{name}"] for name in {**OF_ALL, **FIELDS[kind]}} == {**OF_ALL, **FIELDS[kind]}
    assert ("gemma4.expert_count" in fields) == (kind == "26b-a4b")


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def test_the_tensors_have_the_names_types_and_values_of_llama_cpp(folders: Any, tmp_path: Path) -> None:
    gguf.write(hf.read(folders["26b-a4b", torch.bfloat16]), tmp_path / "model.gguf")
    found, layer = stored(tmp_path / "model.gguf"), tiny_gemma4("26b-a4b", torch.bfloat16).model.layers[3]
    assert found["blk.0.ffn_gate_up_exps.weight"].shape.tolist() == [64, 48, 4]
    assert found["blk.0.ffn_down_exps.weight"].tensor_type == GGMLQuantizationType.BF16
    for name, parameter in {
        "ffn_gate_inp.weight": layer.router.proj.weight,
        "ffn_gate_inp.scale": layer.router.scale,
        "ffn_down_exps.scale": layer.router.per_expert_scale,
        "pre_ffw_norm_2.weight": layer.pre_feedforward_layernorm_2.weight,
        "post_ffw_norm_1.weight": layer.post_feedforward_layernorm_1.weight,
        "post_ffw_norm_2.weight": layer.post_feedforward_layernorm_2.weight,
        "layer_output_scale.weight": layer.layer_scalar,
        "attn_norm.weight": layer.input_layernorm.weight,  # no 1 is added
    }.items():
        assert found[f"blk.3.{name}"].tensor_type == GGMLQuantizationType.F32
        values = torch.from_numpy(np.array(found[f"blk.3.{name}"].data))
        assert torch.equal(values.flatten(), parameter.detach().float().flatten()), name


@pytest.mark.parametrize("kind", ["e2b", "12b"])
def test_layers_have_only_the_keys_and_values_that_are_their_own(kind: str, folders: Any, tmp_path: Path) -> None:
    gguf.write(hf.read(folders[kind, torch.bfloat16]), tmp_path / "model.gguf")
    found, small = stored(tmp_path / "model.gguf"), kind in ("e2b", "e4b")
    assert np.array(found["rope_freqs.weight"].data).tolist() == [1.0] * 4 + [float(np.float32(1e30))] * 12
    assert ("per_layer_token_embd.weight" in found) == small
    assert [f"blk.{number}.attn_k.weight" in found for number in range(6)] == [True] * 5 + [not small]
    assert [f"blk.{number}.attn_v.weight" in found for number in range(6)] == [True] * 5 + [False]


def test_the_router_is_never_quantized(folders: Any, tmp_path: Path) -> None:
    config = hf.read(folders["26b-a4b", torch.bfloat16]).config | {"moe_intermediate_size": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    source = hf.read(folders["26b-a4b", torch.bfloat16])
    source.config = config
    source.tensors = {name: in_memory(t) for name, t in model.state_dict().items() if name != "lm_head.weight"}
    gguf.write(source, tmp_path / "model.gguf", "q8_0")
    kinds = {
        name.split(".", 2)[-1]: tensor.tensor_type.name for name, tensor in stored(tmp_path / "model.gguf").items()
    }
    assert {kinds[name] for name in ("attn_q.weight", "ffn_gate_up_exps.weight", "ffn_down_exps.weight")} == {"Q8_0"}
    assert kinds["ffn_gate_inp.weight"] == kinds["ffn_gate_inp.scale"] == kinds["layer_output_scale.weight"] == "F32"
    found = read(tmp_path / "model.gguf")
    assert found.config["dtype"] == "bfloat16"
    router = "model.layers.2.router.proj.weight"
    assert torch.equal(found.tensors[router].read(), model.state_dict()[router])


def test_keys_and_values_that_no_layer_reads_are_left_out(folders: Any, tmp_path: Path) -> None:
    """As converters of Google's own files store them, for layers that borrow."""
    source = hf.read(folders["e2b", torch.bfloat16])
    expected = set(source.tensors)
    names = gguf._names("gemma4_text", 10)
    extra = {f"model.layers.9.self_attn.{part}.weight" for part in ("k_proj", "v_proj", "k_norm")}
    assert {names[name] for name in extra} == {f"blk.9.attn_{part}.weight" for part in ("k", "v", "k_norm")}
    source.tensors = {**source.tensors, **{name: in_memory(torch.ones(32, 64)) for name in extra}}
    gguf.write(source, tmp_path / "model.gguf")
    assert "blk.9.attn_k.weight" in stored(tmp_path / "model.gguf")
    assert set(read(tmp_path / "model.gguf").tensors) == expected


def test_tokens_that_a_parser_must_see_are_no_control_tokens(folders: Any, tmp_path: Path) -> None:
    source = hf.read(folders["31b", torch.bfloat16])
    source.files = {**source.files, "generation_config.json": json.dumps({"suppress_tokens": [258, 257]}).encode()}
    gguf.write(source, tmp_path / "model.gguf")
    field = fields_of(tmp_path / "model.gguf")
    assert field["tokenizer.ggml.model"] == "gemma4" and "tokenizer.ggml.pre" not in field
    assert field["tokenizer.ggml.add_bos_token"] is True and field["tokenizer.ggml.add_space_prefix"] is False
    assert field["tokenizer.ggml.eot_token_id"] == 106 and field["tokenizer.ggml.suppress_tokens"] == [258, 257]
    assert {number for number, kind in enumerate(field["tokenizer.ggml.token_type"]) if kind == 4} == SHOWN
    assert [field["tokenizer.ggml.token_type"][number] for number in (0, 1, 2, 98, 105, 106)] == [3] * 6
    ranks = tiny_tokenizer4().backend_tokenizer.to_str()
    assert field["tokenizer.ggml.merges"] == [" ".join(pair) for pair in json.loads(ranks)["model"]["merges"]]
    generation = json.loads(read(tmp_path / "model.gguf").files["generation_config.json"])
    assert generation["suppress_tokens"] == [258, 257] and generation["eos_token_id"] == [1, 50, 106]


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("e2b", {"num_kv_shared_layers": 4}, "borrowed"),
        ("e2b", {"vocab_size_per_layer_input": 1000}, "vocabulary"),
        ("31b", {"use_bidirectional_attention": "all"}, "later tokens"),
        ("31b", {"hidden_activation": "relu"}, "activation"),
        ("31b", {"layer_types": [FULL] * 6}, "one kind"),
        ("12b", {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}}, "RoPE"),
    ],
)
def test_a_model_that_llama_cpp_cannot_run_is_refused(
    kind: str, change: dict[str, Any], named: str, folders: Any, tmp_path: Path
) -> None:
    found = hf.read(folders[kind, torch.bfloat16])
    for name, value in change.items():
        found.config[name] = {**found.config[name], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=named):
        gguf.write(found, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gemma4.attention.sliding_window_pattern", [True, False]),
        ("gemma4.attention.head_count_kv", 3),
        ("gemma4.feed_forward_length", [96] * 5 + [7]),
        ("gemma4.attention.shared_kv_layers", 4),
        ("gemma4.block_count", 1 << 30),
        ("gemma_nemo.model_type", "gemma9"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(name: str, value: Any, folders: Any, tmp_path: Path) -> None:
    gguf.write(hf.read(folders["31b", torch.bfloat16]), tmp_path / "whole.gguf")
    reader = GGUFReader(tmp_path / "whole.gguf")
    writer = copy_of(reader, tmp_path / "model.gguf", {name: value})
    for tensor in reader.tensors:
        kind = tensor.tensor_type if tensor.tensor_type == GGMLQuantizationType.BF16 else None
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=kind)
    finish(writer)
    with pytest.raises(UserError, match=r"model\.gguf"):
        read(tmp_path / "model.gguf")


# --- llama.cpp itself ----------------------------------------------------------------------------------------------
def llama_cpp(
    model: Path, lora: Path | None = None, texts: tuple[str, ...] = (), vocabulary: int = 1024
) -> dict[str, Any]:
    """llama.cpp's log probabilities after the first tokens of `IDS`, of the lengths in `LENGTHS`, and its tokens."""
    interpreters = [os.environ.get("XLLAMACPP_PYTHON", ""), ROOT / ".venv-llama-cpp/bin/python", sys.executable]
    try:
        python = find_python("xllamacpp", map(str, interpreters), ".venv-llama-cpp")
    except NotRun as missing:
        pytest.skip(str(missing))
    job = {"model": str(model), "lora": str(lora or ""), "prompts": [IDS[:length] for length in LENGTHS]}
    job |= {"texts": texts, "vocabulary": vocabulary}
    command = [python, Path(__file__).with_name("run_llama_cpp.py")]
    done = subprocess.run(command, input=json.dumps(job) + "\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


LENGTHS = (2, 12, 17, 18, 33, 41)


class RoundedGelu(nn.Module):
    """llama.cpp's: from a table of float16, of which only values between -10 and 10 are taken."""

    def forward(self, x: Tensor) -> Tensor:
        found = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, found))


def expected_of(model: Any) -> Tensor:
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = RoundedGelu()
    with torch.inference_mode():
        logits = torch.stack([model(torch.tensor([IDS[:length]]), use_cache=False).logits[0, -1] for length in LENGTHS])
    return logits.log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_transformers_does(kind: str, folders: Any, tmp_path: Path) -> None:
    gguf.write(hf.read(folders[kind, torch.float32]), tmp_path / "model.gguf")
    texts = ("We heard nothing.", "<|turn>user\nhi<turn|>\n<|channel>thought\n<channel|>", "<start_of_turn> 你好")
    found = llama_cpp(tmp_path / "model.gguf", texts=texts)
    expected = expected_of(AutoModelForCausalLM.from_pretrained(folders[kind, torch.float32]).eval())
    assert expected.std(-1).min() > 0.5  # far from alike
    torch.testing.assert_close(torch.tensor(found["log_probabilities"]), expected, atol=0.04, rtol=0)
    assert found["tokens"] == [tiny_tokenizer4()(text).input_ids for text in texts]


# --- adapters ------------------------------------------------------------------------------------------------------
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, dict[str, Any]] = {
    "e2b": {"target_modules": [*EVERYWHERE, "per_layer_input_gate", "per_layer_projection"]},
    "31b": {"target_modules": EVERYWHERE, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "26b-a4b": {
        "target_modules": ["q_proj", "down_proj", "router.proj"],
        "target_parameters": ["experts.gate_up_proj"],
        "rank_pattern": {"q_proj": 2},
    },
}


def adapted(kind: str, base: Path, folder: Path, **settings: Any) -> tuple[Any, Adapter]:
    """transformers' model with a random LoRA of peft's, and the adapter that it was saved as."""
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 4, "lora_alpha": 6, **TARGETS[kind], **settings}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    found = adapter_folder.read(folder)
    found.config = hf.read(base).config
    return model, found


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("e2b", "31b")), "26b-a4b"])
def test_an_adapter_survives_a_round_trip(kind: str, folders: Any, tmp_path: Path) -> None:
    base = folders[kind, torch.float32]
    model, adapter = adapted(kind, base, tmp_path / "adapter")
    with torch.inference_mode():
        expected = model(torch.tensor([IDS]), use_cache=False).logits
    gguf.write(adapter, tmp_path / "adapter.gguf")
    assert fields_of(tmp_path / "adapter.gguf")["general.architecture"] == "gemma4"
    found = read(tmp_path / "adapter.gguf")
    assert isinstance(found, Adapter) and set(found.tensors) == set(adapter.tensors)
    adapter_folder.write(found, tmp_path / "again")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again").eval()
    with torch.inference_mode():
        found_logits = again(torch.tensor([IDS]), use_cache=False).logits
    torch.testing.assert_close(found_logits, expected, atol=1e-4, rtol=1e-4)


def test_the_experts_have_one_factor_each(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_gemma4, "UNADAPTED", {})  # as other tools write it
    both = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    _, adapter = adapted("26b-a4b", folders["26b-a4b", torch.float32], tmp_path / "adapter", **both)
    gguf.write(adapter, tmp_path / "adapter.gguf")
    tensors = stored(tmp_path / "adapter.gguf")
    assert tensors["blk.0.ffn_gate_up_exps.weight.lora_a"].shape.tolist() == [64, 4, 4]  # in, rank, experts
    assert tensors["blk.0.ffn_down_exps.weight.lora_b"].shape.tolist() == [4, 64, 4]  # rank, out, experts
    found = read(tmp_path / "adapter.gguf")
    assert isinstance(found, Adapter) and found.peft["target_parameters"] == sorted(both["target_parameters"])
    assert found.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("e2b", {"target_modules": ["q_proj", "per_layer_model_projection"]}, "per_layer_model_projection"),
        ("26b-a4b", {"target_parameters": ["experts.down_proj"]}, "experts.down_proj"),
    ],
)
def test_a_lora_that_llama_cpp_would_not_apply_as_trained_is_refused(
    kind: str, settings: dict[str, Any], named: str, folders: Any, tmp_path: Path
) -> None:
    _, adapter = adapted(kind, folders[kind, torch.float32], tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match=f"{named} has a LoRA, .*to=merged"):
        gguf.write(adapter, tmp_path / "adapter.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_llama_cpp_applies_an_adapter_as_peft_does(kind: str, folders: Any, tmp_path: Path) -> None:
    base = folders[kind, torch.float32]
    gguf.write(hf.read(base), tmp_path / "model.gguf")
    model, adapter = adapted(kind, base, tmp_path / "adapter")
    gguf.write(adapter, tmp_path / "adapter.gguf")
    found = torch.tensor(llama_cpp(tmp_path / "model.gguf", tmp_path / "adapter.gguf")["log_probabilities"])
    without = expected_of(AutoModelForCausalLM.from_pretrained(base).eval())
    assert (found - without).abs().max() > 1.0
    torch.testing.assert_close(found, expected_of(model), atol=0.04, rtol=0)
