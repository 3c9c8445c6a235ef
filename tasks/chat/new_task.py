"""`make new-task` for a table of dialogues: a task that is like `chat` in all but its source."""

import re

from data_prep.profile_table import Column, TableProfile, called
from data_prep.table_kind import ANSWERS, MORE, QUESTIONS, VALUES, TableKind, text_columns

HEADERS = ("messages", "conversations", "conversation", "dialogue", "dialog", "contents", "chosen")  # best first
BESIDE = ("history", "rejected")  # dialogues that are not the one to learn from
SYSTEM = ("system", "systeminstruction")  # a text, or Gemini's object with parts of text


def claim(profile: TableProfile, general: TableKind | None, file_name: str, title: str) -> TableKind | None:
    """The kind of a table with a column of dialogues, or with turns before a question; one with a title is about
    something else."""
    if title:
        return None
    if columns := _dialogues(profile):
        about = "Dialogues: the assistant's turns are learned."
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
    told = [column for column in profile.columns if column.filled and column.holds not in VALUES]
    if system := called(SYSTEM, told):
        columns["system"] = system[0]
    if rejected := called(("rejected",), profile.columns):
        about += f" '{rejected[0].header}' is not used, as nothing here learns by comparison."
    return TableKind(about, columns, key=["messages"], base="chat")


def _dialogues(profile: TableProfile) -> dict[str, Column]:
    """The column of dialogues, and where it ends with the user that of the answer; either may be plain text."""
    spoken = [column for column in profile.columns if column.holds == "dialogues" or _is_script(column)]
    spoken = [column for column in spoken if not called(BESIDE + SYSTEM, [column])]
    answers = called(ANSWERS, [*spoken, *text_columns(profile)])[:1]
    if whole := called(HEADERS, spoken) or [column for column in spoken if column not in answers]:
        begins = "prompt" in whole[0].words or "input" in whole[0].words
        return {"messages": whole[0], **({"answer": answers[0]} if begins and answers else {})}
    asked = called(QUESTIONS, text_columns(profile)) if spoken else []
    return {"messages": asked[0], "answer": spoken[0]} if asked else {}


def _is_script(column: Column) -> bool:
    """Whether a column holds transcripts: `Human: …`, `Assistant: …`."""
    starts = [re.match(r"\s*(Human|User): (?s:.*)\n\nAssistant:", cell) for cell in column.filled[:50]]
    return bool(starts) and all(starts)
