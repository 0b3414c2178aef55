"""signal_share: how many tasks teach anything."""
import math

import pytest
import torch

from rl import signal_share


@pytest.mark.parametrize("rewards, share", [
    ([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]], 2 / 4),
    ([[1, 1], [0, 0]], 0),
    ([[0, 0, 0, 0, 0, 0, 0, 1]], 1),
    ([[1, 0, 1], [1, 1, 1], [0, 0, 0]], 1 / 3),  # the first and the last are alike
    ([[0.5, 0.5], [0.25, 0.25]], 0),  # neither a success nor a failure
    ([[0.5, 0.25], [1, 0.5], [0.5, 0]], 0),  # not both
    ([[0, 0.5, 1], [0, 0, 0]], 1 / 2),  # the second one's advantage is 0, and yet the task teaches
    ([[0.75, 0.25], [1, 0.25], [0.75, 0]], 0),
    ([[0.5, 0.5, 1, 0], [0.25, 0.25, 1, 1]], 1 / 2),
    ([[0], [1]], 0),
    ([[math.nan, 1, 1], [0, math.nan, 0], [0, math.nan, 1], [math.nan] * 3], 1 / 4),  # NaN does not count
    ([[math.nan, 0, 1], [0, 1, math.nan]], 1),
])
def test_by_hand(rewards, share):
    assert signal_share(torch.tensor(rewards, dtype=torch.float)) == pytest.approx(share)


def test_the_rewards_stay_as_they_are():
    rewards = torch.tensor([[math.nan, 0.0, 1.0], [1.0, 0.5, math.nan]])
    before = rewards.clone()
    signal_share(rewards)
    torch.testing.assert_close(rewards, before, equal_nan=True)


def test_it_is_a_plain_number():
    assert type(signal_share(torch.tensor([[1.0, 0.0]]))) is float


def test_neither_the_order_of_tasks_nor_that_of_rollouts_matters():
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(20, 4, generator=generator) < 0.2).float()
    share = signal_share(rewards)
    assert 0 < share < 1
    assert signal_share(rewards.flip(0)) == signal_share(rewards.flip(1)) == pytest.approx(share)
