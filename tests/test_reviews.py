"""From reviews to a chatbot's rows: what is understood, what is said of it, and that nothing is said beyond it."""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from core.configuration import load_config
from core.errors import UserError
from core.schema import Config
from data_prep.clean_text import clean
from data_prep.prepare import prepare

pytest.importorskip("tasks.reviews.rows")
from tasks.reviews import labelled
from tasks.reviews.aspect_words import AspectWords, domain_of
from tasks.reviews.find_aspects import Subject
from tasks.reviews.knowledge import Knowledge, told
from tasks.reviews.languages import LANGUAGES, language_of
from tasks.reviews.opinions import Opinions, Say
from tasks.reviews.options import Options
from tasks.reviews.read_reviews import QUOTE, Opinion, RawReview, Review, ReviewReader
from tasks.reviews.review_answers import AnswerWriter
from tasks.reviews.rows import WORDS
from tasks.reviews.verdicts import verdict_of

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tasks" / "reviews" / "squid_game_reviews.csv"
REAL = ROOT.parent / "shared" / "data" / "squid_game_reviews.csv"
QUESTIONS = yaml.safe_load((ROOT / "tasks" / "reviews" / "review_questions.yaml").read_text(encoding="utf-8"))
SPLITS = ("training", "validation", "test")


WORDS_OF_A_FILM = AspectWords("Squid Game", {"games": ["games", "marbles"], **domain_of("series").aspects})


@pytest.fixture(scope="module")
def reader() -> ReviewReader:
    return ReviewReader(WORDS_OF_A_FILM, Opinions().read)


def config_for(folder: Path, source: Path, *options: str) -> Config:
    words = ["task=squid_game", "trainer=cpu", f"task.data.source={source}", f"data_dir={folder}"]
    return load_config([*words, *(f"task.data.{option}" for option in options)])


def write_reviews(path: Path, rows: Iterable[Sequence[str]], header: Sequence[str] = ("review",)) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_sources(path: Path) -> dict[int, str]:
    """Row number → cleaned review of a CSV whose first column holds them."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        _, *rows = [row for row in csv.reader(file, skipinitialspace=True) if any(cell.strip() for cell in row)]
    return {number: clean(row[0])[0] for number, row in enumerate(rows, 1)}


def read_all(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in SPLITS
    }


def read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def quotes_in(text: str) -> list[str]:
    return re.findall("“([^”]*)”", text)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of the shipped reviews."""
    return prepare(config_for(tmp_path_factory.mktemp("sample") / "data", SAMPLE), None)


# --- what is understood -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Superb acting, but the ending is awful.", {"acting": 1, "ending": -1}),
        ("The story, the acting and the music are wonderful.", {"plot": 1, "acting": 1, "music": 1}),
        ("The acting is superb.", {"acting": 1}),
        ("The acting is terrible.", {"acting": -1}),
        ("Not a single line of dialogue is wasted.", {"dialogue": None}),  # praise, or nothing certain; never criticism
        ("The villain kills three people before the title appears.", {"characters": None}),
        ("There is a lot of blood and violence.", {"violence": None}),  # what happens is no judgement
        ("Squid Game is brilliant.", {}),  # the title is no aspect
        ("The games of Squid Game are brilliant.", {"games": 1}),
        ("La actuación es excelente y el final es perfecto.", {}),  # not English: no guess
    ],
)
def test_aspects_are_praised_and_criticised_clause_by_clause(
    reader: ReviewReader, text: str, said: dict[str, int | None]
) -> None:
    (review,) = reader.read([RawReview(7, text)])
    found = {opinion.aspect: 1 if opinion.is_praise else -1 for opinion in review.opinions}
    assert found.keys() <= said.keys()
    assert all(found.get(name) == side if side else found.get(name) != -1 for name, side in said.items())
    assert all(opinion.review == 7 and opinion.quote in text for opinion in review.opinions)


