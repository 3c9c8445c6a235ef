"""What goes to the hub is what was measured, sent in whole commits, and nothing else. The hub is a local server."""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_gemma4 import tiny_folder4
from transformers import AutoModelForCausalLM

from commands.publish import literal, main
from converters import nemo
from converters.adapter import peft_name
from converters.checkpoint import Adapter
from core.artifacts import BaseRecord
from core.base_model import describe, local_base
from core.errors import UserError
from core.prompt import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")
TOKEN = "hf_" + "secret" * 6
ROWS = [{"input": f"Rain {n}.", "output": f"Slang: drip{n}"} for n in range(5)]


@pytest.fixture
def work(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the rows and a finished run of the slang task, on the tiny base."""
    monkeypatch.chdir(tmp_path)
    finish_run(tmp_path, tiny_base)
    return tmp_path


def finish_run(tmp_path: Path, tiny_base: Path) -> None:
    run, data = tmp_path / "runs/slang/tiny-lora-0", tmp_path / "data/slang"
    run.mkdir(parents=True)
    data.mkdir(parents=True)
    for name in ("training", "validation", "test"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (data / "dropped.jsonl").write_text('{"reason": "private"}\n')
    splits = {name: {"rows": 5, "sha256": "0"} for name in ("training", "validation", "test")}
    manifest = {
        "source": {"name": "mine.csv", "sha256": "ab12"},
        "rows_in": 15,
        "rows_out": 15,
        "splits": splits,
        "seed": 7,
    }
    for file in (data / "manifest.json", run / "data_manifest.json"):
        file.write_text(json.dumps(manifest))
    train = {"epochs": 3, "learning_rate": 5e-4, "epochs_on": {"cpu": 3}}
    config = {
        "task": {"name": "slang", "data": {"source": "mine.csv"}, "train": train},
        "model": {"name": "tiny", "path": str(tiny_base)},
        "data_dir": "data/slang",
        "seed": 7,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"gpus": [], "cpu": "A processor"}))
    sides = {
        name: {"loss": 3.0, "perplexity": value, "answers": [f"Slang: {name}\nTwo lines"]}
        for name, value in (("before", 44.084), ("after", 16.657))
    }
    (run / "evaluation.json").write_text(json.dumps({"held_out_rows": 5, "questions": ["Rain?"], **sides}))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    torch.manual_seed(0)
    tensors = {peft_name(n): torch.randn(p.shape) * 0.3 for n, p in model.named_parameters() if "lora_" in n}
    prompt = Prompt("Q:\n{instruction}\nA:\n{response}", "{context}", "Slang: {slang}", {"context": "Rain."})
    nemo.write(
        Adapter(settings, tensors, {**describe(tiny_base), "name": "tiny"}, None, prompt, "bfloat16"),
        run / "slang.nemo",
    )


class Hub(ThreadingHTTPServer):
    """The part of the hub's interface that a commit of small files needs; `commits` is what arrived."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.created: list[dict[str, Any]] = []
        self.commits: dict[str, dict[str, bytes]] = {}
        self.tokens: set[str] = set()
        self.refuse = 0


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.server.refuse:
            return self.answer({"error": "no"}, self.server.refuse)
        if self.path == "/api/repos/create":
            made = json.loads(body)
            self.server.created.append(made)
            kind = "datasets/" if made.get("type") == "dataset" else ""
            return self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/{kind}me/{made['name']}"})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            lines = [json.loads(line)["value"] for line in body.splitlines() if json.loads(line)["key"] == "file"]
            self.server.commits[self.path] = {line["path"]: base64.b64decode(line["content"]) for line in lines}
            page = f"http://127.0.0.1:{self.server.server_port}/me/x/commit/1"
            return self.answer({"commitUrl": page, "commitOid": "1" * 40, "pullRequestUrl": None})
        return self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.answer({"sha": "1" * 40, "siblings": [], "id": "me/x"})

    def answer(self, values: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def test_a_dry_run_writes_what_would_be_uploaded_and_needs_no_token(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    main(["task=slang", "repo=me/slang-gemma", "dataset=me/rows", "base=org/tiny", "dry_run=true"])
    card = ModelCard.load(work / "exports/slang/hub/model/README.md")
    assert (card.data.license, card.data.datasets, card.data.library_name) == ("gemma", ["me/rows"], "peft")
    for words in (
        "| 44.08 | 16.66 |",
        "on 5 held-out rows",
        "`mine.csv`",
        "r: 4",
        "epochs: 3",
        "\n3 epochs, seed",
        "Gemma Terms of Use found at https://ai.google.dev/gemma/terms",
        "Q:\n{instruction}\nA:\n{response}",
        "```text\nSlang: after\nTwo lines\n```",
        "A processor",
    ):
        assert words in card.text, words
    assert not re.search(r"\{[a-z_]+\}", card.text.replace("{instruction}", "").replace("{response}", ""))
    assert str(work) not in card.content and "came from another place than the hub (local folder)" in card.text
    rows = ModelCard.load(work / "exports/slang/hub/dataset/README.md")
    assert [file["path"] for file in rows.data.configs[0]["data_files"]] == [
        "training.jsonl",
        "validation.jsonl",
        "test.jsonl",
    ]
    assert not (work / "exports/slang/hub/dataset/dropped.jsonl").exists()


def test_a_card_shows_an_answer_as_text_whatever_is_in_it() -> None:
    assert literal("# <b>hi</b>") == "```text\n# <b>hi</b>\n```"
    assert literal("a\n````\nb") == "`````text\na\n````\nb\n`````"


@pytest.mark.parametrize("is_whole", [False, True])
def test_what_is_made_from_a_gemma_4_is_under_its_licence(
    is_whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny_folder4("e2b", tmp_path / "my-gemma", torch.float32, whole=is_whole)
    base = local_base(folder, tmp_path / "models")
    finish_run(tmp_path, base)
    words = ["task=slang", "repo=me/slang-gemma", "base=org/g", "dry_run=true", f"model.path={folder}"]
    main(words)
    model = tmp_path / "exports/slang/hub/model"
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "apache-2.0" and "[Apache License 2.0]" in card.text and "Gemma Terms" not in card.text
    notice = (model / "NOTICE").read_text()
    assert "Apache License, Version 2.0" in notice and "changed by fine-tuning" in notice and "Terms" not in notice
    assert "Apache License" in (model / "LICENSE").read_text()
    assert {"NOTICE", "LICENSE"} <= json.loads((model / "conversion.json").read_text())["files"].keys()


@pytest.mark.parametrize("to", ["adapter", "merged"])
def test_model_and_data_are_uploaded_completely_and_privately(
    to: str, work: Path, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    main(["task=slang", "repo=me/slang-gemma", "dataset=me/rows", "base=org/tiny", f"to={to}"])
    assert [(made["name"], made.get("private") or made.get("visibility")) for made in hub.created] in (
        [("rows", True), ("slang-gemma", True)],
        [("rows", "private"), ("slang-gemma", "private")],
    )
    sent = {path.partition("/commit/")[0]: files for path, files in hub.commits.items()}
    model, rows = sent["/api/models/me/slang-gemma"], sent["/api/datasets/me/rows"]
    weights = "adapter_model.safetensors" if to == "adapter" else "model.safetensors"
    assert {weights, "README.md", "NOTICE", "prompt.json", "conversion.json"} <= model.keys()
    if to == "adapter":
        assert json.loads(model["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"
        record = json.loads(model["conversion.json"])["files"]
        assert record["adapter_config.json"] == hashlib.sha256(model["adapter_config.json"]).hexdigest()
    assert not any(str(work).encode() in content for content in model.values())
    for name, content in model.items():
        assert content == (work / "exports/slang/hub/model" / name).read_bytes()
    assert {json.loads(line)["output"] for line in rows["training.jsonl"].splitlines()} == {
        row["output"] for row in ROWS
    }
    assert hub.tokens == {f"Bearer {TOKEN}"}
    printed = "".join(capfd.readouterr())
    assert "published:" in printed and TOKEN not in printed
    assert not any(TOKEN.encode() in content for content in [*model.values(), *rows.values()])


def test_an_error_of_the_hub_is_reported_without_the_token(work: Path, hub: Hub) -> None:
    hub.refuse = 403
    with pytest.raises(UserError, match=r"answered 403 .* check that HF_TOKEN may write there") as error:
        main(["task=slang", "repo=me/slang-gemma", "base=org/tiny"])
    assert TOKEN not in str(error.value) and (work / "exports/slang/hub/model/README.md").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["repo=me/x"], "HF_TOKEN is not set"),
        (["dry_run=1"], "with its owner"),
        (["repo=slang", "dry_run=1"], "with its owner"),
        (["repo=a/b/c", "dry_run=1"], "is no name of a repository"),
        (
            ["repo=me/x", "dry_run=1"],
            r"a folder of your own: which model of the hub is it\? Name it: ARGS=base=owner/model",
        ),
        (["repo=me/x", "base=tiny", "dry_run=1"], "with its owner"),
        (["repo=me/x", "to=gguf", "dry_run=1"], "to=gguf is unknown. Known: adapter, merged"),
    ],
)
def test_a_mistake_gives_one_sentence(
    words: list[str], message: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match=message):
        main(["task=slang", *words])
    assert not (work / "exports").exists()


def test_data_that_the_run_was_not_trained_on_is_not_published(work: Path) -> None:
    manifest = work / "data/slang/manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256": "0"', '"sha256": "1"'))
    with pytest.raises(UserError, match=r"does not hold the examples that .* was trained on: .* make data TASK=slang"):
        main(["task=slang", "repo=me/x", "base=org/tiny", "dataset=me/rows", "dry_run=1"])


def test_an_adapter_of_a_gemma_4_is_named_for_the_whole_model_that_the_hub_has(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/slang/tiny-lora-0"
    base = tiny_folder4("e2b", tmp_path / "models/gemma-4-e2b")
    BaseRecord(name="gemma-4-e2b", source="https://huggingface.co/google/gemma-4-E2B").write(base / "base.json")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"name": "gemma-4-e2b", "path": str(base)}}))
    old = nemo.read(run / "slang.nemo")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.randn(4, 64), f"{layer}.lora_B.weight": torch.randn(64, 4)}
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["model.layers.0.self_attn.q_proj"]}
    nemo.write(Adapter(settings, tensors, describe(base), None, old.prompt, "bfloat16"), run / "slang.nemo")
    main(["task=slang", "repo=me/slang", "dry_run=true"])
    folder = tmp_path / "exports/slang/hub/model"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "google/gemma-4-E2B"
    assert settings["target_modules"] == ["model.language_model.layers.0.self_attn.q_proj"]
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        name.replace("model.layers", "model.language_model.layers") for name in tensors
    }
    card = (folder / "README.md").read_text()
    assert "Its tensors are named for `Gemma4ForConditionalGeneration`" in card and "apache-2.0" in card


