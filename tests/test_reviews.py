"""From reviews to a chatbot's rows: what is understood, what is said of it, and that nothing is said beyond it."""

import csv
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import DictConfig
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from core.configuration import load_config
from core.errors import UserError
from data_prep.clean_text import clean
from data_prep.prepare import prepare
from tasks.reviews.knowledge import LANGUAGES, QUOTE, RATING, Knowledge, ReviewReader
from tasks.reviews.rows import WORDS

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tasks" / "reviews" / "squid_game_reviews.csv"
REAL = ROOT.parent / "shared" / "data" / "squid_game_reviews.csv"
QUESTIONS = yaml.safe_load((ROOT / "tasks" / "reviews" / "review_questions.yaml").read_text(encoding="utf-8"))
SPLITS = ("training", "validation", "test")


@pytest.fixture(scope="module")
def reader() -> ReviewReader:
    return ReviewReader("Squid Game", {"games": ["games", "marbles"]})


def config_for(folder: Path, source: Path, *options: str) -> DictConfig:
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Great acting but an awful ending.", {"acting": 1, "ending": -1}),
        ("The story, the acting and the music are wonderful.", {"plot": 1, "acting": 1, "music": 1}),
        ("Shallow characters, great music and the worst ending ever.", {"characters": -1, "music": 1, "ending": -1}),
        ("While the plot is clever, the dialogue is terrible.", {"plot": 1, "dialogue": -1}),
        ("The acting is not good.", {"acting": -1}),
        ("I don't think the ending is good.", {"ending": -1}),
        ("The pacing is anything but boring; the script is a mess.", {"writing": -1}),
        ("Too much violence.", {"violence": -1}),
        ("There is a lot of blood and violence.", {}),  # what happens is no judgement
        ("The voice acting is dreadful.", {"dubbing": -1}),
        ("Squid Game is brilliant.", {}),  # the title is no aspect
        ("The games of Squid Game are brilliant.", {"games": 1}),
        ("A gripping story. Overrated, and far too long.", {"suspense": 1, "plot": 1, "hype": -1, "pacing": -1}),
        ("La actuación es excelente y el final es perfecto.", {}),  # not English: no guess
    ],
)
def test_aspects_are_praised_and_criticised_clause_by_clause(
    reader: ReviewReader, text: str, said: dict[str, int]
) -> None:
    opinions = reader.read(7, text).opinions
    found = {opinion.aspect: 1 if opinion.score > 0 else -1 for opinion in opinions}
    assert {name: found.get(name) for name in said} == said
    assert said or not found
    assert all(opinion.review == 7 and opinion.quote in text for opinion in opinions)


def test_a_sentence_that_takes_both_sides_is_not_quoted_for_one(reader: ReviewReader) -> None:
    text = "The acting of the whole cast is wonderful but the ending of the story is really awful."
    quotes = {opinion.aspect: opinion.quote for opinion in reader.read(1, text).opinions}
    assert quotes["acting"] == "The acting of the whole cast is wonderful"
    assert quotes["ending"] == "the ending of the story is really awful."


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
def test_the_language_of_short_reviews(reader: ReviewReader, text: str, language: str) -> None:
    review = reader.read(1, text)
    assert review.language == language
    assert language == "en" or review.tone is None
    assert language in LANGUAGES or language == "unknown"


def agreement(reader: ReviewReader, rows: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """Of reviews with their ratings, the share of clear ones whose words are on the same side, and the correlation."""
    judged = [(reader.read(1, text).tone, rating) for text, rating in rows]
    tones, ratings = np.array([(tone, rating) for tone, rating in judged if tone is not None]).T
    clear = (ratings <= RATING[0]) | (ratings >= RATING[1])
    same = (tones > 0)[clear] == (ratings >= RATING[1])[clear]
    return float(same.mean()), float(np.corrcoef(tones, ratings)[0, 1])


def test_words_agree_with_ratings(reader: ReviewReader) -> None:
    """VADER with the words of film reviews, against the stars of the shipped reviews."""
    with SAMPLE.open(encoding="utf-8", newline="") as file:
        rows = [(clean(row["review"])[0], int(row["rating"]) / 10) for row in csv.DictReader(file)]
    as_it_comes = ReviewReader("Squid Game", {})
    as_it_comes._vader, as_it_comes._phrases = SentimentIntensityAnalyzer(), []
    same_side, correlation = zip(*(agreement(each, rows) for each in (reader, as_it_comes)), strict=True)
    assert same_side[0] > 0.8 and correlation[0] > 0.6, (same_side, correlation)
    assert same_side[0] > same_side[1] + 0.08 and correlation[0] > correlation[1] + 0.2, (same_side, correlation)


def test_reviews_are_counted_once_per_aspect_and_by_side(reader: ReviewReader) -> None:
    texts = [
        "The acting is superb. I mean it, wonderful acting.",
        "The acting is awful.",
        "Acting.",
        "The acting of the lead is great but the acting of the rest is terrible.",
        "Not a word on that, but lovely.",
    ]
    knowledge = Knowledge.of([reader.read(row, text) for row, text in enumerate(texts, 10)], "Squid Game", 5)
    (acting,) = (aspect for aspect in knowledge.aspects if aspect.name == "acting")
    assert (acting.favourable, acting.unfavourable, acting.both) == ([10], [11], [13])
    assert acting.mentions == [10, 11, 12, 13] and acting.judged == [10, 11, 13]


def test_representative_sentences_are_near_all_and_unlike_each_other(reader: ReviewReader) -> None:
    texts = [f"The acting and the story are great, says viewer {name}." for name in ("Ann", "Ben", "Cem", "Dee", "Eve")]
    texts += ["The story is great fun from start to finish.", "My neighbour's bicycle has an awful flat tyre again."]
    knowledge = Knowledge.of([reader.read(row, text) for row, text in enumerate(texts)], "Squid Game", 5)
    rows = [row for _, row in knowledge.representative]
    assert sorted(rows) == list(range(7))
    assert rows[0] < 6 and len({*rows[:3]} & {0, 1, 2, 3, 4}) == 1


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


def test_every_answer_rests_on_the_reviews_of_its_own_split(sample: Path) -> None:
    assert check_rows(sample, read_sources(SAMPLE)) > 200


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
                    r"of (\d+) reviews that judge, (\d+) \w+ positive, (\d+) mixed and (\d+)", row["output"]
                )
            ):
                total, *parts = map(int, said.groups())
                assert total == sum(parts) <= len(row["reviews"])
                checked += 1
    assert checked > 20


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


