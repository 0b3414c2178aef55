"""Trajectory.extend: tokens, the mask of what the agent sampled, and the sampler's log-probabilities stay in step."""
import random

import torch

import rl
from rl import Trajectory


def test_by_hand():
    trajectory = Trajectory([1, 2], [False, False], [0.0, 0.0])
    trajectory.extend([3, 4, 5], True, [-0.5, -0.25, -2.0])
    trajectory.extend([6, 7], False)
    trajectory.extend([0], True, [-1.0])  # a token like any other
    assert trajectory.tokens == [1, 2, 3, 4, 5, 6, 7, 0]
    assert trajectory.mask == [False, False, True, True, True, False, False, True]
    assert {*map(type, trajectory.mask)} == {bool} and {*map(type, trajectory.logprobs)} == {float}
    assert trajectory.logprobs == [0.0, 0.0, -0.5, -0.25, -2.0, 0.0, 0.0, -1.0]


def test_nothing_changes_nothing():
    trajectory = Trajectory([1], [True], [-1.0])
    trajectory.extend([], False)
    assert (trajectory.tokens, trajectory.mask, trajectory.logprobs) == ([1], [True], [-1.0])


def test_a_token_that_was_certain_was_sampled_all_the_same():
    trajectory = Trajectory([1], [False], [0.0])
    trajectory.extend([2, 3], True, [0.0, -1.0])
    assert trajectory.mask == [False, True, True] and trajectory.logprobs == [0.0, 0.0, -1.0]


def test_what_is_not_sampled_has_no_log_probability_even_if_one_is_given():
    trajectory = Trajectory([], [], [])
    trajectory.extend([1, 2], False, [-1.0, -1.0])
    assert trajectory.logprobs == [0.0, 0.0]


def test_the_agent_s_tokens_are_found_again_by_the_mask():
    generator, trajectory, said = random.Random(0), Trajectory([], [], []), []
    for _ in range(50):
        tokens, sampled = [generator.randrange(100) for _ in range(generator.randrange(5))], generator.random() < 0.5
        trajectory.extend(tokens, sampled, [-1.0] * len(tokens))
        said += tokens if sampled else []
        assert len(trajectory.tokens) == len(trajectory.mask) == len(trajectory.logprobs)
    assert [token for token, sampled in zip(trajectory.tokens, trajectory.mask) if sampled] == said
    assert [logprob != 0 for logprob in trajectory.logprobs] == trajectory.mask


class ThreeTurns(rl.Episode):
    """An episode that answers whatever the agent says, twice."""

    def __init__(self):
        self.messages, self.said = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], []
        self.reward, self.status = 0.0, "running"

    def step(self, text):
        self.said.append(text)
        return "go on" if len(self.said) < 3 else None

    def close(self):
        pass


def test_of_a_real_rollout_the_mask_marks_the_agent_s_turns(policy):
    episode = ThreeTurns()
    (trajectory,) = rl.rollout(policy, [episode], rl.seeded("cpu", 1), turn_tokens=6, context=100)
    turns, before = [], False
    for token, sampled in zip(trajectory.tokens, trajectory.mask):
        if sampled:
            turns = turns if before else [*turns, []]
            turns[-1].append(token)
        before = sampled
    assert [rl.turn_text(policy, tokens) for tokens in turns] == episode.said and len(turns) == 3
    logprobs = torch.tensor(trajectory.logprobs)
    assert torch.equal(logprobs < 0, torch.tensor(trajectory.mask))
