"""Writes the student's copy of this repository, in which the solutions of the exercises are missing.

    python tests/make_assignment.py FOLDER

In the scripts a solution stands between the lines `### BEGIN SOLUTION` and `### END SOLUTION`, the markers of nbgrader.
An exercise is called like the function that holds it, and numbered in the order in which the scripts are read. The
solved repository is the only source: what COURSE.md, the tests and grade.py say of an exercise, they say by its name.
"""
import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["tools.py", "verify.py", "rl.py", "eval.py", "selfchallenge.py"]  # in reading order
SHIPPED = [  # and nothing else: what lies beside it may be a teacher's own
    *SCRIPTS, "README.md", "LICENSE", "requirements.txt", ".gitignore", "tiny/*", "tests/COURSE.md", "tests/course/*.py", "tests/test_*.py",
    "tests/bench_*.py", *(f"tests/{name}.py" for name in ("conftest", "figures", "live_memory", "readme", "results", "stand_ins")),
    "tests/figures/*.svg", "tests/figures/runs/*/*.json*"]
WITHHELD = {"tests/" + name for name in ("make_assignment.py", "wrong_answers.py", "grade.py", "test_assignment.py", "INSTRUCTOR.md")}
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
FOR_STUDENTS = """\
## As an assignment

The functions that are missing here are exercises: `tests/COURSE.md` is the handout. `python -m pytest` plays the tests of all
exercises.

"""
FIRST_FOR_STUDENTS = """

**In this copy ten functions are missing, which are exercises: begin with [the handout](tests/COURSE.md).** What this page says holds
when they are written.

"""
TELLING = 16  # a line of so many characters belongs to its solution; a shorter one may stand anywhere


class AssignmentError(ValueError):
    """Why no copy can be made; the message is one sentence."""


@dataclass
class Exercise:
    """A region of a script."""

    name: str         # of the function that holds it
    script: str
    first: int        # the line of its first marker, counted from 0
    last: int         # that of its second one
    indentation: str
    solution: str     # the lines between them


def find_exercises(script: str, text: str) -> list[Exercise]:
    """Return the exercises in the text of a script; raises AssignmentError if its markers make no sense."""
    lines, found, first = text.split("\n"), [], None
    for number, line in enumerate(lines):
        if not re.search(r"###\s*(BEGIN|END)|(BEGIN|END)\s+SOLUTION", line, re.IGNORECASE):
            continue
        place, marker = f"{script}, line {number + 1}", line.strip()
        if marker not in (BEGIN, END):
            raise AssignmentError(f"{place}: {marker!r} is neither {BEGIN!r} nor {END!r}")
        if (marker == BEGIN) != (first is None):
            raise AssignmentError(f"{place}: {marker!r} " + ("within a region" if marker == BEGIN else "without a beginning"))
        if marker == END:
            found.append(exercise_at(script, lines, first, number))
        first = number if marker == BEGIN else None
    if first is not None:
        raise AssignmentError(f"{script}, line {first + 1}: the region has no {END!r}")
    return found


def exercise_at(script: str, lines: list[str], first: int, last: int) -> Exercise:
    """Return the exercise between two markers; raises AssignmentError if it is no part of a function, or empty."""
    place, inside = f"{script}, line {first + 1}", lines[first + 1:last]
    indentation = lines[first][:-len(BEGIN)]
    if not any(line.strip() and not line.strip().startswith("#") for line in inside):
        raise AssignmentError(f"{place}: the region is empty")
    if lines[last] != indentation + END or any(line.strip() and not line.startswith(indentation) for line in inside):
        raise AssignmentError(f"{place}: the region, up to its end in line {last + 1}, is not indented like its beginning")
    name = function_around(lines[:first], len(indentation))
    if name is None:
        raise AssignmentError(f"{place}: the region stands in no function")
    return Exercise(name, script, first, last, indentation, "\n".join(inside))


