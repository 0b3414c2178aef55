"""pass_at_k: by hand, by counting subsets, and without bias."""
import itertools
import math

import pytest

from eval import pass_at_k


@pytest.mark.parametrize("n, c, k, share", [
    (4, 0, 4, 0), (4, 1, 4, 1), (4, 4, 4, 1), (4, 1, 1, 1 / 4),
    (4, 2, 2, 5 / 6), (5, 2, 3, 9 / 10), (8, 3, 4, 13 / 14), (10, 6, 4, 209 / 210),
])
def test_by_hand(n, c, k, share):
    assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_it_equals_counting_the_subsets_with_a_success():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_of_one_trial_it_is_the_share_of_successes():
    assert [pass_at_k(5, c, 1) for c in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_it_has_no_bias():
    """Averaged over the binomial number of successes it is 1 - (1 - p)^k exactly."""
    n, k, p = 6, 4, 0.3
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)
