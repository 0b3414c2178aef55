"""Code-as-Task: the data type, its parser, the jail in which model-written code runs, and the filter.

A challenger writes a task as four parts (section 3 of the paper): an instruction, an evaluation
function, an example solution and failure cases. The filter keeps a task only if all of its code
runs, the solution passes the evaluation, and no failure case does.

Departures from the paper, and why:
- `evaluate(answer)` replaces `<expected_output>`, a failure case is code, where the paper has a wrong answer, and Web
  Browsing has a solution, too: so all worlds share one format.
- A step may lack its THOUGHT, and begin with a `<think>` block instead, as some models write.
- Doing nothing must fail as well: a task that asks for nothing rewards every executor.
- What the filter would keep is tried five times more, its solution and a failure case, each time with another random
  seed and at another date. `evaluate` must leave the state alone: a verdict that depends on chance, or that brings
  about what it checks, does not count.
- The paper does not say how code is isolated. Here the state stays in this process, and code runs in
  a child that can only compute and talk through one pipe: a tool call goes out as data, and its
  result comes back as data. This process alone makes verdicts of values.

    python verify.py tasks.jsonl        judges the tasks in a file, one JSON verdict a line

Read next: rl.py, in which a policy plays against these tasks.
"""
import argparse
import contextlib
import ctypes
import functools
import gc
import hashlib
import io
import itertools
import json
import linecache
import os
import pickle
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Callable, Iterable, Iterator

from tqdm import tqdm

from tools import ENVIRONMENTS, Environment, ToolError, load_benchmarks, make_environment

STAGES = {  # of the filter, in their order, and what is known of a task that a stage has not rejected
    "parse": "has all its parts",
    "held-out": "is not a held-out task",  # selfchallenge.py looks for these, and for duplicates
    "runs": "all its code runs",
    "solution": "its solution passes",
    "failures": "its failure cases fail",
    "duplicate": "is new",
}
FAILURE_CASES = range(3, 17)     # how many a task may have: the paper asks for three
SOURCE_CHARACTERS = 64 * 1024    # in an instruction or a source
LINE_CHARACTERS = 1024 * 1024    # in a line of a task file
ANSWER_CHARACTERS = 4_000        # in a final answer
OBSERVATION_CHARACTERS = 4_000   # that a model sees of the output of an action
REPEATS = 5                      # of a solution, a failure case and their evaluations, before the task is kept


# ---------------------------------------------------------------------------------------------------
# a task is data

class TaskError(ValueError):
    """Why a task is rejected: `stage` is one of STAGES, `reason` a text from which it can be revised."""

    def __init__(self, stage: str, reason: str):
        super().__init__(reason)
        self.stage, self.reason = stage, reason


@dataclass
class CodeAsTask:
    """A task as the challenger hands it in, and as a line of tasks.jsonl holds it."""

    env: str             # the name of an environment
    seed: int            # the seed of its reset
    instruction: str     # what the executor is asked to do
    evaluate: str        # source of evaluate() or evaluate(answer), which returns True or False
    solution: str        # source that solves the task; what it leaves in `result` is its final answer
    failures: list[str]  # sources that come close but must not pass

    def to_json(self) -> str:
        """Return the task as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "CodeAsTask":
        """Return the task that a line of JSON holds; raises TaskError at stage "parse" otherwise."""
        if len(line) > LINE_CHARACTERS:
            raise TaskError("parse", f"the line is longer than {LINE_CHARACTERS:,} characters")
        try:
            if not isinstance(data := json.loads(line.strip()), dict):
                raise TypeError(f"it is of the type {type(data).__name__}")
            task = cls(**{name: data[name] for name in cls.__annotations__})
        except KeyError as missing:
            raise TaskError("parse", f"the line lacks {missing}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise TaskError("parse", f"the line is not a JSON object: {error}") from None
        check_form(task)
        return task


@dataclass(frozen=True)
class BenchmarkTask:
    """A held-out task of a benchmark, which judges it by its own rules; the reference stays with the environment."""

    env: str
    seed: int
    instruction: str
    number: int  # among the environment's `held_out`
    group: str   # a row of its own in the table, such as a domain of Calculation; "" for none


Task = CodeAsTask | BenchmarkTask


def check_form(task: CodeAsTask) -> None:
    """Raise TaskError at stage "parse" unless each part of the task has the right type and size."""
    if not isinstance(task.env, str) or task.env not in ENVIRONMENTS:
        raise TaskError("parse", f"env must be one of {', '.join(ENVIRONMENTS)}, not {str(task.env)[:80]!r}")
    if problem := ENVIRONMENTS[task.env].missing():
        raise TaskError("parse", problem)
    if type(task.seed) is not int or abs(task.seed) >= 2**63:
        raise TaskError("parse", "seed must be a whole number of at most 64 bits")
    if not isinstance(task.failures, list) or len(task.failures) not in FAILURE_CASES:
        raise TaskError("parse", f"a task needs {FAILURE_CASES[0]} to {FAILURE_CASES[-1]} failure cases")
    parts = {"instruction": task.instruction, "evaluate": task.evaluate, "solution": task.solution}
    parts |= {f"failure case {number}": code for number, code in enumerate(task.failures, start=1)}
    for name, text in parts.items():
        if problem := text_problem(text):
            raise TaskError("parse", f"{name} {problem}")


def text_problem(text: Any) -> str | None:
    """Return what makes an instruction or source unfit, or None. A child alone parses it: that can crash Python."""
    if not isinstance(text, str) or not text.strip():
        return "is empty or not text"
    if len(text) > SOURCE_CHARACTERS:
        return f"is longer than {SOURCE_CHARACTERS:,} characters"
    return "holds a NUL or half a character" if re.search(r"[\x00\ud800-\udfff]", text) else None


# ---------------------------------------------------------------------------------------------------
# what a model writes: steps, and tasks

REMINDER = ("Write THOUGHT: your thought END THOUGHT, then exactly one of "
            "ACTION: Python code END ACTION and ANSWER: your final answer END ANSWER.")


class FormatError(ValueError):
    """A malformed step; the message is the reminder that the model sees as its observation."""


@dataclass
class Step:
    """A turn of either role: a thought, then an action or an answer."""

    thought: str
    kind: str     # "action" or "answer"
    content: str  # the code, or the final answer


def parse_step(text: str) -> Step:
    """Return the step in a model's text, whose thought may be missing; raises FormatError, with REMINDER, otherwise.

    A `<think>` block at the beginning, as some models write it, does not count. If the text then begins with
    `THOUGHT:`, save for white space, all up to `END THOUGHT` is the thought, and neither `ACTION:` nor `ANSWER:` within
    it is one yet, not even if the thought never ends. All between `ACTION:` and the next `END ACTION` is code, and all
    between `ANSWER:` and the next `END ANSWER` the answer, whatever they speak of; `REACTION:` is no `ACTION:`. Other
    words may stand before and after the one action or answer, but no second one, not even an unfinished one. A thought
    and an answer may be empty; an action, without its indentation and fence (`strip_fence`), may not. No part has white
    space around it.
    """
    text = re.sub(r"^\s*<think>.*?(</think>|$)", "", text, flags=re.DOTALL)
    ### BEGIN SOLUTION
    thought, rest = "", text
    if text.lstrip().startswith("THOUGHT:"):
        thought, _, rest = text.partition("THOUGHT:")[2].partition("END THOUGHT")
    opening = re.search(r"\b(ACTION|ANSWER):", rest)
    if opening is None:
        raise FormatError(f"There is no ACTION and no ANSWER after the thought. {REMINDER}")
    kind = opening[1]
    content, closed, after = rest[opening.end():].partition(f"END {kind}")
    content = strip_fence(content) if kind == "ACTION" else content.strip()
    if not closed or re.search(r"\b(ACTION|ANSWER):", after) or kind == "ACTION" and not content:
        raise FormatError(f"The {kind} is empty, not closed, or not the only one. {REMINDER}")
    return Step(thought.strip(), kind.lower(), content)
    ### END SOLUTION


def strip_fence(code: str) -> str:
    """Return code without the indentation and the Markdown fences that models put around it, on lines of their own."""
    while code.lstrip().startswith("```"):
        code = "\n" + code.lstrip().partition("\n")[2].rstrip().removesuffix("```")
    # Code that begins on the line of its tag has no indentation in common.
    return textwrap.dedent(code).strip() if code.lstrip(" \t").startswith("\n") else code.strip()


def parse_task(text: str, env: str, seed: int) -> CodeAsTask:
    """Return the task in a challenger's answer; raises TaskError at stage "parse" that says what is missing."""
    parts = {}
    for tag in ("instruction", "evaluation_function", "solution", "failure_case"):
        closing = f"</{tag}>"
        parts[tag] = [part.partition(closing)[0] for part in text.split(f"<{tag}>")[1:] if closing in part]
        if not parts[tag] or len(parts[tag]) > 1 and tag != "failure_case":
            times = f"{len(parts[tag])} times instead of once"
            raise TaskError("parse", f"<{tag}>…{closing} stands in the answer {times}")
    codes = [strip_fence(code) for tag in ("evaluation_function", "solution", "failure_case") for code in parts[tag]]
    task = CodeAsTask(env, seed, parts["instruction"][0].strip(), codes[0], codes[1], codes[2:])
    check_form(task)
    return task


