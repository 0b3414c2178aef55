"""The whole loop: a model writes tasks, a filter keeps some of them, the model trains on these, and is measured.

    python selfchallenge.py                     (the embedded model on two toy environments, minutes on a laptop)

Parts 1 to 3 are section 3 of the paper, part 4 its section 4:

1. challenge   The model plays the challenger: it explores an environment with the tools, then writes a
               Code-as-Task.
2. filter      The jail runs the task's code and keeps it only if its solution passes its own verification and
               every failure case fails. A rejection goes back to the challenger, which may revise.
3. train       The same model plays the executor on the kept tasks and learns by REINFORCE.
4. evaluate    Before and after training, on hand-written tasks that occur nowhere in training.

How it departs from the paper, and why:

* near-duplicates are dropped, which would be trained on more than once, and so is every task that shares its
  parameters with a held-out one; doing nothing must fail as well (verify.py), and rollouts are fresh (rl.py).
* one adapter is trained for all environments, which takes less time; --no-joint trains one for each, as the paper.
* every world names something to start from, as the paper does for Retail and Airline only: it makes tasks differ.
* what a customer wants begins with who the customer is (`as_told`), because the paper names tasks that leave it out as
  a weakness. Order numbers are hidden on Airline as well as on Retail.
* a challenger has 8 turns, and may mend a rejected task once: the paper gives no numbers.

This is the last file of the tutorial; the others, in order: tools.py, verify.py, rl.py, eval.py.
"""
import argparse
import io
import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import ZipFile

if __name__ == "__main__":  # while the libraries load: seconds, in which they may swallow an exception
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted; nothing was begun\n"), os._exit(1)))

from tqdm import tqdm

from eval import SUITES, evaluate_policy, format_table, load_suite, setting_of, write_report
from rl import Episode, Help, Policy, add_training_options, advice_on_memory, append_lines, in_a_sentence
from rl import load_policy, make_optimizer, natural, positive, prepare, prompt_tokens, record, rollout
from rl import rollout_limits, save_adapter, seeded, train, versions
from tools import AGENT_TOKENS, ENVIRONMENTS, Environment, endpoint_model, make_environment
from verify import STAGES, CodeAsTask, Jail, Judgement, Task, TaskError, guarded, judge, parse_task

import torch  # after rl.py, which says how its threads wait

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
- The solution gets what it needs through the tools, and must pass the evaluation. The three failure cases differ, run
  without an error and fail it: forget a part, pick the wrong thing, use the wrong value. Doing nothing must fail too.
- You see only what your code prints. A tool that refuses raises ToolError. Variables persist from action to action.
- The parts of the task see none of your variables, and the solution and each failure case start from the state in which
  you started. So you may try things out.
- You have at most {steps} replies. If the task is rejected, you are told why: mend it and hand in all parts again.

Tools:
{documentation}

A worked example of an answer, from another state and perhaps with other tools:

{example}"""

FOR_A_CUSTOMER = """

The other agent serves a customer, who alone is given your instruction and tells it bit by bit. Address it to the
customer ("You want to ..."), and say all that the customer knows and wants. Name orders and reservations by what is in
them, not by their numbers, which the other agent must find. The rules above are that agent's: ask for what they
allow."""
JUDGED_BY_ANSWER = """evaluate(answer) gets the final answer and compares it with what you computed: a number as a
  number, also if it was written as text, and a tuple as a list."""
JUDGED_BY_STATE = "evaluate() looks at the state that is left, through the tools, and at nothing else."

EXAMPLES = {example.env: example for example in [  # those of the paper's worlds stand at the end
    CodeAsTask(
        "calculator", 0, "Take the amount of soap, multiply by 8, then subtract the amount of kite.",
        evaluate="def evaluate(answer):\n    return answer == 37",
        solution='x = amount("soap")\nx = multiply(x, 8)\nresult = subtract(x, amount("kite"))',
        failures=['result = multiply(amount("soap"), 8)',
                  'result = multiply(subtract(amount("soap"), amount("kite")), 8)',
                  'result = add(multiply(amount("soap"), 8), amount("kite"))']),
    CodeAsTask(
        "shop", 0, "Hugo wants to cancel the clock and change the book to 5 pieces.",
        evaluate="""def evaluate():
    customer = find_customer("Hugo")
    first = get_order(find_order(customer, "clock"))
    second = get_order(find_order(customer, "book"))
    return first["status"] == "cancelled" and second["status"] == "pending" and second["quantity"] == 5""",
        solution="""customer = find_customer("Hugo")
