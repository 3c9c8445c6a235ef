"""A program for an interpreter that has keras_hub: KerasHub's own hidden states, for the tests of its presets.

Reads a line of JSON from stdin: "preset" (a folder), "ids" (a text), "save" (a folder); saves there the preset as
KerasHub does, and its hidden states [tokens, features] as `hidden.npy`.
"""

import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import numpy as np
import torch
from keras_hub.models import Gemma4Backbone


def main() -> None:
    job = json.loads(sys.stdin.readline())
    backbone = Gemma4Backbone.from_preset(job["preset"], dtype="float32")
    ids = torch.tensor([job["ids"]])
    inputs = {"token_ids": ids, "padding_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.numel())[None]}
    with torch.inference_mode():
        hidden = backbone(inputs)[0].numpy()
    backbone.save_to_preset(job["save"])
    np.save(Path(job["save"]) / "hidden.npy", hidden)


if __name__ == "__main__":
    main()
