"""CIDEr, BLEU-1..4, ROUGE-L and METEOR of captions, by pycocoevalcap.

Samples are keyed by their index, so none overwrites another (upstream keys by scene). CIDEr weighs an n-gram by its
rarity among the references of *this* test set: it is 0 for a single sample, unstable for a few dozen, and never
comparable between test sets. Values are pycocoevalcap's: CIDEr 0..10, the others 0..1; papers print them × 100.
"""

import shutil
from collections.abc import Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from octavius.evaluation.intervals import bootstrap, interval_of
from octavius.evaluation.tokenizer import tokenize

ORDERS = 4  # BLEU-1 to BLEU-4
TINY, SMALL = 1e-15, 1e-9  # pycocoevalcap's, which keep BLEU's fractions above 0


def caption(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr, BLEU-1..4 and ROUGE-L over the words that `tokenize` makes.

    Args:
        predictions: one caption per sample.
        references: one or more captions per sample.
    """
    return caption_scores(predictions, references)[0]


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The scores, and their bootstrap intervals over samples."""
    if len(predictions) != len(references):
        raise ValueError(f"all lists must have one entry per sample, got {[len(predictions), len(references)]}")
    answers = {i: [tokenize(text)] for i, text in enumerate(predictions)}
    truths = {i: [tokenize(text) for text in checked(texts)] for i, texts in enumerate(references)}
    names = ("CIDEr", *(f"BLEU-{n}" for n in range(1, ORDERS + 1)), "ROUGE-L")
    if not answers:
        return dict.fromkeys(names, 0.0), {name: [0.0, 0.0] for name in names}
    cider, of_cider = Cider().compute_score(truths, answers)
    rouge, of_rouge = Rouge().compute_score(truths, answers)
    bleu, statistics = _bleu(answers, truths)
    values = {"CIDEr": float(cider), **{f"BLEU-{n}": b for n, b in enumerate(bleu, 1)}, "ROUGE-L": float(rouge)}
    intervals = {"CIDEr": bootstrap(np.asarray(of_cider)), "ROUGE-L": bootstrap(np.asarray(of_rouge))}
    for n in range(1, ORDERS + 1):
        intervals[f"BLEU-{n}"] = interval_of(statistics, lambda sums, n=n: _bleu_of(sums, n))
    return values, {name: intervals[name] for name in names}


def meteor_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """METEOR by the Java program that pycocoevalcap brings, and its interval over samples' own scores.

    Raises:
        ValueError: there is no Java.
    """
    if not has_java():
        raise ValueError("METEOR needs Java on the PATH, found none; leave METEOR out or install a Java runtime")
    scorer = Meteor()
    answers = {i: [tokenize(text)] for i, text in enumerate(predictions)}
    value, of_samples = scorer.compute_score({i: list(map(tokenize, t)) for i, t in enumerate(references)}, answers)
    return {"METEOR": float(value)}, {"METEOR": bootstrap(np.asarray(of_samples))}


def has_java() -> bool:
    """Whether METEOR can run here."""
    return shutil.which("java") is not None


def checked(texts: Sequence[str]) -> Sequence[str]:
    """The reference captions of a sample.

    Raises:
        ValueError: they are not a list of texts with words.
    """
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and tokenize(text) for text in texts):
        raise ValueError(f"reference captions must be a list of one or more texts with words, got {texts!r}")
    return texts


def _bleu(answers: dict[int, list[str]], truths: dict[int, list[str]]) -> tuple[list[float], np.ndarray]:
    """BLEU of the corpus, and per sample what it is a function of the sums of: [n, 2 + 2·ORDERS]."""
    scorer = BleuScorer(n=ORDERS)
    for index, (answer,) in answers.items():
        scorer += (answer, truths[index])
    bleu, _ = scorer.compute_score(option="closest", verbose=0)
    rows = []
    for entry in scorer.ctest:
        size = entry["testlen"]
        _, nearest = min((abs(length - size), length) for length in entry["reflen"])
        rows.append([size, nearest, *entry["guess"], *entry["correct"]])
    return [float(value) for value in bleu], np.array(rows, float)


def _bleu_of(sums: np.ndarray, order: int) -> np.ndarray:
    """BLEU-`order` of summed statistics [rounds, 2 + 2·ORDERS], by pycocoevalcap's formula."""
    guess, correct = sums[:, 2 : 2 + order], sums[:, 2 + ORDERS : 2 + ORDERS + order]
    score = ((correct + TINY) / (guess + SMALL)).prod(1) ** (1 / order)
    short = (sums[:, 0] + TINY) / (sums[:, 1] + SMALL)
    return np.where(short < 1, score * np.exp(1 - 1 / short), score)
