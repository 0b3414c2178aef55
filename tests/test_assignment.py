"""The course: what the maker refuses, what a student's copy holds, and that the exercises' tests reject wrong answers."""
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

import make_assignment
from grade import main as grade_main
from grade import outside_the_gaps, points
from make_assignment import BEGIN, END, SCRIPTS, TELLING, WITHHELD, AssignmentError, all_exercises, find_exercises, make_copy, scripts_with
from wrong_answers import EXERCISES, WRONG, play_all

ROOT = Path(__file__).resolve().parent.parent
FUNCTION = f'''def double(x):
    """Return twice x."""
    {BEGIN}
    twice = x + x
    return twice
    {END}


class Half:
    def of(self, x):
        if x:
            {BEGIN}

            return x / 2.0000000
            {END}
        return 0
'''


def repository(folder: Path, **texts: str) -> Path:
    """Write a repository with the given scripts, {name: text}, and otherwise empty ones."""
    for script in SCRIPTS:
        (folder / script).parent.mkdir(parents=True, exist_ok=True)
        (folder / script).write_text(texts.get(script.removesuffix(".py"), ""))
    return folder


# ---------------------------------------------------------------------------------------------------
# the maker

def test_an_exercise_is_the_lines_between_its_markers_and_is_called_like_its_function():
    double, half = find_exercises("a.py", FUNCTION)
    assert (double.name, double.indentation, double.solution) == ("double", "    ", "    twice = x + x\n    return twice")
    assert (half.name, half.indentation) == ("of", " " * 12)


def test_in_the_copy_an_error_stands_in_its_place_with_its_indentation(tmp_path):
    copy = scripts_with({}, repository(tmp_path, tools="x = 1\n", rl=FUNCTION))
    assert copy["tools.py"] == "x = 1\n"
    assert copy["rl.py"] == '''def double(x):
    """Return twice x."""
    raise NotImplementedError("exercise 1: double")


class Half:
    def of(self, x):
        if x:
            raise NotImplementedError("exercise 2: of")
        return 0
'''


def test_an_answer_stands_in_its_place_and_only_there(tmp_path):
    repository(tmp_path, rl=FUNCTION)
    assert "    return 2 * x\n" in scripts_with({"double": "    return 2 * x"}, tmp_path)["rl.py"]
    solved = scripts_with({exercise.name: exercise.solution for exercise in all_exercises(tmp_path)}, tmp_path)
    assert solved["rl.py"] == "".join(line + "\n" for line in FUNCTION.splitlines() if line.strip() not in (BEGIN, END))


@pytest.mark.parametrize("text, reason", [
    (FUNCTION + f"    {BEGIN}\n    x\n", "the region has no '### END SOLUTION'"),
    (f"def f():\n    {END}\n", "line 2: '### END SOLUTION' without a beginning"),
    (f"def f():\n    {BEGIN}\n    x\n    {BEGIN}\n    {END}\n    {END}\n", "line 4: '### BEGIN SOLUTION' within a region"),
    (f"def f():\n    {BEGIN}\n    {END}\n", "line 2: the region is empty"),
    (f"def f():\n    {BEGIN}\n    # a comment\n\n    {END}\n", "line 2: the region is empty"),
    (f"def f():\n    {BEGIN}\n    x\n  {END}\n", "not indented like its beginning"),
    (f"def f():\n    {BEGIN}\n  x\n    {END}\n", "not indented like its beginning"),
    (f"{BEGIN}\nx\n{END}\n", "stands in no function"),
    (f"def f():\n    pass\n\n\nif x:\n    {BEGIN}\n    x\n    {END}\n", "stands in no function"),
    ("def f():\n    ### BEGIN SOLUTIONS\n    x\n", "'### BEGIN SOLUTIONS' is neither"),
    ("def f():\n    ### BEGIN HIDDEN TESTS\n    x\n", "is neither"),
    ("def f():\n    # end solution\n", "is neither"),
    (f"def f():\n    x = 1  {BEGIN}\n", "is neither"),
    (FUNCTION + FUNCTION, "double, of: an exercise is called like its function"),
])
def test_markers_that_make_no_sense_are_refused(tmp_path, text, reason):
    repository(tmp_path / "repository", verify=text)
    with pytest.raises(AssignmentError, match=re.escape(reason)):
        make_copy(tmp_path / "copy", root=tmp_path / "repository")
    assert not (tmp_path / "copy").exists()


