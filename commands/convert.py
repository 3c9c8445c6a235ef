"""Convert a model or an adapter, and prove that the result says the same.

    python -m commands.convert source=runs/slang/<run>/slang.nemo to=adapter
    python -m commands.convert source=runs/slang/<run>/slang.nemo to=merged out=my-slang-gemma
    python -m commands.convert source=runs/slang/<run>/slang.nemo to=merged base=a/whole/gemma-4-E2B-it
    python -m commands.convert source=google/gemma-2-2b to=nemo

The input format is detected from the file's contents. The target is a folder; it appears when it has passed its proof,
`conversion.json`, or not at all. `merged`, or `hf` of an adapter, is the adapter merged into its base, as a Hugging
Face folder. `--help` lists what can be converted to what.

A Gemma 4 as published also sees and hears, and its layers have other names than those of its text model. With the
folder of a whole one as base, an adapter is named for that, or merged into it with all but the text model untouched.
`whole=true` names an adapter so without that folder.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from converters.convert import convert, table
from converters.formats import FILES, FORMATS, MERGED, name_of
from core.arguments import HELP, Arguments, parse
from core.errors import run


class Options(Arguments):
    source: str = Field(description="a file, a folder, or a model on the hub, as name/model")
    to: Literal[(*FORMATS, MERGED)] = Field(description="the format to write")  # type: ignore[valid-type]
    out: Path | None = Field(None, description="target folder; without it exports/<source>/<to>")
    base: str | None = Field(
        None, description="an adapter's base: folder, or name on the hub; without it models/<its name>"
    )
    dtype: str | None = Field(None, description="how weights are stored, where the format leaves a choice")
    shards: int | None = Field(None, ge=1, le=1000, description="files to divide the weights among, of to=megatron")
    whole: bool | None = Field(
        None,
        description="an adapter for the whole model, with image and sound, or its text alone; without it as the base",
    )


def main(argv: list[str]) -> None:
    if set(HELP) & set(argv):
        print(table())
    options = parse(Options, argv)
    name = Path(name_of(options.source))  # of which gemma-1.1-2b-it has no suffix
    name = Path(name.stem) if name.suffix in FILES else name
    target = options.out or Path("exports") / name / options.to
    convert(options.source, options.to, target, options.base, options.dtype, options.whole, options.shards)


if __name__ == "__main__":
    run(main)
