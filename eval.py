"""Measuring a policy: held-out suites, pass@k and pass^k with their errors, the baselines beside them, the report.

    python eval.py --suite calculator shop --policy tiny --adapter runs/first/adapter
    python eval.py --suite retail --tau-bench PATH --policy reference
    python eval.py --report runs/first              (rebuilds runs/first/report.html)

Like the paper (section 4) we report Pass@1 averaged over four trials, and Pass@4. Departures, and why:

* every number has a standard error over tasks: with a few dozen tasks, several points are noise.
* greedy decoding is measured too. Training sharpens a policy, which lifts the sampled Pass@1 even where
  nothing new was learnt; the most likely behaviour shows whether something was.
* pass^4 of TauBench stands beside Pass@4: whether all four trials succeed, that is, whether one can rely on it.
* an episode whose simulated user failed (an endpoint that is down) is left out and counted, not scored 0.
* M3ToolEval's check accepts 68 for 68.71 and refuses some right answers: a tolerant check is reported beside it.
* two baselines stand beside every suite: doing nothing, which finds tasks that need no work, and the replayed
  reference solution, which finds tasks that cannot be solved.

The toy suites are tasks like any other. Those of the paper are judged by the benchmarks' own rules, in this process:
the code that a model writes never sees a reference answer.

Read next: selfchallenge.py, which measures before and after training; before: rl.py, which plays the episodes.
"""
import argparse
import json
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from tqdm import tqdm

from rl import (
    Executor,
    Policy,
    Trajectory,
    add_rollout_options,
    advice_on_memory,
    append_lines,
    executor,
    load_policy,
    open_benchmarks,
    read_tasks,
    record,
    rollout,
    rollout_limits,
    seeded,
    versions,
)
from tools import ENVIRONMENTS, BenchmarkEnvironment, make_environment
from verify import CodeAsTask, Jail, Verdict, evaluate, guarded

SUITES = ("calculator", "shop")  # the toy suites, which need no download
PAPER = {  # table 1 of the paper: Pass@1 averaged over four trials, and Pass@4, in per cent
    "Llama-3.1-8B-Instruct": {"calculation": (20.3, 43.8), "web": (16.2, 42.1), "retail": (8.9, 15.7), "airline": (2.5, 10.0)},
    "... after self-challenging": {"calculation": (31.8, 62.5), "web": (44.9, 67.6), "retail": (13.0, 25.2), "airline": (4.2, 10.0)},
    "... one model for all": {"calculation": (30.7, 58.3), "web": (45.6, 67.6), "retail": (11.3, 23.5), "airline": (4.2, 10.0)},
    "... after distillation": {"calculation": (43.2, 72.9), "web": (50.0, 82.4), "retail": (28.9, 48.7), "airline": (6.7, 23.3)},
    "Llama-3.1-70B-Instruct": {"calculation": (57.3, 79.2), "web": (64.0, 79.4), "retail": (34.6, 56.5), "airline": (9.2, 20.0)},
}


@dataclass(frozen=True)
class BenchmarkTask:
    """A held-out task of a benchmark, which judges it by its own rules; the reference stays with the environment's class."""

    env: str
    seed: int
    instruction: str
    number: int  # among the environment's `held_out`
    group: str   # a row of its own in the table, such as a domain of Calculation; "" for none


def load_suite(name: str, airline: str = "paper") -> list[CodeAsTask | BenchmarkTask]:
    """Return the tasks of a suite, which occur nowhere in training; raises ValueError if it is unknown or not at hand.

    Of the benchmark's 50 tasks for Airline the paper leaves out the 20 whose reference writes nothing; "all" keeps them.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown suite {name!r}: choose from {', '.join(ENVIRONMENTS)}")
    if not issubclass(ENVIRONMENTS[name], BenchmarkEnvironment):
        return list(read_tasks(ENVIRONMENTS[name].suite))
    world = make_environment(name)
    tasks = []
    for number, task in enumerate(world.held_out):
        seed, group = world.place(number)
        tasks.append(BenchmarkTask(name, seed, task.instruction, number, group))
    return [task for task in tasks if world.writes(task.number)] if name == "airline" and airline == "paper" else tasks


def judge_benchmark(jail: Jail, task: BenchmarkTask, environment: BenchmarkEnvironment, answer: Any, replica: int = 0) -> Verdict:
    """Return the benchmark's own verdict; no code that a model wrote runs for it."""
    return Verdict(environment.passes(task.number, answer))


