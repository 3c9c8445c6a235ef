"""A fine-tuned model on the Hugging Face hub, with a card that says what it is, from what, and how well it does.

    python -m commands.publish task=slang repo=me/slang-gemma dry_run=true      (writes the folder, sends nothing)
    HF_TOKEN=hf_... python -m commands.publish task=slang repo=me/slang-gemma to=merged dataset=me/slang-rows

The card and the adapter name the base as the hub does. A run on a folder of your own does not know that name, and asks
for it: base=owner/model.

A repository that does not exist yet is made private: what is in it is seen by others when its owner says so there.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import Field

from core.arguments import Arguments
from core.artifacts import Conversion, Environment, Evaluation, Manifest
from core.base_model import hub_origin, licence_of
from core.configuration import CONFIG_DIR, load_config
from core.errors import UserError, run
from core.files import read_json
from core.gemma_config import is_gemma4
from core.licence import LICENCES
from core.run_folder import Run, base_of, newest_run
from core.schema import Config

if TYPE_CHECKING:
    from converters.nemo_file import NemoFile

SPLITS = {"train": "training.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}

MODEL_CARD = """---
{front}
---

# {title}

{kind} of [{base}](https://huggingface.co/{base}), fine-tuned with NVIDIA NeMo, Lightning and PEFT on
{rows} rows.{other_base}

| on {held_out} held-out rows | before | after |
|---|---|---|
| perplexity of the response | {before:.2f} | {after:.2f} |

Asked the same, before and after:

{answers}

## How to ask it

It answers what it was trained with, word for word (`prompt.json`; `{{instruction}}` is yours):

{template}

```python
{code}
```
{loads_on}
## Data

{data}

| split | rows |
|---|---|
{splits}

## Training

{epochs}, seed {seed}, on {machine}.

```yaml
{settings}
```

The files were made by a conversion that opened them again and compared them with the trained model: largest logit
difference {difference:.2g}, top-1 agreement {agreement:.1%} on fixed prompts. `conversion.json` is its record.

## Licence

{licence}
"""
DATA_CARD = """---
{front}
---

# {title}

The rows that {model} was fine-tuned on, as JSON lines: {rows} rows of `{source}`, cleaned, near-duplicates kept within
one split, divided with seed {seed}. `manifest.json` says how many were dropped and why, and has a hash of every file.

| split | rows |
|---|---|
{splits}
"""
OTHER_BASE = """

The weights that it was trained on came from another place than the hub ({source}), and may differ from those there by
their rounding; the figures below are of the former, with SHA-256 `{sha256}`."""
LOADS_ON = """
Its tensors are named for `{}`. On another class of transformers, peft only warns and the adapter does nothing.
"""
LOAD = {
    "adapter": """from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("{repo}")  # fetches {base} too""",
    "merged": """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{repo}")""",
}


class Options(Arguments):
    repo: str = Field("", description="where the model goes, name/model")
    to: Literal["adapter", "merged"] = Field("adapter", description="the adapter alone, or merged into its base")
    dataset: str = Field("", description="where the prepared rows go, name/data; without it they stay here")
    base: str = Field("", description="the base's name on the hub, owner/model, where the run does not know it")
    dry_run: bool = Field(False, description="only write exports/<task>/hub/, send nothing")


def main(argv: list[str]) -> None:
    config, options = load_config(argv, Options)
    publish(config, options.repo, options.to, options.dataset, options.base, options.dry_run)


