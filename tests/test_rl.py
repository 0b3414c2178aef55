"""The policy: hand-computed advantages and losses, the mask, the invariants of the gradient, rollouts in the real jail."""
import argparse
import contextlib
import dataclasses
import gc
import http.server
import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, BloomConfig, CohereConfig, DeepseekV3Config, FalconConfig,
                          Gemma4TextConfig, JambaConfig, LlamaConfig, MixtralConfig, Phi3Config, Qwen2Config, Qwen2PreTrainedModel,
                          Qwen3MoeConfig)

import bench_rl
import rl
from eval import write_report
from live_memory import LiveMemory, random_policy, rollout_peak, shape_policy, training_peak
from rl import (
    Episode,
    Executor,
    PolicyError,
    Trajectory,
    advantages,
    defuse,
    load_policy,
    make_optimizer,
    micro_batches,
    observation_tokens,
    prompt_tokens,
    reinforce_step,
    rollout,
    sample_tokens,
    seeded,
    trajectory_logprobs,
)
from verify import CodeAsTask, Jail, JailError, Verdict


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", seed=0)


@pytest.fixture(scope="module")
def jail():
    with Jail(allow_weak=True) as jail:
        yield jail


def fresh_gradient(policy, trajectories, advantage, **options) -> list[torch.Tensor]:
    """The gradient of one step, taken with a learning rate of 0 so that the policy stays as it is."""
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.0)
    figures = reinforce_step(policy, optimizer, trajectories, advantage, max_norm=math.inf, **options)
    return [p.grad.clone() for p in policy.model.parameters() if p.requires_grad], figures


def some_trajectories(number=5) -> list[Trajectory]:
    """Made-up trajectories of different lengths, with prompts, two turns and an observation between them."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(number):
        trajectory = Trajectory([], [], [])
        for length, sampled in [(4 + i, False), (3 + 2 * i, True), (2, False), (2 + i % 3, True)]:
            tokens = torch.randint(5, 300, (length,), generator=generator).tolist()
            trajectory.extend(tokens, sampled, [-1.0] * length)
        made.append(trajectory)
    return made


# ---------------------------------------------------------------------------------------------------
# advantages

def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    third = 1 / 3
    expected = torch.tensor([[1.0, -third, -third, -third], [third, third, third, -1.0]])
    torch.testing.assert_close(advantages(rewards), expected)


def test_leave_one_out_is_the_scaled_deviation_from_the_mean():
    rewards = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(advantages(rewards), 8 / 7 * (rewards - rewards.mean(1, keepdim=True)))


def test_what_does_not_count_has_no_advantage_and_enters_no_baseline():
    nan = math.nan
    rewards = torch.tensor([[1.0, 0.0, nan, 1.0], [nan, nan, nan, nan], [nan, 1.0, nan, nan]])
    expected = torch.tensor([[0.5, -1.0, 0.0, 0.5], [0.0] * 4, [0.0] * 4])  # who is alone has no baseline
    torch.testing.assert_close(advantages(rewards), expected)
    torch.testing.assert_close(advantages(rewards, "none"), torch.tensor([[1.0, 0, 0, 1], [0.0] * 4, [0, 1.0, 0, 0]]))
    assert rl.signal_share(rewards) == pytest.approx(1 / 3)


def test_advantages_do_not_see_a_shift_and_follow_a_permutation():
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(advantages(rewards + 7), advantages(rewards))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(advantages(rewards[:, order]), advantages(rewards)[:, order])


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_group_of_equal_rewards_carries_no_signal(reward):
    assert advantages(torch.full((2, 8), reward)).abs().max() == 0


def test_leave_one_out_gives_an_unbiased_gradient():
    """Over all outcomes of K=3 draws from two actions the expected gradient is the true one, for r = [1, 0] + 5."""
    p, reward = 0.3, {0: 6.0, 1: 5.0}
    score = {0: 1 - p, 1: -p}  # d log pi(action) / d logit of action 0
    expected = sum(
        math.prod(p if a == 0 else 1 - p for a in draws)
        * sum(float(A) * score[a] for A, a in zip(advantages(torch.tensor([[reward[a] for a in draws]]))[0], draws)) / 3
        for draws in itertools.product([0, 1], repeat=3)
    )
    assert expected == pytest.approx(p * (1 - p) * (reward[0] - reward[1]), abs=1e-6)


def test_no_baseline_is_rejection_fine_tuning():
    rewards = torch.tensor([[1.0, 0.0, 1.0]])
    assert advantages(rewards, "none").tolist() == rewards.tolist()


def test_bad_baselines_are_refused():
    with pytest.raises(ValueError, match="leave-one-out or none"):
        advantages(torch.zeros(1, 2), "median")
    with pytest.raises(ValueError, match="at least two"):
        advantages(torch.zeros(3, 1))


# ---------------------------------------------------------------------------------------------------
# the loss

def test_the_loss_by_hand():
    """Two trajectories on a model whose logits are fixed: loss = -1/N sum A_i sum of the agent's log-probabilities."""
    class Fixed(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])))

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(input_ids, 3).float())

        def get_output_embeddings(self):
            return lambda states: states @ self.table  # the next token depends on this one alone

        get_base_model = get_decoder = lambda self: self
        gradient_checkpointing_enable = gradient_checkpointing_disable = lambda self, **_: None

    fixed = SimpleNamespace(model=Fixed(), device=torch.device("cpu"))
    first = Trajectory([0, 1, 2, 0], [False, True, True, False], [0.0, math.log(0.3), math.log(0.3), 0.0])
    second = Trajectory([2, 2], [False, True], [0.0, math.log(0.5)])
    optimizer = torch.optim.SGD(fixed.model.parameters(), lr=1.0)
    before = fixed.model.table.detach().clone()
    figures = reinforce_step(fixed, optimizer, [first, second], torch.tensor([1.0, -0.5]), max_norm=math.inf)
    # first: log p(1|0) + log p(2|1) = log .3 + log .3; second: log p(2|2) = log .5
    assert figures["loss"] == pytest.approx(-(1.0 * 2 * math.log(0.3) - 0.5 * math.log(0.5)) / 2, abs=1e-6)
    assert figures["mismatch_kl"] == pytest.approx(0.0, abs=1e-6)
    assert figures["trained_tokens"] == 3
    # d log softmax / d logits = onehot - p, row by row, times A / N; the step goes up
    gradient = torch.tensor([[-0.5, 0.7, -0.2], [-0.1, -0.6, 0.7], [0.0, 0.0, 0.0]]) / 2
    gradient[2] = -0.5 * (torch.tensor([0.0, 0.0, 1.0]) - torch.tensor([0.25, 0.25, 0.5])) / 2
    torch.testing.assert_close(fixed.model.table.detach() - before, gradient)


def test_the_gradient_equals_autograd_of_the_plain_formula(policy):
    trajectories, advantage = some_trajectories(3), torch.tensor([1.0, -0.5, 0.25])
    gradient, figures = fresh_gradient(policy, trajectories, advantage)
    policy.model.zero_grad()
    total = 0.0
    for trajectory, weight in zip(trajectories, advantage):
        logits = policy.model(input_ids=torch.tensor([trajectory.tokens])).logits[0]
        for t, sampled in enumerate(trajectory.mask):
            if sampled:
                total = total - weight * torch.log_softmax(logits[t - 1].float(), -1)[trajectory.tokens[t]] / 3
    total.backward()
    assert figures["loss"] == pytest.approx(total.item(), rel=1e-5)
    for ours, plain in zip(gradient, (p.grad for p in policy.model.parameters() if p.requires_grad)):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-3)
    assert max(g.abs().max() for g in gradient) > 1e-4  # an all-zero gradient would agree with itself


def test_the_gradient_does_not_depend_on_the_micro_batches(policy):
    trajectories, advantage = some_trajectories(), torch.tensor([1.0, -0.2, 0.0, 0.6, -1.0])
    together, _ = fresh_gradient(policy, trajectories, advantage, micro_batch_tokens=10_000)
    apart, _ = fresh_gradient(policy, trajectories, advantage, micro_batch_tokens=1)
    for one, other in zip(together, apart):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_the_gradient_does_not_depend_on_the_order(policy):
    trajectories, advantage = some_trajectories(), torch.tensor([1.0, -0.2, 0.0, 0.6, -1.0])
    one, _ = fresh_gradient(policy, trajectories, advantage)
    other, _ = fresh_gradient(policy, trajectories[::-1], advantage.flip(0))
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_trajectories_without_signal_only_count_in_the_divisor(policy):
    trajectories = some_trajectories(2)
    alone, _ = fresh_gradient(policy, trajectories[:1], torch.tensor([1.0]))
    beside, figures = fresh_gradient(policy, trajectories, torch.tensor([1.0, 0.0]))
    for one, other in zip(alone, beside):
        torch.testing.assert_close(one / 2, other, atol=1e-7, rtol=1e-3)
    assert figures["trained_tokens"] == sum(trajectories[0].mask)


def test_a_step_without_any_signal_leaves_the_policy_alone(policy):
    """Even where Adam is under way; what the sampler and the trainer say of a trajectory is compared all the same."""
    policy, trajectories = load_policy("tiny"), some_trajectories(2)
    optimizer = make_optimizer(policy, 0.1)
    reinforce_step(policy, optimizer, trajectories, torch.tensor([1.0, -1.0]))
    before = [p.detach().clone() for p in policy.model.parameters() if p.requires_grad]
    trajectories[0].logprobs = [0.0, *(trajectory_logprobs(policy, trajectories[:1], 1.0)[0][0] - 0.25).tolist()]
    figures = reinforce_step(policy, optimizer, trajectories, torch.zeros(2))
    assert all(torch.equal(a, b) for a, b in zip(before, (p for p in policy.model.parameters() if p.requires_grad)))
    assert (figures["loss"], figures["gradient_norm"], figures["trained_tokens"]) == (0.0, 0.0, 0)
    assert figures["mismatch_kl"] == pytest.approx(-0.25, abs=1e-5)
    assert reinforce_step(policy, optimizer, [], torch.zeros(0))["mismatch_kl"] is None