@pytest.mark.slow
def test_nine_of_ten_claims_hold_on_the_labelled_sentences_of_this_project() -> None:
    """The half that nothing was fitted to or chosen by; docs/reviews.md has the figures with their intervals, and more
    sentences: one side's claims alone are too few here to tell 0.87 from 0.9."""
    sentences = labelled.sentences(labelled.HELD_OUT, None)
    said = Opinions().read([one.text for one in sentences])
    praise, criticism = (
        [one.label in (label, "both") for one, say in zip(sentences, said, strict=True) if say.side == side]
        for label, side in (("praise", 1), ("criticism", -1))
    )
    assert all(len(holds) > 15 and sum(holds) / len(holds) > 0.8 for holds in (praise, criticism))
    assert sum(praise + criticism) / len(praise + criticism) >= 0.88


def test_the_halves_of_the_labelled_texts_share_nothing() -> None:
    for of in (labelled.sentences, labelled.reviews):
        one, other = (of(half, None) for half in (labelled.HELD_OUT, labelled.DEVELOPMENT))
        assert not {text.text for text in one} & {text.text for text in (*other, *of(labelled.FITTING, None))}
        assert min(len(one), len(other)) > 60 and {text.label for text in one} == {text.label for text in other}
    sentences = [*labelled.sentences(labelled.HELD_OUT, None), *labelled.sentences(labelled.DEVELOPMENT, None)]
    assert len(sentences) >= 400 and len({one.domain for one in sentences}) >= 8
    assert all(word in one.text.casefold() for one in sentences for word, _ in one.targets)


@pytest.mark.slow
def test_verdicts_hold_on_the_labelled_reviews_of_this_project(reader: ReviewReader) -> None:
    """The half that nothing was fitted to or chosen by; docs/reviews.md has more reviews, and 0.85 as the least."""
    reviews = labelled.reviews(labelled.HELD_OUT, None)
    read = reader.read([RawReview(0, one.text) for one in reviews])
    holds = [review.said == one.label for review, one in zip(read, reviews, strict=True) if review.said]
    assert len(holds) >= 15 and sum(holds) / len(holds) >= 0.8


PRAISE, CRITICISM, FACT = Say(0.97, 0.01), Say(0.01, 0.97), Say(0.05, 0.05)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ([PRAISE, FACT, PRAISE], "positive"),
        ([CRITICISM, CRITICISM], "negative"),
        ([FACT, FACT], None),
        ([Say(0.6, 0.2), Say(0.4, 0.3)], None),
        ([], None),
    ],
)
def test_a_verdict_is_given_where_what_the_parts_say_is_clear(said: list[Say], verdict: str | None) -> None:
    assert verdict_of(said) == verdict
    assert verdict_of([PRAISE, CRITICISM]) not in ("positive", "negative")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Amazing", "en"),
        ("loved it!!!", "en"),
        ("boring af", "en"),
        ("Craptacular, awful.", "en"),
        ("The first season is really amazing.", "en"),
        ("Una serie muy entretenida, con un final excelente.", "es"),
        ("Uma das melhores séries que já vi.", "pt"),
        ("C'est une série magnifique et violente.", "fr"),
        ("Einfach großartig, spannend bis zur letzten Minute!", "de"),
        ("배우들의 연기가 훌륭해요", "ko"),
        ("Сериал очень классный, жду второй сезон", "ru"),
        ("👍👍🔥", "unknown"),
        ("10/10", "unknown"),
    ],
)
def test_the_language_of_short_reviews(text: str, language: str) -> None:
    assert language_of(text) == language
    assert language in LANGUAGES or language == "unknown"


def opinion(review: int, praise: bool) -> Opinion:
    return Opinion(review, "acting", praise, 0.9, "")


def test_reviews_are_counted_once_per_aspect_and_by_side() -> None:
    acting = frozenset({"acting"})
    reviews = [
        Review(10, "", "en", mentions=acting, opinions=(opinion(10, True), opinion(10, True))),
        Review(11, "", "en", mentions=acting, opinions=(opinion(11, False),)),
        Review(12, "", "en", mentions=acting),
        Review(13, "", "en", mentions=acting, opinions=(opinion(13, True), opinion(13, False))),
        Review(14, "", "en"),
    ]
    (found,) = Knowledge.of(reviews, "Squid Game", 5).aspects
    assert (found.favourable, found.unfavourable, found.both) == ([10], [11], [13])
    assert found.mentions == [10, 11, 12, 13] and found.judged == [10, 11, 13]


