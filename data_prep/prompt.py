"""How a row becomes a prompt and a response: the one place, for data, training, evaluation and serving.

A `Prompt` is written into every checkpoint and exported adapter, so a model is asked the way it was trained.
It needs only the standard library, and fills `{name}` by plain replacement: a template that comes with a
checkpoint from elsewhere cannot reach into Python objects as `str.format` would let it.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROMPT_FILE = "prompt.json"  # beside the weights in an exported folder
_FIELD = re.compile(r"\{(\w+)\}")
_END = re.compile(r"(<\w+>)?")  # what may follow {response}: one token of the model's own


@dataclass(frozen=True)
class Prompt:
    """A task's wording.

    Attributes:
        template: the whole text of a row, with `{instruction}` and, at its end, `{response}`. One token of the model's
            may follow, such as `<end_of_turn>`: it is learned as the end of a response in place of EOS.
        instruction: how the fields of a row make an instruction, e.g. `{tag}{context}{condition}`.
        response: how the fields of a row make a response, one `Label: {field}` a line.
        fields: values for the fields that a row or a caller leaves out.
    """

    template: str
    instruction: str
    response: str
    fields: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        before, _, end = self.template.partition("{response}")
        if before.count("{instruction}") != 1 or "{response}" not in self.template or not _END.fullmatch(end):
            raise ValueError(
                f"prompt template must hold {{instruction}} once and end in {{response}}, or in {{response}} and one "
                f"token such as <end_of_turn>: {self.template!r}"
            )

    def write_instruction(self, **values: str) -> str:
        """The instruction for `values`; fields left out take the task's defaults, unknown ones become empty."""
        return self._fill(self.instruction, {**self.fields, **values})

    def write_response(self, **values: str) -> str:
        """The response for `values`. A line whose fields are all empty is left out, as in a two-column table."""
        lines = self.response.split("\n")
        kept = [line for line in lines if not _FIELD.findall(line) or any(values.get(f) for f in _FIELD.findall(line))]
        return self._fill("\n".join(kept), values)

    def wrap(self, instruction: str) -> str:
        """Everything the model is given before it answers."""
        return self._fill(self.template.partition("{response}")[0], {"instruction": instruction})

    def end_id(self, tokenizer: Any) -> int:
        """The token after which a response is over, of a Hugging Face tokenizer.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        end = self.template.partition("{response}")[2]
        if not end:
            return int(tokenizer.eos_token_id)
        ids = tokenizer(end, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"task.prompt.template ends in {end}, which is no token of this model")
        return int(ids[0])

    def read_response(self, text: str) -> dict[str, str]:
        """The fields of a generated response, the inverse of `write_response`; those not found are left out."""
        labels = self.labels()
        found: dict[str, str] = {}
        current = None
        for line in text.split("\n"):
            named = next((name for name, label in labels.items() if label and line.startswith(label)), None)
            if named in found:
                break  # the model has begun a second answer
            if named:
                current, line = named, line[len(labels[named]) :]
            if current:
                found[current] = f"{found.get(current, '')}\n{line}".strip()
        return found

    def labels(self) -> dict[str, str]:
        """Field → the label before it in a response, e.g. `{"description": "Definition:"}`."""
        lines = [line for line in self.response.split("\n") if _FIELD.search(line)]
        return {_FIELD.findall(line)[0]: line.split("{")[0].strip() for line in lines}

    def save(self, folder: Path) -> None:
        (folder / PROMPT_FILE).write_text(
            json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> "Prompt":
        return cls(**json.loads((folder / PROMPT_FILE).read_text(encoding="utf-8")))

    @staticmethod
    def _fill(text: str, values: dict[str, str]) -> str:
        return _FIELD.sub(lambda match: values.get(match[1]) or "", text)
