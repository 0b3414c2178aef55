"""The whole loop: a model challenges itself, a filter keeps the sound tasks, the model trains on them, and is measured.

    python selfchallenge.py                     (the embedded model on two toy environments, minutes on a laptop)

1. challenge   The model plays the challenger (section 3.1 of the paper): it explores an environment with the
               tools, then writes a Code-as-Task.
2. filter      The jail runs the task's code and keeps it only if its solution passes its own verification and
               every failure case fails (section 3.2). A rejection goes back to the challenger, which may revise.
3. train       The same model plays the executor on the kept tasks and learns by REINFORCE (section 3.3).
4. evaluate    Before and after training, on hand-written tasks that occur nowhere in training.

How it departs from the paper: near-duplicates are dropped, and so is every task that shares its parameters with
a held-out one; doing nothing must fail as well; rollouts are fresh at every step (see rl.py).

This is the last file of the tutorial; the others, in order: tools.py, verify.py, rl.py, eval.py.
"""
import argparse
import io
import itertools
import json
import os
import pickle
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from eval import SUITES, BenchmarkTask, continued, evaluate_policy, format_table, load_suite, setting_of, write_report
from rl import (
    Episode,
    Policy,
    add_training_options,
    advice_on_memory,
    append_lines,
    load_policy,
    make_optimizer,
    open_benchmarks,
    record,
    rollout,
    rollout_limits,
    seeded,
    train,
    versions,
)
from tools import ENVIRONMENTS, Environment, endpoint_model, make_environment
from verify import CodeAsTask, Jail, Judgement, TaskError, guarded, judge, parse_task

OF_MEMORY = ("parallel", "micro_batch_tokens")  # options that may be given anew when a run is resumed
REJECTED_AT = ["parse", "runs", "solution", "failures", "held-out", "duplicate"]

# ---------------------------------------------------------------------------------------------------
# the challenger

CHALLENGER_PROMPT = """\
You are the challenger in the environment {env}.
{summary}

Your work is to write a new task for another agent, which will have the same tools and will see nothing but your
instruction. First explore with the tools, then write the task from what you saw. Every reply has this form, with
either an action or an answer, never both:

THOUGHT: what to do next, in a sentence END THOUGHT
ACTION:
print(some_tool("an argument"))
END ACTION

or, to hand in the task:

THOUGHT: why this task is sound END THOUGHT
ANSWER:
<instruction>what the other agent is asked to do</instruction>
<evaluation_function>
def {signature}:
    return ...
</evaluation_function>
<solution>
Python that solves the task with the tools{result}
</solution>
<failure_case>
Python that makes a close but wrong attempt
</failure_case>
(three failure cases, each in its own tags)
END ANSWER

Rules:
- Look around first. Use only names, ids and values that a tool has shown you; assume no outputs.
- The instruction must say everything that is needed: who, what, how many. It must not say how to do it.
- The task should take several dependent steps.
- {judged} It returns True or False, checks everything that the
  instruction asks for, and changes nothing.
- The solution must pass the evaluation. All three failure cases must run without an error and fail it: forget a
  part, pick the wrong thing, use the wrong value. Doing nothing must fail as well.
- You see only what your code prints. Variables persist from action to action.
- If the task is rejected, you are told why: mend it and hand in all parts again.

Tools:
{documentation}

A worked example of an answer:

{example}"""

FOR_A_CUSTOMER = """

The other agent serves a customer, who alone is given your instruction and tells it bit by bit. Address it to the
customer ("You want to ..."), and say all that the customer knows and wants."""
JUDGED_BY_ANSWER = "evaluate(answer) gets the final answer, a number or a text, and compares it with what you computed."
JUDGED_BY_STATE = "evaluate() looks at the state that is left, through the tools."

