"""The jail under attack.

Each attack runs twice: without the layer that stops it, most often in a bare Python process, where it must
work, and in the jail, where it must not. Where it cannot be shown to work, the test says why. After each
test an honest check must still pass, and no process or descriptor may be left; where files are attacked, no file.
"""
import contextlib
import ctypes
import datetime
import json
import os
import platform
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tools import Environment, make_environment, tool
from verify import CodeAsTask, ForkServer, Jail, JailError, evaluate, judge, observation, pack, plain, start_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the strong jail")

SEED = 3
TEA = make_environment("calculator", SEED).state["tea"]
SECRET = "planted-secret"
HELD = {"hidden": [SECRET]}  # by this process, when it starts the jail


@pytest.fixture(scope="module")
def jail():
    others = descendants()  # that other tests have left running
    with Jail(seconds=1.0) as jail:
        jail.replies, jail.others, jail.descriptors = Forgetful(), others, open_descriptors(jail)[0]
        yield jail


class Forgetful(dict):
    """The memory of a jail that remembers nothing, so that an attack that comes again has to work again."""

    def __setitem__(self, past, line):
        pass


@pytest.fixture(autouse=True)
def nothing_is_poisoned_or_left(jail):
    """After each test, an honest task passes on each server, and only the servers and their spare children live."""
    check_honestly(jail)
    assert settled(jail)
    yield
    check_honestly(jail)
    assert settled(jail), (processes(), open_descriptors(jail))


def check_honestly(jail):
    for replica in range(len(jail.servers)):
        with jail.session(world := make_environment("calculator", SEED), replica) as session:
            outcome = session.run("result = amount('tea')\nprint('tea', result)")
        assert outcome.printed == f"tea {TEA}\n"
        honest = task_with("def evaluate(answer): return answer == amount('tea')")
        assert evaluate(jail, honest, world, outcome.value, replica).passed is True
        assert evaluate(jail, honest, world, outcome.value + 1, replica).passed is False


def open_descriptors(jail):
    """How many files this process has open, and each server."""
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *(server.process.pid for server in jail.servers))]


def settled(jail):
    """Whether, an instant later at most, there are each server and one spare child of it, and no other new process.

    Neither below this process nor, where one has lost its parent, in the session that each server began. And whether
    this process has as many files open as at the beginning, and each server five.
    """
    for _ in range(100):
        servers = {server.process.pid for server in jail.servers}
        begun = {pid for pid, (_, session) in processes().items() if session in servers}
        alone = len(begun) == 2 * len(servers) and descendants() - jail.others == begun
        if alone and open_descriptors(jail) == [jail.descriptors, *[5] * len(servers)]:
            return True
        time.sleep(0.02)
    return False


def processes():
    """The parent and the session of each process."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{entry}/stat") as file:
            _, parent, _, session, *_ = file.read().rpartition(")")[2].split()
            found[int(entry)] = int(parent), int(session)
    return found


def descendants():
    """The pids of all processes below this one."""
    family, found = {os.getpid()}, processes()
    while more := {pid for pid, (parent, _) in found.items() if parent in family} - family:
        family |= more
    return family - {os.getpid()}


def run(jail, code):
    with jail.session(make_environment("calculator", SEED)) as session:
        return session.run(code)


def bare(code, seconds=20.0):
    """Run code as it would run without a jail: in a Python process of its own, and no more."""
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=seconds)


def verdict(jail, evaluation, answer=None):
    """The verdict of an evaluation on an answer, for which only True is a pass."""
    return evaluate(jail, task_with(evaluation), make_environment("calculator", SEED), answer)


def task_with(evaluation, env="calculator"):
    return CodeAsTask(env, SEED, "Find the tea.", evaluation, "result = 1", ["result = 2"] * 3)


# ---------------------------------------------------------------------------------------------------
# what a session is for


def test_variables_last_from_action_to_action(jail):
    with jail.session(make_environment("calculator", SEED)) as session:
        assert session.run("def double(x): return 2 * x\ntea = amount('tea')").error is None
        assert session.run("print(double(tea))").printed == f"{2 * TEA}\n"


def test_a_function_gets_the_argument_if_it_takes_one(jail):
    with jail.session(None) as session:
        assert session.run("x = 1", []).error == "NameError: the code does not define evaluate"
        functions = ["def evaluate(): return 'none'", "def evaluate(answer): return answer", "evaluate = lambda *rest: len(rest)",
                     "class evaluate(dict):\n    def __init__(self, answer): super().__init__(answer)",
                     "class Check:\n    def __call__(self): return 'none'\nevaluate = Check()", "evaluate = Check().__call__",
                     "import functools\ndef shown(f):\n    @functools.wraps(f)\n    def wrapper(*a, **k): return f(*a, **k)\n    return wrapper\n"
                     "@shown\ndef evaluate(answer): return answer"]
        values = [session.run(function, [{"a": [1, 2.5, None]}]).value for function in functions]
        assert values == ["none", {"a": [1, 2.5, None]}, 1, {"a": [1, 2.5, None]}, "none", "none", {"a": [1, 2.5, None]}]
        assert session.run("x = 1 / 0", [5]).error.endswith("ZeroDivisionError: division by zero")


def test_arguments_may_be_named_and_have_any_name(jail):
    shop = make_environment("shop", SEED)
    customer_id, name = next(iter(shop.state["customers"].items()))
    with jail.session(shop) as session:
        assert session.run(f"print(find_customer(name={name!r}))").printed == f"{customer_id}\n"
        for keyword in ("tool", "channel", "keywords"):  # the names inside the stub itself
            assert "stock: missing a required argument: 'item'" in session.run(f"stock({keyword}=1)").error


def test_a_refusal_reaches_the_code_as_an_exception(jail):
    outcome = run(jail, "try:\n    amount('gold')\nexcept ToolError as error:\n    print('refused:', error)\namount(1)")
    assert outcome.printed.startswith("refused: the ledger has no item 'gold'")
    assert outcome.error == "<action 1>, line 5: amount(1)\nToolError: amount: item must be str, not int"


def test_an_error_names_the_line_and_shows_no_path_of_the_host(jail):
    with jail.session(None) as session:
        session.run("def divide(x):\n    return 1 / x")
        error = session.run("import json\njson.loads('{')\n").error
        assert error.startswith("<action 2>, line 2: json.loads('{')\n") and "JSONDecodeError" in error
        error = session.run("divide(0)").error
    assert error == "<action 3>, line 1: divide(0)\n<action 1>, line 2: return 1 / x\nZeroDivisionError: division by zero"
    assert "/" not in run(jail, "x = = 1").error and "SyntaxError" in run(jail, "x = = 1").error
    assert run(jail, "x = '\u2028'\ny = 'a\x0c'\n1 / 0").error.startswith("<action 1>, line 3: 1 / 0\n")
    assert run(jail, "x = 1\ry = 2\r\n1 / 0").error.startswith("<action 1>, line 3: 1 / 0\n")


def test_a_long_error_keeps_its_beginning_and_its_end(jail):
    error = run(jail, "numbers = list(range(10_000))\nfloat(str(numbers))").error
    assert error.startswith("<action 1>, line 2: float(str(numbers))\nValueError: could not convert string to float: '[0, 1")
    assert " … " in error and error.endswith("9998, 9999]'") and len(error) == 1_000


def test_an_error_of_a_million_characters_is_cut(jail):
    code = "raise ValueError('x' * 10**6)"
    assert len(bare(code).stderr) > 10**6
    assert len(run(jail, code).error) == 1_000


def test_a_forged_outcome_is_not_longer_than_an_honest_one(jail, monkeypatch):
    forge = "import sys\nsys._getframe().f_back.f_globals['{}'] = lambda *_: {}\n1 / 0"
    assert run(jail, forge.format("explain", "'x' * 900_000")).error == "x" * 1_000
    assert "not its own" in run(jail, forge.format("explain", "''")).error  # or the action would seem to have gone well
    printed = "import sys\nsys._getframe().f_back.f_locals['printed'].getvalue = lambda: 'x' * 900_000"
    assert len(run(jail, printed).printed) == 20_000
    monkeypatch.setattr("verify.PRINTED_CHARACTERS", 10**6)
    monkeypatch.setattr("verify.ERROR_CHARACTERS", 10**6)
    assert len(run(jail, printed).printed) == 900_000 == len(run(jail, forge.format("explain", "'x' * 900_000")).error)


def test_common_modules_import_and_others_say_that_they_are_missing(jail):
    names = "math, json, re, random, collections, itertools, functools, datetime, statistics, string, typing, decimal, pprint"
    assert run(jail, f"import {names}\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(1)").error is None
    assert run(jail, "from __future__ import annotations\ndef f(x: Later): return x").error is None
    assert run(jail, "import datetime\nprint(datetime.datetime.strptime('2024', '%Y').year)").printed == "2024\n"
    assert run(jail, "import csv, difflib, hashlib, secrets, uuid\nprint(hashlib.md5(b'').hexdigest()[:4])").printed == "d41d\n"
    assert run(jail, "import codecs\nprint(codecs.encode('tea', 'rot13'))").printed == "grn\n"
    missing = run(jail, "import numpy").error
    assert missing.endswith("ModuleNotFoundError: No module named 'numpy' (only parts of the standard library are here)")


def test_what_a_module_lacks_is_an_attribute_error(jail):
    # On Python 3.13 its message depends on the current folder, for which a child cannot ask.
    assert run(jail, "import math\nprint(hasattr(math, 'tea'))").printed == "False\n"
    assert "AttributeError: module 'math' has no attribute 'tea'" in run(jail, "import math\nmath.tea").error


def test_code_can_read_its_own_source(jail):
    code = "import inspect\ndef half(x):\n    return x / 2\nprint(inspect.getsource(half))"
    assert run(jail, code).printed == "def half(x):\n    return x / 2\n\n"


def test_an_observation_shows_output_and_error_and_marks_a_cut(jail):
    outcome = run(jail, "print('before')\n1 / 0")
    assert observation(outcome).startswith("before\n<action 1>, line 2: 1 / 0\nZeroDivisionError")
    assert observation(run(jail, "x = 1")).startswith("(no output")
    assert observation(run(jail, "print(object())")) == "<object object>"  # no address, which differs from run to run
    assert observation(run(jail, "def f(): pass\n[1].index(f)")).endswith("ValueError: <function f> is not in list")
    assert observation(run(jail, "print('x' * 5_000)")).endswith("x\n… (cut after 4,000 characters)")
    assert observation(run(jail, "print('x' * 4_000)")) == "x" * 4_000
    for lines in (19_990, 20_000, 30_000):  # an end that the cap of what is kept has swallowed is a cut as well
        assert observation(run(jail, f"print('\\n' * {lines} + 'hello world')")) == "… (cut after 4,000 characters)"
    assert observation(run(jail, "print('meet at 0xff, at 0xfedcba9876')")) == "meet at 0xff, at 0xfedcba9876"


def test_values_are_plain_data_or_say_what_is_none(jail):
    code = """
