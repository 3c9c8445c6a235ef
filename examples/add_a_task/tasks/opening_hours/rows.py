"""The rows of the task `opening_hours`: questions about a timetable, with answers computed from it.

A task whose prompt and answer are columns of its table needs no Python. Here one row of the table (place, opens,
closes, closed_on) becomes seven training rows, and their answers stand in no column.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_prep.task import Task

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def split_rows(rows: Iterable[Mapping[str, Any]], split: str, task: Task) -> Iterator[dict[str, Any]]:
    """All rows of one split, from the table's rows of that split.

    Args:
        rows: `{"row": number in the source, <column>: cleaned text}`.
        split: "training", "validation" or "test"; no place of the table is in two of them.
        task: its `prompt` words the rows.

    Returns:
        `{"input", "output"}` of each row to learn, and the `row` of the table it was made from.
    """
    for row in rows:
        for number, day in enumerate(DAYS):
            hour = 8 + (5 * row["row"] + 3 * number) % 13  # from 8:00 to 20:00, the same in every run
            question = f"Can I visit the {row['place']} on {day} at {hour}:00?"
            yield {
                "input": task.prompt.write_instruction(question=question),
                "output": task.prompt.write_response(answer=answer(row, day, hour)),
                "row": row["row"],
            }


def answer(place: Mapping[str, str], day: str, hour: int) -> str:
    """Whether a place is open on `day` at `hour` (0 to 23), and why not."""
    if day == place["closed_on"]:
        return f"No, the {place['place']} is closed on {day}s."
    if hour < int(place["opens"]):
        return f"No, the {place['place']} opens at {place['opens']}:00."
    if hour >= int(place["closes"]):
        return f"No, the {place['place']} closes at {place['closes']}:00."
    return f"Yes, the {place['place']} is open until {place['closes']}:00."
