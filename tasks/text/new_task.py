"""`make new-task` for a column of text beside which nothing is asked: training continues on the text as it is."""

from core.configuration import names
from data_prep.profile_table import TableProfile
from data_prep.table_kind import TableKind


def claim(profile: TableProfile, general: TableKind | None, file_name: str, title: str) -> TableKind | None:
    """The kind of a table with one column of text, which has no question and no label."""
    if title or general is None or general.given or "text" not in names("task"):
        return None
    (text,) = general.columns.values()
    return TableKind(
        "A corpus: training continues on the text as it is, without questions.",
        {"text": text},
        key=["text"],
        base="text",
        why=f"'{text.header}' is the only column of text, and no column says what is asked",
    )