cancel_order(find_order(customer, "clock"))
change_quantity(find_order(customer, "book"), 5)""",
        failures=['cancel_order(find_order(find_customer("Hugo"), "clock"))',
                  'change_quantity(find_order(find_customer("Hugo"), "book"), 5)',
                  'customer = find_customer("Hugo")\n'
                  'cancel_order(find_order(customer, "book"))\n'
                  'change_quantity(find_order(customer, "clock"), 5)']),
]}


def render_task(task: CodeAsTask) -> str:
    """Return a task in the tags of the challenger's answer; `parse_task` reads it back."""
    failures = "\n".join(f"<failure_case>\n{failure}\n</failure_case>" for failure in task.failures)
    return (f"<instruction>{task.instruction}</instruction>\n"
            f"<evaluation_function>\n{task.evaluate}\n</evaluation_function>\n"
            f"<solution>\n{task.solution}\n</solution>\n{failures}")


# The example begins here. The challenger's episode, as trajectories.jsonl holds it:
#   user       Start from the item tea.
#   assistant  THOUGHT: look around END THOUGHT ACTION: print(amount("tea")) END ACTION
#   user       Observation: 14
#   assistant  THOUGHT: write the task END THOUGHT ANSWER: <instruction>What is the amount of tea times 6, …
#   user       Observation: Rejected at the stage failures: failure case 1 passes the evaluation, but must fail it …
#   assistant  THOUGHT: write the task END THOUGHT ANSWER: <instruction>Take the amount of tea, multiply by 3, …  kept

class Challenger(Episode):
    """The challenger's episode (section 3 of the paper): it explores a world, hands in a task, and may revise it.

    The filter judges every submission. Its verdict, with the traceback, is simply the next observation. The
    reward is 1 if the last submission passed the filter; it serves the reader, the challenger is not trained.
    """

    max_steps = 8  # exploring and revising together

    def __init__(self, jail: Jail, env: str, seed: int, revisions: int = 1):
        super().__init__(jail, env, seed)
        self.revisions = revisions
        self.submissions: list[tuple[CodeAsTask | str, Judgement]] = []  # the text of what is no task
        self.messages = [{"role": "system", "content": challenger_prompt(self.environment)},
                         {"role": "user", "content": self.environment.starting_point()}]

    def answer(self, content: str) -> str | None:
        """Judge the task that is handed in; return why it was rejected, or None if that is the end."""
        try:
            task = parse_task(content, self.env, self.seed)
            judgement = judge(self.jail, task)
        except TaskError as error:
            task, judgement = content, Judgement(False, "parse", str(error), 0.0)
        self.submissions.append((task, judgement))
        self.reward, self.status = float(judgement.ok), judgement.stage
        if judgement.ok or len(self.submissions) > self.revisions:
            return None
        return f"Rejected at the stage {judgement.stage}: {judgement.reason}\nMend the task."


def challenger_prompt(environment: Environment) -> str:
    """Return the challenger's system message for an environment: format, rules, tools and a worked example."""
    return CHALLENGER_PROMPT.format(
        env=environment.name,
        steps=Challenger.max_steps,
        summary=environment.summary + (FOR_A_CUSTOMER if environment.has_user else ""),
        signature="evaluate(answer)" if environment.judged_by_answer else "evaluate()",
        result=", and leaves the final answer in the variable result" if environment.judged_by_answer else "",
        judged=JUDGED_BY_ANSWER if environment.judged_by_answer else JUDGED_BY_STATE,
        documentation=environment.documentation(),
        example=render_task(EXAMPLES[environment.name]),
    )


# ---------------------------------------------------------------------------------------------------
# what must stay unseen

NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def about(task: Task) -> set[str]:
    """What a held-out task is about: its `parameters`; all its words if it has none, or is a benchmark's."""
    named = parameters(task) if isinstance(task, CodeAsTask) else set()
    return named or words(task.instruction)


def leaks(instruction: str, held_out: list[set[str]]) -> bool:
    """Whether an instruction names all that some held-out task is `about`, in whatever words, "four" or 4."""
    mentioned = words(instruction)
    mentioned |= {str(NUMBER_WORDS.index(word)) for word in mentioned if word in NUMBER_WORDS}
    return any(wanted <= mentioned for wanted in held_out)