import collections, json
a = (1, [2.5, 'ä', None, True]); b = {1, 2}; c = {1: 2}; d = float('nan'); e = 10**301; f = '\\ud800'; g = object()
h = []; h.append(h)
i = collections.OrderedDict(x=collections.defaultdict(int, y=1)); j = 'x' * 10**7
"""
    with jail.session(None) as session:
        assert session.run(code).error is None
        assert session.run("pass").value is None
        assert session.run("result = -2**64").value == -2**64
        assert session.run("result = a").value == [1, [2.5, "ä", None, True]]
        assert session.run("result = i").value == {"x": {"y": 1}}
        assert [session.run(f"result = {name}").value for name in "bcdefghj"] == [
            f"<{kind}: not JSON, or too long>" for kind in "set dict float int str object list str".split()]
        assert session.run("1 / 0").value is None  # although `result` is still there
        assert session.run("print(g is result, len(j))\nresult = j").printed == "False 10000000\n"


def test_after_a_timeout_the_session_goes_on_without_its_variables(jail):
    with jail.session(make_environment("calculator", SEED)) as session:
        session.run("x = 1")
        assert "variables of earlier actions are lost" in session.run("while True: pass").error
        assert session.run("while True: pass").error == "the code took longer than 1 seconds; what it printed is lost"  # no variables
        assert session.run("result = 'x' in globals()").value is False
        assert "NameError" in session.run("print(x)").error
        assert session.run("print(amount('tea'))").printed == f"{TEA}\n"


def test_hundreds_of_sessions_can_be_open_at_once(jail):
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(jail.session(make_environment("calculator", SEED), i)) for i in range(300)]
        for number, session in enumerate(sessions):
            assert session.run(f"result = {number}").error is None
        assert [session.run("pass").value for session in sessions] == list(range(300))


# ---------------------------------------------------------------------------------------------------
# a deadline, then a kill: endless code. A bare process is still running after a while, and most of these even
# if it sets itself an alarm and raises an exception in the handler, which is how a time limit is often written.

ALARM = """
amount = len  # where there is no world
import signal
def late(*arguments): raise TimeoutError
signal.signal(signal.SIGALRM, late)
signal.setitimer(signal.ITIMER_REAL, 0.1)
"""
FOREVER = "def forever():\n    while True: pass\n"
ENDLESS = {
    "a_call_in_c": ALARM + "sum(range(10**12))",
    "a_loop": "while True: pass",
    "a_power": "10 ** 10 ** 8",
    "a_regular_expression": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "a_loop_that_catches_all": ALARM + FOREVER + "while True:\n    try: forever()\n    except BaseException: continue",
    "a_sleep_that_catches_all": ALARM + "import time\nwhile True:\n    try: time.sleep(1000)\n    except BaseException: continue",
    "an_endless_finally": ALARM + FOREVER + "try: forever()\nfinally: forever()",
    "an_iterator_in_c": ALARM + "import itertools\nsum(itertools.repeat(0))",
    "a_flood_of_output": "while True: print('x' * 1000)",
    "a_flood_of_calls": ALARM + "def call():\n    while True:\n        try: amount('tea')\n        except Exception: continue\n"
                                "while True:\n    try: call()\n    except BaseException: continue",
}


@pytest.mark.parametrize("code", ENDLESS.values(), ids=ENDLESS)
def test_endless_code_is_ended(jail, monkeypatch, code):
    monkeypatch.setattr(jail, "seconds", 0.4)
    with pytest.raises(subprocess.TimeoutExpired):
        bare(code, seconds=0.4)
    start = time.monotonic()
    outcome = run(jail, code.removeprefix(ALARM))  # the jail refuses the alarm itself
    assert "took longer than 0.4 seconds" in outcome.error
    assert time.monotonic() - start < 10  # a generous bound: the deadline is 0.4 s, but the machine may be busy


@pytest.mark.parametrize("size, pause, said", [(10_000, 0, "crashed"), (1, 0.001, "took longer than 1 seconds")])
def test_a_child_that_sends_bytes_for_ever_is_ended(jail, size, pause, said):
    code = f"""