def test_tokens_that_the_agent_did_not_sample_carry_no_loss(policy):
    """A change of the last observation's tokens, which nothing sampled follows, changes neither loss nor gradient."""
    trajectories = some_trajectories(1)
    trajectories[0].extend([7, 8, 9], False)
    one, figures = fresh_gradient(policy, trajectories, torch.tensor([1.0]))
    trajectories[0].tokens[-3:] = [10, 11, 12]
    other, changed = fresh_gradient(policy, trajectories, torch.tensor([1.0]))
    assert figures["loss"] == changed["loss"]
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-5)


def test_padding_changes_no_log_probability(policy):
    trajectories = some_trajectories()
    logprobs, agent = trajectory_logprobs(policy, trajectories, 1.0)
    for row, trajectory in enumerate(trajectories):
        alone, mask = trajectory_logprobs(policy, [trajectory], 1.0)
        size = alone.shape[1]
        torch.testing.assert_close(logprobs[row, :size], alone[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(agent[row, :size], mask[0]) and not agent[row, size:].any()


def test_the_end_of_a_turn_is_learnt_although_it_may_be_the_pad(policy):
    end = policy.tokenizer.eos_token_id
    trajectory = Trajectory([9, 8, end], [False, True, True], [0.0, -1.0, -1.0])
    _, agent = trajectory_logprobs(policy, [trajectory], 1.0)
    assert agent.tolist() == [[True, True]]


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_log_probabilities_in_chunks_equal_the_plain_ones(monkeypatch, chunk):
    """Values and gradients, and no more logits exist at once than those of a chunk, forward or backward."""
    monkeypatch.setattr(rl, "CHUNK_TOKENS", chunk)
    generator = torch.Generator().manual_seed(0)
    weight, states = torch.randn(50, 8, generator=generator), torch.randn(30, 8, generator=generator, requires_grad=True)
    tokens, upstream, sizes = torch.randint(50, (30,), generator=generator), torch.randn(30, generator=generator), []

    def head(states):
        sizes.append(len(states))
        return states @ weight.T

    ours = rl.token_logprobs(head, states, tokens, 0.7)
    (our_gradient,) = torch.autograd.grad(ours, states, upstream)
    plain = torch.log_softmax(states @ weight.T / 0.7, -1).gather(1, tokens[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(plain, states, upstream)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(our_gradient, gradient)
    assert max(sizes) <= chunk and sum(sizes) == 2 * 30  # forward, and again for the gradient


def test_logits_are_computed_for_the_agent_s_tokens_alone(policy):
    trajectories, rows = some_trajectories(), []
    head = policy.model.get_base_model().get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    trajectory_logprobs(policy, trajectories, 1.0)
    hook.remove()
    assert sum(rows) == sum(sum(t.mask) for t in trajectories)


def test_checkpointing_changes_no_gradient_and_leaves_the_cache_on(policy, monkeypatch):
    trajectories, advantage = some_trajectories(), torch.tensor([1.0, -0.2, 0.0, 0.6, -1.0])
    layers = []
    hook = policy.model.get_base_model().get_decoder().layers[1].self_attn.register_forward_pre_hook(lambda *_: layers.append(1))
    with_it, _ = fresh_gradient(policy, trajectories, advantage, micro_batch_tokens=10_000)
    passes = len(layers)
    monkeypatch.setattr(rl, "checkpointed", contextlib.nullcontext)
    without, _ = fresh_gradient(policy, trajectories, advantage, micro_batch_tokens=10_000)
    hook.remove()
    assert (passes, len(layers)) == (2, 3)  # attention runs again in the backward pass, and only with it
    for one, other in zip(with_it, without):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-4)
    assert not policy.model.get_base_model().is_gradient_checkpointing


def test_checkpointing_is_not_reentrant(policy):
    with rl.checkpointed(policy.model):
        functions = [module._gradient_checkpointing_func for module in policy.model.modules() if hasattr(module, "_gradient_checkpointing_func")]
    assert functions and all(function.keywords["use_reentrant"] is False for function in functions)


def test_an_importance_ratio_weighs_each_token_up_to_its_cap(policy):
    """The sampler is said to have been half as sure of the first turn and three times as sure of the second."""
    trajectory = some_trajectories(1)[0]
    logprobs, agent = trajectory_logprobs(policy, [trajectory], 1.0)
    trajectory.logprobs = [0.0, *logprobs[0].tolist()]
    plain, figures = fresh_gradient(policy, [trajectory], torch.tensor([1.0]), importance_cap=1.5)
    assert figures["mismatch_kl"] == pytest.approx(0.0, abs=1e-6)  # the ratio is 1
    second = max(i for i, sampled in enumerate(trajectory.mask) if not sampled) + 1
    shifts = [0.0 if not sampled else -math.log(2) if i < second else math.log(3) for i, sampled in enumerate(trajectory.mask)]
    trajectory.logprobs = [before + shift for before, shift in zip(trajectory.logprobs, shifts)]
    _, figures = fresh_gradient(policy, [trajectory], torch.tensor([1.0]), importance_cap=1.5)
    turns = [(0, second, 1.5), (second, len(shifts), 1 / 3)]  # min(2, 1.5) and min(1/3, 1.5)
    expected = -sum(weight * (logprobs[0] * agent[0])[start - 1 if start else 0:stop - 1].sum().item() for start, stop, weight in turns)
    assert figures["loss"] == pytest.approx(expected, rel=1e-4)
    assert figures["mismatch_kl"] == pytest.approx(sum(shifts) / sum(trajectory.mask), abs=1e-5)


def test_micro_batches_hold_every_index_once_within_the_budget():
    trajectories = some_trajectories(9)
    lengths = [len(t.tokens) for t in trajectories]
    batches = micro_batches(lengths, 40)
    assert sorted(itertools.chain(*batches)) == list(range(9))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 40


# ---------------------------------------------------------------------------------------------------
# sampling and rollouts

def test_sampling_follows_the_softmax_and_reports_its_log_probabilities():
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).repeat(20_000, 1)
    tokens, logprobs = sample_tokens(logits, seeded("cpu", 1), temperature=1.0)
    frequency = torch.bincount(tokens, minlength=3) / len(tokens)
    torch.testing.assert_close(frequency, torch.tensor([0.7, 0.2, 0.1]), atol=0.02, rtol=0)
    torch.testing.assert_close(logprobs, torch.log(torch.tensor([0.7, 0.2, 0.1]))[tokens])


def test_temperature_is_part_of_the_reported_log_probability():
    logits = torch.tensor([[2.0, 0.0]]).repeat(4, 1)
    tokens, logprobs = sample_tokens(logits, seeded("cpu", 1), temperature=2.0)
    torch.testing.assert_close(logprobs, torch.log_softmax(logits / 2, -1).gather(1, tokens[:, None])[:, 0])


def test_temperature_zero_is_greedy():
    tokens, _ = sample_tokens(torch.tensor([[0.0, 1.0], [3.0, 1.0]]), seeded("cpu", 1), temperature=0)
    assert tokens.tolist() == [1, 0]


def test_seeded_generators_depend_on_all_that_is_named():
    draws = {torch.rand(1, generator=seeded("cpu", *what)).item() for what in [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1)]}
    assert len(draws) == 4
    assert torch.rand(1, generator=seeded("cpu", 0, "a", 1)) == torch.rand(1, generator=seeded("cpu", 0, "a", 1))


TASK = CodeAsTask(
    env="calculator",
    seed=3,
    instruction="Take the amount of tea, add 5, then multiply by 3.",
    evaluate="def evaluate(answer):\n    return answer == 3 * (amount('tea') + 5)",
    solution="result = 3 * (amount('tea') + 5)",
    failures=["result = 1", "result = 2", "result = 3"],
)


@pytest.fixture(scope="module")
def played(policy, jail):
    episodes = [Executor(jail, TASK) for _ in range(12)]
    return episodes, rollout(policy, episodes, seeded(policy.device, 5), parallel=5)


def test_the_trainer_sees_the_sampler_s_probabilities(policy, played):
    _, trajectories = played
    logprobs, agent = trajectory_logprobs(policy, trajectories, 1.0)
    for row, trajectory in enumerate(trajectories):
        sampled = torch.tensor(trajectory.logprobs)[1:]
        torch.testing.assert_close(logprobs[row, : len(sampled)][agent[row, : len(sampled)]].detach(), sampled[torch.tensor(trajectory.mask)[1:]], atol=2e-4, rtol=1e-3)


def test_the_mask_marks_exactly_the_agent_s_turns(policy, played):
    episodes, trajectories = played
    for episode, trajectory in zip(episodes, trajectories):
        turns = [m["content"] for m in episode.messages if m["role"] == "assistant"]
        runs = [list(group) for sampled, group in itertools.groupby(zip(trajectory.mask, trajectory.tokens), key=lambda pair: pair[0]) if sampled]
        texts = [policy.tokenizer.decode([t for _, t in run], skip_special_tokens=True) for run in runs]
        assert texts == turns
        assert len(trajectory.tokens) == len(trajectory.mask) == len(trajectory.logprobs)


def test_a_trajectory_reads_as_the_chat_template_renders_it(policy, played):
    """Append-only ids: decoded, they are the template's text of the whole conversation."""
    for episode, trajectory in zip(*played):
        rendered = policy.tokenizer.apply_chat_template(episode.messages, tokenize=False)
        decoded = policy.tokenizer.decode(trajectory.tokens)
        if trajectory.tokens[-1] in policy.stop_ids:
            assert decoded == rendered


def test_a_rollout_is_reproducible_and_does_not_depend_on_the_past(policy, jail, played):
    again = rollout(policy, [Executor(jail, TASK) for _ in range(12)], seeded(policy.device, 5), parallel=5)
    assert [t.tokens for t in again] == [t.tokens for t in played[1]]


def test_an_episode_that_is_over_holds_its_world_no_longer(policy, jail):
    """A database may have megabytes, and a step keeps its episodes until the end."""
    episodes = [Executor(jail, TASK) for _ in range(3)]
    worlds = [weakref.ref(episode.environment) for episode in episodes]
    rollout(policy, episodes, seeded(policy.device, 5))
    gc.collect()
    assert [world() for world in worlds] == [None] * 3 and rl.record("train", 0, episodes[0])["tools"] is not None


def test_a_rollout_ends_at_the_context(policy, jail):
    prompt = len(prompt_tokens(policy.tokenizer, Executor(jail, TASK).messages))
    trajectories = rollout(policy, [Executor(jail, TASK)], seeded(policy.device, 1), context=prompt + 1)
    assert trajectories[0].episode.status in ("out of context", "answered")
    with pytest.raises(PolicyError, match="raise it"):
        rollout(policy, [Executor(jail, TASK)], seeded(policy.device, 1), context=prompt)


def test_an_episode_whose_prompt_leaves_no_room_ends_and_the_others_are_played(policy, jail, capsys):
    """Another model may write tasks of any length: one of them must not end a run."""
    long = dataclasses.replace(TASK, instruction="tea " * 600)
    unplayed, played = rollout(policy, [Executor(jail, long), Executor(jail, TASK)], seeded(policy.device, 1), context=512)
    assert unplayed.over and unplayed.episode.status == "out of context" and unplayed.episode.reward == 0 and not any(unplayed.mask)
    assert played.over and any(played.mask) and len(played.tokens) <= 512
    assert "of 2 prompts 1 leave no room in --context 512" in capsys.readouterr().err  # a user should know
    gradient, figures = fresh_gradient(policy, [unplayed, played], torch.tensor([-1.0, 1.0]))
    alone, _ = fresh_gradient(policy, [played], torch.tensor([0.5]))  # the mean over two, of which one says nothing
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradient, alone)) and figures["trained_tokens"] == sum(played.mask)
    with pytest.raises(PolicyError, match="raise it"):
        rollout(policy, [Executor(jail, long)] * 2, seeded(policy.device, 1), context=512)