EXAMPLES = {
    "calculator": CodeAsTask(
        env="calculator",
        seed=0,
        instruction="Take the amount of soap, multiply by 8, then subtract the amount of kite.",
        evaluate="def evaluate(answer):\n    return answer == 37",
        solution='x = amount("soap")\nx = multiply(x, 8)\nresult = subtract(x, amount("kite"))',
        failures=[
            'result = multiply(amount("soap"), 8)',
            'result = multiply(subtract(amount("soap"), amount("kite")), 8)',
            'result = add(multiply(amount("soap"), 8), amount("kite"))',
        ],
    ),
    "calculation": CodeAsTask(
        env="calculation",
        seed=2,
        instruction="Forty crates of moon dust sell at 12.5 credits each. Convert the total at a rate of 1.5 and add a tariff of "
        "6 percent of the converted price. What does the trade come to?",
        evaluate="def evaluate(answer):\n    return isinstance(answer, (int, float)) and abs(answer - 795) < 0.01",
        solution="price = convert_currency(40 * 12.5, 1.5)\nresult = estimate_final_value(price, calculate_tariff(price, 6))",
        failures=[
            "result = convert_currency(40 * 12.5, 1.5)",
            "price = convert_currency(40 * 12.5, 1.5)\nresult = estimate_final_value(price, calculate_tariff(500, 6))",
            "price = convert_currency(40 * 12.5, 1.5)\nresult = estimate_final_value(price, 6)",
        ],
    ),
    "web": CodeAsTask(
        env="web",
        seed=0,
        instruction="On which day does the lighthouse close first? Answer with the name of the day.",
        evaluate='def evaluate(answer):\n    return str(answer).strip().lower() == "sunday"',
        solution="""\
click_url("lighthouse-hours")
hours = {}
for line in (view() + scroll_down()).splitlines():
    if " closes at " in line:
        day, hour = line.split(" closes at ")
        hours[day] = float(hour)
result = [day for day in hours if hours[day] == calculator(str(sorted(hours.values())[0]))][0]""",
        failures=[
            'click_url("lighthouse-hours")\nresult = "Monday"',
            'click_url("lighthouse")\nresult = view().splitlines()[0]',
            'result = "It closes first on a day in winter"',
        ],
    ),
    "retail": CodeAsTask(
        env="retail",
        seed=0,
        instruction="You no longer need the desk lamp that you have ordered and want that order cancelled. Your other order, with the "
        "tea kettle, has not left yet: it should go to 7 Mill Lane, Suite 2, Denver, CO, 80201, USA. You are in a hurry.",
        evaluate="""\
def evaluate():
    lamp, kettle = get_order_details("#W0000001"), get_order_details("#W0000002")
    return lamp["status"] == "cancelled" and kettle["status"] == "pending" and kettle["address"]["zip"] == "80201" """.rstrip(),
        solution="""\
cancel_pending_order("#W0000001", "no longer needed")
modify_pending_order_address("#W0000002", "7 Mill Lane", "Suite 2", "Denver", "CO", "USA", "80201")""",
        failures=[
            'cancel_pending_order("#W0000001", "no longer needed")',
            'cancel_pending_order("#W0000002", "no longer needed")',
            """\
cancel_pending_order("#W0000001", "no longer needed")
modify_pending_order_address("#W0000002", "7 Mill Lane", "Suite 2", "Denver", "CO", "USA", "80210")""",
        ],
    ),
    "airline": CodeAsTask(
        env="airline",
        seed=0,
        instruction="You want to cancel your business trip to Boston, because your plans have changed. For your flight to Seattle you "
        "want two checked bags in all, of which one is not free; pay with the card that you have used for it.",
        evaluate="""\
def evaluate():
    boston, seattle = get_reservation_details("AAAAA1"), get_reservation_details("AAAAA2")
    return boston.get("status") == "cancelled" and seattle["total_baggages"] == 2 and seattle["nonfree_baggages"] == 1""",
        solution='cancel_reservation("AAAAA1")\nupdate_reservation_baggages("AAAAA2", 2, 1, "credit_card_0000001")',
        failures=[
            'cancel_reservation("AAAAA1")',
            'update_reservation_baggages("AAAAA2", 2, 1, "credit_card_0000001")',
            'cancel_reservation("AAAAA2")\nupdate_reservation_baggages("AAAAA1", 2, 1, "credit_card_0000001")',
        ],
    ),
    "shop": CodeAsTask(
        env="shop",
        seed=0,
        instruction="Hugo wants to cancel the clock and change the book to 5 pieces.",
        evaluate="""\
def evaluate():
    customer = find_customer("Hugo")
    first = get_order(find_order(customer, "clock"))
    second = get_order(find_order(customer, "book"))
    return first["status"] == "cancelled" and second["status"] == "pending" and second["quantity"] == 5""",
        solution="""\
customer = find_customer("Hugo")
cancel_order(find_order(customer, "clock"))
change_quantity(find_order(customer, "book"), 5)""",
        failures=[
            'cancel_order(find_order(find_customer("Hugo"), "clock"))',
            'change_quantity(find_order(find_customer("Hugo"), "book"), 5)',
            """\
customer = find_customer("Hugo")
cancel_order(find_order(customer, "book"))
change_quantity(find_order(customer, "clock"), 5)""",
        ],
    ),
}