import os, time
while True:
    for fd in range(3, 16):
        try: os.write(fd, b" " * {size})
        except OSError: pass
    time.sleep({pause})"""
    control, pid, channel = jail.servers[0].child()
    with channel:  # a time limit for each read alone would never be reached: every byte in time extends it
        channel.settimeout(1)
        channel.sendall(pack({"tools": [], "code": code, "arguments": None}))
        deadline = time.monotonic() + 2 * jail.seconds
        while time.monotonic() < deadline:
            assert channel.recv(65_536)
        control.sendall(struct.pack("q", pid))
    assert said in run(jail, code).error


def test_what_computes_on_after_its_reply_has_little_time(jail):
    # The reply is forged, so for the parent the action is over. Waiting for the limit would take a minute.
    forged = json.dumps({"printed": "", "error": None, "value": None}) + "\n"
    code = f"import os\nfor fd in range(3, 16):\n    try: os.write(fd, {forged.encode()!r})\n    except OSError: pass\nwhile True: pass"
    with jail.session(None) as session:
        assert session.run(code).error is None
        with open(f"/proc/{session.child.pid}/limits") as file:
            (limit,) = [line.split()[3:5] for line in file if line.startswith("Max cpu time")]
        assert limit == ["60", "60"]
        assert "took longer" in session.run("x = 1").error  # so it did compute on


# ---------------------------------------------------------------------------------------------------
# limits: memory. A bare process gets the 400 MB.

GREEDY = {
    "bytes": "x = bytearray(400 * 2**20)",
    "text": "x = 'a' * (400 * 2**20)",
    "a_list": "x = [0] * (50 * 2**20)",
    "piece_by_piece": "x = [bytearray(2**20) for _ in range(400)]",
    "anonymous_memory": "import ctypes\nmmap = ctypes.CDLL(None).mmap\nmmap.restype = ctypes.c_void_p\n"
                        "if mmap(None, ctypes.c_size_t(400 * 2**20), 3, 0x22, -1, 0) == 2**64 - 1: raise MemoryError",
    "a_large_number": "x = 1 << (400 * 2**23)",
}


@pytest.mark.parametrize("code", GREEDY.values(), ids=GREEDY)
def test_memory_is_limited(jail, code):
    assert bare(code + "\nprint('got')").stdout == "got\n"
    outcome = run(jail, code + "\nprint('got')")
    # Where not even the error could be told any more, the child is gone, and the sentence says what it may have been.
    assert "(of 256 MB)" in outcome.error or "perhaps for lack of memory" in outcome.error
    assert "got" not in outcome.printed


def test_no_file_can_grow(monkeypatch, tmp_path):
    code = "with open({!r}, 'w') as file: file.write('x' * 10)"
    assert bare(code.format(str(tmp_path / "bare"))).returncode == 0 and (tmp_path / "bare").stat().st_size == 10
    monkeypatch.setattr("verify.MACHINES", {})  # a weak jail, in which a file can be opened
    with Jail(allow_weak=True) as weak:
        assert "File too large" in run(weak, code.format(str(tmp_path / "jailed"))).error
    assert (tmp_path / "jailed").stat().st_size == 0


def test_output_that_is_kept_is_limited(jail):
    for code in ("print('x' * 10**7)", "for _ in range(10**4): print('x' * 10**3)"):
        assert len(bare(code).stdout) > 10**7
        outcome = run(jail, code)
        assert outcome.error is None and len(outcome.printed) == 20_000


def test_tool_calls_are_limited(jail, monkeypatch):
    code = "for i in range(1001): add(1, 1)"
    monkeypatch.setattr(jail, "seconds", 60.0)  # so that the number is what ends it
    assert "1,000 tool calls at most" in run(jail, code).error
    assert run(jail, code.replace("1001", "1000")).error is None
    monkeypatch.setattr("verify.TOOL_CALLS", 2000)
    assert run(jail, code).error is None


# ---------------------------------------------------------------------------------------------------
# a process of its own: code that breaks the process in which it runs. A bare process does not survive it, although it
# catches every Exception: in the process of the trainer, that would be the end of the run. (What is marked it survives,
# on the Python on which these tests were written, 3.11, and what is marked with a + since 3.12; others crash on it.)

BREAKING = {
    "reading_address_0": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "a_signal_to_itself": "import signal; signal.raise_signal(signal.SIGKILL)",
    "leaving_at_once": "import os; os._exit(0)",
    "sys_exit": "import sys; sys.exit(0)",
    "SystemExit": "raise SystemExit",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "recursion_in_c": "x = iter(())\nfor i in range(200_000): x = map(int, x)\nlist(x)",
    "recursion_without_a_limit+": "import sys; sys.setrecursionlimit(10**9)\ndef f(): return [*map(lambda x: f(), [1])]\nf()",
    "recursion*": "def f(): f()\nf()",
    "a_chain_of_exceptions*": "e = Exception()\nfor i in range(200_000):\n    n = Exception(); n.__cause__ = e; e = n\nraise e",
    "source_that_nests_parentheses*": "(" * 5_000 + ")" * 5_000,
    "source_that_nests_operators*": "x = " + "-" * 60_000 + "1",
    "source_that_nests_attributes*": "a" + ".b" * 30_000,
    "source_that_crashes_the_compiler+": "import sys; sys.setrecursionlimit(10**9)\ncompile('a' + '.b' * 10**6, '', 'exec')",
    "an_error_without_text": "raise type('E', (BaseException,), {'__str__': lambda self: 1 / 0})",
    "an_error_whose_text_is_endless_recursion*": "class E(Exception):\n    def __str__(self): return str(self)\nraise E",
    "closed_streams": "import sys; sys.stdout.close(); sys.stderr.close(); print(1)",
}


@pytest.mark.parametrize("name", BREAKING)
def test_code_that_breaks_its_process_gets_an_error(jail, name):
    code = BREAKING[name]
    careful = f"try: exec({code!r}, {{}})\nexcept Exception: pass\nprint('survived')"
    survived = name.endswith("*") or name.endswith("+") and sys.version_info >= (3, 12)
    assert survived or "survived" not in bare(careful).stdout
    outcome = run(jail, code + "\nprint('after')")
    assert outcome.error and len(outcome.error) <= 1_100 and "after" not in outcome.printed


@pytest.mark.parametrize("name", ["sys_exit", "SystemExit", "KeyboardInterrupt"])
def test_an_exit_that_is_an_exception_ends_its_action_alone(jail, name):
    assert bare(f"x = 1\n{BREAKING[name]}\nprint(x)").stdout == ""
    with jail.session(None) as session:
        session.run("x = 1")
        assert name.removeprefix("sys_").title()[:4] in session.run(BREAKING[name]).error.title()
        assert session.run("print(x)").printed == "1\n"


def test_an_error_that_never_finds_its_words_is_ended(jail):
    code = "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E"
    with pytest.raises(subprocess.TimeoutExpired):
        bare(code, seconds=0.4)
    assert "took longer" in run(jail, code).error


@pytest.mark.parametrize("code", ["x = 1\0", "x = '\ud800'", None, 5], ids=["NUL", "surrogate", "None", "number"])
def test_what_is_no_source_is_rejected_before_it_reaches_a_child(jail, monkeypatch, code):
    with pytest.raises((ValueError, TypeError)):
        bare(code)  # a process cannot even be started on it: that would be an exception in the parent
    with monkeypatch.context() as patch:
        patch.setattr(ForkServer, "child", lambda self: pytest.fail("a child was asked for"))
        assert run(jail, code).error.startswith("the code ")
    monkeypatch.setattr("verify.text_problem", lambda text: None)
    if isinstance(code, str):  # the next that looks at it rejects it: the child's Python, or `plain`
        assert "null bytes" in run(jail, code).error or "cannot reach the code" in run(jail, code).error
    else:
        with pytest.raises(TypeError):
            run(jail, code)


def test_a_huge_source_is_rejected_before_it_reaches_a_child(jail, monkeypatch):
    code = "x = [" + "[0]," * 200_000 + "]"
    assert run(jail, code).error == "the code is longer than 65,536 characters"
    monkeypatch.setattr("verify.SOURCE_CHARACTERS", 10**7)
    assert "(of 256 MB)" in (error := run(jail, code).error) or "perhaps for lack of memory" in error  # merely to parse it


def test_an_empty_source_is_rejected(jail):
    # It does no harm; but a model is told what there was to see.
    assert run(jail, "").error == "the code is empty or not text"


# ---------------------------------------------------------------------------------------------------
# a filter of system calls: files, network, processes, signals. In a bare process every attack works.

SYSTEM_ATTACKS = {
    # reading secrets
    "read_a_file": "assert open({planted!r}).read() == 'planted-secret'",
    "read_the_environment_of_another": "assert 'planted-secret' in open('/proc/{victim}/environ').read()",
    "read_the_command_of_another": "open('/proc/{victim}/cmdline').read()",
    "read_the_own_memory_map": "open('/proc/self/maps').read()",
    "list_a_folder": "assert 'planted' in os.listdir({folder!r})",
    "see_that_a_file_exists": "os.stat({planted!r})",
    "read_a_link": "os.readlink('/proc/self/exe')",
    "change_the_folder": "os.chdir({folder!r})",
    "import_a_file": "import sys; sys.path.append({folder!r}); import planted_module",
    # writing, deleting, links
    "write_a_file": "open({folder!r} + '/new', 'w').write('x')",
    "append_to_a_file": "open({planted!r}, 'a').write('x')",
    "truncate_a_file": "os.truncate({planted!r}, 0)",
    "delete_a_file": "os.remove({planted!r})",
    "rename_a_file": "os.rename({planted!r}, {folder!r} + '/new')",
    "make_a_symbolic_link": "os.symlink('/etc/passwd', {folder!r} + '/new')",
    "make_a_hard_link": "os.link({planted!r}, {folder!r} + '/new')",
    "make_a_folder": "os.mkdir({folder!r} + '/new')",
    "make_a_fifo": "os.mkfifo({folder!r} + '/new')",
    "change_the_mode": "os.chmod({planted!r}, 0o777)",
    "change_the_times": "os.utime({planted!r}, (0, 0))",
    "shared_memory": "path = '/dev/shm/jail-' + str(os.getpid()); open(path, 'w').close(); os.remove(path)",
    "memory_in_a_file": "os.memfd_create('x')",  # which no limit on the address space sees
    # network
    "tcp": "stream = socket.socket(); stream.connect(('127.0.0.1', {tcp})); stream.sendall(b'x')",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {udp}))",
    "unix_socket": "socket.socket(socket.AF_UNIX).connect({folder!r} + '/unix')",
    "listen": "socket.create_server(('127.0.0.1', 0))",
    "socket_pair": "socket.socketpair()",
    "ask_the_kernel_by_netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    # descriptors
    "a_pipe": "os.pipe()",
    "a_copy_of_a_descriptor": "os.dup(0)",
    # processes
    "fork": "if os.fork() == 0: os._exit(0)",
    "a_fork_bomb": "for _ in range(20):\n    if os.fork() == 0: time.sleep(0.1); os._exit(0)",  # a small one
    "a_fork_that_outlives_its_deadline": "if os.fork() == 0: time.sleep(0.2); open({folder!r} + '/late', 'w').close(); os._exit(0)",
    "start_a_program": "os.waitpid(os.posix_spawn('/bin/true', ['true'], {{}}), 0)",
    "become_a_program": "os.execv('/bin/echo', ['echo', 'got'])",
    "a_thread": "import _thread; _thread.start_new_thread(str, ())",
    "a_thread_bomb": "import _thread\n_thread.stack_size(2**16)\nfor _ in range(100): _thread.start_new_thread(time.sleep, (0.1,))",
    "a_session_of_its_own": "os.setsid()",
    "outlive_the_server": "assert libc.prctl(1, 0, 0, 0, 0) == 0",  # no death with the parent any more
    "be_traced": "assert libc.ptrace(0, 0, 0, 0) == 0",
    "trace_another": "assert libc.ptrace(16, {victim}, 0, 0) == 0",  # PTRACE_ATTACH, which stops it as well
    "read_the_memory_of_another": """
