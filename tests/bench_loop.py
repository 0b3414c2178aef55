"""How much longer a default run takes because of the jail.

    python tests/bench_loop.py [options of selfchallenge.py]

The run is played seven times, in turns with the jail and without. The fastest of three counts: whatever else the
machine does can only add to it. Without, what each step of each episode brought is repeated from the first time, which
itself does not count: it also warms everything up. The model writes the same tokens each time, which is checked, so the
difference is what the jail adds: waiting for it, and sharing the processor.
"""
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval  # noqa: E402
import rl  # noqa: E402
import selfchallenge  # noqa: E402

CARRIED = ("steps", "reward", "status", "submissions")  # what a step changes in its episode and others read


def played(arguments: list[str], memory: dict, repeat: bool) -> dict:
    """Play a run, and write the outcome of each step into the memory, or repeat it from there; return its summary."""
    numbers = itertools.count()
    make, step, play_baselines = rl.Episode.__init__, rl.Episode.step, eval.play_baselines

    def numbered(episode, *rest) -> None:
        make(episode, *rest)
        episode.number = next(numbers)

    def remembered(episode, text: str) -> str | None:
        key = (episode.number, episode.steps)
        if not repeat:
            reply = step(episode, text)
            memory[key] = text, reply, {name: value for name, value in vars(episode).items() if name in CARRIED}
        written, reply, changes = memory[key]
        assert written == text, "the two runs differ"
        vars(episode).update(changes)
        return reply

    def baselines(jail, tasks: list) -> dict:
        if not repeat:
            memory["baselines", tasks[0].env] = play_baselines(jail, tasks)
        return memory["baselines", tasks[0].env]

    rl.Episode.__init__, rl.Episode.step, eval.play_baselines = numbered, remembered, baselines
    folder = Path(tempfile.mkdtemp())
    try:
        options = selfchallenge.parse_options(arguments)
        settings = {key: value for key, value in vars(options).items() if key not in ("resume", "name", "changed")}
        return selfchallenge.play_run(selfchallenge.new_run(folder / "run", settings), options)
    finally:
        rl.Episode.__init__, rl.Episode.step, eval.play_baselines = make, step, play_baselines
        shutil.rmtree(folder)


def main() -> None:
    """Play the runs, and print the seconds of each phase."""
    memory: dict = {}
    seconds: dict[bool, list[dict]] = {True: [], False: []}
    for number, repeat in enumerate([False] + [True, False] * 3):
        start = time.monotonic()
        phases = played(sys.argv[1:], memory, repeat)["wall_s"]
        if number:
            seconds[repeat].append(phases | {"in all": time.monotonic() - start})
    print(f"{'seconds':12} {'with the jail':>14} {'without':>8} {'added':>7}")
    for phase in seconds[True][0]:
        jailed, free = [min(run[phase] for run in seconds[repeat]) for repeat in (False, True)]
        every = "   ".join(" ".join(f"{run[phase]:.1f}" for run in seconds[repeat]) for repeat in (False, True))
        print(f"{phase:12} {jailed:14.1f} {free:8.1f} {jailed / free - 1:7.0%}   (of {every})")


if __name__ == "__main__":
    main()
