"""Words slang rows for the prompt: complete sentences, and no request for an example that the row does not have."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from core.prompt import Prompt
from tasks.slang.novelty import write_known

# The prompt's default condition asks for an example, too; rows without one would teach the model to leave it out.
NO_EXAMPLE = "You should suggest new slang and its definition."


def row_fields(fields: Mapping[str, str], prompt: Prompt) -> dict[str, str]:
    """The prompt's fields for a row.

    Args:
        fields: cleaned text by column (slang, description, example, context); "" if empty.

    Returns:
        `fields` with the description as a sentence and the context ending in a full stop, as the prompt's condition
        follows it directly; plus `condition` if the row has no example.
    """
    description = fields["description"]
    written = {
        **fields,
        "description": _ended(description[:1].upper() + description[1:]),
        "context": _ended(fields["context"]),
    }
    return written if fields["example"] else {**written, "condition": NO_EXAMPLE}


def finish(folder: Path, splits: Sequence[str]) -> list[str]:
    """Write the list of known slang, by which new terms are told from others wherever the adapter goes."""
    return [write_known(folder, splits)]


def _ended(text: str) -> str:
    """`text` with a full stop, unless it is empty or ends already; a closing quote or bracket may follow the end."""
    if not text or text.rstrip("\"')]").endswith((".", "!", "?", "…")):
        return text
    return text.rstrip(",;:- ") + "."
