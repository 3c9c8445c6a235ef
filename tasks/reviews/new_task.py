"""`make new-task` for a table of reviews: a chatbot that answers from what the reviews of a film say."""

from pathlib import Path

from core.errors import UserError
from data_prep.profile_table import Column, TableProfile, called
from data_prep.read_table import plain_header
from data_prep.table_kind import RATINGS, TableKind, text_columns

# Headers, best first.
REVIEWS = ("review", "reviews", "comment", "comments", "feedback", "opinion", "text", "content", "body")
HEADLINES = ("title", "headline", "summary")
CERTAIN = {"review", "reviews", "comment", "comments", "feedback", "opinion"}
# Words of a file's name that are not the title of what its reviews are of.
NOT_A_TITLE = {*REVIEWS, *RATINGS, "ratings", "imdb", "data", "dataset", "all", "clean", "cleaned", "raw"}


def claim(profile: TableProfile, general: TableKind | None, file_name: str, title: str) -> TableKind | None:
    """The kind of a table of reviews: one with a title, or whose headers speak of reviews and of nothing clearer.

    Raises:
        UserError: a title for a table without text, or no title where the file's name does not give one.
    """
    texts = text_columns(profile)
    if not title and not (general and general.is_guess and _has_reviews(profile, texts)):
        return None
    texts = called(REVIEWS, texts) or texts
    if not texts:
        raise UserError(f'TITLE="{title}" says that {file_name} holds reviews, but no column of it holds text')
    guess = " ".join(word for word in plain_header(Path(file_name).stem).split() if word not in NOT_A_TITLE).title()
    if not title and not guess:
        raise UserError(f'{file_name} holds reviews. Say what they are of: TITLE="…"')
    about = (
        f"Reviews of {title}."
        if title
        else f"Reviews of {guess}, going by the file's name; if that is wrong, give TITLE=..."
    )
    columns = {"review": max(texts, key=lambda column: column.mean_length)}
    others = [column for column in profile.columns if column is not columns["review"]]
    for name, wanted, holds in (("rating", RATINGS, ("numbers", "labels")), ("title", HEADLINES, ("text", "labels"))):
        if found := [column for column in called(wanted, others) if column.holds in holds]:
            columns[name] = found[0]
    return TableKind(
        about,
        columns,
        key=["review"],
        required=["review"],
        template="reviews/new_task.yaml.j2",
        values={"title": title or guess, "max_chars": 10_000},
    )


def _has_reviews(profile: TableProfile, texts: list[Column]) -> bool:
    longest = max(texts, key=lambda column: column.mean_length)
    if CERTAIN & set(longest.words):
        return True
    return bool(called(REVIEWS, texts)) and (len(texts) == 1 or bool(called(RATINGS, profile.columns)))
