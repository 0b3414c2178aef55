"""The adapters against the real benchmarks, where the environment says where their checkouts are.

    TAU_BENCH=PATH M3TOOLEVAL=PATH python -m pytest tests/test_checkouts.py

Where readme.py plays this command, the paths are those of the stand-ins, on which those of the tests run that they can pass.
"""
import ast
import contextlib
import copy
import importlib
import os
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import eval as evaluation  # noqa: E402
import selfchallenge  # noqa: E402
from test_benchmarks import forget_tau_bench, loaded  # noqa: E402
from tools import Airline, Calculation, Retail, WebBrowsing  # noqa: E402
from verify import Jail, judge  # noqa: E402

needs_tau_bench = pytest.mark.skipif("TAU_BENCH" not in os.environ, reason="TAU_BENCH names no checkout")
needs_m3tooleval = pytest.mark.skipif("M3TOOLEVAL" not in os.environ, reason="M3TOOLEVAL names no checkout")


@pytest.fixture(scope="module")
def jail():
    with Jail(allow_weak=True) as jail:
        yield jail


@pytest.fixture(scope="module")
def tau_bench():
    with loaded(tau_bench=os.environ["TAU_BENCH"], any_version=True):
        yield


@pytest.fixture(scope="module")
def m3tooleval():
    with loaded(m3tooleval=os.environ["M3TOOLEVAL"], any_version=True):
        yield


@needs_tau_bench
@needs_m3tooleval
def test_the_checkouts_are_of_the_known_versions():
    with loaded(os.environ["M3TOOLEVAL"], os.environ["TAU_BENCH"]):
        assert len(Calculation.held_out) + len(WebBrowsing.held_out) == 82 and len(Retail.held_out) == 115


# ---------------------------------------------------------------------------------------------------
# TauBench

SPLITS = {  # (world, split): the number of tasks, and those that doing nothing passes
    (Retail, "test"): (115, [10, 12, 25, 50, 57, 65, 106]),
    (Retail, "train"): (500, [161, 214, 229, 288, 349]),
    (Retail, "dev"): (20, [17]),
    (Airline, "test"): (50, [12, 13, 15, 17, 18, 21, 24, 29, 35, 36, 37, 38, 39, 40, 41, 42, 47, 48, 49]),
}


@needs_tau_bench
@pytest.mark.parametrize("kind, split", SPLITS, ids=lambda value: getattr(value, "name", value))
def test_the_reference_always_passes_and_doing_nothing_where_it_is_known_to(tau_bench, kind, split):
    if split != "test":
        tasks = vars(importlib.import_module(f"tau_bench.envs.{kind.name}.tasks_{split}"))[f"TASKS_{split.upper()}"]
        other = type(kind.__name__, (kind,), {"held_out": tasks})  # with references of its own
    else:
        other = kind
    idle, passed = other(0), []
    for number in range(len(other.held_out)):
        environment = other(0)
        assert environment.passes(number, environment.solve(number)), (split, number)
        if idle.passes(number, []):
            passed.append(number)
    assert (len(other.held_out), passed) == SPLITS[kind, split]


@needs_tau_bench
def test_airline_has_the_papers_thirty_tasks(tau_bench):
    left_out = {12, 13, 15, 17, 18, 21, 24, 29, *range(35, 43), 44, 47, 48, 49}
    assert {task.number for task in evaluation.load_suite("airline")} == set(range(50)) - left_out
    assert len(evaluation.load_suite("airline", "all")) == 50 and len(evaluation.load_suite("retail")) == 115


def perturbed(actions, generator):
    """Drop, repeat, swap or alter one of the actions."""
    actions = copy.deepcopy(actions)
    place = generator.randrange(len(actions))
    change = generator.choice(["drop", "repeat", "swap", "alter"])
    if change == "drop":
        del actions[place]
    elif change == "repeat":
        actions.insert(place, copy.deepcopy(actions[place]))
    elif change == "swap":
        other = generator.randrange(len(actions))
        actions[place], actions[other] = actions[other], actions[place]
    elif change == "alter" and actions[place].kwargs:
        name = generator.choice(list(actions[place].kwargs))
        value = actions[place].kwargs[name]
        actions[place].kwargs[name] = value[:-1] if isinstance(value, (str, list)) else value + 1
    return actions, generator.random() < 0.5  # whether the outputs are said


