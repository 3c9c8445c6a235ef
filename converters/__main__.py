"""Convert a fine-tuned model, and prove that the result says the same.

    python -m converters runs/slang/<run>/slang.nemo --to adapter
    python -m converters runs/slang/<run>/slang.nemo --to merged --out my-slang-gemma

| from | to | opens with |
|---|---|---|
| .nemo (adapter) | adapter | PeftModel.from_pretrained(base, folder) |
| .nemo (adapter) | merged | AutoModelForCausalLM.from_pretrained(folder), vLLM |

The folder appears only when it has passed its proof, `conversion.json`.
"""

import argparse
import hashlib
import shutil
from importlib.metadata import version
from pathlib import Path

from nemo_configs.command_line import UserError, run

TERMS_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser("converters", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, help="a .nemo of this project")
    parser.add_argument("--to", required=True, choices=["adapter", "merged"])
    parser.add_argument("--out", type=Path, help="target folder (default: exports/<task>/<to>)")
    parser.add_argument("--base", type=Path, help="Hugging Face folder of the base (default: models/<its name>)")
    options = parser.parse_args(words)
    target = options.out or Path("exports") / options.source.stem / options.to
    convert(options.source, options.to, target, options.base)


def convert(source: Path, kind: str, target: Path, base_folder: Path | None = None) -> None:
    """Write `target` from the archive `source`, proven.

    Raises:
        UserError: an unreadable source, a missing or wrong base, a target in the way, an unfaithful conversion.
    """
    if target.exists() and not (target / "conversion.json").exists() and any(target.iterdir()):
        raise UserError(f"{target} exists and was not made by this command; name another with --out")
    print(f"Converting {source} to {target} and comparing both sides", flush=True)
    from converters.nemo_file import read_nemo
    from converters.prove import prove, write_record
    from converters.to_adapter import write_adapter
    from converters.to_merged import write_merged

    nemo = read_nemo(source)
    base_folder = base_folder or Path("models") / nemo.base["name"]
    if not (base_folder / "config.json").exists():
        raise UserError(f"the base model {nemo.base['name']} is not in {base_folder}; name its folder with --base")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (write_adapter if kind == "adapter" else write_merged)(nemo, base_folder, partial)
        (partial / "NOTICE").write_text(TERMS_NOTICE)
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        proof = prove(kind, nemo, base_folder, partial)
        packages = {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}
        write_record(partial, {"source": source.name, "source_sha256": digest, "to": kind, "base": nemo.base,
                               "dtype": nemo.dtype, "proof": proof, "packages": packages})  # fmt: skip
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    print(f"{target}: largest logit difference {proof['max_logit_difference']:.2g}, KL divergence "
          f"{proof['mean_kl_divergence']:.2g} nats a token, top-1 agreement {proof['top1_agreement']:.1%}")  # fmt: skip


if __name__ == "__main__":
    run(main)
