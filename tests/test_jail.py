"""The jail under attack: whatever code tries, the parent lives, verdicts stay its own, and the next check works."""
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tools import make_environment
from verify import CodeAsTask, ForkServer, Jail, JailError, evaluate, judge, observation

SEED = 3
TEA = make_environment("calculator", SEED).state["tea"]


@pytest.fixture(scope="module")
def jail():
    with Jail(seconds=1.0) as jail:
        yield jail


@pytest.fixture(autouse=True)
def benign_check_passes_afterwards(jail):
    """After each attack, an honest session on each server still works."""
    yield
    for replica in (0, 1):
        with jail.session(make_environment("calculator", SEED), replica) as session:
            assert session.run("result = amount('tea')\nprint('tea', result)").printed == f"tea {TEA}\n"
            assert session.value("result") == TEA


def run(jail, code):
    with jail.session(make_environment("calculator", SEED)) as session:
        return session.run(code)


def verdict(jail, evaluation, answer=None):
    """The verdict of an evaluation on an answer, for which only True is a pass."""
    task = CodeAsTask("calculator", SEED, "Find the tea.", evaluation, "result = 1", ["result = 2"] * 3)
    return evaluate(jail, task, make_environment("calculator", SEED), answer)


def descendants():
    """The pids of all processes below this one."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {os.getpid()}


# what a session is for


def test_variables_last_from_action_to_action(jail):
    with jail.session(make_environment("calculator", SEED)) as session:
        assert session.run("def double(x): return 2 * x\ntea = amount('tea')").error is None
        assert session.run("print(double(tea))").printed == f"{2 * TEA}\n"


def test_a_function_gets_as_many_arguments_as_it_takes(jail):
    with jail.session(None) as session:
        session.run("def none(): return 'none'\ndef one(answer): return answer\nmany = lambda *rest: len(rest)")
        assert [session.call(name, {"a": [1, 2.5, None]}).value for name in ("none", "one", "many")] == [
            "none", {"a": [1, 2.5, None]}, 0]
        assert "does not define missing" in session.call("missing").error


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


def test_common_modules_import_and_others_say_that_they_are_missing(jail):
    names = "math, json, re, random, collections, itertools, functools, datetime, statistics, string, typing, decimal"
    assert run(jail, f"import {names}\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(1)").error is None
    assert run(jail, "import datetime\nprint(datetime.datetime.strptime('2024', '%Y').year)").printed == "2024\n"
    assert run(jail, "import numpy").error.endswith("ModuleNotFoundError: No module named 'numpy'")


def test_observation_shows_output_and_error_and_marks_a_cut(jail):
    outcome = run(jail, "print('before')\n1 / 0")
    assert observation(outcome).startswith("before\n<action 1>, line 2: 1 / 0\nZeroDivisionError")
    assert observation(run(jail, "x = 1")).startswith("(no output")
    assert len(observation(run(jail, "print('x' * 10**6)"))) < 5_000 and "cut" in observation(run(jail, "print('x' * 10**6)"))


def test_values_are_plain_data_or_none(jail):
    code = """
