"""What a reset and a reference pass over Retail cost here, and in the benchmark's own environment, side by side.

    TAU_BENCH=PATH python tests/bench_worlds.py

Both reset each of the 115 test tasks, take its reference actions, tell its outputs, and compute the reward.
"""
import argparse
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_checkouts import own_reward, the_benchmarks_own_package  # noqa: E402
from tools import Retail, TauBench  # noqa: E402


def ours() -> float:
    """Seconds of our pass."""
    start = time.perf_counter()
    for number in range(len(Retail.held_out)):
        environment = Retail(number)
        assert environment.passes(number, environment.solve(number))
    return time.perf_counter() - start


def theirs(get_env) -> float:
    """Seconds of the same pass by the benchmark's own environment."""
    start = time.perf_counter()
    for number, task in enumerate(Retail.held_out):
        assert own_reward(get_env, "retail", number, task.actions, task.outputs) == 1
    return time.perf_counter() - start


def resets(get_env) -> tuple[float, float]:
    """Seconds of a reset, up to where the database can be read: ours, and that of the benchmark's own environment."""
    start = time.perf_counter()
    for seed in range(50):
        assert Retail(seed).state
    middle = time.perf_counter()
    env = get_env("retail", user_strategy="human", user_model="x", task_split="test", task_index=0)
    env.user.reset = lambda instruction: ""
    begin = time.perf_counter()
    for _ in range(50):
        env.reset(0)
    return (middle - start) / 50, (time.perf_counter() - begin) / 50


def main() -> None:
    """Measure all three times, in turns, and print the best of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--any-version", action="store_true", help="take the checkout as it is, whatever its version")
    options = parser.parse_args()
    if "TAU_BENCH" not in os.environ:
        sys.exit("bench_worlds.py: give the path of a checkout of TauBench: TAU_BENCH=PATH python tests/bench_worlds.py")
    with the_benchmarks_own_package() as get_env:
        TauBench.load(os.environ["TAU_BENCH"], options.any_version)
        passes = []
        for _ in range(3):
            TauBench.reference_digest.__func__.cache_clear()
            passes.append((*resets(get_env), ours(), theirs(get_env)))
    reset, their_reset, our_pass, their_pass = map(min, zip(*passes))
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores; the best of 3")
    print(f"{'':32} {'ours':>8} {'TauBench Env':>13}")
    print(f"{'a reset':32} {1e3 * reset:5.1f} ms {1e3 * their_reset:10.1f} ms   {reset / their_reset:.0%}")
    print(f"{f'the {len(Retail.held_out)} references, with rewards':32} {our_pass:6.1f} s {their_pass:11.1f} s   {our_pass / their_pass:.0%}")


if __name__ == "__main__":
    main()
