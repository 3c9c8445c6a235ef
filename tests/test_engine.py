"""The embedded engine: its tokens are those of transformers and peft, whoever else is in the batch, and it survives."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, PATIENCE, ROOT, tiny_gemma, until
from kernel_forms import forms
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_gemma4 import KINDS, SMALL, VOCABULARY, tiny_folder4, tiny_tokenizer4
from tiny_serving import serve, write_tiny_folder
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedModel
from vllm_contract import Server

from commands.serve import in_words
from core.errors import UserError
from serving.engine import kernels
from serving.engine.__main__ import eos_token_ids, memory_of
from serving.engine.adapters import AdapterFolder, read_adapter
from serving.engine.architecture import GemmaConfig
from serving.engine.detokenizer import Detokenizer
from serving.engine.gemma import Gemma, Linear
from serving.engine.grammar import GrammarCompiler
from serving.engine.kernels import KernelGemma
from serving.engine.kv_cache import BLOCK
from serving.engine.prompt_budget import MAX_TOKENS, MIN_TOKENS, SLOWER, STEP_SECONDS, PromptBudget
from serving.engine.sampling import Sampler
from serving.engine.scheduler import ScheduledRequest, Scheduler
from serving.engine.step import BEST, LOGITS, Chunk, Model
from serving.protocol import Delta, Done, Failed, Generate, RequestError, Sampling, read_generate, read_sampling
from serving.state import State

pytestmark = pytest.mark.usefixtures("one_thread")
LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "ranks": {
        "r": 8,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"up_proj": 32},
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "mlp": {"r": 3, "lora_alpha": 9, "target_modules": ["gate_proj", "down_proj"], "layers_to_transform": [0, 2]},
}
OF_4 = {  # what "ranks" adapts besides in a Gemma 4
    "e2b": ["per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"],
    "e4b": ["per_layer_input_gate", "per_layer_projection"],
    "26b-a4b": ["router.proj"],
}
PROMPTS = [
    "The rain had stopped by the time the train left the station, and nobody was there to see it go.",
    "<start_of_turn>user\nWas heißt 'slay'? 😀 你好<end_of_turn>\n<start_of_turn>model\n",
    "No cap, that fit is bussin",
    " leading and trailing ",
]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random Gemmas, of Gemma 4 one of each kind, with bfloat16 weights and three adapters each in `adapters/`."""
    folders = {}
    tokenizer = tiny_tokenizer()
    for family in FAMILIES:
        folders[family] = folder = tmp_path_factory.mktemp(family)
        # transformers' cache keeps no more than a sliding window, though Gemma 1 has none
        window = {"sliding_window": None} if family == "gemma" else {}
        tiny_gemma(family, torch.bfloat16, vocab_size=len(tokenizer), **window).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for seed, (name, settings) in enumerate(LORAS.items()):
            write_adapter(folder, folder / "adapters" / name, seed, **settings)
    for kind in KINDS:
        folders[kind] = folder = tiny_folder4(kind, tmp_path_factory.mktemp(kind))
        for seed, (name, settings) in enumerate(LORAS.items()):
            targets = settings["target_modules"] + (OF_4.get(kind, []) if name == "ranks" else [])
            write_adapter(folder, folder / "adapters" / name, seed, **settings | {"target_modules": targets})
    return folders


def write_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> None:
    """A random LoRA, strong enough to change the answers."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


class Engine:
    """A scheduler in this process, and what it sent."""

    def __init__(self, base: Path, model: Model, blocks: int = 64, max_waiting: int = 64) -> None:
        self.tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self.folder = AdapterFolder(base / "adapters", model.config)
        self.folder.rescan()
        self.scheduler = Scheduler(
            model, self.tokenizer, eos_token_ids(base, self.tokenizer), self.folder.adapters, blocks, max_waiting
        )
        self.sent: dict[int, list[Delta | Done | Failed]] = {}

    def submit(self, prompt: str, lora: str | None = None, *, stream: bool = False, **sampling: Any) -> int:
        number = len(self.sent)
        self.sent[number] = []
        read, _ = read_sampling({"temperature": 0, "max_tokens": 12, **sampling})
        generate = Generate(number, prompt, read, lora, stream)
        tokens = self.tokenizer.encode(prompt).ids
        constraint = self.grammars.compile(read.structured_outputs) if read.structured_outputs else None
        send = self.sent[number].append
        self.scheduler.submit(ScheduledRequest(generate, tokens, send, time.monotonic(), constraint=constraint))
        return number

    def read_in_chunks_of(self, tokens: int) -> None:
        """Each step reads so many tokens of prompts, whatever the time."""
        self.scheduler.prompt_budget.tokens = lambda _: tokens  # type: ignore[method-assign]

    @cached_property
    def grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.scheduler.eos_token_ids)

    def run(self) -> None:
        for _ in range(2000):
            if not self.scheduler.busy:
                return
            self.scheduler.step()
        raise AssertionError("it does not come to an end")

    def answer(self, number: int) -> Done:
        last = self.sent[number][-1]
        assert isinstance(last, Done), last
        return last

    def ask(self, prompt: str, lora: str | None = None, **sampling: Any) -> Done:
        number = self.submit(prompt, lora, **sampling)
        self.run()
        return self.answer(number)


FORMS: dict[str, Callable[[Path, int], Model]] = {
    "torch float32": lambda base, blocks: Gemma(base, torch.float32, "cpu", blocks),
    "kernels": lambda base, blocks: KernelGemma(base, blocks, 2),
    "kernels without AMX": lambda base, blocks: KernelGemma(base, blocks, 2, amx=False),
}


@pytest.fixture(scope="session")
def engine_of(bases: dict[str, Path]) -> Callable[..., Engine]:
    models: dict[tuple[str, str], Model] = {}

    def make(family: str = "gemma3_text", form: str = "kernels", **bounds: int) -> Engine:
        if (family, form) not in models:
            models[family, form] = FORMS[form](bases[family], 64)
        return Engine(bases[family], models[family, form], **bounds)

    return make


def greedy(model: PreTrainedModel | PeftModel, tokenizer: Tokenizer, prompt: str, count: int, stops: list[int]) -> str:
    """What transformers generates."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=stops
    )
    text: str = tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    return text


