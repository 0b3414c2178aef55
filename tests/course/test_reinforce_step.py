"""reinforce_step: the loss. The log-probabilities, which are another exercise, come from a table whose entries are learnt.

So the gradient of each log-probability can be read off: -A/N where the agent has sampled, and 0 elsewhere.
"""
import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

import rl
from rl import Trajectory

MASKS = [[0, 1, 1, 0, 1], [0, 0, 1], [0, 1, 1, 1]]
AGENT = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0]])  # the masks without their first column, padded
SAMPLER = -1.0  # every token's log-probability when it was sampled


@pytest.fixture
def step(monkeypatch):
    """Return the function that takes a step on three trajectories; it returns loss, gradients [3, 4] and the table after it.

    What else the step tells is then in its `figures`.
    """
    def take(advantage, table=None, learning_rate=0.0, **options):
        trajectories = [Trajectory([5] * len(mask), [bool(m) for m in mask], [SAMPLER * m for m in mask]) for mask in MASKS]
        model = torch.nn.Module()
        model.table = torch.nn.Parameter(torch.full((3, 4), SAMPLER) if table is None else table)

        def logprobs(policy, batch, temperature):
            rows = [next(row for row, trajectory in enumerate(trajectories) if trajectory is one) for one in batch]
            columns = max(len(one.tokens) for one in batch) - 1
            agent = AGENT[rows, :columns].bool()
            return model.table[rows, :columns] * agent, agent

        monkeypatch.setattr(rl, "trajectory_logprobs", logprobs)
        monkeypatch.setattr(rl, "checkpointed", lambda model: contextlib.nullcontext())
        policy = SimpleNamespace(model=model, device=torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
        figures = rl.reinforce_step(policy, optimizer, trajectories, torch.tensor(advantage), max_norm=math.inf, **options)
        take.figures = figures
        gradient = torch.zeros(3, 4) if model.table.grad is None else model.table.grad
        return figures["loss"], gradient, model.table.detach()
    return take


def test_by_hand(step):
    """loss = -1/3 (1 * -3 - 0.5 * -1 + 0.25 * -3), where the agent has sampled 3, 1 and 3 tokens of log-probability -1."""
    loss, gradient, _ = step([1.0, -0.5, 0.25])
    assert loss == pytest.approx(3.25 / 3)
    torch.testing.assert_close(gradient, -torch.tensor([[1.0], [-0.5], [0.25]]) * AGENT / 3)


def test_the_temperature_is_in_the_log_probabilities_already(step):
    (loss, gradient, _), (cold_loss, cold_gradient, _) = step([1.0, -0.5, 0.25]), step([1.0, -0.5, 0.25], temperature=0.5)
    assert cold_loss == loss
    torch.testing.assert_close(cold_gradient, gradient)


def test_what_went_well_becomes_more_likely(step):
    _, _, table = step([1.0, -0.5, 0.0], learning_rate=1.0)
    change = table - SAMPLER
    assert (change[0][AGENT[0] == 1] > 0).all() and (change[1][AGENT[1] == 1] < 0).all()
    assert (change[AGENT == 0] == 0).all() and (change[2] == 0).all()


def test_trajectories_without_signal_count_in_the_divisor(step):
    loss, gradient, _ = step([1.0, 0.0, 0.0])
    assert loss == pytest.approx(1.0)  # of three tokens over three trajectories, not over one
    torch.testing.assert_close(gradient, -torch.tensor([[1.0], [0.0], [0.0]]) * AGENT / 3)


def test_a_token_of_a_long_trajectory_weighs_as_much_as_one_of_a_short_one(step):
    _, gradient, _ = step([1.0, 1.0, 1.0])
    torch.testing.assert_close(gradient, -AGENT / 3)


def test_it_does_not_matter_how_the_trajectories_are_split(step):
    together, apart = step([1.0, -0.5, 0.25], micro_batch_tokens=1000), step([1.0, -0.5, 0.25], micro_batch_tokens=1)
    assert together[0] == pytest.approx(apart[0])
    torch.testing.assert_close(together[1], apart[1])


def test_without_a_cap_nothing_is_weighed(step):
    table = SAMPLER + torch.tensor([[2.0, 3.0, 0.25, 1.0]]).repeat(3, 1).log()
    _, gradient, _ = step([1.0, -0.5, 0.25], table)
    torch.testing.assert_close(gradient, -torch.tensor([[1.0], [-0.5], [0.25]]) * AGENT / 3)


def test_the_importance_ratio_weighs_each_token_up_to_its_cap(step):
    """The trainer finds tokens twice, three times, a quarter and once as likely as the sampler did; the cap is 2.5."""
    ratio = torch.tensor([[2.0, 3.0, 0.25, 1.0]]).repeat(3, 1)
    loss, gradient, _ = step([1.0, -0.5, 0.25], SAMPLER + ratio.log(), importance_cap=2.5)
    weight = torch.tensor([[2.0, 2.5, 0.25, 1.0]]) * torch.tensor([[1.0], [-0.5], [0.25]])
    torch.testing.assert_close(gradient, -weight * AGENT / 3)  # the ratio is a number, no part of the gradient
    assert loss == pytest.approx(-(weight * AGENT * (SAMPLER + ratio.log())).sum().item() / 3)
    assert step.figures["mismatch_kl"] == pytest.approx(-(ratio.log() * AGENT).sum().item() / 7)  # what was given is as it was
    assert step.figures["trained_tokens"] == 7