def words(text: str) -> set[str]:
    """The words, in lower case, and the numbers of a text."""
    return set(re.findall(r"[^\W\d_]+|\d+", text.lower()))


def parameters(task: CodeAsTask) -> set[str]:
    """The words of an instruction that are numbers or name something in the task's world: who, what, how many."""
    named = words(json.dumps(make_environment(task.env, task.seed).state))
    return {word for word in words(task.instruction) if word.isdigit() or word in named}


def task_words(task: dict) -> set[str]:
    """The words of a kept task's instruction, without those by which its world says who is served."""
    return words(task["instruction"]) - words(make_environment(task["env"], task["seed"]).as_told(""))


def near_duplicates(a: set[str], b: set[str]) -> bool:
    """Whether two instructions are near-duplicates: over nine tenths of their words are shared (Jaccard index)."""
    return len(a & b) > 0.9 * len(a | b)


# ---------------------------------------------------------------------------------------------------
# what a run leaves, and how it goes on (for a second reading)

RECORDS = ("tasks.jsonl", "rejected.jsonl", "metrics.jsonl", "trajectories.jsonl")  # the files that grow line by line


class Run:
    """A run's folder: lines are appended to its RECORDS, and a checkpoint remembers up to where they count.

    `progress` is plain data: what was measured, and what each phase has cost. A checkpoint holds it with the
    adapter's weights, the optimizer's state and the length of every file. To resume is to load it and to cut each file
    back to that length: whatever an interrupted step had begun to write is done again, exactly as before.
    """

    def __init__(self, folder: Path, policy: Policy, optimizer: torch.optim.Optimizer):
        """Go back to the folder's checkpoint, if it has one. Raises ValueError if that is damaged or lost."""
        self.folder, self.policy, self.optimizer = folder, policy, optimizer
        self.progress = {"results": {}, "wall_s": {}, "memory_bytes": {}}
        self.checkpoint = folder / "checkpoint" / "state.pt"
        sizes = {}
        if self.checkpoint.exists():
            advice = "it is damaged, or belongs to another model: start a new run"
            with in_a_sentence(f"go on from the checkpoint {self.checkpoint}", advice):
                if ZipFile(self.checkpoint).testzip():  # which torch does not look at
                    raise ValueError("a part of the file has changed")
                state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
                sizes = dict(state["files"])
                self.progress |= state["progress"]
                optimizer.load_state_dict(state["optimizer"])
                policy.model.load_state_dict(state["adapter"], strict=False)  # which leaves the base as it is
        elif any((folder / name).exists() for name in RECORDS):
            raise ValueError(f"{folder} has lost its checkpoint, so it cannot be continued; start a new run")
        for name, size in sizes.items():
            if not (folder / name).exists() or not ends_a_line(folder / name, size):
                raise ValueError(f"{folder / name} has lost lines, or was changed, so the run cannot be continued; "
                                 "start a new run")
        for file in filter(Path.exists, map(folder.joinpath, RECORDS)):
            os.truncate(file, sizes.get(file.name, 0))
        self.clock = time.monotonic()  # at the last checkpoint

    def save(self, phase: str) -> None:
        """Write the checkpoint, which replaces the last one only when it is complete on the disk.

        The seconds since then are added to the phase's, and the most memory since then is noted (loading included).
        """
        seconds, memory = self.progress["wall_s"], self.progress["memory_bytes"]
        before, self.clock = self.clock, time.monotonic()
        seconds[phase] = seconds.get(phase, 0.0) + self.clock - before
        memory[phase] = max(memory.get(phase, 0), peak_memory())
        records = list(filter(Path.exists, map(self.folder.joinpath, RECORDS)))
        for path in records:  # must be on the disk first, or after a power failure they might be shorter than it says
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        state = {
            "progress": self.progress,
            "files": {path.name: path.stat().st_size for path in records},
            "adapter": {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
        }
        buffer = io.BytesIO()  # written by us, so that a full disk raises OSError and not one of torch's errors
        torch.save(state, buffer)
        self.checkpoint.parent.mkdir(exist_ok=True)
        unfinished = self.checkpoint.with_suffix(".partial")
        with open(unfinished, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.checkpoint)

    def write_config(self, options: argparse.Namespace) -> None:
        """Write config.json; should there be no room, the old one of a resumed run stays."""
        settings = {name: value for name, value in vars(options).items() if name not in ("resume", "name")}
        unfinished = self.folder / "config.partial"
        unfinished.write_text(json.dumps(settings, indent=1))
        os.replace(unfinished, self.folder / "config.json")

    def write_summary(self, options: argparse.Namespace) -> dict:
        """Write summary.json, and return what it holds."""
        summary = {
            "model": options.model, "seed": options.seed, "setting": setting_of(options), "versions": versions(),
            **self.progress["results"], "filter": self.progress["filter"],
            "wall_s": {phase: round(seconds, 1) for phase, seconds in self.progress["wall_s"].items()},
            "memory_bytes": self.progress["memory_bytes"],
            "peak_memory_bytes": max(self.progress["memory_bytes"].values()),
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))
        return summary

    def read(self, name: str) -> list[dict]:
        """Return the records of a file of JSON lines; none if it does not exist."""
        path = self.folder / name
        with in_a_sentence(f"read {path}", "it was changed: start a new run"):
            return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ends_a_line(path: Path, size: int) -> bool:
    """Whether the first `size` bytes of a file are there, and are whole lines."""
    with open(path, "rb") as file:
        file.seek(max(size - 1, 0))
        return size == 0 or file.read(1) == b"\n"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process; raises ValueError if another one holds it."""
    import fcntl  # here, because Windows lacks it, and the jail is to say so in a sentence
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system that knows no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process plays the run in {folder}: wait until it has ended") from None
        yield
    finally:
        os.close(descriptor)


def peak_memory() -> int:
    """The most bytes in use since the last call: of the GPU if there is one, else of this process (on macOS, ever)."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    elif (status := Path("/proc/self/status")).exists():  # Linux, whose getrusage counts what ran before Python as well
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # begin anew, see proc(5)
    else:
        import resource  # here, because Windows lacks it, and the jail is to say so in a sentence
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak


# ---------------------------------------------------------------------------------------------------
# the loop

def play_run(folder: Path, options: argparse.Namespace) -> dict:
    """Play what the run in a folder has not finished yet; return the summary, which is also written there.

    The options must have been given to `prepare`.
    """
    suites = {name: load_suite(name, options.airline) for name in options.env}
    held_out = [about(task) for tasks in suites.values() for task in tasks]
    with advice_on_memory(options.model), Jail(allow_weak=options.allow_weak_jail) as jail, alone_in(folder):
        print(jail.describe())
        policy = load_policy(options.model, rank=options.rank, seed=options.seed)
        check_prompts(policy, jail, options)
        run = Run(folder, policy, make_optimizer(policy, options.learning_rate))
        run.write_config(options)
        measure_phase("before", suites, jail, run, options)
        tasks = challenge(jail, held_out, run, options)
        if not tasks:
            raise ValueError(f"no task survived the filter: {folder / 'report.html'} shows why. Raise "
                             "--challenges, or take a model that knows the world and the format")
        shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in render_task(tasks[-1]))  # for a terminal
        print(f"the last that was kept:\n{shown}")
        steps = len(run.read("metrics.jsonl"))  # that were taken before an interruption
        for metrics, episodes in train(policy, run.optimizer, jail, tasks, options, first=steps):
            append_lines(folder / "metrics.jsonl", [metrics])
            append_lines(folder / "trajectories.jsonl", episodes)
            run.save("train")
        save_adapter(policy, folder / "adapter")
        measure_phase("after", suites, jail, run, options)
    summary = run.write_summary(options)
    print(format_table(summary["before"], summary["after"]))
    print(f"report: {write_report(folder)}")
    return summary


def check_prompts(policy: Policy, jail: Jail, options: argparse.Namespace) -> None:
    """Raise ValueError unless the challenger's prompts leave room in the context: before hours of evaluation."""
    for env in options.env if not options.challenger_endpoint else []:
        size = len(prompt_tokens(policy.tokenizer, Challenger(jail, env, options.seed * 10**5).messages))
        if size >= options.context:
            raise ValueError(f"the challenger's prompt in {env}, of {size:,} tokens, leaves no room in --context "
                             f"{options.context:,}: raise it")


