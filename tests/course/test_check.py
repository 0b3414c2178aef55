"""check: the filter's rule. What `evaluate` says, which is another exercise, is said here by a function on this side."""
import dataclasses
import re
from typing import Any, Callable

import pytest

import verify
from tools import make_environment
from verify import CodeAsTask, TaskError, Verdict

SEED = 5
TEA = make_environment("calculator", SEED).state["tea"]
TASK = CodeAsTask(
    env="calculator",
    seed=SEED,
    instruction="Add 100 to the amount of the tea.",
    evaluate="def evaluate(answer):\n    return answer == amount('tea') + 100",
    solution="result = add(amount('tea'), 100)",
    failures=["result = amount('tea')", "result = 100", "result = subtract(amount('tea'), 100)"],
)


@pytest.fixture
def check(jail, monkeypatch):
    """Return the function that gives a task, where an answer is judged by `says`, the stage and reason of its rejection."""
    def rejected(task: CodeAsTask, says: Callable[[Any, Any], Verdict] = lambda _, answer: Verdict(answer == TEA + 100)):
        asked, session = set(), jail.session
        with monkeypatch.context() as patch:
            patch.setattr(jail, "session", lambda environment, replica=0: asked.add(replica) or session(environment, replica))
            patch.setattr(verify, "evaluate", lambda jail, task, environment, answer, replica=0: asked.add(replica) or says(environment, answer))
            try:
                verify.check(jail, task, replica=1)
                end = "survived", ""
            except TaskError as rejection:
                end = rejection.stage, rejection.reason
        assert asked == {1}  # all code ran on the server that was asked for
        return end
    return rejected


def change(**parts) -> CodeAsTask:
    return dataclasses.replace(TASK, **parts)


def names(reason: str, number: int) -> bool:
    """Return whether a reason speaks of this failure case, in whatever words."""
    return re.search(rf"\bfailure case {number}\b", reason, re.IGNORECASE) is not None


def test_a_sound_task_survives(check):
    assert check(TASK) == ("survived", "")


def test_a_solution_must_pass(check):
    assert check(change(solution="result = 1"))[0] == "solution"
    assert check(change(solution="print('solved')"))[0] == "solution"  # no answer


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_no_failure_case_may_pass(check, number):
    failures = [*TASK.failures, "result = 0"]
    failures[number - 1] = "x = amount('tea')\nresult = x + 100"
    stage, reason = check(change(failures=failures))
    assert stage == "failures" and names(reason, number)


def test_of_several_that_pass_the_first_is_named(check):
    stage, reason = check(TASK, lambda *_: Verdict(True))
    assert stage == "failures" and names(reason, 1) and not names(reason, 2)


@pytest.mark.parametrize("says", [lambda _, answer: Verdict(answer == 100), lambda _, answer: Verdict(answer is None)])
def test_that_the_solution_does_not_pass_counts_before_what_passes(check, says):
    assert check(change(solution="result = 1"), says)[0] == "solution"


def test_a_failure_case_has_its_place_among_all_also_where_one_is_repeated(check):
    stage, reason = check(change(failures=["result = 0", "result = 0", TASK.solution]))
    assert stage == "failures" and names(reason, 3)


def test_doing_nothing_may_not_pass(check):
    stage, reason = check(change(solution="x = 1"), lambda _, answer: Verdict(answer is None))
    assert stage == "failures" and "doing nothing" in reason.lower()


def test_to_do_nothing_is_no_answer_and_a_fresh_state_whatever_the_other_code_left(check):
    shop = make_environment("shop", SEED)
    order = next(number for number, order in shop.state["orders"].items() if order["status"] == "pending")
    looking = change(env="shop", solution="result = 36", failures=[f"cancel_order({order!r})"] * 3)
    stage, reason = check(looking, lambda world, answer: Verdict(answer in (36, None) and world.state == shop.state))
    assert stage == "failures" and "doing nothing" in reason.lower()


def test_an_evaluation_that_stumbles_over_no_answer_has_not_passed_it(check):
    assert check(TASK, lambda _, answer: Verdict(False, "TypeError") if answer is None else Verdict(answer == TEA + 100))[0] == "survived"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failure_case_must_run(check, number):
    failures = list(TASK.failures)
    failures[number - 1] = "result = amount('no such thing')"
    stage, reason = check(change(failures=failures))
    assert stage == "runs" and names(reason, number)


def test_all_code_runs_before_it_matters_what_passes(check):
    assert check(change(solution="1 / 0"))[0] == "runs"
    assert check(change(solution="result = 1", failures=[*TASK.failures[:2], "1 / 0"]))[0] == "runs"
    assert check(change(failures=[TASK.solution, TASK.failures[0], "1 / 0"]))[0] == "runs"


def test_an_evaluation_that_breaks_after_the_solution_does_not_run(check):
    assert check(TASK, lambda *_: Verdict(False, "ZeroDivisionError"))[0] == "runs"


def test_an_evaluation_that_breaks_after_a_failure_case_does_not_run_if_the_solution_passes(check):
    says = lambda _, answer: Verdict(False, "ZeroDivisionError") if answer == 100 else Verdict(answer == TEA + 100)
    stage, reason = check(TASK, says)
    assert stage == "runs" and names(reason, 2)
    assert check(change(solution="result = 1"), says)[0] == "solution"


def test_an_evaluation_that_breaks_counts_before_a_failure_case_that_passes(check):
    stage, reason = check(TASK, lambda _, answer: Verdict(False, "ZeroDivisionError") if answer == 100 else Verdict(True))
    assert stage == "runs" and names(reason, 2)


def test_every_code_and_doing_nothing_begin_in_a_fresh_state(check):
    """One failure case only looks, another cancels another order: in the state that the solution leaves they would pass."""
    shop = make_environment("shop", SEED)
    mine, other = [number for number, order in shop.state["orders"].items() if order["status"] == "pending"][:2]
    cancelled = change(env="shop", solution=f"cancel_order({mine!r})",
                       failures=[f"print(get_order({mine!r}))", f"cancel_order({other!r})", f"change_quantity({mine!r}, 1)"])
    assert check(cancelled, lambda world, _: Verdict(world.state["orders"][mine]["status"] == "cancelled"))[0] == "survived"


def test_failure_cases_that_each_do_a_part_do_not_add_up_and_one_that_does_all_passes_without_an_answer(check):
    shop = make_environment("shop", SEED)
    one, other = [number for number, order in shop.state["orders"].items() if order["status"] == "pending"][:2]
    parts = [f"cancel_order({one!r})", f"cancel_order({other!r})"]
    both = change(env="shop", solution="\n".join(parts), failures=[*parts, "pass"])
    says = lambda world, _: Verdict(all(world.state["orders"][number]["status"] == "cancelled" for number in (one, other)))
    assert check(both, says)[0] == "survived"
    stage, reason = check(dataclasses.replace(both, failures=[*parts, "\n".join(reversed(parts))]), says)
    assert stage == "failures" and names(reason, 3)
