"""Tasks: their text, their JSON, every stage of the filter on tasks written by hand, and the command line."""
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import verify
from tools import make_environment
from verify import (
    FAILURE_CASES,
    LINE_CHARACTERS,
    STAGES,
    CodeAsTask,
    FormatError,
    Jail,
    TaskError,
    as_answer,
    evaluate,
    judge,
    judge_many,
    parse_step,
    parse_task,
)

SEED = 5
LEDGER = make_environment("calculator", SEED).state
VERIFY = Path(__file__).parent.parent / "verify.py"

CALCULATOR = CodeAsTask(
    env="calculator",
    seed=SEED,
    instruction="Add the amount of the tea to twice the amount of the lamp.",
    evaluate="def evaluate(answer):\n    return answer == add(amount('tea'), multiply(2, amount('lamp')))",
    solution="result = add(amount('tea'), multiply(amount('lamp'), 2))",
    failures=[
        "result = add(amount('tea'), amount('lamp'))",
        "result = multiply(add(amount('tea'), amount('lamp')), 2)",
        "result = amount('chair') + 10**6",
    ],
)


def shop_task():
    """Cancel one pending order of the starting customer; the failures cancel another, change it, or only look."""
    shop = make_environment("shop", SEED)
    customer = shop.find_customer(shop.start)
    pending = [order["item"] for order in shop.list_orders(customer) if order["status"] == "pending"]
    look = f"order = find_order(find_customer({shop.start!r}), {{item!r}})\n"
    mine, other = (look.format(item=item) for item in pending)
    return CodeAsTask(
        env="shop",
        seed=SEED,
        instruction=f"Cancel the order of {pending[0]} of {shop.start}.",
        evaluate="def evaluate():\n    " + mine + "    return get_order(order)['status'] == 'cancelled'",
        solution=mine + "cancel_order(order)",
        failures=[other + "cancel_order(order)", mine + "change_quantity(order, 1)", mine + "print(get_order(order))"],
    )


SHOP = shop_task()


@pytest.fixture(scope="module")
def jail():
    with Jail(seconds=1.0) as jail:
        yield jail


def change(task, **parts):
    return dataclasses.replace(task, **parts)


# steps


@pytest.mark.parametrize("text, thought, kind, content", [
    ("THOUGHT: look END THOUGHT\nACTION:\nprint(1)\nEND ACTION", "look", "action", "print(1)"),
    ("THOUGHT: a\nb END THOUGHT ANSWER: 42 END ANSWER", "a\nb", "answer", "42"),
    ("ACTION: x = 1\ny = 2 END ACTION", "", "action", "x = 1\ny = 2"),
    ("ACTION:\n    if x:\n        y\nEND ACTION", "", "action", "if x:\n    y"),
    ("ACTION:\n```python\nprint(1)\n```\nEND ACTION", "", "action", "print(1)"),
    ("ACTION: ```\nprint(1)```END ACTION trailing words", "", "action", "print(1)"),
    ("ACTION:\n```python\n    if x:\n        y\n```\nEND ACTION", "", "action", "if x:\n    y"),
    ("ACTION:\n" + "```\n" * 10_000 + "x\nEND ACTION", "", "action", "x"),
    ("ANSWER: END ANSWER", "", "answer", ""),
    ("THOUGHT: the ACTION: comes later END THOUGHT ACTION: f() END ACTION", "the ACTION: comes later", "action", "f()"),
    ("ACTION: print('ANSWER: 5') END ACTION", "", "action", "print('ANSWER: 5')"),
    ("<think>\nAn ACTION: f() END ACTION?\n</think>\nTHOUGHT: no END THOUGHT ANSWER: 5 END ANSWER", "no", "answer", "5"),
    ("<think>a</think> ANSWER: 5 END ANSWER", "", "answer", "5"),
    ("ACTION: print('<think>ANSWER: 5</think>') END ACTION", "", "action", "print('<think>ANSWER: 5</think>')"),
])
def test_a_step_is_parsed(text, thought, kind, content):
    step = parse_step(text)
    assert (step.thought, step.kind, step.content) == (thought, kind, content)