@contextlib.contextmanager
def the_benchmarks_own_package():
    """Import tau_bench as its users do, with a stand-in for the library of language models that it imports."""
    forget_tau_bench()
    sys.modules.setdefault("litellm", ModuleType("litellm")).completion = None
    sys.modules["litellm"].provider_list = []
    sys.path.insert(0, os.environ["TAU_BENCH"])
    try:
        import tau_bench.envs.airline
        import tau_bench.envs.retail
        yield tau_bench.envs.get_env
    finally:
        sys.path.remove(os.environ["TAU_BENCH"])
        forget_tau_bench()


def own_reward(get_env, name, number, actions, said):
    """The reward that the benchmark's own environment gives to these actions and messages."""
    from tau_bench.envs.user import BaseUserSimulationEnv
    from tau_bench.types import Action

    class Silent(BaseUserSimulationEnv):
        def reset(self, instruction=None):
            return ""

        def step(self, content):
            return "###STOP###" if content == "" else "go on"

        def get_total_cost(self):
            return 0.0

    env = get_env(name, user_strategy="human", user_model="x", task_split="test", task_index=number)
    env.user = Silent()
    env.reset(number)
    for action in actions:
        if (response := env.step(copy.deepcopy(action))).done:  # it must not be asked again
            return response.reward
    for message in said:
        env.step(Action(name="respond", kwargs={"content": message}))
    return env.step(Action(name="respond", kwargs={"content": ""})).reward


@needs_tau_bench
def test_rewards_agree_with_the_benchmarks_own_on_perturbed_actions(tau_bench):
    generator, seen = random.Random(0), {0.0: 0, 1.0: 0}
    with the_benchmarks_own_package() as get_env:
        while sum(seen.values()) < 300:
            kind = Airline if generator.random() < 0.1 else Retail
            number = generator.randrange(len(kind.held_out))
            task = kind.held_out[number]
            if not task.actions:
                continue
            actions, telling = perturbed(task.actions, generator)
            if actions == task.actions:  # such as one that was swapped with itself
                continue
            environment = kind(0)
            environment.replay(actions)
            said = [action.kwargs["content"] for action in actions if action.name == "respond"] + (task.outputs if telling else [])
            expected = own_reward(get_env, kind.name, number, actions, task.outputs if telling and not environment.over else [])
            if environment.over and telling and task.outputs:  # our replay tells the outputs after the end, theirs cannot
                continue
            assert environment.passes(number, said) == bool(expected), (kind.name, number, actions)
            seen[expected] += 1
    assert sum(seen.values()) == 300 and min(seen.values()) >= 50, seen


@needs_tau_bench
def test_a_task_on_the_real_database_passes_the_filter(tau_bench, jail):
    environment = Retail(3)
    pending = [number for number, order in environment.state["orders"].items() if order["status"] == "pending"]
    first, second = pending[:2]
    task = selfchallenge.CodeAsTask(
        env="retail", seed=3, instruction=f"Cancel {first}.",
        evaluate=f"def evaluate():\n    return get_order_details('{first}')['status'] == 'cancelled'",
        solution=f"cancel_pending_order('{first}', 'no longer needed')",
        failures=[f"cancel_pending_order('{second}', 'no longer needed')", f"get_order_details('{first}')", "think('hm')"])
    assert judge(jail, task).ok


@needs_tau_bench
def test_two_episodes_never_see_each_others_database(tau_bench, jail):
    for kind, noun, cancel in [(Retail, "order", "cancel_pending_order(n, 'no longer needed')"), (Airline, "reservation", "cancel_reservation(n)")]:
        first, second = kind(0), kind(0)
        number = next(n for n, record in first.state[kind.numbers].items() if record.get("status", "pending") == "pending")
        with jail.session(first) as one, jail.session(second) as other:
            assert one.run(f"n = {number!r}\nresult = {cancel}['status']").value == "cancelled"
            assert other.run(f"result = get_{noun}_details({number!r}).get('status', 'pending')").value == "pending"
        assert second.state == kind(1).state != first.state


# ---------------------------------------------------------------------------------------------------
# M3ToolEval

@needs_m3tooleval
def test_two_episodes_never_see_each_others_page(m3tooleval, jail):
    page = next(page.name for page in WebBrowsing.pages if page.name != "/")
    with jail.session(WebBrowsing(0)) as one, jail.session(WebBrowsing(0)) as other:
        home = other.run("result = view()").value
        assert one.run(f"result = click_url({page!r})").value != home
        assert other.run("result = view()").value == home
        assert one.run("result = view()").value != home