def judge_of(task: CodeAsTask | BenchmarkTask) -> Callable[..., Verdict]:
    """Return what judges a task: its own evaluation in the jail, or its benchmark."""
    return judge_benchmark if isinstance(task, BenchmarkTask) else evaluate


# ---------------------------------------------------------------------------------------------------
# metrics

def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate, without bias, the chance that at least one of k trials succeeds, when c of n >= k trials did.

    1 - C(n-c, k) / C(n, k), the share of the k-subsets with a success (Chen et al. 2021, arXiv 2107.03374).
    """
    ### BEGIN SOLUTION
    return 1 - math.comb(n - c, k) / math.comb(n, k)
    ### END SOLUTION


def pass_all_k(n: int, c: int, k: int) -> float:
    """Estimate the chance that all of k trials succeed, when c of n >= k trials did.

    C(c, k) / C(n, k), the share of the k-subsets that hold successes only: the pass^k of TauBench (arXiv 2406.12045).
    """
    return math.comb(c, k) / math.comb(n, k)


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean of one value a task: sample standard deviation / sqrt(tasks).

    The tasks are the sample, not the trials: trials of one task are not independent. One task gives 0.
    """
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def summarize(rewards: torch.Tensor, greedy: torch.Tensor) -> dict:
    """Return a suite's numbers from 0/1 rewards [tasks, trials] at temperature 1 and `greedy` [tasks].

    Each metric is a fraction, a mean over tasks, with its standard error beside it as "<metric>_se"; "n" counts
    the tasks. With fewer than four trials there is no "pass@4" and no "pass^4". NaN is a trial that does not count.
    Raises ValueError if none counts.
    """
    trials = [[reward for reward in row if not math.isnan(reward)] for row in rewards.tolist()]  # of each task
    counts = [(len(row), int(sum(row))) for row in trials if len(row) >= 4]
    values = {
        "pass@1": [fmean(row) for row in trials if row],
        "greedy": [reward for reward in greedy.tolist() if not math.isnan(reward)],
        "pass@4": [pass_at_k(n, c, 4) for n, c in counts],
        "pass^4": [pass_all_k(n, c, 4) for n, c in counts],
    }
    if not values["pass@1"]:
        raise ValueError("no episode counts, because the simulated user always failed: is its endpoint up?")
    values = {metric: per_task for metric, per_task in values.items() if per_task}
    means = {metric: fmean(per_task) for metric, per_task in values.items()}
    errors = {f"{metric}_se": standard_error(per_task) for metric, per_task in values.items()}
    failed = sum(rewards.shape[1] - len(row) for row in trials)
    return {**means, **errors, "n": len(trials)} | ({"user_failed": failed} if failed else {})


# ---------------------------------------------------------------------------------------------------
# what is measured: two baselines, and a policy

def play_nothing(jail: Jail, task: CodeAsTask | BenchmarkTask) -> bool:
    """Whether an agent that does nothing, and answers None, passes the task. In a sound suite none does."""
    return judge_of(task)(jail, task, make_environment(task.env, task.seed), None).passed


def play_reference(jail: Jail, task: CodeAsTask | BenchmarkTask) -> bool:
    """Whether the task's own solution, or the benchmark's reference, passes. In a sound suite all do."""
    environment = make_environment(task.env, task.seed)
    if isinstance(task, BenchmarkTask):
        return judge_benchmark(jail, task, environment, environment.solve(task.number)).passed
    with jail.session(environment) as session:
        outcome = session.run(task.solution, "result")
    return outcome.error is None and evaluate(jail, task, environment, outcome.value).passed


BASELINES = {"nothing": play_nothing, "reference": play_reference}


def with_baselines(results: dict, jail: Jail, tasks: list) -> dict:
    """Return a suite's numbers with the fraction of its tasks that each baseline passes."""
    with ThreadPoolExecutor(2) as workers:
        played = {name: list(workers.map(partial(play, jail), tasks)) for name, play in BASELINES.items()}
    return results | {name: fmean(passed) for name, passed in played.items()}


