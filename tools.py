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
- Wrong signatures and types are mended: what a tool really takes is asked of its function. Calculation's `max` and
  `min` are not tools here, for they are Python's own.
- Before M3ToolEval's check looks at an answer, a list in it is written as Python would (a model may write JSON).
- The words of the simulated user's prompt, and those that greet it, are ours: nothing of a benchmark is copied.

Read next: verify.py, which runs code against an environment and judges tasks.
"""
import ast
import contextlib
import copy
import functools
import gc
import hashlib
import importlib.util
import inspect
import io
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
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace, UnionType
from typing import Any, Callable, Union, get_args, get_origin

TINY = Path(__file__).resolve().parent / "tiny"


class ToolError(Exception):
    """A tool's refusal. Its message is what the model sees, so it says what would be accepted."""


def tool(method: Callable) -> Callable:
    """Mark a method of an environment as a tool, that is, as callable by the model's code."""
    method.is_tool = True
    return method


class Environment:
    """A world: subclass it, fill `self.state` with plain data in `reset`, and mark methods with `@tool`."""

    name: str               # the word by which tasks and the command line call it
    judged_by_answer: bool  # True: `evaluate(answer)` judges the final answer; False: `evaluate()` judges the state
    summary: str            # what a model is told about it, above the tools' documentation
    suite: Path             # the file of held-out tasks on which policies are measured, a task a line
    has_user = False        # whether there is a user, to whom the executor's answers are messages
    over = False            # whether a tool has ended the episode
    state: Any = None
    tools: dict[str, Callable] = {}  # by name, each a function of the environment and its own arguments
    provenance: dict = {}   # what a result should say about where this world comes from

    def __init_subclass__(cls):
        marked = {name: member for name, member in vars(cls).items() if getattr(member, "is_tool", False)}
        cls.tools = cls.tools | marked  # a benchmark's come from elsewhere

    def __init__(self, seed: int = 0):
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Put the world into the state that `seed` determines; the same seed gives the same state."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to reset")

    def starting_point(self) -> str:
        """One sentence that gives the challenger something concrete to begin with in this state."""
        raise NotImplementedError(f"{type(self).__name__} names no starting point")

    def as_told(self, instruction: str) -> str:
        """Return a new task's instruction as the executor, or the user whom it serves, is to have it."""
        return instruction

    @classmethod
    def missing(cls) -> str | None:
        """Return what the user must do before this world can be entered, or None."""

    def documentation(self) -> str:
        """Return the tools' signatures and docstrings as the text that a model reads."""
        entries = []
        for name, function in self.tools.items():
            signature = inspect.signature(MethodType(function, self))  # which does not show self
            entries.append(f"{name}{signature}\n" + textwrap.indent(inspect.getdoc(function) or "", "    "))
        return "\n".join(entries)

    def call(self, name: str, arguments: list, keywords: dict) -> Any:
        """Execute one tool call that arrived as data; return the tool's result, which is data too.

        Raises ToolError if there is no such tool, if the arguments do not fit its signature, or if the tool refuses:
        all three are the model's mistakes. What else a tool raises is a mistake of the world, and not hidden.
        """
        function = self.tools.get(name) if isinstance(name, str) else None
        if function is None:
            raise ToolError(f"there is no tool {name!r:.100}")
        signature = inspect.signature(function)
        try:
            bound = signature.bind(self, *arguments, **keywords)
        except TypeError as error:
            raise ToolError(f"{name}: {error}") from None
        for argument, value in list(bound.arguments.items())[1:]:
            parameter = signature.parameters[argument]
            expected, values = parameter.annotation, [value]
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):  # *numbers: float, **named: float
                values = value.values() if isinstance(value, dict) else value
            for each in values:
                if expected is not parameter.empty and not fits(each, expected):
                    wanted = getattr(expected, "__name__", expected)
                    raise ToolError(f"{name}: {argument} must be {wanted}, not {type(each).__name__}")
        return function(*bound.args, **bound.kwargs)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value has an annotated type: a bool is no number, an int is a float too, and list[str] is any list."""
    if get_origin(annotation) in (UnionType, Union):
        return any(fits(value, part) for part in get_args(annotation))
    kind = get_origin(annotation) or annotation
    if kind is Any or not isinstance(kind, type):
        return True  # such as Literal
    accepted = (int, float) if kind is float else kind
    return isinstance(value, accepted) and (kind in (bool, object) or type(value) is not bool)


# ---------------------------------------------------------------------------------------------------
# calculator: judged by the answer
#
# One task is followed through all five files, from the challenger to the gradient (seed 0 of the default run). Here is
# its world; verify.py judges what the challenger hands in, rl.py learns from it, eval.py measures on a cousin of it,
# and selfchallenge.py, the last file, has the challenger's turns.
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
    judged_by_answer = True
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

CUSTOMERS = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Karen", "Liam",
             "Maria", "Noah", "Olga", "Paul", "Rosa", "Simon", "Tina", "Viktor"]
CITIES = ["Oslo", "Rome", "Paris", "Lima", "Cairo", "Delhi", "Tokyo", "Quito"]


class Shop(Environment):
    """Customers and their orders: an order is reached only through look-ups, and rules can refuse a change.

    state: {"customers": {customer_id: name}, "orders": {order_id: order}, "stock": {item: number}}, where an
    order is {"order_id", "customer_id", "item", "quantity", "city", "status"}, its status one of pending,
    delivered, cancelled, returned. A customer has at most one order of an item.
    """

    name = "shop"
    judged_by_answer = False
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
                orders[order_id] = {"order_id": order_id, "customer_id": customer_id, "item": item,
                                    "quantity": generator.randint(1, 4), "city": generator.choice(CITIES),
                                    "status": "pending" if position < 2 else "delivered"}
        self.state = {"customers": customers, "orders": orders,
                      "stock": {item: generator.randint(6, 9) for item in ITEMS}}
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
        self._order(order_id, "pending")["status"] = "cancelled"
        return "cancelled"

    @tool
    def return_order(self, order_id: str) -> str:
        """Send an order back; only a delivered one can be returned. Returns the new status."""
        self._order(order_id, "delivered")["status"] = "returned"
        return "returned"

    @tool
    def change_quantity(self, order_id: str, quantity: int) -> int:
        """Change the quantity of a pending order, within what is in stock. Returns the new quantity."""
        order = self._order(order_id, "pending")
        if not 1 <= quantity <= self.state["stock"][order["item"]]:
            raise ToolError(f"the quantity must lie between 1 and the stock of {self.state['stock'][order['item']]}")
        order["quantity"] = quantity
        return quantity

    @tool
    def change_city(self, order_id: str, city: str) -> str:
        """Change the city to which a pending order is sent. Returns the new city."""
        order = self._order(order_id, "pending")
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
# the worlds of the paper: checkouts that the user makes, nothing of which is here (for a second reading)

class BenchmarkError(ValueError):
    """A checkout that cannot be used; the message is one sentence that says what to do."""


class BenchmarkEnvironment(Environment):
    """A world that comes from a checkout: `load` finds and checks it, and `fill` gives its two worlds what they need.

    For the held-out task of a number `solve` does what the reference does and returns its answer, and `passes` is the
    benchmark's own verdict on the state and an answer.
    """

    benchmark: str              # its name
    clone: str                  # the commands that make a checkout of the commit that this file was written against
    option: str                 # of the command line, which takes the checkout's path
    folder = "."                # in the checkout; its path will do as well
    files: dict[str, str]       # {file: first 16 hex digits of its sha256} of some, by which other versions are told
    held_out: list[Any] = []    # the benchmark's tasks; they hold the reference answers and never leave this process

    @classmethod
    def missing(cls) -> str | None:
        needed = f"{cls.name} needs a checkout of {cls.benchmark}: give its path with {cls.option} PATH ({cls.clone})"
        return None if cls.held_out else needed

    @classmethod
    def load(cls, path: str | Path, any_version: bool = False) -> None:
        """Fill a benchmark's two worlds from a checkout; raises BenchmarkError if it cannot be used."""
        folder = Path(path, cls.folder) if Path(path, cls.folder).exists() else Path(path)
        fingerprint = {}
        try:
            for file, known in cls.files.items():
                content = (folder / file).read_bytes() if (folder / file).exists() else None
                if content is None or content.startswith(b"version https://git-lfs"):
                    raise BenchmarkError(f"{file} is missing or incomplete")
                fingerprint[file] = hashlib.sha256(content).hexdigest()[:16]
                if fingerprint[file] != known and not any_version:
                    raise BenchmarkError(f"{file} is not the known version (--any-version, if you mean it)")
            cls.provenance = {"benchmark": cls.benchmark, "fingerprint": fingerprint}
            cls.fill(folder.resolve(), any_version)
            return
        except BenchmarkError as error:
            problem = str(error)
        except (OSError, ValueError) as error:  # such as a file of data that is cut off
            problem = f"it is incomplete: {error}"
        except Exception as error:  # of the benchmark's own code, or because a library is missing
            problem = f"its import raises {type(error).__name__}: {error} (pip install what is missing)"
        raise BenchmarkError(f"{str(path)!r} is no checkout of {cls.benchmark} that can be used: {problem}. "
                             f"Make one with {cls.clone}, and give its path with {cls.option}")

    def place(self, number: int) -> tuple[int, str]:
        """Return the seed at which a held-out task is played, and the group in which it is counted."""
        return number, ""

    def call(self, name: str, arguments: list, keywords: dict) -> Any:
        """Like `Environment.call`; whatever a foreign tool raises is a refusal, and so is text like "Error: ..."."""
        try:
            result = super().call(name, arguments, keywords)
        except ToolError:
            raise
        except Exception as error:
            raise ToolError(f"{type(error).__name__}: {error}") from None
        if isinstance(result, str) and result.startswith("Error"):
            raise ToolError(result.removeprefix("Error: "))
        return result