def render_task(task: CodeAsTask) -> str:
    """Return a task in the tags of the challenger's answer; `parse_task` reads it back."""
    failures = "\n".join(f"<failure_case>\n{failure}\n</failure_case>" for failure in task.failures)
    return (
        f"<instruction>{task.instruction}</instruction>\n"
        f"<evaluation_function>\n{task.evaluate}\n</evaluation_function>\n"
        f"<solution>\n{task.solution}\n</solution>\n{failures}"
    )


# The example begins here. The challenger's episode, as trajectories.jsonl holds it:
#   user       Start from the item tea.
#   assistant  THOUGHT: look around END THOUGHT ACTION: print(amount("tea")) END ACTION
#   user       Observation: 14
#   assistant  THOUGHT: write the task END THOUGHT ANSWER: <instruction>What is the amount of tea times 6, …
#   user       Observation: Rejected at the stage failures: failure case 1 passes the evaluation, but must fail it …
#   assistant  THOUGHT: write the task END THOUGHT ANSWER: <instruction>Take the amount of tea, multiply by 3, …   kept

class Challenger(Episode):
    """The challenger's episode: it explores the world of a seed, then hands in a task, and may revise it.

    The filter judges every submission. Its verdict, with the traceback, is simply the next observation. The
    reward is 1 if the last submission passed the filter; it serves the reader, the challenger is not trained.
    """

    max_steps = 8  # exploring and revising together

    def __init__(self, jail: Jail, env: str, seed: int, revisions: int = 1):
        super().__init__(jail, env, seed)
        self.revisions = revisions
        self.submissions: list[tuple[CodeAsTask | None, Judgement]] = []
        self.messages = [
            {"role": "system", "content": challenger_prompt(self.environment)},
            {"role": "user", "content": self.environment.starting_point()},
        ]

    def answer(self, content: str) -> str | None:
        """Judge the task that is handed in; return why it was rejected, or None if that is the end."""
        try:
            task = parse_task(content, self.env, self.seed)
            judgement = judge(self.jail, task)
        except TaskError as error:
            task, judgement = None, Judgement(False, "parse", str(error), 0.0)
        self.submissions.append((task, judgement))
        self.reward, self.status = float(judgement.ok), judgement.stage
        if judgement.ok or len(self.submissions) > self.revisions:
            return None
        return f"Rejected at the stage {judgement.stage}: {judgement.reason}\nMend the task."


def challenger_prompt(environment: Environment) -> str:
    """Return the challenger's system message for an environment: format, rules, tools and a worked example."""
    return CHALLENGER_PROMPT.format(
        env=environment.name,
        summary=environment.summary + (FOR_A_CUSTOMER if environment.talks else ""),
        signature="evaluate(answer)" if environment.answered else "evaluate()",
        result=", and leaves the final answer in the variable result" if environment.answered else "",
        judged=JUDGED_BY_ANSWER if environment.answered else JUDGED_BY_STATE,
        documentation=environment.documentation(),
        example=render_task(EXAMPLES[environment.name]),
    )


