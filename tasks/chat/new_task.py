"""`make new-task` for a table of dialogues: a task that is like `chat` in all but its source."""

from data_prep.profile_table import TableProfile
from data_prep.table_kind import ANSWERS, TableKind, called

# Best first.
HEADERS = ("messages", "conversations", "conversation", "contents", "dialogue", "dialog", "turns", "chat", "prompt")


def claim(profile: TableProfile, general: TableKind | None, file_name: str, title: str) -> TableKind | None:
    """The kind of a table with a column of dialogues; one with a title is about something else."""
    found = called(HEADERS, [column for column in profile.columns if column.holds == "dialogues"])
    if title or not found:
        return None
    columns = {"messages": found[0]}
    if "prompt" in found[0].words:  # it ends with the user
        answers = [column for column in profile.columns if column.holds in ("dialogues", "text", "labels")]
        columns |= dict(zip(["answer"], called(ANSWERS, answers), strict=False))
    return TableKind("Dialogues: the assistant's turns are learned.", columns, key="messages", base="chat")