# ---------------------------------------------------------------------------------------------------
# THE JAIL: what holds code that a model wrote
#
# A solution, a failure case, an evaluation, an executor's episode: no two share a child. A small program, the
# fork server, forks it, because a fork of this process would copy its secrets, and cost what its memory costs; the
# child confines itself before it runs anything. Code is sent to it as a line of JSON through its channel, a pipe for
# both ways. When the code calls a tool, the call comes up as data, this process executes it on the episode's state, and
# sends the result down; at the end come up what was printed, and a value or an error. This process alone makes verdicts
# of values (`evaluate`). The way of that:
#   at first     Jail, ForkServer.start, start_program; in the server serve; in a child confine, then live
#   what holds   Jail.probe: a child tries what the layers should refuse, and Jail.describe tells what was refused
#   an action    Session.run, converse; Child.reply, ask; exchange
#   at last      Session.close, Child.end; in the server serve, which kills
# Some words: a process that forks becomes two that are alike; a child that has ended keeps its pid until its parent
# waits for it, which reaps it. A descriptor is the number of an open file or channel. A system call asks the kernel for
# something: prctl, to change what the process itself may do; seccomp has a filter, in BPF, decide on all later calls.
# Each docstring says first what its layer stops. This chapter is what confines code; the next two, of what runs in a
# child and of the sessions that use it, hold three layers more: STATE OUTSIDE (call_tool, which Session.execute
# answers), DATA ON A CHANNEL (plain), SERVERS THAT DIFFER (set_clock).

def start_program(statement: str, **options: Any) -> subprocess.Popen:
    """NOTHING TO FIND stops the theft of secrets: a server is a new program, without this one's files and environment.

    It imports what code may need, for a child can open no file, and executes the text from INSIDE to OUTSIDE and the
    statement. Nothing else of the project: with tools.py in its memory, code could compute the hidden states.
    """
    program = f"""
import sys
# Parts in C that are not to be found: two would not ask set_clock for the time, the third loads OpenSSL's megabytes.
sys.modules.update(_datetime=None, _uuid=None, _hashlib=None)
import {', '.join(MODULES)}
from typing import Any, Callable
text = open({os.path.abspath(__file__)!r}, encoding='utf-8').read()
exec(text.partition('\\n# INSIDE\\n')[2].partition('\\n# OUTSIDE')[0])
del text
{statement}
"""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    # -P: modules are not sought in the current folder, -S: nor among installed packages, -B: nothing is written
    return subprocess.Popen([sys.executable, "-PSB", "-c", program], **streams | {"env": {}, "cwd": "/"} | options)