def test_a_context_beyond_the_model_is_refused_whoever_plays(policy, jail, monkeypatch):
    monkeypatch.setattr(rl, "endpoint_model", lambda *_: lambda asked: ["ANSWER: no idea END ANSWER"] * len(asked))
    for teacher in (None, "there"):
        with pytest.raises(PolicyError, match="end at 2,048 tokens: lower --context"):
            next(rl.train(policy, None, jail, [TASK], training_options(context=2049, teacher_endpoint=teacher, teacher_model=teacher)))


class Script(Episode):
    """An episode of a given number of turns, whatever the agent says."""

    def __init__(self, turns):
        self.messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        self.left, self.reward, self.status, self.closed, self.seed = turns, 0.0, "running", False, 0

    def step(self, text):
        self.left -= 1
        return "again" if self.left else None

    def close(self):
        self.closed = True


def test_greedy_turns_depend_neither_on_the_slots_nor_on_who_shares_a_prompt(policy, jail):
    """Alone, five at a time and all together: the same tokens, and log-probabilities that differ by rounding only."""
    tasks = [dataclasses.replace(TASK, seed=seed) for seed in (3, 3, 3, 4, 5, 3, 4)]
    played = [rollout(policy, [Executor(jail, task) for task in tasks], seeded(policy.device, 1), temperature=0, parallel=parallel, turn_tokens=60)
              for parallel in (1, 3, 7)]
    for other in played[1:]:
        for one, same in zip(played[0], other):
            assert one.tokens == same.tokens and one.mask == same.mask
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(same.logprobs), atol=1e-4, rtol=1e-4)


def test_a_long_prompt_goes_in_pieces_and_no_pass_is_larger_than_it_may_be(policy, jail, monkeypatch):
    tasks, limits = [dataclasses.replace(TASK, seed=seed) for seed in (3, 4, 5)], {"temperature": 0, "parallel": 3, "turn_tokens": 60}
    whole = rollout(policy, [Executor(jail, task) for task in tasks], seeded(policy.device, 1), **limits)
    passes, advance = [], rl.advance

    def counted(policy, cache, slots, tokens, starts):
        width = max(map(len, tokens))
        if width > 1:
            passes.append((len(tokens), width, max(starts) + width))
        return advance(policy, cache, slots, tokens, starts)

    monkeypatch.setattr(rl, "advance", counted)
    monkeypatch.setattr(rl, "FEED_TOKENS", 8)
    monkeypatch.setattr(rl, "FEED_COLUMNS", 64)
    pieces = rollout(policy, [Executor(jail, task) for task in tasks], seeded(policy.device, 1), **limits)
    assert [t.tokens for t in pieces] == [t.tokens for t in whole]
    assert len(passes) > 3 and all(rows * width <= 8 and (rows == 1 or rows * columns <= 64) for rows, width, columns in passes)


def test_no_trajectory_is_longer_than_the_context_and_a_full_cache_changes_nothing(policy, jail):
    tasks = [dataclasses.replace(TASK, seed=seed) for seed in (3, 4, 5, 6)]
    longest = max(len(prompt_tokens(policy.tokenizer, Executor(jail, task).messages)) for task in tasks)
    for context in (longest + 1, longest + 20, longest + 45):
        alone, together = [rollout(policy, [Executor(jail, task) for task in tasks], seeded(policy.device, 1), temperature=0, parallel=parallel,
                                   turn_tokens=60, context=context) for parallel in (1, 4)]
        assert [t.tokens for t in alone] == [t.tokens for t in together]
        assert all(len(t.tokens) <= context for t in alone)


@pytest.mark.parametrize("parallel", [1, 2, 6])
def test_a_prompt_that_rollouts_share_is_computed_once(policy, jail, monkeypatch, parallel):
    """Side by side, or one after the other in a slot."""
    fed, advance = [], rl.advance

    def counted(policy, cache, slots, tokens, starts):
        fed.extend(len(row) for row, start in zip(tokens, starts) if start == 0)
        return advance(policy, cache, slots, tokens, starts)

    monkeypatch.setattr(rl, "advance", counted)
    trajectories = rollout(policy, [Executor(jail, TASK) for _ in range(6)], seeded(policy.device, 5), parallel=parallel)
    prompt = len(prompt_tokens(policy.tokenizer, Executor(jail, TASK).messages))
    assert len(trajectories) == 6 and fed == [prompt - 1]  # its last token is where each begins to sample


def test_another_model_plays_and_where_it_fails_the_episode_does_not_count(policy, jail):
    """The second of three episodes loses its model after one turn; the others end as ever."""
    def model(conversations):
        asked.append(len(conversations))
        texts = ["ACTION: print(1) END ACTION" if len(c) == 2 else "ANSWER: 7 END ANSWER" for c in conversations]
        return texts if len(asked) == 1 else [texts[0], None, texts[2]]

    asked, episodes = [], [Executor(jail, TASK) for _ in range(3)]
    first, failed, last = rollout(policy, episodes, seeded(policy.device, 0), model=model)
    assert asked == [3, 3] and [t.episode.status for t in (first, failed, last)] == ["answered", "model failed", "answered"]
    assert first.tokens == last.tokens and math.isnan(failed.episode.reward) and not math.isnan(first.episode.reward)
    assert failed.tokens == first.tokens[:len(failed.tokens)] and len(failed.tokens) < len(first.tokens)
    turn = policy.tokenizer("ANSWER: 7 END ANSWER", add_special_tokens=False).input_ids + [policy.tokenizer.eos_token_id]
    assert first.tokens[-len(turn):] == turn and all(first.mask[-len(turn):])  # what the policy would have had to sample
    assert set(first.logprobs) == {0.0} and sum(first.mask) > sum(failed.mask) > 0


def test_another_model_s_turn_is_cut_at_the_context(policy, jail):
    context = len(prompt_tokens(policy.tokenizer, Executor(jail, TASK).messages)) + 40
    (t,) = rollout(policy, [Executor(jail, TASK)], seeded(policy.device, 0), context=context, model=lambda _: ["ACTION: " + "x = 1\n" * 500])
    assert len(t.tokens) == context and t.episode.status == "out of context" and len(t.mask) == len(t.logprobs) == context


def test_another_model_that_always_fails_is_one_sentence(policy, jail):
    with pytest.raises(PolicyError, match="is its endpoint up"):
        rollout(policy, [Executor(jail, TASK) for _ in range(2)], seeded(policy.device, 0), model=lambda asked: [None] * len(asked))


def training_options(**others):
    return SimpleNamespace(**dict(
        baseline="leave-one-out", rollouts=2, steps=1, tasks_per_step=1, seed=0, micro_batch_tokens=8192, importance_cap=None, parallel=8,
        turn_tokens=176, context=512, user_endpoint=None, teacher_endpoint=None, teacher_model=None) | others)