into, part = ctypes.create_string_buffer(15), ctypes.c_size_t * 2
assert libc.process_vm_readv({victim}, part(ctypes.addressof(into), 14), 1, part({secret}, 14), 1, 0) == 14
assert into.value == b'planted-secret'""",
    # signals
    "kill_another": "os.kill({victim}, signal.SIGKILL)",
    "stop_another": "os.kill({victim}, signal.SIGSTOP)",
    "a_handle_on_another": "os.pidfd_open({victim})",
    "a_signal_by_way_of_a_descriptor": "assert libc.fcntl(0, 8, {victim}) == 0",  # F_SETOWN, then O_ASYNC
    "an_alarm": "signal.setitimer(signal.ITIMER_REAL, 100)",
    # resources
    "a_lower_priority_for_another": "os.setpriority(os.PRIO_PROCESS, {victim}, 5)",
    "limits_for_another": "resource.prlimit({victim}, resource.RLIMIT_CORE, (0, 0))",
    "other_limits": "resource.setrlimit(resource.RLIMIT_CPU, (50, 50))",
    "other_processors": "os.sched_setaffinity(0, os.sched_getaffinity(0))",
}


VICTIM = """import ctypes, os, time
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)  # may be traced by all
secret = ctypes.create_string_buffer(os.environ["SECRET"].encode())
print(ctypes.addressof(secret), flush=True)
time.sleep(60)"""


@contextlib.contextmanager
def world(folder):
    """A folder, a process and three sockets as targets; afterwards `unharmed` says whether an attack has left a trace."""
    folder.mkdir()
    (folder / "planted").write_text(SECRET)
    (folder / "planted_module.py").write_text("")
    victim = subprocess.Popen([sys.executable, "-I", "-S", "-c", VICTIM], env={"SECRET": SECRET}, stdout=subprocess.PIPE)
    secret = int(victim.stdout.readline())  # where it holds the secret; and it is ready
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, \
            socket.socket(socket.AF_UNIX) as unix:
        udp.bind(("127.0.0.1", 0))
        unix.bind(f"{folder}/unix")
        unix.listen()
        before = {path.name: path.lstat() for path in folder.iterdir()}

        def unharmed():
            now = {path.name: path.lstat() for path in folder.iterdir()}
            same = now.keys() == before.keys() and all(
                (now[name].st_mtime_ns, now[name].st_mode, now[name].st_size) == (
                    before[name].st_mtime_ns, before[name].st_mode, before[name].st_size) for name in before)
            for listener in (tcp, udp, unix):
                listener.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    listener.recv(1) if listener is udp else listener.accept()
                    return False
            with open(f"/proc/{victim.pid}/stat") as file:
                return same and file.read().rpartition(")")[2].split()[0] in "RSD"  # neither stopped, traced nor dead
        try:
            yield dict(folder=str(folder), planted=f"{folder}/planted", victim=victim.pid, secret=secret, tcp=tcp.getsockname()[1],
                       udp=udp.getsockname()[1]), unharmed
        finally:
            victim.kill()
            victim.communicate()


REFUSED = re.compile("PermissionError|not permitted|AssertionError|can't start new thread|not allowed to raise|No module named 'planted_module'")


@pytest.mark.parametrize("attack", SYSTEM_ATTACKS.values(), ids=SYSTEM_ATTACKS)
def test_the_system_refuses(jail, attack, tmp_path):
    code = "import ctypes, os, resource, signal, socket, time\nlibc = ctypes.CDLL(None)\n" + attack + "\nprint('got')"
    with world(tmp_path / "bare") as (targets, _):
        assert bare(code.format(**targets)).stdout.endswith("got\n")
        assert "late" not in attack or (tmp_path / "bare" / "late").exists()
    with world(tmp_path / "jailed") as (targets, unharmed):
        outcome = run(jail, code.format(**targets))
        time.sleep(0.3 if "late" in attack else 0)
        assert REFUSED.search(outcome.error) and outcome.printed == ""
        assert unharmed()


@pytest.mark.parametrize("whose", ["parent", "server", "sibling"])
@pytest.mark.parametrize("attack", ["kill_another", "stop_another", "trace_another", "a_handle_on_another"])
def test_neither_the_parent_nor_its_server_nor_a_sibling_can_be_attacked(jail, attack, whose):
    # The same attacks work in a bare process, on another of the same user: test_the_system_refuses. (To be traced, that
    # one has allowed it. Without the filter, Linux may protect others, if it is set up so: in the jail it need not be.)
    with jail.session(None) as sibling:
        sibling.run("x = 1")
        target = {"parent": os.getpid(), "server": jail.servers[0].process.pid, "sibling": sibling.child.pid}[whose]
        code = "import ctypes, os, signal\nlibc = ctypes.CDLL(None)\n" + SYSTEM_ATTACKS[attack].format(victim=target)
        outcome = run(jail, f"{code}\nprint('got')")
        assert outcome.error and outcome.printed == ""
        assert sibling.run("print(x)").printed == "1\n" and jail.servers[0].process.poll() is None


def test_the_memory_of_the_parent_cannot_be_read(jail):
    # That this works on another process that allows it: test_the_system_refuses. (Linux may protect this one without the
    # filter, too, if it is set up so.)
    secret = ctypes.create_string_buffer(SECRET.encode())
    attack = SYSTEM_ATTACKS["read_the_memory_of_another"].format(victim=os.getpid(), secret=ctypes.addressof(secret))
    outcome = run(jail, f"import ctypes\nlibc = ctypes.CDLL(None)\n{attack}\nprint('got')")
    assert "AssertionError" in outcome.error and outcome.printed == ""


def survives(attack):
    """Whether a bare process in a session of its own survives what a child of it does."""
    parent = ("import os, subprocess, sys\nattack = sys.argv[1].format(parent=os.getpid(), group=os.getpgrp())\n"
              "subprocess.run([sys.executable, '-I', '-S', '-c', attack])\nprint('alive')")
    return subprocess.run([sys.executable, "-I", "-S", "-c", parent, attack], capture_output=True, start_new_session=True).stdout == b"alive\n"


@pytest.mark.parametrize("target", ["{parent}", "0", "-{group}", "-1"], ids=["parent", "own_group", "group_of_the_parent", "all"])
def test_no_group_of_processes_can_be_killed(jail, target):
    attack = "import os\nos.kill(" + target + ", 9)"
    assert survives("pass") and (target == "-1" or not survives(attack))  # to show the last would end all that its user runs
    assert "PermissionError" in run(jail, attack.format(parent=os.getpid(), group=os.getpgrp())).error


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_no_sibling_can_be_killed_or_stopped(jail, monkeypatch, number):
    def siblings(jail):
        """What becomes of a session when another of the same server signals its child."""
        with jail.session(None) as sibling, jail.session(None) as attacker:
            sibling.run("x = 1")
            error = attacker.run(f"import os\nos.kill({sibling.child.pid}, {number})").error
            return error, sibling.run("import time\nprint(x)").printed
    assert "PermissionError" in siblings(jail)[0] and siblings(jail)[1] == "1\n"
    monkeypatch.setattr("verify.MACHINES", {})
    with Jail(seconds=1.0, allow_weak=True) as weak:  # without the filter of system calls
        assert siblings(weak) == (None, "")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other set of system calls is of x86-64")
def test_the_calls_of_32_bits_are_closed_as_well(jail):
    # By `int 0x80` a program of 64 bits reaches calls that have other numbers. 20 is getpid; in the filter's
    # numbers it is writev, but 1 is exit, 11 execve. The kernel kills the child: a filter by number alone would not.
    code = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, ctypes.c_size_t(4096), 7, 0x22, -1, 0)
ctypes.memmove(page, bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3]), 8)  # mov eax, 20; int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(page)()
print('got')
"""
    if bare(code).returncode == 0:  # a kernel may be built without these calls; then there is nothing to show
        assert bare(code).stdout == "got\n"
    assert "crashed" in run(jail, code).error


# ---------------------------------------------------------------------------------------------------
# nothing to find


def test_there_are_no_environment_variables(jail, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    code = ("import os, ctypes\nlibc = ctypes.CDLL(None)\nlibc.getenv.restype = ctypes.c_char_p\n"
            "print(dict(os.environ), libc.getenv(b'SECRET'), libc.getenv(b'PYTHONHASHSEED'))")
    assert SECRET in subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True).stdout
    with Jail() as fresh:  # whose servers start when there is something to inherit
        assert run(fresh, code).printed == "{} None None\n"
        for server in fresh.servers:  # of what they were started with, which stays in memory
            assert SECRET not in Path(f"/proc/{server.process.pid}/environ").read_text()


def test_there_are_no_open_files(jail, tmp_path):
    # Three standard streams, which are /dev/null, and the pipe. A fork of this process would find what it holds.
    code = """
import os
open_descriptors = []
for fd in range(256):
    try: os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        if error.errno == 9: continue  # EBADF; a pipe is open, but cannot be wound
    open_descriptors.append(fd)
print(len(open_descriptors))
"""
    with open(tmp_path / "held", "w") as held:
        os.set_inheritable(held.fileno(), True)
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, close_fds=False)
        assert int(process.stdout) >= 4
        with Jail() as fresh:
            assert run(fresh, code).printed == "4\n"


