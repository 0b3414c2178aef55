"""evaluate: what a jailed evaluation returned, raised, printed or did becomes a verdict."""
import copy

import pytest

from tools import make_environment
from verify import CodeAsTask, evaluate


@pytest.fixture
def shop():
    return make_environment("shop", seed=3)


def task(evaluation: str) -> CodeAsTask:
    return CodeAsTask("shop", 3, "?", evaluation, "pass", ["pass"] * 3)


def pending(shop) -> str:
    return next(number for number, order in shop.state["orders"].items() if order["status"] == "pending")


def test_true_is_a_pass_and_false_a_fail_without_a_reason(jail, shop):
    for value in (True, False):
        verdict = evaluate(jail, task(f"def evaluate(answer):\n    return answer == 36 and {value}"), shop, "36")
        assert verdict.passed is value and verdict.reason is None


@pytest.mark.parametrize("value", ["1", "0", "'False'", "'True'", "'passed'", "[True]", "1.0", "{'passed': True}"])
def test_what_counts_as_true_is_not_true(jail, shop, value):
    verdict = evaluate(jail, task(f"def evaluate():\n    return {value}"), shop, None)
    assert verdict.passed is False and verdict.reason and value.strip("'") in verdict.reason


def test_an_evaluation_that_returns_nothing_has_failed(jail, shop):
    for body in ("pass", "print(True)", "print('passed')"):
        verdict = evaluate(jail, task(f"def evaluate():\n    {body}"), shop, None)
        assert verdict.passed is False and verdict.reason and "None" in verdict.reason


@pytest.mark.parametrize("evaluation, reason", [
    ("def evaluate():\n    return 1 / 0", "ZeroDivisionError"),
    ("def evaluate():\n    print(True)\n    raise SystemExit(0)", "SystemExit"),
    ("import os\ndef evaluate():\n    os._exit(0)", "ended or crashed"),
    ("passed = True", "does not define evaluate"),
    ("def evaluate():\n    assert 1 == 2", "AssertionError"),
    ("def evaluate():\n    cancel_order('no such order')", "no order has the id"),
])
def test_an_error_is_a_fail_and_its_own_reason(jail, shop, evaluation, reason):
    verdict = evaluate(jail, task(evaluation), shop, None)
    assert verdict.passed is False and verdict.reason and reason in verdict.reason


def test_the_whole_error_is_the_reason(jail, shop):
    verdict = evaluate(jail, task("def evaluate():\n    raise ValueError('first\\n' + 300 * '.' + 'la' + 'st')"), shop, None)
    assert "ValueError: first" in verdict.reason and "last" in verdict.reason


def test_what_is_printed_is_no_verdict(jail, shop):
    assert evaluate(jail, task("def evaluate():\n    print(True)\n    return False"), shop, None).passed is False
    assert evaluate(jail, task("def evaluate():\n    print(False)\n    return True"), shop, None).passed is True


@pytest.mark.parametrize("value", ["''", "[]", "{}", "()"])
def test_an_empty_value_has_failed_for_a_reason(jail, shop, value):
    verdict = evaluate(jail, task(f"def evaluate():\n    return {value}"), shop, None)
    assert verdict.passed is False and verdict.reason


@pytest.mark.parametrize("end", ["return True", "return False", "return 1 / 0", "return 1", "pass"])
@pytest.mark.parametrize("answered", [False, True])
def test_an_evaluation_that_changes_the_state_has_failed_and_changed_nothing(jail, shop, end, answered):
    """In a state that the executor has changed before, and also where a world is judged by the answer."""
    shop.judged_by_answer = answered
    shop.cancel_order(pending(shop))
    before = copy.deepcopy(shop.state)
    verdict = evaluate(jail, task(f"def evaluate():\n    cancel_order({pending(shop)!r})\n    {end}"), shop, None)
    assert shop.state == before
    assert verdict.passed is False and verdict.reason


def test_a_look_at_the_state_changes_nothing(jail, shop):
    order = pending(shop)
    looking = task(f"def evaluate():\n    return get_order({order!r})['status'] == 'cancelled'")
    assert evaluate(jail, looking, shop, None).passed is False
    shop.cancel_order(order)
    before = copy.deepcopy(shop.state)
    verdict = evaluate(jail, looking, shop, None)
    assert verdict.passed is True and verdict.reason is None and shop.state == before