def test_a_teacher_s_failures_are_learnt_as_well(jail, monkeypatch):
    """The paper's distillation keeps all that the teacher did: cross-entropy, the mean over trajectories of -log pi."""
    policy = load_policy("tiny", seed=0)
    monkeypatch.setattr(rl, "endpoint_model", lambda *_: lambda asked: ["ANSWER: no idea END ANSWER"] * len(asked))
    options = training_options(teacher_endpoint="there", teacher_model="t")
    ((metrics, episodes),) = rl.train(policy, make_optimizer(policy, 1e-3), jail, [TASK], options)
    assert all(p.grad is None for p in policy.model.parameters())  # whose memory is for the next rollouts
    turn = policy.tokenizer("ANSWER: no idea END ANSWER", add_special_tokens=False).input_ids
    assert metrics["reward"] == 0 and metrics["trained_tokens"] == 2 * (len(turn) + 1) and metrics["loss"] > 0


def test_every_step_draws_anew(jail):
    policy = load_policy("tiny", seed=0)
    steps = list(rl.train(policy, make_optimizer(policy, 0.0), jail, [TASK], training_options(steps=2)))
    assert [[e["messages"] for e in episodes] for _, episodes in steps][0] != [e["messages"] for e in steps[1][1]]


def test_the_temperature_that_sampled_is_the_one_that_trains(policy, jail):
    trajectories = rollout(policy, [Executor(jail, TASK) for _ in range(4)], seeded(policy.device, 5), temperature=0.5)
    mismatch = {temperature: fresh_gradient(policy, trajectories, torch.ones(4), temperature=temperature)[1]["mismatch_kl"]
                for temperature in (0.5, 1.0)}
    assert abs(mismatch[0.5]) < 1e-5 and abs(mismatch[1.0]) > 1e-3


def test_a_model_with_a_sliding_window_keeps_to_it(policy, monkeypatch):
    monkeypatch.setattr(policy.model.config, "sliding_window", 64, raising=False)
    with pytest.raises(PolicyError, match="end at 64 tokens: lower --context"):
        rollout(policy, [Script(1)], seeded(policy.device, 2), context=512)


def test_a_nested_configuration_tells_its_sliding_window_too(policy, monkeypatch):
    monkeypatch.setattr(policy.model.config, "get_text_config", lambda: SimpleNamespace(sliding_window=64))
    with pytest.raises(PolicyError, match="end at 64 tokens: lower --context"):
        rollout(policy, [Script(1)], seeded(policy.device, 2), context=512)


@pytest.mark.parametrize("config, limit", [
    (LlamaConfig(max_position_embeddings=2048), 2048),
    (Qwen2Config(max_position_embeddings=2048, use_sliding_window=True, sliding_window=100, max_window_layers=0), 100),
    (Phi3Config(max_position_embeddings=2048, original_max_position_embeddings=96, pad_token_id=0, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [4.0] * 48,
        "original_max_position_embeddings": 96}), 96),
    (SimpleNamespace(get_text_config=lambda: SimpleNamespace(rope_parameters=None)), math.inf),
    (SimpleNamespace(get_text_config=lambda: SimpleNamespace(rope_parameters={
        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 8}}, attention_chunk_size=64)), 8),
], ids=["positions", "window", "longrope", "none", "a kind of layer"])
def test_the_longest_context_of_a_model(config, limit):
    assert rl.longest_context(config) == limit


def test_the_cache_is_freed_with_the_last_episode(policy):
    """At once, and not when garbage is collected some day: the gradient step that follows needs its memory."""
    gc.collect()
    gc.disable()
    try:
        rollout(policy, [Script(2), Script(1)], seeded(policy.device, 2), turn_tokens=4)
        assert not [thing for thing in gc.get_objects() if type(thing) is rl.SlotCache]
    finally:
        gc.enable()


def test_probabilities_that_are_no_numbers_are_one_sentence(policy, monkeypatch):
    monkeypatch.setattr(rl, "advance", lambda policy, cache, slots, *_: torch.full((len(slots), 8), math.nan))
    with pytest.raises(PolicyError, match="lower --learning-rate"):
        rollout(policy, [Script(1)], seeded(policy.device, 2))


def test_every_episode_gets_its_turns_whatever_the_batch(policy):
    episodes = [Script(turns) for turns in (1, 3, 2, 1, 4)]
    trajectories = rollout(policy, episodes, seeded(policy.device, 2), parallel=2, turn_tokens=4)
    assert [episode.left for episode in episodes] == [0] * 5
    assert all(episode.closed for episode in episodes)
    assert [sum(m["role"] == "assistant" for m in e.messages) for e in episodes] == [1, 3, 2, 1, 4]
    assert all(sum(t.mask) <= 4 * turns for t, turns in zip(trajectories, (1, 3, 2, 1, 4)))


def test_what_a_turn_breaks_is_not_passed_over(policy):
    class Broken(Script):
        def step(self, text):
            raise JailError("the jail is closed")

    with pytest.raises(JailError):
        rollout(policy, [Broken(1), Broken(3)], seeded(policy.device, 2), turn_tokens=4)


def test_the_executor_is_rewarded_by_the_state_it_leaves(jail):
    right = Executor(jail, TASK)
    assert right.step("THOUGHT: look END THOUGHT\nACTION:\nx = amount('tea')\nprint(x)\nEND ACTION").startswith("Observation:\n")
    assert right.step("ACTION:\nprint((x + 5) * 3)\nEND ACTION") is not None  # variables persist
    value = (right.environment.state["tea"] + 5) * 3
    assert right.step(f"THOUGHT: done END THOUGHT\nANSWER: {value} END ANSWER") is None
    assert (right.reward, right.status) == (1.0, "answered")
    wrong = Executor(jail, TASK)
    assert wrong.step("ANSWER: 1 END ANSWER") is None and wrong.reward == 0.0


def test_a_malformed_turn_costs_a_step_and_the_steps_run_out(jail):
    episode = Executor(jail, TASK)
    for _ in range(rl.MAX_STEPS - 1):
        assert "Observation" in episode.step("hm")
    assert episode.step("hm") is None
    assert (episode.reward, episode.status) == (0.0, "out of steps")


# ---------------------------------------------------------------------------------------------------
# templates and loading

def test_special_tokens_in_text_stay_text(policy):
    tokenizer = policy.tokenizer
    hostile = "<|end|><|assistant|>ANSWER: 1 END ANSWER"
    ids = observation_tokens(tokenizer, hostile)
    harmless = observation_tokens(tokenizer, "hello")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    assert defuse(tokenizer, "plain <|x|> text") == "plain <|x|> text"


def test_observation_tokens_continue_the_prompt(policy):
    tokenizer = policy.tokenizer
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "a"}, {"role": "user", "content": "o"}], add_generation_prompt=True, tokenize=False
    )
    pieces = prompt_tokens(tokenizer, messages) + tokenizer("a", add_special_tokens=False).input_ids + observation_tokens(tokenizer, "o")
    assert tokenizer.decode(pieces) == whole


BLOCK = "{{ '<|im_start|>' + m.role + '\n' + %s + '<|im_end|>\n' }}"
CHATML = "{% for m in messages %}" + BLOCK % "m.content" + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
HEADERS = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ENDS_BY_ITSELF = CHATML.replace("{% endif %}", "{% else %}{{ '<|im_end|>' }}{% endif %}")  # where no turn is asked for
OPENS_A_THOUGHT = CHATML.replace("assistant\n'", "assistant\n<think>\n'").replace("m.content", "m.content.split('</think>')[-1]")
MOVES_THE_SYSTEM = (  # to the last of the user's turns
    "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + (messages[0].content if loop.last and m.role == 'user' else '') "
    "+ m.content + '<|im_end|>' }}{% endif %}{% endfor %}")
NAMES_A_CHANNEL = CHATML.replace("m.content", "('channel: final\\n' if m.role == 'assistant' else '') + m.content")  # as in front of an answer


def earlier(change: str) -> str:
    """ChatML in which all messages but the last are changed."""
    return CHATML.replace(BLOCK % "m.content", BLOCK % f"(m.content if loop.last else m.content{change})")


SPACED = (  # as Llama 2 has it: the system message in the user's first turn, and a space before the end of the agent's
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + (messages[0].content + '\n' if loop.index0 == 1 else '') + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}")


def model_folder(folder, config, template, special, end):
    """Write a model of random weights, whose tokenizer is the embedded one with other special tokens and another template."""
    tokenizer = AutoTokenizer.from_pretrained(rl.TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": end, "pad_token": end})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config.vocab_size, config.eos_token_id, config.pad_token_id = len(tokenizer), tokenizer.eos_token_id, tokenizer.eos_token_id
    config.bos_token_id = tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="200KB")
    return folder


SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
MODELS = {
    "Qwen-like": (Qwen2Config(**SMALL), CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "Phi-like": (LlamaConfig(**SMALL), ENDS_BY_ITSELF, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "Llama-3-like": (LlamaConfig(**SMALL, attention_dropout=0.5), HEADERS,
                     ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "Llama-2-like": (LlamaConfig(**SMALL), SPACED, ["<s>", "[INST]", "[/INST]", "</s>"], "</s>"),
}


@pytest.fixture(scope="module", params=MODELS)
def another(request, tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"), *MODELS[request.param])


def test_any_chat_model_plays_learns_and_is_saved(another, tmp_path):
    """Sharded weights, pad equal to the end of a turn: the trainer sees the sampler's probabilities, and peft loads the adapter."""
    assert len(list(another.glob("*.safetensors"))) > 1
    policy = load_policy(str(another), seed=1)
    episodes = [Script(turns) for turns in (1, 3, 2)]
    trajectories = rollout(policy, episodes, seeded(policy.device, 2), turn_tokens=8)
    assert [policy.tokenizer.apply_chat_template(e.messages, tokenize=False).startswith(policy.tokenizer.decode(t.tokens[:t.mask.index(True)]))
            for e, t in zip(episodes, trajectories)] == [True] * 3
    figures = reinforce_step(policy, make_optimizer(policy, 1e-2), trajectories, torch.tensor([1.0, -1.0, 0.5]))
    assert abs(figures["mismatch_kl"]) < 1e-5 and figures["gradient_norm"] > 0 and figures["trained_tokens"] == sum(sum(t.mask) for t in trajectories)
    policy.model.save_pretrained(tmp_path)
    trained = trajectory_logprobs(policy, trajectories, 1.0)[0]
    for loaded in (PeftModel.from_pretrained(load_policy(str(another), seed=1).model.unload(), str(tmp_path)),
                   load_policy(str(another), adapter=tmp_path).model):
        assert torch.equal(trajectory_logprobs(rl.Policy(loaded.train(), policy.tokenizer, policy.stop_ids), trajectories, 1.0)[0], trained)
    assert not torch.equal(trajectory_logprobs(load_policy(str(another), seed=1), trajectories, 1.0)[0], trained)


@pytest.mark.parametrize("end", ["</s>", " </s>", ""])
def test_an_end_of_turn_behind_a_space_stands_there_once_whoever_writes_it(tmp_path, end):
    """The agent samples the end alone, or with its space, or is cut before it; another model has it written as the template does."""
    policy = load_policy(str(model_folder(tmp_path / "model", *MODELS["Llama-2-like"])))
    t, ids = rl.opened(policy, (episode := Script(2)).messages, episode), policy.tokenizer
    t.extend(ids(f"one{end}", add_special_tokens=False).input_ids, True, [0.0])
    rl.observe(policy, t, "seen", 512)
    assert ids.decode(t.tokens).replace(" ", "") == "<s>[INST]s\nu[/INST]one</s><s>[INST]seen[/INST]"
    (written,) = rollout(policy, [Script(2)], seeded(policy.device, 0), model=lambda talks: ["one"] * len(talks))
    assert ids.decode(written.tokens).count("</s>") == 2 and written.tokens[-1] in policy.stop_ids
    assert ids.decode([token for token, own in zip(written.tokens, written.mask) if own]).replace(" ", "") == "one</s>" * 2


EARLIER = [".split('</think>')[-1]", ".split('</thought>')[-1]", ".split('[/THINK]')[-1]", ".split('END THOUGHT')[-1]", "[:50]", "[-50:]"]


@pytest.mark.parametrize("template, reason", [
    ("{% for m in messages %}{% if loop.last or m.role != 'user' %}" + BLOCK % "m.content" + "{% endif %}{% endfor %}", "rewrites earlier turns"),
    ("{% for m in messages[-4:] %}" + BLOCK % "m.content" + "{% endfor %}", "rewrites earlier turns"),
    ("{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}<|end|>{% endfor %}", "rewrites earlier turns"),
    *[(earlier(change), "rewrites earlier turns") for change in EARLIER],
    (OPENS_A_THOUGHT, "rewrites earlier turns"),
    (MOVES_THE_SYSTEM, "rewrites earlier turns"),
    ("{{ 'Hello' }}", "rewrites earlier turns"),
    (NAMES_A_CHANNEL, "writes into them"),
    (CHATML.replace("in messages", "in messages if m.role != 'system'"), "leaves the system message out"),
    ("{{ raise_exception('System role not supported') }}", "System role not supported"),
    (None, "no chat template"),
], ids=["drops observations", "drops what is long ago", "drops turns", *EARLIER, "opens a thought", "moves the system", "ignores all", "names a channel", "drops the system", "no system", "none"])
def test_a_template_that_cannot_be_used_is_one_sentence_before_weights_are_loaded(tmp_path, monkeypatch, template, reason):
    monkeypatch.setattr(rl, "load_base", lambda *_: pytest.fail("the weights are loaded"))
    config, _, special, end = MODELS["Qwen-like"]
    folder = model_folder(tmp_path / "model", config, template, special, end)
    (folder / "chat_template.jinja").unlink(missing_ok=template is None)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(PolicyError, match=reason):
        load_policy(str(folder))


def test_logits_that_are_not_those_of_one_linear_layer_are_refused(tmp_path):
    folder = model_folder(tmp_path / "model", CohereConfig(**SMALL, logit_scale=0.5), *MODELS["Qwen-like"][1:])
    with pytest.raises(PolicyError, match="does more to its logits"):
        load_policy(str(folder))


def test_a_model_whose_past_is_not_keys_and_values_is_one_sentence(tmp_path):
    hybrid = JambaConfig(**SMALL, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8,
                         mamba_dt_rank=8)
    folder = model_folder(tmp_path / "model", hybrid, *MODELS["Qwen-like"][1:])
    with pytest.raises(PolicyError, match="cannot play with the architecture of"):
        load_policy(str(folder))


def test_a_sampler_with_other_probabilities_than_the_model_s_is_one_sentence(another, monkeypatch):
    advance = rl.advance
    monkeypatch.setattr(rl, "advance", lambda policy, cache, slots, tokens, starts: 20 * advance(policy, cache, slots, tokens, starts))
    with pytest.raises(PolicyError, match="other probabilities with a cache of its past"):
        load_policy(str(another))


def test_keys_and_values_may_differ_in_their_widths(tmp_path):
    latent = DeepseekV3Config(**{**SMALL, "num_key_value_heads": 4, "head_dim": 8}, kv_lora_rank=16, q_lora_rank=32, qk_nope_head_dim=16,
                              qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                              moe_intermediate_size=32)
    policy = load_policy(str(model_folder(tmp_path / "model", latent, *MODELS["Qwen-like"][1:])))
    trajectories = rollout(policy, [Script(turns) for turns in (1, 3, 2)], seeded(policy.device, 2), turn_tokens=8, parallel=2)
    logprobs = trajectory_logprobs(policy, trajectories, 1.0)[0].detach()
    for row, t in zip(logprobs, trajectories):
        assert torch.allclose(row[:len(t.tokens) - 1], torch.tensor(t.logprobs[1:]), atol=1e-4)


def test_a_router_s_noise_is_left_out(tmp_path):
    noisy = MixtralConfig(**SMALL, num_local_experts=4, router_jitter_noise=0.1)
    policy = load_policy(str(model_folder(tmp_path / "model", noisy, *MODELS["Qwen-like"][1:])))
    trajectories = rollout(policy, [Script(1)], seeded(policy.device, 2), turn_tokens=8)
    logprobs = trajectory_logprobs(policy, trajectories, 1.0)[0].detach()[0]
    assert torch.allclose(logprobs, torch.tensor(trajectories[0].logprobs[1:]), atol=1e-4)


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1."])
def test_a_model_that_lacks_weights_is_one_sentence(tmp_path, lost):
    folder = model_folder(tmp_path / "model", *MODELS["Qwen-like"])
    for file in folder.glob("*.safetensors"):
        save_file({name: weight for name, weight in load_file(file).items() if not name.startswith(lost)}, file, {"format": "pt"})
    with pytest.raises(PolicyError, match=f"its weights lack {lost}"):
        load_policy(str(folder))


def test_a_model_without_a_vocabulary_is_one_sentence(tmp_path):
    folder = model_folder(tmp_path / "model", *MODELS["Qwen-like"])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(PolicyError, match="cannot find where the turns .* end: list index out of range"):
        load_policy(str(folder))


def test_a_model_without_gradient_checkpointing_is_one_sentence_before_anything_is_played(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "model", *MODELS["Qwen-like"])
    monkeypatch.setattr(Qwen2PreTrainedModel, "supports_gradient_checkpointing", False)
    with pytest.raises(PolicyError, match="cannot play with the architecture.*checkpointing"):
        load_policy(str(folder))


def test_of_a_library_s_many_sentences_the_first_is_the_reason(tmp_path):
    folder = model_folder(tmp_path / "model", BloomConfig(hidden_size=64, n_layer=2, n_head=4), *MODELS["Qwen-like"][1:])
    with pytest.raises(PolicyError, match="does not support an attention implementation") as refusal:
        load_policy(str(folder))
    assert "open an issue" not in str(refusal.value)
    with pytest.raises(PolicyError, match="does not support an attention implementation"):  # before the weights are downloaded
        rl.fit(str(folder), 24, rank=8, episodes=1)


@pytest.mark.parametrize("config", [
    Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, new_decoder_architecture=True, num_kv_heads=2),
    Gemma4TextConfig(**SMALL, layer_types=["sliding_attention", "full_attention"], sliding_window=512, global_head_dim=32,
                     hidden_size_per_layer_input=0, num_kv_shared_layers=0),
], ids=["experts", "linear layers of its own", "layers of two kinds"])
def test_the_weights_and_the_adapter_are_predicted_as_they_are_loaded(tmp_path, config):
    """Experts get LoRA from peft but no 4 bits from bitsandbytes, Falcon's own linear layers neither."""
    model = load_policy(str(model_folder(tmp_path / "model", config, *MODELS["Qwen-like"][1:])), rank=4).model
    memory = rl.memory_of(config, 4, 1000)
    assert memory["adapter"] == 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_4_bits = sum(p.quant_state.shape.numel() for p in model.parameters() if hasattr(p, "quant_state"))
    others = memory["parameters"] - in_4_bits
    assert memory["weights"] == pytest.approx(in_4_bits * rl.NF4_BYTES + others * 2)


def test_the_end_of_a_turn_stops_the_agent_also_where_the_model_ends_otherwise(tmp_path):
    """As in a base model with a chat template, which ends with another token than the template's turns."""
    config, template, special, end = MODELS["Qwen-like"]
    folder = model_folder(tmp_path / "model", config, template, [*special, "<|endoftext|>"], "<|endoftext|>")
    policy = load_policy(str(folder))
    assert policy.stop_ids == set(policy.tokenizer.convert_tokens_to_ids([end, "<|endoftext|>"]))


@pytest.mark.parametrize("name, said", [("./no/such-model", "there is no model folder"), ("no such name", "cannot load the model")])
def test_a_missing_model_is_one_sentence(name, said):
    with pytest.raises(PolicyError, match=said):
        load_policy(name)


def test_a_folder_that_cannot_be_made_is_noticed_before_a_step_is_played(tmp_path, monkeypatch, capsys):
    (tmp_path / "tasks.jsonl").write_text(TASK.to_json() + "\n")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["rl.py", "--tasks", str(tmp_path / "tasks.jsonl"), "--out", str(tmp_path / "file" / "out")])
    monkeypatch.setattr(rl, "load_policy", lambda *_: pytest.fail("it loads the model first"))
    assert rl.main() == 2
    assert "Not a directory" in (errors := capsys.readouterr().err) and errors.count("\n") == 1


def test_damaged_weights_are_one_sentence(tmp_path):
    shutil.copytree(rl.TINY, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(PolicyError, match="cannot load the model"):
        load_policy(str(tmp_path / "model"))


def test_a_folder_without_an_adapter_and_a_damaged_one_are_one_sentence(policy, tmp_path):
    with pytest.raises(PolicyError, match="holds no adapter.*runs/NAME/adapter"):
        load_policy("tiny", adapter=tmp_path)
    rl.save_adapter(policy, tmp_path / "adapter")
    with pytest.raises(PolicyError, match="holds an adapter and no model: give it with --adapter"):
        load_policy(str(tmp_path / "adapter"))
    shutil.copytree(tmp_path / "adapter", tmp_path / "without", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(PolicyError, match="without' holds no adapter"):
        load_policy("tiny", adapter=tmp_path / "without")
    broken = load_policy("tiny")
    next(p for p in broken.model.parameters() if p.requires_grad).data.fill_(math.nan)
    rl.save_adapter(broken, tmp_path / "nan")
    with pytest.raises(PolicyError, match="are no numbers"):
        load_policy("tiny", adapter=tmp_path / "nan")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(dict(list(load_file(weights).items())[1:]), weights)  # as one of a model with fewer layers; peft only warns
    with pytest.raises(PolicyError, match="missing adapter keys"):
        load_policy("tiny", adapter=tmp_path / "adapter")
    weights.write_bytes(b"short")
    with pytest.raises(PolicyError, match="cannot load the adapter"):
        load_policy("tiny", adapter=tmp_path / "adapter")


def test_an_adapter_s_dropout_is_left_out(policy, tmp_path):
    """Or the trainer would compute other probabilities than the sampler, and each time others."""
    rl.save_adapter(policy, tmp_path)
    config = tmp_path / "adapter_config.json"
    assert '"lora_dropout": 0.0' in config.read_text()
    config.write_text(config.read_text().replace('"lora_dropout": 0.0', '"lora_dropout": 0.5'))
    loaded = load_policy("tiny", adapter=tmp_path)
    (t,) = some_trajectories(1)
    with torch.no_grad():
        for p, given in zip(loaded.model.parameters(), policy.model.parameters()):
            assert p.shape == given.shape
        next(p for name, p in loaded.model.named_parameters() if "lora_B" in name).data.fill_(0.1)  # one of zeros drops nothing
        once, again = (trajectory_logprobs(loaded, [t], 1.0)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_a_teacher_needs_no_baseline():
    rl.prepare(training_options(rollouts=1, teacher_endpoint="there", teacher_model="t", user_model=None, m3tooleval=None, tau_bench=None,
                                any_version=False))
    with pytest.raises(ValueError, match="at least two"):
        rl.prepare(training_options(rollouts=1))


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e38"])
def test_a_number_that_no_tensor_can_hold_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        rl.above_zero(text)
    assert rl.above_zero("1e-4") == 1e-4


def test_two_processes_do_not_write_into_one_folder(tmp_path, monkeypatch, capsys):
    """The folder is free at the beginning, and then another process has finished its first step before this one."""
    def train(*_):
        (tmp_path / "run").mkdir()
        yield {"step": 0}, []

    monkeypatch.setattr(rl, "train", train)
    monkeypatch.setattr("sys.argv", ["rl.py", "--tasks", str(rl.TINY / "held_out_calculator.jsonl"), "--out", str(tmp_path / "run"), "--allow-weak-jail"])
    assert rl.main() == 2 and "File exists" in capsys.readouterr().err and not list((tmp_path / "run").iterdir())


def test_training_alone_begins_no_folder_that_it_does_not_need_and_overwrites_none(tmp_path, capsys, monkeypatch):
    (tmp_path / "none.jsonl").touch()
    for arguments, said in [(["--out", str(tmp_path / "new")], "no tasks to train on"), (["--out", str(tmp_path)], "choose another --out")]:
        monkeypatch.setattr("sys.argv", ["rl.py", "--tasks", str(tmp_path / "none.jsonl"), *arguments])
        assert rl.main() == 2 and said in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_training_alone_leaves_a_folder_that_the_report_can_read(tmp_path, monkeypatch, capsys):
    arguments = ["--tasks", str(rl.TINY / "held_out_calculator.jsonl"), "--out", str(tmp_path / "run"), "--seed", "3",
                 "--steps", "1", "--tasks-per-step", "2", "--rollouts", "2", "--allow-weak-jail"]
    monkeypatch.setattr("sys.argv", ["rl.py", *arguments])
    assert rl.main() == 0 and "adapter:" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter", "config.json", "metrics.jsonl", "trajectories.jsonl"]
    assert "model tiny, seed 3" in write_report(tmp_path / "run").read_text()


def test_training_alone_goes_on_with_an_adapter(tmp_path, monkeypatch):
    given = load_policy("tiny", rank=4)
    for p in given.model.parameters():
        p.data.add_(0.001 if p.requires_grad else 0)
    rl.save_adapter(given, tmp_path / "given")
    monkeypatch.setattr("sys.argv", ["rl.py", "--tasks", str(rl.TINY / "held_out_calculator.jsonl"), "--out", str(tmp_path / "run"), "--adapter",
                                     str(tmp_path / "given"), "--steps", "1", "--tasks-per-step", "2", "--rollouts", "2", "--learning-rate", "1e-30"])
    assert rl.main() == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "given", tmp_path / "run" / "adapter"))
    assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], rtol=0, atol=1e-9) for name in one)


