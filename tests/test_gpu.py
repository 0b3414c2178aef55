"""What only a GPU can show; all other tests run on the CPU, also where there is one (see conftest.py).

    TEST_GPU=0 python -m pytest -q tests/test_gpu.py        (0: the number of the GPU)
"""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rl
from rl import Executor, advantages, load_policy, make_optimizer, reinforce_step, rollout, seeded
from verify import CodeAsTask, Jail

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, or TEST_GPU does not give its number")
TASK = CodeAsTask(
    "calculator", 3, "Take the amount of tea, add 5, then multiply by 3.",
    "def evaluate(answer):\n    return answer == 3 * (amount('tea') + 5)", "result = 3 * (amount('tea') + 5)",
    ["result = 1", "result = 2", "result = 3"])


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny")


@pytest.fixture(scope="module")
def jail():
    with Jail() as jail:
        yield jail


def playing(sizes: list[int]) -> list[rl.Trajectory]:
    """Trajectories of so many tokens, all but the last of which are fed."""
    return [rl.Trajectory(list(range(5, 5 + size)), [False] * size, [0.0] * size, turn=size, fed=size - 1) for size in sizes]


@torch.inference_mode()
def test_a_pass_that_is_played_again_computes_what_a_new_one_does(policy):
    """Three slots with texts of their own sample twelve tokens; before each, a new pass over a copy of the cache tells what is due."""
    slots = playing([20, 31, 9])
    cache, plain = rl.SlotCache(3, 64), rl.SlotCache(3, 64)
    for store in (cache, plain):
        rl.advance(policy, store, range(3), [t.tokens[:-1] for t in slots], [0, 0, 0])
    replays = set()
    for _ in range(12):
        logits = rl.decode(policy, cache, slots, turn_tokens=16)
        replays.add(cache.replay)
        expected = rl.advance(policy, plain, range(3), [t.tokens[-1:] for t in slots], [t.fed for t in slots])
        torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), atol=0.1, rtol=0)  # in 16 bits
        for t, token in zip(slots, expected.argmax(-1).tolist()):
            t.fed = len(t.tokens)
            t.extend([token], True, [0.0])
    assert len(replays) == 1 and cache.replay.__name__ == "replay"  # recorded once


@torch.inference_mode()
def test_what_waits_for_the_gpu_is_not_recorded(policy):
    layer = policy.model.get_base_model().get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].sum().item(), None)[1])
    try:
        slots, cache = playing([20]), rl.SlotCache(1, 64)
        rl.advance(policy, cache, [0], [slots[0].tokens[:-1]], [0])
        logits = rl.decode(policy, cache, slots, turn_tokens=16)
        assert cache.replay.func is rl.next_logits
        torch.testing.assert_close(logits, rl.advance(policy, cache, [0], [slots[0].tokens[-1:]], [19]))
    finally:
        hook.remove()


def test_a_rollout_is_reproducible_and_the_trainer_sees_nearly_its_probabilities(policy, jail):
    """With more episodes than slots, so that slots change hands; in 16 bits the probabilities differ in the third digit."""
    played = [rollout(policy, [Executor(jail, TASK) for _ in range(24)], seeded(policy.device, 1), parallel=10, turn_tokens=60, context=512)
              for _ in range(2)]
    assert [t.tokens for t in played[0]] == [t.tokens for t in played[1]]
    step = reinforce_step(policy, make_optimizer(policy, 0.0), played[0], torch.ones(24))
    assert abs(step["mismatch_kl"]) < 0.01 and step["gradient_norm"] > 0


def test_users_who_speak_between_recorded_passes_change_nothing(policy, jail):
    """They are played by the same network without its adapter, in a cache of their own."""
    def played(users: bool) -> list[list[int]]:
        trajectories = [rl.opened(policy, Executor(jail, TASK).messages) for _ in range(12)]
        for number, t in enumerate(trajectories):  # turns of several lengths
            t.tokens[-1] = 5 + number
        for ended in rl.sampled_turns(policy, trajectories, seeded(policy.device, 1), 0.0, 5, 30, 512):
            if users:
                rl.own_user(policy, seeded(policy.device, 2), 3, 10, [Executor(jail, TASK).messages] * 4)
            for t in ended:
                t.over = True
        return [t.tokens for t in trajectories]

    assert played(users=True) == played(users=False)


def test_training_raises_what_is_rewarded(jail, monkeypatch):
    """Of episodes of one turn those are rewarded that look something up: a third before, nearly all after twelve steps."""
    monkeypatch.setattr(Executor, "max_steps", 1)
    policy, shares = load_policy("tiny"), []
    optimizer = make_optimizer(policy, 1e-2)
    for step in range(12):
        played = rollout(policy, [Executor(jail, TASK) for _ in range(64)], seeded(policy.device, step), context=512)
        rewards = torch.tensor([[float("look it up" in t.episode.messages[2]["content"]) for t in played]])
        shares.append(rewards.mean().item())
        reinforce_step(policy, optimizer, played, advantages(rewards)[0])
    assert shares[0] < 0.6 and shares[-1] > 0.8, shares


def test_what_does_not_fit_is_one_sentence_and_leaves_the_gpu_as_it_was(policy, jail):
    torch.cuda.empty_cache()
    used, card = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((used + 2**28) / card)  # a quarter of a gigabyte more; the caches would need three
    try:
        with pytest.raises(MemoryError, match="--fit tiny --gpu-gb"), rl.advice_on_memory("tiny"):
            rollout(policy, [Executor(jail, TASK) for _ in range(256)], seeded(policy.device, 1), context=2048)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert rollout(policy, [Executor(jail, TASK)], seeded(policy.device, 1), context=512)[0].over


def test_the_whole_method_runs_on_a_gpu_and_its_adapter_loads(tmp_path):
    here = Path(rl.__file__).parent
    for command in (["selfchallenge.py", "--challenges", "24", "--tasks-per-step", "4", "--steps", "2", "--name", "run"],
                    ["eval.py", "--suite", "calculator", "--adapter", "runs/run/adapter"]):
        done = subprocess.run([sys.executable, str(here / command[0]), *command[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()) == 2
