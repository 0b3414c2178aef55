"""How fast episodes are played, beside what one would write instead; or what large models need.

    python tests/bench_rl.py                            (the embedded model, on a CPU)
    python tests/bench_rl.py --gpu-gb 24 --shapes meta-llama/Llama-3.1-8B-Instruct \\
        meta-llama/Llama-3.2-3B-Instruct meta-llama/Llama-3.2-1B-Instruct
                                                        (models of random weights in these shapes, on a GPU of at least that size)

The same episodes, in turns: by a plain `generate` on the padded history at every turn, by transformers' continuous
batching at every turn, and by `rollout`. The rounds alternate, so that a busy spell of the machine meets all alike;
the table shows the medians. What is sampled differs, so tokens a second are compared, of those that the model sampled.

With --shapes each model is trained on one trajectory of the paper's context, and plays 16 episodes of 8,192 tokens, as
many at once as `rl.py --fit` says, under a cap on the memory that stands in for the card. The peaks stand beside what
--fit predicts. The episodes begin with seven eighths of their context, which needs as much memory as a whole one, and
much less time. With --rounds, 16 episodes as long as those of TauBench's Retail are then played in the three ways, which takes
longer than all the rest: a prompt of half the context, then four turns of a sixty-fourth of it, with observations of twice that
(of 8,192 tokens: 4,096, 128 and 256); round 0, which warms up, has one turn. `generate` splits its batch where the capped memory does not
hold all of it; continuous batching, which asks the card itself what is free, has no cap. Weights are random, so every turn runs until it is cut; speed and
memory do not depend on that. Each figure is printed when it is known, and what fails, for want of memory or otherwise, is told
and leaves the others as they are (the exit status is 1 then).
Without a GPU the code of training and rollouts runs on tensors that have shapes and no numbers, and only the peaks are
told, counted (see live_memory.py).
"""
import argparse
import gc
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # as it is on a card of 24 GB; an H100 or H200 takes four times as much
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as in rl.py
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import SUITES, load_suite  # noqa: E402
from live_memory import LiveMemory, byte_count, rollout_peak, shape_policy, training_peak, weights_of  # noqa: E402
from rl import (  # noqa: E402
    KEPT_FREE,
    Episode,
    Policy,
    SlotCache,
    Trajectory,
    advance,
    begin,
    decode,
    executor,
    is_out_of_memory,
    load_policy,
    make_optimizer,
    memory_of,
    most_parallel,
    positive,
    reinforce_step,
    rollout,
    rollout_bytes,
    seeded,
    shape_of,
    take_steps,
    training_bytes,
    turn_text,
    versions,
)
from verify import Jail  # noqa: E402


def turn_by_turn(
    generate: Callable, policy: Policy, episodes: list[Episode], generator: torch.Generator, turn_tokens: int, context: int
) -> list[Trajectory]:
    """Play the episodes with a function that continues all the histories it is given by one turn."""
    trajectories = begin(policy, episodes, None)  # nobody talks to a user
    # Both of the library's ways are to sample from the full distribution, until a turn ends.
    settings = GenerationConfig(max_new_tokens=turn_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                eos_token_id=sorted(policy.stop_ids), pad_token_id=min(policy.stop_ids))
    while running := [t for t in trajectories if not t.over]:
        for t, turn in zip(running, generate(policy, [t.tokens for t in running], settings)):
            t.extend(turn, True, [0.0] * len(turn))
            t.text = turn_text(policy, turn)
        take_steps(policy, running, None, context)
    return trajectories


