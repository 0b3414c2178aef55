"""Environments: small worlds whose hidden state can be seen and changed through tools alone.

An environment is a state (plain data) and a set of tools (typed functions with docstrings). A language
model never touches the state. It writes Python that calls the tools; that code runs in a jail
(verify.py), each call crosses a pipe as data, is executed here, and its result goes back as data.

Two toy worlds need no download: `calculator` is judged by the final answer, `shop` by the state that is left.
The four worlds of the paper (section 4) come from benchmarks that the user clones: `calculation` and `web` from
M3ToolEval, `retail` and `airline` from TauBench. Departures from these benchmarks, and why:

- A refusal ("Error: order not found") is raised as a ToolError, and JSON text arrives as data: a program should
  not go on as if nothing had happened, nor parse what was data before.
- Their calculators hand any text to Python's `eval`, which can hang or read the expected answers. Here they do
  arithmetic and nothing else.
- Wrong signatures and types are mended: what a tool really takes is asked of its function.

Read next: verify.py, which runs code against an environment and judges tasks.
"""
import ast
import builtins
import contextlib
import copy
import functools
import gc
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import operator
import os
import pickle
import random
import re
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Callable, Iterable


TINY = Path(__file__).resolve().parent / "tiny"


class ToolError(Exception):
    """A tool's refusal. Its message is what the model sees, so it says what would be accepted."""


def tool(method: Callable) -> Callable:
    """Mark a method of an environment as a tool, that is, as callable by the model's code."""
    method.is_tool = True
    return method


class Environment:
    """A world: subclass it, fill `self.state` with plain data in `reset`, and mark methods with `@tool`.

    name        the word by which tasks and the command line call it
    answered    True if `evaluate(answer)` judges the final answer, False if `evaluate()` judges the state
    summary     what a model is told about it, above the tools' documentation
    suite       the file of held-out tasks on which policies are measured, a task a line
    talks       whether there is a user, to whom the executor's answers are messages
    over        whether a tool has ended the episode
    """

    name: str
    answered: bool
    summary: str
    suite: Path
    talks = False
    over = False

    def __init__(self, seed: int = 0):
        self.state: Any = None
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Put the world into the state that `seed` determines; the same seed gives the same state."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to reset")

    def starting_point(self) -> str:
        """One sentence that gives the challenger something concrete to begin with in this state."""
        raise NotImplementedError(f"{type(self).__name__} names no starting point")

    def tools(self) -> dict[str, Callable]:
        """Return {name: function} of the tools, each a function of this environment and its own arguments."""
        return tools_of(type(self))

    def documentation(self) -> str:
        """Return the tools' signatures and docstrings as the text that a model reads."""
        entries = []
        for name, function in self.tools().items():
            signature = signature_of(function)
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])  # without self
            entries.append(f"{name}{signature}\n" + textwrap.indent(inspect.getdoc(function), "    "))
        return "\n".join(entries)

    @classmethod
    def missing(cls) -> str | None:
        """Return what the user must do before this world can be entered, or None."""
        return None

    def as_told(self, instruction: str) -> str:
        """Return a new task's instruction as the executor, or the user whom it serves, is to have it."""
        return instruction

    @classmethod
    def provenance(cls) -> dict:
        """Return what a result should say about where this world comes from."""
        return {}

    def call(self, name: str, arguments: list, keywords: dict) -> Any:
        """Execute one tool call that arrived as data; return the tool's result, which is data too.

        Raises ToolError, never anything else, if there is no such tool, if the arguments do not fit
        its signature, or if the tool refuses: all three are the model's mistakes, not the program's.
        """
        function = self.tools().get(name) if isinstance(name, str) else None
        if function is None:
            raise ToolError(f"there is no tool {name!r:.100}")
        signature = signature_of(function)
        try:
            bound = signature.bind(self, *arguments, **keywords)
        except TypeError as error:
            raise ToolError(f"{name}: {error}") from None
        for parameter, value in list(bound.arguments.items())[1:]:
            if (expected := signature.parameters[parameter].annotation) is not inspect.Parameter.empty:
                check_type(f"{name}: {parameter}", value, expected)
        return function(*bound.args, **bound.kwargs)


@functools.cache
def tools_of(kind: type[Environment]) -> dict[str, Callable]:
    """Return {name: function} of the methods marked as tools, in the order in which the classes define them."""
    members = {name: member for base in reversed(kind.__mro__) for name, member in vars(base).items()}
    return {name: member for name, member in members.items() if getattr(member, "is_tool", False)}


signature_of = functools.cache(inspect.signature)  # which takes longer than most tools