def measure_phase(phase: str, suites: dict[str, list], jail: Jail, run: Run, options: argparse.Namespace) -> None:
    """Evaluate the policy on held-out tasks, before or after training, if that is not done; it may be interrupted."""
    if phase in run.progress["results"]:
        return
    finished = [line for line in run.read("trajectories.jsonl") if line["phase"] == phase]

    def keep(lines: list[dict]) -> None:
        append_lines(run.folder / "trajectories.jsonl", lines)
        run.save(phase)

    run.save(phase)  # a checkpoint comes before the first records
    run.progress["results"][phase] = evaluate_policy(
        run.policy, jail, suites, options.seed, options.trials, phase, finished, keep, **rollout_limits(options))
    run.save(phase)
    if phase == "before":  # "after" is shown beside it
        print(format_table(run.progress["results"][phase]))


def challenge(jail: Jail, held_out: list[set[str]], run: Run, options: argparse.Namespace) -> list[CodeAsTask]:
    """Let the model write tasks, until options.challenges attempts are made; return those that are kept.

    With options.challenger_endpoint the model there writes them. Each last submission goes to tasks.jsonl, or to
    rejected.jsonl with the stage and the reason. With options.filter off, every task that can be read is kept, whatever
    the filter says, unless it is a held-out one or a duplicate, and nothing is revised: the paper's ablation.
    """
    model, limits, total = None, rollout_limits(options), options.challenges
    if options.challenger_endpoint:
        model = endpoint_model(options.challenger_endpoint, options.challenger_model, AGENT_TOKENS)
        limits["context"] = sys.maxsize  # --context is for what is trained on
    revisions = options.revisions if options.filter else 0
    kept = [(task["env"], task_words(task)) for task in run.read("tasks.jsonl")]
    begun = len(kept) + len(run.read("rejected.jsonl"))
    with tqdm(total=total, initial=begun, desc="challenge", unit="attempt", dynamic_ncols=True) as bar:
        for first in range(begun, total, options.parallel):
            attempts = range(first, min(first + options.parallel, total))
            worlds = [(options.env[i % len(options.env)], options.seed * 10**5 + i) for i in attempts]
            episodes = [Challenger(jail, env, seed, revisions) for env, seed in worlds]
            generator = seeded(run.policy.device, options.seed, "challenge", first)
            rollout(run.policy, episodes, generator, bar=bar, model=model, **limits)
            for episode in episodes:
                line = sort_out(episode, kept, held_out, options.filter)
                append_lines(run.folder / ("rejected.jsonl" if "stage" in line else "tasks.jsonl"), [line])
                if "stage" not in line:
                    kept.append((line["env"], task_words(line)))
                append_lines(run.folder / "trajectories.jsonl", [record("challenge", first, episode)])
            run.save("challenge")
            bar.set_postfix(kept=f"{len(kept) / attempts.stop:.2f}")
    rejected = Counter(line["stage"] for line in run.read("rejected.jsonl"))
    run.progress["filter"] = {stage: rejected[stage] for stage in STAGES} | {"ok": len(kept)}
    stages = ", ".join(f"{stage} {rejected[stage]}" for stage in STAGES)
    print(f"{total} attempts, {len(kept)} tasks kept; rejected at: {stages}")
    return [CodeAsTask(**task) for task in run.read("tasks.jsonl")]


def sort_out(episode: Challenger, kept: list[tuple[str, set[str]]], held_out: list[set[str]], filtered: bool) -> dict:
    """Return an attempt's line for tasks.jsonl or, with a "stage", for rejected.jsonl.

    `kept` are the worlds and the words (`task_words`) of the tasks that are kept so far.
    """
    place = {"env": episode.env, "seed": episode.seed}
    if not episode.submissions:
        return {**place, "stage": "parse", "reason": f"no task was handed in: {episode.status}"}
    task, judgement = episode.submissions[-1]
    if isinstance(task, str):
        return {**place, "stage": "parse", "reason": judgement.reason, "text": task}
    told = {**vars(task), "instruction": make_environment(task.env, task.seed).as_told(task.instruction)}
    its_words = task_words(told)
    if leaks(f"{told['instruction']} {task.instruction}", held_out):  # the second has what the first withholds
        stage, reason = "held-out", "it shares its parameters with a held-out task"
    elif filtered and not judgement.ok:
        stage, reason = judgement.stage, judgement.reason
    elif any(env == task.env and near_duplicates(its_words, other) for env, other in kept):
        stage, reason = "duplicate", "a task with nearly the same words was kept before"
    else:
        return told
    return {**vars(task), "stage": stage, "reason": reason}