def evaluate_baseline(name: str, jail: Jail, suites: dict[str, list], trials: int = 4) -> dict[str, dict]:
    """Return {suite: numbers} of a baseline, in the form of `evaluate_policy`; all its trials are alike."""
    results = {}
    for suite, tasks in suites.items():
        passed = torch.tensor([float(BASELINES[name](jail, task)) for task in tasks])  # [tasks]
        results[suite] = numbers_of(jail, tasks, passed[:, None].expand(-1, trials), passed)
    return results


def numbers_of(jail: Jail, tasks: list, sampled: torch.Tensor, greedy: torch.Tensor, tolerant: tuple | None = None) -> dict:
    """Return a suite's numbers from rewards [tasks, trials] and [tasks]: in all, in "groups", and of the baselines.

    `tolerant` are the rewards of M3ToolEval's tolerant check, in the same two shapes.
    """
    groups = {"tolerant check": summarize(*tolerant)} if tolerant else {}
    for group in dict.fromkeys(task.group for task in tasks if isinstance(task, BenchmarkTask) and task.group):
        rows = [row for row, task in enumerate(tasks) if task.group == group]
        groups[group] = summarize(sampled[rows], greedy[rows])
    numbers = with_baselines(summarize(sampled, greedy), jail, tasks)
    return numbers | ({"groups": groups} if groups else {}) | ENVIRONMENTS[tasks[0].env].provenance()


def evaluate_policy(
    policy: Policy, jail: Jail, suites: dict[str, list], seed: int, trials: int = 4, label: str = "evaluate",
    finished: Iterable[dict] = (), write: Callable[[dict], None] = lambda line: None, parallel: int = 256, **rollout_options: Any,
) -> tuple[dict[str, dict], list[dict]]:
    """Play every task of {suite: tasks} `trials` times at temperature 1 and once greedily; return numbers and records.

    The numbers are {suite: summarize(...) and the baselines}; they do not depend on which other suites are played.
    The records are the episodes as lines of trajectories.jsonl (`rl.record`) of the phase `label`, each with "greedy",
    "task" and "trial". Each goes to `write` as it ends; with those of an interrupted evaluation in `finished` the rest
    comes out as if it had never been interrupted. `rollout_options` (turn_tokens, context, user) go to `rl.rollout`.
    """
    results, records = {}, []
    for suite, tasks in suites.items():
        lines = {(line["greedy"], line["task"], line["trial"]): line for line in finished if line["env"] == suite}
        with tqdm(total=len(tasks) * (trials + 1), desc=f"{label} {suite}", unit="episode", dynamic_ncols=True) as bar:
            for greedy, repeats in [(False, trials), (True, 1)]:
                places = [(greedy, number, trial) for number in range(len(tasks)) for trial in range(repeats)]
                for first in range(0, len(places), parallel):
                    play_wave(policy, jail, tasks, places[first:first + parallel], (seed, "evaluate", suite, *[first] * (first > 0)),
                              label, lines, write, bar, rollout_options)
                records += [lines[place] for place in places]

        def rewards(key: str) -> list[torch.Tensor]:  # of the sampled trials [tasks, trials], and of the greedy ones [tasks]
            of = {place: math.nan if line[key] is None else line[key] for place, line in lines.items()}
            return [torch.tensor([[of[False, number, trial] for trial in range(trials)] for number in range(len(tasks))]),
                    torch.tensor([of[True, number, 0] for number in range(len(tasks))])]

        results[suite] = numbers_of(jail, tasks, *rewards("reward"), rewards("tolerant") if "tolerant" in records[-1] else None)
    return results, records


def play_wave(
    policy: Policy, jail: Jail, tasks: list, places: list[tuple], seed: tuple, label: str, lines: dict,
    write: Callable[[dict], None], bar: tqdm, rollout_options: dict,
) -> None:
    """Play the episodes at these places (greedy, task, trial) side by side, unless `lines` has them all, and add them there.

    What an episode samples depends on its whole wave, so a wave of which a part is missing is played again.
    """
    def keep(place: tuple, episode: Executor, trajectory: Trajectory) -> None:
        greedy, number, trial = place
        line = {**record(label, None, episode, trajectory), "greedy": greedy, "task": number, "trial": trial}
        if hasattr(episode.environment, "passes_tolerantly"):
            line["tolerant"] = float(episode.environment.passes_tolerantly(tasks[number].number, episode.final))
        if place not in lines:
            write(line)
        lines[place] = line

    if all(place in lines for place in places):
        bar.update(len(places))
        return
    episodes = [executor(jail, tasks[number], judge_of(tasks[number])) for _, number, _ in places]
    for place, episode in zip(places, episodes):
        episode.when_over = partial(keep, place)
    temperature = 0.0 if places[0][0] else 1.0
    rollout(policy, episodes, seeded(policy.device, *seed), temperature, len(places), bar=bar, **rollout_options)