def test_a_line_of_a_solution_that_stands_elsewhere_is_refused(tmp_path):
    root = repository(tmp_path / "repository", rl=FUNCTION)
    make_copy(tmp_path / "copy", root=root)
    (root / "tests").mkdir()
    (root / "tests" / "test_half.py").write_text("def mine(x):\n    return x / 2.0000000\n")
    with pytest.raises(AssignmentError, match="tests/test_half.py: 'return x / 2.0000000' stands in the solution of of"):
        make_copy(tmp_path / "another", root=root)


def test_an_existing_folder_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_assignment.py", str(tmp_path)])
    assert make_assignment.main() == 2
    assert "exists already" in (complaint := capsys.readouterr().err) and complaint.count("\n") == 1


# ---------------------------------------------------------------------------------------------------
# the student's copy

@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("course") / "copy"
    make_copy(folder)
    return folder


def test_no_line_of_a_solution_is_left(copy):
    everything = {path: path.read_text(errors="replace") for path in copy.rglob("*") if path.is_file()}
    for exercise in EXERCISES.values():
        for line in filter(None, map(str.strip, exercise.solution.split("\n"))):
            left, solved = (text.split("\n") for text in (everything[copy / exercise.script], (ROOT / exercise.script).read_text()))
            assert sum(line == other.strip() for other in left) < sum(line == other.strip() for other in solved), line
            assert len(line) < TELLING or not [path for path, text in everything.items() if line in text], line
    assert not [script for script in SCRIPTS if BEGIN in everything[copy / script] or END in everything[copy / script]]


