"""`make new-task` for a table of dialogues: a task that is like `chat` in all but its source."""

import re

from data_prep.profile_table import Column, TableProfile, called
from data_prep.table_kind import ANSWERS, MORE, QUESTIONS, SYSTEM, TableKind, text_columns

HEADERS = ("messages", "conversations", "conversation", "dialogue", "dialog", "contents", "chosen")  # best first


def claim(profile: TableProfile, general: TableKind | None, file_name: str, title: str) -> TableKind | None:
    """The kind of a table with a column of dialogues, or with turns before a question; one with a title is about
    something else."""
    found = called(HEADERS, [column for column in profile.columns if column.holds == "dialogues" or _is_script(column)])
    if title:
        return None
    if found:
        columns, about = {"messages": found[0]}, "Dialogues: the assistant's turns are learned."
    elif earlier := [column for column in called(("history",), profile.columns) if column.values]:
        texts = text_columns(profile)
        asked, answers = called(QUESTIONS, texts), called(ANSWERS, texts)
        more = [column for column in called(MORE, texts) if column not in asked[:1]]
        if not asked or not answers:
            return None
        columns = {"messages": asked[0], "answer": answers[0], "history": earlier[0]}
        columns |= {"about": more[0]} if more else {}
        about = f"Questions and answers, with the turns before them in '{earlier[0].header}'."
    else:
        return None
    if system := called(SYSTEM, text_columns(profile)):
        columns["system"] = system[0]
    if rejected := called(("rejected",), profile.columns):
        about += f" '{rejected[0].header}' is not used, as nothing here learns by comparison."
    return TableKind(about, columns, key=["messages"], base="chat")


def _is_script(column: Column) -> bool:
    """Whether a column holds transcripts: `Human: …`, `Assistant: …`."""
    return all(re.match(r"\s*(Human|User): (?s:.*)\n\nAssistant:", cell) for cell in column.filled[:50])