# ---------------------------------------------------------------------------------------------------
# what must stay unseen

class HeldOut:
    """The evaluation tasks, and the test that keeps them out of everything that is trained on."""

    def __init__(self, tasks: list[CodeAsTask | BenchmarkTask]):
        self.tasks = tasks
        self.parameters = [words(task.instruction) if isinstance(task, BenchmarkTask) else parameters(task) for task in tasks]

    def leaks(self, instruction: str) -> bool:
        """Whether an instruction names everything that some held-out task is about, in whatever words."""
        mentioned = words(instruction)
        return any(wanted <= mentioned for wanted in self.parameters)


def words(text: str) -> set[str]:
    """The words, in lower case, and the numbers of a text."""
    return set(re.findall(r"[a-z]+|\d+", text.lower()))


def parameters(task: CodeAsTask) -> set[str]:
    """The words of an instruction that are numbers or name something in the task's world: who, what, how many."""
    named = words(json.dumps(make_environment(task.env, task.seed).state))
    return {word for word in words(task.instruction) if word.isdigit() or word in named}


def near(a: set[str], b: set[str]) -> bool:
    """Whether two instructions are near-duplicates: over nine tenths of their words are shared (Jaccard index)."""
    return len(a & b) > 0.9 * len(a | b)


# ---------------------------------------------------------------------------------------------------
# what a run leaves, and how it goes on

class RunError(ValueError):
    """A run's folder that cannot be used; the message is one sentence that says what to do."""


@dataclass
class Run:
    """A run's folder: lines are appended to its files, and a checkpoint remembers up to where they count.

    `progress` is plain data: how far each phase has come. A checkpoint holds it with the adapter's weights, the
    optimizer's state and the length of every file. To resume is to load it and to cut each file back to that
    length: whatever an interrupted step had begun to write is done again, exactly as before.
    """

    folder: Path
    progress: dict

    def append(self, name: str, records: list[dict]) -> None:
        """Append records to one of the run's files."""
        append_lines(self.folder / name, records)

    def read(self, name: str) -> list[dict]:
        """Return the records of a file of JSON lines; none if it does not exist."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def save(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint. It replaces the last one only when it is complete on the disk."""
        state = {
            "progress": self.progress,
            "files": {path.name: path.stat().st_size for path in sorted(self.folder.glob("*.jsonl"))},
            "adapter": {name: p.detach() for name, p in policy.model.named_parameters() if p.requires_grad},
            "optimizer": optimizer.state_dict(),
        }
        target = self.folder / "checkpoint" / "state.pt"
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")
        buffer = io.BytesIO()  # written by us, so that a full disk raises OSError and not one of torch's errors
        torch.save(state, buffer)
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Go back to the checkpoint, if there is one. Raises RunError if it is damaged."""
        path = self.folder / "checkpoint" / "state.pt"
        try:
            state = torch.load(path, map_location=policy.device, weights_only=True) if path.exists() else None
            if state is not None:
                self.progress = state["progress"]
                optimizer.load_state_dict(state["optimizer"])
                with torch.no_grad():
                    for name, parameter in policy.model.named_parameters():
                        if parameter.requires_grad:
                            parameter.copy_(state["adapter"][name])
        except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise RunError(f"the checkpoint {path} is damaged or belongs to another model; start a new run") from error
        if state is None and any((self.folder / name).exists() for name in ("tasks.jsonl", "rejected.jsonl", "metrics.jsonl")):
            raise RunError(f"{self.folder} has lost its checkpoint, so it cannot be continued; start a new run")
        sizes = state["files"] if state is not None else {}
        for file in self.folder.glob("*.jsonl"):
            os.truncate(file, sizes.get(file.name, 0))


def new_progress() -> dict:
    """How far a run is that has not begun: attempts made, steps done, results, seconds and most memory of each phase."""
    return {"challenges": 0, "steps": 0, "results": {}, "wall_s": {}, "memory_bytes": {}}


def new_run(folder: Path, options: dict) -> Run:
    """Make a run's folder and write its options to config.json. Raises RunError if the folder exists already."""
    if folder.exists():
        raise RunError(f"{folder} exists already: choose another name, so that nothing is overwritten")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(options, indent=1))
    return Run(folder, new_progress())


