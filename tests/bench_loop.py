"""How much longer a default run takes because of the jail.

    python tests/bench_loop.py [options of selfchallenge.py]

The run is played seven times, in turns with the jail and without. Without it no child is started: what a child would reply
is remembered from the first run, which itself does not count. All else is done in both: tasks and turns are read, tools are
called, states are compared. So the difference is what the jail adds: forking, confining and ending children, the pipes, and
in them the code itself. The episodes are the same in each run, to the byte, which is checked.

It is told in two ways. The seconds of whole runs say all, but also all that the machine does meanwhile; the fastest of three
is compared, and the median. Code runs only while the network rests, so what the jail adds is also the length of these pauses, with it less without
it; the median of three counts. A busy hour stretches the pauses and the rest of the same run alike.
"""
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval  # noqa: E402
import rl  # noqa: E402
import selfchallenge  # noqa: E402
from verify import ForkServer, Jail  # noqa: E402


def played(arguments: list[str], replies: dict) -> tuple[dict, int, bytes]:
    """Play a run whose jail knows some replies, and learns the others; return its seconds, its children, and its episodes."""
    class Prepared(Jail):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.replies = replies

    def counted(server: ForkServer) -> tuple:
        children.append(server)
        return start_child(server)

    def paused(work: Callable) -> Callable:
        def timed(*arguments):
            start = time.monotonic()
            try:
                return work(*arguments)
            finally:
                pauses.append(time.monotonic() - start)
        return timed

    children, start_child, folder = [], ForkServer.child, Path(tempfile.mkdtemp())
    pauses, take_steps, play_baselines = [], rl.take_steps, eval.play_baselines
    selfchallenge.Jail, ForkServer.child = Prepared, counted
    rl.take_steps, eval.play_baselines = paused(take_steps), paused(play_baselines)
    try:
        options = selfchallenge.parse_options(arguments)
        rl.prepare(options)
        start = time.monotonic()
        summary = selfchallenge.play_run(folder, options)
        seconds = summary["wall_s"] | {"in all": time.monotonic() - start, "pauses": sum(pauses)}
        return seconds, len(children), (folder / "trajectories.jsonl").read_bytes()
    finally:
        selfchallenge.Jail, ForkServer.child = Jail, start_child
        rl.take_steps, eval.play_baselines = take_steps, play_baselines
        shutil.rmtree(folder)


def main() -> None:
    """Play the runs, and print the seconds of each phase."""
    known: dict = {}
    _, _, episodes = played(sys.argv[1:], known)
    runs: dict[bool, list[dict]] = {True: [], False: []}
    for jailed in [True, False] * 3:
        seconds, children, the_same = played(sys.argv[1:], {} if jailed else known)
        assert the_same == episodes, "the runs differ"
        assert jailed or children < 100, "replies were not known beforehand"
        runs[jailed].append(seconds | {"children": children})
    print(f"{'seconds':12} {'with the jail':>14} {'without':>8} {'added':>7}")
    for what in runs[True][0]:
        jailed, free = [min(run[what] for run in runs[which]) for which in (True, False)]
        every = "   ".join(" ".join(f"{run[what]:.1f}" for run in runs[which]) for which in (True, False))
        added = f"{jailed / free - 1:7.0%}" if what not in ("pauses", "children") else " " * 7
        print(f"{what:12} {jailed:14.1f} {free:8.1f} {added}   (of {every})")
    jailed, free = [median(run["in all"] for run in runs[which]) for which in (True, False)]
    print(f"medians: whole runs of {jailed:.1f} s instead of {free:.1f}: {jailed / free - 1:.0%} added")
    pauses, others = [median(run["pauses"] for run in runs[which]) for which in (True, False)]
    rest = median(run["in all"] - run["pauses"] for run in runs[True])
    print(f"medians: pauses of {pauses:.1f} s instead of {others:.1f}, beside {rest:.1f} s of other work: {(pauses - others) / (rest + others):.0%} added")


if __name__ == "__main__":
    main()
