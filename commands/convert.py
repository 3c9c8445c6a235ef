"""Convert a model or an adapter, and prove that the result says the same.

    python -m commands.convert runs/slang/<run>/slang.nemo --to adapter
    python -m commands.convert runs/slang/<run>/slang.nemo --to merged --out my-slang-gemma
    python -m commands.convert google/gemma-2-2b --to nemo

What SOURCE is, is seen from its content. The target is a folder; it appears when it has passed its proof,
`conversion.json`, or not at all. `merged`, or `hf` of an adapter, is the adapter folded into its base, as a Hugging
Face folder.
"""

import argparse
from pathlib import Path

from converters.convert import convert, table
from converters.formats import FORMATS, MERGED
from core.errors import run


def main(words: list[str]) -> None:
    about = f"{__doc__}\n{table()}" if {"-h", "--help"} & set(words) else ""
    parser = argparse.ArgumentParser("converters", description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", help="a file, a folder, or a model on the hub, as name/model")
    parser.add_argument("--to", required=True, choices=[*FORMATS, MERGED])
    parser.add_argument("--out", type=Path, help="target folder (default: exports/<source>/<to>)")
    parser.add_argument("--base", help="an adapter's base: folder, or name on the hub (default: models/<its name>)")
    parser.add_argument("--dtype", help="how weights are stored, where the format leaves a choice")
    options = parser.parse_args(words)
    target = options.out or Path("exports") / Path(options.source).stem / options.to
    convert(options.source, options.to, target, options.base, options.dtype)


if __name__ == "__main__":
    run(main)