def test_representative_sentences_are_near_all_and_unlike_each_other() -> None:
    texts = [f"The acting and the story are great, says viewer {name}." for name in ("Ann", "Ben", "Cem", "Dee", "Eve")]
    texts += ["The story is great fun from start to finish.", "My neighbour's bicycle has an awful flat tyre again."]
    reviews = [Review(row, text, "en", judgements=(text,)) for row, text in enumerate(texts)]
    rows = [row for _, row in Knowledge.of(reviews, "Squid Game", 5).representative]
    assert sorted(rows) == list(range(7))
    assert rows[0] < 6 and len({*rows[:3]} & {0, 1, 2, 3, 4}) == 1


RESTAURANT = [
    "The ramen is the best in town, this restaurant is a gem.",
    "We had the ramen and the noodles were perfect.",
    "Our waiter forgot us twice, but the ramen was worth it.",
    "The noodles were overcooked.",
    "Their ramen has a deep broth; the noodles are fresh.",
    "I came to this restaurant with my mother on a Sunday.",
]


def test_aspects_come_from_the_reviews_in_their_own_words() -> None:
    subject = Subject.of(RESTAURANT, Options(title="Ramen Yuki"))
    assert (subject.kind, subject.domain.people) == ("restaurant", "guests")
    assert subject.words.find("The waiter brought my noodles") == ["service", "noodles"]
    assert "plot" not in subject.words.names, "what a film has, a restaurant has not"
    assert subject.new == ["noodles"], "Ramen is in the title, which names no aspect"
    left_out = Subject.of(RESTAURANT, Options(title="Yuki", aspects={"noodles": [], "soup": ["ramen"]}))
    assert left_out.new == [] and left_out.words.find("ramen") == ["soup"]


def test_what_most_reviews_do_not_name_and_what_is_not_read_is_said() -> None:
    texts = [
        "I liked it a lot.",
        "Not for me, sorry.",
        "The zither was nice.",
        "My zither, the best",
        "Es ist sehr schön hier.",
    ]
    subject = Subject.of(texts, Options(title="X", kind="concert"))
    reviews = [RawReview(n, text) for n, text in enumerate(texts)]
    lines = told(ReviewReader(subject.words, None).read(reviews), subject)
    assert lines[0] == "Left out, as only English is read (ratings count): German 1 of 5"
    assert lines[1].startswith("Only 0 of 4 reviews name an aspect of the concert")
    assert lines[2] == "Frequent words that no aspect covers: zither 2"


def test_answers_speak_of_what_was_reviewed_in_good_grammar() -> None:
    quotes = [Opinion(n, "portions", n < 3, 0.9, f"the portions are number {n} here") for n in range(6)]
    reviews = [
        Review(
            n, "", "en", "positive" if n < 3 else "negative", mentions=frozenset({"portions"}), opinions=(quotes[n],)
        )
        for n in range(6)
    ]
    knowledge = Knowledge.of(reviews, "Yuki", 5)
    said = ""
    for seed in range(30):
        answers = AnswerWriter(knowledge, "restaurant", "guests", Random(seed))
        made = [answers.explanation(), answers.audience(), answers.division(), answers.comparison(), answers.overall()]
        said += "".join(answer.text for answer in made)
    assert "guests" in said and "restaurant" in said
    assert not re.search(r"viewer|film|\bis the portions|the portions is\b", said)


# --- what is said -----------------------------------------------------------------------------------------------