@pytest.mark.slow
# --- the same tokens as transformers and peft ----------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [*FAMILIES, *KINDS])
def test_a_mixed_batch_generates_what_transformers_and_peft_do(
    family: str, form: str, bases: dict[str, Path], engine_of: Callable[..., Engine], expected: dict[str, list[str]]
) -> None:
    engine = engine_of(family, form)
    engine.read_in_chunks_of(16)
    numbers = [engine.submit(prompt, lora) for lora in (None, *LORAS) for prompt in PROMPTS]
    engine.run()
    assert [engine.answer(number).text for number in numbers] == expected[family]
    assert engine.scheduler.counts["steps"] < 90


@pytest.fixture(scope="session")
def expected(bases: dict[str, Path]) -> dict[str, list[str]]:
    """Family → answers to PROMPTS of the base, then of each adapter; one at a time, in float32."""
    answers: dict[str, list[str]] = {}
    for family, base in bases.items():
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        stops = list(eos_token_ids(base, tokenizer))
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        answers[family] = [greedy(model, tokenizer, prompt, 12, stops) for prompt in PROMPTS]
        adapted = PeftModel.from_pretrained(model, base / "adapters" / "plain", adapter_name="plain")
        for name in LORAS:
            if name != "plain":
                adapted.load_adapter(base / "adapters" / name, adapter_name=name)
            adapted.set_adapter(name)
            answers[family] += [greedy(adapted, tokenizer, prompt, 12, stops) for prompt in PROMPTS]
    return answers