def resume_run(folder: Path) -> tuple[Run, argparse.Namespace]:
    """Return the run in a folder and its options. Raises RunError if there is none."""
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"there is no run to resume in {folder}: it has no readable config.json") from error
    return Run(folder, new_progress()), argparse.Namespace(**settings)


# ---------------------------------------------------------------------------------------------------
# the loop

def challenge(policy: Policy, optimizer: torch.optim.Optimizer, jail: Jail, held_out: HeldOut, run: Run, options) -> None:
    """Let the model write tasks, `options.parallel` attempts side by side, until options.challenges are made.

    With options.challenger_endpoint the model there writes them. Each last submission goes to tasks.jsonl, or to
    rejected.jsonl with the stage and the reason. With options.filter off, every task that can be read is kept, whatever
    the filter says, and nothing is revised: the paper's ablation.
    """
    challenger = endpoint_model(options.challenger_endpoint, options.challenger_model) if options.challenger_endpoint else None
    bar = tqdm(total=options.challenges, initial=run.progress["challenges"], desc="challenge", unit="attempt", dynamic_ncols=True)
    while run.progress["challenges"] < options.challenges:
        first = run.progress["challenges"]
        attempts = range(first, min(first + options.parallel, options.challenges))
        episodes = [
            Challenger(jail, options.env[i % len(options.env)], options.seed * 10**5 + i, options.revisions if options.filter else 0)
            for i in attempts
        ]
        generator = seeded(policy.device, options.seed, "challenge", first)
        trajectories = rollout(policy, episodes, generator, bar=bar, model=challenger, **rollout_limits(options))
        kept = run.read("tasks.jsonl")
        known = [(task["env"], words(task["instruction"])) for task in kept]
        for episode in episodes:
            verdict = sort_out(episode, known, held_out, options.filter)
            run.append("tasks.jsonl" if verdict is None else "rejected.jsonl", [verdict or as_kept(episode.submissions[-1][0])])
        run.append("trajectories.jsonl", [record("challenge", first, e, t) for e, t in zip(episodes, trajectories)])
        run.progress["challenges"] = attempts.stop
        run.save(policy, optimizer)
        bar.set_postfix(kept=f"{len(run.read('tasks.jsonl')) / attempts.stop:.2f}")


def as_kept(task: CodeAsTask) -> dict:
    """Return the line for tasks.jsonl of a task that is kept, with its instruction as the executor is to have it."""
    return {**vars(task), "instruction": make_environment(task.env, task.seed).as_told(task.instruction)}


def sort_out(episode: Challenger, known: list, held_out: HeldOut, filtered: bool) -> dict | None:
    """Return the line for rejected.jsonl that an attempt deserves, or None if its task is kept, and then known."""
    place = {"env": episode.env, "seed": episode.seed}
    if not episode.submissions:
        return {**place, "stage": "parse", "reason": f"no task was handed in: {episode.status}"}
    task, judgement = episode.submissions[-1]
    if task is None:
        return {**place, "stage": "parse", "reason": judgement.reason, "text": episode.messages[-1]["content"]}
    mentioned = words(task.instruction)
    if held_out.leaks(f"{as_kept(task)['instruction']} {task.instruction}"):  # the second has the numbers that the first withholds
        return {**vars(task), "stage": "held-out", "reason": "it shares its parameters with a held-out task"}
    if filtered and not judgement.ok:
        return {**vars(task), "stage": judgement.stage, "reason": judgement.reason}
    if any(env == episode.env and near(mentioned, other) for env, other in known):
        return {**vars(task), "stage": "duplicate", "reason": "a task with nearly the same words was kept before"}
    known.append((episode.env, mentioned))
    return None


