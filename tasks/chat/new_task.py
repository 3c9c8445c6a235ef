"""`make new-task` for a table of dialogues: a task that is like `chat` in all but its source."""

from data_prep.profile_table import Column, TableProfile
from data_prep.table_kind import ANSWERS, QUESTIONS, TableKind, called, text_columns

HEADERS = ("messages", "conversations", "conversation", "contents", "dialogue", "dialog")  # best first


def claim(profile: TableProfile, general: TableKind | None, file_name: str, title: str) -> TableKind | None:
    """The kind of a table with a column of dialogues; one with a title is about something else."""
    columns = _dialogues(profile)
    if title or not columns:
        return None
    return TableKind("Dialogues: the assistant's turns are learned.", columns, key="messages", base="chat")


def _dialogues(profile: TableProfile) -> dict[str, Column]:
    """The column of dialogues, and where it ends with the user that of the answer; either may be plain text."""
    spoken = [column for column in profile.columns if column.holds == "dialogues"]
    answers = called(ANSWERS, [*spoken, *text_columns(profile)])[:1]
    whole = called(HEADERS, spoken) or [column for column in spoken if column not in answers]
    if whole:
        begins = "prompt" in whole[0].words or "input" in whole[0].words
        return {"messages": whole[0], **({"answer": answers[0]} if begins and answers else {})}
    asked = called(QUESTIONS, text_columns(profile)) if spoken else []
    return {"messages": asked[0], "answer": spoken[0]} if asked else {}