@pytest.fixture(params=forms())
def compiled_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for one of the targets that this machine can run."""
    monkeypatch.setattr(kernels, "FLAGS", [*kernels.FLAGS, *forms()[request.param]])


@pytest.mark.usefixtures("compiled_form")
@pytest.mark.parametrize("family", [*FAMILIES, *KINDS])
def test_every_form_computes_what_torch_does(family: str, bases: dict[str, Path]) -> None:
    tokens = torch.randint(6, 300, (61,), generator=torch.Generator().manual_seed(0)).tolist()
    steps = []
    for model in (KernelGemma(bases[family], 16, 2), Gemma(bases[family], torch.float32, "cpu", 16)):
        adapter = read_adapter(bases[family] / "adapters" / "ranks", model.config)
        rows = [Chunk(0, 40, 0, list(range(5)), LOGITS, adapter), Chunk(40, 21, 0, list(range(5, 8)), LOGITS)]
        model.step(tokens, rows)
        rows = [Chunk(0, 1, 40, list(range(6)), LOGITS, adapter), Chunk(1, 1, 21, [5, 6, 7], LOGITS)]
        steps.append(model.step([7, 8], rows)[1])
    found, exact = steps
    # with a scale of 1 and random weights, attention magnifies what float32 rounds: transformers' own logits of these
    # differ by up to 1e-5 from those in float64
    assert np.abs(found - exact).max() < (2e-5 if family in FAMILIES else 5e-5) * np.abs(exact).max()


@pytest.mark.usefixtures("compiled_form")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("family", ["gemma3_text", "e2b", "26b-a4b"])
def test_no_bit_depends_on_the_batch(family: str, int8: bool, bases: dict[str, Path]) -> None:
    base = bases[family]
    model = KernelGemma(base, 64, 2, int8=int8)
    tokens = torch.randint(6, 300, (45,), generator=torch.Generator().manual_seed(0)).tolist()
    adapter = read_adapter(base / "adapters" / "ranks", model.config)
    whole_blocks, blocks = list(range(45 // BLOCK + 1)), list(range(19, 18 - 45 // BLOCK, -1))
    _, whole = model.step(tokens, [Chunk(0, 45, 0, whole_blocks, LOGITS, adapter)])
    model.step(tokens[:19], [Chunk(0, 19, 0, blocks, 0, adapter)])
    others = [Chunk(26 + i, 1, 0, [20 + i], LOGITS) for i in range(40)]
    best, chunked = model.step(tokens[19:] + [5] * 40, [Chunk(0, 26, 19, blocks, LOGITS, adapter), *others])
    assert np.array_equal(whole[0], chunked[0])
    assert best[0] == whole[0].argmax()
    assert model.step([5], [Chunk(0, 1, 0, [33], BEST)])[0] == [best[7]]


def with_rounded_weights(model: Gemma) -> Gemma:
    """The outputs of each matrix rounded to 255 steps of their own; routers and embeddings stay."""

    def rounded(linear: Linear) -> Linear:
        step = linear.weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        return Linear((linear.weight / step).round() * step)

    model.head = rounded(model.head)
    if model.config.per_layer_input:
        model.per_layer_model = rounded(model.per_layer_model)
    for layer in model.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Linear):
                setattr(layer, name, rounded(value))
        if layer.experts:
            layer.experts.gate_up = list(map(rounded, layer.experts.gate_up))
            layer.experts.down = list(map(rounded, layer.experts.down))
    return model


@pytest.mark.usefixtures("compiled_form")
@pytest.mark.parametrize("family", ["gemma3_text", "e2b", "26b-a4b"])
def test_int8_weights_give_the_logits_of_rounded_weights(family: str, bases: dict[str, Path]) -> None:
    exact = Gemma(bases[family], torch.float32, "cpu", 8)
    adapter = read_adapter(bases[family] / "adapters" / "ranks", exact.config)
    chunks = [Chunk(0, 30, 0, range(4), LOGITS, adapter), Chunk(30, 7, 0, range(4, 6), LOGITS)]
    tokens = [*range(110, 140), *range(20, 27)]
    (_, of_exact), (_, of_rounded) = (
        model.step(tokens, chunks)
        for model in (exact, with_rounded_weights(Gemma(bases[family], torch.float32, "cpu", 8)))
    )
    rounding = np.abs(of_rounded - of_exact).max()
    for amx in (True, False):  # without AMX, what the weights meet is rounded to 16 bits
        _, found = KernelGemma(bases[family], 8, 2, int8=True, amx=amx).step(tokens, chunks)
        assert np.abs(found - of_rounded).max() < 0.02 * rounding


# --- Gemma 4 -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["torch float32", "kernels"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_and_peft(kind: str, form: str, bases: dict[str, Path]) -> None:
    tokens = torch.randint(110, VOCABULARY, (61,), generator=torch.Generator().manual_seed(0)).tolist()
    model = FORMS[form](bases[kind], 16)
    adapter = read_adapter(bases[kind] / "adapters" / "ranks", model.config)
    chunks = [Chunk(0, 40, 0, range(8)), Chunk(40, 30, 0, range(8, 16), 0, adapter)]
    model.step(tokens[:40] + tokens[:30], chunks)
    chunks = [Chunk(0, 21, 40, range(8), LOGITS), Chunk(21, 31, 30, range(8, 16), LOGITS, adapter)]
    _, found = model.step(tokens[40:] + tokens[30:], chunks)
    # In float64: on e2b, transformers' own float32 is further from it than ours.
    base = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float64, experts_implementation="eager")
    adapted = PeftModel.from_pretrained(base, bases[kind] / "adapters" / "ranks").double()
    with torch.inference_mode():
        tuned = adapted(torch.tensor([tokens])).logits[0, -1].numpy()
        with adapted.disable_adapter():
            plain = adapted(torch.tensor([tokens])).logits[0, -1].numpy()
    assert np.abs(plain - tuned).max() > 0.1 * np.abs(plain).max()
    for one, exact in zip(found, (plain, tuned), strict=True):
        assert np.abs(one - exact).max() < 5e-5 * np.abs(exact).max()


@pytest.mark.usefixtures("compiled_form")
def test_heads_of_the_published_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    sizes = {"head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 2}
    Gemma4ForCausalLM(Gemma4TextConfig(**SMALL | layers | sizes)).to(torch.bfloat16).save_pretrained(tmp_path)
    tokens = list(range(110, 150))
    with torch.inference_mode():  # in float64: in float32, transformers is further from that than the kernels are
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        exact = model(torch.tensor([tokens])).logits[0, -1].numpy()
    _, found = KernelGemma(tmp_path, 5, 2).step(tokens, [Chunk(0, 40, 0, range(5), LOGITS)])
    assert np.abs(found[0] - exact).max() < 5e-5 * np.abs(exact).max()


@pytest.mark.parametrize("kind", ["e2b", "12b"])
def test_a_whole_model_is_served_by_its_text_part(kind: str, tmp_path: Path) -> None:
    tiny_folder4(kind, tmp_path, whole=True)
    tokens = list(range(110, 150))
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        exact = model(torch.tensor([tokens])).logits[0, -1].numpy()
    first = "model.language_model.layers.0.self_attn"
    weights = load_file(tmp_path / "model.safetensors")
    others = {f"model.audio_tower.layers.0.self_attn.{name}_proj.weight": torch.ones(8, 8) for name in "qkvo"}
    others |= {f"{first.replace('0', '7')}.{name}_proj.weight": weights[f"{first}.{name}_proj.weight"] for name in "kv"}
    if kind == "e2b":  # Google's files hold keys and values of the layers that borrow them too
        save_file(others, tmp_path / "model-2.safetensors")
    for form in ("torch float32", "kernels"):
        _, found = FORMS[form](tmp_path, 5).step(tokens, [Chunk(0, 40, 0, range(5), LOGITS)])
        assert np.abs(found[0] - exact).max() < 5e-5 * np.abs(exact).max()


def with_config(base: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> GemmaConfig:
    config = json.loads((base / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return GemmaConfig.read(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_both_dialects_of_the_configuration_are_read(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    of_new = GemmaConfig.read(bases[kind])
    number = max(n for n, shape in enumerate(of_new.shapes) if shape.kind == "full_attention")
    old = {"global_head_dim": of_new.shapes[number].head_dim}
    if kind in ("12b", "26b-a4b", "31b"):
        old["num_global_key_value_heads"] = of_new.shapes[number].kv_heads

    def to_old(config: dict[str, Any]) -> None:
        del config["per_layer_config"]
        config |= old

    def to_zeros(config: dict[str, Any]) -> None:
        config["per_layer_config"] = {n.zfill(2): given for n, given in config["per_layer_config"].items()}

    assert {shape.head_dim for shape in of_new.shapes} == {16, 32}
    alike = with_config(bases[kind], tmp_path, lambda config: config.update(per_layer_config={}))
    assert {shape.head_dim for shape in alike.shapes} == {16}
    for change in (to_old, to_zeros, lambda config: config.update(old)):
        assert with_config(bases[kind], tmp_path, change) == of_new


def test_the_published_e2b_by_its_configuration(bases: dict[str, Path], tmp_path: Path) -> None:
    def publish(config: dict[str, Any]) -> None:
        del config["per_layer_config"]
        config |= {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_kv_shared_layers": 20}
        config |= {
            "head_dim": 256,
            "global_head_dim": 512,
            "num_attention_heads": 8,
            "hidden_size_per_layer_input": 256,
        }
        config |= {"layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7, "sliding_window": 512}

    config = with_config(bases["e2b"], tmp_path, publish)
    assert [shape.kv_source for shape in config.shapes[14:21]] == [14, 13, 13, 13, 13, 14, 13]
    assert {shape.inner for shape in config.shapes[15:]} == {12_288} and config.shapes[14].inner == 6144
    assert config.cache_bytes_per_token == 2 * 4 * (12 * 256 + 3 * 512)
    assert (config.last_own, config.scale, config.windows[3:5]) == (14, 1.0, (512, 0))
    frequencies = config.ropes[4].frequencies()
    assert len(frequencies) == 256 and (frequencies != 0).sum() == 64
    assert frequencies[1].item() == pytest.approx(1e6 ** (-2 / 512))


@pytest.mark.parametrize("form", ["torch float32", "kernels"])
def test_memory_is_what_is_stated_and_the_table_stays_in_its_file(form: str, bases: dict[str, Path]) -> None:
    model = FORMS[form](bases["e2b"], 4)
    caches = model.caches.values() if isinstance(model, KernelGemma) else (model.keys, model.values)  # type: ignore[attr-defined]
    tensors = [one for cache in caches for one in (cache.values() if isinstance(cache, dict) else cache)]
    assert len(tensors) == 2 * 5  # half of the layers have none
    stated = memory_of(model, 4 * BLOCK)
    assert stated["keys_and_values"] == sum(one.nbytes for one in tensors)
    assert model.table is not None and stated["table_in_file"] == model.table.nbytes == VOCABULARY * 10 * 8 * 2
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(bases["e2b"]) in line]
    ranges = [[int(end, 16) for end in one.split("-")] for one in mapped]
    assert any(begin <= model.table.data_ptr() < end for begin, end in ranges)


def test_all_ends_that_a_gemma_4_names_end_an_answer(bases: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer4().backend_tokenizer
    assert eos_token_ids(bases["e2b"], tokenizer) == (1, 106)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 106, 50]}')
    assert eos_token_ids(tmp_path, tokenizer) == (1, 50, 106)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "gemma4", "text_config": {"eos_token_id": [1, 98]}}')
    assert eos_token_ids(tmp_path, tokenizer) == (1, 98, 106)


@pytest.mark.parametrize("form", FORMS)
def test_suppressed_tokens_are_never_an_answer(form: str, bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["31b"], tmp_path / "base")
    tokens, chunks = list(range(110, 120)), [Chunk(0, 10, 0, range(2), LOGITS)]
    (best,), before = FORMS[form](tmp_path / "base", 2).step(tokens, chunks)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"suppress_tokens": [best, 7]}))
    (other,), after = FORMS[form](tmp_path / "base", 2).step(tokens, chunks)
    assert np.isneginf(after[0, [best, 7]]).all() and other == np.argsort(before[0])[-2]
    assert np.array_equal(np.delete(after, [best, 7], 1), np.delete(before, [best, 7], 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma3n_text"}, "holds a 'gemma3n_text'"),
        ({"model_type": "vaultgemma"}, "holds a 'vaultgemma'"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is not supported"),
        ({"hidden_activation": "silu"}, "hidden_activation silu is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "of type 'yarn' are not supported"),
    ],
)
def test_an_unknown_mechanism_is_refused_by_name(
    change: dict[str, Any], words: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        with_config(bases["e2b"], tmp_path, lambda config: config.update(change))


def test_what_peft_makes_of_experts_and_of_towers_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    experts = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "lora_dropout": 0.0}
    write_adapter(bases["26b-a4b"], tmp_path / "experts", 0, r=2, **experts)
    with pytest.raises(UserError, match="target_parameters is not supported by this engine"):
        read_adapter(tmp_path / "experts", GemmaConfig.read(bases["26b-a4b"]))
    tower = shutil.copytree(bases["31b"] / "adapters" / "plain", tmp_path / "tower")
    tensors = load_file(tower / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.vision_tower.layers"): one for name, one in tensors.items()}
    save_file(renamed, tower / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"vision_tower.* belongs to no linear layer"):
        read_adapter(tower, GemmaConfig.read(bases["31b"]))


def test_names_of_the_whole_class_and_unread_keys_and_values_of_an_adapter(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = shutil.copytree(bases["e2b"] / "adapters" / "plain", tmp_path / "one")
    config = GemmaConfig.read(bases["e2b"])
    plain = read_adapter(adapter, config)
    tensors = load_file(adapter / "adapter_model.safetensors")
    of_whole = {name.replace("model.layers", "model.language_model.layers"): one for name, one in tensors.items()}
    extra = {
        name.replace("layers.0", "layers.7"): one + 1
        for name, one in of_whole.items()
        if ".layers.0.self_attn.v" in name
    }
    assert len(extra) == 2
    save_file(of_whole | extra, adapter / "adapter_model.safetensors")
    found = read_adapter(adapter, config)
    for mine, theirs in ((plain.lora_a, found.lora_a), (plain.lora_b, found.lora_b)):
        assert mine.keys() == theirs.keys() and all(torch.equal(one, theirs[key]) for key, one in mine.items())


@pytest.mark.slow
def test_a_gemma_4_is_served_by_triton(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "tiny-e2b"
    shutil.copytree(bases["e2b"], base, ignore=shutil.ignore_patterns("adapters"))
    write_tiny_folder(tmp_path / "serve", base, tmp_path)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stops = list(eos_token_ids(base, tokenizer))
    plain = greedy(model, tokenizer, PROMPTS[0], 12, stops)
    tuned = greedy(PeftModel.from_pretrained(model, tmp_path / "chat"), tokenizer, PROMPTS[0], 12, stops)
    assert plain != tuned
    with serve(tmp_path / "serve", "threads=1", "max_tokens_in_cache=2048") as stack:
        for lora, expected_text in ((None, plain), ("chat", tuned)):
            sampling = {"temperature": 0, "max_tokens": 12, **({"lora_name": lora} if lora else {})}
            for protocol in ("http", "grpc"):
                (answer,) = Server(stack.http, stack.grpc).ask(
                    protocol, PROMPTS[0], sampling, exclude_input_in_output=True
                )
                assert answer["text_output"] == expected_text
        memory = State(stack.folder / "state").ask_engine(PATIENCE).memory
    assert memory == {"keys_and_values": 2048 * 2 * 4 * (4 * 16 + 32), "table_in_file": VOCABULARY * 10 * 8 * 2}
    assert in_words(memory).endswith("the per-layer table of 0.0 GB stays in its file, mapped, and is read by rows.")


# --- continuous batching -------------------------------------------------------------------------------------------
def test_requests_join_and_leave_at_any_step(engine_of: Callable[..., Engine], expected: dict[str, list[str]]) -> None:
    engine = engine_of()
    numbers, gone, dice = [], [], random.Random(0)
    for prompt in PROMPTS * 3:
        numbers.append(engine.submit(prompt))
        gone.append(engine.submit(dice.choice(PROMPTS), "mlp"))  # from somebody who does not wait for the answer
        for _ in range(dice.randrange(4)):
            engine.scheduler.step()
        engine.scheduler.cancel(lambda one: one.generate.id == gone[-1])
    engine.run()
    assert [engine.answer(number).text for number in numbers] == expected["gemma3_text"][: len(PROMPTS)] * 3
    assert {engine.answer(number).finish_reason for number in gone} >= {"cancelled"}
    assert engine.scheduler.pool.in_use == 0


def test_a_shared_prefix_is_computed_once_and_does_not_change_answers(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    beginning = PROMPTS[0] * 3
    first = engine.ask(beginning + " One.", "plain")
    assert engine.scheduler.counts["cached_tokens"] == 0
    again = engine.ask(beginning + " One.", "plain")
    cached = engine.scheduler.counts["cached_tokens"]
    assert cached >= (first.input_tokens - 1) // BLOCK * BLOCK > 0
    assert again.text == first.text
    engine.ask(beginning + " One.", "ranks")
    assert engine.scheduler.counts["cached_tokens"] == cached, "keys and values are the adapter's own"
    alone = engine_of().ask(beginning + " Two.", "plain")
    together = engine_of()
    numbers = [together.submit(beginning + word, "plain") for word in (" One.", " Two.")]
    together.run()
    assert together.scheduler.counts["cached_tokens"] > 0, "shared within one step"
    assert [together.answer(number).text for number in numbers] == [first.text, alone.text]


def test_long_prompts_do_not_stall_the_streams(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    engine.read_in_chunks_of(16)
    stream = engine.submit(PROMPTS[2], max_tokens=30, ignore_eos=True)
    engine.scheduler.step()
    long = engine.submit(PROMPTS[0] * 6, "mlp", max_tokens=1)
    steps = 0
    while not engine.sent[long]:
        engine.scheduler.step()
        steps += 1
        assert engine.scheduler.tokens[""] == steps + 1
    assert steps == -(-engine.answer(long).input_tokens // 16)
    engine.run()
    assert engine.answer(stream).output_tokens == 30


def test_a_short_prompt_is_read_before_the_rest_of_a_long_one(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    engine.read_in_chunks_of(16)
    long = engine.submit(PROMPTS[0] * 6, max_tokens=1)
    engine.scheduler.step()
    other = engine.submit(PROMPTS[0] * 6, "mlp", max_tokens=1)  # as long: it waits for the first
    short = engine.submit("Hi", "plain", max_tokens=1)
    engine.scheduler.step()
    assert engine.sent[short] and not engine.sent[long] and not engine.sent[other]
    while not engine.sent[long]:
        engine.scheduler.step()
    assert not engine.sent[other]
    engine.run()
    assert engine.answer(other).text == engine_of().ask(PROMPTS[0] * 6, "mlp", max_tokens=1).text


def test_a_long_prompt_gives_way_to_no_more_tokens_than_it_has(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    engine.read_in_chunks_of(16)
    long = engine.submit(PROMPTS[0] * 6, max_tokens=1)
    size = engine.scheduler.waiting[0].prompt_tokens
    shorts: list[int] = []
    while not engine.sent[long]:
        shorts.append(
            engine.submit("".join(random.Random(len(shorts)).choices("abcdefgh ", k=40)), "mlp", max_tokens=1)
        )
        engine.scheduler.step()
        assert 16 * len(shorts) < 2.5 * size
    assert engine.sent[shorts[0]], "before the long one"
    engine.run()


def test_a_conversation_that_is_cached_counts_as_short(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    engine.ask(PROMPTS[0] * 4)
    engine.read_in_chunks_of(16)
    other = engine.submit(PROMPTS[1] * 3, "mlp", max_tokens=1)
    known = engine.submit(PROMPTS[0] * 4 + " And?", max_tokens=1)
    engine.scheduler.step()
    assert engine.sent[known] and not engine.sent[other]
    engine.run()


def test_an_answer_that_has_no_room_yet_does_not_stop_a_prompt_that_is_read(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(blocks=192 // BLOCK)
    engine.read_in_chunks_of(16)
    long = engine.submit(PROMPTS[0] * 2, max_tokens=60)
    engine.scheduler.step()
    shorter = engine.submit("Hi", max_tokens=150)
    engine.run()
    assert engine.answer(long).output_tokens and engine.answer(shorter).output_tokens


@pytest.mark.parametrize("streams", [0, 1, 8])
@pytest.mark.parametrize(
    ("step", "token"), [(2e-3, 5e-5), (15e-3, 1.5e-3), (60e-3, 4e-3)], ids=["fast", "AVX2", "slow"]
)
def test_steps_with_prompts_take_twice_as_long_at_most_where_streams_wait(
    step: float, token: float, streams: int
) -> None:
    """On machines whose steps take a fixed time, and so much more for each token beyond."""
    budget, without = PromptBudget(), step * (1 + streams / 16)
    for _ in range(20):
        budget.learn(streams, 0, without)
    for _ in range(60):
        tokens = budget.tokens(streams)
        seconds = without + token * tokens
        budget.learn(streams, tokens, seconds)
    if MIN_TOKENS < tokens < MAX_TOKENS:
        expected = without + min((SLOWER - 1) * without, STEP_SECONDS) if streams else STEP_SECONDS
        assert seconds == pytest.approx(expected, rel=0.1) and (seconds < 2 * without or not streams)
    else:
        assert tokens == MIN_TOKENS or seconds < STEP_SECONDS


# --- bounds --------------------------------------------------------------------------------------------------------
def test_memory_is_bounded_and_all_requests_are_answered(
    engine_of: Callable[..., Engine], expected: dict[str, list[str]]
) -> None:
    engine = engine_of(blocks=192 // BLOCK)
    numbers = [engine.submit(prompt) for prompt in PROMPTS * 3]
    most = 0
    while engine.scheduler.busy:
        engine.scheduler.step()
        most = max(most, engine.scheduler.pool.in_use)
    assert most <= 192 // BLOCK
    assert [engine.answer(number).text for number in numbers] == expected["gemma3_text"][: len(PROMPTS)] * 3


def test_requests_that_cannot_fit_or_exceed_the_queue_are_refused(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(blocks=64 // BLOCK, max_waiting=2)
    number = engine.submit("Hi", max_tokens=100)
    assert engine.sent[number][-1].code == "invalid" and "64" in engine.sent[number][-1].error  # type: ignore[union-attr]
    numbers = [engine.submit("Hi") for _ in range(4)]
    codes = [engine.sent[number][-1].code if engine.sent[number] else None for number in numbers]  # type: ignore[union-attr]
    assert codes == [None, None, "busy", "busy"]
    assert engine.sent[engine.submit("Hi", "nobody")][-1].code == "unknown_adapter"  # type: ignore[union-attr]
    engine.run()
    assert engine.answer(numbers[1]).output_tokens > 0


def test_a_step_that_runs_out_of_memory_fails_only_its_requests(
    engine_of: Callable[..., Engine], expected: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    lost = engine.submit(PROMPTS[0])
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler.model, "step", lambda *_: (_ for _ in ()).throw(MemoryError()))
        engine.scheduler.step()
    kept = engine.submit(PROMPTS[0])
    engine.run()
    assert engine.sent[lost][-1].code == "internal" and "memory" in engine.sent[lost][-1].error  # type: ignore[union-attr]
    assert engine.answer(kept).text == expected["gemma3_text"][0], "what was not computed is not taken for a beginning"
    assert engine.scheduler.pool.in_use == 0


# --- sampling ------------------------------------------------------------------------------------------------------
def choose_plainly(logits: np.ndarray, sampling: Sampling, point: float) -> int:
    """vLLM's definition word for word, over the whole sorted vocabulary."""
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.min_p:
        scaled[np.exp(scaled - scaled.max()) < sampling.min_p] = -np.inf
    if 0 < sampling.top_k < len(scaled):
        scaled[scaled < np.sort(scaled)[-sampling.top_k]] = -np.inf
    likelihood = np.exp(scaled - scaled.max())
    likelihood /= likelihood.sum()
    order = np.argsort(-likelihood, kind="stable")
    if sampling.top_p < 1:
        before = np.cumsum(likelihood[order]) - likelihood[order]
        order = order[: max(1, int((before < sampling.top_p).sum()))]
    elif not sampling.min_p and not 0 < sampling.top_k < len(scaled):
        order = np.arange(len(scaled))
    sums = np.cumsum(likelihood[order])
    return int(order[np.searchsorted(sums, point * sums[-1], side="right")])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 5},
        {"min_p": 0.05},
        {"top_k": 64, "top_p": 0.95, "min_p": 0.01},
        {"temperature": 0.3, "top_p": 0.5},
    ],
)
def test_samples_follow_the_defined_distribution(given: dict[str, Any]) -> None:
    sampling, _ = read_sampling({**given, "seed": 7})
    sampler, points = Sampler(sampling, [], ()), random.Random(7)
    dice = np.random.default_rng(0)
    for spread in (0.5, 2, 4, 8):
        logits = (dice.standard_normal(20_000) * spread).astype(np.float32)
        assert sampler.choose(int(logits.argmax()), logits.copy()) == choose_plainly(logits, sampling, points.random())