# ---------------------------------------------------------------------------------------------------
# the table, and the report: a page of HTML from a run's files, with everything that a model wrote escaped

METRICS = {"pass@1": "Pass@1", "pass@4": "Pass@4", "pass^4": "pass^4", "greedy": "greedy"}
COLUMNS = ["suite", *METRICS.values(), "tasks", *BASELINES]
RUN_FILES = ["config.json", "summary.json", "tasks.jsonl", "rejected.jsonl", "metrics.jsonl", "trajectories.jsonl"]
SURVIVED = {  # what is known of a task that the filter has not rejected at a stage
    "parse": "has all its parts",
    "held-out": "is not a held-out task",
    "runs": "all its code runs",
    "solution": "its solution passes",
    "failures": "its failure cases fail",
    "duplicate": "is new",
}
NORMAL = {  # what the learning curve's figures are, and what is normal for them
    "reward": "mean over the step's rollouts; rises, with noise, because every step plays other tasks",
    "signal": "share of tasks whose rollouts did not all end alike: only they teach; falls as tasks become easy",
    "loss": "near 0, of either sign, is fine: REINFORCE's loss is not an error; look at the reward",
    "gradient_norm": "keeps its order of magnitude; a jump by ten hints at too high a learning rate",
    "mismatch_kl": "sampler against trainer, which are one model: near 0; above 0.01 something is wrong",
    "trained_tokens": "sampled tokens of the tasks with signal; falls with it",
}


def percent(results: dict, metric: str) -> str:
    """A fraction of the results in per cent, with its standard error if there is one; "–" if it was not measured."""
    if metric not in results:
        return "–"
    error = f" ± {100 * results[f'{metric}_se']:.1f}" if f"{metric}_se" in results else ""
    return f"{100 * results[metric]:.1f}{error}"


def result_rows(before: dict[str, dict], after: dict[str, dict] | None) -> list[list[str]]:
    """Return the table's rows, a cell for each of COLUMNS: one a suite, or one before and one after training."""
    phases = [("", before)] if after is None else [(" before", before), (" after", after)]
    return [
        [name, *(percent(numbers, m) for m in METRICS), str(numbers.get("n", "–")), *(percent(numbers, baseline) for baseline in BASELINES)]
        for suite in dict.fromkeys([*before, *(after or {})]) for when, results in phases if suite in results
        for name, numbers in [(suite + when, results[suite]), *((f"- {group}", n) for group, n in results[suite].get("groups", {}).items())]
    ]


def paper_rows(suites: Iterable[str]) -> list[list[str]]:
    """Return the paper's own results on these suites as rows of the table, below which they stand."""
    return [[f"paper: {model}, {suite}", f"{values[suite][0]:.1f}", f"{values[suite][1]:.1f}", *["–"] * (len(COLUMNS) - 3)]
            for suite in suites for model, values in PAPER.items() if suite in values]