def test_the_standard_streams_lead_nowhere(jail, capfd, tmp_path):
    code = "import os\nfor fd in (0, 1, 2):\n    try: os.write(fd, b'planted')\n    except OSError: pass\nprint(os.read(0, 10))"
    assert "planted" in bare(code).stdout
    (tmp_path / "given").write_text(SECRET)
    own = os.dup(0)
    with open(tmp_path / "given") as given:
        os.dup2(given.fileno(), 0)
    try:  # now this process's input has something to read
        assert SECRET[:10] in subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout
        os.lseek(0, 0, os.SEEK_SET)
        with Jail() as fresh:
            assert run(fresh, code).printed == "b''\n"
    finally:
        os.dup2(own, 0)
        os.close(own)
    capfd.readouterr()
    assert run(jail, code).printed == "b''\n"
    assert capfd.readouterr() == ("", "")
    for server in jail.servers:  # that nothing was written is also due to the limit on the size of files
        assert {os.readlink(f"/proc/{server.process.pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}


def test_the_code_is_not_told_where_the_project_is(jail):
    look = "import sys\nprint([text for text in [*sys.argv, *sys.orig_argv, *sys.path] if 'planted' in text])"
    assert "planted" in bare(f"{look}  # planted").stdout
    here = str(Path(__file__).parent.parent)
    assert here not in run(jail, "import sys\nprint(sys.argv, sys.orig_argv, sys.path)").printed


def test_there_is_no_code_of_the_project_nor_its_libraries(jail):
    attack = "import tools\nprint(tools.make_environment('calculator', 3).state)"
    process = subprocess.run([sys.executable, "-c", attack], capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    assert f"'tea': {TEA}" in process.stdout  # where the code can be imported, the hidden state can be computed
    assert "No module named 'tools'" in run(jail, attack).error
    loaded = run(jail, "import sys\nprint([m for m in ('tools', 'verify', 'rl', 'torch', 'tqdm', 'pytest') if m in sys.modules])")
    assert loaded.printed == "[]\n"


FRAMES = """
import sys
frame, seen = sys._getframe(), []
while frame:
    seen += [*frame.f_globals, *frame.f_locals, *map(repr, frame.f_locals.values())]
    frame = frame.f_back
names = ('environment', 'state', 'expected', 'make_environment')
print([text for text in seen if text in names or 'planted' + '-secret' in text])
"""


def test_the_frames_above_the_code_hold_nothing(jail):
    assert "expected" in bare(f"expected = {SECRET!r}\nexec({FRAMES!r})").stdout  # run in the process of the grader
    assert run(jail, FRAMES).printed == "[]\n"


def test_no_frame_of_the_server_is_above_the_code(jail):
    """In one it would find pids, and from its own, by subtraction, how many children there were: a count of calls."""
    walk = "import sys\nframe, names = sys._getframe(), []\nwhile frame:\n    names.append(frame.f_code.co_name)\n    frame = frame.f_back\nprint(names)"
    assert bare(f"def serve(): exec({walk!r})\nserve()").stdout == "['<module>', 'serve', '<module>']\n"
    assert run(jail, walk).printed == "['<module>', 'live', '<module>']\n"


def test_the_objects_of_the_process_hold_nothing(jail):
    hunt = "import gc\ngc.unfreeze()\nprint([o for o in gc.get_objects() if isinstance(o, dict) and 'hidden' in o])"
    assert "planted-secret" in bare(f"secret = {HELD!r}\nimport gc\ngc.freeze()\nexec({hunt!r})").stdout
    assert run(jail, hunt).printed == "[]\n"


def test_a_session_sees_nothing_of_another_on_the_same_server(jail):
    planted = "import builtins, sys, json\nbuiltins.planted = sys.planted = json.planted = 1"
    look = "import builtins, sys, json\nprint([hasattr(m, 'planted') for m in (builtins, sys, json)])"
    assert bare(planted + "\n" + look).stdout == "[True, True, True]\n"  # one interpreter for both
    with jail.session(None) as first, jail.session(None) as second:
        assert first.run(planted).error is None
        assert first.run(look).printed == "[True, True, True]\n"
        assert second.run(look).printed == "[False, False, False]\n"
    assert run(jail, look).printed == "[False, False, False]\n"


# ---------------------------------------------------------------------------------------------------
# state outside


@pytest.mark.parametrize("name, arguments", [("reset", [1]), ("__init__", [1]), ("call", ["x", [], {}]), ("state", []),
                                             ("tools", []), ("__class__", [])])
def test_only_tools_can_be_called_whatever_the_child_says(jail, name, arguments):
    environment, naive = make_environment("calculator", SEED), make_environment("calculator", SEED)
    before = dict(environment.state)
    reached = getattr(naive, name)  # by a parent that looks names up on the object
    if name in ("reset", "__init__"):
        reached(*arguments)
        assert naive.state != before
    assert name != "state" or reached == before  # all that is hidden
    message = json.dumps({"tool": name, "arguments": arguments, "keywords": {}}) + "\n"
    code = f"import os\nfor fd in range(3, 16):\n    try: os.write(fd, {message.encode()!r}); reply = os.read(fd, 10**4)\n    except OSError: pass"
    with jail.session(environment) as session:
        session.run(code + "\nprint(reply)")
        assert session.run("print(reply)").printed.startswith(f"b'{{\"refusal\": \"there is no tool \\'{name}")
    assert environment.state == before


class Ledger(Environment):
    """A state with lists inside, which a tool hands out and takes in."""

    name, judged_by_answer, summary = "ledger", True, "A ledger."

    def reset(self, seed):
        self.state = {"entries": [[1]]}

    @tool
    def entries(self) -> list:
        """All entries."""
        return self.state["entries"]

    @tool
    def put(self, entry: list) -> list:
        """Add an entry."""
        self.state["entries"].append(entry)
        return entry


def test_what_a_tool_returned_is_a_copy(jail):
    code = "mine = entries()\nmine[0].append(2)\nnew = put([5])\nnew.append(6)\nprint(mine, new)"
    shared = Ledger()
    exec(code, {"entries": shared.entries, "put": shared.put, "print": lambda *a: None})  # in one process
    assert shared.state == {"entries": [[1, 2], [5, 6]]}
    with jail.session(environment := Ledger()) as session:
        assert session.run(code).printed == "[[1, 2]] [5, 6]\n"
    assert environment.state == {"entries": [[1], [5]]}


# ---------------------------------------------------------------------------------------------------
# data on a pipe: cheating the verdict. Each attack passes one of the checks that are in use elsewhere, and
# in a bare process they do pass it: the exit status of a script that ends in `assert`, a marker on its output,
# or the truth of what was returned.

BY_STATUS = "assert evaluate(1) is True"
BY_TRUTH = "assert evaluate(1)"
BY_EQUALITY = "assert evaluate(1) == True"
BY_MARKER = "print('verdict', 'PASS' if evaluate(1) is True else 'FAIL')"
BY_JSON = "import json\nassert json.dumps(evaluate(1)) == 'true'"
BY_TYPE = "value = evaluate(1)\nassert isinstance(value, bool) and value"
CHEATS = {
    "one": ("def evaluate(answer): return 1", BY_EQUALITY),
    "one_point_zero": ("def evaluate(answer): return 1.0", BY_EQUALITY),
    "text": ("def evaluate(answer): return 'True'", BY_TRUTH),
    "a_list": ("def evaluate(answer): return [True]", BY_TRUTH),
    "a_function": ("def evaluate(answer): return evaluate", BY_TRUTH),
    "a_generator": ("def evaluate(answer): yield False", BY_TRUTH),
    "a_coroutine": ("async def evaluate(answer): return False", BY_TRUTH),
    "an_ellipsis": ("def evaluate(answer): return ...", BY_TRUTH),
    "equal_to_everything": ("class Yes:\n    __eq__ = lambda *a: True\ndef evaluate(answer): return Yes()", BY_EQUALITY),
    "an_int_that_says_it_is_bool": ("class Yes(int):\n    __class__ = bool\ndef evaluate(answer): return Yes(1)", BY_TYPE),
    "sys_exit": ("import sys\ndef evaluate(answer): sys.exit(0)", BY_STATUS),
    "SystemExit": ("def evaluate(answer): raise SystemExit", BY_STATUS),
    "_exit": ("import os\ndef evaluate(answer): os._exit(0)", BY_STATUS),
    "_exit_when_loaded": ("import os\nos._exit(0)\ndef evaluate(answer): return False", BY_STATUS),
    "_exit_at_the_end": ("import atexit, os\natexit.register(os._exit, 0)\ndef evaluate(answer): return False", BY_STATUS),
    "_exit_when_collected": ("import os\nclass Last:\n    def __del__(self, leave=os._exit): leave(0)\nlast = Last()\n"
                             "def evaluate(answer): return False", BY_STATUS),
    "_exit_in_the_hook": ("import os, sys\nsys.excepthook = lambda *a: os._exit(0)\ndef evaluate(answer): return False", BY_STATUS),
    "_exit_in_the_trace": ("import os, sys\nsys.settrace(lambda *a: os._exit(0))\ndef evaluate(answer): return False", BY_STATUS),
    "printed_success": ("def evaluate(answer): print('verdict PASS')", BY_MARKER),
    "written_success": ("import os\ndef evaluate(answer): os.write(1, b'verdict PASS')", BY_MARKER),
    "patched_print": ("import builtins\ntrue_print = print\nbuiltins.print = lambda *a: true_print('verdict PASS')\n"
                      "def evaluate(answer): return False", BY_MARKER),
    "an_exit_by_another_name": ("class Quiet(SystemExit): pass\ndef evaluate(answer): raise Quiet(0)", BY_STATUS),
    "patched_json": ("import json\njson.dumps = lambda *a, **k: 'true'\ndef evaluate(answer): return False", BY_JSON),
    "patched_encoder": ("import json\njson.JSONEncoder.encode = lambda *a, **k: 'true'\ndef evaluate(answer): return False", BY_JSON),
    "patched_isinstance": ("import builtins\nbuiltins.isinstance = lambda *a: True\ndef evaluate(answer): return 5", BY_TYPE),
    "a_name_that_is_True": ("evaluate = True", "assert evaluate"),
    "a_class_for_a_function": ("class evaluate:\n    def __init__(self, answer): pass", BY_TRUTH),
}


@pytest.mark.parametrize("evaluation, check", CHEATS.values(), ids=CHEATS)
def test_only_a_returned_true_passes(jail, evaluation, check):
    process = bare(f"{evaluation}\n{check}")
    assert "verdict PASS" in process.stdout if check is BY_MARKER else process.returncode == 0
    assert verdict(jail, evaluation).passed is False


FORGED = b'{"printed": "", "error": null, "value": true}\n'
CHANNEL = "import os\ndef evaluate(answer):\n    for fd in range(3, 16):\n        try: {}\n        except OSError: pass"
FORGERIES = {
    "closed_pipe": (CHANNEL.format("os.close(fd)"), "crashed"),
    "nested_brackets": (CHANNEL.format("os.write(fd, b'[' * 10**6 + b'\\n')"), "not its own"),
    "ten_megabytes": (CHANNEL.format("os.write(fd, b'x' * 10**7)"), "sent too much"),
}


@pytest.mark.parametrize("evaluation, reason", FORGERIES.values(), ids=FORGERIES)
def test_what_breaks_the_reply_does_not_pass(jail, monkeypatch, evaluation, reason):
    with pytest.raises(RecursionError):
        json.loads("[" * 10**6)  # nested brackets would end a parent that does not expect them
    # A closed pipe cannot be shown: it attacks the pipe of the jail itself.
    judged = verdict(jail, evaluation)
    assert judged.passed is False and reason in judged.reason
    monkeypatch.setattr("verify.MESSAGE_BYTES", 10**9)
    monkeypatch.setattr("verify.ACTION_BYTES", 10**9)
    assert ("sent too much" in reason) == (verdict(jail, evaluation).reason != judged.reason)  # without a cap all is read


def test_a_task_without_an_evaluation_does_not_pass(jail):
    assert bare("x = True").returncode == 0  # which by the exit status alone it would
    assert verdict(jail, "x = True").passed is False


def test_true_passes_and_false_does_not(jail):
    assert verdict(jail, f"def evaluate(answer): return answer == {TEA} == amount('tea')", str(TEA)).passed is True
    assert verdict(jail, f"def evaluate(answer): return answer == {TEA}", "0").passed is False


ATTACK_ON_EVALUATE = """
import builtins, sys, json
class Same(int):
    __eq__ = lambda *a: True
    __hash__ = int.__hash__
result = Same(-1)
amount = lambda item: -1
builtins.amount = amount
sys.modules['json'].dumps = lambda *a, **k: 'true'
builtins.bool = builtins.isinstance = lambda *a: True
"""


def test_an_executor_leaves_nothing_behind_that_reaches_the_evaluation(jail):
    evaluation = "def evaluate(answer): return answer == amount('tea')"
    one_process = f"{ATTACK_ON_EVALUATE}\n{evaluation}\nassert evaluate(result)"
    assert bare(one_process).returncode == 0
    environment = make_environment("calculator", SEED)
    with jail.session(environment) as session:
        session.run(ATTACK_ON_EVALUATE)
        assert evaluate(jail, task_with(evaluation), environment, session.run("pass").value).passed is False


def test_an_executor_cannot_write_a_verdict(jail):
    # It can write to its own pipe, as if it were the reply to its action: that makes it an observation, no verdict.
    forge = (f"import os, time\nresult = True\nfor fd in range(3, 16):\n    try: os.write(fd, {FORGED!r})\n    except OSError: pass\n"
             "time.sleep(0.3)")

    def in_one_child():
        """The verdict, if the evaluation ran in the executor's child: the true reply to the action comes to be it."""
        with jail.session(None) as session:
            session.run(forge)
            time.sleep(0.5)
            return session.run("import time\ntime.sleep(0.4)\ndef evaluate(answer): return False", [1]).value
    assert any(in_one_child() is True for _ in range(5))  # replies that a busy machine reads together are no reply
    environment = make_environment("calculator", SEED)
    with jail.session(environment) as session:
        session.run(f"import os\nfor fd in range(3, 16):\n    try: os.write(fd, {FORGED!r})\n    except OSError: pass")
        answer = session.run("pass").value  # and its answer may be whatever it likes
    assert evaluate(jail, task_with("def evaluate(answer): return answer == 5"), environment, answer).passed is False


MALFORMED = ["null", "1", "{}", '{"tool": 1, "arguments": [], "keywords": {}}', '{"tool": "amount", "arguments": {}, "keywords": []}',
             '{"printed": 1, "error": null, "value": null}', '{"printed": "", "error": null}', "no json", "9" * 5_000, "[" * 50_000]
NO_DATA = ["NaN", "1e999", '"\\ud800"', "[" * 60 + "]" * 60, "[" * 400 + "]" * 400]
REPLY = "import os\nfor fd in range(3, 16):\n    try: os.write(fd, {!r} + b'\\n')\n    except OSError: pass\nwhile True: pass"


def believe(message, environment):
    """What a parent does that expects nothing but what the code of the jail sends."""
    reply = json.loads(message)
    if "tool" in reply:
        return getattr(environment, reply["tool"])(*reply["arguments"], **reply["keywords"])
    return reply["printed"] + "", reply["error"], reply["value"]


@pytest.mark.parametrize("message", MALFORMED, ids=lambda message: message[:20])
def test_a_malformed_message_ends_the_child(jail, message):
    with pytest.raises((TypeError, KeyError, ValueError, RecursionError)):
        believe(message, make_environment("calculator", SEED))
    assert "not its own" in run(jail, REPLY.format(message.encode())).error


@pytest.mark.parametrize("value", NO_DATA, ids=lambda value: value[:20])
def test_a_reply_with_a_value_that_is_no_data_ends_the_child(jail, monkeypatch, value):
    code = REPLY.format(f'{{"printed": "", "error": null, "value": {value}}}'.encode())
    assert "not its own" in run(jail, code).error
    monkeypatch.setattr("verify.plain", lambda value, nesting=50: value)
    outcome = run(jail, code)
    assert outcome.error is None and outcome.value is not None  # it gets through


@pytest.mark.parametrize("depth", [*range(44, 56), 496])
def test_data_at_the_limit_of_nesting_never_harms_the_parent(jail, depth):
    deep = 1
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(RecursionError):
        plain(deep, nesting=10**9)  # without its limit
    code = f"result = 1\nfor i in range({depth}): result = [result]"
    environment = make_environment("calculator", SEED)
    with jail.session(environment) as session:
        assert session.run(code).error is None
        answer = session.run("pass").value
        assert session.run("add(result, 1)").error
    assert verdict(jail, "def evaluate(answer): return False", answer).passed is False
    task = CodeAsTask("calculator", SEED, "x", "def evaluate(answer): return False", code, [code] * 3)
    assert judge(jail, task).stage in ("runs", "solution")


@pytest.mark.parametrize("code", ["amount('\\\\' * 500_000)", "amount('\\uffff' * 150_000)", "amount('tea', **{'\\\\' * 500_000: 1})"],
                         ids=["long", "wide", "keyword"])
def test_a_refusal_that_quotes_a_long_argument_never_harms_the_parent(jail, monkeypatch, code):
    # Quoted and in JSON, a character takes up to six bytes: the refusal is longer than a message may be.
    assert "ToolError" in run(jail, code).error
    monkeypatch.setattr("verify.ERROR_CHARACTERS", 10**9)  # to which it is cut
    with pytest.raises(ValueError, match="more than"):
        run(jail, code)


def test_what_an_action_sends_is_bounded_and_the_next_may_send_as_much(jail, monkeypatch):
    """Or one that sends a message of a megabyte after the other keeps this process from reading those of others in time."""
    calls = "for n in range({}):\n    try: amount('x' * 1_000_000)\n    except ToolError: pass"
    with jail.session(make_environment("calculator", SEED)) as session:
        assert [session.run(calls.format(4)).error for _ in range(2)] == [None, None]
        assert "sent too much" in session.run(calls.format(5)).error
    monkeypatch.setattr("verify.ACTION_BYTES", 10**9)
    assert run(jail, calls.format(5)).error is None


# ---------------------------------------------------------------------------------------------------
# servers that differ, fresh children: evaluations that are no function of state and answer


def says(jail, evaluation, replica=0, times=1):
    """What an evaluation says, asked `times` in one process: without the fresh child that each verdict has."""
    with jail.session(make_environment("calculator", SEED), replica) as session:
        assert session.run(evaluation).error is None
        return [session.run("pass", [1]).value for _ in range(times)]


def test_an_evaluation_that_depends_on_the_hash_seed_is_rejected(jail):
    for salt in range(100):  # one on which the servers disagree, and of which the first says True
        evaluation = f"def evaluate(answer): return answer == 1 and hash('{salt}') % 2 == 0"
        if says(jail, evaluation, 0) == [True] and says(jail, evaluation, 1) == [False]:
            break
    assert says(jail, evaluation) == says(jail, evaluation) == [True]  # on one server it looks like a function
    judgement = judge(jail, task_with(evaluation))
    assert judgement.stage == "solution" and "when it was tried again" in judgement.reason


def test_an_evaluation_that_draws_lots_is_rejected(jail):
    for salt in range(100):
        evaluation = f"import random\ndef evaluate(answer): return answer == 1 and random.Random(random.random() + {salt}).random() < 0.5"
        if says(jail, evaluation, 0) == [True] and says(jail, evaluation, 1) == [False]:
            break
    assert says(jail, evaluation) == says(jail, evaluation) == [True]
    assert "when it was tried again" in judge(jail, task_with(evaluation)).reason


def test_what_two_servers_agree_on_by_chance_four_others_may_not(jail):
    for salt in range(1000):
        evaluation = f"def evaluate(answer): return answer == 1 and hash('{salt}') % 2 == 0"
        if [says(jail, evaluation, replica) for replica in range(4)] == [[True], [True], [True], [False]]:
            break
    assert "every time" in judge(jail, task_with(evaluation)).reason


@pytest.mark.parametrize("holds", [
    "datetime.date.today().toordinal() % 2 == {day} % 2", "datetime.date.today().year >= 2024", "datetime.datetime.now().timestamp() < 4e9", "time.time() > 1.7e9",
    "int(time.time()) // 86_400 == {day}", "time.localtime().tm_year == {year}", "time.gmtime()[0] == {year}",
    "time.clock_gettime(time.CLOCK_REALTIME) // 86_400 == {day}", "time.clock_gettime_ns(time.CLOCK_REALTIME) // 86_400_000_000_000 == {day}",
    "time.strftime('%Y') == '{year}'", "time.ctime().endswith('{year}')", "time.asctime().endswith('{year}')",
    "abs(time.monotonic() - {monotonic}) < 1000", "abs(time.perf_counter_ns() - {monotonic} * 10**9) < 10**12",
    "(datetime.datetime.now().second - {second} + 2) % 60 < 30",
])
def test_an_evaluation_that_follows_the_date_is_rejected(jail, holds):
    day = int(time.time()) // 86_400
    holds = holds.format(day=datetime.date.today().toordinal() if "toordinal" in holds else day, year=time.gmtime().tm_year,
                         monotonic=int(time.monotonic()), second=time.gmtime().tm_sec)
    evaluation = f"import datetime, time\ndef evaluate(answer): return answer == 1 and {holds}"
    assert says(jail, evaluation) == [True]  # on one server it looks like a function
    assert "when it was tried again" in judge(jail, task_with(evaluation)).reason


def test_a_uuid_does_not_tell_the_date(jail):
    days = "import uuid\nprint((uuid.uuid1().time - 0x01b21dd213814000) // 10**7 // 86_400)"
    assert abs(int(bare(days).stdout) - time.time() // 86_400) <= 1
    with jail.session(None, replica=1) as session:  # it may fail, for it looks for the machine's address, or be wrong
        assert str(int(time.time()) // 86_400) not in session.run(days).printed
    assert run(jail, "import uuid\nprint(uuid.uuid4().version)").printed == "4\n"


def test_a_given_time_is_the_same_on_every_server(jail):
    code = ("import datetime, time\nprint(time.gmtime(0)[:6], time.strftime('%Y', time.gmtime(0)), time.ctime(86_400), "
            "datetime.datetime(2024, 2, 29) + datetime.timedelta(days=366), datetime.datetime.strptime('3 May 2021', '%d %B %Y').date())")
    seen = set()
    for replica in range(len(jail.servers)):
        with jail.session(None, replica) as session:
            seen.add(session.run(code).printed)
    (printed,) = seen
    assert printed.startswith("(1970, 1, 1, 0, 0, 0) 1970 ") and printed.endswith("2025-03-01 00:00:00 2021-05-03\n")


@pytest.mark.parametrize("step, said", [("state += 1", [True, False, False, False]), ("state = not state", [True, False, True, False])],
                         ids=["counts", "flips"])
def test_an_evaluation_that_counts_its_calls_or_flips_begins_anew_each_time(jail, step, said):
    evaluation = f"state = 0\ndef evaluate(answer):\n    global state\n    {step}\n    return state == 1"
    assert says(jail, evaluation, times=4) == said  # in one process it passes the solution, and fails what comes next
    assert judge(jail, task_with(evaluation)).stage == "failures"  # in fresh ones it says True to the failures as well


def test_an_evaluation_that_does_the_work_itself_is_rejected(jail):
    environment = make_environment("shop", SEED)
    order = next(order for order in environment.state["orders"].values() if order["status"] == "pending")["order_id"]
    evaluation = f"def evaluate():\n    change_city('{order}', 'Oslo')\n    return get_order('{order}')['city'] == 'Oslo'"
    task = task_with(evaluation, env="shop")
    with jail.session(environment) as session:  # without the comparison of the states it passes
        assert session.run(task.evaluate, []).value is True
    assert "changed the state" in judge(jail, task).reason


def test_an_evaluation_that_depends_on_its_process_is_rejected(jail):
    with jail.session(None) as session:  # if all code ran in one process it would pass
        pid = session.run("import os\nresult = os.getpid()").value
        evaluation = f"import os\ndef evaluate(answer): return os.getpid() == {pid}"
        assert session.run(evaluation, [None]).value is True
    assert judge(jail, task_with(evaluation)).ok is False


def test_a_reply_is_remembered_for_an_equal_past_alone(monkeypatch):
    def play(jail, item="tea", seed=SEED, replica=0, second="print(tea)"):
        with jail.session(make_environment("calculator", seed), replica) as session:
            return session.run(f"tea = amount({item!r})").error, session.run(second).printed

    with Jail() as jail:
        jail.replies.clear()  # of the probe
        assert play(jail) == play(jail) == (None, f"{TEA}\n")
        assert len(jail.replies) == 3  # a tool call, and the ends of two actions
        monkeypatch.setattr(ForkServer, "child", lambda self: pytest.fail("a child was asked for"))
        assert play(jail) == (None, f"{TEA}\n")
        for another in [dict(item="cup"), dict(seed=SEED + 1), dict(replica=1), dict(replica=2), dict(second="print(tea + 1)")]:
            with pytest.raises(pytest.fail.Exception):
                play(jail, **another)


def test_a_child_that_is_started_late_is_told_all_that_came_before():
    with Jail() as jail:
        for last, printed in [("print(a, b)", f"{TEA} 2\n"), ("print(b, a)", f"2 {TEA}\n")]:
            world = make_environment("calculator", SEED)
            with jail.session(world) as session:
                session.run("a = amount('tea')")
                session.run("b = 2")
                assert session.run(last).printed == printed
                assert session.child.channel is not None
                session.run("a += 1")
                assert session.run("print(a)").printed == f"{TEA + 1}\n"


def test_remembered_actions_lend_no_time_to_a_new_one():
    with Jail(seconds=0.5) as jail:
        for last in ("pass", "while True: pass"):  # in the second round a child is started for the last action only
            with jail.session(None) as session:
                for number in range(20):
                    session.run(f"x = {number}")
                start = time.monotonic()
                outcome = session.run(last)
        assert "longer than 0.5 seconds" in outcome.error
        assert time.monotonic() - start < 5  # a generous bound: twenty actions' time would be 10 s


def test_what_is_remembered_of_an_action_takes_from_its_time():
    """Or what was late once would be in time when it is run again, and tasks would be kept that were rejected before."""
    slow = "__import__('ti' + 'me').sleep(0.35)"  # it hides that it waits, so that the jail remembers
    with Jail(seconds=0.5) as jail:
        for earlier in ([], ["x = 1", "y = 2", "z = 3"]):
            for _ in range(3):
                with jail.session(make_environment("calculator", SEED)) as session:
                    assert [session.run(code).error for code in earlier] == [None] * len(earlier)
                    assert "longer than 0.5 seconds" in session.run(f"{slow}\namount('tea')\n{slow}").error


def test_a_child_that_is_started_late_has_the_time_of_all_that_it_has_to_catch_up_with():
    slow = "for n in range(2_500_000): pass\nprint('done', {})"  # without a clock, so that it is remembered
    with Jail(seconds=1.0) as jail:  # each takes a tenth of that, all together more
        for last in ("other", "new"):
            with jail.session(None) as session:
                outcomes = [session.run(slow.format(number)).error for number in range(20)] + [session.run(f"print({last!r})").error]
        assert outcomes == [None] * 21


def test_a_session_that_has_a_child_asks_no_memory():
    """Or each message that is new again would have a deadline of its own, a thousand in an action."""
    with Jail() as jail:
        for _ in range(2):  # in the second round all but the first is remembered
            with jail.session(None) as session:
                session.run("print('x' * 10_000)")  # too long for that, so there is a child
                assert session.run("y = 1").error is None and session.child.untold == []
                assert session.run("print(y)").printed == "1\n"


@pytest.mark.parametrize("look", ["import time; seen = time.time_ns()", "import os; seen = os.urandom(8)", "import os; seen = os.getpid()",
                                  "import _thread; seen = _thread.get_native_id()", "seen = hash(object())", "import random; seen = random.Random().random()",
                                  "import random; random.seed( ); seen = random.random()", "import random; random.seed(a=None); seen = random.random()",
                                  "import random as r; draw = r.Random; seen = draw().random()", "import uuid; seen = str(uuid.uuid4())",
                                  "import secrets; seen = secrets.token_hex()", "import random; seen = random.SystemRandom().random()"])
def test_code_that_looks_at_what_nobody_foresees_is_as_in_a_notebook(look):
    with Jail() as jail:
        printed = []
        for last in range(2):
            with jail.session(None) as session:
                printed.append(session.run(f"{look}\nprint(seen)").printed)
                assert session.run(f"print(seen)  # {last}").printed == printed[-1]
        assert printed[0] != printed[1]


def test_no_source_keeps_the_parent_busy(jail):
    """It looks through sources before their time begins: a search that goes back and forth would hold up all sessions."""
    for start in ("seed(", "seed(a=", "seed(a", "seed(None", "seed(" * 10_000, "id", "R", "t"):
        source = f"#{start}"
        start = time.process_time()
        assert run(jail, source + " " * (65_000 - len(source)) + "x").error is None
        assert time.process_time() - start < 0.5  # a few milliseconds; the search that was here once took ten seconds


def test_code_is_never_told_what_its_variables_do_not_hold():
    """What hides from the jail that it looks at a clock is remembered, but then found out."""
    look = "now = __import__('ti' + 'me').perf_counter_ns()\nprint(now)"
    with Jail() as jail:
        with jail.session(None) as session:
            first = session.run(look).printed
        with jail.session(None) as session:
            assert session.run(look).printed == first  # remembered; no child has run it yet
            assert "the same again" in (lost := session.run("print(now)").error) and "are lost" in lost
            assert "NameError" in session.run("print(now)").error
        with jail.session(None) as session:  # without a memory of the first look all is as in a notebook
            jail.replies.clear()
            assert session.run(look).printed == session.run("print(now)").printed


def test_a_session_keeps_no_messages_that_its_child_has_been_told(jail):
    world = make_environment("calculator", SEED)
    world.tools = {"echo": lambda environment, text: text}
    with jail.session(world) as session:
        for number in range(3):
            assert session.run(f"for n in range(20): echo(str({number}) * 100_000)").error is None
            assert session.child.untold == []


def test_tool_calls_are_executed_on_the_state_of_the_episode_whatever_is_remembered():
    order = next(o for o in make_environment("shop", SEED).state["orders"].values() if o["status"] == "pending")["order_id"]
    with Jail() as jail:
        for _ in range(2):
            world = make_environment("shop", SEED)
            with jail.session(world) as session:
                session.run(f"change_city({order!r}, 'Oslo')")
            assert world.state["orders"][order]["city"] == "Oslo"
        replies = len(jail.replies)
        world.state["orders"][order]["status"] = "shipped"  # in which the call is refused: another past from there on
        with jail.session(world) as session:
            assert "ToolError" in session.run(f"change_city({order!r}, 'Rome')").error
        assert len(jail.replies) > replies


@pytest.mark.parametrize("code", ["while True: pass", "import os; os._exit(0)", REPLY.format(b"no json"), "print('x' * 10_000)"],
                         ids=["late", "dead", "malformed", "long"])
def test_what_is_no_reply_or_a_long_one_is_not_remembered(code):
    with Jail(seconds=0.3) as jail:
        jail.replies.clear()  # of the probe
        for _ in range(2):
            run(jail, code)
            assert not jail.replies


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("verify.REPLIES", 10)
    with Jail() as jail:
        for number in range(25):
            assert run(jail, f"print({number})").printed == f"{number}\n"
            assert len(jail.replies) <= 10


def test_replicas_differ_in_their_seeds_and_each_repeats_itself(jail):
    def draw(replica):
        with jail.session(None, replica) as session:
            return session.run("import random\nprint(hash('tea'), random.random())").printed
    assert draw(0) == draw(0) != draw(1) == draw(1)


# ---------------------------------------------------------------------------------------------------
# the servers


def test_describe_says_what_was_refused(jail):
    assert jail.strong and jail.probe() and all(jail.probe().values())
    assert jail.describe().startswith("jail: strong: reading a file is refused")


def test_a_dead_server_and_a_stuck_server_are_replaced(jail):
    jail.servers[0].process.kill()
    assert run(jail, "print(1)").printed == "1\n"
    jail.servers[0].control.settimeout(0.3)
    jail.servers[0].process.send_signal(signal.SIGSTOP)
    assert run(jail, "print(1)").printed == "1\n"


def test_sessions_of_a_dead_server_end_in_a_sentence(jail):
    with jail.session(make_environment("calculator", SEED)) as session:
        session.run("x = 1")
        jail.servers[0].process.kill()
        jail.servers[0].process.wait()
        outcomes = [session.run("import time\ntime.sleep(0.2)\nprint(1)") for _ in range(2)]
    assert "lost" in outcomes[0].error and outcomes[1].printed == "1\n"


def test_for_want_of_memory_a_child_is_ended_before_the_parent(jail):
    """Each child may have 256 MB, and hundreds of them more than there is. To exhaust a machine in a test will not do."""
    with jail.session(None) as session:
        session.run("x = 1")
        for pid in (jail.servers[0].process.pid, session.child.pid):
            assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == 1000
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 1000


def test_servers_that_keep_ending_are_a_sentence(jail, monkeypatch):
    monkeypatch.setattr("verify.start_program", lambda statement, **options: start_program("pass", **options))
    jail.servers[0].process.kill()
    with pytest.raises(JailError, match="out of memory or processes"):
        run(jail, "x = 1")
    monkeypatch.undo()
    assert run(jail, "print(1)").printed == "1\n"


def test_a_server_reaps_its_children_also_where_a_shell_has_their_end_ignored():
    code = """if True:
        import signal
        from verify import Jail
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # processes inherit that
        with Jail() as jail:
            server = jail.servers[0].process
            for _ in range(5):
                with jail.session(None) as session:
                    session.run("x = 1")
            assert jail.servers[0].process is server and server.poll() is None"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True).stderr == ""


def test_what_holds_is_tried_out_each_time_it_is_told(monkeypatch):
    with Jail() as jail:
        create_server, children, start_child = socket.create_server, [], ForkServer.child
        with create_server(("127.0.0.1", 0)) as free:
            address = free.getsockname()
        monkeypatch.setattr(socket, "create_server", lambda _: create_server(address))  # so that the jail could remember
        monkeypatch.setattr(ForkServer, "child", lambda server: children.append(server) or start_child(server))
        assert jail.describe() == jail.describe() and len(children) == 2


def test_a_busy_machine_is_not_one_that_lacks_a_layer(monkeypatch):
    with Jail(seconds=1e-9, allow_weak=True) as hurried:
        assert hurried.strong and "POSSIBLE" not in hurried.describe()
        assert "took longer" in run(hurried, "x = 1").error
        monkeypatch.setattr("verify.PROBE", "import os; os._exit(0)")
        assert hurried.describe() == "jail: strong: just now it could not be tried out"


def test_where_too_many_files_are_open_the_sessions_go_on(jail):
    with jail.session(None) as session, contextlib.ExitStack() as held:
        session.run("x = 1")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.suppress(OSError):
            while True:
                held.enter_context(open(os.devnull))
        with pytest.raises(JailError, match="ulimit -n"):
            run(jail, "x = 2")
        assert session.run("print(x)").printed == "1\n"


def test_a_child_is_ended_once(jail):
    with jail.session(None) as sibling, jail.session(None) as session:
        sibling.run("x = 1")
        session.run("x = 2")
        child = session.child
        session.close()
        child.end()  # after an interrupt a session may be closed again
        assert run(jail, "print(2)").printed == "2\n"  # by when the server has done what it was told
        assert sibling.run("print(x)").printed == "1\n"


def test_windows_is_sent_to_wsl(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(JailError, match="WSL"):
        Jail()


def test_where_calls_cannot_be_filtered_a_flag_is_needed(monkeypatch):
    monkeypatch.setattr("verify.MACHINES", {})  # a processor whose system calls have numbers that are not known here
    with pytest.raises(JailError, match="--allow-weak-jail"):
        Jail()


def test_only_a_returned_true_passes_in_a_weak_jail_too(monkeypatch):
    # That such evaluations pass other checks: CHEATS.
    monkeypatch.setattr("verify.MACHINES", {})
    with Jail(seconds=1.0, allow_weak=True) as weak:
        assert weak.describe().startswith("jail: WEAK: reading a file is POSSIBLE, connecting to a port is POSSIBLE")
        for evaluation in ("def evaluate(): return 1", "import os\ndef evaluate(): os._exit(0)", "x = True"):
            assert verdict(weak, evaluation).passed is False
        assert verdict(weak, "def evaluate(): return True").passed is True
        assert "took longer" in run(weak, "while True: pass").error


def test_a_closed_jail_says_so():
    closed = Jail()
    closed.close()
    with pytest.raises(JailError, match="closed"):
        run(closed, "x = 1")


def test_the_server_ends_its_children_and_itself_when_the_parent_lets_go():
    server = ForkServer(seed=1, strong=True)
    _, pid, channel = server.child()
    server.control.close()
    assert server.process.wait(timeout=10) == 0
    assert not os.path.exists(f"/proc/{pid}")
    channel.close()


def test_a_server_that_is_killed_takes_its_children_along():
    # A bare child outlives its parent: a_fork_that_outlives_its_deadline.
    server = ForkServer(seed=1, strong=True)
    _, pid, channel = server.child()
    channel.sendall(b'{"code": "while True: pass", "arguments": null}\n')
    server.process.kill()
    server.stop()
    channel.settimeout(10)
    with channel, contextlib.suppress(ConnectionResetError):  # if it had not even read what was sent
        assert channel.recv(1) == b""  # its other end is gone


def test_an_interrupt_while_a_child_is_asked_for_does_no_harm(jail, monkeypatch):
    monkeypatch.setattr(socket, "recv_fds", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(jail, "x = 1")
    monkeypatch.undo()
    assert run(jail, "print(1)").printed == "1\n"


# ---------------------------------------------------------------------------------------------------
# the soak

SHARED = tempfile.gettempdir(), "/dev/shm"  # folders into which anybody may write
MIXED = [
    ("print(amount('tea'))", f"{TEA}\n"), ("1 / 0", ""), ("import os; os._exit(0)", ""), ("amount('gold')", ""),
    ("import os\nfor fd in range(3, 16):\n    try: os.close(fd)\n    except OSError: pass", ""), ("x = 'a' * 10**10", ""),
    ("import sys; sys.exit()", ""), ("print('x' * 10**5)", "x" * 20_000), ("import os; os.fork()", ""),
    ("open('/etc/passwd')", ""), ("import socket; socket.socket()", ""), ("import ctypes; ctypes.string_at(0)", ""),
    ("import os\nfor fd in range(3, 16):\n    try: os.write(fd, b'null\\n')\n    except OSError: pass", ""),
    ("import os; os.kill(os.getpid(), 9)", ""), ("x = = 1", ""), ("print(add(1, 2))", "3\n"),
    *[(f"open('{folder}/left-by-the-soak-{os.getpid()}', 'w')", "") for folder in SHARED],
]
EVALUATIONS = [("def evaluate(answer): return answer == amount('tea')", True), ("def evaluate(): return 1", False),
               ("import os\ndef evaluate(): os._exit(0)", False), (CHANNEL.format("os.write(fd, b'x' * 10**7)"), False)]


def test_ten_thousand_mixed_checks_leave_no_process_no_file_and_no_descriptor(jail, monkeypatch):
    monkeypatch.setattr(jail, "seconds", 20.0)  # for honest code, however busy the machine is
    folders = {folder: set(os.listdir(folder)) for folder in ("/", os.getcwd())}  # a core would be in the children's, /

    def check(number):
        """Return what is wrong, or None."""
        turn = number // len(MIXED)  # so that each server meets each code
        if turn % 10 == 0:
            evaluation, passed = EVALUATIONS[number % len(EVALUATIONS)]
            judged = evaluate(jail, task_with(evaluation), make_environment("calculator", SEED), TEA, turn // 10)
            return None if judged.passed is passed else (evaluation, judged)
        code, printed = MIXED[number % len(MIXED)]
        with jail.session(make_environment("calculator", SEED), turn) as session:
            if number % 1_000 == 500:
                code, printed, session.child.seconds = "while True: pass", "", 0.5
            outcome = session.run(code)
            return None if outcome.printed == printed else (code, outcome)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(check, range(10_000))) == {None}
    assert settled(jail)
    for folder, before in folders.items():
        assert set(os.listdir(folder)) <= before, folder
    assert not any(os.path.exists(f"{folder}/left-by-the-soak-{os.getpid()}") for folder in SHARED)  # in which others may write, too


def test_what_a_child_does_not_read_is_not_sent_for_ever(jail):
    forged = json.dumps({"printed": "", "error": None, "value": None}) + "\n"
    code = f"import os\nfor fd in range(3, 16):\n    try: os.write(fd, {forged.encode()!r})\n    except OSError: pass\nwhile True: pass"
    with jail.session(None) as session:
        assert session.run(code).error is None
        assert "took longer" in session.run("#" + "\U0001f600" * 60_000).error  # more than fits into the pipe
    with jail.session(None) as session:
        session.run(code)
        session.child.channel.settimeout(2 * jail.seconds)
        with pytest.raises(TimeoutError):  # so long, and longer, it would be tried without the deadline
            session.child.channel.sendall(b"x" * 10**6)


def test_a_result_that_is_too_much_or_no_data_is_a_refusal(jail):
    for result in ("x" * 1_200_000, {"x"}):
        with pytest.raises(ValueError):  # which would end the parent
            pack({"value": plain(result)})
    world = make_environment("calculator", 3)
    world.tools = {"twice": lambda environment, text: text * 2, "group": lambda environment, text: {text}}
    with jail.session(world) as session:
        assert "ToolError: the result of twice cannot reach the code" in session.run("twice('x' * 600_000)").error
        assert "ToolError: the result of group cannot reach the code" in session.run("group('x')").error


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_limits_of_a_child_are_those_of_the_kernel_too(jail):
    with jail.session(None) as session:
        session.run("pass")
        limits, status = (Path(f"/proc/{session.child.pid}/{name}").read_text() for name in ("limits", "status"))
    for name, most in [("open files", 16), ("file size", 0), ("core file size", 0), ("address space", 256 * 2**20), ("cpu time", 60)]:
        assert re.search(rf"Max {name} +{most} +{most} ", limits), limits
    assert "NoNewPrivs:\t1" in status and (not jail.strong or "Seccomp:\t2" in status)


def test_a_session_counts_the_tools_that_its_code_calls_also_where_the_jail_remembers_the_replies():
    with Jail() as jail:
        for _ in range(2):
            with jail.session(make_environment("calculator", 10)) as session:
                session.run("for _ in range(3): amount('tea')\nsoon = items")
                session.run("soon(); amount('milk'); items()")  # the second call is refused, so the third is not made
                assert session.called == {"amount": 4, "items": 1}