def test_penalties_follow_their_definition() -> None:
    sampling, _ = read_sampling(
        {
            "temperature": 0,
            "repetition_penalty": 1.5,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
            "min_tokens": 9,
        }
    )
    sampler = Sampler(sampling, [1, 2], (7,))
    for token in (2, 3, 3):
        sampler.accept(token)
    logits = np.array([0, 2, 3, -1, 1.1, 0, 0, 99], np.float32)
    changed = logits.copy()
    assert sampler.choose(0, changed) == 1
    # 1: of the prompt; 2: of both, once said; 3: said twice; 7: the end, too early.
    wanted = [0, 2 / 1.5, 3 / 1.5 - 0.25 - 0.5, -1 * 1.5 - 2 * 0.25 - 0.5, 1.1, 0, 0, -np.inf]
    assert changed == pytest.approx(np.array(wanted, np.float32))


def test_a_seed_determines_the_answer_in_any_batch(engine_of: Callable[..., Engine]) -> None:
    settings = {"temperature": 1.0, "max_tokens": 16}
    alone = [engine_of().ask(PROMPTS[2], "mlp", seed=seed, **settings).text for seed in (1, 2)]
    assert alone[0] != alone[1]
    engine = engine_of()
    numbers = [engine.submit(PROMPTS[2], "mlp", seed=seed, **settings) for seed in (1, 2)]
    for prompt in PROMPTS:
        engine.submit(prompt, temperature=1.5)
    engine.run()
    assert [engine.answer(number).text for number in numbers] == alone
    unseeded = {engine_of().ask(PROMPTS[2], **settings).text for _ in range(6)}
    assert len(unseeded) > 1


