"""Bootstrap intervals of means, ratios and corpus scores over test samples (Efron 1979)."""

from collections.abc import Callable

import numpy as np

ROUNDS = 1000
CHUNK = 2**24  # counts that are held at once


def bootstrap(
    values: np.ndarray, weights: np.ndarray | None = None, rounds: int = ROUNDS, seed: int = 0
) -> list[float]:
    """95 % percentile interval of Σ values / Σ weights over samples drawn with replacement.

    It says how the number would move with other test samples; it does not see other training seeds. If all samples
    agree (0 or all right) it has no width: then read n.

    Args:
        values: one number per sample, [n].
        weights: its denominator, [n]; ones by default.
        rounds: resamples.
        seed: of the draws.
    Returns:
        [low, high]; [0, 0] without samples.
    """
    weights = np.ones(len(values)) if weights is None else weights
    columns = np.stack((np.asarray(values, float), np.asarray(weights, float)), 1)  # [n, 2]
    return interval_of(columns, lambda sums: ratio(sums[:, 0], sums[:, 1]), rounds, seed)


def interval_of(
    columns: np.ndarray, score: Callable[[np.ndarray], np.ndarray], rounds: int = ROUNDS, seed: int = 0
) -> list[float]:
    """95 % interval of a score that depends on sums over samples alone, as BLEU and recall do.

    Args:
        columns: what is summed, [n, C].
        score: sums [rounds, C] → scores [rounds].
    """
    n = len(columns)
    if n == 0:
        return [0.0, 0.0]
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // n)
    sums = [
        rng.multinomial(n, np.full(n, 1 / n), size=min(step, rounds - start)) @ columns
        for start in range(0, rounds, step)
    ]
    low, high = np.percentile(score(np.concatenate(sums)), (2.5, 97.5))
    return [float(low), float(high)]


def ratio(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """values / weights, 0 where a weight is 0."""
    return np.divide(values, weights, out=np.zeros_like(values, dtype=float), where=weights > 0)