TYPES = {
    "str": str, "int": int, "float": int | float, "bool": bool, "dict": dict,  # in Python, and in a JSON schema
    "string": str, "integer": int, "number": int | float, "boolean": bool, "object": dict, "array": list,
}


def foreign_tool(invoke: Callable, original: Callable, description: str, types: dict, returns: str = "") -> Callable:
    """Return a function in the form of this file's tools: after self come `original`'s parameters, save for the data.

    `types`, {parameter: word}, and `returns` name types by the words of TYPES; any other word means unknown. Where
    `types` lacks a parameter, the original's annotation counts.
    """
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for name, parameter in inspect.signature(original).parameters.items():
        word = types.get(name, getattr(parameter.annotation, "__name__", ""))
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            word = ""  # annotated as each of them, or as a list of all
        if name != "data":  # which is TauBench's database
            parameters.append(parameter.replace(annotation=TYPES.get(word, inspect.Parameter.empty)))
    result = TYPES.get(returns, inspect.Signature.empty)
    invoke.__doc__, invoke.__signature__ = description, inspect.Signature(parameters, return_annotation=result)
    return invoke


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


# ---------------------------------------------------------------------------------------------------
# M3ToolEval: judged by the answer (for a second reading)

class M3ToolEval(BenchmarkEnvironment):
    """What Calculation and Web Browsing share (arXiv 2402.01030)."""

    judged_by_answer = True
    benchmark, option, folder = "M3ToolEval", "--m3tooleval", "scripts/eval/m3tooleval"
    clone = "git clone https://github.com/xingyaoww/code-act && git -C code-act checkout d607f56c9cfe"
    files = {
        "tasks/base.py": "b39de50ba7183dba",
        "tasks/impl/web_browsing/web_pages.jsonl": "bc885a9be35c1611",
        "tasks/impl/web_browsing/metadata.json": "c13f5bc779bf02e8",
    }

    @classmethod
    def fill(cls, folder: Path, any_version: bool) -> None:
        """Import the benchmark, try its references out, and give each world its tools and tasks."""
        alias = f"m3tooleval_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"  # for its own name is "tasks"
        if alias not in sys.modules:
            spec = importlib.util.spec_from_file_location(alias, folder / "tasks/__init__.py")
            sys.modules[alias] = importlib.util.module_from_spec(spec)
            sys.modules[f"{alias}.repl"] = SimpleNamespace(PythonREPL=None)  # which executes code, and needs IPython
            with contextlib.redirect_stdout(io.StringIO()):  # it prints every expected answer
                spec.loader.exec_module(sys.modules[alias])
        base, web = sys.modules[f"{alias}.base"], sys.modules[f"{alias}.impl.web_browsing"]
        tasks = [task for iterator, _ in base.task_iterators for task in iterator]
        wrong = sum(not task.check_answer(str(task.expected_output)) for task in tasks)
        if wrong or len(tasks) != 82 and not any_version:
            raise BenchmarkError(f"of its {len(tasks)} tasks (82 are known) the reference answers of {wrong} fail "
                                 "their own check")
        groups: dict[str, list] = {}
        for task in tasks:
            groups.setdefault(task.name.partition("/")[0], []).append(task)
        WebBrowsing.held_out = groups.pop("web_browsing")
        WebBrowsing.tools = {name: m3_tool(tool) for name, tool in web.create_tools().items()}
        WebBrowsing.browser, WebBrowsing.pages = web.WebBrowser, web.PAGES
        Calculation.held_out = [task for group in groups.values() for task in group]
        Calculation.domains = {}
        for domain, (task, *_) in groups.items():
            Calculation.domains[domain] = {name: m3_tool(tool) for name, tool in task.tools.items()
                                           if not inspect.isbuiltin(tool.function)}  # max and min are Python's own

    def solve(self, number: int) -> str:
        """Return the reference's answer to a held-out task."""
        return str(self.held_out[number].expected_output)

    def passes(self, number: int, answer: Any) -> bool:
        """Return the benchmark's verdict on an answer to a held-out task; a list is first written as Python would."""
        task, answer = self.held_out[number], str(answer).strip()[:1_000]
        if isinstance(parts := literal(answer), (list, dict)):  # perhaps in JSON's quotes, and a list for a tuple
            answer = str(tuple(parts) if isinstance(task.expected_output, tuple) else parts)
        return bool(task.check_answer(answer))

    @classmethod
    def passes_tolerantly(cls, number: int, answer: Any) -> bool:
        """Like `passes`, but numbers may be rounded to two decimals (68 is not 68.71), and case and quotes differ."""
        return alike(literal(str(answer)[:1_000]), cls.held_out[number].expected_output)


