"""How fast episodes are played, beside what one would write instead: all in one run.

    python tests/bench_rl.py                                                     (the embedded model; on a CPU)

The same episodes, in turns: by a plain `generate` on the padded history at every turn, by transformers' continuous
batching at every turn, and by `rollout`. The rounds alternate, so that a busy spell of the machine meets all alike;
the table shows the medians. What is sampled differs, so tokens a second are compared, of those that the model sampled.
"""
import argparse
import platform
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable

import torch
from transformers import GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import SUITES, load_suite  # noqa: E402
from rl import Episode, Policy, Trajectory, begin, executor, load_policy, rollout, seeded, silence, take_step, turn_text, versions  # noqa: E402
from verify import Jail  # noqa: E402

TURN_TOKENS, CONTEXT = 176, 512


def turn_by_turn(generate: Callable, policy: Policy, episodes: list[Episode], generator: torch.Generator) -> list[Trajectory]:
    """Play the episodes with a function that continues all the histories it is given by one turn."""
    trajectories = begin(policy, episodes, silence, generator)
    running = list(range(len(episodes)))
    while running:
        turns = generate(policy, [trajectories[i].tokens for i in running])
        ended = set()
        for i, turn in zip(running, turns):
            trajectories[i].extend(turn, True, [0.0] * len(turn))
            if take_step(policy, episodes[i], trajectories[i], turn_text(policy, turn), CONTEXT):
                ended.add(i)
        running = [i for i in running if i not in ended]
    return trajectories


def settings(policy: Policy) -> GenerationConfig:
    """What both of the library's ways are told: to sample from the full distribution, until a turn ends."""
    return GenerationConfig(max_new_tokens=TURN_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                            eos_token_id=sorted(policy.stop_ids), pad_token_id=min(policy.stop_ids))


@torch.inference_mode()
def by_generate(policy: Policy, histories: list[list[int]]) -> list[list[int]]:
    """One call of `generate`, on histories that are padded on the left to the longest."""
    width = max(map(len, histories))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in histories], device=policy.device)
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in histories], device=policy.device)
    rows = policy.model.generate(input_ids=ids, attention_mask=attention, generation_config=settings(policy))[:, width:].tolist()
    return [up_to_the_end(policy, row) for row in rows]


def by_continuous_batching(policy: Policy, histories: list[list[int]]) -> list[list[int]]:
    """One call of transformers' continuous batching, whose paged cache needs no padding."""
    outputs = policy.model.get_base_model().generate_batch(inputs=histories, generation_config=settings(policy), progress_bar=False)
    by_prompt = sorted(outputs.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
    return [up_to_the_end(policy, output.generated_tokens) for output in by_prompt]


def up_to_the_end(policy: Policy, tokens: list[int]) -> list[int]:
    """The tokens up to the first that ends a turn."""
    return tokens[:next((n for n, token in enumerate(tokens, start=1) if token in policy.stop_ids), len(tokens))]


def by_rollout(policy: Policy, episodes: list[Episode], generator: torch.Generator) -> list[Trajectory]:
    """What the project does."""
    return rollout(policy, episodes, generator, parallel=len(episodes), turn_tokens=TURN_TOKENS, context=CONTEXT)


WAYS = {
    "generate, at every turn": partial(turn_by_turn, by_generate),
    "continuous batching, at every turn": partial(turn_by_turn, by_continuous_batching),
    "rollout": by_rollout,
}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="How fast episodes are played, and what else one could do.")
    parser.add_argument("--model", default="tiny", help="a model folder or a hub name")
    parser.add_argument("--adapter", help="the folder of a trained adapter")
    parser.add_argument("--tasks", type=int, default=16, help="tasks, of which 8 episodes each are played")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts")
    options = parser.parse_args()
    policy = load_policy(options.model, options.adapter)
    everything = [task for suite in SUITES for task in load_suite(suite)]
    tasks = [everything[i * len(everything) // options.tasks] for i in range(options.tasks)]
    speeds: dict[str, list[float]] = {}
    with Jail() as jail:
        for number in range(options.rounds + 1):  # the first warms up
            for name, play in WAYS.items():
                torch.manual_seed(number)
                jail.replies.clear()
                episodes = [executor(jail, task) for task in tasks for _ in range(8)]
                start = time.perf_counter()
                trajectories = play(policy, episodes, seeded(policy.device, number))
                seconds = time.perf_counter() - start
                if number:
                    speeds.setdefault(name, []).append(sum(sum(t.mask) for t in trajectories) / seconds)
    print(f"{options.model}, {len(tasks) * 8} episodes, {policy.device.type}, {platform.machine()}, {torch.get_num_threads()} threads; "
          + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{'':38} {'tokens a second':>16} {'times the first':>16}")
    for name, values in speeds.items():
        print(f"{name:38} {median(values):16.0f} {median(values) / median(speeds[next(iter(WAYS))]):16.2f}")


if __name__ == "__main__":
    main()