# ---------------------------------------------------------------------------------------------------
# worked examples for the challenger in the paper's four worlds (for a second reading)

EXAMPLES |= {example.env: example for example in [
    CodeAsTask(
        "calculation", 2,
        "Forty crates of moon dust sell at 12.5 credits each. Convert the total at a rate of 1.5 and add a tariff of "
        "6 percent of the converted price. What does the trade come to?",
        evaluate="def evaluate(answer):\n    return isinstance(answer, (int, float)) and abs(answer - 795) < 0.01",
        solution="""price = convert_currency(40 * 12.5, 1.5)
result = estimate_final_value(price, calculate_tariff(price, 6))""",
        failures=["result = convert_currency(40 * 12.5, 1.5)",
                  "price = convert_currency(40 * 12.5, 1.5)\n"
                  "result = estimate_final_value(price, calculate_tariff(500, 6))",
                  "price = convert_currency(40 * 12.5, 1.5)\nresult = estimate_final_value(price, 6)"]),
    CodeAsTask(
        "web", 0, "On which day does the lighthouse close first? Answer with the name of the day.",
        evaluate='def evaluate(answer):\n    return str(answer).strip().lower() == "sunday"',
        solution="""click_url("lighthouse-hours")
hours = {}
for line in (view() + scroll_down()).splitlines():
    if " closes at " in line:
        day, hour = line.split(" closes at ")
        hours[day] = float(hour)
result = [day for day in hours if hours[day] == calculator(str(sorted(hours.values())[0]))][0]""",
        failures=['click_url("lighthouse-hours")\nresult = "Monday"',
                  'click_url("lighthouse")\nresult = view().splitlines()[0]',
                  'result = "It closes first on a day in winter"']),
    CodeAsTask(
        "retail", 0,
        "You no longer need the desk lamp that you have ordered and want that order cancelled. Your other order, with "
        "the tea kettle, has not left yet: it should go to 7 Mill Lane, Suite 2, Denver, CO, 80201, USA. You are in a "
        "hurry.",
        evaluate="""def evaluate():
    lamp, kettle = get_order_details("#W0000001"), get_order_details("#W0000002")
    return lamp["status"] == "cancelled" and kettle["status"] == "pending" and kettle["address"]["zip"] == "80201\"""",
        solution="""cancel_pending_order("#W0000001", "no longer needed")
modify_pending_order_address("#W0000002", "7 Mill Lane", "Suite 2", "Denver", "CO", "USA", "80201")""",
        failures=['cancel_pending_order("#W0000001", "no longer needed")',
                  'cancel_pending_order("#W0000002", "no longer needed")',
                  'cancel_pending_order("#W0000001", "no longer needed")\nmodify_pending_order_address('
                  '"#W0000002", "7 Mill Lane", "Suite 2", "Denver", "CO", "USA", "80210")']),
    CodeAsTask(
        "airline", 0,
        "You want to cancel your business trip to Boston, because your plans have changed. For your flight to Seattle "
        "you want two checked bags in all, of which one is not free; pay with the card that you have used for it.",
        evaluate="""def evaluate():
    first, second = get_reservation_details("AAAAA1"), get_reservation_details("AAAAA2")
    return first.get("status") == "cancelled" and second["total_baggages"] == 2 and second["nonfree_baggages"] == 1""",
        solution='cancel_reservation("AAAAA1")\nupdate_reservation_baggages("AAAAA2", 2, 1, "credit_card_0000001")',
        failures=['cancel_reservation("AAAAA1")',
                  'update_reservation_baggages("AAAAA2", 2, 1, "credit_card_0000001")',
                  'cancel_reservation("AAAAA2")\nupdate_reservation_baggages("AAAAA1", 2, 1, "credit_card_0000001")']),
]}


# ---------------------------------------------------------------------------------------------------
# the command line (for a second reading)

