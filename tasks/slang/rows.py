"""What only slang rows need to read well in a prompt: whole sentences, and no example asked for that is not given."""

from collections.abc import Mapping

from core.prompt import Prompt

# The prompt's own condition asks for an example too; a model that is then shown none would learn to leave it out.
NO_EXAMPLE = "You should suggest new slang and its definition."


def row_fields(fields: Mapping[str, str], prompt: Prompt) -> dict[str, str]:
    """The prompt's fields for a row.

    Args:
        fields: cleaned text by column (slang, description, example, context); "" where there is none.

    Returns:
        `fields` with the description as a sentence and the context ended, as the prompt's condition follows it
        directly; and `condition` where the row has no example.
    """
    description = fields["description"]
    written = {
        **fields,
        "description": _ended(description[:1].upper() + description[1:]),
        "context": _ended(fields["context"]),
    }
    return written if fields["example"] else {**written, "condition": NO_EXAMPLE}


def _ended(text: str) -> str:
    """With a full stop, unless it has its end or is empty; a closing quote or bracket may follow the end."""
    if not text or text.rstrip("\"')]").endswith((".", "!", "?", "…")):
        return text
    return text.rstrip(",;:- ") + "."