@pytest.mark.parametrize("recorded", [True, False])
def test_a_base_from_the_hub_s_cache_is_named_by_its_repository(recorded: bool, work: Path, tiny_base: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = work / "hub/models--my-org--my-gemma.v2/snapshots" / commit
    shutil.copytree(tiny_base, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: ours\n---\n# A model\n")
    run = work / "runs/slang/tiny-lora-0"
    old = nemo.read(run / "slang.nemo")
    # Runs of earlier versions call it by the commit.
    base = describe(snapshot) if recorded else {**describe(snapshot), "name": commit, "source": "local folder"}
    nemo.write(Adapter(old.peft, old.tensors, base, None, old.prompt, "bfloat16"), run / "slang.nemo")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"name": "any", "path": str(snapshot)}}))
    main(["task=slang", "repo=me/slang", "dry_run=true"])
    settings = json.loads((work / "exports/slang/hub/model/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "my-org/my-gemma.v2"
    assert settings["revision"] == (commit if recorded else None)
    card = ModelCard.load(work / "exports/slang/hub/model/README.md")
    assert card.data.base_model == "my-org/my-gemma.v2" and commit not in card.text.split("SHA-256")[0]
    assert (card.data.license, card.data.license_name) == ("other", "ours")
    assert "its card names as its licence: other, ours" in card.text and "Gemma Terms of Use" in card.text
    main(["task=slang", "repo=me/slang", "base=org/same-elsewhere", "dry_run=true"])
    settings = json.loads((work / "exports/slang/hub/model/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/same-elsewhere", None)