import collections, json
a = (1, [2.5, 'ä', None, True]); b = {1, 2}; c = {1: 2}; d = float('nan'); e = 2**64; f = '\\ud800'; g = object()
h = []; h.append(h)
i = collections.OrderedDict(x=collections.defaultdict(int, y=1)); j = 'x' * 10**7
"""
    with jail.session(None) as session:
        assert session.run(code).error is None
        assert session.value("a") == [1, [2.5, "ä", None, True]] and session.value("i") == {"x": {"y": 1}}
        assert [session.value(name) for name in "bcdefgh"] == [None] * 7 and session.value("nothing") is None
        assert session.value("j") is None


# exhaustion


@pytest.mark.parametrize("code", [
    "while True: pass",
    "10 ** 10 ** 8",                         # one call in C, which no Python signal handler interrupts
    "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
    "import time; time.sleep(1000)",         # takes no processor time
    "while True: print('x' * 1000)",
    "try:\n    while True: pass\nfinally:\n    while True: pass",
    "while True:\n    try: amount('tea')\n    except BaseException: continue",
])
def test_endless_code_is_ended(jail, code):
    outcome = run(jail, code)
    assert outcome.error and ("took longer than 1 seconds" in outcome.error or "memory" in outcome.error.lower())


def test_after_a_timeout_the_session_goes_on_without_its_variables(jail):
    with jail.session(make_environment("calculator", SEED)) as session:
        session.run("x = 1")
        assert "variables of earlier actions are lost" in session.run("while True: pass").error
        assert session.value("x") is None
        assert "NameError" in session.run("print(x)").error
        assert session.run("print(amount('tea'))").printed == f"{TEA}\n"


@pytest.mark.parametrize("code", [
    "x = [0] * 10**10",
    "x = 'a' * 10**11",
    "x = []\nwhile True: x.append(bytearray(10**7))",
    "import mmap",
    "def f(): f()\nf()",
    "import sys; sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "(" * 5_000 + ")" * 5_000,
    "x = " + "-" * 60_000 + "1",
    "import ctypes; ctypes.string_at(0)",
    "import os; os._exit(0)",
    "import os; os.abort()",
    "import sys; sys.exit(0)",
    "raise SystemExit",
    "import signal; signal.raise_signal(signal.SIGKILL)",
    "raise type('E', (BaseException,), {'__str__': lambda self: 1 / 0})",
    "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
])
def test_code_that_breaks_itself_gets_an_error(jail, code):
    outcome = run(jail, code)
    assert outcome.error and outcome.value is None


def test_a_flood_of_tool_calls_is_refused(jail):
    outcome = run(jail, "for i in range(1001): add(1, 1)")
    assert "1,000 tool calls" in outcome.error or "took longer" in outcome.error


@pytest.mark.parametrize("code", ["x = 1\0", "x = '\ud800'", "x = 1 #" + "x" * 70_000, "", None, 5])
def test_what_is_no_source_is_rejected_before_it_reaches_a_child(jail, code):
    assert run(jail, code).error.startswith("the code ")


# files, network, processes


@pytest.mark.parametrize("attempt", [
    "open({path!r}).read()",
    "open('/tmp/written', 'w')",
    "open('/proc/self/environ').read()",
    "os.open('/proc/self/mem', os.O_RDWR)",
    "os.listdir('/')",
    "os.stat({path!r})",
    "os.readlink('/proc/self/exe')",
    "os.chdir('/tmp')",
    "os.fork()",
    "os.execv('/bin/sh', ['sh'])",
    "os.posix_spawn('/bin/sh', ['sh'], {{}})",
    "os.pipe()",
    "os.dup(0)",
    "os.memfd_create('x')",
    "os.kill({parent}, 9)",
    "os.kill(-1, 9)",
    "os.pidfd_open({parent})",
    "os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "os.sched_setaffinity(0, [0])",
    "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "resource.prlimit({parent}, resource.RLIMIT_CPU, (0, 0))",
    "socket.socket().connect(('127.0.0.1', {port}))",
    "socket.socketpair()",
    "socket.socket(socket.AF_UNIX)",
    "__import__('_thread').start_new_thread(print, ())",
])
def test_the_system_refuses(jail, attempt, tmp_path):
    planted = tmp_path / "planted"
    planted.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        call = attempt.format(path=str(planted), parent=os.getpid(), port=listener.getsockname()[1])
        outcome = run(jail, f"import os, resource, socket\nprint('got', {call})")
    assert outcome.error and "got" not in outcome.printed
    assert re.search("PermissionError|OSError|RuntimeError|not allowed to raise|ended or crashed", outcome.error)
    assert planted.read_text() == "secret" and not os.path.exists("/tmp/written")


def test_no_system_call_through_machine_code_libraries(jail):
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.open(b'/etc/passwd', 0)
pid = libc.fork()
sent = libc.kill(-1, 9)
fcntl = libc.fcntl(0, 8, 1)
filters = libc.prctl(22, 0, 0, 0, 0)
print(fd, pid, sent, fcntl, filters)
"""
    assert run(jail, code).printed == "-1 -1 -1 -1 -1\n"