def m3_tool(tool: Any) -> Callable:
    """Return a tool of M3ToolEval in the form of this file's; of its own signature only the types are believed."""
    declared, _, output = tool.fn_signature.partition("->")

    def invoke(environment: M3ToolEval, *arguments: Any) -> Any:
        if tool.name == "calculator":
            return arithmetic(*arguments)
        if inspect.ismethod(tool.function):  # of a browser, which is made anew for each call
            return environment.browse(tool.function.__func__, *arguments)
        return tool.function(*arguments)
    types = dict(re.findall(r"(\w+): *(\w+)", declared))
    return foreign_tool(invoke, tool.function, tool.description, types, output.strip())


def literal(text: str) -> Any:
    """Return the number, text or list that an answer writes, or the answer itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text.strip()


def alike(answer: Any, expected: Any) -> bool:
    """Whether an answer says what is expected: numbers but for rounding, text but for case and quotes, item by item."""
    if isinstance(expected, (list, tuple)):
        return isinstance(answer, (list, tuple)) and len(answer) == len(expected) and all(map(alike, answer, expected))
    if isinstance(expected, dict):
        return (isinstance(answer, dict) and answer.keys() == expected.keys()
                and all(alike(answer[key], expected[key]) for key in expected))
    numbers = [literal(value) if isinstance(value, str) else value for value in (answer, expected)]
    if all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        with contextlib.suppress(OverflowError):  # of an int beyond all floats
            return math.isclose(*numbers, rel_tol=1e-9, abs_tol=0.00501)
    return str(answer).strip("'\" ").casefold() == str(expected).strip("'\" ").casefold()


class Calculation(M3ToolEval):
    """Arithmetic, decoding, DNA and travel plans, each with four or six tools of its own.

    state: {"domain": name}, which the seed picks; the tools themselves remember nothing.
    """

    name = "calculation"
    summary = "Each tool computes one thing. Combine them; do not compute in your head."
    domains: dict[str, dict[str, Callable]] = {}

    def reset(self, seed: int) -> None:
        domain = list(self.domains)[seed % len(self.domains)]
        self.state, self.tools = {"domain": domain}, self.domains[domain]
        self.start = random.Random(f"calculation {seed}").sample(list(self.tools), min(2, len(self.tools)))

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

    def browse(self, method: Callable, *arguments: Any) -> str:
        """Call a method of the benchmark's browser in this state, and keep the state that it leaves."""
        browser = self.browser(pages=self.pages, default_page=self.state["page"])
        browser.page_history.extend(browser.page_name_to_page[name] for name in self.state["history"])
        browser.scroll_position = self.state["scroll"]
        shown = method(browser, *arguments)
        self.state = {"page": browser.current_page.name, "history": [page.name for page in browser.page_history],
                      "scroll": browser.scroll_position}
        return shown