def check_rows(folder: Path, sources: dict[int, str]) -> int:
    """What holds for the rows of any reviews: nothing invented, nothing shared between splits, nothing twice.

    Returns how many quotes were found in their reviews.
    """
    splits = read_all(folder)
    found = 0
    seen: dict[str, set[int]] = {split: set() for split in SPLITS}
    for split, rows in splits.items():
        assert len({(row["input"], row["output"]) for row in rows}) == len({row["output"] for row in rows}) == len(rows)
        for row in rows:
            seen[split].update(row["reviews"])
            assert set(row["quoted"]) <= set(row["reviews"]), "a quoted review stands behind the answer"
            texts, quotes = [sources[number] for number in row["quoted"]], quotes_in(row["output"])
            assert len(quotes) == len(texts)
            for quote in quotes:
                assert any(quote in text for text in texts), f"{quote!r} is in none of {row['quoted']}"
                found += 1
                assert len(quote) < 150 or len(re.findall(r"\w+", quote)) < 2 * QUOTE.stop
            assert len(row["output"].split()) <= WORDS
            assert row["output"][0].isupper() or not row["output"][0].isalpha()
            assert not re.search(r"[{}]|  |\.\.(?!\.)|:\s*$", re.sub("“[^”]*”", "“”", row["output"])), row["output"]
    assert not seen["training"] & seen["test"] and not seen["training"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    return found


@pytest.mark.slow
def test_every_answer_rests_on_the_reviews_of_its_own_split(sample: Path) -> None:
    assert check_rows(sample, read_sources(SAMPLE)) > 200


@pytest.mark.slow
def test_counts_in_answers_are_the_reviews_behind_them(sample: Path) -> None:
    checked = 0
    for rows in read_all(sample).values():
        for row in rows:
            if row["kind"] == "aspect" and (
                said := re.search(r"of (\d+) reviews with an opinion, (\d+) \w+ favourable and (\d+)", row["output"])
            ):
                total, good, bad = map(int, said.groups())
                assert total == len(row["reviews"]) and good + bad <= total
                checked += 1
            if row["kind"] in ("overall", "summary") and (
                said := re.search(
                    r"of (\d+) reviews that judge clearly, (\d+) \w+ positive, (\d+) mixed and (\d+)", row["output"]
                )
            ):
                total, *parts = map(int, said.groups())
                assert total == sum(parts) <= len(row["reviews"])
                checked += 1
    assert checked > 20


@pytest.mark.slow
def test_questions_are_of_every_kind_and_the_test_s_wordings_its_own(sample: Path) -> None:
    splits = read_all(sample)
    for split in ("training", "test"):
        assert {row["kind"] for row in splits[split]} >= {*QUESTIONS["of_the_whole"], *QUESTIONS["of_an_aspect"]} - {
            "phrases"
        }
        assert sum(row["kind"] == "not covered" for row in splits[split]) > 5
    asked = {split: {row["input"] for row in rows} for split, rows in splits.items()}
    assert not asked["test"] & (asked["training"] | asked["validation"])
    # The first two tasks of the review chatbot, word for word.
    assert splits["test"][0]["input"] == "Positive and negative aspects comparison"
    assert "Summarize and explain Squid Game" in asked["test"]
    assert len(splits["training"]) >= 200


@pytest.mark.slow
def test_what_reviews_do_not_mention_is_said_to_be_missing(sample: Path) -> None:
    sources = read_sources(SAMPLE)
    knowledge = read_json(sample / "knowledge.json")
    said, subjects = 0, QUESTIONS["subjects"]["film"]["learned"] | QUESTIONS["subjects"]["film"]["test"]
    for split, rows in read_all(sample).items():
        mine = "\n".join(sources[number] for row in rows for number in row["reviews"]).casefold()
        for row in rows:
            if row["kind"] == "not covered":
                said += 1
                subject = next((words for name, words in subjects.items() if name in row["output"]), None)
                assert subject is None or not re.search(rf"\b(?:{subject})\b", mine), (split, row["output"])
    assert said > 30
    assert knowledge["title"] == "Squid Game"


@pytest.mark.slow
def test_the_manifest_tells_reviews_from_rows(sample: Path) -> None:
    manifest, splits = read_json(sample / "manifest.json"), read_all(sample)
    assert manifest["rows_in"] == manifest["rows_out"] + sum(manifest["dropped"].values()) + manifest["merged"]
    assert manifest["rows_out"] == sum(split["source_rows"] for split in manifest["splits"].values())
    assert {name: split["rows"] for name, split in manifest["splits"].items()} == {
        name: len(rows) for name, rows in splits.items()
    }


@pytest.mark.slow
def test_knowledge_and_picture_lie_beside_the_rows(sample: Path) -> None:
    knowledge, sources = read_json(sample / "knowledge.json"), read_sources(SAMPLE)
    manifest, picture = read_json(sample / "manifest.json"), (sample / "aspects.svg").read_text(encoding="utf-8")
    assert knowledge["reviews"] == sum(knowledge["languages"].values()) == manifest["rows_out"]
    assert knowledge["rating"]["of"] == 10 and 1 < knowledge["rating"]["mean"] < 10
    for aspect in knowledge["aspects"]:
        assert aspect["favourable"] + aspect["unfavourable"] + aspect["both"] <= aspect["mentions"]
        for quote in aspect["praise"] + aspect["criticism"]:
            assert quote["quote"] in sources[quote["review"]] and quote["split"] in SPLITS
    assert {"acting", "ending", "games", "VIPs"} <= {aspect["name"] for aspect in knowledge["aspects"]}
    for aspect in knowledge["aspects"][:5]:
        assert f">{aspect['name']}<" in picture


@pytest.mark.slow
def test_the_same_reviews_give_the_same_bytes(sample: Path, tmp_path: Path) -> None:
    again = prepare(config_for(tmp_path / "data", SAMPLE), None)
    names = sorted(path.name for path in again.iterdir())
    assert "knowledge.json" in names and "aspects.svg" in names
    assert {name: (again / name).read_bytes() for name in names} == {
        name: (sample / name).read_bytes() for name in names
    }


# --- other reviews ----------------------------------------------------------------------------------------------

FILM = [
    "A charming film with lovely songs and a dull villain.",
    "The animation is gorgeous, the jokes are tired.",
    "My children adored it and I fell asleep.",
    "Wonderful music! The plot is thin but who cares.",
    "Too long for small children, and the ending is rushed.",
    "Great voice cast, great fun.",
    "The humour is fresh and the songs are catchy.",
    "Weak script. Beautiful pictures, though.",
    "I loved the fox, the best character of them all.",
    "Boring and predictable.",
    "A touching story about friendship, beautifully animated.",
    "The songs are forgettable, the villain is scary.",
    "Perfect for a rainy afternoon with the family.",
    "I expected more from this director.",
    "The finale made me cry happy tears.",
    "A masterpiece of animation, with a clever script.",
]


@pytest.mark.slow
def test_another_film_needs_no_more_than_its_title(tmp_path: Path) -> None:
    rows = [(str(n % 5 + 1), text) for n, text in enumerate(FILM)]
    source = write_reviews(tmp_path / "a.csv", rows, ("stars", "comment"))
    config = config_for(tmp_path / "data", source, "split.validation=0.25", "split.test=0.25")
    about = Options(title="The Paper Fox", aspects={"animation": ["animation", "animated"]})
    data = config.task.data.model_copy(update={"reviews": about})
    task = config.task.model_copy(update={"data": data})
    folder = prepare(config.model_copy(update={"task": task}), None)
    check_rows(folder, {number: clean(text)[0] for number, text in enumerate(FILM, 1)})
    rows = [row for split in read_all(folder).values() for row in split]
    said = "\n".join(row["input"] + row["output"] for row in rows)
    assert "The Paper Fox" in said and "the animation" in said and "the film" in said
    assert not re.search(r"squid|series|VIPs", said, re.IGNORECASE)
    assert all(len(split) > 10 for split in read_all(folder).values())
    assert any(row["output"].startswith(("Only one review", "There is one judgement", "One review")) for row in rows)


@pytest.mark.parametrize(
    ("cells", "means", "best"),
    [
        (["4", "5", "1.5"], [0.8, 1.0, 0.3], 5),
        (["4", "9", ""], [0.4, 0.9, None], 10),
        (["80", "95"], [0.8, 0.95], 100),
        (["7/10", "4 out of 5", "60%", "★★★½☆", "4 stars"], [0.7, 0.8, 0.6, 0.7, 0.8], 5),
        (["3,5", "no idea"], [0.7, None], 5),
    ],
)
def test_ratings_in_any_form(cells: list[str], means: list[float | None], best: int) -> None:
    from data_prep.task import Task
    from tasks.reviews.rows import _read_ratings

    rows = [{"row": number, "rating": cell} for number, cell in enumerate(cells)]
    ratings, scale = _read_ratings(rows, Task.of(load_config(["task=squid_game", "trainer=cpu"])))
    assert [ratings.get(number) for number in range(len(cells))] == means and scale == best


SENTENCE = "I liked the acting of this one a lot, number"
SPANISH = [
    f"{start} {middle} {end}."
    for start in ("Me gustó", "No me convence", "Qué maravilla", "Es un desastre", "Recomiendo")
    for middle in ("la historia de los jugadores", "este mundo tan cruel", "el trabajo del director", "cada capítulo")
    for end in ("aunque dura demasiado", "porque los actores son buenos", "y la música también")
]
BAD: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "has no row below its header"),
    "one review": ([SENTENCE], "too few rows: 1 of"),
    "the same again and again": ([SENTENCE] * 5_000, "too few rows: 1 of"),
    "only emoji": ([f"{'🔥' * (n // 7 + 1)}{'😭' * (n % 7)}" for n in range(48)], "do in all. Languages: unknown"),
    "numbers": ([str(n) for n in range(100)], "0 of 100 do in all. Languages: unknown 100"),
    "another language": (SPANISH, "do in all. Languages: Spanish"),
}


