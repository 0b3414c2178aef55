"""Small stand-ins for the two benchmarks, in the layout of their checkouts: everything in them was written for these tests.

They have the benchmarks' traps: tools that report failure by text and by exception, a result that is JSON text, a
calculator that is a bare `eval`, live references to global tables, a wrong signature, a package that prints its answers.
"""
import json
from pathlib import Path

TAU_TYPES = """
from dataclasses import dataclass, field
@dataclass
class Action:
    name: str
    kwargs: dict
@dataclass
class Task:
    user_id: str
    instruction: str
    actions: list
    outputs: list
    annotator: str = ""
"""
TAU_TOOLS = '''
import json

def tool(name, description, properties):
    """Make a tool in the benchmark's form of a function."""
    def make(function):
        info = {"type": "function", "function": {"name": name, "description": description, "parameters": {
            "type": "object", "properties": properties, "required": list(properties)}}}
        return type(name, (), {"invoke": staticmethod(function), "get_info": staticmethod(lambda: info)})
    return make

TEXT, LIST = {"type": "string", "description": "A text."}, {"type": "array", "items": {"type": "string"}, "description": "Texts."}

@tool("calculate", "Calculate.", {"expression": TEXT})
def calculate(data, expression):
    return str(eval(expression))

@tool("think", "Think.", {"thought": TEXT})
def think(data, thought):
    return ""

@tool("transfer_to_human_agents", "Hand over to a human.", {"summary": TEXT})
def transfer(data, summary):
    return "Done"

@tool("get_user_details", "A user's details.", {"user_id": TEXT})
def get_user(data, user_id):
    return json.dumps(data["users"][user_id])  # raises for a user that is not there

@tool("get_RECORD_details", "The details of one RECORD.", {"RECORD_id": TEXT})
def get_record(data, RECORD_id):
    if RECORD_id not in data["RECORDs"]:
        return "Error: RECORD not found"
    return json.dumps(data["RECORDs"][RECORD_id])

@tool("cancel_RECORD", "Cancel a RECORD.", {"RECORD_id": TEXT})
def cancel(data, RECORD_id):
    if data["RECORDs"][RECORD_id]["status"] != "open":
        return "Error: only what is open can be cancelled"
    data["RECORDs"][RECORD_id]["status"] = "cancelled"
    return json.dumps(data["RECORDs"][RECORD_id])

@tool("set_labels", "Give a RECORD labels.", {"labels": LIST, "RECORD_id": TEXT})  # in another order than the function's
def set_labels(data, RECORD_id, labels):
    data["RECORDs"][RECORD_id]["labels"] = labels  # by reference
    return "labelled"

ALL_TOOLS = [calculate, think, transfer, get_user, get_record, cancel, set_labels]
'''
TAU_DATA = """
import json, os
def load_data():
    with open(os.path.join(os.path.dirname(__file__), "data.json")) as file:
        return json.load(file)
"""
TAU_TASKS = """
from tau_bench.types import Action, Task
TASKS = [
    Task("ada_1", "You are Ada. You want the first one cancelled.", [Action("cancel_RECORD", {"RECORD_id": "#W0000001"})], []),
    Task("ada_1", "You are Ada. You ask how much 20 and 22.5 are.", [Action("calculate", {"expression": "20 + 22.5"})], ["42.5"]),
    Task("bob_2", "You are Bob. You want two labels.", [
        Action("get_RECORD_details", {"RECORD_id": "#W9999999"}),
        Action("set_labels", {"RECORD_id": "#W0000002", "labels": ["red", "round"]})], ["Red"]),
    Task("bob_2", "You are Bob, and only want to chat.", [Action("think", {"thought": "hm"})], []),
]
"""