# ---------------------------------------------------------------------------------------------------
# TauBench: judged by the database that is left, and by what the user was told (for a second reading)

class TauBench(BenchmarkEnvironment):
    """What Retail and Airline share (arXiv 2406.12045): a database, an agent's tools, a policy, a user to talk to.

    state: the database, {table: {id: record}}. It has megabytes, so an episode has none until it looks.
    """

    judged_by_answer = False
    has_user = True
    benchmark, option = "TauBench", "--tau-bench"
    clone = "git clone https://github.com/sierra-research/tau-bench && git -C tau-bench checkout 59a200c6d575"
    files = {
        "tau_bench/envs/base.py": "1ad0402073f0ac9c",
        "tau_bench/envs/retail/tasks_test.py": "6f09468923c6cfb6",
        "tau_bench/envs/airline/tasks_test.py": "14cdb6b4fe810faa",
    }
    numbers: str            # the table whose keys are order or reservation numbers
    pristine: bytes = b""   # the database as it is at a reset, pickled
    users: list[str] = []   # for whom there is something to do

    @classmethod
    def fill(cls, folder: Path, any_version: bool) -> None:
        """Import the benchmark's parts, give each world its tools and tasks, and try two references out."""
        loaded = sys.modules.get("tau_bench")
        if loaded is not None and str(folder / "tau_bench") not in map(str, loaded.__path__):
            raise BenchmarkError(f"tau_bench is already imported from {list(loaded.__path__)[0]}: start Python anew")
        for package in ("tau_bench", "tau_bench.envs", "tau_bench.envs.retail", "tau_bench.envs.airline"):
            module = sys.modules.setdefault(package, ModuleType(package))  # without its __init__, which wants litellm
            module.__path__ = [str(folder.joinpath(*package.split(".")))]
        for kind in (Retail, Airline):
            data, tools, wiki, tasks = (importlib.import_module(f"tau_bench.envs.{kind.name}.{part}")
                                        for part in ("data", "tools", "wiki", "tasks_test"))
            database = data.load_data()
            kind.pristine, kind.summary = pickle.dumps(database), wiki.WIKI
            kind.users = sorted(name for name, user in database["users"].items() if user[kind.numbers])
            kind.tools = {tool.get_info()["function"]["name"]: tau_tool(tool) for tool in tools.ALL_TOOLS}
            kind.held_out = next(value for name, value in vars(tasks).items() if name.startswith("TASKS"))
            writing = next(filter(kind().writes, range(len(kind.held_out))))
            for number in (writing, -1):
                environment = kind()
                if not environment.passes(number, environment.solve(number)):
                    raise BenchmarkError(f"{kind.name} does not judge its own references as it should")

    def reset(self, seed: int) -> None:
        vars(self).pop("state", None)  # which is made anew below
        self.over = False
        self.user = random.Random(f"{self.name} {seed}").choice(self.users)

    @functools.cached_property
    def state(self) -> dict:
        """The database, which is read when something first looks at it."""
        gc.disable()  # or the collector would walk through the new records again and again
        try:
            return pickle.loads(self.pristine)
        finally:
            gc.enable()

    def starting_point(self) -> str:
        return f"Start from the user {self.user}."

    def as_told(self, instruction: str) -> str:
        """Return the instruction with who the user is, and without order numbers: those must be found.

        The paper leaves out the numbers (section 4), on Retail.
        """
        for number in self.state[self.numbers]:  # "#W0000001", which may be written without the #
            for written in (number, number.removeprefix("#")):
                instruction = instruction.replace(written, "[number withheld]")
        user = self.state["users"][self.user]
        name = " ".join(user["name"].values())
        return f"You are {name}, user id {self.user}, zip code {user['address']['zip']}. {instruction}"

    def replay(self, actions: list[Any]) -> None:
        """Take the actions of a task of the benchmark, as far as they go."""
        for action in copy.deepcopy(actions):
            with contextlib.suppress(ToolError):  # some reference actions are refused, and go on
                self.call(action.name, [], action.kwargs)

    def solve(self, number: int) -> list[str]:
        """Take the reference's actions, and tell the user the outputs that the task asks for."""
        self.replay(self.held_out[number].actions)
        return self.held_out[number].outputs

    def writes(self, number: int) -> bool:
        """Whether the reference actions of a held-out task change the database."""
        return self.reference_digest(number) != type(self)().digest()

    def digest(self) -> str:
        """Return a hash of the database; as in the benchmark's, 5 is not 5.0, and the order of keys does not count."""
        return hashlib.sha256(json.dumps(self.state, sort_keys=True).encode()).hexdigest()

    @classmethod
    @functools.cache
    def reference_digest(cls, number: int) -> str:
        """Return the hash of the database that the reference actions of a held-out task leave."""
        environment = cls()
        actions = cls.held_out[number].actions
        kept = [action for action in actions if action.name != "transfer_to_human_agents"]  # as in the benchmark
        environment.replay(kept)
        return environment.digest()

    def passes(self, number: int, answer: list[str]) -> bool:
        """Return the benchmark's reward: the database is as the reference leaves it, and every output was said.

        `answer` is what was said to the user, message by message.
        """
        said = "\n".join(map(str, answer or [])).lower().replace(",", "")
        told = all(output.lower() in said for output in self.held_out[number].outputs)
        return told and self.digest() == self.reference_digest(number)