def exchange(channel: socket.socket, message: bytes, deadline: float, most: int) -> bytes:
    """A DEADLINE, upon which a kill follows, stops endless loops, sleeps, and endless calls in C; A CAP stops floods.

    Return the line of at most `most` bytes with which a child replies; raises TimeoutError at the deadline (of
    time.monotonic), another OSError if the child is dead or floods the channel. (Other caps: ACTION_BYTES, TOOL_CALLS.)
    """
    def in_time(transfer: Callable, what: Any) -> Any:
        if (seconds := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        channel.settimeout(seconds)
        return transfer(what)

    in_time(channel.sendall, message)
    line = b""
    while not line.endswith(b"\n"):
        line += (piece := in_time(channel.recv, 65_536))
        if not piece or len(line) > most:
            raise ConnectionError("the child has closed the channel, or floods it")
    return line


# INSIDE
# (the servers and their children execute the text from here to OUTSIDE; some of it serves this process, too)

MEMORY_BYTES = 256 * 1024 * 1024  # that a child can have
PROCESSOR_SECONDS = 60            # in the life of a child


def serve(descriptor: int, seed: int, strong: bool) -> int:
    """A PROCESS FOR EACH AUTHOR stops patched built-ins and walks through frames and gc; A KILL ends what still runs.

    The fork server: sent 0, it replies with a child's pid and the channel to it; sent a pid, it ends that child; when
    the control socket is closed, it ends all children and itself. It forks each child ahead, while the parent works
    with the one before. A child is reaped only here, when it is ended, so that no pid comes to mean another process.
    Only a child returns, confined, with its channel: so no frame of this function is above the code that it runs.
    """
    control, confine, children = socket.socket(fileno=descriptor), make_confine(strong), set()
    prepare_server(seed)
    while True:
        ours, theirs = [side.detach() for side in socket.socketpair()]  # plain descriptors: less to copy for a child
        if (child := os.fork()) == 0:
            break
        os.close(theirs)
        children.add(child)
        while (request := control.recv(8)) != bytes(8):
            for pid in struct.unpack("q", request) if request else list(children):  # no request: the socket is closed
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                children.remove(pid)
            if not request:
                os._exit(0)
        socket.send_fds(control, [struct.pack("q", child)], [ours])
        os.close(ours)
    os.close(control.detach())
    os.close(ours)
    confine()
    random.seed(seed)
    return theirs


def make_confine(strong: bool) -> Callable[[], None]:
    """LIMITS stop a child that eats the memory, fills the disk (a crash may, too), or computes on after its reply.

    Return the function by which a child, before it runs code, gives up what it does not need, for good: limits, and the
    filter (of a `strong` jail). All is prepared here: what a child writes to memory, it has to copy first, in pages.
    """
    import resource  # here, because Windows lacks it, and should get as far as being told so
    linux, server = sys.platform == "linux", os.getpid()
    limits = {resource.RLIMIT_CPU: PROCESSOR_SECONDS, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0,
              resource.RLIMIT_NOFILE: 16}  # descriptors, of which only a weak jail's child can open any
    if linux:
        limits[resource.RLIMIT_AS] = MEMORY_BYTES  # elsewhere missing, or less than Python itself occupies
        prctl = ctypes.CDLL(None).prctl
    if strong:
        program = ctypes.create_string_buffer(seccomp_program())
        program_and_pointer = program, struct.pack("HP", len(program) // 8, ctypes.addressof(program))  # a sock_fprog
    else:
        limits[resource.RLIMIT_NPROC] = 0  # no processes, unless for root

    def confine() -> None:
        for limit, most in limits.items():
            resource.setrlimit(limit, (most, most))
        if linux:
            prctl(38, 1, 0, 0, 0)              # PR_SET_NO_NEW_PRIVS: only then may others than root filter
            prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: no outliving of the server ...
            if os.getppid() != server:
                os._exit(1)                    # ... which may have ended already
        if strong and prctl(22, 2, program_and_pointer[1], 0, 0):  # PR_SET_SECCOMP
            os._exit(1)                        # without the filter nothing untrusted may run
    return confine


# All that a child may ask of the kernel, by the numbers of x86-64 and aarch64. None of these calls takes a path
# or makes a process or a descriptor; kill is missing, and so are fcntl and ioctl, by which a signal can be sent too.
SYSTEM_CALLS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "sched_yield": (24, 124), "nanosleep": (35, 101), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "select": (23, 72), "pselect6": (270, 72), "futex": (202, 98), "getpid": (39, 172),
    "gettid": (186, 178), "getrusage": (98, 165), "getrandom": (318, 278), "restart_syscall": (219, 128),
    "exit": (60, 93), "exit_group": (231, 94),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # the column above, AUDIT_ARCH_…


def seccomp_program() -> bytes:
    """A FILTER OF SYSTEM CALLS stops opening files and connections, starting processes, and sending signals.

    Return it in the kernel's BPF: SYSTEM_CALLS are allowed, others fail, and those in another machine's numbers kill.
    An instruction is an operation, how many instructions to skip if equal, and if not, and the operation's operand.
    """
    column, architecture = MACHINES[os.uname().machine]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K
    allow, error, kill = 0x7FFF0000, 0x00050000, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill)]  # seccomp_data: at 4 the architecture,
    program += [(load, 0, 0, 0)]                                                  # ... and at 0 the number of the call
    for numbers in SYSTEM_CALLS.values():
        program += [(equal, 0, 1, numbers[column]), (give, 0, 0, allow)]
    program += [(give, 0, 0, error | 1)]  # EPERM, in Python a PermissionError
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


# ---------------------------------------------------------------------------------------------------
# what a server prepares, and the notebook in each of its children (for a second reading)

MESSAGE_BYTES = 1024 * 1024   # in a message on the channel
PRINTED_CHARACTERS = 20_000   # kept of the output of an action
ERROR_CHARACTERS = 1_000      # kept of a traceback, half of them at its beginning
ADDRESS = re.compile(" at 0x[0-9a-f]{6,}(?=[>,:])")  # of an object, which differs from process to process
CLOCK_SECONDS = 11_575 * 86_400 + 7 * 3600 + 23 * 60 + 23.37  # by which, or a multiple, the servers' clocks differ

# What code can import: a child cannot open files, so the server imports what it may need. (That the like of ctypes, os
# and socket do no harm is due to the filter. Threading, and what stands on it, would add a quarter to a fork's time.)
MODULES = """abc array ast base64 bisect calendar cmath codecs collections.abc contextlib copy csv ctypes
    dataclasses datetime decimal difflib encodings.ascii encodings.latin_1 encodings.rot_13 enum fractions functools
    gc hashlib heapq inspect io itertools json linecache math numbers operator os pprint random re resource secrets
    signal socket statistics string struct sys textwrap time traceback types typing unicodedata uuid warnings
    weakref _strptime __future__""".split()