# --- text ----------------------------------------------------------------------------------------------------------
def test_streamed_text_has_no_incomplete_characters() -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    for text in ("Was heißt 'slay'? 😀 你好, 🏳️‍🌈!", "plain words", "  two  spaces\n\n"):
        answer, parts = Detokenizer(tokenizer, (), 0), []
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        for number, token in enumerate(tokens):
            answer.add(token, last=number == len(tokens) - 1)
            parts.append(answer.new_text())
            assert "\ufffd" not in parts[-1]
        assert "".join(parts) + answer.new_text(last=True) == tokenizer.decode(tokens, skip_special_tokens=True)
    broken = Detokenizer(tokenizer, (), 0)
    broken.add(tokenizer.token_to_id("<0xF0>"))
    assert broken.new_text() == ""
    broken.add(tokenizer.token_to_id("<0x9F>"), last=True)
    assert "\ufffd" in broken.new_text(last=True), "an answer that ends in half a character says so"


@pytest.mark.parametrize("stops", [("time the",), ("e t", "station"), ("left the s", "t"), ("never",)])
def test_a_stop_string_ends_the_text_before_it_and_is_never_sent(stops: tuple[str, ...]) -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    text = "The rain had stopped by the time the train left the station."
    answer, sent = Detokenizer(tokenizer, stops, 0), ""
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        ended = answer.add(token)
        sent += answer.new_text(last=ended)
        if ended:
            break
    sent += answer.new_text(last=True)
    assert sent == text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def test_a_stream_adds_up_to_the_whole_answer(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    whole = engine.ask(PROMPTS[0], ignore_eos=True, max_tokens=40).text
    streamed = engine.submit(PROMPTS[0], ignore_eos=True, max_tokens=40, stream=True)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopped = engine.submit(PROMPTS[0], ignore_eos=True, max_tokens=40, stream=True, stop=stop)
    late = engine.submit(PROMPTS[0], ignore_eos=True, max_tokens=40, stop=stop, min_tokens=40)
    engine.run()
    assert "".join(part.text for part in engine.sent[streamed]) == whole  # type: ignore[union-attr]
    assert len(engine.sent[streamed]) > 5
    assert "".join(part.text for part in engine.sent[stopped]) == whole[: whole.find(stop)]  # type: ignore[union-attr]
    assert engine.answer(stopped).finish_reason == "stop"
    assert engine.answer(stopped).output_tokens < 40
    assert (engine.answer(late).text, engine.answer(late).finish_reason) == (whole, "length")


def test_the_end_of_a_turn_ends_an_answer_unless_ignore_eos_is_set(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    free = engine.ask(PROMPTS[0], ignore_eos=True)
    end = engine.scheduler.tokenizer.token_to_id("<end_of_turn>")
    assert end in engine.scheduler.eos_token_ids
    generate = Generate(99, PROMPTS[0], Sampling(temperature=0, max_tokens=12))
    request = ScheduledRequest(
        generate, engine.tokenizer.encode(PROMPTS[0]).ids, engine.sent.setdefault(99, []).append, 0.0
    )
    engine.scheduler.submit(request)
    while len(request.tokens) - request.prompt_tokens < 3:
        engine.scheduler.step()
    engine.scheduler._append_token(request, end, time.monotonic())
    assert engine.answer(99).finish_reason == "stop"
    text = engine.tokenizer.decode(request.tokens[request.prompt_tokens : -1])
    assert (engine.answer(99).text, engine.answer(99).output_tokens) == (text, 4)
    assert free.output_tokens == 12


# --- adapters ------------------------------------------------------------------------------------------------------
def test_adapters_can_be_added_replaced_and_removed(
    bases: dict[str, Path], engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    base = bases["gemma3_text"]
    engine = engine_of()
    folder = AdapterFolder(tmp_path, engine.scheduler.model.config)
    engine.scheduler.adapters = folder.adapters
    folder.rescan()
    assert engine.sent[engine.submit("Hi", "mine")][-1].code == "unknown_adapter"  # type: ignore[union-attr]
    shutil.copytree(base / "adapters" / "plain", tmp_path / "mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    folder.rescan()
    assert list(folder.broken) == ["bad"] and list(folder.adapters) == ["mine"]
    plain = engine.ask(PROMPTS[0], "mine").text
    running = engine.submit(PROMPTS[0], "mine")
    engine.scheduler.step()
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(base / "adapters" / "ranks", tmp_path / "mine")
    folder.rescan()
    replaced = engine.ask(PROMPTS[0], "mine").text
    assert engine.answer(running).text == plain, "what has begun ends with the adapter it began with"
    assert replaced != plain
    assert replaced == engine_of().ask(PROMPTS[0], "ranks").text
    waiting = engine.submit("Hi", "mine")
    shutil.rmtree(tmp_path / "mine")
    folder.rescan()
    engine.run()
    assert engine.sent[waiting][-1].code == "unknown_adapter"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora is not supported"),
        ({"peft_type": "IA3"}, "does not describe a LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
    ],
)
def test_an_unsupported_adapter_is_refused(
    change: dict[str, Any], words: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["gemma3_text"]
    shutil.copytree(base / "adapters" / "plain", tmp_path / "one")
    file = tmp_path / "one" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=words):
        read_adapter(tmp_path / "one", GemmaConfig.read(base))


def test_an_adapter_of_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    tiny_gemma("gemma3_text", torch.bfloat16, vocab_size=64, hidden_size=64).save_pretrained(wide)
    with pytest.raises(UserError, match="Was it trained on another"):
        read_adapter(bases["gemma3_text"] / "adapters" / "plain", GemmaConfig.read(wide))


# --- what a request may be -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('{"temperature": -1}', "temperature is -1"),
        ('{"temperature": NaN}', "temperature is not a number"),
        ('{"top_p": 0}', "top_p is 0"),
        ('{"top_k": 1.5}', "top_k is not a whole number"),
        ('{"n": 2}', "n is 2"),
        ('{"max_tokens": 0}', "max_tokens is 0"),
        ('{"stop": [1]}', "stop is not a text"),
        ("[]", "not a JSON object"),
        ('{"stop": ""}', "stop is not a text"),
        ('{"best_of": 1}', "unknown sampling parameter 'best_of'"),
        ('{"seed": ' + "9" * 40 + "}", "seed is a number of over 20 digits"),
        ("{", "is not JSON"),
        ('{"min_tokens": 20}', "min_tokens is 20, more than max_tokens, 16"),
        ('{"ignore_eos": 1}', "ignore_eos is"),
    ],
)
def test_wrong_parameters_are_reported_by_name(given: str, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        read_sampling(given)


def test_parameters_may_be_strings_as_with_vllm() -> None:
    sampling, name = read_sampling(
        '{"temperature": "0.5", "max_tokens": "9", "stop": "x", "lora_name": "slang", "n": 1}'
    )
    assert (sampling.temperature, sampling.max_tokens, sampling.stop, name) == (0.5, 9, ("x",), "slang")
    generate = Generate(3, "Hi", sampling, name, True)
    assert read_generate(json.loads(json.dumps(generate.as_json()))) == generate


# --- the process ---------------------------------------------------------------------------------------------------
class Line:
    """A client of the socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")

    def say(self, message: dict[str, Any] | bytes) -> None:
        self.socket.sendall(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    def hear(self, kind: str = "") -> dict[str, Any]:
        """The next message that is no heartbeat, or the next with `kind`."""
        while line := self.file.readline():
            message: dict[str, Any] = json.loads(line)
            if (kind and kind in message) or (not kind and "heartbeat" not in message):
                return message
        raise ConnectionError("the engine has closed the connection")

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def start(base: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "serving.engine",
            "--base",
            str(base),
            "--adapters",
            str(base / "adapters"),
            "--socket",
            str(folder / "s"),
            "--threads",
            "1",
            *words,
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    line = process.stdout.readline()
    assert line and json.loads(line)["ready"], process.communicate()[1]
    return process


@pytest.fixture(scope="session")
def engine_socket(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("engine")
    process = start(bases["gemma3_text"], folder, "--max-tokens-in-cache", "2048")
    yield folder / "s"
    assert process.poll() is None, "it has survived all of this"
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert not (folder / "s").exists()


def test_the_socket_is_private_and_sends_heartbeats(engine_socket: Path) -> None:
    assert stat.S_IMODE(engine_socket.stat().st_mode) == 0o600
    line = Line(engine_socket)
    line.hear("heartbeat")
    heartbeat = line.hear("heartbeat")["heartbeat"]
    assert heartbeat["adapters"] == sorted(LORAS) and {"running", "waiting", "kv_tokens", "tokens"} <= heartbeat.keys()
    line.say({"op": "stats"})
    assert line.hear()["stats"]["base"]
    line.close()


def test_requests_are_answered_over_the_socket(engine_socket: Path, expected: dict[str, list[str]]) -> None:
    line = Line(engine_socket)
    sampling = {"temperature": 0, "max_tokens": 12}
    for number, prompt in enumerate(PROMPTS):
        line.say(
            {
                "op": "generate",
                "id": number,
                "prompt": prompt,
                "sampling": sampling,
                "lora_name": "ranks",
                "stream": number % 2 == 0,
            }
        )
    texts, done = dict.fromkeys(range(4), ""), 0
    while done < 4:
        message = line.hear()
        texts[message["id"]] += message["text"]
        done += "done" in message
    assert list(texts.values()) == expected["gemma3_text"][8:12]
    line.close()


def test_invalid_lines_get_an_error_and_do_not_affect_other_requests(engine_socket: Path) -> None:
    line, dice = Line(engine_socket), random.Random(0)
    good = json.dumps({"op": "generate", "id": 1, "prompt": "Hi", "sampling": {"max_tokens": 1}}).encode()
    wrong = [
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"op":"dance"}',
        b'{"op":"generate"}',
        b'{"op":"generate","id":1}',
        b'{"op":"generate","id":1,"prompt":""}',
        b'{"op":"generate","id":1,"prompt":"\\ud800"}',
        b"[" * 100_000,
        b'{"op":"generate","id":1,"prompt":"a","sampling":{"temperature":-1}}',
        b'{"op":"generate","id":1,"prompt":7}',
        b'{"op":"generate","id":1,"prompt":"a","lora_name":"../x"}',
        b'{"op":"generate","id":1,"prompt":"a","stream":2}',
    ]
    for _ in range(300):
        torn = bytearray(good)
        for _ in range(dice.randrange(1, 6)):
            torn[dice.randrange(len(torn))] = dice.choice(b'{}[]",:0\\a\x00\xf0')
        wrong.append(bytes(torn).replace(b"\n", b""))
    line.say(b"\n".join(wrong) + b"\n")
    line.say({"op": "generate", "id": 10**9, "prompt": "Hi", "sampling": {"max_tokens": 2}})
    codes = []
    while (message := line.hear()).get("id") != 10**9:
        if "error" in message:
            codes.append(message["code"])
    assert message["done"] and set(codes) <= {"invalid", "unknown_adapter"} and len(codes) > 200
    with contextlib.suppress(ConnectionError):  # closed while it is still being sent
        line.say(b"x" * (9 << 20))
        assert "MiB" in line.hear()["error"]
    line.close()
    other = Line(engine_socket)
    assert other.hear("heartbeat")
    other.close()


def test_closing_a_connection_cancels_its_requests(engine_socket: Path) -> None:
    line, watcher = Line(engine_socket), Line(engine_socket)
    long = {"op": "generate", "prompt": "Hi", "stream": True, "sampling": {"max_tokens": 400, "ignore_eos": True}}
    reasons = []
    while "cancelled" not in reasons and len(reasons) < 20:  # one may have ended before it is cancelled
        line.say({**long, "id": len(reasons)})
        line.hear()
        line.say({"op": "cancel", "id": len(reasons)})
        while not (message := line.hear()).get("done"):
            pass
        reasons.append(message["finish_reason"])
    assert reasons[-1] == "cancelled"
    for number in range(4):
        line.say({**long, "id": number})
    line.hear()
    line.close()
    until(lambda: not (beat := watcher.hear("heartbeat")["heartbeat"])["running"] + beat["waiting"])
    heartbeat = watcher.hear("heartbeat")["heartbeat"]
    assert (heartbeat["running"], heartbeat["kv_tokens"]) == (0, 0)
    watcher.close()


def test_sigterm_drains_running_requests(bases: dict[str, Path], tmp_path: Path) -> None:
    process = start(bases["gemma"], tmp_path, "--max-tokens-in-cache", "1024")
    line = Line(tmp_path / "s")
    line.say(
        {"op": "generate", "id": 1, "prompt": "Hi", "stream": True, "sampling": {"max_tokens": 300, "ignore_eos": True}}
    )
    line.hear()
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(ConnectionError):  # it has ended already
        line.say({"op": "generate", "id": 2, "prompt": "Hi", "sampling": {}})
    messages = []
    try:
        while True:
            messages.append(line.hear())
    except ConnectionError:
        pass
    assert [one["output_tokens"] for one in messages if one.get("done") and one["id"] == 1] == [300]
    assert [one["code"] for one in messages if one.get("id") == 2] in ([], ["unavailable"])
    assert process.wait(PATIENCE) == 0
    line.close()


def test_an_invalid_base_gives_one_sentence(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "serving.engine", "--base", str(tmp_path), "--socket", str(tmp_path / "s")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "config.json" in done.stderr and "Traceback" not in done.stderr


# --- the real model ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_real_model_with_a_real_adapter_generates_what_peft_does(base_folder: Path, tmp_path: Path) -> None:
    adapter = ROOT / "exports" / "slang" / "adapter"
    if not adapter.exists():
        pytest.skip("no trained adapter: make convert TASK=slang")
    blocks = 128
    model = KernelGemma(base_folder, blocks, 2)
    (tmp_path / "adapters").mkdir()
    shutil.copytree(adapter, tmp_path / "adapters" / "slang")
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        (tmp_path / name).symlink_to(base_folder / name)
    engine = Engine(tmp_path, model, blocks)
    scenes = [
        "You missed the last bus home and it starts to rain.",
        "Exam week again.",
        "A cat walks on your keyboard.",
    ]
    prompts = [
        f"Instruction:\nGiven the context below, create a new slang term: {scene}\n\nResponse:\n" for scene in scenes
    ]
    tokens = 16
    numbers = {
        (lora, prompt): engine.submit(prompt, lora, max_tokens=tokens) for prompt in prompts for lora in (None, "slang")
    }
    engine.run()
    reference = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    stops = list(engine.scheduler.eos_token_ids)
    plain = {prompt: greedy(reference, engine.tokenizer, prompt, tokens, stops) for prompt in prompts}
    adapted = PeftModel.from_pretrained(reference, adapter)
    tuned = {prompt: greedy(adapted, engine.tokenizer, prompt, tokens, stops) for prompt in prompts}
    for (lora, prompt), number in numbers.items():
        assert engine.answer(number).text == (tuned if lora else plain)[prompt]