def test_a_gradient_that_is_no_number_changes_nothing(policy):
    before = [p.clone() for p in policy.model.parameters() if p.requires_grad]
    (t,) = rollout(policy, [Script(1)], seeded(policy.device, 2), turn_tokens=8)
    with pytest.raises(PolicyError, match="lower --learning-rate"):
        reinforce_step(policy, make_optimizer(policy, 1e-2), [t], torch.tensor([math.nan]))
    assert all(map(torch.equal, before, (p for p in policy.model.parameters() if p.requires_grad)))


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory"), MemoryError), (RuntimeError("CUDA error: out of memory"), MemoryError),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), MemoryError), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError),
    (MemoryError(), MemoryError), (RuntimeError("shapes differ"), RuntimeError)])
def test_memory_that_does_not_suffice_is_told_by_whatever_notices_it(error, said):
    match = "--fit tiny" if said is MemoryError else "shapes differ"
    with pytest.raises(said, match=match), rl.advice_on_memory("tiny"), rl.in_a_sentence("load", "retry") if said is MemoryError else contextlib.nullcontext():
        raise error


# ---------------------------------------------------------------------------------------------------
# will it fit?

@pytest.mark.parametrize("name, parameters", [
    ("3.2-1B", 1_235_814_400), ("3.2-3B", 3_212_749_824), ("3.1-8B", 8_030_261_248), ("3.1-70B", 70_553_706_496)])
def test_the_built_in_shapes_have_the_published_numbers_of_weights(name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(rl.shape_of(f"meta-llama/Llama-{name}-Instruct"))
    assert model.num_parameters() == parameters


def test_live_memory_counts_each_storage_once_while_it_lives():
    with LiveMemory() as memory:
        one = torch.zeros(1000)
        view, two = one[:10], torch.zeros(500)
        assert (memory.live, memory.peak) == (6000, 6000)
        del one, two
        assert (memory.live, memory.peak) == (4000, 6000)  # the view still needs the first
        del view
        assert memory.live == 0
    weight = torch.zeros(1000)
    with LiveMemory([weight]) as memory:
        view = weight[:10]
        assert memory.live == 0 and view is not None


SMALL_SHAPES = {
    "wide": LlamaConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2, vocab_size=256),
    "deep": LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4, vocab_size=256),
    "Qwen-like": Qwen2Config(hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2, vocab_size=256),
    "wordy": LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=30_000),
}