def tau_tool(tool: Any) -> Callable:
    """Return a tool of TauBench in the form of this file's."""
    info = tool.get_info()["function"]
    described = info["parameters"]["properties"]
    names = [name for name in inspect.signature(tool.invoke).parameters if name in described]
    lines = [info["description"].strip(), *(f"{name}: {described_by(described[name])}" for name in names)]

    def invoke(environment: TauBench, *arguments: Any) -> Any:
        if environment.over:
            raise ToolError("the conversation has ended: it was handed to a human")
        environment.over = info["name"] == "transfer_to_human_agents"
        if info["name"] == "calculate":
            return round(float(arithmetic(*arguments)), 2)
        result = tool.invoke(environment.state, *arguments)
        return json.loads(result) if result[:1] in ("{", "[") else result
    return foreign_tool(invoke, tool.invoke, "\n".join(lines), {name: described[name]["type"] for name in names})


def described_by(schema: dict) -> str:
    """Return what a JSON schema says of a parameter: its description, its choices, and what its parts hold."""
    texts = [schema.get("description", "").strip()]
    if "enum" in schema:
        texts.append("One of " + ", ".join(map(repr, schema["enum"])) + ".")
    if parts := schema.get("items", schema).get("properties"):
        texts.append("Each is a dict: " + "; ".join(f"{name!r}: {described_by(part)}" for name, part in parts.items()))
    return " ".join(filter(None, texts))