def check_type(what: str, value: Any, expected: type | UnionType) -> None:
    """Raise ToolError unless `value` is an instance of `expected`; True is not a number here."""
    fits = isinstance(value, expected) and not (isinstance(value, bool) and expected is not bool)
    if not fits:
        raise ToolError(f"{what} must be {getattr(expected, '__name__', expected)}, not {type(value).__name__}")


# ---------------------------------------------------------------------------------------------------
# calculator: judged by the answer
#
# One task is followed through all five files, from the challenger to the gradient (seed 0 of the default run). Here is its
# world; verify.py judges what the challenger hands in, rl.py learns from it, eval.py measures on a cousin of it, and
# selfchallenge.py, the last file, has the challenger's turns.
#   world = make_environment("calculator", seed=10)
#   world.starting_point()              'Start from the item tea.'    what the challenger is told
#   world.call("amount", ["tea"], {})   14                            how a call arrives from the jail: as data
#   world.call("amount", ["milk"], {})  ToolError: the ledger has no item 'milk'; items() lists them

ITEMS = ["tea", "lamp", "chair", "book", "pen", "cup", "bag", "clock", "soap", "rope", "drum", "kite", "boat", "ring",
         "vase", "coat"]


class Calculator(Environment):
    """A ledger of named amounts that must be looked up, and the arithmetic to combine them.

    state: {item: amount}, every item of ITEMS with a whole number from 2 to 20.
    """

    name = "calculator"
    answered = True
    summary = "A ledger holds a hidden amount for each of some items. Look amounts up and combine them step by step."
    suite = TINY / "held_out_calculator.jsonl"

    def reset(self, seed: int) -> None:
        generator = random.Random(f"calculator {seed}")
        self.state = {item: generator.randint(2, 20) for item in ITEMS}
        self.start = generator.choice(ITEMS)

    def starting_point(self) -> str:
        return f"Start from the item {self.start}."

    @tool
    def items(self) -> list:
        """The names of all items in the ledger."""
        return list(self.state)

    @tool
    def amount(self, item: str) -> int:
        """The amount that the ledger holds for an item."""
        if item not in self.state:
            raise ToolError(f"the ledger has no item {item!r}; items() lists them")
        return self.state[item]

    @tool
    def add(self, a: int, b: int) -> int:
        """a plus b."""
        return self._shown(a + b)

    @tool
    def subtract(self, a: int, b: int) -> int:
        """a minus b."""
        return self._shown(a - b)

    @tool
    def multiply(self, a: int, b: int) -> int:
        """a times b."""
        return self._shown(a * b)

    @tool
    def larger(self, a: int, b: int) -> int:
        """The larger of a and b."""
        return self._shown(max(a, b))

    def _shown(self, number: int) -> int:
        """The number, refused if the calculator's display has no room for it."""
        if abs(number) > 10**6:
            raise ToolError("the result does not fit on the calculator, which ends at a million")
        return number


# ---------------------------------------------------------------------------------------------------
# shop: judged by the state

CUSTOMERS = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Karen", "Liam", "Maria",
             "Noah", "Olga", "Paul", "Rosa", "Simon", "Tina", "Viktor"]
CITIES = ["Oslo", "Rome", "Paris", "Lima", "Cairo", "Delhi", "Tokyo", "Quito"]