def test_what_lies_beside_the_repository_s_files_is_not_shipped(tmp_path):
    root = repository(tmp_path / "repository")
    for name in ("tests/test_a.py", "tests/INSTRUCTOR.md~", "tests/solutions.md", "tests/course2/rl.py", "tests/mine.py", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    assert make_assignment.shipped_files(root) == [*SCRIPTS, "tests/test_a.py"]


def test_what_is_the_teacher_s_stays_with_the_teacher(copy):
    shipped = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert not shipped & WITHHELD and all((ROOT / name).exists() for name in WITHHELD)
    readme = (copy / "README.md").read_text()
    assert "(tests/COURSE.md)" in readme.split("\n\n")[1] and not [name for name in WITHHELD if Path(name).name in readme] and "SOLUTION" not in readme
    assert {*SCRIPTS, "README.md", "requirements.txt", "tiny/model.safetensors", "tests/COURSE.md", "tests/test_rl.py"} <= shipped
    assert not [name for name in shipped if ".git/" in name or "__pycache__" in name or name.startswith("runs")]


def test_in_the_copy_exactly_the_tests_of_the_exercises_fail_each_for_want_of_its_own(copy):
    """One real pytest in one real process: the scripts are imported, what is given passes, and nothing else does."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "--junitxml", "report.xml"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    seen = set()
    for case in xml.parse(copy / "report.xml").iter("testcase"):
        name = case.get("classname").removeprefix("tests.course.test_")
        problem = case.find("failure")
        seen.add(name)
        assert case.find("error") is None and case.find("skipped") is None
        if name == "given":
            assert problem is None
        else:
            number = list(EXERCISES).index(name) + 1
            assert problem is not None and problem.get("message") == f"NotImplementedError: exercise {number}: {name}", case.attrib
    assert seen == {"given", *EXERCISES}


def test_the_handout_and_the_notes_speak_of_every_exercise_in_its_order():
    handout, notes = ((ROOT / "tests" / name).read_text() for name in ("COURSE.md", "INSTRUCTOR.md"))
    assert list(points()) == list(EXERCISES) == list(WRONG)
    for number, exercise in enumerate(EXERCISES.values(), start=1):
        assert f"### {number}. `{exercise.name}`" in handout and f"### {number}. `{exercise.name}`" in notes
        assert f"python -m pytest tests/course/test_{exercise.name}.py" in handout
        assert re.search(rf"\| *{number} *\| *`{exercise.name}` *\| *{exercise.script} *\|", handout)
    assert f"{sum(points().values())} points" in handout


# ---------------------------------------------------------------------------------------------------
# wrong answers

@pytest.fixture(scope="module")
def played() -> dict:
    return play_all()


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_passes_although_no_other_exercise_is_solved(played, name):
    ends = played[name, "the solution"]
    assert len(ends) >= 4 and set(ends.values()) == {"passed"}


@pytest.mark.parametrize("name, answer", [(name, answer) for name in WRONG for answer in WRONG[name]])
def test_a_wrong_answer_is_rejected(played, name, answer):
    """By an assertion, by pytest for an error that did not come, by a step that was refused, or by shapes that do not fit; no test was lost."""
    ends = played[name, answer]
    assert {"AssertionError", "Failed", "FormatError", "RuntimeError"} & set(ends.values())
    assert len(ends) == len(played[name, "the solution"]) and not {"SyntaxError", "NameError", "NotImplementedError"} & set(ends.values())


def test_every_exercise_has_at_least_three_wrong_answers():
    assert all(len(answers) >= 3 for answers in WRONG.values())


def reads(path: Path) -> bytes:
    """The content of a file, or nothing if it is gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_what_python_cannot_read_is_said_once(copy, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "eve"
    shutil.copytree(copy, folder)
    (folder / "eval.py").write_text("def pass_at_k(:\n")
    monkeypatch.setattr(sys, "argv", ["grade.py", str(folder)])
    monkeypatch.setattr("grade.in_parallel", lambda function, jobs: [{"test": "not imported"}] * len(jobs))
    assert grade_main() == 0
    assert capsys.readouterr().out.count("Python cannot read eval.py: invalid syntax (eval.py, line 1)") == 1


def test_a_copy_is_graded_by_the_teacher_s_tests(copy, tmp_path, monkeypatch, capsys):
    """Two are solved, one is wrong and starts a process, one ends its own, one only the tests; the student's own tests are deleted."""
    folder = tmp_path / "ada"
    shutil.copytree(copy, folder)
    answers = {name: EXERCISES[name].solution for name in ("parse_step", "pass_at_k")}
    started = "    import subprocess\n    subprocess.Popen(['sleep', '70777'])\n    return 0.5"
    answers |= {"signal_share": started, "advantages": "    os._exit(0)", "evaluate": "    raise KeyboardInterrupt"}
    for script, text in scripts_with(answers).items():
        (folder / script).write_text(text.replace("CHUNK_TOKENS = 512", "CHUNK_TOKENS = 10**9"))
    shutil.rmtree(folder / "tests")
    (tmp_path / "bob").mkdir()
    monkeypatch.setattr(sys, "argv", ["grade.py", str(tmp_path / "nobody"), str(tmp_path / "bob"), str(folder)])
    assert grade_main() == 1
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"70777" in reads(path)]
    _, nobody, bob, not_graded, *lines = capsys.readouterr().out.splitlines()
    assert "no such folder" in nobody
    assert bob.endswith("bob") and "it has no" in not_graded and "rl.py" in not_graded
    graded, in_all, *changed = lines[1:11], *lines[11:]
    assert {line.split()[0] for line in graded if line.split()[1] != "0"} == {"parse_step", "pass_at_k"}
    reasons = {line.split()[0]: line.partition("(")[2] for line in graded}
    assert not reasons["parse_step"] and "AssertionError" in reasons["signal_share"] and "ended Python" in reasons["advantages"]
    assert reasons["extend"] == "NotImplementedError)" and reasons["evaluate"] == "not played)"
    assert in_all.split()[:3] == ["in", "all", str(points()["parse_step"] + points()["pass_at_k"])]
    assert [line.split(" = ")[0].strip() for line in changed] == [f"rl.py, outside the gaps: {sign} CHUNK_TOKENS" for sign in "-+"]


def test_what_follows_an_answer_in_its_gap_is_shown_once_it_leaves_the_function():
    given = 'def one():\n    raise NotImplementedError("exercise 1: one")\n\n\ndef two():\n    return 2\n'
    answer = given.replace('raise NotImplementedError("exercise 1: one")', "x = [\n        1]\n\n    return x[0]")
    assert outside_the_gaps(given, answer) == []
    assert outside_the_gaps(given, answer.replace("\n\n\n", "\n\n\nif True:\n    cheat()\n\n\n")) == ["+ if True:", "+     cheat()"]
    assert outside_the_gaps(given, answer.replace("return 2", "return 3")) == ["-     return 2", "+     return 3"]