def test_what_reviews_do_not_mention_is_said_to_be_missing(sample: Path) -> None:
    sources = read_sources(SAMPLE)
    knowledge = read_json(sample / "knowledge.json")
    said, subjects = 0, QUESTIONS["subjects"]["learned"] | QUESTIONS["subjects"]["test"]
    for split, rows in read_all(sample).items():
        mine = "\n".join(sources[number] for row in rows for number in row["reviews"]).casefold()
        for row in rows:
            if row["kind"] == "not covered":
                said += 1
                subject = next((words for name, words in subjects.items() if name in row["output"]), None)
                assert subject is None or not re.search(rf"\b(?:{subject})\b", mine), (split, row["output"])
    assert said > 30
    assert knowledge["title"] == "Squid Game"


def test_the_manifest_tells_reviews_from_rows(sample: Path) -> None:
    manifest, splits = read_json(sample / "manifest.json"), read_all(sample)
    assert manifest["rows_in"] == manifest["rows_out"] + sum(manifest["dropped"].values()) + manifest["merged"]
    assert manifest["rows_out"] == sum(split["source_rows"] for split in manifest["splits"].values())
    assert {name: split["rows"] for name, split in manifest["splits"].items()} == {
        name: len(rows) for name, rows in splits.items()
    }


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


def test_another_film_needs_no_more_than_its_title(tmp_path: Path) -> None:
    rows = [(str(n % 5 + 1), text) for n, text in enumerate(FILM)]
    source = write_reviews(tmp_path / "a.csv", rows, ("stars", "comment"))
    config = config_for(tmp_path / "data", source, "split.validation=0.25", "split.test=0.25")
    config.task.data.reviews = {"title": "The Paper Fox", "aspects": {"animation": ["animation", "animated"]}}
    folder = prepare(config, None)
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
    with pytest.raises(UserError, match=r"needs the film's title"):
        prepare(config_for(tmp_path / "data", source, *halves, "reviews=null"), None)


@pytest.mark.slow
def test_real_reviews(tmp_path: Path) -> None:
    if not REAL.exists():
        pytest.skip(f"needs the real file {REAL}")
    started = time.perf_counter()
    folder = prepare(config_for(tmp_path / "data", REAL), None)
    assert time.perf_counter() - started < 20
    check_rows(folder, read_sources(REAL))
    knowledge, sizes = (
        read_json(folder / "knowledge.json"),
        {split: len(rows) for split, rows in read_all(folder).items()},
    )
    assert knowledge["languages"]["English"] > 0.93 * knowledge["reviews"] > 800
    assert {"Spanish", "Portuguese", "Arabic"} <= {*knowledge["languages"]}
    assert 0.55 < knowledge["verdicts"]["positive"] / knowledge["reviews"] < 0.8
    aspects = {aspect["name"]: aspect for aspect in knowledge["aspects"]}
    assert list(aspects)[:3] == ["plot", "characters", "acting"]
    assert aspects["hype"]["unfavourable"] > aspects["hype"]["favourable"]
    assert aspects["suspense"]["favourable"] > 5 * aspects["suspense"]["unfavourable"]
    assert 400 < sizes["training"] < 1000 and min(sizes.values()) > 60


def test_words_agree_with_ratings_that_real_reviews_state(reader: ReviewReader) -> None:
    """Reviews that nothing was fitted to: `8/10` in their text, taken out before the words are judged."""
    if not REAL.exists():
        pytest.skip(f"needs the real file {REAL}")
    stated = re.compile(r"(\d+(?:\.\d)?) ?(?:/|out of) ?10\b")
    rows = [
        (stated.sub("", text), float(said[1]) / 10)
        for text in read_sources(REAL).values()
        if (said := stated.search(text))
    ]
    assert len(rows) >= 15 and agreement(reader, rows)[0] > 0.85