class Retail(TauBench):
    """A shop: users, their orders, and products in variants."""

    name, numbers = "retail", "orders"


class Airline(TauBench):
    """An airline: users, their reservations, and flights."""

    name, numbers = "airline", "reservations"


# ---------------------------------------------------------------------------------------------------
# the simulated user of Retail and Airline (for a second reading)

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


AGENT_TOKENS = 4096  # in a message of another challenger or teacher, which may think at length; a user says a sentence


def endpoint_model(url: str, model: str, tokens: int = 1024, tries: int = 4, wait: float = 1.0) -> Callable:
    """Return a model behind an OpenAI-compatible address: a function from conversations to its next messages.

    A message has at most so many `tokens`. The key is taken from the environment (OPENAI_API_KEY) and goes nowhere
    else. A conversation whose request fails `tries` times, after waits of `wait` seconds that double, gets None; a
    request fails after two minutes at the latest.
    """
    from huggingface_hub import InferenceClient  # here, because only this needs it
    client = InferenceClient(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=120)

    def ask(conversation: list[dict]) -> str | None:
        for attempt in range(tries):
            if attempt:
                time.sleep(wait * 2**(attempt - 1))
            try:
                answer = client.chat_completion(conversation, model=model, max_tokens=tokens)
                text = answer.choices[0].message.content
                return "" if text is None else text.encode().decode()  # which raises for anything but whole characters
            except Exception as error:  # of the network, of the server, or of what it answers: all may pass
                status = getattr(getattr(error, "response", None), "status_code", "")
                problem = f"{type(error).__name__} {status}".strip()  # the text of the error may show the key
        print(f"{url} failed {tries} times: {problem}", file=sys.stderr)
        return None

    def reply(conversations: list[list[dict]]) -> list[str | None]:
        with ThreadPoolExecutor(16) as workers:
            return list(workers.map(ask, conversations))
    return reply


# ---------------------------------------------------------------------------------------------------
# the worlds by their names

ENVIRONMENTS: dict[str, type[Environment]] = {
    kind.name: kind for kind in (Calculator, Shop, Calculation, WebBrowsing, Retail, Airline)}


def load_benchmarks(m3tooleval: str | None = None, tau_bench: str | None = None, any_version: bool = False) -> None:
    """Load the benchmarks whose checkouts are given; raises BenchmarkError if one cannot be used."""
    for kind, path in [(M3ToolEval, m3tooleval), (TauBench, tau_bench)]:
        if path is not None:
            kind.load(path, any_version)


def make_environment(name: str, seed: int = 0) -> Environment:
    """Return a fresh environment in the state of `seed`; raises ValueError if it is unknown or lacks its checkout."""
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown environment {name!r}: choose from {', '.join(ENVIRONMENTS)}")
    if problem := ENVIRONMENTS[name].missing():
        raise BenchmarkError(problem)
    return ENVIRONMENTS[name](seed)
