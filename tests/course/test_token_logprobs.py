"""token_logprobs: the plain log-probabilities and gradients, while no more logits exist than those of a chunk."""
import pytest
import torch

import rl

generator = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(50, 8, generator=generator)
TOKENS = torch.randint(50, (30,), generator=generator)
UPSTREAM = torch.randn(30, generator=generator)  # the gradient that comes back


@pytest.fixture
def states():
    return torch.randn(30, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)


def plain(states, temperature):
    return torch.log_softmax(states @ WEIGHT.T / temperature, -1)[torch.arange(30), TOKENS]


@pytest.mark.parametrize("chunk", [1, 7, 10, 30, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_equal_the_plain_ones(monkeypatch, states, chunk, temperature):
    monkeypatch.setattr(rl, "CHUNK_TOKENS", chunk)
    torch.testing.assert_close(rl.token_logprobs(lambda x: x @ WEIGHT.T, states, TOKENS, temperature), plain(states, temperature))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_gradients_equal_the_plain_ones(monkeypatch, states, chunk):
    monkeypatch.setattr(rl, "CHUNK_TOKENS", chunk)
    ours = rl.token_logprobs(lambda x: x @ WEIGHT.T, states, TOKENS, 0.7)
    assert ours.requires_grad
    (found,) = torch.autograd.grad(ours, states, UPSTREAM)
    (expected,) = torch.autograd.grad(plain(states, 0.7), states, UPSTREAM)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected)


def test_of_no_tokens_there_are_no_log_probabilities(states):
    """The agent says nothing where, for instance, its user ends the conversation at once."""
    found = rl.token_logprobs(lambda x: x @ WEIGHT.T, states[:0], TOKENS[:0], 1.0)
    assert found.shape == (0,) and found.requires_grad


def test_no_more_than_a_chunk_goes_through_the_head_at_once(monkeypatch, states):
    monkeypatch.setattr(rl, "CHUNK_TOKENS", 7)
    sizes = []
    rl.token_logprobs(lambda x: sizes.append(len(x)) or x @ WEIGHT.T, states, TOKENS, 1.0)
    assert max(sizes) <= 7 and sum(sizes) == 30 and len(sizes) == 5


def test_the_logits_are_not_kept_but_computed_again_for_the_gradient(monkeypatch, states):
    monkeypatch.setattr(rl, "CHUNK_TOKENS", 7)
    sizes = []
    rl.token_logprobs(lambda x: sizes.append(len(x)) or x @ WEIGHT.T, states, TOKENS, 1.0).sum().backward()
    assert max(sizes) <= 7 and sum(sizes) == 2 * 30


def test_logits_in_16_bits_are_normalised_in_32(states):
    found = rl.token_logprobs(lambda x: (x @ WEIGHT.T).bfloat16(), states, TOKENS, 0.7)
    rounded = (states @ WEIGHT.T).bfloat16().float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.log_softmax(rounded / 0.7, -1)[torch.arange(30), TOKENS])


def test_the_head_is_given_the_states_in_their_own_type(states):
    types = set()
    rl.token_logprobs(lambda x: types.add(x.dtype) or x @ WEIGHT.T.to(x.dtype), states.bfloat16(), TOKENS, 1.0).sum().backward()
    assert types == {torch.bfloat16}


def test_large_logits_neither_overflow_nor_underflow(states):
    torch.testing.assert_close(rl.token_logprobs(lambda x: x @ WEIGHT.T, 100 * states, TOKENS, 1.0), plain(100 * states, 1.0))


def test_a_chunk_s_logits_have_done_their_work_before_the_next_ones_are_computed_again(monkeypatch, states):
    monkeypatch.setattr(rl, "CHUNK_TOKENS", 7)
    events = []
    def head(x):
        events.append("head")
        logits = x @ WEIGHT.T
        if logits.requires_grad:
            logits.register_hook(lambda gradient: events.append("gradient"))
        return logits
    rl.token_logprobs(head, states, TOKENS, 1.0).sum().backward()
    assert events == 5 * ["head"] + 5 * ["head", "gradient"]