def play_run(run: Run, options) -> dict:
    """Play all phases that the run has not finished yet; return the summary, which is also written to the folder."""
    open_benchmarks(options)
    with advice_on_memory(options.model):
        policy = load_policy(options.model, rank=options.rank, seed=options.seed)
    optimizer = make_optimizer(policy, options.learning_rate)
    run.restore(policy, optimizer)
    suites = {name: load_suite(name, options.airline) for name in options.env}
    held_out = HeldOut([task for name in {**dict.fromkeys(SUITES), **suites} for task in load_suite(name, options.airline)])
    with Jail(allow_weak=options.allow_weak_jail) as jail, advice_on_memory(options.model):
        print(jail.describe())
        measure("before", suites, policy, optimizer, jail, run, options)
        with timed(run, "challenge"):
            challenge(policy, optimizer, jail, held_out, run, options)
        tasks = [CodeAsTask(**task) for task in run.read("tasks.jsonl")]
        print(survival(run, options))
        if not tasks:
            raise RunError("no task survived the filter, so there is nothing to train on: raise --challenges")
        with timed(run, "train"):
            for metrics, episodes in train(policy, optimizer, jail, tasks, options, first=run.progress["steps"]):
                run.append("metrics.jsonl", [metrics])
                run.append("trajectories.jsonl", episodes)
                run.progress["steps"] += 1
                run.save(policy, optimizer)
        policy.model.save_pretrained(run.folder / "adapter")
        measure("after", suites, policy, optimizer, jail, run, options)
    summary = summarize_run(run, options)
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=1))
    print(format_table(summary["before"], summary["after"]))
    print(f"report: {write_report(run.folder)}")
    return summary


def measure(phase: str, suites: dict[str, list], policy: Policy, optimizer: torch.optim.Optimizer, jail: Jail, run: Run, options) -> None:
    """Evaluate the policy on the held-out tasks, once a run for each phase, before and after; it may be interrupted, too."""
    if phase in run.progress["results"]:
        return
    with timed(run, phase):
        finished, write = continued(run.folder / "checkpoint" / f"{phase}.jsonl", setting_of(options))
        results, records = evaluate_policy(
            policy, jail, suites, options.seed, options.trials, phase, finished, write, **rollout_limits(options)
        )
    run.append("trajectories.jsonl", records)
    run.progress["results"][phase] = results
    run.save(policy, optimizer)


@contextmanager
def timed(run: Run, phase: str) -> Iterator[None]:
    """Add the seconds that a phase takes to the run's account, and note the most memory since the last phase, loading included."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds, memory = run.progress["wall_s"], run.progress.setdefault("memory_bytes", {})  # older checkpoints lack it
        seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - started
        memory[phase] = max(memory.get(phase, 0), peak_memory())
        forget_peak_memory()


def survival(run: Run, options) -> str:
    """One line: how many attempts ended at each stage of the filter, and how many were kept."""
    counts = filter_counts(run)
    line = ", ".join(f"{stage} {number}" for stage, number in counts.items() if stage != "ok")
    return f"{options.challenges} attempts, {counts['ok']} tasks kept; rejected at: {line}"


def filter_counts(run: Run) -> dict[str, int]:
    """Count the attempts by the stage at which they were rejected; `ok` were kept."""
    counts = Counter(line["stage"] for line in run.read("rejected.jsonl"))
    return {**{stage: counts[stage] for stage in REJECTED_AT}, "ok": len(run.read("tasks.jsonl"))}


def summarize_run(run: Run, options) -> dict:
    """Return the run's figures in the form of summary.json."""
    return {
        "model": options.model,
        "seed": options.seed,
        "setting": setting_of(options),
        **run.progress["results"],
        "filter": filter_counts(run),
        "wall_s": {phase: round(seconds, 1) for phase, seconds in run.progress["wall_s"].items()},
        "memory_bytes": run.progress["memory_bytes"],
        "peak_memory_bytes": max(run.progress["memory_bytes"].values()),
        "versions": versions(),
    }