def prepare_server(seed: int) -> None:
    """Make the server what each of its children is to begin as."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or, where a shell has had it ignored, no child waits to be reaped
    sys.path.clear()
    os.environ.clear()
    sys.orig_argv.clear()  # it names the folder of this file
    set_clock((seed - 1) * (-1)**(seed - 1) * CLOCK_SECONDS)  # into the future, or the past
    for code in ["print(len('rehearsal'))", "1 / 0"] * 10:  # what Python prepares in a first run, no child has to again
        ours, theirs = socket.socketpair()
        with ours, theirs:
            send(ours.fileno(), {"tools": ["tool"], "code": code, "arguments": None})
            ours.shutdown(socket.SHUT_WR)
            live(theirs.fileno())
    sys.modules["__main__"] = types.ModuleType("__main__")  # where model-written code believes to be
    sys.modules["__main__"].ToolError = Refusal
    gc.freeze()  # or a collection in a child would touch, and so copy, the server's memory


def set_clock(ahead: float) -> None:
    """SERVERS THAT DIFFER in seeds and clocks stop verdicts that follow hashes or the date, and most that draw lots.

    Code of this process, and so of its children, sees the time of so many seconds ahead, unless it goes out of its way.
    """
    strftime, asctime = time.strftime, time.asctime
    for name in ("time", "clock_gettime", "monotonic", "perf_counter"):
        for unit, more in (("", ahead), ("_ns", int(ahead * 10**9))):
            setattr(time, name + unit, lambda *clock, given=getattr(time, name + unit), more=more: given(*clock) + more)
    for name in ("localtime", "gmtime", "ctime"):
        setattr(time, name, lambda when=None, given=getattr(time, name): given(time.time() if when is None else when))
    time.strftime = lambda pattern, when=None: strftime(pattern, when or time.localtime())
    time.asctime = lambda when=None: asctime(when or time.localtime())


def live(channel: int) -> None:
    """Run the code of one request after the other, the first of which names the tools, until the channel is closed."""
    variables = vars(sys.modules["__main__"])
    for number in itertools.count(1):
        if not (request := receive(channel)):
            return
        variables.update({name: functools.partial(call_tool, channel, name) for name in request.get("tools", ())})
        sys.stdout = sys.stderr = printed = Printed()
        file, error, value = f"<action {number}>", None, None
        try:
            lines = [line + "\n" for line in re.split("\r\n?|\n", request["code"])]
            linecache.cache[file] = (0, None, lines, file)  # for tracebacks
            exec(compile(request["code"], file, "exec", dont_inherit=True), variables)
            arguments = request["arguments"]
            value = variables.get("result") if arguments is None else call_evaluate(variables, arguments)
        except BaseException as failure:  # SystemExit too: the process is still needed
            error = explain(failure)
        shown = printed.getvalue().encode(errors="replace").decode()
        reply = {"printed": ADDRESS.sub("", shown), "error": error and ADDRESS.sub("", error)}
        try:
            send(channel, plain(reply | {"value": value}))
        except BaseException:  # it is no plain data, or too much of it
            send(channel, reply | {"value": f"<{type(value).__name__}: not JSON, or too long>"})


def call_evaluate(variables: dict, arguments: list) -> Any:
    """Return what evaluate(answer) or evaluate() returns, called with as many of the arguments as it takes."""
    if "evaluate" not in variables:
        raise NameError("the code does not define evaluate")
    evaluate = variables["evaluate"]
    if isinstance(evaluate, types.FunctionType) and not evaluate.__code__.co_flags & inspect.CO_VARARGS:
        return evaluate(*arguments[:evaluate.__code__.co_argcount])
    try:  # for a class, an object or a decorated function; slow, because it touches much memory
        inspect.signature(evaluate).bind(*arguments)
    except TypeError:
        arguments = []
    return evaluate(*arguments)


class Printed(io.StringIO):
    """What an action prints, of which no more is kept than PRINTED_CHARACTERS."""

    def write(self, text: str) -> int:
        super().write(text[:max(0, PRINTED_CHARACTERS - self.tell())])
        return len(text)


def explain(failure: BaseException) -> str:
    """Return a traceback's last lines of the model's own code, and the error; cut in the middle if that is long."""
    frames = [frame for frame in traceback.extract_tb(failure.__traceback__) if frame.filename.startswith("<action")]
    lines = [f"{frame.filename}, line {frame.lineno}: {frame.line}\n" for frame in frames[-3:]]
    text = "".join(lines + traceback.format_exception_only(failure)).strip()
    text += f" (of {MEMORY_BYTES // 2**20} MB)" if isinstance(failure, MemoryError) else ""
    text += " (only parts of the standard library are here)" if isinstance(failure, ModuleNotFoundError) else ""
    if len(text) > ERROR_CHARACTERS:
        text = f"{text[:ERROR_CHARACTERS // 2]} … {text[3 - ERROR_CHARACTERS // 2:]}"
    return text.encode(errors="replace").decode()


Refusal = type("ToolError", (Exception,), {"__module__": "builtins"})  # so that a traceback shows the bare name


def call_tool(channel: int, tool: str, /, *arguments: Any, **keywords: Any) -> Any:
    """STATE OUTSIDE stops reading and changing the world other than by its tools: code calls this in place of a tool.

    The call crosses the channel as data, is executed in the parent (Session.execute), and its result comes as data.
    """
    send(channel, plain({"tool": tool, "arguments": arguments, "keywords": keywords}))
    reply = receive(channel)
    if "refusal" in reply:
        raise Refusal(reply["refusal"])
    return reply["value"]


def plain(value: Any, nesting: int = 50) -> Any:
    """DATA ON A CHANNEL stops printed success, exit codes and objects that equal everything: none of them is True.

    Return `value` as plain data, tuples as lists; raises ValueError for all else. In a child that is a courtesy; it is
    the parent's own use of it that protects, and that of JSON, which can hold no object.
    """
    if value is None or isinstance(value, (int, float)) and abs(value) < 1e300:  # True and False are ints
        return value
    if isinstance(value, str):
        return value.encode().decode()  # raises for half a surrogate pair, which no file could hold
    if isinstance(value, (list, tuple)) and nesting:
        return [plain(item, nesting - 1) for item in value]
    if isinstance(value, dict) and nesting and all(isinstance(key, str) for key in value):
        return {plain(key): plain(item, nesting - 1) for key, item in value.items()}
    raise ValueError(f"{type(value).__name__}: only text, numbers below 1e300, True, False, None, lists and dicts with "
                     "text as keys can leave the code, nested at most 50 times")


def send(channel: int, message: dict) -> None:
    """Write a message to the channel; raises ValueError if it is too long."""
    line = pack(message)
    while line:
        line = line[os.write(channel, line):]


def receive(channel: int) -> dict | None:
    """Read a message from the channel; None means that the other end is closed."""
    line = b""
    while not line.endswith(b"\n"):
        if not (piece := os.read(channel, 65_536)):
            return None
        line += piece
    return json.loads(line)


def pack(message: dict) -> bytes:
    """Return the line of JSON that carries plain data through the channel; raises ValueError if it is too long."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > MESSAGE_BYTES:
        raise ValueError(f"more than {MESSAGE_BYTES:,} bytes of data")
    return line


