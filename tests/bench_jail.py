"""What the jail costs, beside the floor below it and beside what one would write instead: all in one run.

    python tests/bench_jail.py

The rounds of all measurements alternate, so that a busy spell of the machine meets them alike; the table shows
the median of the rounds. The floor is fork, exit and wait, without any jail or code, in a Python process that
holds what a server of the jail holds. `python -I -S` is a fresh interpreter for each check, with no jail either.
"""
import argparse
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import make_environment  # noqa: E402
from verify import CodeAsTask, Jail, judge_many, start_program  # noqa: E402

CODE = "x = 1"
AMOUNT = make_environment("calculator", 3).state["tea"]
CODE_WITH_A_TOOL = "result = amount('tea')\nprint(result)"
FLOOR = """
prepare_server(1)
def cycle():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
while size := os.read(0, 8):
    start = time.perf_counter()
    for _ in range(int(size)):
        cycle()
    os.write(1, repr(time.perf_counter() - start).encode())
"""


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def check(jail: Jail, code: str, replica: int = 0) -> None:
    """A check as the filter makes it: a child for this code alone, its answer, its end; nothing is remembered."""
    jail.replies.clear()
    with jail.session(make_environment("calculator", 3), replica) as session:
        outcome = session.run(code)
        assert outcome.error is None and outcome.value == (None if code == CODE else AMOUNT)


def many_checks(jail: Jail, checks: int, workers: int) -> None:
    """Checks from several threads, spread over the servers."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda number: check(jail, CODE, number), range(checks)))


def on(cores: set[int], work: Callable[[Jail], object]) -> float:
    """Return the seconds of work with a jail of its own, all of whose processes keep to these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        with Jail() as jail:
            return timed(lambda: work(jail))
    finally:
        os.sched_setaffinity(0, before)


def judge_file(jail: Jail, tasks: list[CodeAsTask], workers: int) -> None:
    """Judge tasks, all of which must be kept, as if none had been judged before."""
    jail.replies.clear()
    assert all(judgement.ok for judgement in judge_many(jail, tasks, workers))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="What a jailed check costs, and what else one could do.")
    parser.add_argument("--checks", type=int, default=200, help="checks in a round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, of which the median counts")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    tasks = [CodeAsTask.from_json(line) for env in ("calculator", "shop")
             for line in (ROOT / "tiny" / f"held_out_{env}.jsonl").read_text().splitlines()]
    floor = start_program(FLOOR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def floor_seconds() -> float:
        floor.stdin.write(str(options.checks).encode())
        return float(floor.stdout.read(64))

    seconds: dict[str, list[float]] = {}
    with Jail() as jail:
        work = {
            "floor: fork + exit + wait": floor_seconds,
            "a jailed check": lambda: timed(lambda: [check(jail, CODE) for _ in range(options.checks)]),
            "... with a tool call and an answer": lambda: timed(lambda: [check(jail, CODE_WITH_A_TOOL) for _ in range(options.checks)]),
            "a jailed check, all on one core": lambda: on({cores[0]}, lambda jail: many_checks(jail, options.checks, 2)),
            "a jailed check, 4 threads, all cores": lambda: on(set(cores), lambda jail: many_checks(jail, options.checks, 4)),
            "python -I -S": lambda: timed(lambda: [
                subprocess.run([sys.executable, "-I", "-S", "-c", CODE], check=True) for _ in range(options.checks)]),
            "the filter, a good task": lambda: timed(lambda: judge_file(jail, tasks, 2)) * options.checks / len(tasks),
        }
        for _ in range(options.rounds):
            for name, measure in work.items():
                seconds.setdefault(name, []).append(measure() / options.checks)
    floor.stdin.close()
    floor.wait()
    reference = median(seconds["floor: fork + exit + wait"])
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {platform.machine()}, {len(cores)} cores; "
          f"median of {options.rounds} rounds of {options.checks}")
    print(f"{'':38} {'ms':>7} {'a second':>9} {'floors':>7}")
    for name, values in seconds.items():
        print(f"{name:38} {1e3 * median(values):7.2f} {1 / median(values):9.0f} {median(values) / reference:7.2f}")


if __name__ == "__main__":
    main()
