"""Each metric on cases made by hand, and intervals on rows whose answer is known."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.artifacts import Evaluation, Generation, Manifest, Measurement
from core.configuration import load_config, plain
from core.errors import UserError
from core.tasks import having, part_of
from data_prep.prepare import prepare
from evaluation import metrics
from evaluation.embeddings import Embedder
from evaluation.intervals import RESAMPLES, estimates, held_out, resample, share_estimates, wilson
from evaluation.metrics import Evidence, measure
from tasks.slang import metrics as slang_metrics
from tasks.slang import novelty
from tasks.slang.novelty import Novelty

TRAINING = [
    {"slang": "bussin", "description": "So good that you stop talking.", "example": "This soup is bussin."},
    {"slang": "LOL", "description": "Laughing out loud.", "example": "LOL he fell into the pond."},
]
GOOD = "Slang: {}\nDefinition: {}\nExample: {}"


def evidence_of(folder: Path, base: Path, rows: list[dict[str, Any]] | None = None) -> Evidence:
    config = plain(load_config(["task=slang"]))
    rows = [{"input": "", "output": GOOD.format(*row.values()), **row} for row in TRAINING] if rows is None else rows
    for split in ("training", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dropped.jsonl").touch()
    novelty.write_known(folder, ["training", "validation", "test"])
    return Evidence(folder, base, config)


@pytest.fixture
def evidence(tmp_path: Path, tiny_base: Path) -> Evidence:
    return evidence_of(tmp_path, tiny_base)


def said(*texts: str, **more: Any) -> list[Generation]:
    """The fine-tuned model's answers, each to a question of its own."""
    same = {"side": "after", "seed": 0, "text_in": "", **more}
    return [Generation(id=str(n), question=f"row {n}", text=text, **same) for n, text in enumerate(texts)]


def changed(one: Generation, **values: Any) -> Generation:
    return one.model_copy(update=values)


# --- against the example's own answer -------------------------------------------------------------------------


def test_chrf_is_that_of_sacrebleu(evidence: Evidence) -> None:
    same, half, none = metrics.chrf(said("a cat sat", "a cat", "xyz", reference="a cat sat"), evidence)
    assert same == 100 and none == 0
    # Of "acatsat" against "acat": 4 of 4 letters and 4 of 7, 3/3 and 3/6, 2/2 and 2/5, 1/1 and 1/4; F2 of their means,
    # orders that the shorter text lacks counting for none.
    precision, recall = 1.0, np.mean([4 / 7, 3 / 6, 2 / 5, 1 / 4])
    assert half == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall), abs=0.01)


def test_rouge_l_is_the_longest_common_sequence_of_words_over_both_lengths(evidence: Evidence) -> None:
    # Lin (2004), section 3: "police killed the gunman" against "police kill the gunman" shares 3 of 4 words, in order.
    scores = metrics.rouge_l(
        said("Police kill the gunman!", "the gunman kill police", "", reference="police killed the gunman"), evidence
    )
    assert scores == [0.75, 0.5, 0.0]
    assert metrics.rouge_l(said("no reference"), evidence) == [None]


# --- form and variety -----------------------------------------------------------------------------------------


def test_well_formed_answers_have_every_part(evidence: Evidence) -> None:
    texts = GOOD.format("drip", "Style.", "Nice drip."), "Slang: drip\nDefinition: Style.\nExample:", "drip", ""
    assert metrics.well_formed(said(*texts), evidence) == [1, 0, 0, 0]


def test_a_response_without_labels_has_no_form(tmp_path: Path, tiny_base: Path) -> None:
    config = plain(load_config(["task=slang"]))
    config["task"]["prompt"]["response"] = "{description}"
    assert metrics.well_formed(said("x"), Evidence(tmp_path, tiny_base, config)) == [None]


def test_variety_is_measured_over_the_seeds_of_a_question(evidence: Evidence) -> None:
    seeds = [changed(one, question="question 1") for one in said("a b c", "a b d", "a b c")]
    # Pairs: ab bc, ab bd, ab bc: three different ones of six. Alike by ROUGE-L: 2/3, 1, 2/3.
    assert metrics.distinct_2([*seeds, *said("a b")], evidence) == [0.5, 0.5, 0.5, None]
    assert metrics.self_similarity(seeds, evidence)[0] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert metrics.distinct_2([changed(one, question="q") for one in said("", "-\n-")], evidence) == [0, 0]