def publish(config: Config, repo: str, to: str, dataset: str, base: str, dry_run: bool) -> None:
    """Write and, unless `dry_run`, push the newest run of the task.

    Raises:
        UserError: no such run, rows that it was not trained on, a base without a known name on the hub, a name or
            token that the hub does not take, no network.
    """
    for name in filter(None, (repo, dataset, base)):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"{name!r} is no name of a repository ({error})") from None
    if "/" not in repo or any("/" not in name for name in (dataset, base) if name):
        raise UserError("name the repository with its owner: REPO=name/model, DATASET=name/data, base=owner/model")
    token = os.environ.get("HF_TOKEN")
    if not token and not dry_run:
        raise UserError(
            "HF_TOKEN is not set. Make a token that may write at https://huggingface.co/settings/tokens, "
            "then: export HF_TOKEN=hf_...; or look at what would be sent with DRY_RUN=1"
        )
    from converters.convert import convert
    from converters.nemo_file import read_nemo

    run_folder = newest_run(config)
    archive = run_folder / f"{config.task.name}.nemo"
    nemo = read_nemo(archive)
    folder = Path("exports") / config.task.name / "hub"
    pushed = [(repo, "model", folder / "model")]
    trained = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
    base = base or base_on_hub(nemo.base, Path(trained["model"].get("path") or ""), run_folder)
    if dataset:
        pushed.insert(0, (dataset, "dataset", folder / "dataset"))
        write_rows(Run.read(run_folder).data_folder(config), folder / "dataset", repo, dataset)
    base_folder = base_of(Run.read(run_folder), config)
    # There, a Gemma 4 is a whole model with image and sound, on which an adapter for its text model does nothing.
    whole = to == "adapter" and is_gemma4(read_json(base_folder / "config.json"))
    convert(archive, to, folder / "model", base_folder, whole=whole or None)
    if to == "adapter":
        name_base(folder / "model", base)
    licence = licence_of(base_folder), licence_on_card(Path(trained["model"].get("path") or base_folder))
    write_card(run_folder, trained, nemo, base, licence, folder / "model", repo, to, dataset)
    for name, kind, place in pushed:
        if dry_run:
            print(f"{place} is what would go to the {kind} repository {name}")
        else:
            push(HfApi(token=token), name, kind, place)


def write_card(
    run_folder: Path,
    trained: dict[str, Any],
    nemo: "NemoFile",
    base: str,
    licence: tuple[str, dict[str, str]],
    folder: Path,
    repo: str,
    to: str,
    dataset: str,
) -> None:
    """`README.md` in `folder`, from what the run measured.

    Args:
        base: name on the hub.
        licence: of the base: a key of `LICENCES`, and what its own card says (see `licence_on_card`).
    """
    from converters.adapter import HUB

    evaluation = Evaluation.read(run_folder / "evaluation.json")
    manifest = Manifest.read(run_folder / "data_manifest.json")
    environment = Environment.read(run_folder / "environment.json")
    record = Conversion.read(folder / "conversion.json")
    proof = record.proof
    front = ModelCardData(
        base_model=base,
        license=licence[1].get("license", licence[0]),
        license_name=licence[1].get("license_name"),
        license_link=licence[1].get("license_link"),
        datasets=[dataset] if dataset else None,
        pipeline_tag="text-generation",
        library_name="peft" if to == "adapter" else "transformers",
        tags=["gemma", "nemo", "lora", trained["task"]["name"]],
    )
    train = {key: value for key, value in trained["task"]["train"].items() if key != "epochs_on"}
    settings = {
        "peft": {key: value for key, value in nemo.peft.items() if value},
        "train": train,
        "quantization": nemo.quantization,
    }
    text = MODEL_CARD.format(
        front=front.to_yaml(),
        title=repo.partition("/")[2],
        base=base,
        held_out=evaluation.held_out_rows,
        kind="A LoRA adapter" if to == "adapter" else "The merged weights of a LoRA",
        rows=manifest.splits["training"].rows,
        before=evaluation.before.perplexity,
        after=evaluation.after.perplexity,
        answers=answers(evaluation),
        template=literal(nemo.prompt.template),
        code=LOAD[to].format(repo=repo, base=base),
        loads_on=LOADS_ON.format(record.loads_on) if record.loads_on else "",
        data=data_line(manifest, dataset),
        splits=split_lines(manifest),
        epochs=f"{train.get('epochs')} epoch{'s' * (train.get('epochs') != 1)}",
        seed=trained.get("seed", manifest.seed),
        machine=", ".join(environment.gpus) or environment.cpu,
        settings=yaml.safe_dump(settings, sort_keys=False).strip(),
        licence=LICENCES[licence[0]].card + other_licence(*licence),
        other_base="" if nemo.base["source"].startswith(HUB) else OTHER_BASE.format(**nemo.base),
        difference=proof.max_logit_difference,
        agreement=proof.top1_agreement,
    )
    ModelCard(text).save(folder / "README.md")