@pytest.mark.parametrize("text", [
    "",
    "I would look the tea up.",
    "THOUGHT: it is 5 END THOUGHT",
    "<think>not closed ACTION: f() END ACTION",
    "THOUGHT: not closed ACTION: f() END ACTION",
    "ACTION: f()",
    "ANSWER: 5",
    "ACTION: END ACTION",
    "ACTION: ```python\n``` END ACTION",
    "ACTION: f() END ANSWER",
    "ACTION: f() END ACTION ACTION: g() END ACTION",
    "ACTION: f() END ACTION\nANSWER: 5 END ANSWER",
    "THOUGHT:" * 10_000,
    "ACTION:" * 10_000,
])
def test_a_malformed_step_raises_the_reminder(text):
    with pytest.raises(FormatError, match="END ACTION and ANSWER"):
        parse_step(text)


# a task as the challenger writes it


def written(task, failures=3, **tags):
    parts = {"instruction": task.instruction, "evaluation_function": task.evaluate, "solution": task.solution} | tags
    text = "\n".join(f"<{tag}>\n{part}\n</{tag}>" for tag, part in parts.items() if part is not None)
    return text + "".join(f"<failure_case>\n{code}\n</failure_case>" for code in task.failures[:failures])


def test_a_written_task_is_parsed():
    assert parse_task(f"Here it is.\n{written(SHOP)}", "shop", SEED) == SHOP
    fenced = written(CALCULATOR, solution=f"```python\n{CALCULATOR.solution}\n```")
    assert parse_task(fenced, "calculator", SEED) == CALCULATOR


def test_a_part_begins_at_its_tag():
    spoken = f"First the text, then </solution>, then three </failure_case> parts.\n{written(SHOP)}"
    assert parse_task(spoken, "shop", SEED) == SHOP


@pytest.mark.parametrize("text, reason", [
    ("", "<instruction>"),
    (written(SHOP, solution=None), "<solution>"),
    (written(SHOP, evaluation_function=None), "<evaluation_function>"),
    (written(SHOP) + "<solution>again</solution>", "<solution>…</solution> stands in the answer 2 times"),
    (written(SHOP, failures=0), "<failure_case>"),
    (written(SHOP, failures=2), "3 to 16 failure cases"),
    (written(SHOP, solution=" "), "solution is empty"),
    (written(SHOP, solution="x = '\0'"), "NUL"),
    (written(SHOP, instruction="\ud800"), "half a character"),
    (written(SHOP).replace("</instruction>", ""), "<instruction>"),
    (written(SHOP).replace("<solution>", ""), "<solution>…</solution> stands in the answer 0 times"),
    ("<failure_case>" * 20_000, "<instruction>"),
])
def test_an_incomplete_task_is_rejected_with_what_is_missing(text, reason):
    with pytest.raises(TaskError) as rejection:
        parse_task(text, "shop", SEED)
    assert rejection.value.stage == "parse" and reason in rejection.value.reason


# a task as JSON


@pytest.mark.parametrize("task", [CALCULATOR, SHOP, change(SHOP, instruction="Größe\n\u2028 \"é\" \U0001f600")])
def test_a_task_survives_the_round_trip_in_one_line(task):
    assert "\n" not in task.to_json() and CodeAsTask.from_json(task.to_json()) == task
    assert list(json.loads(task.to_json())) == ["env", "seed", "instruction", "evaluate", "solution", "failures"]