def by_generate(policy: Policy, histories: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """`generate`, in one call if the memory suffices for it, and else in two halves."""
    try:
        return generated(policy, histories, settings)
    except RuntimeError as error:
        if len(histories) == 1 or not is_out_of_memory(error):
            raise
    half = len(histories) // 2
    return [row for part in (histories[:half], histories[half:]) for row in by_generate(policy, part, settings)]


@contextmanager
def uncapped() -> Iterator[None]:
    """Lift the cap on a GPU's memory, for code that asks the card itself what is free."""
    if not torch.cuda.is_available():
        yield
        return
    fraction = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction(1.0)
    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # or the rest of the card might stay reserved
        torch.cuda.set_per_process_memory_fraction(fraction)


@torch.inference_mode()
def generated(policy: Policy, histories: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """One call of `generate`, on histories that are padded on the left to the longest."""
    width = max(map(len, histories))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in histories], device=policy.device)
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in histories], device=policy.device)
    rows = policy.model.generate(input_ids=ids, attention_mask=attention, generation_config=settings)[:, width:].tolist()
    return [up_to_the_end(policy, row) for row in rows]


def by_continuous_batching(policy: Policy, histories: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """One call of transformers' continuous batching, whose paged cache needs no padding."""
    with uncapped():
        outputs = policy.model.get_base_model().generate_batch(inputs=histories, generation_config=settings, progress_bar=False)
    by_prompt = sorted(outputs.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
    assert len(by_prompt) == len(histories) and not any(output.error for output in by_prompt)
    return [up_to_the_end(policy, output.generated_tokens) for output in by_prompt]


def up_to_the_end(policy: Policy, tokens: list[int]) -> list[int]:
    """The tokens up to the first that ends a turn."""
    return tokens[:next((n for n, token in enumerate(tokens, start=1) if token in policy.stop_ids), len(tokens))]


def by_rollout(policy: Policy, episodes: list[Episode], generator: torch.Generator, turn_tokens: int, context: int) -> list[Trajectory]:
    """What the project does."""
    return rollout(policy, episodes, generator, parallel=len(episodes), turn_tokens=turn_tokens, context=context)


FAILED: list[str] = []
WAYS = {
    "generate, at every turn": partial(turn_by_turn, by_generate),
    "continuous batching, at every turn": partial(turn_by_turn, by_continuous_batching),
    "rollout": by_rollout,
}


@contextmanager
def told(what: str) -> Iterator[None]:
    """Tell that something fails, and go on: a card is lent for minutes, and the other figures count as well."""
    try:
        yield
    except Exception as error:
        print(f"  {what} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        FAILED.append(what)


def compare(
    policy: Policy, library: Policy, make_episodes: Callable[[int], list[Episode]], turn_tokens: int, context: int, rounds: int
) -> None:
    """Play equal episodes in each way, the ways in turns, the rounds after round 0, which warms up; print the medians of the speeds.

    `policy` is for what the project does, `library` for what the library does, which takes models in their mode of evaluation:
    on some CPUs bitsandbytes then packs the weights anew, for good, for another kernel.
    """
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, play in WAYS.items():
            with told(name):
                torch.manual_seed(number)
                episodes = make_episodes(number)
                start = time.perf_counter()
                trajectories = play(policy if play is by_rollout else library, episodes, seeded(policy.device, number), turn_tokens, context)
                speeds[name].append(sum(sum(t.mask) for t in trajectories) / (time.perf_counter() - start))
                print(f"  round {number}: {name}: {speeds[name][-1]:.0f} tokens a second", file=sys.stderr, flush=True)
    print(f"{'':38} {'tokens a second':>16} {'times the first':>16}")
    medians = {name: median(values[1:]) for name, values in speeds.items() if len(values) > rounds}
    for name, speed in medians.items():
        print(f"{name:38} {speed:16.0f} {speed / medians.get(next(iter(WAYS)), math.nan):16.2f}", flush=True)


def random_model(shape: str, folder: str) -> None:
    """Write a model of random weights in a shape, with the embedded model's tokenizer and template."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(shape_of(shape), dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tiny").save_pretrained(folder)


def peak_of(policy: Policy, work: Callable[[], object]) -> tuple[float, float, object]:
    """Return the most bytes in use during some work, its seconds, and what it returns; on a CPU those of tensors are counted."""
    gc.collect()
    if not torch.cuda.is_available():
        with LiveMemory(weights_of(policy.model)) as memory:
            start = time.perf_counter()
            result = work()
        return byte_count(weights_of(policy.model)) + memory.peak, time.perf_counter() - start, result
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(f"  (reserved, which is what the cap is for: {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB)", flush=True)
    return torch.cuda.max_memory_allocated(), seconds, result


class Talk(Episode):
    """An episode whose turns, whatever they say, are answered: each word of the prompt and the observations is two tokens."""

    def __init__(self, words: int, observed: int = 1, max_steps: int = sys.maxsize):
        self.messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "tea " * words}]
        self.observed, self.max_steps = observed, max_steps

    def step(self, text: str) -> str | None:
        self.steps += 1
        return "tea " * self.observed if self.steps < self.max_steps else None

    def close(self) -> None:
        """There is no session."""


def as_in_retail(context: int, turns: int) -> list[Episode]:
    """Return 16 episodes of one task, of which four turns fill two thirds of their context, if cut at a sixty-fourth of it."""
    return [Talk(context // 4, observed=context // 64, max_steps=turns) for _ in range(16)]


@torch.inference_mode()
def decoding_seconds(policy: Policy, slots: int, context: int) -> tuple[float, float]:
    """The seconds of a pass that samples a token in each slot, when all have seen 15/16 of their context: recorded, and not."""
    seen = context * 15 // 16
    cache, trajectories = SlotCache(slots, context), [Trajectory([5] * seen, [], [], turn=seen, fed=seen - 1) for _ in range(slots)]
    return (seconds_of(lambda: decode(policy, cache, trajectories, context - seen)),
            seconds_of(lambda: advance(policy, cache, range(slots), [[5]] * slots, [seen - 1] * slots)))


def copying_speed() -> float:
    """How many bytes the GPU reads and writes in a second when it copies half a gigabyte."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


def seconds_of(work: Callable[[], object]) -> float:
    """The mean seconds of twenty runs on a GPU, after one that warms up."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 20


def measure_shape(shape: str, gpu_gb: float, context: int, long: int, rounds: int) -> None:
    """Print the peaks of a training step on one trajectory of `long` tokens and of rollouts up to `context` tokens, and the speeds."""
    config = shape_of(shape)
    gc.collect()  # what is left of the shape before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_gb * 2**30 * (1 - KEPT_FREE) / total))
    with tempfile.TemporaryDirectory() as folder:
        random_model(shape, folder)
        policy = load_policy(folder)
    optimizer = make_optimizer(policy, 1e-4)
    memory = memory_of(config, 8, context)
    parallel = max(1, min(16, most_parallel(memory, gpu_gb * 2**30 * (1 - KEPT_FREE))))

    def train(trajectory: Trajectory) -> dict:
        figures = reinforce_step(policy, optimizer, [trajectory], torch.ones(1))
        policy.model.zero_grad()  # as `rl.train` does
        return figures

    with told("training"):
        trajectory = Trajectory([5] * long, [False] + [True] * (long - 1), [-1.0] * long)
        train(trajectory)  # which makes the optimizer's state
        peak, seconds, _ = peak_of(policy, lambda: train(trajectory))
        report(f"train on {long:,} tokens", peak, training_bytes(memory_of(config, 8, long)), f", {seconds:.1f} s")
    with told("rollouts"):
        peak, seconds, trajectories = peak_of(policy, lambda: rollout(
            policy, [Talk(context * 7 // 16) for _ in range(16)], seeded(policy.device, 0),
            parallel=parallel, turn_tokens=256, context=context))  # "tea " is two tokens
        report(f"16 episodes of {context:,} tokens, {parallel} at once", peak, rollout_bytes(memory, parallel), f", {seconds:.1f} s")
        speed = sum(sum(t.mask) for t in trajectories) / seconds
        print(f"  {speed:,.0f} tokens a second, prompts included; 800 tasks x 15 rollouts of {context // 2:,} sampled tokens at this speed: "
              f"{12_000 * context / 2 / speed / 3600:,.0f} hours", flush=True)
        print(f"  mismatch_kl {train(trajectories[0])['mismatch_kl']:.1e}", flush=True)
        del trajectories
    with told("decoding"):
        seconds, unrecorded = decoding_seconds(policy, parallel, context)
        read = memory["weights"] + parallel * memory["cache"] * 15 / 16
        print(f"  a token in each of {parallel} slots at {context * 15 // 16:,} tokens: {seconds * 1e3:.1f} ms, unrecorded {unrecorded * 1e3:.1f}; "
              f"if weights and cache are read once, {read / seconds / 1e9:,.0f} GB a second, {read / seconds / copying_speed():.0%} of what this GPU copies",
              flush=True)
    if rounds:  # with caches of three quarters, as the library's ways leave some memory of their own behind
        compare(policy, policy, lambda number: as_in_retail(context, turns=4 if number else 1), context // 64, context * 3 // 4, rounds)


def count_shape(shape: str, gpu_gb: float, context: int, long: int) -> None:
    """Print the same peaks where there is no GPU."""
    config = shape_of(shape)
    policy, memory = shape_policy(config), memory_of(config, 8, context)
    parallel = max(1, min(16, most_parallel(memory, gpu_gb * 2**30 * (1 - KEPT_FREE))))
    report(f"train on {long:,} tokens", training_peak(policy, long), training_bytes(memory_of(config, 8, long)))
    report(f"{parallel} episodes of {context:,} tokens at once", rollout_peak(policy, parallel, context), rollout_bytes(memory, parallel))


def report(what: str, peak: float, predicted: float, more: str = "") -> None:
    """Print a peak beside the predicted one."""
    print(f"  {what:45} {peak / 2**30:6.2f} GiB, predicted {predicted / 2**30:6.2f} ({predicted / peak - 1:+.1%}){more}", flush=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="How fast episodes are played, and what else one could do.")
    parser.add_argument("--model", default="tiny", help="a model folder or a hub name")
    parser.add_argument("--adapter", help="the folder of a trained adapter")
    parser.add_argument("--tasks", type=int, default=32, help="tasks, of which 8 episodes each are played")
    parser.add_argument("--rounds", type=positive, help="rounds of the comparison, of which the median counts: 5, with --shapes none")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="MODEL", help="measure models of random weights in these shapes, or, without a GPU, count their tensors")
    parser.add_argument("--gpu-gb", type=float, default=24, help="the card that a cap on the memory stands in for")
    parser.add_argument("--context", type=int, default=8192, help="tokens of the episodes that are played with --shapes")
    parser.add_argument("--trained", type=int, default=16_192, help="tokens of the trajectory that is trained on with --shapes")
    options = parser.parse_args()
    for shape in options.shapes:
        if torch.cuda.is_available():
            print(f"{shape}, random weights, {torch.cuda.get_device_name()}, capped at {options.gpu_gb * (1 - KEPT_FREE):.1f} GiB; "
                  + ", ".join(f"{name} {version}" for name, version in versions().items()), flush=True)
            with told(shape):
                measure_shape(shape, options.gpu_gb, options.context, options.trained, options.rounds or 0)
        else:
            print(f"{shape}, tensors without numbers, counted")
            count_shape(shape, options.gpu_gb, options.context, options.trained)
    if options.shapes:
        return
    policy, library = load_policy(options.model, options.adapter), load_policy(options.model, options.adapter)
    library.model.eval()
    everything = [task for suite in SUITES for task in load_suite(suite)]
    tasks = [everything[i * len(everything) // options.tasks] for i in range(options.tasks)]
    print(f"{options.model}, {len(tasks) * 8} episodes, {policy.device.type}, {platform.machine()}, {torch.get_num_threads()} threads; "
          + ", ".join(f"{name} {version}" for name, version in versions().items()))
    with Jail() as jail:
        def make_episodes(_: int) -> list[Episode]:
            jail.replies.clear()
            return [executor(jail, task) for task in tasks for _ in range(8)]

        compare(policy, library, make_episodes, turn_tokens=176, context=512, rounds=options.rounds or 5)


if __name__ == "__main__":
    main()
    sys.exit(1 if FAILED else 0)