def test_copied_words_are_the_longest_run_that_a_training_answer_has_too(evidence: Evidence) -> None:
    texts = "He said: this soup IS bussin, really", "soup this is good that you stop", "nothing of it here", ""
    assert metrics.copied_words(said(*texts), evidence) == [4, 4, 0, 0]


def test_overlaps_are_those_of_trying_every_start() -> None:
    random = np.random.default_rng(0)
    texts, known = (
        [" ".join(random.choice(list("abc"), size=n)) for n in random.integers(0, 12, size=20)] for _ in "xy"
    )

    def by_hand(text: str) -> int:
        parts = text.split()
        runs = [parts[i:j] for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
        return max(
            (len(run) for run in runs if any(f" {' '.join(run)} " in f" {other} " for other in known)), default=0
        )

    found = metrics.longest_overlaps(texts, known)
    assert found == [by_hand(text) for text in texts] and max(found) > 3


# --- slang ----------------------------------------------------------------------------------------------------


ASKED = "It rains on the first day of summer break, and you swim with your study plan. Example should be precise."


@pytest.mark.parametrize(
    ("why", "terms"),
    {
        "": ["fusionista", "umbrella day", "quizpad", "Scroll-aholic", "rainster", '"Glitch gran"', "vibe-ometer 3000"],
        "known slang": ["Bussin'", "bussing", "L.O.L.", "no  CAP", "left out"],
        "words of the question": [
            "It's not raining",
            "summer break",
            "Study plan",
            "studyplan",
            "Rainy swimmers",
            "precise",
            "SUMMERBREAK",
        ],
        "already a word": ["fusion", "the bard", "mute mute", "ramen", "mute", "Chill", "selfie", "foodie"],
        "a form of a word": ["Umbrellaing"],
        "a common phrase": ["best friend", "group-chat", "Night owl", "out of the blue", "comfortfood"],
        "everyday words": ["cheat day", "duty call", "headspin", "spell me", "money trail"],
        "no term of one to four words": [
            "",
            "🌧️",
            "42",
            "-",
            "a very long way to say it",
            "Term: x",
            "Yes. No",
            "x" * 41,
        ],
    }.items(),
)
def test_a_term_is_new_or_is_told_why_it_is_not(why: str, terms: list[str]) -> None:
    novelty = Novelty(["bussin", "LOL", "no cap", "leftout", ""])
    assert {term: novelty.why_not(term, ASKED) for term in terms} == dict.fromkeys(terms, why)


def test_new_terms_are_those_of_answers_that_say_what_they_mean(evidence: Evidence) -> None:
    texts = [GOOD.format(term, "Style.", "Nice.") for term in ("quizpad", "bussing", "fusion", "umbrella day")]
    lines = [*said(*texts, "Slang: quizpad\nDefinition:", "no term at all")]
    lines = [changed(one, asked="An umbrella on a rainy day.") for one in lines]
    reference = changed(lines[0], side="reference")  # of a row, whose term is known
    assert slang_metrics.new_term([*lines, reference], evidence) == [1, 0, 0, 0, 0, 0, None]


def test_rows_without_a_list_of_known_slang_are_to_be_prepared_again(evidence: Evidence) -> None:
    (evidence.folder / novelty.FILE).unlink()
    with pytest.raises(UserError, match=r"no list of known slang.*make data"):
        slang_metrics.new_term(said("x"), evidence)


def test_known_are_the_terms_of_all_rows_kept_or_not_and_of_the_task_s_own(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    texts = ["x" + sha256(str(number).encode()).hexdigest() for number in range(80)]
    rows = [f"{text[:12]},Means {text[12:]}." for text in texts]
    table.write_text("\n".join(["Slang,Description", *rows, f"{texts[0][:12]},Another thing.", "lonely,", ""]))
    words = [f"task.data.source={table}", f"data_dir={tmp_path}/data", "task.data.train_rows=20"]
    folder = prepare(load_config(["task=slang", *words]), None)
    assert Manifest.read(folder / "manifest.json").carried == [novelty.FILE]
    known = Novelty.read(folder)
    for term in [*(text[:12] for text in texts), "lonely", "rizz"]:
        assert known.why_not(term.upper(), "") == "known slang", term


def test_an_answer_fits_the_scene_whose_words_it_has(evidence: Evidence) -> None:
    scenes = "The rain drowns the tents.", "Grandma wins the race.", "Pizza burns in the oven."
    texts = (GOOD.format("x", f"When {scene.lower()}", scene) for scene in scenes)
    lines = [changed(one, fields={"context": scene}) for one, scene in zip(said(*texts), scenes, strict=True)]
    lines += [
        changed(lines[0], **other) for other in ({"fields": {"context": scenes[2]}}, {"text": "-\n-"}, {"fields": {}})
    ]
    own, _, _, another, nothing, unknown = slang_metrics.fits_scene(lines, evidence)
    assert own == 1 and another is not None and another < 1 and nothing == 0.5 and unknown is None
    assert slang_metrics.fits_scene(lines[:1], evidence) == [None]  # nothing to tell it from


def test_embeddings_are_weighted_by_rarity_and_read_from_any_shard(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_base / "tokenizer.json").read_bytes())
    table = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    save_file({"lm_head.weight": table[:, :2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"language_model.model.embed_tokens.weight": table}, tmp_path / "model-00002-of-00002.safetensors")
    embed = Embedder(tmp_path, ["the rain", "the sun", "the tide"])
    rain, more, sun, common, nothing = embed(["the rain", "the rain rain", "the sun", "the", ""])
    assert np.allclose(rain, more) and np.linalg.norm(rain) == pytest.approx(1) and rain @ sun < 0.9
    assert not common.any() and not nothing.any()  # what all texts have weighs nothing


# --- intervals ------------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(7)
    held = 0
    for _ in range(60):
        counts = random.integers(5, 30, size=40)
        sums = random.normal(2.0 * counts, np.sqrt(counts))
        _, low, high = estimates(np.stack([sums + counts, counts], 1), np.stack([sums, counts], 1)).after
        held += low < 2.0 < high
    assert 52 <= held <= 60


def test_a_difference_is_of_the_same_rows() -> None:
    """Rows differ much, both models are about one nat apart in each: paired, that is certain."""
    random, counts = np.random.default_rng(1), np.full(30, 10.0)
    sums, apart = random.normal(40, 20, size=30), random.normal(10, 0.1, size=30)
    found = estimates(np.stack([sums + apart, counts], 1), np.stack([sums, counts], 1))
    assert found.difference == pytest.approx((-1, -1, -1), abs=0.01)
    assert found.before[2] - found.before[1] > 1


def test_questions_that_are_all_alike_have_no_interval_rather_than_one_without_width() -> None:
    alike, other = np.full((9, 2), 2.0), np.stack([np.arange(9.0), np.full(9, 2.0)], 1)
    found = estimates(alike, other)
    assert found.before == (1.0, None, None) and found.after[1] is not None and found.difference[1] is not None
    assert estimates(alike, alike + np.array([2.0, 0.0])).difference == (1.0, None, None)


def test_shares_have_wilsons_interval() -> None:
    # Newcombe (1998), two-sided intervals for the single proportion, table I, method 3.
    for yes, asked, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(yes / asked, asked) == pytest.approx((yes / asked, low, high), abs=5e-5)
    assert wilson(1, 29)[1:] == pytest.approx((0.8830, 1), abs=5e-5)


def test_nine_of_nine_is_not_certainty() -> None:
    none, one = (np.stack([np.full(9, value), np.ones(9)], 1) for value in (0.0, 1.0))
    found = share_estimates(none, one)
    assert found.before == pytest.approx((0, 0, 0.2991), abs=5e-5)
    assert found.after == pytest.approx((1, 0.7009, 1), abs=5e-5)
    assert found.difference == pytest.approx((1, 1 - 0.2991 * 2**0.5, 1), abs=1e-4)
    assert share_estimates(none, none).difference == pytest.approx((0, -0.2991, 0.2991), abs=1e-4)


def test_answers_to_one_question_do_not_count_as_many() -> None:
    """Three answers each that are all alike tell no more than one; and questions of unequal weight tell less."""
    yes = np.array([1.0, 0, 0, 1, 1, 0, 0, 0])
    once, thrice = (np.stack([n * yes, np.full(8, n)], 1) for n in (1.0, 3.0))
    assert share_estimates(once, once).after == pytest.approx(share_estimates(thrice, thrice).after)
    mixed = np.array([[9.0, 9.0], [0.0, 1.0]])
    _, low, high = share_estimates(mixed, mixed).after
    assert (low, high) == pytest.approx(wilson(0.9, 100 / 82)[1:])


def test_a_difference_of_shares_is_that_of_pairs() -> None:
    """Against Newcombe's own form of it (1998), from the counts a, b, c, d of yes-yes, yes-no, no-yes and no-no."""
    for a, b, c, d in ((12, 9, 3, 16), (5, 0, 0, 5), (0, 5, 5, 0), (30, 1, 0, 2), (7, 0, 0, 0)):
        pairs = np.repeat([[1.0, 1], [1, 0], [0, 1], [0, 0]], (a, b, c, d), axis=0)
        n, one, other = len(pairs), (a + b) / len(pairs), (a + c) / len(pairs)
        (_, l1, u1), (_, l2, u2) = wilson(one, n), wilson(other, n)
        product = (a + b) * (c + d) * (a + c) * (b + d)
        top = a * d - b * c
        phi = (max(top - n / 2, 0) if top > 0 else top) / product**0.5 if product else 0
        low = ((other - l2) ** 2 - 2 * phi * (other - l2) * (u1 - one) + (u1 - one) ** 2) ** 0.5
        high = ((u2 - other) ** 2 - 2 * phi * (u2 - other) * (one - l1) + (one - l1) ** 2) ** 0.5
        found = share_estimates(*(np.stack([pairs[:, side], np.ones(n)], 1) for side in (0, 1))).difference
        assert found == pytest.approx((other - one, other - one - low, other - one + high)), (a, b, c, d)
        assert found[2] > found[1], "even models that always agree may not on the next question"


def test_the_same_rows_give_the_same_interval_and_one_row_none() -> None:
    series = np.array([[3.0, 2.0], [5.0, 4.0], [1.0, 1.0]])
    assert np.array_equal(resample(series), resample(series)) and resample(series).shape == (1, RESAMPLES)
    assert estimates(series[:1], series[:1]).before == (1.5, None, None)


def test_gain_is_the_fall_of_perplexity() -> None:
    before, after = (
        Measurement(loss=sum(nats for nats, _ in rows) / 7, perplexity=1, rows=rows)
        for rows in ([(4.0, 2), (6.0, 2), (9.0, 3)], [(2.0, 2), (4.0, 2), (6.5, 3)])
    )
    found = held_out(Evaluation(held_out_rows=3, before=before, after=after))
    assert found and found.perplexity.before[0] == pytest.approx(np.exp(19 / 7))
    value, low, high = found.gain
    assert value == pytest.approx(1 - np.exp(12.5 / 7) / np.exp(19 / 7)) and low <= value <= high
    old = Measurement(loss=1, perplexity=1)
    assert held_out(Evaluation(held_out_rows=3, before=old, after=old)) is None


# --- all of them together -------------------------------------------------------------------------------------


def test_measured_are_questions_that_both_models_were_asked(evidence: Evidence) -> None:
    answer = GOOD.format("drip", "Style that everybody sees.", "Your drip is unreal.")
    after = said(
        answer, answer, reference=GOOD.format("fit", "An outfit.", "Nice fit."), fields={"context": "At a party."}
    )
    before = [changed(one, id=f"b{one.id}", side="before", text="-\n-", ended=False) for one in after]
    alone = changed(before[0], id="c", question="asked of one only")
    found, scores = measure([*before, *after, alone], evidence, "slang")
    table = {metric.name: metric for metric in found}
    assert table["well_formed"].before[0] == 0 and table["well_formed"].after[0] == 1
    assert table["well_formed"].questions == 2 and table["well_formed"].reference == 1
    assert table["chrf"].reference is None and "distinct_2" not in table
    assert table["new_term"].explanation.startswith("Answers with a definition and a term")
    assert table["new_term"].reference is None and scores["0"]["new_term"] == 0  # drip is an English word
    assert scores["b0"]["ended"] == 0
    json.dumps([metric.to_dict() for metric in found], allow_nan=False)


def test_every_metric_says_what_it_is() -> None:
    of_tasks = [metric for name in having("metrics") for metric in part_of(name, "metrics", "").METRICS]
    for metric in [*metrics.METRICS, *of_tasks]:
        assert len(metric.explanation) > 40 and metric.better in ("higher", "lower", ""), metric.title
