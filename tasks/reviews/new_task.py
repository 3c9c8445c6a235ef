"""`make new-task` for a table of reviews: a chatbot that answers from what the reviews say."""

from pathlib import Path

from core.errors import UserError
from data_prep.profile_table import Column, TableProfile, called
from data_prep.read_table import plain_header
from data_prep.table_kind import RATINGS, TableKind, text_columns

# Headers, best first.
REVIEWS = ("review", "reviews", "comment", "comments", "feedback", "opinion", "text", "content", "body")
HEADLINES = ("title", "headline", "summary")
CERTAIN = {"review", "reviews", "comment", "comments", "feedback", "opinion"}
FORMS = ("survey", "form", "responses", "export", "results", "corpus", "texts", "file", "table", "sheet1")
# Words of a file's name that are not the title of what its reviews are of.
NOT_A_TITLE = {*REVIEWS, *RATINGS, "ratings", "imdb", "data", "dataset", "all", "clean", "cleaned", "raw", *FORMS}


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
    # Imported here, as most tables hold no reviews.
    from data_prep.clean_text import clean
    from tasks.reviews.find_aspects import Subject
    from tasks.reviews.knowledge import told
    from tasks.reviews.options import Options
    from tasks.reviews.read_reviews import RawReview, ReviewReader

    name = title or guess
    texts_of_reviews = [clean(cell)[0] for cell in columns["review"].filled]
    reviews = [RawReview(row, text) for row, text in enumerate(texts_of_reviews)]
    subject = Subject.of(texts_of_reviews, Options(title=name, kind="", aspects={}))
    read = ReviewReader(subject.words, None).read(reviews)
    about += "\n" + "\n".join(told(read, subject))
    return TableKind(
        about.strip(),
        columns,
        key=["review"],
        required=["review"],
        template="reviews/new_task.yaml.j2",
        values={"title": name, "max_chars": 10_000, "subject": subject},
    )


def _has_reviews(profile: TableProfile, texts: list[Column]) -> bool:
    longest = max(texts, key=lambda column: column.mean_length)
    if CERTAIN & set(longest.words):
        return True
    # A column of text alone is a corpus, whatever the file is called.
    return bool(called(REVIEWS, texts)) and bool(called(RATINGS, profile.columns))
