"""Grades solved copies: plays this repository's own tests of the exercises on the scripts in each folder.

    python tests/grade.py FOLDER...

An exercise gets its points, which stand in COURSE.md, if all its tests pass. A folder that lacks a script is named and
not graded, and the exit status is then 1. The scripts in a folder run as you: what you have not read, grade in a container.
They could also forge their points: read the answers, too; lines that were changed outside the gaps are shown.
"""
import argparse
import contextlib
import difflib
import gc
import io
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from make_assignment import ROOT, SCRIPTS, AssignmentError, all_exercises, make_copy, scripts_with

SECONDS = 60  # that the tests of an exercise may take


class Recorder:
    """A plugin of pytest that notes how each test ended: "passed", the name of what it raised, or "not played"."""

    def __init__(self):
        self.ends: dict[str, str] = {}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        self.ends[item.name] = "not played"  # and so it stays if the code ends the session, as KeyboardInterrupt does

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> None:
        if call.excinfo is not None:
            self.ends[item.name] = call.excinfo.typename
        elif call.when == "call":
            self.ends[item.name] = "passed"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.ends[report.nodeid] = "not imported"


def play(root: Path, name: str) -> dict[str, str]:
    """Return {test: how it ended} of the tests of an exercise in a copy; to be called in a process that imported no script."""
    recorder = Recorder()
    gc.freeze()  # pytest collects garbage several times: not in what was imported before
    torch.set_num_threads(1)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(root)
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([f"tests/course/test_{name}.py", "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    return recorder.ends


def in_parallel(function: Callable[..., dict], jobs: Iterable[tuple]) -> list[dict]:
    """Return function(*job) for each job, each in a new process, which begins where the slow imports are behind it.

    A process that is ended by its own code, or takes more than SECONDS, returns {}.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "transformers.models.llama.modeling_llama"])

    def play_one(job: tuple) -> dict:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=reply, args=(sender, function, job))
        process.start()
        sender.close()
        try:
            return receiver.recv() if receiver.poll(SECONDS) else {}
        except EOFError:
            return {}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.kill()  # should it not have got as far as its own group
            process.join()

    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        return list(threads.map(play_one, jobs))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # after an interrupt nobody waits for what is left


def reply(sender: Any, function: Callable, job: tuple) -> None:
    """Send what a function returns through a pipe, from a process group of its own."""
    os.setpgid(0, 0)
    sender.send(function(*job))


def play_student(folder: Path, name: str) -> dict[str, str]:
    """Return how our tests of an exercise end on the scripts in a student's folder."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        make_copy(copy)
        for script in SCRIPTS:
            shutil.copy(folder / script, copy / script)
        return play(copy, name)


def points() -> dict[str, int]:
    """Return {exercise: points} as the table in COURSE.md has them."""
    handout = (ROOT / "tests" / "COURSE.md").read_text(encoding="utf-8")
    return {name: int(number) for name, number in re.findall(r"^\| \d+ \| `(\w+)` \|[^|]*\| (\d+) \|", handout, re.MULTILINE)}


def outside_the_gaps(given: str, handed_in: str) -> list[str]:
    """Return the lines of a script that a student has taken out (-) or added (+), save for what stands in a gap.

    What follows an answer is outside from the first line on that is indented less than the gap.
    """
    ours, theirs = given.splitlines(), handed_in.splitlines()
    changed = []
    for kind, first, last, begin, end in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        block = [] if kind == "equal" else ours[first:last]
        gaps = [line for line in ours[first:last + (kind == "insert")] if "raise NotImplementedError(\"exercise" in line]
        changed += [f"- {line}" for line in block if line.strip() and "raise NotImplementedError(\"exercise" not in line]
        added = [line for line in theirs[begin:end] if line.strip() and kind != "equal"]
        margin = gaps[0][:-len(gaps[0].lstrip())] if gaps else None
        changed += [f"+ {line}" for line in itertools.dropwhile(lambda line: gaps and line.startswith(margin), added)]
    return changed


def main() -> int:
    """Print a line for each exercise of each folder, and the sums; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a solved copy")
    folders = [folder.resolve() for folder in parser.parse_args().folders]
    try:
        worth, names = points(), [exercise.name for exercise in all_exercises()]
        missing = {folder: [script for script in SCRIPTS if not (folder / script).is_file()] for folder in folders}
        jobs = [(folder, name) for folder in folders if not missing[folder] for name in names]
        played = dict(zip(jobs, in_parallel(play_student, jobs)))
    except (AssignmentError, OSError) as error:
        print(f"grade.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("grade.py: interrupted", file=sys.stderr)
        return 130
    for folder in folders:
        print(folder)
        if missing[folder]:
            print(f"  not graded, for it has no {', '.join(missing[folder])}" if folder.is_dir() else "  there is no such folder")
            continue
        for script in SCRIPTS:
            try:
                compile((folder / script).read_bytes(), script, "exec", dont_inherit=True)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                print(f"  Python cannot read {script}: {error}")
        total = 0
        for name in names:
            ends = list(played[folder, name].values())
            solved = bool(ends) and set(ends) == {"passed"}
            total += worth[name] * solved
            why = ", ".join(sorted({*ends} - {"passed"})) or ("" if ends else f"it ended Python, or took over {SECONDS} s")
            print(f"  {name:20} {worth[name] * solved:3} of {worth[name]:2} points, {ends.count('passed'):2} of {len(ends):2} tests passed"
                  + f" ({why})" * bool(why))
        print(f"  {'in all':20} {total:3} of {sum(worth.values())} points")
        for script, given in scripts_with({}).items():
            for line in outside_the_gaps(given, (folder / script).read_text(encoding="utf-8", errors="replace")):
                print(f"  {script}, outside the gaps: {line}")
    return int(any(missing.values()))


if __name__ == "__main__":
    sys.exit(main())
