"""trajectory_logprobs: each of the agent's tokens is scored by what came before it, and nothing else is scored.

`token_logprobs`, which is another exercise, is replaced by a plain one.
"""
import copy
import dataclasses

import pytest
import torch

import rl
from rl import Trajectory, trajectory_logprobs

SCORED = []  # how many tokens the plain one was asked for


@pytest.fixture(autouse=True)
def without_chunks(monkeypatch):
    def plain(head, states, tokens, temperature):
        SCORED.append(len(tokens))
        return torch.log_softmax(head(states).float() / temperature, -1)[torch.arange(len(tokens)), tokens]
    monkeypatch.setattr(rl, "token_logprobs", plain)
    SCORED.clear()


def conversation(prompt: int, first: int, observed: int, second: int, seed: int) -> Trajectory:
    """A made-up trajectory with two turns of the agent, of so many tokens each."""
    lengths = [prompt, first, observed, second]
    tokens = torch.randint(5, 300, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).tolist()
    mask = [sampled for length, sampled in zip(lengths, [False, True, False, True]) for _ in range(length)]
    return Trajectory(tokens, mask, [-1.0 if sampled else 0.0 for sampled in mask])


BATCH = [conversation(4, 3, 2, 5, seed=1), conversation(7, 1, 4, 1, seed=2), conversation(3, 6, 1, 2, seed=3)]


def by_hand(policy, trajectory: Trajectory, temperature: float) -> dict[int, torch.Tensor]:
    """{column: log pi(token of the next column)} of the agent's tokens, from the whole model's logits for one trajectory."""
    logits = policy.model(input_ids=torch.tensor([trajectory.tokens])).logits[0] / temperature
    return {position - 1: torch.log_softmax(logits[position - 1], -1)[trajectory.tokens[position]]
            for position, sampled in enumerate(trajectory.mask) if sampled}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_token_of_the_agent_is_scored_by_what_came_before(policy, temperature):
    logprobs, _ = trajectory_logprobs(policy, BATCH, temperature)
    for row, trajectory in zip(logprobs, BATCH):
        for column, expected in by_hand(policy, trajectory, temperature).items():
            assert row[column].item() == pytest.approx(expected.item(), abs=1e-4)


def test_all_else_is_zero_and_the_mask_says_where(policy):
    logprobs, agent = trajectory_logprobs(policy, BATCH, 1.0)
    assert logprobs.shape == agent.shape == (3, 13) and agent.dtype == torch.bool
    for row, marked, trajectory in zip(logprobs, agent, BATCH):
        columns = set(by_hand(policy, trajectory, 1.0))
        assert {i for i, here in enumerate(marked.tolist()) if here} == columns
        assert {i for i, value in enumerate(row.tolist()) if value != 0} == columns


def test_a_token_that_was_certain_is_scored_as_well(policy):
    _, agent = trajectory_logprobs(policy, [Trajectory([9, 8, 7], [False, True, True], [0.0, 0.0, -1.0])], 1.0)
    assert agent.tolist() == [[True, True]]


def test_the_order_of_the_rows_does_not_matter(policy):
    (one, mask), (other, other_mask) = trajectory_logprobs(policy, BATCH, 1.0), trajectory_logprobs(policy, BATCH[::-1], 1.0)
    torch.testing.assert_close(one, other.flip(0))
    assert torch.equal(mask, other_mask.flip(0))


def test_where_the_agent_has_said_nothing_there_is_a_gradient_all_the_same(policy):
    logprobs, agent = trajectory_logprobs(policy, [Trajectory([9, 8], [False, False], [0.0, 0.0])], 1.0)
    assert logprobs.requires_grad and logprobs.tolist() == [[0.0]] and agent.tolist() == [[False]]


def test_only_the_agent_s_tokens_are_given_to_the_head(policy):
    trajectory_logprobs(policy, BATCH, 1.0)
    assert sum(SCORED) == sum(sum(trajectory.mask) for trajectory in BATCH)


def test_the_end_of_a_turn_is_scored_although_it_is_the_pad(policy):
    for end in {policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id or 0, 0}:
        logprobs, agent = trajectory_logprobs(policy, [Trajectory([9, 8, end], [False, True, True], [0.0, -1.0, -1.0])], 1.0)
        assert agent.tolist() == [[True, True]] and (logprobs < 0).all()


def test_of_a_model_in_16_bits_they_are_not_rounded_to_16(policy):
    half = dataclasses.replace(policy, model=copy.deepcopy(policy.model).bfloat16())
    logprobs, agent = trajectory_logprobs(half, BATCH[:1], 1.0)
    assert logprobs.dtype == torch.float32 and not torch.equal(logprobs, logprobs.bfloat16().float())


def test_the_gradient_is_that_of_the_sum_by_hand(policy):
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    ours = trajectory_logprobs(policy, BATCH, 1.0)[0].sum()
    assert ours.requires_grad
    expected = sum(sum(by_hand(policy, trajectory, 1.0).values()) for trajectory in BATCH)
    for one, other in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(expected, weights)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
