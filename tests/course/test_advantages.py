"""advantages: the leave-one-out baseline, by hand, by its invariants, and by what it is there for."""
import itertools
import math

import pytest
import torch

from rl import advantages


def test_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    third = 1 / 3
    torch.testing.assert_close(advantages(rewards), torch.tensor([[1, -third, -third, -third], [third, third, third, -1.0]]))


def test_of_two_rollouts_each_is_the_baseline_of_the_other():
    torch.testing.assert_close(advantages(torch.tensor([[1.0, 0.25]])), torch.tensor([[0.75, -0.75]]))


def test_they_are_the_scaled_deviation_from_the_mean():
    rewards = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(advantages(rewards), 8 / 7 * (rewards - rewards.mean(1, keepdim=True)))


def test_they_follow_the_scale_of_the_rewards_and_not_their_zero():
    """Rewards of -5 and 5 teach ten times as much as 0 and 1, in the same direction."""
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    torch.testing.assert_close(advantages(10 * rewards - 5), torch.tensor([[10.0, -5.0, -5.0], [5.0, 5.0, -10.0]]))


def test_a_task_does_not_see_the_others():
    rewards = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(advantages(rewards), torch.cat([advantages(row) for row in rewards.split(1)]))


def test_a_baseline_does_not_see_its_own_rollout():
    """When one reward rises by 1, its own advantage rises by 1 as well, and not by less."""
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    raised = rewards + torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert (advantages(raised) - advantages(rewards))[0, 0].item() == pytest.approx(1)


def test_a_group_of_equal_rewards_carries_no_signal_and_others_do():
    found = advantages(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]))
    assert found[:2].abs().max() == 0 and found[2].abs().min() > 0


def test_a_rollout_that_does_not_count_has_no_advantage_and_enters_no_baseline():
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, 0.0, 0.0], [1.0, nan, 1.0, nan], [1.0, nan, nan, nan], [nan, nan, nan, nan]])
    before, found = rewards.clone(), advantages(rewards)
    torch.testing.assert_close(rewards, before, equal_nan=True)  # they are needed once more
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, -0.5, -0.5], [0.0] * 4, [0.0] * 4, [0.0] * 4]))


def test_the_gradient_has_no_bias():
    """Over all outcomes of three draws from two actions, the expected gradient is the true one, whatever is added to the rewards."""
    p, reward = 0.3, [6.0, 5.0]
    score = [1 - p, -p]  # the derivative of log pi(action) after the logit of action 0
    expected = 0.0
    for draws in itertools.product([0, 1], repeat=3):
        found = advantages(torch.tensor([[reward[action] for action in draws]]))[0].tolist()
        chance = math.prod([p, 1 - p][action] for action in draws)
        expected += chance * sum(a * score[action] for a, action in zip(found, draws)) / 3
    assert expected == pytest.approx(p * (1 - p) * (reward[0] - reward[1]), abs=1e-6)