TAU_ENV = """
import importlib
from contextlib import suppress
from types import SimpleNamespace

class Env:
    def __init__(self, name, number):
        data, tools, tasks = (importlib.import_module(f"tau_bench.envs.{name}.{part}") for part in ("data", "tools", "tasks_test"))
        self.load, self.tasks, self.user = data.load_data, tasks.TASKS, SimpleNamespace()
        self.tools = {tool.get_info()["function"]["name"]: tool for tool in tools.ALL_TOOLS}
        self.data = self.load()
    def reset(self, number):
        self.data, self.task, self.said = self.load(), self.tasks[number], []
        self.user.reset(self.task.instruction)
    def step(self, action):
        if action.name == "respond":
            self.said.append(action.kwargs["content"].lower().replace(",", ""))
            done = self.user.step(action.kwargs["content"]) == "###STOP###"
        else:
            self.act(self.data, action)
            done = action.name == "transfer_to_human_agents"
        return SimpleNamespace(done=done, reward=float(done and self.succeeds()))
    def act(self, data, action):
        with suppress(Exception):  # whose text the agent would have read
            self.tools[action.name].invoke(data, **action.kwargs)
    def succeeds(self):
        data = self.load()
        for action in self.task.actions:
            self.act(data, action)
        return data == self.data and all(any(output.lower() in text for text in self.said) for output in self.task.outputs)
"""
TAU_ENVS = """
from tau_bench.envs.base import Env
def get_env(env_name, user_strategy, user_model, task_split, task_index):
    return Env(env_name, task_index)
"""


def make_tau_bench(folder: Path) -> Path:
    """Write a stand-in for TauBench; return its path."""
    wants_it = "import litellm  # which is not installed: the adapter has to do without the packages as a whole"
    write(folder / "tau_bench/__init__.py", wants_it)
    write(folder / "tau_bench/types.py", TAU_TYPES)
    write(folder / "tau_bench/envs/base.py", TAU_ENV)
    write(folder / "tau_bench/envs/user.py", "class BaseUserSimulationEnv:\n    pass")
    write(folder / "tau_bench/envs/__init__.py", f"{wants_it}\n{TAU_ENVS}")
    for name, record, splits in [("retail", "order", ("test", "train", "dev")), ("airline", "reservation", ("test",))]:
        place = folder / "tau_bench/envs" / name
        users = {user_id: {"name": {"first_name": first, "last_name": "Stone"}, "address": {"zip": "80201"}, f"{record}s": [number]}
                 for user_id, first, number in [("ada_1", "Ada", "#W0000001"), ("bob_2", "Bob", "#W0000002")]}
        records = {number: {f"{record}_id": number, "user_id": user_id, "status": "open", "price": 5}
                   for user_id, user in users.items() for number in user[f"{record}s"]}
        users["cy_3"] = users["bob_2"] | {f"{record}s": []}
        write(place / "data/data.json", json.dumps({"users": users, f"{record}s": records}))
        write(place / "data/__init__.py", TAU_DATA)
        write(place / "__init__.py", wants_it)
        write(place / "tools/__init__.py", TAU_TOOLS.replace("RECORD", record))
        write(place / "wiki.py", f"WIKI = 'The rules of {name}: be kind.'")
        for split in splits:
            write(place / f"tasks_{split}.py", TAU_TASKS.replace("RECORD", record))
    return folder