def format_table(before: dict[str, dict], after: dict[str, dict] | None = None) -> str:
    """Return {suite: numbers} as a table of text in per cent; with `after`, each suite before and after training."""
    rows = [COLUMNS, *result_rows(before, after), *paper_rows(before)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([*lines, "(per cent of the tasks, ± one standard error)"])


def read_file(path: Path) -> dict | list[dict]:
    """Return a .json file's object or a .jsonl file's list, empty if there is no file. Raises ValueError if damaged."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    parts = text.split("\n")[:-1] if path.suffix == ".jsonl" else [text or "{}"]  # a crash can leave half a line
    try:
        objects = [dict(json.loads(part)) for part in parts]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
    return objects if path.suffix == ".jsonl" else objects[0]


def write_report(run: Path) -> Path:
    """Write report.html from a run's files, interrupted or not; return its path. Raises ValueError if there are none."""
    if not any((run / name).exists() for name in RUN_FILES):
        raise ValueError(f"{str(run)!r} is not the folder of a run: it holds none of {', '.join(RUN_FILES)}")
    config, summary, tasks, rejected, metrics, trajectories = (read_file(run / name) for name in RUN_FILES)
    sections = [
        header(config, summary),
        results_section(summary.get("before", {}), summary.get("after", {})),
        filter_section(summary.get("filter"), rejected, tasks),
        learning_section(metrics),
        tasks_section(tasks),
        transcripts_section(trajectories),
        cost_section(config, summary),
    ]
    path = run / "report.html"
    path.write_text(PAGE.replace("SECTIONS", "\n".join(sections)), encoding="utf-8", errors="replace")
    return path


def shown(value: object) -> str:
    """Return a value as text in HTML. Every value of a run's files passes through here: a model wrote them."""
    return escape(f"{value:.3g}" if isinstance(value, float) else str(value))


def section(title: str, note: str, *parts: str) -> str:
    """A part of the page: a heading, a sentence or two on how to read it, and its content."""
    return f"<section><h2>{title}</h2><p class=note>{note}</p>{''.join(parts) or '<p>Nothing was recorded.</p>'}</section>"


def table(columns: list[str], rows: list[list]) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    head = "".join(f"<th scope=col>{shown(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{shown(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def bars(rows: list[tuple[str, float, str]]) -> str:
    """Horizontal bars from (label, length from 0 to 1, text after it)."""
    lines = [f"<span>{shown(label)}</span><span class=track><i style='width:{length:.1%}'></i></span><b>{shown(text)}</b>"
             for label, length, text in rows]
    return f"<div class=bars>{''.join(lines)}</div>"


def folded(title: str, quiet: str, *parts: str) -> str:
    """Content behind a title that opens it; `title` and `quiet` are text, `parts` are HTML."""
    return f"<details><summary>{shown(title)} <small>{shown(quiet)}</small></summary>{''.join(parts)}</details>"


def titled(name: object, text: object) -> str:
    """Code or a message under its name."""
    return f"<h4>{shown(name)}</h4><pre>{shown(text)}</pre>"


def header(config: dict, summary: dict) -> str:
    """The run's model, seed, time and memory, and whether it has finished."""
    cost = "not finished: some sections are empty"
    if summary:
        time = timedelta(seconds=round(sum(summary.get("wall_s", {}).values())))
        cost = f"{time} of wall time, {summary.get('peak_memory_bytes', 0) / 2**30:.2f} GiB at its peak"
    model, seed = shown(config.get("model", "?")), shown(config.get("seed", "?"))
    return f"<h1>Self-challenging run</h1><p>Model <b>{model}</b>, seed {seed}, {cost}</p>"


def results_section(before: dict, after: dict) -> str:
    """Held-out success before and after training, as bars and as a table."""
    note = ("Hand-written tasks that occur nowhere in training; per cent, ± one standard error over tasks. Pass@1: one "
            "sampled trial; Pass@4: at least one of four; pass^4: all four; greedy: the most likely behaviour. Doing "
            "nothing should pass no task, the reference solution every task. A change below two standard errors may be noise.")
    suites = dict.fromkeys([*before, *after])
    charts = "".join(suite_chart(suite, before.get(suite, {}), after.get(suite, {})) for suite in suites)
    legend = "<p class=legend><i class=before></i> before training <i class=after></i> after training</p>"
    parts = [legend, f"<div class=charts>{charts}</div>", table(COLUMNS, result_rows(before, after))] if charts else []
    return section("Held-out tasks, before and after", note, *parts)


def suite_chart(suite: str, before: dict, after: dict) -> str:
    """One suite's metrics as pairs of bars with error bars; a share of 1 is 135 units high."""
    drawing = "<path class=axis d='M0 160H344'/>"
    for group, (metric, label) in enumerate(METRICS.items()):
        drawing += f"<text x={44 + 86 * group} y=178>{label}</text>"
        for x, when, results in [(8 + 86 * group, "before", before), (45 + 86 * group, "after", after)]:
            if (share := results.get(metric)) is not None:
                top, error = 160 - 135 * share, 135 * (results.get(f"{metric}_se") or 0)
                drawing += f"<rect class={when} x={x} y={top:.1f} width=34 height={160 - top:.1f} rx=2 />"
                drawing += f"<path class=error d='M{x + 17} {top - error:.1f}v{2 * error:.1f}'/>"
                drawing += f"<text x={x + 17} y={top - error - 5:.1f}>{100 * share:.0f}</text>"
    spoken = "; ".join(f"{label} {percent(before, m)} before, {percent(after, m)} after" for m, label in METRICS.items())
    return (f"<figure><figcaption><b>{shown(suite)}</b></figcaption>"
            f"<svg viewBox='0 0 344 184' role=img aria-label='{shown(suite)}: {shown(spoken)}'>{drawing}</svg></figure>")


def filter_section(counts: dict | None, rejected: list[dict], tasks: list[dict]) -> str:
    """How many attempts survived each stage of the filter, and an example of every kind of rejection."""
    note = ("The challenger's attempts, and the share that survives each stage. Few survivors are normal: of an 8B model's "
            "tasks on Retail the paper kept 5 %. Many duplicates mean that the challenger has run out of ideas.")
    counts = counts or {**Counter(str(line.get("stage")) for line in rejected), "ok": len(tasks)}
    total = left = sum(counts.values())
    rows = [("attempts", 1.0, str(total))]
    for stage, survived in SURVIVED.items():
        if counts.get(stage):
            left -= counts[stage]
            rows.append((survived, left / total, f"{left} ({left / total:.0%})"))
    kinds: dict[str, list[dict]] = {}  # a kind: the same stage, and the same first words but for numbers
    for line in rejected:
        reason = str(line.get("reason")).split("\n")[0][:80]
        kinds.setdefault(f"{line.get('stage')}: {re.sub('[0-9]+', '#', reason)}", []).append(line)
    frequent = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    examples = [folded(kind, f"× {len(lines)}", task_parts(lines[0])) for kind, lines in frequent]
    return section("The filter", note, *([bars(rows), "<h3>Why tasks were rejected</h3>", *examples] if total else []))


def task_parts(task: dict) -> str:
    """The parts of a task or of a rejection, as far as it has them."""
    parts = [(name, task.get(name)) for name in ("reason", "text", "instruction", "evaluate", "solution")]
    parts += [(f"failure case {number}", code) for number, code in enumerate(task.get("failures") or [], start=1)]
    return "".join(titled(name, text) for name, text in parts if text)


def learning_section(metrics: list[dict]) -> str:
    """Reward and signal over the steps as lines, and the first and last step's figures with what is normal for them."""
    note = "The reward on the training tasks; whether it carries over to unseen tasks is what the held-out suites say."
    if not metrics:
        return section("Learning curve", note)
    drawing = "".join(f"<path class=axis d='M34 {y}H344'/><text x=15 y={y + 4}>{text}</text>"
                      for y, text in [(25, "100%"), (92, "50%"), (160, "0%")])
    for name in ("signal", "reward"):
        points = [(34 + 306 * i / max(len(metrics) - 1, 1), 160 - 135 * line.get(name, 0)) for i, line in enumerate(metrics)]
        drawing += f"<polyline class={name} points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in points)}'/>"
        drawing += "<circle class={} cx={:.1f} cy={:.1f} r=3 />".format(name, *points[-1])
    first, last = metrics[0], metrics[-1]
    drawing += f"<text x=50 y=178>step {shown(first.get('step'))}</text><text x=322 y=178>step {shown(last.get('step'))}</text>"
    figures = [f"<p><b>{name}</b> {shown(first.get(name))} → {shown(last.get(name))}<br><small>{normal}</small>"
               for name, normal in NORMAL.items()]
    legend = "<p class=legend><i class=reward></i> reward <i class=signal></i> share of tasks with signal</p>"
    spoken = f"reward and signal over {len(metrics)} steps; the first and the last are given below"
    chart = f"<figure><svg viewBox='0 0 348 184' role=img aria-label='{spoken}'>{drawing}</svg></figure>"
    return section("Learning curve", note, legend, chart, "<h3>First and last step, and what is normal</h3>", *figures)


def tasks_section(tasks: list[dict]) -> str:
    """Six of the kept tasks, spread evenly over the file."""
    note = f"Up to six of {len(tasks)}, evenly spread. Judge for yourself whether each checks what it asks."
    chosen = tasks if len(tasks) <= 6 else [tasks[i * len(tasks) // 6] for i in range(6)]
    cards = [folded(str(t.get("instruction")), f"{t.get('env')}, seed {t.get('seed')}", task_parts(t)) for t in chosen]
    return section("Tasks that were kept", note, *cards)


def transcripts_section(trajectories: list[dict]) -> str:
    """A few episodes, message by message."""
    note = "Where there is one, a held-out task that failed before training and succeeded after it; then one of each phase."
    episodes = []
    for t in chosen_trajectories(trajectories):
        quiet = f"{t.get('env')}, reward {t.get('reward')}, {t.get('status')}{', greedy' if t.get('greedy') else ''}"
        messages = "".join(titled(m.get("role"), m.get("content")) for m in t.get("messages") or [])
        episodes.append(folded(f"{t.get('phase')}: {t.get('instruction')}", quiet, messages))
    return section("Transcripts", note, *episodes)


def chosen_trajectories(trajectories: list[dict]) -> list[dict]:
    """Of each environment a failure before training and a success at the same task after it, and of each phase one more."""
    phases, tasks = {}, {}  # {phase: an episode}, {task: {"before": a failure, "after": a success}}
    for t in sorted(trajectories, key=lambda t: (not t.get("greedy"), -(t.get("reward") or 0))):  # None does not count
        phase = str(t.get("phase"))
        phases.setdefault(phase, t)
        if (phase, bool(t.get("reward"))) in [("before", False), ("after", True)]:
            tasks.setdefault((str(t.get("env")), str(t.get("seed")), str(t.get("instruction"))), {}).setdefault(phase, t)
    changed = {env: pair for (env, *_), pair in reversed(tasks.items()) if len(pair) == 2}  # the first of each env stays
    chosen = [pair[phase] for pair in changed.values() for phase in ("before", "after")]
    return chosen + [t for t in phases.values() if t not in chosen]


def cost_section(config: dict, summary: dict) -> str:
    """Seconds of each phase, options and versions."""
    note = "Rollouts, not gradient steps, are the usual cost: in the paper challenging and rollouts take over nine tenths."
    seconds = summary.get("wall_s", {})
    rows = [(phase, value / (sum(seconds.values()) or 1), f"{value:.1f} s") for phase, value in seconds.items()]
    details = table(["name", "value"], [*config.items(), *summary.get("versions", {}).items()])
    return section("Time, options and versions", note, bars(rows), folded("Options and versions", "", details))


# Should an escape ever be forgotten, the policy in the second meta line still forbids every script and connection.
PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'">
<meta name=viewport content="width=device-width, initial-scale=1">
<title>Self-challenging run</title>
<style>
:root { color-scheme: light dark; --page: #faf9f7; --card: #fff; --ink: #23272c; --quiet: #5d656e; --line: #e1dfda;
  --before: #a4acb6; --after: #0072b2; --signal: #c65300; --kept: #00805d; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #15181b; --card: #1d2125; --ink: #e4e7ea;
  --quiet: #a3abb4; --line: #343a40; --before: #7d8792; --after: #56b4e9; --signal: #f0a35e; --kept: #40bf95; } }
* { box-sizing: border-box; print-color-adjust: exact; }
body { max-width: 52rem; margin: 0 auto; padding: 1.5rem 1rem 5rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
section { margin-top: 3.25rem; } h1 { margin: 1rem 0 0; line-height: 1.2; } h2 { margin: 0; font-size: 1.3rem; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1rem; } h4 { margin: .9rem 0 .25rem; font-size: .8rem; color: var(--quiet); }
.note, small, .legend { color: var(--quiet); font-size: .88rem; } .note { margin: .3rem 0 1.1rem; } summary { cursor: pointer; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .88rem; white-space: nowrap; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left; } th { color: var(--quiet); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0 1rem; }
figure, details { margin: .6rem 0; padding: .65rem .95rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; } svg { display: block; width: 100%; max-width: 34rem; margin: auto; }
svg text { fill: var(--quiet); font-size: 11px; text-anchor: middle; } .axis { stroke: var(--line); }
.before { --colour: var(--before); } .after, .reward { --colour: var(--after); } .signal { --colour: var(--signal); }
rect, circle { fill: var(--colour); } polyline { fill: none; stroke: var(--colour); stroke-width: 2; }
i { background: var(--colour); } polyline.signal { stroke-dasharray: 4 3; } .error { stroke: var(--ink); stroke-width: 1.3; }
.legend i { display: inline-block; width: .85rem; margin: 0 .25rem -.05rem .6rem; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: .5rem .9rem; align-items: center; font-size: .9rem; }
.track { background: var(--line); --colour: var(--kept); } .track, i { display: block; height: .85rem; border-radius: 4px; }
pre { margin: 0; padding: .65rem .8rem; border-radius: 6px; background: var(--page); white-space: pre-wrap;
  font: .83rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
@media print { figure { break-inside: avoid; } details::details-content { content-visibility: visible; block-size: auto; } }
</style>
SECTIONS
</html>
"""


# ---------------------------------------------------------------------------------------------------
# the command line

def measure(arguments: argparse.Namespace) -> dict[str, dict]:
    """Return {suite: numbers} of the policy that the command line asks for, each with the setting in which it was measured."""
    if arguments.trials < 1:
        raise ValueError("--trials must be at least 1")
    open_benchmarks(arguments)
    suites = {name: load_suite(name, arguments.airline) for name in arguments.suite}  # a wrong name is noticed before a model is loaded
    setting = setting_of(arguments)
    with Jail(allow_weak=arguments.allow_weak_jail) as jail:
        print(jail.describe(), file=sys.stderr)
        if arguments.policy in BASELINES:
            results = evaluate_baseline(arguments.policy, jail, suites, arguments.trials)
        else:
            policy = load_policy(arguments.policy, arguments.adapter, seed=arguments.seed)
            finished, write = continued(arguments.episodes, setting)
            with advice_on_memory(arguments.policy):
                results, _ = evaluate_policy(policy, jail, suites, arguments.seed, arguments.trials,
                                             finished=finished, write=write, **rollout_limits(arguments))
    return {suite: numbers | {"setting": setting} for suite, numbers in results.items()}


def setting_of(options: argparse.Namespace) -> dict:
    """Return what an evaluation's numbers depend on: the model, who plays the users, how is decoded, and the versions."""
    named = ["policy", "model", "adapter", "seed", "trials", "turn_tokens", "context", "airline"]
    return {
        **{name: str(getattr(options, name)) for name in named if getattr(options, name, None) is not None},
        "user": f"{options.user_model} at {options.user_endpoint}" if options.user_endpoint else "the policy's own base",
        "decoding": "Pass@k at temperature 1, greedy at 0; neither top-k nor top-p",
        "versions": versions(),
    }


def continued(path: Path | None, setting: dict) -> tuple[list[dict], Callable[[dict], None]]:
    """Return the episodes in a file of an interrupted evaluation, if there is one, and the function that appends another.

    The file's first line is the setting. Raises ValueError if it is another one.
    """
    if path is None:
        return [], lambda line: None
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[:text.rfind("\n") + 1]  # without the half line that a crash may have left
    lines = [json.loads(line) for line in whole.splitlines()] or [setting]
    if lines[0] != setting:
        raise ValueError(f"{str(path)!r} holds the episodes of another evaluation: give --episodes a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(whole or json.dumps(setting) + "\n", encoding="utf-8")
    lock = threading.Lock()

    def write(line: dict) -> None:
        with lock:  # episodes end in several threads
            append_lines(path, [line])

    return lines[1:], write


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--suite", nargs="+", default=list(SUITES), metavar="NAME", help=f"which suites, from {', '.join(ENVIRONMENTS)}")
    add("--policy", default="tiny", help="a model folder or hub name, or a baseline: nothing or reference")
    add("--adapter", help="the folder of a trained adapter, such as runs/<name>/adapter")
    add("--trials", type=int, default=4, help="sampled trials of each task; at least 4 for Pass@4")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--airline", default="paper", choices=["paper", "all"], help="the paper's 30 tasks for Airline, or all 50")
    add("--episodes", type=Path, metavar="FILE", help="write each episode here as it ends; those in it already are not played again")
    add("--json", action="store_true", help="print one JSON object, {suite: numbers}, instead of the table")
    add_rollout_options(parser)
    add("--report", metavar="RUN", type=Path, help="only rebuild report.html in the folder of a run")
    arguments = parser.parse_args()

    def work() -> None:
        if arguments.report:
            print(write_report(arguments.report))
            return
        results = measure(arguments)
        print(json.dumps(results) if arguments.json else format_table(results))

    def how_to_go_on() -> str:
        if not arguments.episodes:
            return "nothing was measured (with --episodes FILE it could go on from here)"
        return f"the same command goes on from the episodes in {arguments.episodes}"

    return guarded("eval.py", work, how_to_go_on)


if __name__ == "__main__":
    sys.exit(main())
