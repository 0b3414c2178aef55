"""The paper's four worlds: adapters, users and suites, on stand-ins written here and, where there are checkouts, on them.

    TAU_BENCH=... M3TOOLEVAL=... pytest tests/test_benchmarks.py      (paths of checkouts: the real checks run too)
"""
import contextlib
import importlib
import io
import json
import math
import pickle
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import eval as evaluation  # noqa: E402
import rl  # noqa: E402
import selfchallenge  # noqa: E402
import tools  # noqa: E402
from stand_ins import make_m3tooleval, make_tau_bench  # noqa: E402
from test_selfchallenge import KEPT, handed_in  # noqa: E402
from tools import Airline, BenchmarkError, Calculation, M3ToolEval, Retail, TauBench, ToolError, WebBrowsing  # noqa: E402
from verify import CodeAsTask, Jail, judge, parse_task  # noqa: E402

WORLDS = (Calculation, WebBrowsing, Retail, Airline)


@pytest.fixture(scope="module")
def jail():
    with Jail(allow_weak=True) as jail:
        yield jail


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """The paths of the two stand-ins, which are loaded."""
    folder = tmp_path_factory.mktemp("checkouts")
    paths = str(make_m3tooleval(folder / "m3")), str(make_tau_bench(folder / "tau"))
    with loaded(*paths, any_version=True):
        yield paths


class loaded:
    """Load checkouts, and afterwards forget them, so that the next test can load others."""

    def __init__(self, m3tooleval=None, tau_bench=None, any_version=False):
        self.paths = m3tooleval, tau_bench, any_version

    def __enter__(self):
        self.modules = {name for name in sys.modules}
        self.classes = {kind: dict(vars(kind)) for kind in (M3ToolEval, TauBench, *WORLDS)}
        forget_tau_bench()
        for kind in WORLDS:
            kind.held_out = []
        try:
            tools.load_benchmarks(*self.paths)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception):
        forget_tau_bench()
        TauBench.reference_digest.__func__.cache_clear()
        for kind, attributes in self.classes.items():
            for name in set(vars(kind)) - set(attributes):
                delattr(kind, name)
            for name, value in attributes.items():
                if not name.startswith("__") and vars(kind)[name] is not value:
                    setattr(kind, name, value)


def forget_tau_bench():
    for name in [name for name in sys.modules if name.partition(".")[0] == "tau_bench"]:
        del sys.modules[name]


def run(jail, environment, code):
    with jail.session(environment) as session:
        outcome = session.run(code)
    assert outcome.error is None, outcome.error
    return outcome.value


# ---------------------------------------------------------------------------------------------------
# checkouts

def test_a_world_without_a_checkout_says_which_one_it_needs():
    for kind in WORLDS:
        if not kind.held_out:
            with pytest.raises(BenchmarkError, match=f"{kind.name} needs a checkout of .* --(m3tooleval|tau-bench) PATH .*git clone"):
                tools.make_environment(kind.name)


def test_what_is_no_checkout_gets_a_sentence(tmp_path):
    for kind in (M3ToolEval, TauBench):
        with pytest.raises(BenchmarkError, match=f"no checkout of {kind.benchmark}.*{re.escape(kind.clone)}"):
            kind.load(tmp_path)