@pytest.mark.parametrize("name", BAD)
def test_reviews_that_are_of_no_use_are_an_error_in_words(tmp_path: Path, name: str) -> None:
    texts, message = BAD[name]
    with pytest.raises(UserError) as error:
        prepare(config_for(tmp_path / "data", write_reviews(tmp_path / "a.csv", [[text] for text in texts])), None)
    assert message in str(error.value) and str(tmp_path / "a.csv") in str(error.value)
    assert not (tmp_path / "data").exists() and not (tmp_path / ".data.partial").exists()


def test_a_task_without_a_title_and_ratings_that_are_none_are_refused(tmp_path: Path) -> None:
    source = write_reviews(tmp_path / "a.csv", [[text, "2021"] for text in FILM], ("review", "rating"))
    halves = ("split.validation=0.25", "split.test=0.25")
    with pytest.raises(UserError, match=r"ratings are out of 5, 10 or 100"):
        prepare(config_for(tmp_path / "data", source, *halves), None)
    with pytest.raises(UserError, match=r"needs to know of what"):
        prepare(config_for(tmp_path / "data", source, *halves, "reviews=null"), None)


@pytest.mark.slow
def test_real_reviews(tmp_path: Path) -> None:
    if not REAL.exists():
        pytest.skip(f"needs the real file {REAL}")
    folder = prepare(config_for(tmp_path / "data", REAL), None)
    check_rows(folder, read_sources(REAL))
    knowledge, sizes = (
        read_json(folder / "knowledge.json"),
        {split: len(rows) for split, rows in read_all(folder).items()},
    )
    assert knowledge["languages"]["English"] > 0.93 * knowledge["reviews"] > 800
    assert {"Spanish", "Portuguese", "Arabic"} <= {*knowledge["languages"]}
    assert 0.35 < knowledge["verdicts"]["positive"] / knowledge["reviews"] < 0.8  # of many nothing is claimed
    aspects = {aspect["name"]: aspect for aspect in knowledge["aspects"]}
    assert list(aspects)[:3] == ["plot", "characters", "acting"]
    assert aspects["hype"]["unfavourable"] > aspects["hype"]["favourable"]
    assert aspects["suspense"]["favourable"] > 5 * aspects["suspense"]["unfavourable"]
    assert 400 < sizes["training"] < 1000 and min(sizes.values()) > 60