class Shop(Environment):
    """Customers and their orders: an order is reached only through look-ups, and rules can refuse a change.

    state: {"customers": {customer_id: name}, "orders": {order_id: order}, "stock": {item: number}}, where an
    order is {"order_id", "customer_id", "item", "quantity", "city", "status"}, its status one of pending,
    delivered, cancelled, returned. A customer has at most one order of an item.
    """

    name = "shop"
    answered = False
    summary = "A shop keeps customers and their orders. Look up a customer's order first; ids cannot be guessed."
    suite = TINY / "held_out_shop.jsonl"

    def reset(self, seed: int) -> None:
        generator = random.Random(f"shop {seed}")
        names = generator.sample(CUSTOMERS, 6)
        customers = {f"C{number}": name for number, name in zip(generator.sample(range(100, 1000), 6), names)}
        orders = {}
        for customer_id in customers:
            for position, item in enumerate(generator.sample(ITEMS, 4)):
                order_id = f"W{generator.randint(100, 999)}{len(orders)}"  # the last digits keep the ids apart
                orders[order_id] = {
                    "order_id": order_id,
                    "customer_id": customer_id,
                    "item": item,
                    "quantity": generator.randint(1, 4),
                    "city": generator.choice(CITIES),
                    "status": ["pending", "pending", "delivered", "delivered"][position],
                }
        self.state = {"customers": customers, "orders": orders, "stock": {item: generator.randint(6, 9) for item in ITEMS}}
        self.start = names[0]

    def starting_point(self) -> str:
        return f"Start from the customer {self.start}."

    @tool
    def find_customer(self, name: str) -> str:
        """The id of the customer with this name."""
        for customer_id, customer in self.state["customers"].items():
            if customer == name:
                return customer_id
        raise ToolError(f"no customer has the name or id {name!r}")

    @tool
    def list_orders(self, customer: str) -> list:
        """All orders of a customer, who is given by name or by id, each as get_order gives it."""
        customer_id = customer if customer in self.state["customers"] else self.find_customer(customer)
        return [dict(order) for order in self.state["orders"].values() if order["customer_id"] == customer_id]

    @tool
    def find_order(self, customer: str, item: str) -> str:
        """The id of a customer's order of an item; the customer is given by name or by id."""
        for order in self.list_orders(customer):
            if order["item"] == item:
                return order["order_id"]
        raise ToolError(f"{customer} has no order of {item!r}; list_orders lists the orders")

    @tool
    def get_order(self, order_id: str) -> dict:
        """An order: order_id, customer_id, item, quantity, city and status."""
        return dict(self._order(order_id))

    @tool
    def stock(self, item: str) -> int:
        """How many pieces of an item are in stock."""
        if item not in self.state["stock"]:
            raise ToolError(f"the shop does not sell {item!r}")
        return self.state["stock"][item]

    @tool
    def cancel_order(self, order_id: str) -> str:
        """Cancel an order; only a pending one can be cancelled. Returns the new status."""
        order = self._order(order_id, status="pending")
        order["status"] = "cancelled"
        return order["status"]

    @tool
    def return_order(self, order_id: str) -> str:
        """Send an order back; only a delivered one can be returned. Returns the new status."""
        order = self._order(order_id, status="delivered")
        order["status"] = "returned"
        return order["status"]

    @tool
    def change_quantity(self, order_id: str, quantity: int) -> int:
        """Change the quantity of a pending order, within what is in stock. Returns the new quantity."""
        order = self._order(order_id, status="pending")
        if not 1 <= quantity <= self.state["stock"][order["item"]]:
            raise ToolError(f"the quantity must lie between 1 and the stock of {self.state['stock'][order['item']]}")
        order["quantity"] = quantity
        return quantity

    @tool
    def change_city(self, order_id: str, city: str) -> str:
        """Change the city to which a pending order is sent. Returns the new city."""
        order = self._order(order_id, status="pending")
        if city not in CITIES:
            raise ToolError(f"the shop does not deliver to {city!r}, only to {', '.join(CITIES)}")
        order["city"] = city
        return city

    def _order(self, order_id: str, status: str | None = None) -> dict:
        """The stored order, refused if there is none or if it does not have the status that a change needs."""
        order = self.state["orders"].get(order_id)
        if order is None:
            raise ToolError(f"no order has the id {order_id!r}; find_order finds it")
        if status is not None and order["status"] != status:
            raise ToolError(f"the order is {order['status']}, and only a {status} order can be changed so")
        return order


# ---------------------------------------------------------------------------------------------------
# the worlds of the paper: checkouts that the user makes, of which nothing is part of this repository
# (on a first reading go on with verify.py: up to the last file the toy worlds are all that is needed)
#
# `load` fills the classes below with what a checkout holds; until then `missing` says what the user must do.

class BenchmarkError(ValueError):
    """A checkout that cannot be used; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Benchmark:
    """A repository from which worlds come, at the commit that this file was written against."""

    name: str
    option: str            # of the command line, which takes the checkout's path
    url: str
    commit: str
    folders: list[str]     # where in a checkout the benchmark may lie
    files: dict[str, str]  # the first 16 hex digits of the sha256 of those that decide what is measured

    def clone(self) -> str:
        """Return the commands that make a checkout."""
        return f"git clone {self.url} && git -C {self.url.rpartition('/')[2]} checkout {self.commit}"

    def find(self, path: str | Path, any_version: bool = False) -> Path:
        """Return the benchmark's folder in a checkout; raises BenchmarkError if it is missing, damaged or another version."""
        clone = self.clone()
        folder = next((Path(path, part) for part in self.folders if Path(path, part, next(iter(self.files))).exists()), None)
        if folder is None:
            raise BenchmarkError(f"{str(path)!r} is no checkout of {self.name}: make one with {clone}, and give {self.option} its path")
        for file in self.files:
            if not (folder / file).exists() or (folder / file).read_bytes().startswith(b"version https://git-lfs"):
                raise BenchmarkError(f"the checkout of {self.name} in {str(path)!r} is incomplete: {file} is missing; make another with {clone}")
        other = [file for file, digits in fingerprint(folder, self.files).items() if digits != self.files[file]]
        if other and not any_version:
            raise BenchmarkError(f"{other[0]} in {str(path)!r} is not the known version of {self.name}: use {clone}, or --any-version if you mean it")
        return folder