def test_the_child_holds_nothing_of_the_parent(jail, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "planted-secret")
    code = """
import os, sys, gc
descriptors = []
for fd in range(256):
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        if error.errno == 9:
            continue
    descriptors.append(fd)
print(dict(os.environ), len(descriptors), [m for m in sys.modules if m in ('tools', 'verify', 'rl', 'torch', 'pytest')])
print(any('terces-detnalp'[::-1] in o for o in gc.get_objects() if isinstance(o, (list, dict, tuple)) for o in o if isinstance(o, str)))
"""
    lines = run(jail, code).printed.splitlines()
    assert lines == ["{} 4 []", "False"]  # three standard streams, which are /dev/null, and the pipe


def test_the_frames_above_the_code_hold_no_state(jail):
    code = """
import sys
frame, seen = sys._getframe(), []
while frame:
    seen += list(frame.f_globals) + list(frame.f_locals)
    frame = frame.f_back
print([name for name in seen if name.lower() in ('environment', 'state', 'environments', 'make_environment', 'calculator')])
"""
    assert run(jail, code).printed == "[]\n"


# cheating the verdict


@pytest.mark.parametrize("evaluation", [
    "def evaluate(answer): return 1",
    "def evaluate(answer): return 'True'",
    "def evaluate(answer): return None",
    "def evaluate(answer): return [True]",
    "class Yes:\n    __eq__ = __bool__ = lambda *a: True\ndef evaluate(answer): return Yes()",
    "class Yes(int):\n    __class__ = bool\ndef evaluate(answer): return Yes(1)",
    "def evaluate(answer):\n    print(True)\n    print('{\"printed\": \"\", \"error\": null, \"value\": true}')",
    "import sys\ndef evaluate(answer): sys.exit(0)",
    "import os\ndef evaluate(answer): os._exit(0)",
    "def evaluate(answer): raise SystemExit(True)",
    "import sys\ndef evaluate(answer): sys.stdout.close()\nsys.stdout.close()",
    "import json\njson.dumps = lambda *a, **k: 'true'\ndef evaluate(answer): return False",
    "import builtins\nbuiltins.isinstance = lambda *a: True\ndef evaluate(answer): return 5",
    "evaluate = True",
    "x = True",
    "import os\ndef evaluate(answer): os.write(3, b'true\\n'); os.write(4, b'true\\n')",
    "import os\ndef evaluate(answer): [os.write(fd, b'[' * 10**6 + b'\\n') for fd in range(3, 16)]",
    "import os\ndef evaluate(answer): [os.write(fd, b'x' * 10**7) for fd in range(3, 16)]",
    "import os\ndef evaluate(answer): [os.close(fd) for fd in range(3, 16)]",
    "def evaluate(answer): return answer == 1",
])
def test_only_a_returned_true_passes(jail, evaluation):
    assert verdict(jail, evaluation).passed is False


def test_true_passes_and_false_does_not(jail):
    assert verdict(jail, f"def evaluate(answer): return answer == {TEA} == amount('tea')", str(TEA)).passed is True
    assert verdict(jail, f"def evaluate(answer): return answer == {TEA}", "0").passed is False


def test_an_executor_leaves_nothing_behind_that_reaches_the_evaluation(jail):
    environment = make_environment("calculator", SEED)
    task = CodeAsTask("calculator", SEED, "x", "def evaluate(answer): return answer == amount('tea')", "x = 1", ["x = 1"] * 3)
    attack = """
import builtins, sys, json
class Same(int):
    __eq__ = lambda *a: True
    __hash__ = int.__hash__
result = Same(-1)
amount = lambda item: -1
builtins.print = builtins.bool = builtins.isinstance = lambda *a: True
"""
    with jail.session(environment) as session:
        session.run(attack)
        assert evaluate(jail, task, environment, session.value("result")).passed is False


def test_replicas_differ_in_their_seeds_and_each_repeats_itself(jail):
    def draw(replica):
        with jail.session(None, replica) as session:
            return session.run("import random\nprint(hash('tea'), random.random())").printed
    assert draw(0) == draw(0) != draw(1) == draw(1)


# malformed messages to the parent


@pytest.mark.parametrize("message", [
    "null", "1", "{}", '{"tool": 1, "arguments": [], "keywords": {}}', '{"tool": "amount", "arguments": {}, "keywords": []}',
    '{"printed": 1, "error": null, "value": null}', '{"printed": "", "error": null}', "NaN", '{"value": 1e999}', "no json",
    '"\\ud800"', "9" * 5_000, "[" * 50_000,
])
def test_a_malformed_message_ends_the_child(jail, message):
    code = f"import os\nos.write(3, {message.encode()!r} + b'\\n')\nwhile True: pass"
    assert "not its own" in run(jail, code).error