# ---------------------------------------------------------------------------------------------------
# OUTSIDE: the servers that a jail keeps, and sessions with their children (for a second reading)

TOOL_CALLS = 1_000   # in an action
ACTION_BYTES = 4 * MESSAGE_BYTES  # that an action can send: reading them keeps others waiting
REPLIES = 50_000     # that a jail remembers
REPLY_BYTES = 4_096  # of the longest, together with the message that it answers
# What differs from child to child: clocks, chance without a seed, numbers of processes, addresses. Of code that names
# one of these, and of all that follows it, a jail finds no reply again.
UNFORESEEN = re.compile(r"time|getrusage|urandom|getrandom|Random\b|seed\(\s*(a\s*=\s*)?(None\s*)?\)|secrets|uuid|"
                        r"getpid|native_id|\b(id|hash)\(")


class JailError(RuntimeError):
    """This system cannot have the jail, or has broken it; the message is a sentence for the user."""


class ChildLost(Exception):
    """A child is late, dead, or makes no sense; the message is a sentence for the model."""


NONSENSE = "the code wrote to a pipe that is not its own"


@dataclass
class Outcome:
    """What running a piece of code brought."""

    printed: str
    error: str | None  # the traceback's last lines, or a sentence about a timeout or a crash
    value: Any = None  # what `result` holds, or evaluate returned; else "<type: not JSON, or too long>"


def observation(outcome: Outcome) -> str:
    """Return what the model sees of an outcome: what was printed, cut if it is long, and the error."""
    printed = outcome.printed.removesuffix("\n")
    if len(printed) > OBSERVATION_CHARACTERS:
        printed = f"{printed[:OBSERVATION_CHARACTERS]}\n… (cut after {OBSERVATION_CHARACTERS:,} characters)"
    seen = "\n".join(filter(None, [printed.strip("\n"), outcome.error]))
    return seen or "(no output: only what the code prints is shown)"


class ForkServer:
    """The parent's end of a fork server, which several threads may use; one that is stuck or dead is replaced."""

    def __init__(self, seed: int, strong: bool):
        self.seed, self.strong, self.lock, self.closed = seed, strong, threading.Lock(), False
        self.start()

    def start(self) -> None:
        """Start the process, from its command line and not by a fork: nothing of this process is in its memory."""
        self.control, theirs = socket.socketpair()
        self.control.settimeout(10)  # for what takes milliseconds: a server that needs longer is stuck
        with theirs:
            self.process = start_program(
                f"try: live(serve({theirs.fileno()}, {self.seed}, {self.strong}))\nfinally: os._exit(1)",
                env={"PYTHONHASHSEED": str(self.seed)},  # hence not -I, which ignores it; prepare_server clears it
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent, which then closes the control socket
            )
        with contextlib.suppress(OSError), open(f"/proc/{self.process.pid}/oom_score_adj", "w") as badness:
            badness.write("1000")  # should all children together exhaust the machine's memory, Linux ends one of them

    def stop(self) -> None:
        """End the process and its children; it may have been stopped before."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)  # which wakes a thread that waits for a reply; closing does not
        self.control.close()
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:  # it is stuck; when it is killed the kernel (Linux) ends its children
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Stop for good, also if another thread is about to start the process again."""
        self.closed = True
        self.stop()
        with self.lock:
            self.stop()

    def child(self) -> tuple[socket.socket, int, socket.socket]:
        """Return a new child: the control socket of its server, its pid, and the channel to it.

        A server that does not answer is replaced, and asked once more. Raises JailError if that does not help, if the
        jail is closed, or if too many files are open.
        """
        with self.lock:
            for _ in range(2):
                if self.closed:
                    raise JailError("the jail is closed")
                try:
                    self.control.sendall(struct.pack("q", 0))
                    pid, channels, _, _ = socket.recv_fds(self.control, 8, 1)
                except OSError:
                    pid, channels = b"", []
                except BaseException:  # an interrupt: the next request would take the reply for its own
                    self.stop()
                    raise
                if channels:
                    return self.control, struct.unpack("q", pid)[0], socket.socket(fileno=channels[0])
                if pid:  # of a child whose channel could not be received
                    with contextlib.suppress(OSError):  # the server may have ended, and with it the child
                        self.control.sendall(pid)
                    raise JailError("the jail can open no more channels: too many files are open (see ulimit -n)")
                self.stop()
                self.start()
        raise JailError("the jail's servers end as soon as they start: is the system out of memory or processes?")


class Jail(contextlib.AbstractContextManager):
    """Where model-written code runs, an action in `seconds` at most. Its servers differ in their seeds and clocks.

    Raises JailError if the system cannot refuse files, network and processes to the code. `allow_weak`
    accepts that: what code says of itself is no verdict there either, but it can do what its user can.
    """

    def __init__(self, seconds: float = 2.0, allow_weak: bool = False):
        if not hasattr(os, "fork"):
            raise JailError("the jail needs a system with fork: on Windows, run this project inside WSL")
        self.seconds, self.replies = seconds, {}  # of children, by all that they had been sent until then
        known = sys.platform == "linux" and os.uname().machine in MACHINES
        for self.strong in [True] * known + [False] * allow_weak:
            self.servers = [ForkServer(seed, self.strong) for seed in range(1, 2 + REPEATS)]  # all that judge asks
            if (held := self.probe()) and all(held.values()) or not self.strong:
                return
            self.close()
        raise JailError("this system does not filter system calls (or is too busy, or too limited by ulimit, to try it "
                        "out), so model-written code could read your files and use your network; the flag "
                        "--allow-weak-jail runs it all the same")

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the servers and all that runs in them."""
        for server in self.servers:
            server.close()

    def session(self, environment: Environment | None, replica: int = 0) -> "Session":
        """Return a session for one untrusted author on this environment.

        `replica` picks the server; what the jail remembers of one replica it does not take for another's reply.
        """
        return Session(self, environment, replica)

    def probe(self) -> dict[str, bool]:
        """Return, for each thing that a child of the jail just tried, whether the system refused it; {} if it died."""
        with socket.create_server(("127.0.0.1", 0)) as listener, self.session(None) as session:
            session.child.part_with_memory()  # what the jail remembers has not been tried just now
            session.child.seconds = 20.0  # a machine that is busy is not one that lacks a layer
            probe = PROBE.format(path=__file__, port=listener.getsockname()[1], parent=os.getpid())
            return session.run(probe).value or {}

    def describe(self) -> str:
        """Return a line for the user about what the jail refuses to model-written code, as tried out just now."""
        tried = ", ".join(f"{what} is {'refused' if held else 'POSSIBLE'}" for what, held in self.probe().items())
        return f"jail: {'strong' if self.strong else 'WEAK'}: {tried or 'just now it could not be tried out'}"


PROBE = """
import os, socket
attempts = {{
    "reading a file": lambda: os.open({path!r}, os.O_RDONLY),
    "connecting to a port": lambda: socket.socket().connect(("127.0.0.1", {port})),
    "starting a process": lambda: os.fork() or os._exit(0),
    "signalling the parent": lambda: os.kill({parent}, 0),
    "taking 300 MB": lambda: bytearray(300 * 2**20),
}}
result = dict.fromkeys(attempts, False)
for name, attempt in attempts.items():
    try:
        attempt()
    except (PermissionError, BlockingIOError, MemoryError):  # the second is that of a limit on processes
        result[name] = True