def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options given or, with --resume, the run's; raises ValueError if these are lost or contradicted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=Help)
    add = parser.add_argument
    add("--env", nargs="+", default=list(SUITES), choices=list(ENVIRONMENTS), metavar="NAME",
        help="environments to train and be measured on")
    add("--name", help="the run's folder is runs/NAME; a free name is chosen otherwise")
    add("--resume", type=Path, metavar="RUN", help="continue the interrupted run in this folder, with its own options; "
        "only --parallel and --micro-batch-tokens can be given anew")
    add("--challenges", type=positive, default=384, help="attempts of the challenger")
    add("--revisions", type=natural, default=1, help="how often a rejected task may be mended")
    add("--filter", action=argparse.BooleanOptionalAction, default=True, help="keep tasks that agree with themselves; "
        "--no-filter, the paper's ablation, keeps all that can be read, save duplicates and held-out ones")
    add("--joint", action=argparse.BooleanOptionalAction, default=True,
        help="one adapter for all environments, or one run for each")
    add("--airline", default="paper", choices=["paper", "all"], help="the paper's 30 tasks for Airline, or all 50")
    add("--challenger-endpoint", metavar="URL", help="let the model at this OpenAI-compatible address write the tasks")
    add("--challenger-model", metavar="NAME", help="the model there")
    add("--trials", type=positive, default=4, help="sampled attempts at each held-out task; at least 4 for Pass@4")
    add_training_options(parser)
    options = parser.parse_args(arguments)
    if options.resume is not None:
        with in_a_sentence(f"read {options.resume / 'config.json'}", "there is no run to resume"):
            own = {**json.loads((options.resume / "config.json").read_text())}
        parser.set_defaults(**own)
        given = vars(parser.parse_args(arguments))
        changed = [name for name, value in own.items() if given.get(name, value) != value]
        if not {"parallel", "micro_batch_tokens"}.issuperset(changed):  # what takes memory
            raise ValueError(f"{options.resume} goes on with its own options, of which only --parallel and "
                             f"--micro-batch-tokens can be given anew, not {', '.join(changed)}")
        options = argparse.Namespace(**own | given)
    options.env = list(dict.fromkeys(options.env))
    if missing := [name for name in options.env if name not in EXAMPLES]:
        parser.error(f"the challenger has no example for {', '.join(missing)}: put one into selfchallenge.EXAMPLES")
    return options


def folder_of(options: argparse.Namespace) -> Path:
    """Return the folder of the run to resume, or that of a new run. Raises ValueError if it exists already."""
    if options.resume is not None:
        return options.resume
    runs = Path("runs")
    free = (f"run-{number}" for number in itertools.count(1) if not (runs / f"run-{number}").exists())
    folder = runs / (options.name or next(free))
    if not folder.resolve().is_relative_to(runs.resolve()):
        raise ValueError(f"--name {options.name} is not below {runs}: choose another name")
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another name, so that nothing is overwritten")
    return folder


def separate(options: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the options of each run: one for all environments, or, with --no-joint, one for each of them."""
    if options.joint or len(options.env) == 1:
        return [options]
    return [argparse.Namespace(**vars(options) | {"env": [env], "name": options.name and f"{options.name}-{env}"})
            for env in options.env]


def end_early(folder: Path) -> None:
    """Write the report of what there is of a run; if it has not begun, remove its folder."""
    with suppress(OSError):  # it is not empty: the run has begun
        folder.rmdir()
        folder.parent.rmdir()
    with suppress(OSError, ValueError):  # there is none, or the disk is full, or what ended the run has damaged a file
        write_report(folder)


def main() -> int:
    """Run the loop; return the exit status. A user's mistake gets one sentence, and Ctrl-C loses nothing."""
    parts, opened = [], []

    def work() -> None:
        options = parse_options()
        parts.extend(separate(options))
        prepare(options)
        for env in options.env:  # what is wrong with a later run should be known before the first is played
            load_suite(env, options.airline)
        for part in parts:
            folder_of(part)
        for part in parts:
            folder = folder_of(part)
            if part.resume is None:
                folder.mkdir(parents=True)
            opened.append(folder)
            try:
                play_run(folder, part)
            except BaseException:
                end_early(folder)
                raise

    def how_to_go_on() -> str:
        begun = [folder for folder in opened if folder.exists()]
        if not begun:
            return "nothing was begun"
        others = " ".join(part.env[0] for part in parts[len(begun):])
        folder = shlex.quote(str(begun[-1]))
        hint = f"every finished step is saved; continue with: python {shlex.quote(sys.argv[0])} --resume {folder}"
        return hint + (f" (and then begin the others: --no-joint --env {others})" if others else "")

    return guarded("selfchallenge.py", work, how_to_go_on)


if __name__ == "__main__":
    sys.exit(main())
