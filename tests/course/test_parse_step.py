"""parse_step: what a model writes becomes a step, or a reminder."""
import pytest

from verify import FormatError, parse_step


@pytest.mark.parametrize("text, thought, kind, content", [
    ("THOUGHT: look first END THOUGHT\nACTION:\nprint(1)\nEND ACTION", "look first", "action", "print(1)"),
    ("THOUGHT: a\nb END THOUGHT ANSWER: 42 END ANSWER", "a\nb", "answer", "42"),
    ("ACTION: x = 1\ny = 2 END ACTION", "", "action", "x = 1\ny = 2"),
    ("ANSWER: END ANSWER", "", "answer", ""),
    ("ANSWER: done END ANSWER and some more words", "", "answer", "done"),
    ("Well. ANSWER: 7 END ANSWER", "", "answer", "7"),
    ("\n THOUGHT: an ACTION: f() END THOUGHT ANSWER: 5 END ANSWER", "an ACTION: f()", "answer", "5"),
    ("Well. THOUGHT: a END THOUGHT ANSWER: 5 END ANSWER", "", "answer", "5"),
    ("ACTION: print('THOUGHT: a') END ACTION", "", "action", "print('THOUGHT: a')"),
    ("ANSWER: ```5``` END ANSWER", "", "answer", "```5```"),
    ("ANSWER: say ACTION: f() END ACTION, or ANSWER: 5 END ANSWER", "", "answer", "say ACTION: f() END ACTION, or ANSWER: 5"),
    ('ANSWER: "a"\n"b" END ANSWER', "", "answer", '"a"\n"b"'),
    ("THOUGHT: to the END we go END THOUGHT ACTION: print('END OF LIST') END ACTION", "to the END we go", "action", "print('END OF LIST')"),
    ("THOUGHT: a END THOUGHT ACTION: f() END ACTION\n\nTHOUGHT: b\nEND THOUGHT", "a", "action", "f()"),
    ("THOUGHT: a END THOUGHT THOUGHT: b END THOUGHT ANSWER: 5 END ANSWER", "a", "answer", "5"),
    ("THOUGHT:\nlook\nEND THOUGHT\nANSWER:\n5\nEND ANSWER\n", "look", "answer", "5"),
    ("THOUGHT: END THOUGHT ANSWER: 5 END ANSWER", "", "answer", "5"),
    ("THOUGHTFUL words. ANSWER: 5 END ANSWER", "", "answer", "5"),
    ("My REACTION: joy. ACTION: f() END ACTION", "", "action", "f()"),
    ("ANSWER: 5 END ANSWER What a REACTION: joy", "", "answer", "5"),
    ("ACTION: print('end action', 2**3) END ACTION", "", "action", "print('end action', 2**3)"),
])
def test_a_step_is_read(text, thought, kind, content):
    step = parse_step(text)
    assert (step.thought, step.kind, step.content) == (thought, kind, content)


def test_what_a_thought_speaks_of_is_not_done():
    step = parse_step("THOUGHT: an ACTION: look() END ACTION could help END THOUGHT\nANSWER: 5 END ANSWER")
    assert (step.kind, step.content) == ("answer", "5") and "look()" in step.thought


def test_code_may_speak_of_an_answer():
    for code in ("print('ANSWER: 5')", "print('ANSWER: 5 END ANSWER')", "print('ACTION: f()')"):
        assert parse_step(f"ACTION: {code} END ACTION").content == code


@pytest.mark.parametrize("code", ["```python\nprint(1)\n```", "\n    print(1)\n", "```\nprint(1)```"])
def test_code_comes_without_fence_and_indentation(code):
    assert parse_step(f"ACTION: {code} END ACTION").content == "print(1)"


def test_all_lines_of_code_lose_the_indentation_that_they_share():
    code = "if x:\n    print(x)\nprint(y)"
    indented = "\n    if x:\n        print(x)\n    print(y)\n"
    for text in (indented, f"\n```python{indented}```\n"):
        assert parse_step(f"ACTION:{text}END ACTION").content == code


@pytest.mark.parametrize("text", [
    "",
    "I would look the tea up.",
    "THOUGHT: it is 5 END THOUGHT",
    "THOUGHT: not closed ACTION: f() END ACTION",
    "THOUGHT: not closed ANSWER: 5 END ANSWER",
    "ANSWER: 5 ACTION: f() END ACTION",
    "ACTION: f() END ACTION;ACTION: g()",
    "ACTION: f()",
    "ANSWER: 5",
    "ACTION: f() END ANSWER",
    "ACTION: END ACTION",
    "ACTION: ```python\n``` END ACTION",
    "ACTION: f() END ACTION ACTION: g() END ACTION",
    "ACTION: f() END ACTION\nANSWER: 5 END ANSWER",
    "ANSWER: 5 END ANSWER\nACTION: f() END ACTION",
    "ACTION: f() END ACTION, and then ANSWER: 5 END ANSWER",
    "ANSWER: 5 END ANSWER ANSWER: 6 END ANSWER",
    "ACTION: f() END ACTION ACTION: g()",
    "ACTION: f() ANSWER: 5 END ANSWER",
    "THOUGHT: a END THOUGHT THOUGHT: not an ACTION: f() END ACTION END THOUGHT ANSWER: 5 END ANSWER",
    "action: f() END ACTION",
    "My REACTION: f() END ACTION",
])
def test_a_malformed_step_gets_the_reminder(text):
    with pytest.raises(FormatError, match="END ACTION and ANSWER"):
        parse_step(text)
