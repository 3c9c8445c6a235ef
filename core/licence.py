"""The licence of a base model, which goes with everything that is made from it: exports, cards, the website.

It follows from the family that a model's config.json names (`core/gemma_config.py`), so a folder of the user's own has
its own licence and not that of the model that happens to be configured.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.gemma_config import family_of

APACHE_TEXT = Path(__file__).resolve().parent.parent / "LICENSE"  # of this project, and the same for Gemma 4


@dataclass(frozen=True)
class Licence:
    """
    Attributes:
        title: as a sentence names it.
        url: its text.
        is_gated: whether the hub wants it accepted by each account before it hands out the weights.
        notice: the NOTICE file of what is made from the model.
        card: the same for readers of a model card.
    """

    title: str
    url: str
    is_gated: bool
    notice: str
    card: str


LICENCES = {
    "gemma": Licence(
        "Gemma Terms of Use",
        "https://ai.google.dev/gemma/terms",
        is_gated=True,
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n",
        card="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "https://ai.google.dev/gemma/terms. Whoever uses or passes on this model is\n"
        "bound by them, its use restrictions included; `NOTICE` goes with every copy.",
    ),
    "apache-2.0": Licence(
        "Apache License 2.0",
        "https://www.apache.org/licenses/LICENSE-2.0",
        is_gated=False,
        notice="Made from Gemma 4, copyright Google LLC, licensed under the Apache License, Version 2.0, whose text is "
        "found at www.apache.org/licenses/LICENSE-2.0. The files here are not those that Google published: they were "
        "changed by fine-tuning, conversion or both.\n",
        card="Gemma 4 is licensed under the [Apache License 2.0](https://www.apache.org/licenses/LICENSE-2.0), and so\n"
        "is what is made from it here; `NOTICE` and `LICENSE` go with every copy.",
    ),
}


def licence_name(config: Mapping[str, Any], where: object) -> str:
    """The key in `LICENCES` for a model's config.json, which is also what the hub calls the licence.

    Raises:
        UserError: no Gemma that is known here; `where` it stands, for the message.
    """
    return family_of(config, where).licence


def write_notices(name: str, folder: Path) -> None:
    """NOTICE in `folder`; with Apache's licence its text too, which whoever passes the files on must hand on."""
    (folder / "NOTICE").write_text(LICENCES[name].notice)
    if name == "apache-2.0" and not (folder / "LICENSE").exists():
        shutil.copyfile(APACHE_TEXT, folder / "LICENSE")