def function_around(before: list[str], depth: int) -> str | None:
    """Return the name of the function in which a line with so much indentation stands, after these lines; None if in none."""
    for line in reversed(before):
        own = len(line) - len(line.lstrip())
        if line.strip() and own < depth and not line.lstrip().startswith(")"):  # a block around it; ")" ends a head of several lines
            if head := re.match(r" *def (\w+)", line):
                return head[1]
            depth = own
    return None


def all_exercises(root: Path = ROOT) -> list[Exercise]:
    """Return the exercises of all scripts in their order; raises AssignmentError if two have the same name."""
    exercises = [exercise for script in SCRIPTS for exercise in find_exercises(script, (root / script).read_text(encoding="utf-8"))]
    names = [exercise.name for exercise in exercises]
    if twice := {name for name in names if names.count(name) > 1}:
        raise AssignmentError(f"{', '.join(sorted(twice))}: an exercise is called like its function, so a name may occur only once")
    return exercises


def scripts_with(answers: dict[str, str], root: Path = ROOT) -> dict[str, str]:
    """Return {script: text} in which each exercise is replaced by its answer, if there is one, and else raises an error."""
    texts = {script: (root / script).read_text(encoding="utf-8").split("\n") for script in SCRIPTS}
    numbered = list(enumerate(all_exercises(root), start=1))
    for number, exercise in reversed(numbered):  # from the end, so that the numbers of the lines before stay right
        missing = f'{exercise.indentation}raise NotImplementedError("exercise {number}: {exercise.name}")'
        texts[exercise.script][exercise.first:exercise.last + 1] = answers.get(exercise.name, missing).split("\n")
    return {script: "\n".join(lines) for script, lines in texts.items()}


def shipped_files(root: Path = ROOT) -> list[str]:
    """Return the paths of the files that a student gets, below the root."""
    names = [path.relative_to(root).as_posix() for pattern in SHIPPED for path in sorted(root.glob(pattern)) if path.is_file()]
    return [name for name in names if name not in WITHHELD]


def for_students(readme: str) -> str:
    """Return the README with another chapter about course and tests, whose own ones speak of files that stay with the teacher."""
    readme = re.sub(r"^\| .*`(tests/INSTRUCTOR\.md|\.ci/run)`.*\n", "", readme, flags=re.MULTILINE)  # rows of the files' table
    readme = re.sub("^## As an assignment\n.*?(?=^## Licence)", FOR_STUDENTS, readme, flags=re.MULTILINE | re.DOTALL)
    return re.sub("\n\n", FIRST_FOR_STUDENTS, readme, count=1)


def make_copy(folder: Path, answers: dict[str, str] | None = None, root: Path = ROOT) -> None:
    """Write the student's copy, with answers to some exercises if wanted; raises AssignmentError if it would tell a solution."""
    if folder.exists():
        raise AssignmentError(f"{folder} exists already: choose another name, so that nothing is overwritten")
    answers = answers or {}
    files = {name: (root / name).read_bytes() for name in shipped_files(root)}
    files |= {script: text.encode() for script, text in scripts_with(answers, root).items()}
    files |= {"pytest.ini": b"[pytest]\ntestpaths = tests/course\n"}  # hundreds of others fail until all is solved
    files |= {"README.md": for_students(files["README.md"].decode()).encode()} if "README.md" in files else {}
    for exercise in all_exercises(root):
        for line in map(str.strip, exercise.solution.split("\n")):
            telling = [name for name, content in files.items() if line.encode() in content]
            if len(line) >= TELLING and telling and exercise.name not in answers:
                raise AssignmentError(f"{', '.join(telling)}: {line!r} stands in the solution of {exercise.name}")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the copy is to be written; it must not exist yet")
    try:
        folder = parser.parse_args().folder
        make_copy(folder)
    except (AssignmentError, OSError) as error:
        print(f"make_assignment.py: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: the students' copy, with {len(all_exercises())} exercises to solve; {folder / 'tests' / 'COURSE.md'} says how")
    return 0


if __name__ == "__main__":
    sys.exit(main())