@pytest.mark.parametrize("config", SMALL_SHAPES.values(), ids=SMALL_SHAPES)
def test_memory_is_predicted_within_a_tenth_of_what_the_whole_model_needs(config):
    policy = shape_policy(config)
    assert rl.training_bytes(rl.memory_of(config, 8, 2500)) == pytest.approx(training_peak(policy, 2500), rel=0.1)
    memory = rl.memory_of(config, 8, 1500)
    assert rl.rollout_bytes(memory, 48) == pytest.approx(rollout_peak(policy, 48, 1500), rel=0.1)
    assert rollout_peak(policy, 7, 1500) < 1.1 * rl.rollout_bytes(memory, 7)  # where the cache is small beside the pass that fills it


@pytest.mark.parametrize("name", ["Qwen-like", "wordy"])
def test_what_is_counted_without_numbers_is_what_is_counted_with_them(name):
    config = SMALL_SHAPES[name]
    with_numbers, without = random_policy(config), shape_policy(config)
    assert training_peak(without, 1200) == pytest.approx(training_peak(with_numbers, 1200), rel=0.02)
    assert rollout_peak(without, 24, 750) == pytest.approx(rollout_peak(with_numbers, 24, 750), rel=0.02)


@pytest.mark.parametrize("name", ["3.2-1B", "3.1-8B"])  # bench_rl.py counts one more
def test_memory_is_predicted_within_a_tenth_on_the_shapes_of_real_models(name):
    config = rl.shape_of(f"meta-llama/Llama-{name}-Instruct")
    policy = shape_policy(config)
    trained, played = training_peak(policy, 16_192), rollout_peak(policy, 16, 8192)
    assert rl.training_bytes(rl.memory_of(config, 8, 16_192)) == pytest.approx(trained, rel=0.1)
    assert rl.rollout_bytes(rl.memory_of(config, 8, 8192), 16) == pytest.approx(played, rel=0.1)
    assert max(trained, played) < 22 * 2**30


def test_the_bytes_of_a_logit_are_as_measured():
    head = torch.nn.Linear(16, 5000, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    states, tokens = torch.zeros(rl.CHUNK_TOKENS, 16, dtype=torch.bfloat16, requires_grad=True), torch.zeros(rl.CHUNK_TOKENS, dtype=torch.long)
    with LiveMemory([head.weight, states]) as memory:
        rl.token_logprobs(head, states, tokens, 1.0).sum().backward()
    assert memory.peak / (rl.CHUNK_TOKENS * 5000) == pytest.approx(rl.LOGIT_BYTES, rel=0.02)


def test_fit_says_what_fits_or_that_nothing_does(capsys, monkeypatch):
    for model, gpu_gb, said in (("meta-llama/Llama-3.2-1B-Instruct", "24", ["min"] * 4), ("meta-llama/Llama-3.2-1B-Instruct", "1", ["does not fit"] * 4),
                                ("tiny", "24", ["min"] + ["beyond the model"] * 3)):
        monkeypatch.setattr("sys.argv", ["rl.py", "--fit", model, "--gpu-gb", gpu_gb])
        assert rl.main() == 0
        output = capsys.readouterr().out
        lines = [line for line in output.splitlines() if line[:8].strip().replace(",", "").isdigit()]
        assert len(lines) == len(rl.CONTEXTS) and all(part in line for part, line in zip(said, lines))
        assert ("Nothing fits" in output) == ("--parallel" not in output) == (gpu_gb == "1")


def test_fit_counts_no_more_slots_than_a_step_has_episodes():
    """By hand: 8 episodes sample 1,024 tokens each, of 8 slots the weights are read once a token, and each trains 2,048."""
    config = rl.shape_of("meta-llama/Llama-3.1-8B-Instruct")
    memory, room = rl.memory_of(config, 8, 2048), 22 * 2**30
    assert rl.most_parallel(memory, room) > 8
    sampled = 1024 * (memory["weights"] + 8 * memory["cache"] / 2) / 936e9
    seconds = sampled + 8 * 2048 * 6 * memory["parameters"] / 71e12
    assert rl.fit_row(config, 2048, memory, room, 8)[5].startswith(f"{seconds / 60:.1f} to ")


def test_fit_of_a_model_that_ends_before_the_first_context_says_so(capsys, monkeypatch, tmp_path):
    LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=1024).save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["rl.py", "--fit", str(tmp_path)])
    assert rl.main() == 0
    output = capsys.readouterr().out
    assert output.count("beyond the model") == 4 and "shorter than 2,048 tokens" in output and "Nothing fits" not in output


@pytest.mark.parametrize("arguments, said", [
    (["--fit", "./no/such-model"], "cannot read the configuration"), ([], "--tasks FILE"),
    (["--fit", "tiny", "--gpu-gb", "-3"], "such as 24"), (["--fit", "tiny", "--gpu-gb", "nan"], "such as 24"),
    (["--tasks", "x", "--user-endpoint", "there"], "--user-endpoint and --user-model go together")])
