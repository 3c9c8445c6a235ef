"""`make new-task` for a table of dialogues: a task that is like `chat` in all but its source."""

from data_prep.profile_table import TableProfile
from data_prep.table_kind import TableKind, called

HEADERS = ("messages", "conversations", "conversation", "dialogue", "dialog")  # best first


def claim(profile: TableProfile, general: TableKind | None, file_name: str, title: str) -> TableKind | None:
    """The kind of a table with a column of dialogues; one with a title is about something else."""
    found = called(HEADERS, [column for column in profile.columns if column.holds == "dialogues"])
    if title or not found:
        return None
    about = "Dialogues: the assistant's turns are learned."
    return TableKind(about, {"messages": found[0]}, key="messages", base="chat")