def write_rows(data_folder: Path, folder: Path, repo: str, dataset: str) -> None:
    """The prepared rows with their card; what was dropped from them stays here."""
    manifest = Manifest.read(data_folder / "manifest.json")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in (*SPLITS.values(), "manifest.json"):
        shutil.copyfile(data_folder / name, folder / name)
    files = [{"split": split, "path": name} for split, name in SPLITS.items()]
    front = DatasetCardData(
        configs=[{"config_name": "default", "data_files": files}], task_categories=["text-generation"]
    )
    text = DATA_CARD.format(
        front=front.to_yaml(),
        title=dataset.partition("/")[2],
        rows=manifest.rows_out,
        model=f"[{repo}](https://huggingface.co/{repo})",
        source=manifest.source.name,
        seed=manifest.seed,
        splits=split_lines(manifest),
    )
    DatasetCard(text).save(folder / "README.md")


def name_base(folder: Path, base: str) -> None:
    """Where this machine keeps the base means nothing elsewhere: the adapter names it as the hub does."""
    from converters.hf import write_json

    file, record = folder / "adapter_config.json", Conversion.read(folder / "conversion.json")
    values = read_json(file)
    revision = values["revision"] if values["base_model_name_or_path"] == base else None  # of another repository
    write_json(file, {**values, "base_model_name_or_path": base, "revision": revision})
    record.files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    record.write(folder / "conversion.json")


def base_on_hub(base: dict[str, str], folder: Path, run_folder: Path) -> str:
    """The base's name on the hub: by its record, by the path of the cache that it was read from, or as one known here.

    Raises:
        UserError: none of these tells.
    """
    from converters.adapter import HUB

    cached = hub_origin(folder)
    for source in (base["source"], cached.source if cached else ""):
        if source.startswith(HUB):
            return source.removeprefix(HUB)
    known = CONFIG_DIR / "model" / f"{Path(base['name']).name}.yaml"
    if known.exists():
        return str(yaml.safe_load(known.read_text())["repo"])
    place = folder if folder.name else base["name"]
    raise UserError(
        f"{run_folder} was trained on {place}, a folder of your own: which model of the hub is it? Name it: "
        f"ARGS=base=owner/model"
    )


def licence_on_card(folder: Path) -> dict[str, str]:
    """What the card in a model's folder says of its licence: `license`, `license_name`, `license_link`, or less."""
    try:
        data = ModelCard.load(folder / "README.md").data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: data[key] for key in keys if isinstance(data.get(key), str)}


def other_licence(of_family: str, card: dict[str, str]) -> str:
    """A sentence for a base whose own card names another licence than its family has."""
    if card.get("license", of_family) == of_family:
        return ""
    names = ", ".join(dict.fromkeys(card[key] for key in ("license", "license_name", "license_link") if key in card))
    return f"\n\nThe base was itself made from a Gemma, and its card names as its licence: {names}."


def answers(evaluation: Evaluation) -> str:
    """The run's first question with both answers, word for word."""
    sides = [("Question", evaluation.questions[0])]
    sides += [("Before", evaluation.before.answers[0]), ("After", evaluation.after.answers[0])]
    return "\n\n".join(f"**{name}**\n\n{literal(text)}" for name, text in sides)


def literal(text: str) -> str:
    """`text` as Markdown shows it unchanged: what a model writes may be markup, links and HTML."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return f"{fence}text\n{text}\n{fence}"


def data_line(manifest: Manifest, dataset: str) -> str:
    public = f", published as [{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else ", not published"
    return f"`{manifest.source.name}`{public}. SHA-256 of the source: `{manifest.source.sha256}`."


def split_lines(manifest: Manifest) -> str:
    return "\n".join(f"| {name} | {split.rows} |" for name, split in manifest.splits.items())


def push(api: HfApi, repo: str, kind: str, folder: Path) -> None:
    """One commit with everything in `folder`."""
    import httpx2  # what huggingface_hub speaks through

    page = f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    print(f"Sending {folder} to {page}", flush=True)
    try:
        api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder, commit_message="Publish")
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        hint = "check that HF_TOKEN may write there" if status in (401, 403, 404) else "try again later"
        raise UserError(f"the hub answered {status} for {page}: {hint}. {folder} is ready as it is") from None
    except (OSError, httpx2.HTTPError) as error:
        raise UserError(
            f"{page} cannot be reached ({type(error).__name__}); {folder} is ready, try again later"
        ) from None
    print(f"published: {page} (a new repository is private; its settings there make it public)")


if __name__ == "__main__":
    run(main)