@pytest.mark.parametrize("name, arguments", [("reset", [1]), ("__init__", [1]), ("call", ["x", [], {}]), ("state", [])])
def test_only_tools_can_be_called_whatever_the_child_says(jail, name, arguments):
    code = f"import os, json\nos.write(3, json.dumps(dict(tool={name!r}, arguments={arguments!r}, keywords={{}})).encode() + b'\\n')"
    environment = make_environment("calculator", SEED)
    before = dict(environment.state)
    with jail.session(environment) as session:
        session.run(code)
    assert environment.state == before


@pytest.mark.parametrize("depth", range(44, 56))
def test_data_at_the_limit_of_nesting_never_harms_the_parent(jail, depth):
    code = f"result = 1\nfor i in range({depth}): result = [result]"
    environment = make_environment("calculator", SEED)
    with jail.session(environment) as session:
        assert session.run(code).error is None
        answer = session.value("result")
        assert session.run("add(result, 1)").error
    assert verdict(jail, "def evaluate(answer): return False", answer).passed is False
    task = CodeAsTask("calculator", SEED, "x", "def evaluate(answer): return False", code, [code] * 3)
    assert judge(jail, task).stage in ("runs", "solution")


@pytest.mark.parametrize("code", ["amount('x' * 900_000)", "amount('\\uffff' * 100_000)", "amount(**{'x' * 900_000: 1})"])
def test_a_refusal_that_quotes_a_long_argument_never_harms_the_parent(jail, code):
    assert "ToolError" in run(jail, code).error


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


def test_verdicts_cannot_be_forged_in_a_weak_jail(jail):
    with Jail(seconds=1.0) as weak:
        weak.strong = False
        for replica in (0, 1):
            weak.replace(replica, weak.servers[replica])
        assert weak.describe().startswith("jail: WEAK") and "POSSIBLE" in weak.describe()
        for evaluation in ("def evaluate(): return 1", "import os\ndef evaluate(): os._exit(0)", "x = True"):
            assert verdict(weak, evaluation).passed is False
        assert verdict(weak, "def evaluate(): return True").passed is True


def test_a_closed_jail_says_so():
    jail = Jail(servers=1)
    jail.close()
    with pytest.raises(JailError, match="closed"):
        run(jail, "x = 1")


def test_the_server_ends_when_the_parent_lets_go_of_its_socket():
    server = ForkServer(seed=1, strong=True)
    mine, theirs = socket.socketpair()
    with mine, theirs:
        server.request(0, [theirs.fileno()])
        server.control.close()
        assert server.process.wait(timeout=10) == 0


def test_soak_leaves_no_process_and_no_descriptor():
    before, descriptors = descendants(), len(os.listdir("/proc/self/fd"))
    codes = ["print(amount('tea'))", "1 / 0", "import os; os._exit(0)", "amount('gold')", "import os; os.close(3)",
             "x = 'a' * 10**10", "import sys; sys.exit()", "print('x' * 10**5)"]
    with Jail() as jail:
        open_sessions = [jail.session(make_environment("calculator", SEED), replica) for replica in range(40)]
        assert [session.run("x = amount('tea')\nprint(x)").printed for session in open_sessions] == [f"{TEA}\n"] * 40

        def check(number):
            with jail.session(make_environment("calculator", SEED), number) as session:
                return session.run(codes[number % len(codes)]).printed

        with ThreadPoolExecutor(4) as pool:
            printed = list(pool.map(check, range(400)))
        assert printed[:2] == [f"{TEA}\n", ""] and printed[:8] * 50 == printed
        assert len(descendants() - before) == 2 + 40
        for session in open_sessions[:20]:
            session.close()
        assert len(descendants() - before) == 2 + 20
    for _ in range(100):  # what a server leaves to the kernel is gone an instant later
        if descendants() <= before:
            break
        time.sleep(0.05)
    assert descendants() <= before
    assert len(os.listdir("/proc/self/fd")) == descriptors + 20  # the sessions that were not closed
    for session in open_sessions:
        session.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