@needs_m3tooleval
def test_all_references_of_m3tooleval_pass(m3tooleval):
    groups = {}
    for kind in (Calculation, WebBrowsing):
        for number, task in enumerate(kind.held_out):
            groups.setdefault(task.name.partition("/")[0], []).append(number)
            environment = kind(kind(0).place(number)[0])
            assert environment.passes(number, environment.solve(number)) and environment.passes_tolerantly(number, environment.solve(number))
            assert not environment.passes(number, None) and not environment.passes_tolerantly(number, None)
    assert {name: len(numbers) for name, numbers in groups.items()} == {
        "message_decoder": 8, "cryptobotanists_plant_dna_sequencer": 8, "trade_calculator": 17, "travel_itinerary_planning": 15, "web_browsing": 34}


def reference_programs(domain):
    """The expressions by which a module of the benchmark computes what it expects, as programs that call its tools."""
    sources = [path.read_text() for path in Path(os.environ["M3TOOLEVAL"]).rglob("tasks/impl/*.py")]
    (source,) = [source for source in sources if re.search(f"['\"]{domain}['\"]", source)]
    module, tools = ast.parse(source), set(Calculation.domains[domain])
    helpers = [node for node in module.body if isinstance(node, (ast.FunctionDef, ast.Assign)) and not uses(node, {"Task", "ToolType"})
               and getattr(node, "name", None) not in tools]
    programs = []
    for call in (node for node in ast.walk(module) if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Task"):
        (expected,) = [keyword.value for keyword in call.keywords if keyword.arg == "expected_output"]
        programs.append((call.lineno, "\n".join(map(ast.unparse, helpers)) + f"\nresult = {ast.unparse(expected)}"))
    return [program for _, program in sorted(programs)]


def uses(node, names):
    return any(isinstance(inner, ast.Name) and inner.id in names for inner in ast.walk(node))


WEB_PROGRAM = r"""
import re
pages, waiting = {}, ["/"]
while waiting:
    url = waiting.pop()
    text = view() if url == "/" else click_url(url)
    while "[Reached the bottom" not in (more := scroll_down()):
        text += more
    pages[url] = text
    waiting += [link for link in re.findall(r"\[Clickable '([^']+)'\]", text) if link not in pages]
text = "\n".join(pages.values())
prices = {item: float(price) for item, price in re.findall(r"Item: (.+)\n(?:.*\n)*?.*Price: \$([\d.]+)\n", text)}
people = {name: {"department": department, "expertise": expertise, "email": email, "phone number": phone}
          for name, department, expertise, email, phone in re.findall(
              r"\n([^\n]+) of (.+) Department\nExpertise: (.+)\nEmail: (.+)\nPhone: (.+)\n", text)}
if wanted := re.search(r"(?:the|The) (email|department|phone number|expertise) of ([^.\n]+)\.\n", task):
    result = people[wanted[2]][wanted[1]]
elif wanted := re.search(r"current price of ([^.\n]+)\.\n", task):
    result = prices[wanted[1]]
elif wanted := re.search(r"total price of \[(.+)\]", task):
    result = sum(prices[item] for item in wanted[1].split(", ")) * (0.9 if "10% off" in task else 1)
elif wanted := re.search(r"in the (.+) Department", task):
    result = sum(person["department"] == wanted[1] for person in people.values())
elif wanted := re.search(r"phone number is (.+)\?", task):
    result = [name for name, person in people.items() if person["phone number"] == wanted[1]][0]
"""


@needs_m3tooleval
def test_programs_in_the_jail_reach_the_right_answers(m3tooleval, jail):
    jail.seconds, before = 10.0, jail.seconds
    right, wrong = [], []
    for domain in Calculation.domains:
        numbers = [number for number, task in enumerate(Calculation.held_out) if task.name.startswith(domain)]
        for number, program in zip(numbers, reference_programs(domain), strict=True):
            answer = run(jail, Calculation(list(Calculation.domains).index(domain)), program)
            (right if Calculation(0).passes(number, answer) else wrong).append(Calculation.held_out[number].name)
    for number, task in enumerate(WebBrowsing.held_out):
        answer = run(jail, WebBrowsing(0), f"task = {task.instruction!r}\n{WEB_PROGRAM}")
        (right if WebBrowsing(0).passes(number, answer) else wrong).append(task.name)
    jail.seconds = before
    assert (len(right), len(wrong)) == (77, 5), wrong
    assert all("match_phone_number" in name or "customer_support" in name for name in wrong)  # behind a broken link


def run(jail, environment, code):
    with jail.session(environment) as session:
        outcome = session.run(code)
    return outcome.error if outcome.value is None else outcome.value


@needs_m3tooleval
def test_the_worked_example_for_the_challenger_is_a_task(m3tooleval, jail):
    assert judge(jail, selfchallenge.EXAMPLES["calculation"]).ok