def peak_memory() -> int:
    """The most memory in bytes that this process has used since `forget_peak_memory`: on the GPU if there is one, else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if (status := Path("/proc/self/status")).exists():  # Linux; its getrusage counts what the process was before it became Python
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    import resource  # here, because Windows lacks it, and the jail is to say so in a sentence

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew, where the system can: on macOS it goes on from the phase before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


# ---------------------------------------------------------------------------------------------------
# the command line

def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. The defaults are those of the embedded model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--env", nargs="+", default=list(SUITES), choices=list(ENVIRONMENTS), metavar="NAME", help="environments to train and be measured on")
    add("--name", help="the run's folder is runs/NAME; a free name is chosen otherwise")
    add("--resume", type=Path, metavar="RUN", help="continue the interrupted run in this folder, with its own options; "
        "only --parallel and --micro-batch-tokens can be given anew")
    add("--challenges", type=int, default=384, help="attempts of the challenger")
    add("--revisions", type=int, default=1, help="how often a rejected task may be mended")
    add("--no-filter", dest="filter", action="store_false", help="train on every task that can be read (the paper's ablation)")
    add("--joint", action=argparse.BooleanOptionalAction, default=True, help="one adapter for all environments, or one run for each")
    add("--airline", default="paper", choices=["paper", "all"], help="measure on the paper's 30 tasks for Airline, or on all 50")
    add("--challenger-endpoint", metavar="URL", help="let the model at this OpenAI-compatible address write the tasks")
    add("--challenger-model", metavar="NAME", help="the model there")
    add("--trials", type=int, default=4, help="sampled attempts at each held-out task; at least 4 for Pass@4")
    add_training_options(parser)
    options = parser.parse_args(arguments)
    unset = argparse.Namespace(**dict.fromkeys(OF_MEMORY))  # in which only what stands on the command line gets a value
    options.changed = {name: value for name, value in vars(parser.parse_args(arguments, unset)).items() if name in OF_MEMORY and value is not None}
    if options.baseline == "leave-one-out" and options.rollouts < 2:
        parser.error("the leave-one-out baseline needs at least two --rollouts of each task")
    return options


def open_run(options: argparse.Namespace) -> tuple[Run, argparse.Namespace]:
    """Make the run's folder, or find the one to resume; return it with the options that count: its own, but for OF_MEMORY.

    Raises RunError if a new run's folder exists already, or if there is nothing to resume.
    """
    if options.resume is not None:
        run, settings = resume_run(options.resume)
        return run, argparse.Namespace(**{**vars(settings), **options.changed})
    runs = Path("runs")
    name = options.name or next(f"run-{i}" for i in itertools.count(1) if not (runs / f"run-{i}").exists())
    settings = {key: value for key, value in vars(options).items() if key not in ("resume", "name", "changed")}
    return new_run(runs / name, settings), argparse.Namespace(**settings)


def separate(options: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the options of each run: one for all environments, or, with --no-joint, one for each of them."""
    if options.joint or len(options.env) == 1 or options.resume is not None:
        return [options]
    named = [options.name and f"{options.name}-{env}" for env in options.env]
    return [argparse.Namespace(**{**vars(options), "env": [env], "name": name}) for env, name in zip(options.env, named)]


def main() -> int:
    """Run the loop; return the exit status. A user's mistake gets one sentence, and Ctrl-C loses nothing."""
    parts = separate(parse_options())
    opened = []

    def work() -> None:
        for part in parts:
            run, settings = open_run(part)
            opened.append(run.folder)
            play_run(run, settings)

    def how_to_go_on() -> str:
        if not opened:
            return "nothing was begun"
        others = " ".join(part.env[0] for part in parts[len(opened):])
        hint = f"every finished step is saved; continue with: python selfchallenge.py --resume {opened[-1]}"
        return hint + (f" (and then begin the others: --no-joint --env {others})" if others else "")

    return guarded("selfchallenge.py", work, how_to_go_on)


if __name__ == "__main__":
    sys.exit(main())