M3_BASE = """
import ast
from collections import namedtuple
ToolType = namedtuple("ToolType", ["name", "description", "function", "fn_signature"])
task_iterators = []
def register(tasks):
    task_iterators.append((tasks, len(tasks)))
class Task:
    def __init__(self, name, tools, instruction, expected_output):
        self.name, self.tools, self.instruction, self.expected_output = name, tools, instruction, expected_output
        print("Expected Output:", expected_output)
        self.reset()
    def reset(self):
        if callable(self.tools):
            self.tools = self.tools()
    def check_answer(self, answer):
        try:
            return ast.literal_eval(answer) == self.expected_output or int(ast.literal_eval(answer)) == int(self.expected_output)
        except (ValueError, SyntaxError, TypeError):
            return answer == str(self.expected_output)
"""
M3_MODULES = {
    "message_decoder": '''
from ..base import Task, ToolType, register
def turn(s: str):
    return s[::-1]
TOOLS = {"turn": ToolType("turn", "Turns a text around.", turn, "turn(string: str) -> str")}  # it takes s
def largest(*args):
    return max(args)
TOOLS["largest"] = ToolType("largest", "The largest.", largest, "largest(*args: float) -> float")
TOOLS["max"] = ToolType("max", "The largest.", max, "max(*args: float) -> float")
register([Task("message_decoder/turn", TOOLS, "Turn 'olleh' around.", "hello")])
''',
    "trade_calculator": '''
from ..base import Task, ToolType, register
def convert_currency(base_price, conversion_rate):
    return base_price * conversion_rate
def calculator(expression):
    return eval(expression)
TOOLS = {"convert_currency": ToolType("convert_currency", "Converts.", convert_currency,
                                      "convert_currency(base_price: float, conversion_rate: float) -> float"),
         "calculator": ToolType("calculator", "Calculates.", calculator, "calculator(expression: str) -> float")}
register([Task("trade_calculator/convert", TOOLS, "Convert 45.81 at 1.5.", 68.715),
          Task("trade_calculator/several", TOOLS, "Convert 1 and 2 at 1.5.", [1.5, 3.0])])
''',
    "travel_itinerary_planning": '''
from ..base import Task, ToolType, register
HOTELS = [{"place": "Ulm", "price": 80}]
def hotels(place: str, *preferences: str):
    if place != "Ulm":
        raise ValueError(f"there is no hotel in {place}")
    return HOTELS
TOOLS = {"hotels": ToolType("hotels", "Finds hotels.", hotels, "hotels(place: str, *preferences: str) -> list")}
register([Task("travel_itinerary_planning/ulm", TOOLS, "What is a night in Ulm?", 80)])
''',
    "dna_sequencer": '''
from ..base import Task, ToolType, register
def count(dna):
    return {letter: dna.count(letter) for letter in dna}
TOOLS = {"count": ToolType("count", "Counts letters.", count, "count(dna: str) -> dict")}
register([Task("dna_sequencer/count", TOOLS, "Count the letters of AAC.", {"A": 2, "C": 1})])
''',
    "web_browsing/__init__": '''
import json, os
from collections import deque
from ...base import Task, ToolType, register
class Page:
    def __init__(self, name, content):
        self.name, self.content = name, content
class WebBrowser:
    def __init__(self, pages, default_page):
        self.page_name_to_page = {page.name: page for page in pages}
        self.current_page, self.page_history, self.scroll_position = None, deque(), 0
        self._open_page(default_page)
        self.page_history.clear()
    def _open_page(self, name):
        self.page_history.append(self.current_page)
        self.current_page, self.scroll_position = self.page_name_to_page[name], 0
        self.lines = self.current_page.content.split("\\n")
        return self.view()
    def view(self):
        return "\\n".join(self.lines[self.scroll_position:self.scroll_position + 2])
    def click_url(self, url):
        return self._open_page(url) if url in self.page_name_to_page else "[URL not found.]"
    def go_to_previous_page(self):
        if not self.page_history:
            return "[No previous page.]"
        self.current_page = self.page_history.pop()
        self.lines, self.scroll_position = self.current_page.content.split("\\n"), 0
        return self.view()
    def scroll_down(self):
        self.scroll_position += 2
        return self.view()
def calculator(expression):
    return eval(expression)
with open(os.path.join(os.path.dirname(__file__), "web_pages.jsonl")) as file:
    PAGES = [Page(**json.loads(line)) for line in file]
def create_tools():
    browser = WebBrowser(PAGES, "/")
    tools = {name: ToolType(name, f"Does {name}.", getattr(browser, name), f"{name}({'url: str' if name == 'click_url' else ''}) -> str")
             for name in ("click_url", "go_to_previous_page", "scroll_down", "view")}
    return tools | {"calculator": ToolType("calculator", "Calculates.", calculator, "calculator(expression: str) -> float")}
register([Task("web_browsing/tea", create_tools, "What does tea cost?", 3.5), Task("web_browsing/boss", create_tools, "Who leads?", "Mia Moon")])
''',
}


def make_m3tooleval(folder: Path) -> Path:
    """Write a stand-in for M3ToolEval; return its path."""
    names = [name.removesuffix("/__init__") for name in M3_MODULES]
    write(folder / "tasks/__init__.py", f"from . import base, repl\nfrom .impl import {', '.join(names)}\nfrom .repl import PythonREPL\n")
    write(folder / "tasks/base.py", M3_BASE)
    write(folder / "tasks/repl.py", "import a_library_that_is_not_installed")
    write(folder / "tasks/impl/__init__.py", "")
    for name, source in M3_MODULES.items():
        write(folder / f"tasks/impl/{name}.py", source)
    pages = {"/": "Welcome\nsee /shop\nand /team\nbye", "/shop": "tea 3.5\ncake 4", "/team": "we are\nmany\nbut\nMia Moon leads"}
    write(folder / "tasks/impl/web_browsing/web_pages.jsonl", "\n".join(json.dumps({"name": n, "content": c}) for n, c in pages.items()))
    write(folder / "tasks/impl/web_browsing/metadata.json", "{}")
    return folder


def write(path: Path, text: str) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
