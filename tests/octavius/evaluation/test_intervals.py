"""Bootstrap intervals."""

import numpy as np
import pytest

from octavius.evaluation import intervals


def test_bootstrap_covers_the_mean_and_repeats():
    values = np.array([0.0, 1.0] * 50)
    low, high = intervals.bootstrap(values)
    assert intervals.bootstrap(values) == [low, high]
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    assert intervals.bootstrap(np.zeros(0)) == [0, 0]
    assert intervals.bootstrap(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == [0, 1]