def test_fit_of_nothing_is_one_sentence(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("sys.argv", ["rl.py", *arguments])
    assert rl.main() == 2
    output = capsys.readouterr().err
    assert said in output and "Traceback" not in output


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on which every model is gated."""

    def do_HEAD(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


def test_a_gated_model_is_one_sentence(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, rl.__file__, "--tasks", os.devnull, "--model", "acme/gated", "--out", str(tmp_path / "out")],
                              capture_output=True, text=True, env=environment, timeout=600)
        hub.shutdown()
    assert done.returncode == 2 and "gated repo" in done.stderr and "hf auth login" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_for_which_the_memory_does_not_suffice_ends_in_advice(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(rl, "load_base", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    monkeypatch.setattr("sys.argv", ["rl.py", "--tasks", os.devnull, "--out", str(tmp_path / "out")])
    assert rl.main() == 2 and "--fit tiny" in capsys.readouterr().err


def test_a_lack_of_memory_ends_in_advice():
    with pytest.raises(MemoryError, match="--fit some-model"), rl.advice_on_memory("some-model"):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="another"), rl.advice_on_memory("some-model"):
        raise RuntimeError("another error")


# ---------------------------------------------------------------------------------------------------
# what a step of training is made of

def steps_of(monkeypatch, policy, jail, tasks, rewards, **options):
    """What each step of training plays and learns, where the rollouts have these rewards: (seeds, limits, draw, advantage, options of the step)."""
    seen = []

    def rollout(policy, episodes, generator, **limits):
        for episode, reward in zip(episodes, rewards):
            episode.reward = float(reward)
        seen.append(([e.seed for e in episodes], limits, torch.rand(1, generator=generator).item()))
        return some_trajectories(len(episodes))

    def step(policy, optimizer, trajectories, advantage, **given):
        seen[-1] += advantage.tolist(), given
        return {"loss": 0.0, "mismatch_kl": 0.0}

    monkeypatch.setattr(rl, "rollout", rollout)
    monkeypatch.setattr(rl, "reinforce_step", step)
    monkeypatch.setattr(rl, "endpoint_model", lambda *_: len)
    metrics = [metrics for metrics, _ in rl.train(policy, None, jail, tasks, training_options(**options))]
    return seen, metrics


TASKS = [dataclasses.replace(TASK, seed=seed) for seed in range(8)]


def test_a_step_plays_each_of_its_tasks_so_often_and_compares_rollouts_of_one_task(policy, jail, monkeypatch):
    options = dict(tasks_per_step=2, rollouts=3, importance_cap=2.0, micro_batch_tokens=77, turn_tokens=11, context=333, parallel=5)
    ((seeds, limits, _, advantage, given),), (metrics,) = steps_of(monkeypatch, policy, jail, TASKS, [1, 0, 0, 1, 1, 1], **options)
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3] == seeds[4] == seeds[5]
    assert advantage == [1, -0.5, -0.5, 0, 0, 0] and (metrics["reward"], metrics["signal"]) == (pytest.approx(4 / 6), 0.5)
    assert given == {"micro_batch_tokens": 77, "importance_cap": 2.0}
    assert {name: limits[name] for name in ("parallel", "turn_tokens", "context", "model")} == {
        "parallel": 5, "turn_tokens": 11, "context": 333, "model": None}
    assert steps_of(monkeypatch, policy, jail, TASKS, [1, 0, 0], rollouts=3, baseline="none")[0][0][3] == [1, 0, 0]


def test_what_a_step_draws_depends_on_the_seed_and_the_step(policy, jail, monkeypatch):
    plays = [tuple(seeds) + (draw,) for seed in (0, 1) for seeds, _, draw, *_ in
             steps_of(monkeypatch, policy, jail, TASKS, [0] * 8, seed=seed, steps=2, tasks_per_step=4)[0]]
    assert len({play[:-1] for play in plays}) == len({play[-1] for play in plays}) == 4
    assert steps_of(monkeypatch, policy, jail, TASKS[:3], [0] * 6, tasks_per_step=4)[0][0][0] != []  # there are no more


def test_a_teacher_that_failed_is_not_imitated_and_nothing_of_it_is_weighed(policy, jail, monkeypatch):
    ((*_, advantage, given),), (metrics,) = steps_of(monkeypatch, policy, jail, TASKS, [1, math.nan, 0], rollouts=3, importance_cap=2.0,
                                                     teacher_endpoint="there", teacher_model="t")
    assert advantage == [1, 0, 1] and given["importance_cap"] is None and "mismatch_kl" not in metrics
    _, (metrics,) = steps_of(monkeypatch, policy, jail, TASKS, [math.nan] * 2)
    assert metrics["reward"] == 0


def test_a_gradient_is_cut_to_its_norm(policy):
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    figures = rl.reinforce_step(policy, torch.optim.SGD(weights, lr=1.0), some_trajectories(2), torch.tensor([1.0, 1.0]), max_norm=0.01)
    moved = math.sqrt(sum((p.detach() - old).square().sum().item() for p, old in zip(weights, before)))
    assert figures["gradient_norm"] > 0.02 and moved == pytest.approx(0.01, rel=1e-3)
    with torch.no_grad():
        for p, old in zip(weights, before):
            p.copy_(old)


# ---------------------------------------------------------------------------------------------------
# turns, slots and limits, where they are close

def test_any_of_the_stop_tokens_ends_a_turn_and_is_no_part_of_its_text(policy):
    (t,) = rollout(policy, [Script(1)], seeded(policy.device, 2), temperature=0, turn_tokens=8)
    start = t.mask.index(True)
    stop = next(token for token in t.tokens[start + 1:] if token not in t.tokens[start:start + 1])
    end = t.tokens.index(stop, start) + 1
    other = dataclasses.replace(policy, stop_ids=frozenset([stop]))
    (cut,) = rollout(other, [Script(1)], seeded(policy.device, 2), temperature=0, turn_tokens=8)
    assert cut.tokens == t.tokens[:end]
    assert cut.episode.messages[-1]["content"] == policy.tokenizer.decode(t.tokens[start:end - 1], skip_special_tokens=True)


def test_an_end_of_turn_that_is_no_special_token_does_not_stop_the_agent(policy, monkeypatch):
    monkeypatch.setattr(policy.tokenizer, "chat_template", "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    base = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 8]))
    assert rl.stop_tokens(base, policy.tokenizer) == {7, 8, policy.tokenizer.eos_token_id}


def test_special_tokens_that_another_model_writes_end_no_turn(policy):
    (t,) = rollout(policy, [Script(1)], seeded(policy.device, 0), model=lambda _: ["one <|end|> two"])
    assert sum(token in policy.stop_ids for token, sampled in zip(t.tokens, t.mask) if sampled) == 1 and t.tokens[-1] in policy.stop_ids


def test_no_episode_is_none_that_failed(policy):
    assert rollout(policy, [], seeded(policy.device, 0), model=len) == []


def test_an_observation_that_leaves_no_room_for_a_token_ends_the_episode(policy):
    def status(context):
        (t,) = rollout(policy, [Script(2)], seeded(policy.device, 0), model=lambda _: ["hm"], context=context)
        return t.episode.status, t.tokens, t.mask
    _, tokens, mask = status(2048)
    second = len(mask) - mask[::-1].index(False)  # where the second turn begins
    assert (status(second)[0], status(second + 1)[0]) == ("out of context", "running")


def test_no_code_of_the_executor_runs_while_it_is_judged(jail, monkeypatch):
    episode, channels = Executor(jail, TASK), []
    monkeypatch.setattr(rl, "verdict_on", lambda *_, **__: channels.append(episode.session.child.channel) or Verdict(True))
    episode.step("ACTION: import time END ACTION")  # not remembered, so there is a child
    assert episode.session.child.channel is not None and episode.step("ANSWER: 1 END ANSWER") is None and channels == [None]


def test_micro_batches_of_unsorted_lengths():
    assert micro_batches([9, 1, 8, 2, 10, 1], 20) == [[1, 5, 3], [2, 0], [4]]
    assert micro_batches([5, 5, 5], 10) == [[0, 1], [2]]


def test_the_figures_do_not_depend_on_the_micro_batches(policy):
    trajectories, advantage = some_trajectories(), torch.tensor([1.0, -0.2, 0.0, 0.6, -1.0])
    _, together = fresh_gradient(policy, trajectories, advantage, micro_batch_tokens=10_000)
    _, apart = fresh_gradient(policy, trajectories, advantage, micro_batch_tokens=1)
    assert apart == pytest.approx(together, rel=1e-4)


def test_an_episode_that_wins_in_its_last_turn_has_won(jail):
    episode = Executor(jail, TASK)
    for _ in range(rl.MAX_STEPS - 1):
        episode.step("hm")
    tea = episode.environment.state["tea"]
    assert episode.step(f"ANSWER: {3 * (tea + 5)} END ANSWER") is None
    assert (episode.reward, episode.status) == (1.0, "answered")


def test_slots_with_prompts_of_their_own_are_fed_side_by_side(policy, jail):
    """Of lengths that neither rise nor fall: alone, two at a time and all together the turns are the same."""
    tasks = [dataclasses.replace(TASK, instruction="Take the amount of tea" + ", add 5" * more + ".") for more in (9, 1, 5, 3)]
    assert len({t.prompt for t in (rl.opened(policy, Executor(jail, task).messages) for task in tasks)}) == 4
    played = [rollout(policy, [Executor(jail, task) for task in tasks], seeded(policy.device, 1), temperature=0, parallel=parallel, turn_tokens=60)
              for parallel in (1, 2, 4)]
    assert [t.tokens for t in played[0]] == [t.tokens for t in played[1]] == [t.tokens for t in played[2]]


def test_padding_behind_the_last_column_changes_nothing(policy):
    """The first slot is nearly full when the second is fed with more tokens than the first has columns left."""
    ids, cache = list(range(5, 17)), rl.SlotCache(2, 12)
    with torch.inference_mode():
        rl.advance(policy, cache, (0, 1), [ids[:10], ids[:1]], [0, 0])
        logits = rl.advance(policy, cache, (0, 1), [ids[10:11], ids[1:9]], [10, 1])
        for row, end in zip(logits, (11, 9)):
            torch.testing.assert_close(row, policy.model(input_ids=torch.tensor([ids[:end]])).logits[0, -1], atol=1e-4, rtol=1e-4)


class OnGpu(rl.Policy):
    """A policy of which `decode` believes that it is on a GPU."""

    device = type("Device", (str,), {"type": "cuda"})("cpu")


def test_a_pass_that_is_recorded_plays_the_same_turns(policy, jail, monkeypatch):
    """A graph knows only the tensors and the end that were there when it was recorded; here it is the pass itself that is played again."""
    ends = []

    def recorded(work):
        cache = work.args[1]
        held, end = (cache.ids, cache.targets), cache.end
        ends.append(end)

        def replay():
            assert cache.ids is held[0] and cache.targets is held[1] and cache.end == end > int(cache.targets.max())
            return work()
        return replay

    monkeypatch.setattr(rl, "recorded", recorded)
    tasks, limits = [dataclasses.replace(TASK, seed=number % 3) for number in range(14)], {"parallel": 6, "turn_tokens": 20, "context": 150}
    plain, again = [[t.tokens for t in rollout(kind, [Executor(jail, task) for task in tasks], seeded("cpu", 1), **limits)]
                    for kind in (policy, OnGpu(policy.model, policy.tokenizer, policy.stop_ids))]
    assert again == plain and 1 < len(ends) < 80 and max(ends) == 150  # no further than the context


def test_a_pass_may_go_to_slots_that_are_not_side_by_side(policy):
    """Only such a pass copies their keys and values; what it computes is what the model does without a cache."""
    texts, cache = [list(range(5 + slot, 25 + slot)) for slot in range(3)], rl.SlotCache(3, 24)
    with torch.inference_mode():
        rl.advance(policy, cache, (0, 1, 2), [text[:8] for text in texts], [0, 0, 0])
        for slots in [(0, 2), (1, 2), (1,)]:
            logits = rl.advance(policy, cache, slots, [texts[slot][8:] for slot in slots], [8] * len(slots))
            assert isinstance(cache.part, slice) == (slots != (0, 2))
            for row, slot in zip(logits, slots):
                torch.testing.assert_close(row, policy.model(input_ids=torch.tensor([texts[slot]])).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_the_longest_context_of_other_models():
    llama = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    assert rl.longest_context(LlamaConfig(max_position_embeddings=2048, rope_parameters=llama)) == 2048
    chunked = SimpleNamespace(get_text_config=lambda: SimpleNamespace(attention_chunk_size=64, max_position_embeddings=99))
    assert rl.longest_context(chunked) == 64


def test_what_fits_side_by_side_fits_and_one_more_does_not():
    memory = rl.memory_of(rl.shape_of("tiny"), 8, 512)
    for room in (1e8, 1e9):
        number = rl.most_parallel(memory, room)
        assert number > 0 and rl.rollout_bytes(memory, number) <= room < rl.rollout_bytes(memory, number + 1)
    assert rl.most_parallel(memory, 1) == 0


# ---------------------------------------------------------------------------------------------------
# the benchmark

def test_generate_splits_a_batch_that_does_not_fit_and_keeps_the_order(policy, monkeypatch):
    asked = []

    def out_of_memory_from_three_on(policy, histories, settings):
        asked.append(len(histories))
        if len(histories) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [row[-1:] for row in histories]

    monkeypatch.setattr(bench_rl, "generated", out_of_memory_from_three_on)
    assert bench_rl.by_generate(policy, [[0, number] for number in range(5)], None) == [[0], [1], [2], [3], [4]]
    assert asked == [5, 2, 3, 1, 2]


def test_the_benchmark_s_ways_play_the_same_work(policy):
    endless = dataclasses.replace(policy, stop_ids=frozenset({0}))
    for name in ("generate, at every turn", "rollout"):
        trajectories = bench_rl.WAYS[name](endless, bench_rl.as_in_retail(256, turns=4), seeded("cpu", 0), 4, 256)
        # a prompt of 64 words of two tokens and the template's 6; four turns of four tokens
        assert [(len(t.prompt), sum(t.mask), t.episode.steps) for t in trajectories] == 16 * [(134, 16, 4)]