def fingerprint(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Return the first 16 hex digits of the sha256 of each file."""
    return {file: hashlib.sha256((folder / file).read_bytes()).hexdigest()[:16] for file in files}


M3TOOLEVAL = Benchmark(
    name="M3ToolEval", option="--m3tooleval", url="https://github.com/xingyaoww/code-act", commit="d607f56c9cfe",
    folders=["scripts/eval/m3tooleval", "."],
    files={
        "tasks/base.py": "b39de50ba7183dba",
        "tasks/impl/web_browsing/web_pages.jsonl": "bc885a9be35c1611",
        "tasks/impl/web_browsing/metadata.json": "c13f5bc779bf02e8",
    },
)
TAU_BENCH = Benchmark(
    name="TauBench", option="--tau-bench", url="https://github.com/sierra-research/tau-bench", commit="59a200c6d575",
    folders=["."],
    files={
        "tau_bench/envs/base.py": "1ad0402073f0ac9c",
        "tau_bench/envs/retail/tasks_test.py": "6f09468923c6cfb6",
        "tau_bench/envs/airline/tasks_test.py": "14cdb6b4fe810faa",
    },
)
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg,
}


def arithmetic(expression: str) -> int | float:
    """Return the value of an expression of numbers, + - * / // % and brackets; raises ToolError for anything else.

    It stands in for `eval`. There are no powers, so a result is hardly longer than the expression.
    """
    def value(node: ast.expr) -> int | float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.UnaryOp(op=sign, operand=operand) if type(sign) in OPERATORS:
                return OPERATORS[type(sign)](value(operand))
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
                return OPERATORS[type(sign)](value(left), value(right))
        raise ValueError("only numbers, + - * / // % and brackets are allowed")

    try:
        if len(expression) > 500 or not re.fullmatch(r"[0-9.eE+\-*/%() ]*", expression):
            raise ValueError("only numbers, + - * / // % and brackets are allowed, 500 characters at most")
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ToolError(f"cannot calculate {expression[:80]!r}: {error}") from None


def adapted(function: Callable, description: str, parameters: list[inspect.Parameter], returns: Any = inspect.Signature.empty) -> Callable:
    """Return a foreign tool in the form of this file's: a function of the environment and the tool's own parameters.

    Whatever the foreign function raises becomes a ToolError, and so does text that begins with "Error".
    """
    def call(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            result = function(self, *arguments, **keywords)
        except ToolError:
            raise
        except Exception as error:
            raise ToolError(f"{type(error).__name__}: {error}") from None
        if isinstance(result, str) and result.startswith("Error"):
            raise ToolError(result.removeprefix("Error: "))
        return result

    call.__doc__ = description
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    call.__signature__ = inspect.Signature([self, *parameters], return_annotation=returns)
    return call


class BenchmarkEnvironment(Environment):
    """A world that comes from a checkout: `load` fills the class with its tools and its held-out tasks.

    functions    {name: function} of the tools
    held_out     the benchmark's own task objects; they hold the reference answers and never leave this process
    fingerprint  {file: digits of its hash} of the checkout
    """

    benchmark: Benchmark
    functions: dict[str, Callable] = {}
    held_out: list[Any] = []
    fingerprint: dict[str, str] = {}

    def __init__(self, seed: int = 0):
        if problem := self.missing():
            raise BenchmarkError(problem)
        super().__init__(seed)

    @classmethod
    def missing(cls) -> str | None:
        source = cls.benchmark
        return None if cls.functions else (f"{cls.name} needs a checkout of {source.name}: give its path with {source.option} PATH "
                                           f"(git clone {source.url})")

    def tools(self) -> dict[str, Callable]:
        return self.functions

    @classmethod
    def provenance(cls) -> dict:
        return {"benchmark": cls.benchmark.name, "fingerprint": cls.fingerprint}

    def place(self, number: int) -> tuple[int, str]:
        """Return the seed at which the held-out task of this number is played, and the group in which it is counted."""
        return number, ""

    def solve(self, number: int) -> Any:
        """Do what the reference of a held-out task does, and return its answer."""
        raise NotImplementedError(f"{type(self).__name__} has no reference")

    def passes(self, number: int, answer: Any) -> bool:
        """Return the benchmark's own verdict on this state and an answer, for the held-out task of this number."""
        raise NotImplementedError(f"{type(self).__name__} does not judge")


# ---------------------------------------------------------------------------------------------------
# M3ToolEval: judged by the answer

class M3ToolEval(BenchmarkEnvironment):
    """What Calculation and Web Browsing share (arXiv 2402.01030)."""

    answered = True
    benchmark = M3TOOLEVAL

    @staticmethod
    def load(path: str | Path, any_version: bool = False) -> None:
        """Fill Calculation and WebBrowsing from a checkout; raises BenchmarkError if it cannot be used."""
        folder = M3TOOLEVAL.find(path, any_version) / "tasks"
        package = import_quietly(f"m3tooleval_{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}", folder)
        tasks = [task for iterator, _ in package.base.task_iterators for task in iterator]
        wrong = [task.name for task in tasks if not task.check_answer(str(task.expected_output))]
        if wrong or not any_version and len(tasks) != 82:
            raise BenchmarkError(f"M3ToolEval in {str(path)!r} is broken: of its {len(tasks)} tasks (82 are known) the reference answers of "
                                 f"{len(wrong)} fail their own check; use {M3TOOLEVAL.clone()}")
        domain = {task.name: task.name.partition("/")[0] for task in tasks}
        M3ToolEval.fingerprint = fingerprint(folder.parent, M3TOOLEVAL.files)
        Calculation.held_out = [task for task in tasks if domain[task.name] != "web_browsing"]
        Calculation.domains = {domain[task.name]: {name: m3_tool(tool) for name, tool in task.tools.items()
                                                   if tool.function is not vars(builtins).get(name)}  # max and min are Python's own
                               for task in Calculation.held_out}
        Calculation.functions = {name: tool for tools in Calculation.domains.values() for name, tool in tools.items()}
        WebBrowsing.held_out = [task for task in tasks if domain[task.name] == "web_browsing"]
        WebBrowsing.browser, WebBrowsing.pages = package.impl.web_browsing.WebBrowser, package.impl.web_browsing.PAGES
        WebBrowsing.functions = {name: m3_tool(tool) for name, tool in package.impl.web_browsing.create_tools().items()}

    def solve(self, number: int) -> str:
        return str(self.held_out[number].expected_output)

    def passes(self, number: int, answer: Any) -> bool:
        task, answer = self.held_out[number], str(answer).strip()[:1_000]
        if isinstance(task.expected_output, tuple) and isinstance(parts := literal(answer), list):
            answer = str(tuple(parts))  # code in the jail gets a list where the tool returned a tuple
        return bool(task.check_answer(answer))

    @classmethod
    def passes_tolerantly(cls, number: int, answer: Any) -> bool:
        """Like `passes`, but numbers may differ by rounding to two decimals (68 is not 68.71), and text by case and quotes."""
        return alike(literal(str(answer)[:1_000]), cls.held_out[number].expected_output)


def import_quietly(name: str, folder: Path) -> ModuleType:
    """Import M3ToolEval's package under a name of its own, without what it prints: every expected answer."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[f"{name}.repl"] = ModuleType("repl")  # its executor of code, which needs IPython, is not ours
        sys.modules[f"{name}.repl"].PythonREPL = None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                spec.loader.exec_module(sys.modules[name])
        except Exception as error:
            del sys.modules[name]
            raise BenchmarkError(f"M3ToolEval in {str(folder)!r} cannot be imported: {error}") from error
    return sys.modules[name]


def m3_tool(tool: Any) -> Callable:
    """Return a tool of M3ToolEval in the form of this file's; where its declared signature is wrong, its function is right."""
    if tool.name == "calculator":
        expression = inspect.Parameter("expression", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str)
        return adapted(lambda self, expression: arithmetic(expression), tool.description, [expression], int | float)
    types = {"str": str, "int": int, "float": int | float, "dict": dict, "bool": bool, str: str, int: int, float: int | float}
    inputs, _, output = tool.fn_signature.partition("->")
    declared = [types.get(word, inspect.Parameter.empty) for word in re.findall(r": *(\w+)", inputs)]
    actual = list(inspect.signature(tool.function).parameters.values())
    parameters = []
    for parameter, annotation in itertools.zip_longest(actual, declared[:len(actual)], fillvalue=inspect.Parameter.empty):
        annotation = types.get(parameter.annotation, annotation)
        many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        parameters.append(parameter.replace(annotation=inspect.Parameter.empty if many else annotation))
    method = getattr(tool.function, "__func__", None)  # of the browser, which is made anew for each call
    function = functools.partial(browse, method) if method else lambda self, *arguments: tool.function(*arguments)
    return adapted(function, tool.description, parameters, types.get(output.strip(), inspect.Signature.empty))


def literal(text: str) -> Any:
    """Return the number, text or list that an answer writes, or the answer itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text.strip()


def alike(answer: Any, expected: Any) -> bool:
    """Whether an answer says what is expected: numbers but for rounding, text but for case and quotes, lists item by item."""
    if isinstance(expected, (list, tuple)):
        return isinstance(answer, (list, tuple)) and len(answer) == len(expected) and all(map(alike, answer, expected))
    if isinstance(expected, dict):
        return isinstance(answer, dict) and answer.keys() == expected.keys() and all(alike(answer[key], expected[key]) for key in expected)
    numbers = [literal(value) if isinstance(value, str) else value for value in (answer, expected)]
    if all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        return math.isclose(*numbers, rel_tol=1e-9, abs_tol=0.00501)
    return str(answer).strip("'\" ").casefold() == str(expected).strip("'\" ").casefold()


class Calculation(M3ToolEval):
    """Arithmetic, decoding, DNA and travel plans, each with six tools of its own.

    state: {"domain": name}, which the seed picks; the tools themselves remember nothing.
    """

    name = "calculation"
    summary = "Each tool computes one thing. Combine them; do not compute in your head."
    domains: dict[str, dict[str, Callable]] = {}

    def reset(self, seed: int) -> None:
        self.state = {"domain": list(self.domains)[seed % len(self.domains)]}
        names = list(self.tools())
        self.start = random.Random(f"calculation {seed}").sample(names, min(2, len(names)))

    def tools(self) -> dict[str, Callable]:
        return self.domains[self.state["domain"]]

    def place(self, number: int) -> tuple[int, str]:
        domain = self.held_out[number].name.partition("/")[0]
        return list(self.domains).index(domain), domain

    def starting_point(self) -> str:
        return f"Start from the tools: {', '.join(self.start)}."


class WebBrowsing(M3ToolEval):
    """A small web of pages, of which five lines are seen at a time.

    state: {"page": name, "history": [names of earlier pages], "scroll": the first line in view}.
    """

    name = "web"
    summary = "A browser shows five lines of a page at a time. Click, go back and scroll to find what is asked for."

    def reset(self, seed: int) -> None:
        self.state = {"page": "/", "history": [], "scroll": 0}
        self.start = random.Random(f"web {seed}").choice(self.pages).name

    def starting_point(self) -> str:
        return f"Find your way to the page {self.start}, and start from what it says."


def browse(method: Callable, environment: WebBrowsing, *arguments: Any) -> str:
    """Call a method of the benchmark's browser in an environment's state, and keep the state that it leaves."""
    state = environment.state
    browser = environment.browser(pages=environment.pages, default_page=state["page"])
    browser.page_history.extend(browser.page_name_to_page[name] for name in state["history"])
    browser.scroll_position = state["scroll"]
    shown = method(browser, *arguments)
    environment.state = {"page": browser.current_page.name, "history": [page.name for page in browser.page_history],
                         "scroll": browser.scroll_position}
    return shown


# ---------------------------------------------------------------------------------------------------
# TauBench: judged by the database that is left, and by what the user was told

class TauBench(BenchmarkEnvironment):
    """What Retail and Airline share (arXiv 2406.12045): a database, an agent's tools, a policy, a user to talk to.

    state: the database, {table: {id: record}}. It has megabytes, so an episode has none until it looks.
    """

    answered = False
    talks = True
    benchmark = TAU_BENCH
    numbers: str                              # the table whose keys are order or reservation numbers
    pristine: bytes = b""                     # the database as it is at a reset, pickled
    users: list[str] = []
    sizes: dict[str, int]                     # {split: number of tasks} of the known version
    splits: dict[str, list[Any]] = {}         # {split: tasks}; held_out is "test"

    @staticmethod
    def load(path: str | Path, any_version: bool = False) -> None:
        """Fill Retail and Airline from a checkout; raises BenchmarkError if it cannot be used."""
        folder = TAU_BENCH.find(path, any_version).resolve() / "tau_bench"
        loaded = sys.modules.get("tau_bench")
        if loaded is not None and str(folder) not in map(str, loaded.__path__):
            raise BenchmarkError(f"tau_bench is already imported from {list(loaded.__path__)[0]}, not from {folder}: start Python anew")
        for package in ("tau_bench", "tau_bench.envs", "tau_bench.envs.retail", "tau_bench.envs.airline"):
            if package not in sys.modules:  # without its __init__, which wants a library of language models
                sys.modules[package] = ModuleType(package)
                sys.modules[package].__path__ = [str(folder.parent.joinpath(*package.split(".")))]
        TauBench.fingerprint = fingerprint(folder.parent, TAU_BENCH.files)
        for kind in (Retail, Airline):
            package = f"tau_bench.envs.{kind.name}"
            try:
                data, tools, wiki = (importlib.import_module(f"{package}.{part}") for part in ("data", "tools", "wiki"))
                tasks = {split: importlib.import_module(f"{package}.tasks_{split}") for split in kind.sizes}
                database = data.load_data()
                kind.pristine, kind.users, kind.summary = pickle.dumps(database), sorted(database["users"]), wiki.WIKI
            except ImportError as error:
                raise BenchmarkError(f"TauBench in {str(path)!r} cannot be imported: {error} (it needs pip install pydantic)") from error
            except (OSError, ValueError) as error:
                raise BenchmarkError(f"the checkout of TauBench in {str(path)!r} is incomplete: {error}; make another with {TAU_BENCH.clone()}") from error
            kind.functions = dict(map(tau_tool, tools.ALL_TOOLS))
            kind.splits = {split: next(value for key, value in vars(module).items() if key.startswith("TASKS"))
                           for split, module in tasks.items()}
            kind.held_out = kind.splits["test"]
            if not any_version and {split: len(tasks) for split, tasks in kind.splits.items()} != kind.sizes:
                raise BenchmarkError(f"TauBench in {str(path)!r} has other tasks than the known version: use {TAU_BENCH.clone()}")
            kind.test_itself(path)

    @classmethod
    def test_itself(cls, path: str | Path) -> None:
        """Raise BenchmarkError unless two references pass, and doing nothing fails where the reference writes."""
        writing = next(number for number in range(len(cls.held_out)) if cls(0).writes(number))
        for number in (writing, len(cls.held_out) - 1):
            environment = cls(0)
            if not environment.passes(number, environment.solve(number)) or cls(0).passes(writing, []):
                raise BenchmarkError(f"TauBench in {str(path)!r} is broken: {cls.name} does not judge its own references as it should")

    def reset(self, seed: int) -> None:
        self.state, self.over = None, False
        self.user = random.Random(f"{self.name} {seed}").choice(self.users)

    @property
    def state(self) -> dict:
        if self.database is None:
            gc.disable()  # or the collector would walk through the new records again and again
            try:
                self.database = pickle.loads(self.pristine)
            finally:
                gc.enable()
        return self.database

    @state.setter
    def state(self, database: dict | None) -> None:
        self.database = database

    def starting_point(self) -> str:
        return f"Start from the user {self.user}."

    def as_told(self, instruction: str) -> str:
        """Return the instruction with who the user is, and without order numbers: those must be found (section 4)."""
        def withheld(word: re.Match) -> str:
            return "[number withheld]" if word[0] in self.state[self.numbers] or f"#{word[0]}" in self.state[self.numbers] else word[0]

        user = self.state["users"][self.user]
        name = " ".join(user["name"].values())
        return f"You are {name}, user id {self.user}, zip code {user['address']['zip']}. {re.sub(r'#?[A-Za-z0-9]+', withheld, instruction)}"

    def call(self, name: str, arguments: list, keywords: dict) -> Any:
        if self.over:
            raise ToolError("the conversation has ended: it was handed to a human")
        result = super().call(name, arguments, keywords)
        self.over = name == "transfer_to_human_agents"
        return result

    def replay(self, actions: list[Any]) -> list[str]:
        """Take the actions of a task of the benchmark, as far as they go; return what was said to the user."""
        said = []
        for action in copy.deepcopy(actions):
            with contextlib.suppress(ToolError):  # some reference actions are refused, and go on
                if action.name == "respond":
                    said.append(action.kwargs["content"])
                elif not self.over:
                    self.call(action.name, [], action.kwargs)
        return said

    def solve(self, number: int) -> list[str]:
        """Take the reference's actions, and tell the user the outputs that the task asks for."""
        task = self.held_out[number]
        return [*self.replay(task.actions), *task.outputs]

    def writes(self, number: int) -> bool:
        """Whether the reference actions of a held-out task change the database."""
        return self.reference_digest("test", number) != type(self)().digest()

    def digest(self) -> str:
        """Return a hash of the database; like the benchmark's it tells 5 from 5.0, and no order of keys."""
        return hashlib.sha256(json.dumps(self.state, sort_keys=True).encode()).hexdigest()

    @classmethod
    @functools.cache
    def reference_digest(cls, split: str, number: int) -> str:
        """Return the hash of the database that a task's reference actions leave."""
        environment = cls()
        environment.replay([action for action in cls.splits[split][number].actions if action.name != "transfer_to_human_agents"])
        return environment.digest()

    def passes(self, number: int, answer: list[str], split: str = "test") -> bool:
        """Return the benchmark's reward: the database is as the reference leaves it, and every output was said.

        `answer` is what was said to the user, message by message.
        """
        said = [str(message).lower().replace(",", "") for message in answer or []]
        outputs = self.splits[split][number].outputs
        return all(any(output.lower() in message for message in said) for output in outputs) \
            and self.digest() == self.reference_digest(split, number)


def tau_tool(kind: Any) -> tuple[str, Callable]:
    """Return the name of a tool of TauBench, and the tool in the form of this file's."""
    types = {"string": str, "integer": int, "number": int | float, "boolean": bool, "array": list, "object": dict}
    info = kind.get_info()["function"]
    described = info["parameters"]["properties"]
    parameters = [parameter.replace(annotation=types[described[name]["type"]], kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
                  for name, parameter in inspect.signature(kind.invoke).parameters.items() if name != "data"]
    lines = [info["description"].strip(), *(f"{p.name}: {described_by(described[p.name])}" for p in parameters)]

    def invoke(environment: TauBench, *arguments: Any) -> Any:
        if info["name"] == "calculate":
            return round(float(arithmetic(*arguments)), 2)
        result = kind.invoke(environment.state, *arguments)
        return json.loads(result) if result[:1] in ("{", "[") else result
    return info["name"], adapted(invoke, "\n".join(lines), parameters)


def described_by(schema: dict) -> str:
    """Return in a line what a JSON schema says of a parameter: its description, its choices, and what its parts hold."""
    texts = [schema.get("description", "").strip()]
    if "enum" in schema:
        texts.append("One of " + ", ".join(map(repr, schema["enum"])) + ".")
    parts = schema.get("items", schema).get("properties", {})
    if parts:
        texts.append("Each is a dict: " + "; ".join(f"{name!r}: {described_by(part)}" for name, part in parts.items()))
    return " ".join(filter(None, texts))


class Retail(TauBench):
    """A shop: users, their orders, and products in variants."""

    name = "retail"
    numbers = "orders"
    sizes = {"test": 115, "train": 500, "dev": 20}


class Airline(TauBench):
    """An airline: users, their reservations, and flights."""

    name = "airline"
    numbers = "reservations"
    sizes = {"test": 50}


# ---------------------------------------------------------------------------------------------------
# the simulated user of Retail and Airline

STOP = "###STOP###"  # what a user says last
USER_PROMPT = """\
You play a customer who writes to a company's support agent. This is who you are and what you want:

{instruction}

How to play:
- Write only the customer's next message, one or two sentences, as that person would write it.
- Tell the agent what it needs for its next step, and no more; do not hand over your whole wish at once.
- Stay with what is written above. What it does not say you do not know or do not remember: never make up a number.
- Put things in your own words, and keep to the manner that is described.
- When everything you want has been done, or the agent cannot do it, write {stop} and nothing else."""


def open_conversation(instruction: str) -> list[dict]:
    """Return the messages with which a simulated user begins; the agent's messages and the user's own follow."""
    greeting = {"role": "user", "content": "Hello, how can I help you?"}
    return [{"role": "system", "content": USER_PROMPT.format(instruction=instruction, stop=STOP)}, greeting]


def spoken(text: str) -> str:
    """Return what a user says of what a model wrote: its thoughts, where it writes any, are not for the agent."""
    text = re.sub(r"<think>.*?(</think>|$)|THOUGHT:.*?(END THOUGHT|$)", "", text, flags=re.DOTALL)
    return STOP if STOP in text else text.strip() or "(The customer says nothing.)"


def endpoint_model(url: str, model: str, tries: int = 4, wait: float = 1.0) -> Callable:
    """Return a model behind an OpenAI-compatible address: a function from conversations to its next messages.

    The key is taken from the environment (OPENAI_API_KEY) and goes nowhere else. A conversation whose request fails
    `tries` times, after waits of `wait` seconds that double, gets None. Raises ValueError if the model has no name.
    """
    if not model:
        raise ValueError(f"name the model at {url} as well, with the option that goes with the endpoint's, such as --user-model")
    from huggingface_hub import InferenceClient  # here, because only this needs it
    client = InferenceClient(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=120)

    def ask(conversation: list[dict]) -> str | None:
        for attempt in range(tries):
            try:
                return client.chat_completion(conversation, model=model, max_tokens=1024).choices[0].message.content or ""
            except Exception as error:  # of the network, of the server, or of what it answers: all may pass
                problem = error
                time.sleep(wait * 2**attempt)
        print(f"the endpoint failed {tries} times: {type(problem).__name__}", file=sys.stderr)  # its text may show the key
        return None

    def reply(conversations: list[list[dict]], generator: Any = None) -> list[str | None]:
        with ThreadPoolExecutor(16) as workers:
            return list(workers.map(ask, conversations))
    return reply


ENVIRONMENTS: dict[str, type[Environment]] = {kind.name: kind for kind in (Calculator, Shop, Calculation, WebBrowsing, Retail, Airline)}


def load_benchmarks(m3tooleval: str | None = None, tau_bench: str | None = None, any_version: bool = False) -> None:
    """Load the benchmarks whose checkouts are given; raises BenchmarkError if one cannot be used."""
    for kind, path in [(M3ToolEval, m3tooleval), (TauBench, tau_bench)]:
        if path is not None:
            kind.load(path, any_version)


def make_environment(name: str, seed: int = 0) -> Environment:
    """Return a fresh environment in the state of `seed`; raises ValueError with the known names otherwise."""
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown environment {name!r}: choose from {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name](seed)