BAD_PARTS = [
    ({"env": "mars"}, "env must be one of"),
    ({"env": None}, "env must be one of"),
    ({"env": ["shop"]}, "env must be one of"),
    ({"seed": True}, "seed must be"),
    ({"seed": "5"}, "seed must be"),
    ({"seed": 5.0}, "seed must be"),
    ({"seed": 2**64}, "seed must be"),
    ({"instruction": 5}, "instruction is empty or not text"),
    ({"evaluate": None}, "evaluate is empty or not text"),
    ({"solution": "x" * 70_000}, "solution is longer"),
    ({"solution": "\0"}, "solution holds a NUL"),
    ({"evaluate": "\udc80"}, "half a character"),
    ({"failures": "result = 1"}, "failure cases"),
    ({"failures": []}, "failure cases"),
    ({"failures": ["x = 1"] * (FAILURE_CASES[0] - 1)}, "failure cases"),
    ({"failures": ["x = 1"] * (FAILURE_CASES[-1] + 1)}, "failure cases"),
    ({"failures": ["x = 1", "x = 2", 3]}, "failure case 3 is empty or not text"),
]
BAD_LINES = [(json.dumps(dataclasses.asdict(SHOP) | parts), reason) for parts, reason in BAD_PARTS] + [
    ("", "not a JSON object"),
    ("{", "not a JSON object"),
    ("[]", "not a JSON object"),
    ("5", "not a JSON object"),
    ('"text"', "not a JSON object"),
    ("[" * 100_000, "not a JSON object"),
    ('{"seed": ' + "9" * 5_000 + "}", "not a JSON object"),
    ('{"env": "shop"}', "lacks 'seed'"),
    (" " * LINE_CHARACTERS + "{}", "longer than"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_a_bad_line_is_rejected_in_a_sentence(jail, line, reason):
    with pytest.raises(TaskError) as rejection:
        CodeAsTask.from_json(line)
    assert rejection.value.stage == "parse" and reason in rejection.value.reason
    assert (judge(jail, line).ok, judge(jail, line).stage) == (False, "parse")


# answers


@pytest.mark.parametrize("value, answer", [
    ("36", 36), (" 36\n", 36), ("[1, 2.5]", [1, 2.5]), ("true", True), ('"tea"', "tea"), ("tea ", "tea"), ("", ""),
    ("NaN", "NaN"), ("[" * 3_000, "[" * 3_000), ("9" * 4_000, "9" * 4_000), ("x" * 9_000, "x" * 4_000), ("\ud800", "?"),
    (36, 36), (None, None), ([1], [1]), ('{"a": 1}', {"a": 1}), ("True", True), (" False", False), ("None", None), ("['a']", "['a']"),
])
def test_an_answer_becomes_data_and_stays_it(value, answer):
    assert as_answer(value) == answer and type(as_answer(value)) is type(answer)
    assert as_answer(as_answer(value)) == answer


# the filter, stage by stage


@pytest.mark.parametrize("task", [CALCULATOR, SHOP])
def test_a_good_task_survives(jail, task):
    judgement = judge(jail, task)
    assert (judgement.ok, judgement.stage, judgement.reason) == (True, "ok", "")
    assert judge(jail, task.to_json()).ok


FLIPPING = "def evaluate(answer):\n    return answer == 1 and next(iter({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})) == "
REJECTED = {
    "solution raises": (change(SHOP, solution="cancel_order('W1')"), "runs", "ToolError: no order has the id 'W1'"),
    "solution loops": (change(SHOP, solution="while True: pass"), "runs", "longer than 1 seconds"),
    "solution is no Python": (change(SHOP, solution="cancel the order"), "runs", "SyntaxError"),
    "solution exits": (change(SHOP, solution=SHOP.solution + "\nimport os; os._exit(0)"), "runs", "ended or crashed"),
    "evaluate raises": (change(SHOP, evaluate="def evaluate():\n    return 1 / 0"), "runs", "<action 1>, line 2: return 1 / 0"),
    "evaluate is missing": (change(SHOP, evaluate="check = 1"), "runs", "does not define evaluate"),
    "evaluate returns no bool": (change(SHOP, evaluate="def evaluate(): return 1"), "runs", "returned '1' instead of True"),
    "evaluate returns nothing": (change(SHOP, evaluate="def evaluate(): pass"), "runs", "returned 'None' instead"),
    "a failure case raises": (change(SHOP, failures=SHOP.failures[:2] + ["return_order('W1')"]), "runs", "failure case 3"),
    "evaluate does the work": (
        change(SHOP, solution=SHOP.failures[2], evaluate=SHOP.failures[2] + "\ndef evaluate(): return bool(cancel_order(order))"),
        "runs", "changed the state"),
    "solution solves nothing": (change(SHOP, solution="print('done')"), "solution", "example solution does not pass"),
    "solution gives the wrong answer": (change(CALCULATOR, solution="result = -1"), "solution", "pass the evaluation"),
    "solution gives no answer": (change(CALCULATOR, solution="print(1)"), "solution", "the evaluation:\nits answer arrives as None"),
    "solution gives a set": (change(CALCULATOR, solution="result = {5}"), "solution", "its answer arrives as '<set: not JSON, or too long>'"),
    "solution gives digits": (change(CALCULATOR, solution="result = '007.0'"), "solution", "arrives as '007.0'"),
    "a failure case passes": (change(SHOP, failures=SHOP.failures[:1] + [SHOP.solution] + SHOP.failures[1:]), "failures",
                              "failure case 2 passes"),
    "everything passes": (change(SHOP, evaluate="def evaluate(): return True"), "failures", "failure case 1 passes"),
    "doing nothing passes": (
        change(CALCULATOR, evaluate="def evaluate(answer): return answer is None", solution="x = 1", failures=["result = 1"] * 3),
        "failures", "doing nothing passes"),
    "the environment is unknown": (change(SHOP, env="mars"), "parse", "env must be one of"),
    "too few failure cases": (change(SHOP, failures=SHOP.failures[:2]), "parse", "3 to 16"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_bad_task_is_rejected_at_its_stage(jail, name):
    task, stage, reason = REJECTED[name]
    judgement = judge(jail, task)
    assert (judgement.ok, judgement.stage) == (False, stage), judgement
    assert reason in judgement.reason and stage in STAGES


def test_a_verdict_that_flips_between_runs_is_rejected(jail):
    """The order of a set of texts depends on the hash seed, which each server has for itself."""
    orders = []
    for replica in (0, 1):
        with jail.session(None, replica) as session:
            orders.append(session.run("import random\nresult = [next(iter({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})), random.random()]").value)
    (first, draw), (second, other) = orders
    assert draw != other
    seeded = f"import random\ndraw = random.random()\ndef evaluate(answer): return answer == 1 and draw == {draw!r}"
    hashed = f"def evaluate(answer): return answer == 1 and hash('tea') == {hash_of(jail, 0)}"
    for evaluation in (seeded, hashed):
        judgement = judge(jail, change(CALCULATOR, solution="result = 1", evaluate=evaluation))
        assert judgement.stage == "solution" and judgement.reason.startswith("when it was tried again, the example solution")


@pytest.mark.parametrize("chance", ["import os; odd = os.urandom(1)[0] % 8 > 0", "import os; odd = os.getpid() % 5 > 0"])
def test_a_verdict_that_flips_by_a_chance_that_has_no_seed_is_rejected(jail, chance):
    """Each of twelve tasks is kept with a chance of 7/8, six times over, 45 in 100: all of them with one of 1 in 10,000.

    Pids follow one another: a task takes 14 of them, so twelve tasks meet every remainder by 5.
    """
    flips = [change(CALCULATOR, solution="result = 1", failures=["0", "1", "2"],
                    evaluate=f"{chance}\ndef evaluate(answer): return answer == 1 and odd  # {number}") for number in range(12)]
    judgements = [judge(jail, task) for task in flips]
    assert not all(judgement.ok for judgement in judgements)
    assert {judgement.stage for judgement in judgements} <= {"solution", "ok"}


def test_the_evaluation_is_repeated_in_children_that_are_not_remembered(jail, monkeypatch):
    """An evaluation that passes three times and then never again: what is judged three times alone is kept."""
    replies, what_is_left = iter([True, False, False, False, False, True, False, True, False, False]), verify.what_is_left
    seen, solved = [], []

    def recorded(jail, task, replica, what, code):
        solved.append(replica)
        return what_is_left(jail, task, replica, what, code)

    def flipping(jail, task, environment, answer, replica=0):
        seen.append(replica)
        return verify.Verdict(next(replies))
    monkeypatch.setattr(verify, "evaluate", flipping)
    monkeypatch.setattr(verify, "what_is_left", recorded)
    judgement = judge(jail, CALCULATOR)
    assert judgement.stage == "solution" and "every time" in judgement.reason
    assert seen == [0] * 5 + [1, 1, 2, 2, 3]  # a whole check, then a solution and a failure case of each replica ...
    assert solved == [0] * 4 + [1, 1, 2, 2, 3]  # ... from fresh states


@pytest.mark.parametrize("replica", range(1, 6))
def test_an_evaluation_that_accepts_anything_on_one_server_alone_is_rejected(jail, replica):
    """The executor's answers are judged on all of them."""
    here = f"hash('tea') == {hash_of(jail, replica)}"
    judgement = judge(jail, change(CALCULATOR, evaluate=f"{CALCULATOR.evaluate.rstrip()} or {here}"))
    assert judgement.stage == "failures" and judgement.reason.startswith("when it was tried again, failure case")


@pytest.mark.parametrize("cases", [3, 16])
def test_each_failure_case_is_tried_again(jail, cases):
    """A failure case that gives the right answer on all servers but the first, whichever it is."""
    for number in range(cases):
        failures = [f"result = -{case}" for case in range(cases)]
        failures[number] = f"{CALCULATOR.solution}\nif hash('tea') == {hash_of(jail, 0)}: result = -1"
        judgement = judge(jail, change(CALCULATOR, failures=failures))
        assert judgement.stage == "failures" and f"failure case {number + 1} passes" in judgement.reason


def test_the_longest_evaluation_that_is_allowed_is_judged_like_any_other(jail):
    assert judge(jail, change(CALCULATOR, evaluate=CALCULATOR.evaluate + "\n" + "#" * (65_535 - len(CALCULATOR.evaluate)))).ok


def test_a_solution_that_depends_on_chance_is_rejected(jail):
    lucky = f"result = int(hash('tea') == {hash_of(jail, 0)})"
    judgement = judge(jail, change(CALCULATOR, solution=lucky, evaluate="def evaluate(answer): return answer == 1"))
    assert judgement.stage == "solution" and judgement.reason.startswith("when it was tried again, the example solution")


def hash_of(jail, replica):
    with jail.session(None, replica) as session:
        return int(session.run("print(hash('tea'))").printed)


def test_the_state_is_reset_between_solution_and_failure_cases(jail):
    """The third failure case only looks, so it would pass in the state that the solution leaves."""
    assert "cancel" not in SHOP.failures[2]
    assert judge(jail, SHOP).ok
    assert judge(jail, change(SHOP, failures=SHOP.failures[::-1])).ok


def test_an_evaluation_that_stumbles_over_no_answer_fails_doing_nothing(jail):
    evaluation = "def evaluate(answer):\n    return answer + 0 == add(amount('tea'), 2 * amount('lamp'))"
    assert judge(jail, change(CALCULATOR, evaluate=evaluation)).ok


def test_evaluate_leaves_the_state_and_reads_what_the_code_did(jail):
    environment = make_environment("shop", SEED)
    assert evaluate(jail, SHOP, environment, None).passed is False
    with jail.session(environment) as session:
        assert session.run(SHOP.solution).error is None
    state = json.dumps(environment.state)
    assert evaluate(jail, SHOP, environment, "done").passed is True
    meddling = change(SHOP, evaluate=SHOP.failures[0] + "\ndef evaluate(): return True")
    verdict = evaluate(jail, meddling, environment, None)
    assert verdict.passed is False and "changed the state" in verdict.reason
    assert json.dumps(environment.state) == state


def test_the_state_is_put_back_also_where_it_seems_the_same(jail):
    environment = make_environment("shop", SEED)
    environment.state = {"stock": 1}
    environment.tools = {"restock": lambda environment: environment.state.update(stock=1.0)}
    evaluate(jail, change(SHOP, evaluate="def evaluate():\n    restock()\n    return True"), environment, None)
    assert json.dumps(environment.state) == '{"stock": 1}'


def test_an_answer_in_text_equals_the_solution_in_numbers(jail):
    right = LEDGER["tea"] + 2 * LEDGER["lamp"]
    for answer, passed in [(str(right), True), (right, True), (str(right + 1), False), ("tea", False), (None, False)]:
        assert evaluate(jail, CALCULATOR, make_environment("calculator", SEED), answer).passed is passed


def test_many_tasks_are_judged_in_their_order(jail):
    tasks = [SHOP, "no task", REJECTED["solution raises"][0], CALCULATOR, REJECTED["everything passes"][0]] * 4
    stages = [judgement.stage for judgement in judge_many(jail, tasks, workers=3)]
    assert stages == ["ok", "parse", "runs", "ok", "failures"] * 4


def test_tasks_are_read_only_a_few_ahead(jail):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield CALCULATOR

    judgements = judge_many(jail, endless(), workers=2)
    assert [next(judgements).ok for _ in range(5)] == [True] * 5
    assert read <= 5 + 8
    judgements.close()


def test_a_judgement_does_not_wait_for_tasks_that_are_still_to_come(jail):
    def slow():
        yield "no task"
        time.sleep(0.2)  # in which that is judged
        yield CALCULATOR
        raise AssertionError("the first judgement should have been handed out before this is asked for")

    assert next(judge_many(jail, slow())).stage == "parse"


def test_whoever_stops_reading_waits_for_nothing_that_is_ahead(monkeypatch):
    """Such as Ctrl-C: with four times four tasks ahead that loop it would take long."""
    started, stopped, in_time = threading.Event(), threading.Event(), []

    def slow(jail, task):
        if task == "first":
            return started.wait(10)
        started.set()
        in_time.append(stopped.wait(3))

    monkeypatch.setattr(verify, "judge", slow)
    judgements = judge_many(None, ["first"] + ["other"] * 10)
    assert next(judgements)
    judgements.close()
    stopped.set()
    assert False not in in_time


# the command line


def command(*arguments, **options):
    return subprocess.run([sys.executable, VERIFY, *arguments], capture_output=True, timeout=600, **options)


def test_the_command_line_judges_every_line_whatever_the_others_are(tmp_path):
    lines = [line.encode() for line in (SHOP.to_json(), "no task", CALCULATOR.to_json(), "", REJECTED["everything passes"][0].to_json())]
    lines[0], lines[2] = (b"\xef\xbb\xbf" + lines[n] for n in (0, 2))  # as some editors begin a file, and two of them in one
    lines += [b"\xff\xfe\x00", b'{"env": "' + b"x" * 3 * LINE_CHARACTERS + b'"}', SHOP.to_json().encode()]
    lines += [SHOP.to_json().encode() + "\u3000".encode() * LINE_CHARACTERS, SHOP.to_json().encode() + b" " * LINE_CHARACTERS + b"no task"]
    (tmp_path / "tasks.jsonl").write_bytes(b"\n".join(lines))
    result = command("tasks.jsonl", cwd=tmp_path)
    judgements = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, result.stderr
    assert [judgement["stage"] for judgement in judgements] == ["ok", "parse", "ok", "parse", "failures", "parse", "parse", "ok", "parse", "parse"]
    assert all(set(judgement) == {"ok", "stage", "reason", "seconds"} for judgement in judgements)
    assert result.stderr.startswith(b"jail: ") and b"lines judged: 10, tasks that would be kept: 3" in result.stderr


WITHOUT_SECCOMP = """
import ctypes, os, runpy, struct, sys
load, equal, give = 0x20, 0x15, 0x06
prctl = {"x86_64": 157, "aarch64": 167}[os.uname().machine]
program = [(load, 0, 0, 0), (equal, 0, 3, prctl), (load, 0, 0, 16), (equal, 0, 1, 22), (give, 0, 0, 0x50001), (give, 0, 0, 0x7FFF0000)]
instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HP", len(program), ctypes.addressof(instructions)), 0, 0) == 0
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="takes seccomp away by seccomp")
def test_a_system_without_seccomp_needs_the_flag(tmp_path):
    (tmp_path / "tasks.jsonl").write_text(SHOP.to_json())
    arguments = [sys.executable, "-c", WITHOUT_SECCOMP, str(VERIFY), "tasks.jsonl"]
    refused = subprocess.run(arguments, capture_output=True, cwd=tmp_path, timeout=600)
    assert refused.returncode == 2 and refused.stdout == b"" and refused.stderr.count(b"\n") == 1, refused.stderr
    assert b"--allow-weak-jail" in refused.stderr
    weak = subprocess.run(arguments + ["--allow-weak-jail"], capture_output=True, cwd=tmp_path, timeout=600)
    assert weak.returncode == 0 and json.loads(weak.stdout)["ok"] and weak.stderr.startswith(b"jail: WEAK"), weak.stderr


@pytest.mark.parametrize("path", ["missing.jsonl", "."])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, path):
    result = command(path, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == b""
    assert result.stderr.startswith(b"verify.py: ") and result.stderr.count(b"\n") == 1


def test_memory_that_does_not_suffice_is_one_sentence(capsys):
    def work():
        raise MemoryError  # as Python itself raises it, without a word
    assert verify.guarded("verify.py", work, lambda: "nothing was begun") == 2
    assert capsys.readouterr().err == "verify.py: the memory does not suffice; nothing was begun\n"


def test_an_empty_file_has_no_verdicts(tmp_path):
    (tmp_path / "tasks.jsonl").touch()
    result = command("tasks.jsonl", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "tasks.jsonl").write_text(SHOP.to_json())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as it is at most users
    with open("/dev/full", "wb") as full:
        result = subprocess.run([sys.executable, VERIFY, "tasks.jsonl"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, env=environment)
    assert result.returncode == 2 and b"No space left" in result.stderr and b"Traceback" not in result.stderr


def hear_interrupts():
    """A shell starts its background jobs deaf to Ctrl-C, and a test run may be one of them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_is_one_sentence(tmp_path):
    (tmp_path / "tasks.jsonl").write_text("\n".join([SHOP.to_json()] * 5_000))
    process = subprocess.Popen(
        [sys.executable, VERIFY, "tasks.jsonl"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_interrupts
    )
    assert json.loads(process.stdout.readline())["ok"]
    process.send_signal(2)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130 and b"interrupted" in errors and b"Traceback" not in errors


def test_a_reader_that_leaves_is_no_error(tmp_path):
    (tmp_path / "tasks.jsonl").write_text("\n".join([SHOP.to_json()] * 20))
    process = subprocess.Popen([sys.executable, VERIFY, "tasks.jsonl"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=600)
    assert b"Traceback" not in process.stderr.read() and process.returncode == 1


@pytest.mark.parametrize("closed", [1, 2])
def test_a_stream_that_is_closed_is_written_nowhere_else(tmp_path, closed):
    (tmp_path / "tasks.jsonl").write_text(SHOP.to_json())
    result = command("tasks.jsonl", cwd=tmp_path, preexec_fn=functools.partial(os.close, closed))
    assert result.returncode == 0 and b"Traceback" not in result.stderr
    assert bool(result.stdout) == (closed == 2) and (b"lines judged: 1" in result.stderr) == (closed == 1)
    assert all(json.loads(line)["ok"] for line in result.stdout.splitlines())


def test_code_that_begins_on_the_line_of_its_tag_keeps_its_indentation():
    assert parse_step("ACTION: if x:\n y\nEND ACTION").content == "if x:\n y"


def test_a_quoted_number_is_a_number():
    assert as_answer('"36"') == 36 and as_answer('"\\"tea\\""') == "tea"