"""


class Child:
    """What a session talks with: a child, which is started for the first message whose reply is not remembered.

    What a child replies follows from its random seed and from what it was sent, so the jail remembers it: rollouts of a
    task often begin alike. (Not if the code names what differs from child to child: UNFORESEEN.) Once started, it is
    told all that came before, to which it must reply as remembered, and then all that comes.
    """

    def __init__(self, jail: Jail, replica: int):
        self.jail, self.replica, self.seconds = jail, replica, jail.seconds
        self.channel: socket.socket | None = None  # to the process, while there is one
        self.actions = 0  # that were begun
        self.untold: list[list[tuple[bytes, bytes]]] = []  # of each action, messages with their replies
        self.past = hashlib.sha256(b"%d\n" % replica)  # of the replica and all messages, for the jail's memory

    def begin_action(self, code: str) -> None:
        """Count an action, and give it its time."""
        self.actions += 1
        if UNFORESEEN.search(code):
            self.part_with_memory()
        if self.channel is None:
            self.untold.append([])  # should it need a process, its time begins with that
        else:
            self.give_time()

    def part_with_memory(self) -> None:
        """From here on there is no other past like this one: the jail remembers no reply to it."""
        self.past.update(os.urandom(16))

    def give_time(self) -> None:
        """Let an action have its time, and the bytes that it can send, from now on."""
        self.deadline, self.bytes_left = time.monotonic() + self.seconds, ACTION_BYTES

    def reply(self, message: bytes) -> Any:
        """Return the reply to the next message as plain data, from memory or from the process; or raise ChildLost."""
        self.past.update(message)
        past, replies = self.past.digest(), self.jail.replies
        line = replies.get(past) if self.channel is None else None
        if line is not None:
            self.untold[-1].append((message, line))
        else:
            if self.channel is None:
                self.start()
            line = self.ask(message)
        try:
            data = plain(json.loads(line))
        except (ValueError, RecursionError):
            raise ChildLost(NONSENSE) from None
        if past not in replies and len(message) + len(line) <= REPLY_BYTES:
            if len(replies) >= REPLIES:
                replies.clear()
            replies[past] = line
        return data

    def start(self) -> None:
        """Start the process, and tell it all that came before; raises ChildLost if it does not reply as remembered."""
        self.control, self.pid, self.channel = self.jail.servers[self.replica % len(self.jail.servers)].child()
        for action in self.untold:  # each has its own time, the last and what is new in it together
            self.give_time()
            for message, remembered in action:
                if self.ask(message) != remembered:
                    raise ChildLost("the code does not do the same again")
        self.untold.clear()

    def ask(self, message: bytes) -> bytes:
        """Return the process's reply to a message, as a line; raises ChildLost if there is none in time."""
        try:
            line = exchange(self.channel, message, self.deadline, min(MESSAGE_BYTES, self.bytes_left))
        except TimeoutError:
            raise ChildLost(f"the code took longer than {self.seconds:g} seconds") from None
        except OSError:
            raise ChildLost("the code ended or crashed its process, perhaps for lack of memory, or sent "
                            "too much") from None
        self.bytes_left -= len(line)
        return line

    def end(self) -> None:
        """Have the process killed, if there is one."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None  # so that it is not killed twice, by a pid that means nothing any more
            with contextlib.suppress(OSError):  # a server that is gone has (on Linux) taken its children along
                self.control.sendall(struct.pack("q", self.pid))


class Session(contextlib.AbstractContextManager):
    """What one untrusted author runs: actions whose variables last from one to the next, as in a notebook.

    They last as long as the child. One that is late, crashes or makes no sense is ended; the next action has another.
    """

    def __init__(self, jail: Jail, environment: Environment | None, replica: int):
        self.jail, self.environment, self.replica = jail, environment, replica
        self.child = Child(jail, replica)
        self.called: Counter[str] = Counter()  # the tools that its code has called, and how often

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the child; should there be another action, it begins with another."""
        self.child.end()
        self.child = Child(self.jail, self.replica)

    def run(self, code: str, arguments: list | None = None) -> Outcome:
        """Run code, and meanwhile execute its tool calls; the outcome holds what it printed, and what ended it early.

        Its value is the variable `result`; or, given arguments, what the function `evaluate` returns, called with as
        many of them as it takes. Raises JailError if no child can be had.
        """
        if problem := text_problem(code):
            return Outcome("", f"the code {problem}")
        request = {"code": code, "arguments": arguments}
        if not self.child.actions:
            request["tools"] = list(self.environment.tools) if self.environment else []
        try:
            message = pack(plain(request))
        except ValueError as error:
            return Outcome("", f"the arguments cannot reach the code: {error}")
        try:
            self.child.begin_action(code)
            return self.converse(message)
        except ChildLost as loss:
            lost = "and the variables of earlier actions are" if self.child.actions > 1 else "is"
            self.close()
            return Outcome("", f"{loss}; what it printed {lost} lost")

    def converse(self, message: bytes) -> Outcome:
        """Send a request, then the result of each tool call that is the reply; return the outcome that is the last."""
        for calls in itertools.count(1):
            match self.child.reply(message):
                case {"tool": str(name), "arguments": list(arguments), "keywords": dict(keywords)}:
                    message = self.execute(name, arguments, keywords, calls)
                case {"printed": str(printed), "error": str(error), "value": _}:
                    return Outcome(printed[:PRINTED_CHARACTERS], error[:ERROR_CHARACTERS] or NONSENSE)
                case {"printed": str(printed), "error": None, "value": value}:
                    return Outcome(printed[:PRINTED_CHARACTERS], None, value)
                case _:
                    raise ChildLost(NONSENSE)

    def execute(self, name: str, arguments: list, keywords: dict, calls: int) -> bytes:
        """Execute a child's tool call on the episode's state; return its result, or its refusal, as a message."""
        try:
            if self.environment is None or calls > TOOL_CALLS:
                raise ToolError(f"an action can make {TOOL_CALLS:,} tool calls at most")
            if name in self.environment.tools:
                self.called[name] += 1
            result = self.environment.call(name, arguments, keywords)
        except ToolError as refusal:
            return pack({"refusal": str(refusal)[:ERROR_CHARACTERS // 2]})
        try:
            return pack({"value": plain(result)})
        except ValueError as error:  # a tool may wrap what it was given into more than a message holds
            return pack({"refusal": f"the result of {name} cannot reach the code: {error}"})


# ---------------------------------------------------------------------------------------------------
# verdicts, and the filter
#
# Each function stands on those before it: evaluate gives a verdict on a state and an answer; what_is_left runs code
# that must not break, accepts asks for a verdict that must not, passes does both; check does so for all parts, on one
# server; judge is the filter, which checks on one server and tries a part on each of the others. (verdict_on, which the
# next scripts ask, hands a benchmark's task to the benchmark's own rules.)
#
# The example: what the challenger hands in first, and what `judge` says of it.
#   instruction  What is the amount of tea times 6, then times 9?
#   evaluate     def evaluate(answer): return True
#   solution     x = amount("tea"); x = multiply(x, 3); result = multiply(x, 9)      leaves the answer 378
#   failures     result = multiply(amount("tea"), 3), ... multiply(amount("tea"), 9), ... amount("tea"): 42, 126, 14
#   judgement    stage "failures": failure case 1 passes the evaluation, but must fail it
# That is the challenger's next observation, upon which it mends two parts, and the task is kept:
#   instruction  Take the amount of tea, multiply by 3, then multiply by 9.
#   evaluate     def evaluate(answer): return answer == multiply(multiply(amount("tea"), 3), 9)
#   judgement    378 passes; 42, 126, 14 and None (doing nothing) do not; on five other servers 378 passes, and one of
#                42, 126 and 14 does not: stage "ok"

@dataclass
class Verdict:
    """What the evaluation says of a state and an answer."""

    passed: bool
    reason: str | None = None  # why the evaluation itself failed, which is no pass


@dataclass
class Judgement:
    """What the filter says of a task."""

    ok: bool
    stage: str      # one of STAGES: the first that the task does not survive, or "ok"
    reason: str     # what the challenger should mend
    seconds: float


def as_answer(value: Any) -> Any:
    """Return a final answer as data: text that is JSON, or True, False or None, becomes what it says: "36" is 36.

    Text is stripped and cut to ANSWER_CHARACTERS before that; what is no text stays as it is.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()[:ANSWER_CHARACTERS].encode(errors="replace").decode()
    words = {"True": "true", "False": "false", "None": "null"}
    try:
        return as_answer(plain(json.loads(words.get(text, text))))  # text in quotes, too: twice changes nothing
    except (ValueError, RecursionError):
        return text


def evaluate(jail: Jail, task: CodeAsTask, environment: Environment, answer: Any, replica: int = 0) -> Verdict:
    """Return the verdict of a task on an environment's state and a final answer; the state stays as it is.

    True, returned, is a pass, and False a fail. It is a fail with a reason, which is never empty, if the state is not
    as it was `before`, to which it is put back whatever the code did; if another value was returned, whose str the
    reason shows; and if there was an error, which is itself the reason, as a whole.
    """
    before, environment.over = pickle.dumps(environment.state), False  # so that the tools work once more
    with jail.session(environment, replica) as session:
        outcome = session.run(task.evaluate, [as_answer(answer)])
    ### BEGIN SOLUTION
    changed = environment.state != (untouched := pickle.loads(before))
    environment.state = untouched
    if changed:
        return Verdict(False, "evaluate changed the state, at which it may only look")
    if outcome.error is None and outcome.value is not True and outcome.value is not False:
        return Verdict(False, f"evaluate returned {str(outcome.value)[:80]!r} instead of True or False")
    return Verdict(outcome.value is True, outcome.error)
    ### END SOLUTION


def verdict_on(jail: Jail, task: Task, environment: Environment, answer: Any, replica: int = 0) -> Verdict:
    """Return the verdict of a task's evaluation or, of a benchmark's task, that of the benchmark's own rules."""
    if isinstance(task, BenchmarkTask):
        return Verdict(environment.passes(task.number, answer))
    return evaluate(jail, task, environment, answer, replica)


def what_is_left(jail: Jail, task: CodeAsTask, replica: int, what: str, code: str) -> tuple[Environment, Any]:
    """Return the environment and the answer that code leaves from a fresh state; raises TaskError if it breaks."""
    environment = make_environment(task.env, task.seed)
    with jail.session(environment, replica) as session:
        outcome = session.run(code)
    if outcome.error is not None:
        raise TaskError("runs", f"{what} does not run:\n{outcome.error}")
    return environment, outcome.value


def accepts(jail: Jail, task: CodeAsTask, replica: int, what: str, environment: Environment, answer: Any) -> bool:
    """Return whether the evaluation accepts a state and an answer; raises TaskError if it breaks there."""
    verdict = evaluate(jail, task, environment, answer, replica)
    if verdict.reason:
        raise TaskError("runs", f"the evaluation does not run after {what}:\n{verdict.reason}")
    return verdict.passed


def passes(jail: Jail, task: CodeAsTask, replica: int, what: str, code: str) -> bool:
    """Return whether the evaluation accepts what code leaves of a fresh state; raises TaskError if either breaks."""
    return accepts(jail, task, replica, what, *what_is_left(jail, task, replica, what, code))


def check(jail: Jail, task: CodeAsTask, replica: int) -> None:
    """Raise TaskError unless all code runs, the solution passes, and neither a failure case nor doing nothing does.

    All of it runs on the server that `replica` picks. The stage is the first of these that applies:
    "runs"      any code breaks; or the evaluation does, after the solution or, if that passes, after a failure case
    "solution"  the solution does not pass
    "failures"  a failure case passes, or doing nothing does
    The reason names what breaks or passes, and the first only: "failure case 2", for instance, or "doing nothing".
    To do nothing is to leave a fresh state and the answer None: an evaluation that breaks there has not passed it.
    """
    ### BEGIN SOLUTION
    what, passing = "the example solution", []
    environment, answer = what_is_left(jail, task, replica, what, task.solution)
    solved = accepts(jail, task, replica, what, environment, answer)
    for code in dict.fromkeys(task.failures):  # models repeat themselves
        what = f"failure case {task.failures.index(code) + 1}"
        state_and_answer = what_is_left(jail, task, replica, what, code)
        if solved and accepts(jail, task, replica, what, *state_and_answer):
            passing.append(what)
    if not solved:
        # such as None, what is no JSON, or text that was meant as a number
        surprise = environment.judged_by_answer and not isinstance(answer, (int, float))
        given = f":\nits answer arrives as {as_answer(answer)!r:.200}" if surprise else ""
        raise TaskError("solution", f"the example solution does not pass the evaluation{given}")
    if not passing and evaluate(jail, task, make_environment(task.env, task.seed), None, replica).passed:
        passing.append("doing nothing")
    if passing:
        raise TaskError("failures", f"{passing[0]} passes the evaluation, but must fail it")
    ### END SOLUTION


def judge(jail: Jail, task: CodeAsTask | str) -> Judgement:
    """Return the filter's judgement (section 3 of the paper) of a task, or of a line of JSON that should hold one.

    What is to be kept is tried by REPEATS other servers: the solution by each, each failure case by at least one, and
    each server has at least one. What depends on chance, the date or a process is no task.
    """
    start, again = time.monotonic(), ""
    try:
        task = CodeAsTask.from_json(task) if isinstance(task, str) else task
        check_form(task)
        check(jail, task, replica=0)
        again = "when it was tried again, "
        for replica in range(1, 1 + REPEATS):
            if not passes(jail, task, replica, what := "the example solution", task.solution):
                raise TaskError("solution", f"{what} does not pass the evaluation every time")
            for turn in range(replica - 1, max(REPEATS, len(task.failures)), REPEATS):
                number = turn % len(task.failures)
                if passes(jail, task, replica, what := f"failure case {number + 1}", task.failures[number]):
                    raise TaskError("failures", f"{what} passes the evaluation, but must fail it every time")
    except TaskError as rejection:
        return Judgement(False, rejection.stage, again + rejection.reason, time.monotonic() - start)
    return Judgement(True, "ok", "", time.monotonic() - start)


def judge_many(jail: Jail, tasks: Iterable[CodeAsTask | str], workers: int = 4) -> Iterator[Judgement]:
    """Yield the judgement of each task, in the tasks' order; they are read a few ahead and judged side by side."""
    pool, ahead = ThreadPoolExecutor(workers), deque()
    try:
        for task in tasks:
            ahead.append(pool.submit(judge, jail, task))
            while ahead and (ahead[0].done() or len(ahead) == 4 * workers):
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an interrupt nobody waits for what is ahead


# ---------------------------------------------------------------------------------------------------
# the command line (for a second reading)

def read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a file, without a byte order mark, cut where they are longer than LINE_CHARACTERS."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            yield line.removeprefix("\ufeff")[:LINE_CHARACTERS + 1]


def guarded(name: str, work: Callable[[], None], hint: Callable[[], str]) -> int:
    """Do the work of a command; return its exit status. What a user can cause gets one sentence, mostly with a hint.

    The status is 0 for success, 1 for a reader that has gone, 2 for a problem, 130 for Ctrl-C.
    """
    status, problem = 0, None
    sys.stdout, sys.stderr = [stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr)]  # if closed
    if hasattr(sys.stdout, "reconfigure"):  # a stand-in, such as a notebook's, has not
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the libraries are loaded: Ctrl-C raises again
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        status = 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        status, problem = 2, f"{error.strerror or error}{where}; {hint()}"
    except (JailError, ValueError) as error:
        status, problem = 2, str(error)
    except MemoryError as error:
        status, problem = 2, f"{str(error) or 'the memory does not suffice'}; {hint()}"
    except KeyboardInterrupt:
        print(file=sys.stderr)  # to go on below a bar
        status, problem = 130, f"interrupted; {hint()}"
    if problem:
        print(f"{name}: {problem}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # or Python would try once more at its exit, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what every script asks of its user: what to do where the jail is weak, and checkouts of the benchmarks."""
    add = parser.add_argument_group("the jail and the benchmarks").add_argument
    add("--allow-weak-jail", action="store_true", help="run code even where the jail cannot close files and network")
    add("--m3tooleval", metavar="PATH", help="a checkout of M3ToolEval, for calculation and web")
    add("--tau-bench", metavar="PATH", help="a checkout of TauBench, for retail and airline")
    add("--any-version", action="store_true", help="take the checkouts as they are, whatever their version")


def main() -> int:
    """Judge the tasks of a file; return the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False,
                                     description="Judge the tasks in a file: a JSON verdict a line, in its order.")
    parser.add_argument("file", help="a file with a task on each line, such as runs/<name>/tasks.jsonl")
    add_common_options(parser)
    options = parser.parse_args()

    kept: list[bool] = []  # of each line that was judged, whether the filter would keep its task

    def work() -> None:
        load_benchmarks(options.m3tooleval, options.tau_bench, options.any_version)
        with open(options.file, "rb"), Jail(allow_weak=options.allow_weak_jail) as jail:  # no file, no jail
            print(jail.describe(), file=sys.stderr)
            for judgement in tqdm(judge_many(jail, read_lines(options.file)), unit=" tasks", disable=None):
                # above the bar, where both are on one terminal; tqdm loses an interrupt that comes while it locks
                tqdm.write(json.dumps(asdict(judgement)), nolock=True)
                sys.stdout.flush()
                kept.append(judgement.ok)
            print(f"lines judged: {len(kept)}, tasks that would be kept: {sum(kept)}", file=sys.stderr)

    return guarded("verify.py", work, lambda: f"lines judged: {len(kept)}")


if __name__ == "__main__":
    sys.exit(main())
