"""A prompt that has turns is worded in those of the base model at hand.

Gemma 1 to 3 say `<start_of_turn>`, Gemma 4 `<|turn>`; to the other one each is ordinary text, in pieces, with which a
model trains without complaint and answers badly. So `load_config` gives every task the turns of its base, which are
known from the model's config.json, or by its name before that has been fetched. A template without turns stays as it
is, and a task that continues texts has none (`Prompt.continues_text`).
"""

import json
import re
import sys
from pathlib import Path
from typing import Literal

from core.gemma4_turns import END, MODEL_TURN, NO_THOUGHT, TURN
from core.prompt import CONTINUED
from core.schema import Config, ModelConfig

Turns = Literal["gemma", "gemma4-small", "gemma4-large"]
TO_GEMMA4 = {"<start_of_turn>": TURN, "<end_of_turn>": END}
TO_GEMMA = {new: old for old, new in TO_GEMMA4.items()}


def with_turns_of_its_base(config: Config) -> Config:
    """`config`, whose prompt has the turns of its base model; a sentence on standard error says where they were
    others."""
    prompt, turns = config.task.prompt, turns_of_model(config.model)
    # Where instruction and response are one text that is continued, an instruction-tuned model's turns have no place.
    template = CONTINUED if prompt.instruction == prompt.response else in_turns(prompt.template, turns)
    if template == prompt.template:
        return config
    foreign = TO_GEMMA if turns == "gemma" else TO_GEMMA4
    if template != CONTINUED and any(token in prompt.template for token in foreign):
        name = Path(config.model.path).name if config.model.path else config.model.name
        print(
            f"task.prompt.template has turns that {name} does not know; it gets its own: {template!r}", file=sys.stderr
        )
    task = config.task.model_copy(update={"prompt": prompt.model_copy(update={"template": template})})
    return config.model_copy(update={"task": task})


def turns_of_model(model: ModelConfig) -> Turns:
    """The turns of a base model that may not have been fetched yet."""
    folder = Path(model.path) if model.path else Path(model.models_dir) / model.name
    if (folder / "config.json").is_file():
        return turns_of(folder)
    if "gemma-4-" in (name := model.repo.lower()):
        return "gemma4-small" if re.search(r"gemma-4-e\d", name) else "gemma4-large"
    return "gemma"


def turns_of(base: Path) -> Turns:
    """The turns of the model in a Hugging Face folder.

    Of Gemma 4, the small sizes (E2B, E4B) are told from the large ones by their per-layer embeddings.
    """
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        kind, per_layer = str(text.get("model_type", config.get("model_type"))), text.get("hidden_size_per_layer_input")
    except (OSError, ValueError, AttributeError):  # whoever loads the model says what is wrong
        return "gemma"
    if not kind.startswith("gemma4"):
        return "gemma"
    if per_layer is None:  # transformers' defaults
        per_layer = 0 if "unified" in kind else 256
    return "gemma4-small" if per_layer else "gemma4-large"


def in_turns(template: str, turns: Turns) -> str:
    """`template` with the control tokens of `turns`; where it has none, `template` itself."""
    for old, new in (TO_GEMMA if turns == "gemma" else TO_GEMMA4).items():
        template = template.replace(old, new)
    template = template.replace(NO_THOUGHT, "")
    return template.replace(MODEL_TURN, MODEL_TURN + NO_THOUGHT) if turns == "gemma4-large" else template
