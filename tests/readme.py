"""Every command that the README documents, then those of the course, in a copy of the repository. `.ci/run` runs this.

    python tests/readme.py
    python tests/readme.py --count     (only writes the scripts' lines into the README's table)

What takes long is played in a smaller size, by options that are appended; the rest is the README's, to the letter. Models
that have to be downloaded give way to the embedded one, the benchmarks' checkouts to the tests' stand-ins; what needs a GPU gets
as far as it does without. A command has to end well. Where the embedded model cannot do the work, it may also end with the
sentence that no task survived the filter.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from stand_ins import make_m3tooleval, make_tau_bench  # noqa: E402
from tools import M3ToolEval, TauBench  # noqa: E402

SMALL = "--challenges 24 --steps 1 --tasks-per-step 4 --rollouts 4 --trials 1 --turn-tokens 176 --context 512 --parallel 96"
SMALLER = {  # what is appended to a command that begins so; the first that fits
    "python selfchallenge.py": f"--model tiny {SMALL} --any-version",
    "python garden.py": SMALL,
    "python rl.py --tasks": "--steps 1 --tasks-per-step 4",
    "python eval.py --report": "",
    "python eval.py": "--trials 1 --any-version",
    "python tests/results.py": f"--seeds 0 {SMALL} --trials 4",
    "python tests/bench_loop.py": f"{SMALL} --env calculator --challenges 8",
    "python tests/bench_jail.py": "--checks 10 --rounds 1",
    "python tests/bench_rl.py": "--rounds 1 --tasks 1",
    "python tiny/pretrain.py": "--episodes 40 --epochs 1",
    "TAU_BENCH=tau-bench M3TOOLEVAL=code-act python -m pytest": "-k 'agree or page'",
    "TAU_BENCH=tau-bench python tests/bench_worlds.py": "--any-version",
    "hf auth login": "--help",  # it asks for a password of one's own
    "python tests/wrong_answers.py": "pass_at_k",  # test_assignment.py plays them all
}
ELSEWHERE = {
    "python -m pytest": "it is the next that .ci/run does", "python tests/readme.py": "this is it",
    "python3 -m venv": ".ci/run has done it", "pip install": ".ci/run has done it",
}
RULE = "# " + 99 * "-" + "\n"  # above the head of a chapter
COMMAND = r"(?:(?:[A-Z0-9_]+=\S+ )*python (?:-m \w+|-c|\S+\.py)|python3 -m venv|pip install -r|git clone|hf auth login)"


def documented(text: str) -> list[str]:
    """Return the commands of a text: lines of their own, and those between backquotes."""
    text = text.replace("\\\n", " ")
    found = re.findall(rf"^(?:\$ )?({COMMAND}.*?)(?:  +#.*)?$|`({COMMAND}[^`]*)`", text, re.MULTILINE)
    return list(dict.fromkeys(" ".join((line or quoted).split()) for line, quoted in found))


def as_played(command: str) -> str:
    """Return a command with what its readers are to fill in, and in a smaller size."""
    for blank, filled in [(" ...", ""), ("…", "tiny"), ("MODEL", "tiny"), ("runs/NAME", "runs/run-1")]:
        command = command.replace(blank, filled)
    return f"{command} {next((more for start, more in SMALLER.items() if command.startswith(start)), '')}"


def prepare(folder: Path, readme: str) -> None:
    """Copy the repository to a folder, with what else the README has its readers make."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache"))
    shutil.copytree(ROOT / "tests" / "figures" / "runs", folder / "tests" / "figures" / "runs")
    (folder / "garden.py").write_text(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], encoding="utf-8")
    publish(make_m3tooleval(folder / "hub" / "xingyaoww" / "code-act"), M3ToolEval.clone)
    publish(make_tau_bench(folder / "hub" / "sierra-research" / "tau-bench"), TauBench.clone)
    (folder / "handed-in").mkdir()
    (folder / "handed-in" / "student").symlink_to("../course")


def publish(stand_in: Path, clone: str) -> None:
    """Make a repository of a stand-in, with a tag that has the name of the commit that a command of the README asks for."""
    for command in ("git init -q", "git add .", "git -c user.name=- -c user.email=- commit -qm stand-in", f"git tag {clone.split()[-1]}"):
        subprocess.run(command.split(), cwd=stand_in, check=True)


def counted(readme: str) -> str:
    """Return the README with the lines of each script in its table: all of them, and those of a first reading."""
    for script in re.findall(r"^\| `(\w+\.py)` \|", readme, re.MULTILINE):
        chapters = [RULE + text for text in (ROOT / script).read_text(encoding="utf-8").split(RULE)]
        lines = [text.count("\n") for text in chapters]
        lines[0] -= 1  # no rule is above the head of the file
        first = sum(n for n, text in zip(lines, chapters) if "(for a second reading)" not in text.split("\n")[1])
        readme = re.sub(rf"^(\| `{script}` \|.*?\|).*$", rf"\1 {sum(lines)} | {first} |", readme, flags=re.MULTILINE)
    return readme


def play(command: str, folder: Path) -> bool:
    """Run a command in a folder; print it, and how it ended; return whether that is well."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                   "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{folder}/hub/.insteadOf", "GIT_CONFIG_VALUE_0": "https://github.com/"}
    start = time.monotonic()
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    well = done.returncode == 0 or "no task survived the filter" in done.stderr
    print(f"{'ok' if well else 'FAILED':6} {time.monotonic() - start:5.1f} s  {command}", flush=True)
    if not well:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
    return well


def main() -> int:
    """Play all commands; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", action="store_true", help="only write the scripts' lines into the README's table")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if parser.parse_args().count:
        (ROOT / "README.md").write_text(counted(readme), encoding="utf-8")
        return 0
    ends = [counted(readme) == readme]
    print("ok" if ends[0] else "FAILED: python tests/readme.py --count", "    the lines of the scripts, in the table")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        prepare(folder, readme)
        course = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("*.md"))]
        for command in documented("\n".join([readme, *course])):
            if where := next((why for start, why in ELSEWHERE.items() if command.startswith(start)), None):
                print(f"not here, {where}: {command}")
            else:
                ends.append(play(as_played(command), folder))
    print(f"{sum(ends) - ends[0]} of {len(ends) - 1} commands ended well")
    return 0 if all(ends) else 1


if __name__ == "__main__":
    sys.exit(main())