def test_an_incomplete_checkout_gets_a_sentence(tmp_path):
    folder = make_m3tooleval(tmp_path)
    (folder / "tasks/impl/web_browsing/web_pages.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BenchmarkError, match="tasks/impl/web_browsing/web_pages.jsonl is missing or incomplete"):
        M3ToolEval.load(folder, any_version=True)


def test_another_version_needs_a_flag(tmp_path):
    folder = make_tau_bench(tmp_path)
    with pytest.raises(BenchmarkError, match="checkout of TauBench.*envs/base.py is not the known version.*--any-version"):
        TauBench.load(folder)
    with loaded(tau_bench=folder, any_version=True):
        assert len(Retail.held_out) == len(Airline.held_out) == 4


def test_tau_bench_from_elsewhere_is_refused(checkouts, tmp_path):
    with pytest.raises(BenchmarkError, match="already imported from"):
        TauBench.load(make_tau_bench(tmp_path), any_version=True)


def test_damaged_data_gets_a_sentence(tmp_path):
    folder = make_tau_bench(tmp_path)
    (folder / "tau_bench/envs/retail/data/data.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BenchmarkError, match="incomplete: Expecting value.*git clone"), loaded(tau_bench=folder, any_version=True):
        pass


def test_a_missing_library_gets_a_sentence(tmp_path):
    folder = make_tau_bench(tmp_path)
    (folder / "tau_bench/types.py").write_text("import a_library_that_is_not_installed")
    with pytest.raises(BenchmarkError, match="a_library_that_is_not_installed.*pip install"), loaded(tau_bench=folder, any_version=True):
        pass


def test_a_benchmark_that_judges_wrongly_is_refused(tmp_path):
    folder = make_tau_bench(tmp_path)
    code = folder / "tau_bench/envs/retail/tools/__init__.py"
    code.write_text(code.read_text().replace('["status"] = "cancelled"', '["status"] = __import__("random").random()'))
    with pytest.raises(BenchmarkError, match="retail does not judge its own references"), loaded(tau_bench=folder, any_version=True):
        pass
    base = make_m3tooleval(tmp_path / "m3") / "tasks/base.py"
    base.write_text(base.read_text().replace("return answer == str(self.expected_output)", "return False"))
    with pytest.raises(BenchmarkError, match="the reference answers of 2 fail their own check"), loaded(m3tooleval=base.parent.parent, any_version=True):
        pass


def test_a_task_file_of_foreign_worlds_is_judged_line_by_line(tmp_path):
    (tmp_path / "tasks.jsonl").write_text(retail_task().to_json() + "\n" + CodeAsTask(env="web", seed=0, **GOOD_TASKS["web"]).to_json() + "\n")
    output, _ = script("verify", "tasks.jsonl", "--tau-bench", make_tau_bench(tmp_path / "tau"), "--any-version", "--allow-weak-jail", folder=tmp_path)
    verdicts = [json.loads(line) for line in output.splitlines()]
    assert [verdict["stage"] for verdict in verdicts] == ["ok", "parse"] and "--m3tooleval PATH" in verdicts[1]["reason"]


def test_m3tooleval_may_be_given_by_the_root_of_its_repository_and_shows_no_answer(tmp_path, capfd):
    make_m3tooleval(tmp_path / "scripts/eval/m3tooleval")
    with loaded(m3tooleval=tmp_path, any_version=True):
        assert len(Calculation.held_out) == 5 and len(WebBrowsing.held_out) == 2
    assert capfd.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------
# M3ToolEval

def test_signatures_are_those_of_the_functions(checkouts):
    texts = [Calculation(seed).documentation() for seed in range(4)]
    assert texts[0] == "turn(s: str) -> str\n    Turns a text around.\nlargest(*args) -> int | float\n    The largest."
    assert texts[1].startswith("convert_currency(base_price: int | float, conversion_rate: int | float) -> int | float\n")
    assert texts[2].startswith("hotels(place: str, *preferences)") and texts[3].startswith("count(dna: str) -> dict")


def test_each_domain_has_its_own_tools_and_an_example_to_start_from(checkouts):
    assert [list(Calculation(seed).tools) for seed in range(5)] == [
        ["turn", "largest"], ["convert_currency", "calculator"], ["hotels"], ["count"], ["turn", "largest"]]
    assert {Calculation(seed).starting_point() for seed in (0, 4, 8)} <= {
        "Start from the tools: turn, largest.", "Start from the tools: largest, turn."}


def test_programs_in_the_jail_reach_the_tools(checkouts, jail):
    assert run(jail, Calculation(0), "result = [turn('olleh'), turn(s='ab'), largest(1, 3, 2), max([4, 5], key=lambda n: -n)]") == ["hello", "ba", 3, 4]
    assert run(jail, Calculation(1), "result = calculator('(2 + 3.5) * -4 // 1')") == -22
    assert run(jail, Calculation(3), "result = count('AAC')") == {"A": 2, "C": 1}


@pytest.mark.parametrize("expression", ["9**9**9", "__import__('os').getcwd()", "'x' * 10", "1 if 1 else 2", "(" * 300, "1/0", "[1]", "",
                                        "9" * 5_000, "-" * 400 + "1e400 * 0", "1e999"])
def test_the_calculators_do_arithmetic_alone(checkouts, jail, expression):
    start = time.monotonic()
    environment = Calculation(1)
    try:
        value = environment.call("calculator", [expression], {})
    except ToolError as refusal:
        assert "cannot calculate" in str(refusal) and len(str(refusal)) < 300
    else:
        assert isinstance(value, (int, float)) and not math.isfinite(value)  # which cannot reach the code either
    assert time.monotonic() - start < 1


def test_a_number_that_is_text_cannot_fill_the_memory(checkouts):
    with pytest.raises(ToolError, match="base_price must be int | float, not str"):
        Calculation(1).call("convert_currency", ["x", 10**10], {})


def test_what_a_foreign_tool_raises_is_a_refusal(checkouts):
    with pytest.raises(ToolError, match="ValueError: there is no hotel in Bonn"):
        Calculation(2).call("hotels", ["Bonn"], {})


def test_the_challenger_is_told_of_every_tool_and_sees_a_whole_example(checkouts):
    for kind in WORLDS:
        environment, example = kind(2), selfchallenge.EXAMPLES[kind.name]
        prompt = selfchallenge.challenger_prompt(environment)
        assert all(f"\n{name}(" in prompt for name in environment.tools) and ("serves a customer" in prompt) == environment.has_user
        assert "at most 8 replies" in prompt and ("which the other agent must find" in prompt) == environment.has_user
        assert parse_task(prompt.partition("A worked example")[2], example.env, example.seed) == example


def test_a_number_beyond_all_floats_is_a_wrong_answer_and_no_accident():
    assert not tools.alike("1" * 400, 5) and tools.alike("1" * 400, "1" * 400)


def test_the_same_task_for_another_user_is_a_duplicate(checkouts):
    for kind in (Retail, Airline):
        told = [{"env": kind.name, "seed": seed, "instruction": kind(seed).as_told("Cancel the lamp.")} for seed in (0, 1)]
        assert told[0]["instruction"] != told[1]["instruction"]
        assert selfchallenge.task_words(told[0]) == selfchallenge.task_words(told[1]) == {"cancel", "the", "lamp"}


def test_a_table_that_a_tool_hands_out_stays_as_it_is(checkouts, jail):
    code = "result = hotels('Ulm', 'quiet')\nresult[0]['price'] += 1"
    assert run(jail, Calculation(2), code) == run(jail, Calculation(2), code) == [{"place": "Ulm", "price": 81}]


def test_browsers_share_nothing(checkouts, jail):
    first, second = WebBrowsing(0), WebBrowsing(0)
    assert run(jail, first, "click_url('/team')\nresult = scroll_down()") == "but\nMia Moon leads"
    assert run(jail, second, "result = view()") == "Welcome\nsee /shop"
    assert run(jail, first, "result = [view(), go_to_previous_page(), go_to_previous_page()]") == [
        "but\nMia Moon leads", "Welcome\nsee /shop", "[No previous page.]"]
    assert first.state == second.state == pickle.loads(pickle.dumps(WebBrowsing(5).state))


def test_the_original_check_and_the_tolerant_one(checkouts):
    convert, several = 1, 2  # among Calculation's tasks: 68.715, and [1.5, 3.0]
    world = Calculation(1)
    assert [world.passes(convert, answer) for answer in ("68.715", "68", "68.72", "67")] == [True, True, True, False]
    assert [world.passes_tolerantly(convert, answer) for answer in ("68.715", "68", "68.72", "68.7", "'68.71'")] == [True, False, True, False, True]
    assert world.passes_tolerantly(several, "[1.5, 3]") and not world.passes_tolerantly(several, "[3, 1.5]") and not world.passes_tolerantly(several, "1.5")
    boss = WebBrowsing(0)
    assert boss.passes_tolerantly(1, "mia moon ") and not boss.passes(1, "mia moon") and boss.passes(1, "Mia Moon")
    assert all(Calculation(3).passes(4, answer) for answer in ({"A": 2, "C": 1}, '{"A": 2, "C": 1}', "{'C': 1, 'A': 2}"))
    assert not any(world.passes(number, None) or world.passes_tolerantly(number, None) for number in range(5))
    assert not world.passes(convert, "(" * 10_000) and not world.passes_tolerantly(convert, "-" * 10_000)


# ---------------------------------------------------------------------------------------------------
# TauBench

def test_failure_is_an_exception_and_json_is_data(checkouts, jail):
    code = """
refused = []
for call in (lambda: get_order_details("#W9"), lambda: get_user_details("nobody"), lambda: cancel_order(5), lambda: cancel_order()):
    try: call()
    except ToolError as error: refused.append(str(error))
result = [refused, get_order_details("#W0000001")["status"], think("hm"), calculate("20 + 22.5")]
"""
    refused, status, thought, number = run(jail, Retail(0), code)
    assert refused == ["order not found", "KeyError: 'nobody'", "cancel_order: order_id must be str, not int",
                       "cancel_order: missing a required argument: 'order_id'"]
    assert (status, thought, number) == ("open", "", 42.5)


def test_arguments_go_by_the_order_of_the_function(checkouts, jail):
    environment = Retail(0)
    assert "set_labels(order_id: str, labels: list)\n    Give a order labels.\n    order_id: A text.\n    labels: Texts." in environment.documentation()
    assert run(jail, environment, "mine = ['a']\nset_labels('#W0000001', mine)\nmine.append('b')\nresult = get_order_details('#W0000001')['labels']") == ["a"]


def test_episodes_never_see_each_others_state(checkouts, jail):
    first, second = Retail(0), Retail(0)
    run(jail, first, "cancel_order('#W0000001')")
    assert second.state["orders"]["#W0000001"]["status"] == "open" and Retail(0).state == second.state != first.state
    airline = Airline(0)
    assert run(jail, airline, "result = get_reservation_details('#W0000001')['status']") == "open"


def test_a_transfer_ends_the_episode(checkouts, jail):
    environment = Retail(0)
    assert "the conversation has ended" in run(jail, environment, """
transfer_to_human_agents("I cannot help")
try: cancel_order("#W0000001")
except ToolError as error: result = str(error)""")
    assert environment.over and environment.state == Retail(0).state


def test_a_task_may_end_with_a_transfer_and_is_judged_all_the_same(checkouts, jail):
    task = CodeAsTask(
        "retail", 0, "Cancel it, and have the rest done.",
        evaluate="def evaluate(): return get_order_details('#W0000001')['status'] == 'cancelled'",
        solution="cancel_order('#W0000001')\ntransfer_to_human_agents('the rest')",
        failures=["transfer_to_human_agents('all')", "get_order_details('#W0000001')", "x = 1"])
    judgement = judge(jail, task)
    assert judgement.ok, judgement.reason


def test_the_database_is_compared_as_text(checkouts):
    environment, other = Retail(0), Retail(0)
    other.state["orders"]["#W0000001"]["price"] = 5.0
    assert environment.state == other.state and environment.digest() != other.digest()
    environment.state["orders"] = dict(reversed(environment.state["orders"].items()))
    assert environment.digest() == Retail(0).digest()


def test_rewards_on_the_stand_in(checkouts):
    for kind in (Retail, Airline):
        for number in range(4):
            environment = kind(0)
            assert environment.passes(number, environment.solve(number))
        assert [number for number in range(4) if kind(0).passes(number, None)] == [3]
        assert [kind(0).writes(number) for number in range(4)] == [True, False, True, False]
        environment = kind(0)
        environment.solve(2)
        assert not environment.passes(2, ["Blue."]) and environment.passes(2, ["Is it red, or green?"])


def test_an_instruction_says_who_the_user_is_but_no_order_number(checkouts):
    environment = Retail(0)
    told = environment.as_told("Cancel #W0000001 (or W0000002), not #W1234567.")
    assert told == (f"You are {'Ada' if environment.user == 'ada_1' else 'Bob'} Stone, user id {environment.user}, zip code 80201. "
                    "Cancel [number withheld] (or [number withheld]), not #W1234567.")
    assert {Retail(seed).starting_point() for seed in range(20)} == {"Start from the user ada_1.", "Start from the user bob_2."}


def retail_task(**parts):
    number = "#W0000001"
    return CodeAsTask(**{**dict(
        env="retail", seed=0, instruction=f"Cancel {number}.",
        evaluate=f"def evaluate():\n    return get_order_details('{number}')['status'] == 'cancelled'",
        solution=f"cancel_order('{number}')",
        failures=["cancel_order('#W0000002')", f"get_order_details('{number}')", f"set_labels('{number}', ['cancelled'])"]), **parts})


def test_the_filter_judges_a_task_in_a_foreign_world(checkouts, jail):
    assert judge(jail, retail_task()).ok
    assert judge(jail, retail_task(solution="cancel_order('#W7')")).stage == "runs"
    assert judge(jail, retail_task(solution="cancel_order('#W0000002')")).stage == "solution"


# ---------------------------------------------------------------------------------------------------
# users and conversations

CANCEL = "THOUGHT: do it END THOUGHT\nACTION:\ncancel_order('#W0000001')\nEND ACTION"


def conversation(jail):
    return rl.executor(jail, retail_task())


def test_a_conversation_from_its_first_word_to_its_reward(checkouts, jail):
    episode = conversation(jail)
    assert episode.asks and len(episode.messages) == 1 and "#W0000001" not in episode.messages[0]["content"]
    assert "The rules of retail: be kind." in episode.messages[0]["content"]
    assert episode.hear("Hi, cancel my first order.") == "Customer:\nHi, cancel my first order." and not episode.asks
    assert "no output" in episode.step(CANCEL)
    assert episode.step("ANSWER: It is done. END ANSWER") == "" and episode.asks
    assert episode.conversation[-1] == {"role": "user", "content": "It is done."}
    assert episode.hear("THOUGHT: he did it END THOUGHT Thanks!\n###STOP###") is None
    assert (episode.reward, episode.status, episode.said) == (1.0, "answered", ["It is done."])


def test_a_user_who_fails_is_no_failure_of_the_agent(checkouts, jail):
    episode = conversation(jail)
    assert episode.hear(None) is None and math.isnan(episode.reward) and episode.status == "user failed"


def test_a_transfer_ends_the_conversation(checkouts, jail):
    episode = conversation(jail)
    episode.hear("Hi")
    assert episode.step("ACTION:\ntransfer_to_human_agents('x')\nEND ACTION") is None and episode.status == "answered" and episode.reward == 0


def test_fifteen_turns_are_the_limit_of_a_conversation(checkouts, jail):
    episode = conversation(jail)
    episode.hear("Hi")
    for turn in range(15):
        reply = episode.step("ANSWER: hm END ANSWER")
        if turn < 14:
            assert reply == "" and episode.hear("Please!")
    assert reply is None and not episode.asks and episode.status == "out of steps" and episode.reward == 0


@pytest.mark.parametrize("written, said", [
    ("Hi there", "Hi there"), ("<think>he must not know</think>Hi", "Hi"), ("THOUGHT: secret END THOUGHT\nHi", "Hi"),
    ("<think>never closed: secret", "(The customer says nothing.)"), ("THOUGHT: secret", "(The customer says nothing.)"),
    ("Bye. ###STOP###", "###STOP###"), ("", "(The customer says nothing.)")])
def test_a_user_never_leaks_its_thought(written, said):
    assert tools.spoken(written) == said


@pytest.fixture(scope="module")
def policy():
    return rl.load_policy("tiny")


def scripted_user(lines):
    """Return a user who says these lines in turn, and then stops."""
    def reply(conversations) -> list[str]:
        turns = [sum(message["role"] == "assistant" for message in conversation) for conversation in conversations]
        return [lines[turn] if turn < len(lines) else tools.STOP for turn in turns]
    return reply


def test_a_rollout_with_a_scripted_user(checkouts, jail, policy):
    episodes = [conversation(jail) for _ in range(4)]
    trajectories = rl.rollout(policy, episodes, rl.seeded(policy.device, 1), user=scripted_user(["Hello", "Yes", "Yes"]), turn_tokens=12, context=400)
    for episode, trajectory in zip(episodes, trajectories):
        assert episode.status != "running"
        assert episode.messages[1]["content"] == "Customer:\nHello"
        assert rl.record("train", 0, episode)["instruction"] == "Cancel #W0000001."
        assert all(trajectory.mask[i] or trajectory.logprobs[i] == 0 for i in range(len(trajectory.tokens)))


def test_the_policys_own_base_plays_the_user_whatever_the_adapter(checkouts, jail, policy):
    def first_words():
        episodes = [conversation(jail) for _ in range(3)]
        rl.rollout(policy, episodes, rl.seeded(policy.device, 2), turn_tokens=8, context=300)
        return [episode.messages[1]["content"] for episode in episodes]

    before = first_words()
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    saved = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for p in weights:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert first_words() == before
    with torch.no_grad():
        for p, old in zip(weights, saved):
            p.copy_(old)
    assert all(p.requires_grad for p in weights)


def test_a_failed_user_counts_for_nobody(checkouts, jail, policy):
    def sometimes(conversations):
        return [None if number % 2 else "###STOP###" for number, _ in enumerate(conversations)]
    records = []
    results = evaluation.evaluate_policy(policy, jail, {"retail": evaluation.load_suite("retail")}, 0, 4, user=sometimes, write=records.extend)
    assert [r["reward"] for r in records[:4]] == [0, None, 0, None] and {r["status"] for r in records} == {"answered", "user failed"}
    assert results["retail"]["user_failed"] == 10 and results["retail"]["pass@1"] == 0.25 and json.dumps(records)
    assert "retail (10 episodes not counted)" in evaluation.format_table(results)
    assert evaluation.chosen_trajectories(records)  # which sorts by the reward
    with pytest.raises(ValueError, match="endpoint"):
        evaluation.evaluate_policy(policy, jail, {"retail": evaluation.load_suite("retail")}, 0, 4, user=lambda c: [None] * len(c))


# ---------------------------------------------------------------------------------------------------
# endpoints: a server on this machine speaks the protocol

class Server:
    """An OpenAI-compatible server whose model is a function from messages to text; it fails the first `failures` requests."""

    def __init__(self, model, failures=0):
        server = self
        self.requests, self.keys = [], []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                server.keys.append(self.headers["Authorization"])
                failing = len(server.requests) <= failures
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": None if failing else model(body["messages"])}}
                answer = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice],
                                     "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
                self.send_response(500 if failing else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize("content", [["a"], [], {"text": "a"}, 3, 0, "\ud800"], ids=["parts", "no parts", "object", "number", "zero", "half a character"])
def test_what_is_no_text_is_a_failure_of_the_endpoint(content, capfd):
    with Server(lambda messages: content) as server:
        assert tools.endpoint_model(server.url, "m", tries=2, wait=0.01)([[{"role": "user", "content": "a"}]]) == [None]
        assert len(server.requests) == 2 and "failed 2 times" in capfd.readouterr().err


def test_an_endpoint_is_asked_again_when_it_fails_and_never_shows_the_key(monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key")
    with Server(lambda messages: f"to {messages[-1]['content']}", failures=2) as server:
        model = tools.endpoint_model(server.url, "some-model", wait=0.01)
        assert model([[{"role": "user", "content": "a"}]]) == ["to a"]
        assert model([[{"role": "user", "content": text}] for text in "abc"]) == ["to a", "to b", "to c"]
        assert set(server.keys) == {"Bearer planted-key"} and server.requests[0]["model"] == "some-model" and len(server.requests) == 6
    with Server(lambda messages: "x", failures=99) as server:
        assert tools.endpoint_model(server.url, "m", tries=3, wait=0.01)([[{"role": "user", "content": "a"}]]) == [None]
        assert len(server.requests) == 3
    assert tools.endpoint_model(server.url, "m", tries=2, wait=0.01)([[{"role": "user", "content": "a"}]]) == [None]  # nobody listens
    output = capfd.readouterr()
    assert "planted-key" not in output.out + output.err and "failed 3 times: HfHubHTTPError 500" in output.err


GOOD_TASKS = {
    "calculation": dict(instruction="Say how many letters a word of five letters has.", evaluate="def evaluate(answer):\n    return answer == 5",
                        solution="result = 5", failures=["result = 4", "result = 6", "result = 'five'"]),
    "web": dict(instruction="Find what cake costs.", evaluate="def evaluate(answer):\n    return answer == 4",
                solution="result = int(click_url('/shop').split()[-1])", failures=["result = 3", "result = view()", "result = click_url('/shop')"]),
    "retail": {key: vars(retail_task())[key] for key in ("instruction", "evaluate", "solution", "failures")},
    "airline": {key: json.loads(json.dumps(vars(retail_task())[key]).replace("order", "reservation"))
                for key in ("instruction", "evaluate", "solution", "failures")},
}


def write_task(messages):
    """A challenger that explores once and then hands in a task for the world that its prompt names."""
    env = messages[0]["content"].split("in the environment ")[1].split(".")[0]
    if len(messages) == 2:
        return "THOUGHT: look END THOUGHT\nACTION:\nprint(1)\nEND ACTION"
    return f"ANSWER:\n{selfchallenge.render_task(CodeAsTask(env=env, seed=0, **GOOD_TASKS[env]))}\nEND ANSWER"


def solve_task(messages):
    """A teacher that solves such a task and says so."""
    env = messages[0]["content"].split("in the environment ")[1].split(".")[0]
    if not any(message["role"] == "assistant" for message in messages):
        return f"ACTION:\n{GOOD_TASKS[env]['solution']}\nprint(1)\nEND ACTION"
    return "ANSWER: 5 END ANSWER"


def script(name, *arguments, folder, expect=0):
    """Run a script's command line in this process, which has imported torch already; return what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with loaded(), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setenv("OPENAI_API_KEY", "planted-key")
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        status = importlib.import_module(name).main()
    assert status == expect, err.getvalue()[-2000:]
    assert "Traceback" not in err.getvalue() and "planted-key" not in out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


SMALL = ["--any-version", "--challenges", 2, "--steps", 1, "--tasks-per-step", 1, "--rollouts", 2, "--trials", 1, "--turn-tokens", 8, "--context", 1500]


def random_model(folder):
    """Write a model of random weights, with the tokenizer and the chat template of the embedded one; return its path."""
    config = AutoConfig.from_pretrained(ROOT / "tiny", num_hidden_layers=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tiny").save_pretrained(folder)
    return folder


def test_the_whole_loop_runs_on_all_four_worlds_with_random_weights(tmp_path):
    m3, tau = make_m3tooleval(tmp_path / "m3"), make_tau_bench(tmp_path / "tau")
    with Server(write_task) as challenger, Server(lambda messages: "###STOP###" if len(messages) > 3 else "Please do it.") as user:
        script("selfchallenge", "--env", "calculation", "web", "retail", "airline", "--no-joint", "--name", "run", "--m3tooleval", m3,
               "--model", random_model(tmp_path / "model"),
               "--tau-bench", tau, "--airline", "all", "--challenger-endpoint", challenger.url, "--challenger-model", "c",
               "--user-endpoint", user.url, "--user-model", "u", *SMALL, folder=tmp_path)
    for env in ("calculation", "web", "retail", "airline"):
        run = tmp_path / f"runs/run-{env}"
        summary = json.loads((run / "summary.json").read_text())
        assert summary["filter"]["ok"] == 1 and summary["filter"]["duplicate"] == 1, summary["filter"]
        numbers = summary["after"][env]
        assert numbers["reference"] == 1 and numbers["n"] == {"calculation": 5, "web": 2}.get(env, 4) and numbers["fingerprint"]
        (task,) = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
        assert ("number withheld" in task["instruction"]) == (env in ("retail", "airline")) and (run / "report.html").exists()
        assert not any("planted-key" in path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())


def test_what_another_challenger_writes_may_be_longer_than_the_context_of_the_policy(tmp_path):
    m3 = make_m3tooleval(tmp_path / "m3")
    with Server(lambda messages: f"THOUGHT: {'let me see ' * 2_000}END THOUGHT\n{write_task(messages)}") as challenger:
        script("selfchallenge", "--env", "calculation", "--name", "run", "--m3tooleval", m3, "--challenger-endpoint", challenger.url,
               "--challenger-model", "c", *SMALL, folder=tmp_path)
    assert json.loads((tmp_path / "runs/run/summary.json").read_text())["filter"]["ok"] == 1


def test_a_teacher_is_imitated(tmp_path):
    m3 = make_m3tooleval(tmp_path / "m3")
    with Server(write_task) as challenger, Server(solve_task) as teacher:
        script("selfchallenge", "--env", "calculation", "--name", "run", "--m3tooleval", m3, "--challenger-endpoint", challenger.url,
               "--challenger-model", "c", "--teacher-endpoint", teacher.url, "--teacher-model", "t", *SMALL, folder=tmp_path)
    (metrics,) = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert metrics["reward"] == 1 and metrics["loss"] > 0 and "mismatch_kl" not in metrics and metrics["trained_tokens"] > 0


# ---------------------------------------------------------------------------------------------------
# suites

def test_the_readme_makes_checkouts_of_the_commits_that_the_adapters_name():
    readme = (ROOT / "README.md").read_text()
    assert f"\n{M3ToolEval.clone}\n{TauBench.clone}\n" in readme


def test_suites_of_the_stand_ins(checkouts, jail):
    assert [len(evaluation.load_suite(name)) for name in ("calculation", "web", "retail", "airline")] == [5, 2, 4, 2]
    assert len(evaluation.load_suite("airline", airline="all")) == 4
    suites = {name: evaluation.load_suite(name) for name in ("calculation", "web", "retail", "airline")}
    reference, nothing = (evaluation.evaluate_policy(name, jail, suites) for name in ("reference", "nothing"))
    assert [reference[name]["pass@1"] for name in suites] == [1, 1, 1, 1]
    assert [nothing[name]["pass@1"] for name in suites] == [0, 0, 0.25, 0]
    assert list(reference["calculation"]["groups"]) == ["message_decoder", "trade_calculator", "travel_itinerary_planning", "dna_sequencer"]
    assert [n["n"] for n in reference["calculation"]["groups"].values()] == [1, 2, 1, 1]
    lines = evaluation.format_table(reference).splitlines()
    assert any(line.startswith("- trade_calculator") for line in lines)
    assert any(line.startswith("paper: ... after self-challenging, retail") and line.split()[-7:-4] == ["13.0", "25.2", "–"] for line in lines)


def test_the_tolerant_check_stands_beside_the_original(checkouts, jail, policy):
    limits, records = {"turn_tokens": 8, "context": 400}, []
    results = evaluation.evaluate_policy(policy, jail, {"web": evaluation.load_suite("web")}, 0, 4, write=records.extend, **limits)
    assert results["web"]["groups"]["tolerant check"]["n"] == 2 and {r["tolerant"] for r in records} <= {0.0, 1.0}


def test_an_interrupted_evaluation_goes_on(checkouts, jail, policy, tmp_path):
    suites, path, setting = {"calculation": evaluation.load_suite("calculation")}, tmp_path / "episodes.jsonl", {"model": "tiny"}
    limits = {"turn_tokens": 8, "context": 400, "parallel": 4}

    def play(finished, write):
        return evaluation.evaluate_policy(policy, jail, suites, 0, 4, finished=finished, write=write, **limits)

    written = []

    def interrupted(lines):
        write(lines)
        written.extend(lines)
        if len(written) == 8:
            raise KeyboardInterrupt

    finished, write = evaluation.continued(path, setting)
    with pytest.raises(KeyboardInterrupt):
        play(finished, interrupted)
    with open(path, "a") as file:
        file.write('{"half a')  # of the line that was being written
    finished, write = evaluation.continued(path, setting)
    assert finished == written and len(finished) == 8
    played = []
    resumed = play(finished, lambda lines: (played.extend(lines), write(lines)))
    assert len(played) + len(finished) == 25
    whole = []
    assert resumed == play([], whole.extend) and finished + played == whole  # as if it had never been interrupted
    again, _ = evaluation.continued(path, setting)
    assert len(again) == 25 and play(again, lambda line: pytest.fail("played again")) == resumed
    limits["parallel"] = 3  # of whose waves some are half in the file
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    play(*evaluation.continued(path, setting))
    places = [(line["greedy"], line["task"], line["trial"]) for line in evaluation.continued(path, setting)[0]]
    assert len(places) == len({*places}) == 25


def test_a_file_that_holds_no_episodes_of_this_evaluation_is_refused_and_left_alone(tmp_path):
    path, setting = tmp_path / "episodes.jsonl", {"model": "tiny"}
    evaluation.continued(path, setting)
    with pytest.raises(ValueError, match="another evaluation"):
        evaluation.continued(path, {"model": "other"})
    for text in ("my notes", "my notes\n", "\u2028\ufffd"):
        path.write_text(text)
        with pytest.raises(ValueError, match="something else"):
            evaluation.continued(path, setting)
        assert path.read_text() == text
    path.write_text(json.dumps(setting)[:7])  # a crash while the first line was written
    assert evaluation.continued(path, setting)[0] == []
    for line in ("no episode\n", "3\n"):
        path.write_text(json.dumps(setting) + "\n" + line)
        with pytest.raises(ValueError, match="damaged"):
            evaluation.continued(path, setting)


def test_the_script_prints_results_with_their_setting(tmp_path):
    tau = make_tau_bench(tmp_path / "tau")
    output, _ = script("eval", "--suite", "retail", "airline", "--tau-bench", tau, "--any-version", "--policy", "reference", "--json", folder=tmp_path)
    results = json.loads(output)
    assert results["retail"]["pass@1"] == 1 and results["airline"]["n"] == 2
    assert results["retail"]["benchmark"] == "TauBench" and len(results["retail"]["fingerprint"]) == 3
    assert results["retail"]["setting"]["policy"] == "reference" and results["retail"]["setting"]["user"] == "the policy's own base" and "torch" in results["retail"]["setting"]["versions"]
    assert "needs a checkout of TauBench" in script("eval", "--suite", "retail", "--policy", "nothing", folder=tmp_path, expect=2)[1]
    assert "no checkout of M3ToolEval" in script("eval", "--suite", "web", "--m3tooleval", tmp_path, folder=tmp_path, expect=2)[1]
    assert "raise it" in script("eval", "--suite", "retail", "--tau-bench", tau, "--any-version", "--context", 10, folder=tmp_path, expect=2)[1]


# ---------------------------------------------------------------------------------------------------
# checks and tools, case by case

@pytest.mark.parametrize("answer, expected, said", [
    ([1.5], [1.5, 3.0], False), ([1.5, 3.0, 4], [1.5, 3.0], False), ((1.5, "Tea"), ["1.5", "tea"], True), ("1.5, 3", [1.5, 3.0], False),
    ({"a": "1.001", "b": "X"}, {"b": "x", "a": 1}, True), ({"a": 1}, {"a": 1, "b": 2}, False), ({"a": 1, "b": 2}, {"a": 1}, False), ("{}", {"a": 1}, False),
    (True, 1, False), ("True", 1, False), (1, True, False), (1_000_000.4, 1_000_000, False)])
def test_what_is_alike(answer, expected, said):
    assert tools.alike(answer, expected) is said


@pytest.mark.parametrize("expression, value", [("7 % 4", 3), ("7 - 4 - 1", 2), ("7 / 2", 3.5), ("7 // 2", 3), ("+3", 3), ("-(2 + 3) * 4", -20), ("1e3", 1000)])
def test_arithmetic_by_hand(expression, value):
    assert tools.arithmetic(expression) == value


def test_a_tuple_may_be_answered_as_a_list(checkouts, monkeypatch):
    given = []
    task = SimpleNamespace(expected_output=("a", 1), check_answer=lambda answer: given.append(answer) or answer == "('a', 1)")
    monkeypatch.setattr(Calculation, "held_out", [task])
    assert Calculation(0).passes(0, ["a", 1]) and Calculation(0).passes(0, '["a", 1]') and given == ["('a', 1)"] * 2


def test_outputs_may_be_said_with_commas(checkouts, monkeypatch):
    task = SimpleNamespace(actions=[], outputs=["1234.5"])
    monkeypatch.setattr(Retail, "held_out", [task])
    monkeypatch.setattr(Retail, "reference_digest", lambda self, number: self.digest())
    assert Retail(0).passes(0, ["It is $1,234.5."])


def test_a_database_that_is_reset_is_as_it_was(checkouts):
    environment = Retail(0)
    environment.call("cancel_order", ["#W0000001"], {})
    environment.call("transfer_to_human_agents", ["x"], {})
    environment.reset(0)
    assert environment.state == Retail(0).state and not environment.over


def test_the_calculator_of_tau_bench_rounds(checkouts):
    assert Retail(0).call("calculate", ["10 / 3"], {}) == 3.33


def test_a_held_out_task_of_a_benchmark_leaks_as_it_was_written_and_as_it_is_told(checkouts):
    def stage(held_out: str, instruction: str) -> str | None:
        task = retail_task(instruction=instruction)
        return selfchallenge.sort_out(handed_in(task, KEPT), [], [selfchallenge.about(evaluation.BenchmarkTask("retail", 0, held_out, 0, ""))], filtered=True).get("stage")

    user = {"ada_1": "Ada", "bob_2": "Bob"}[Retail(0).user]
    assert stage("Cancel #W0000001.", "Cancel #W0000001.") == "held-out"  # whose number the executor is not told
    assert stage(f"You are {user} Stone: cancel it.", "Cancel it.") == "held-out"  # whose name it is told
    assert stage(f"{user} wants 5.", f"{user} has 5.") is None  # every word counts, not only what the database holds
