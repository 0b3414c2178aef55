"""Measuring a policy: held-out suites, pass@k and pass^k with their errors, the baselines beside them, the report.

    python eval.py --suite calculator shop --policy tiny --adapter runs/first/adapter
    python eval.py --suite retail --tau-bench PATH --policy reference
    python eval.py --report runs/first              (rebuilds runs/first/report.html)
    python eval.py --report runs/first runs/second  (... and compares the runs in it)

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
import builtins
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from html import escape
from keyword import iskeyword
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from tqdm import tqdm

from rl import (
    Policy,
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
from verify import CodeAsTask, FormatError, Jail, Verdict, evaluate, guarded, parse_step

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
#
# The example's held-out cousin, of which no part was trained on: "Take the amount of chair, add 4, then multiply by 7."
#   before training  answers 1616, 42, 77, 65: Pass@1 0, Pass@4 0; greedy guesses 161: 0
#   after it         answers 84, 84, 84, 58:   Pass@1 3/4, Pass@4 1, pass^4 0; greedy 84: 1

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
    """Return the standard error of the mean of one value a task, or a run: sample standard deviation / sqrt(tasks).

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


def play_baselines(jail: Jail, tasks: list) -> dict[str, list[bool]]:
    """Return {baseline: whether it passes each of a suite's tasks}."""
    with ThreadPoolExecutor(2) as workers:
        return {name: list(workers.map(partial(play, jail), tasks)) for name, play in BASELINES.items()}


def evaluate_baseline(name: str, jail: Jail, suites: dict[str, list], trials: int = 4) -> dict[str, dict]:
    """Return {suite: numbers} of a baseline, in the form of `evaluate_policy`; all its trials are alike."""
    results = {}
    for suite, tasks in suites.items():
        baselines = play_baselines(jail, tasks)
        passed = torch.tensor(baselines[name], dtype=torch.float)  # [tasks]
        results[suite] = numbers_of(tasks, baselines, passed[:, None].expand(-1, trials), passed)
    return results


def numbers_of(tasks: list, baselines: dict, sampled: torch.Tensor, greedy: torch.Tensor, tolerant: tuple | None = None) -> dict:
    """Return a suite's numbers from rewards [tasks, trials] and [tasks]: in all, of the baselines, and in "groups".

    `tolerant` are the rewards of M3ToolEval's tolerant check, in the same two shapes.
    """
    groups = {"tolerant check": summarize(*tolerant)} if tolerant else {}
    for group in dict.fromkeys(task.group for task in tasks if isinstance(task, BenchmarkTask) and task.group):
        rows = [row for row, task in enumerate(tasks) if task.group == group]
        groups[group] = summarize(sampled[rows], greedy[rows])
    numbers = summarize(sampled, greedy) | {name: fmean(passed) for name, passed in baselines.items()}
    return numbers | ({"groups": groups} if groups else {}) | ENVIRONMENTS[tasks[0].env].provenance


def evaluate_policy(
    policy: Policy, jail: Jail, suites: dict[str, list], seed: int, trials: int = 4, label: str = "evaluate",
    finished: Iterable[dict] = (), write: Callable[[list[dict]], None] = lambda lines: None, parallel: int = 256, **limits: Any,
) -> tuple[dict[str, dict], list[dict]]:
    """Play every task of {suite: tasks} `trials` times at temperature 1 and once greedily; return numbers and records.

    The numbers are {suite: summarize(...) and the baselines}; they do not depend on which other suites are played.
    The records are the episodes as lines of trajectories.jsonl (`rl.record`) of the phase `label`, each with "greedy",
    "task" and "trial". `parallel` of them are a wave, and what an episode samples depends on its whole wave. A wave goes to
    `write` as it ends; with those of an interrupted evaluation in `finished` the rest comes out as if it had never been
    interrupted. `limits` (turn_tokens, context, user) go to `rl.rollout`.
    """
    results, records = {}, []
    for suite, tasks in suites.items():
        lines = {(line["greedy"], line["task"], line["trial"]): line for line in finished if line["env"] == suite}
        with tqdm(total=len(tasks) * (trials + 1), desc=f"{label} {suite}", unit="episode", dynamic_ncols=True) as bar:
            for greedy, repeats in [(False, trials), (True, 1)]:
                places = [(greedy, number, trial) for number in range(len(tasks)) for trial in range(repeats)]
                for first in range(0, len(places), parallel):
                    wave = places[first:first + parallel]
                    if all(place in lines for place in wave):
                        bar.update(len(wave))
                        continue
                    generator = seeded(policy.device, seed, "evaluate", suite, first)
                    played = play_wave(policy, jail, tasks, wave, generator, label, bar=bar, **limits)
                    write(played)
                    lines |= zip(wave, played)
                records += [lines[place] for place in places]

        def rewards(key: str) -> list[torch.Tensor]:  # of the sampled trials [tasks, trials], and of the greedy ones [tasks]
            of = {place: math.nan if line[key] is None else line[key] for place, line in lines.items()}
            return [torch.tensor([[of[False, number, trial] for trial in range(trials)] for number in range(len(tasks))]),
                    torch.tensor([of[True, number, 0] for number in range(len(tasks))])]

        tolerant = rewards("tolerant") if "tolerant" in records[-1] else None
        results[suite] = numbers_of(tasks, play_baselines(jail, tasks), *rewards("reward"), tolerant)
    return results, records


def play_wave(
    policy: Policy, jail: Jail, tasks: list, wave: list[tuple], generator: torch.Generator, label: str, **limits: Any
) -> list[dict]:
    """Play the episodes (greedy, task, trial) of a wave, all of them greedy or none, side by side; return their lines."""
    episodes = [executor(jail, tasks[number], judge_of(tasks[number])) for _, number, _ in wave]
    trajectories = rollout(policy, episodes, generator, 0.0 if wave[0][0] else 1.0, len(wave), **limits)
    lines = []
    for (greedy, number, trial), episode, trajectory in zip(wave, episodes, trajectories):
        line = record(label, None, episode, trajectory) | {"greedy": greedy, "task": number, "trial": trial}
        if tolerantly := getattr(ENVIRONMENTS[episode.env], "passes_tolerantly", None):
            line["tolerant"] = float(tolerantly(tasks[number].number, episode.final))
        lines.append(line)
    return lines


# ---------------------------------------------------------------------------------------------------
# the table of results, and means over several runs

METRICS = {"pass@1": "Pass@1", "pass@4": "Pass@4", "pass^4": "pass^4", "greedy": "greedy"}
COLUMNS = ["suite", *METRICS.values(), "tasks", *BASELINES]
PHASES = ("before", "after")  # when a run is measured


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


def grouped(runs: list[dict]) -> dict[str, list[dict]]:
    """Return {label: runs} of runs that differ in their seed only; the label gives every option in which any two runs differ.

    The runs are as `read_run` returns them. An option that an older run's config.json lacks counts as None.
    """
    configs = [run["config"] for run in runs if run["config"]]
    differing = [name for name in dict.fromkeys(name for config in configs for name in config)
                 if name != "seed" and any(config.get(name) != configs[0].get(name) for config in configs)]
    groups: dict[str, list[dict]] = {}
    for run in runs:
        label = ", ".join(f"{name} = {run['config'].get(name)}" for name in differing) or "all runs"
        groups.setdefault(label if run["config"] else "without config.json", []).append(run)
    return groups


def mean_of(results: list[dict]) -> dict:
    """Return each metric as the mean over runs (or suites), with the standard error over them if there are several."""
    values = {metric: [numbers[metric] for numbers in results if metric in numbers] for metric in METRICS}
    means = {metric: fmean(of_runs) for metric, of_runs in values.items() if of_runs}
    return means | {f"{metric}_se": standard_error(of_runs) for metric, of_runs in values.items() if len(of_runs) > 1}


def reward_curves(runs: list[dict]) -> tuple[list[list[float]], list[float], list[float]]:
    """Return the rewards of runs [runs, steps], their means [steps] and standard errors, up to the end of the shortest run."""
    rewards = [[line.get("reward", 0.0) for line in run["metrics"]] for run in runs if run["metrics"]]
    steps = [list(step) for step in zip(*rewards)]
    return rewards, [fmean(step) for step in steps], [standard_error(step) for step in steps]


# ---------------------------------------------------------------------------------------------------
# the report: a page of HTML from a run's files, with everything that a model wrote escaped

RUN_FILES = ["config.json", "summary.json", "metrics.jsonl", "tasks.jsonl", "rejected.jsonl", "trajectories.jsonl"]
SMALL_FILES = RUN_FILES[:3]  # which are all that a comparison needs
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
    "trained_tokens": "sampled tokens of the tasks with signal; falls with it, and rises as episodes grow longer",
}


def read_file(path: Path) -> dict | list[dict]:
    """Return a .json file's object or a .jsonl file's list, empty if there is no file. Raises ValueError if damaged."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    parts = text.split("\n")[:-1] if path.suffix == ".jsonl" else [text or "{}"]  # a crash can leave half a line
    try:
        objects = [dict(json.loads(part)) for part in parts]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
    return objects if path.suffix == ".jsonl" else objects[0]


def read_run(run: Path, names: Iterable[str] = RUN_FILES) -> dict[str, Any]:
    """Return {name without its ending: content} of a run's files, and its "path"; raises ValueError if all lack or one is damaged."""
    if not any((run / name).exists() for name in RUN_FILES):
        raise ValueError(f"{str(run)!r} is not the folder of a run: it holds none of {', '.join(RUN_FILES)}")
    return {"path": str(run), **{name.partition(".")[0]: read_file(run / name) for name in names}}


def write_report(run: Path, *others: Path) -> Path:
    """Write report.html from a run's files, interrupted or not, and compare it with other runs, if any; return its path.

    Raises ValueError if a folder is not that of a run, or a file is damaged.
    """
    files, compared = read_run(run), [read_run(other, SMALL_FILES) for other in others]
    config, summary = files["config"], files["summary"]
    try:
        sections = [
            header(config, summary),
            comparison_section([files, *compared]) if others else "",
            results_section(summary.get("before", {}), summary.get("after", {})),
            filter_section(summary.get("filter"), files["rejected"], files["tasks"]),
            learning_section(files["metrics"]),
            tasks_section(files["tasks"]),
            transcripts_section(files["trajectories"]),
            cost_section(config, summary),
        ]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # it is JSON, but not a run's
        folders = " or ".join(repr(str(folder)) for folder in (run, *others))
        raise ValueError(f"a file of {folders} is damaged, or not one that a run writes: {error!r}") from error
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


def folded(title: str, quiet: str, *parts: str, mark: str = "") -> str:
    """Content behind a title that opens it; `title` and `quiet` are text, `parts` and the `mark` before the title are HTML."""
    return f"<details><summary>{mark}{shown(title)} <small>{shown(quiet)}</small></summary>{''.join(parts)}</details>"


def titled(name: object, text: object) -> str:
    """Code or a message under its name."""
    return f"<h4>{shown(name)}</h4><pre>{shown(text)}</pre>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """What colours mean, from (classes, text)."""
    colours = [f"<span><i class='{classes}'></i> {shown(text)}</span> " for classes, text in entries]
    return f"<p class=legend>{''.join(colours)}</p>"


def figure(title: str, spoken: str, drawing: str) -> str:
    """A drawing of 348 x 184 units below its title; `spoken` is what a screen reader says of it."""
    return (f"<figure><figcaption><b>{shown(title)}</b></figcaption>"
            f"<svg viewBox='0 0 348 184' role=img aria-label='{shown(spoken)}'>{drawing}</svg></figure>")


def bar_chart(series: list[tuple[str, dict]], metrics: dict[str, str] = METRICS) -> str:
    """Draw each metric as a cluster of bars with error bars, a bar for each series (classes, numbers); 1 is 135 units high."""
    drawing, room = "<path class='axis' d='M2 160H346'/>", 344 / len(metrics)  # for a cluster
    width = (room - 10) / len(series)  # for a bar and a gap
    for left, (metric, label) in zip(itertools.count(2, room), metrics.items()):
        drawing += f"<text x='{left + room / 2:.1f}' y='178'>{label}</text>"
        for x, (classes, numbers) in zip(itertools.count(left + 5, width), series):
            if (share := numbers.get(metric)) is not None:
                top, error, middle = 160 - 135 * share, 135 * numbers.get(f"{metric}_se", 0), x + width / 2
                size = f"x='{x + 1:.1f}' y='{top:.1f}' width='{width - 2:.1f}' height='{160 - top:.1f}' rx='2'"
                drawing += f"<rect class='{classes}' {size}/><path class='error' d='M{middle:.1f} {top - error:.1f}v{2 * error:.1f}'/>"
                if width > 15:  # or the figures would run into each other
                    drawing += f"<text x='{middle:.1f}' y='{top - error - 5:.1f}'>{100 * share:.0f}</text>"
    return drawing


def line_chart(lines: list[tuple[str, list[float]]], bands: Iterable[tuple[str, list[float], list[float]]] = ()) -> str:
    """Draw shares from 0 to 1 over the steps: lines (classes, values), over bands (classes, values, errors to either side)."""
    steps = max((len(values) for _, values in lines), default=1)
    drawing = "".join(f"<path class='axis' d='M40 {y}H344'/><text x='18' y='{y + 4}'>{text}</text>"
                      for y, text in [(25, "100%"), (92.5, "50%"), (160, "0%")])
    drawing += f"<text x='58' y='178'>step 0</text><text x='322' y='178'>step {steps - 1}</text>"

    def points(values: Iterable[float]) -> list[str]:
        return [f"{40 + 300 * step / max(steps - 1, 1):.1f},{160 - 135 * value:.1f}" for step, value in enumerate(values)]

    for classes, values, errors in bands:
        upper, lower = (points(value + sign * error for value, error in zip(values, errors)) for sign in (1, -1))
        drawing += f"<polygon class='{classes}' points='{' '.join(upper + lower[::-1])}'/>"
    for classes, values in lines:
        *_, (x, y) = (point.split(",") for point in points(values))
        drawing += f"<polyline class='{classes}' points='{' '.join(points(values))}'/><circle class='{classes}' cx='{x}' cy='{y}' r='3'/>"
    return drawing


def header(config: dict, summary: dict) -> str:
    """The run's model, seed, time and memory, and whether it has finished."""
    cost = "not finished: some sections are empty"
    if summary:
        time = timedelta(seconds=round(sum(summary.get("wall_s", {}).values())))
        cost = f"{time} of wall time, {summary.get('peak_memory_bytes', 0) / 2**30:.2f} GiB at its peak"
    model, seed = shown(config.get("model", "?")), shown(config.get("seed", "?"))
    return f"<h1>Self-challenging run</h1><p>Model <b>{model}</b>, seed {seed}, {cost}</p>"


def comparison_section(runs: list[dict]) -> str:
    """Several runs: what sets them apart, their results and learning curves as means over the runs of a group, and each alone."""
    groups = grouped(runs)
    note = (f"{len(runs)} runs, {'grouped by the options in which they differ' if len(groups) > 1 else 'alike but for their seed'}; "
            f"below the comparison, this page is about the first of them, {shown(runs[0]['path'])}. Bars and figures are means over "
            "runs, ± one standard error over runs, which a single run does not have; pale bars are before training.")
    colours = {label: f"c{place % 5}" for place, label in enumerate(groups)}
    named = legend((colours[label], f"{label} (runs: {len(members)})") for label, members in groups.items())
    rows = [[run["path"], run["config"].get("seed", "?"), label, *row] for label, members in groups.items() for run in members
            for row in result_rows(run["summary"].get("before", {}), run["summary"].get("after", {})) or [["not finished"]]]
    return section("Comparison", note, named, *group_results(groups, colours), group_curves(groups, colours),
                   folded("Each run", "± one standard error over tasks", table(["run", "seed", "group", *COLUMNS], rows)))


def group_results(groups: dict[str, list[dict]], colours: dict[str, str]) -> list[str]:
    """Each suite before and after training, as a chart and in a table, from means over the runs of each group."""
    charts, rows, columns = [], [], ["suite", "group", "training", *METRICS.values(), "runs"]
    for suite in dict.fromkeys(suite for runs in groups.values() for run in runs for suite in run["summary"].get("before", {})):
        series = []
        for label, when in itertools.product(groups, PHASES):
            results = [run["summary"][when][suite] for run in groups[label] if suite in run["summary"].get(when, {})]
            numbers = mean_of(results)
            series.append((colours[label] + " pale" * (when == "before"), numbers))
            rows.append([suite, label, when, *(percent(numbers, metric) for metric in METRICS), len(results)])
        charts.append(figure(suite, f"{suite}, before and after training; the table gives the figures", bar_chart(series)))
    return [f"<div class=charts>{''.join(charts)}</div>", table(columns, rows)] if rows else []


def group_curves(groups: dict[str, list[dict]], colours: dict[str, str]) -> str:
    """The reward over the steps: a thin line a run, and a thick one for the mean of a group, as far as its shortest run goes."""
    curves = [(colours[label], *reward_curves(runs)) for label, runs in groups.items()]
    lines = [(f"{classes} thin", rewards) for classes, runs, *_ in curves for rewards in runs]
    lines += [(f"{classes} thick", means) for classes, _, means, _ in curves if means]
    title = "Reward on the training tasks: each run thin, the mean thick, as far as the shortest run goes"
    return figure(title, f"{len(lines)} curves of the reward over the steps", line_chart(lines)) if lines else ""


def results_section(before: dict, after: dict) -> str:
    """Held-out success before and after training, as bars and as a table."""
    note = ("Hand-written tasks that occur nowhere in training; per cent, ± one standard error over tasks. Pass@1: one "
            "sampled trial; Pass@4: at least one of four; pass^4: all four; greedy: the most likely behaviour. Doing "
            "nothing should pass no task, the reference solution every task. A change below two standard errors may be noise.")
    colours, charts = legend([("before", "before training"), ("after", "after training")]), []
    for suite in dict.fromkeys([*before, *after]):
        pair = [(when, results.get(suite, {})) for when, results in zip(PHASES, (before, after))]
        spoken = "; ".join(f"{label} {percent(numbers, m)} {when}" for m, label in METRICS.items() for when, numbers in pair)
        charts.append(figure(suite, f"{suite}: {spoken}", bar_chart(pair)))
    parts = [colours, f"<div class=charts>{''.join(charts)}</div>", table(COLUMNS, result_rows(before, after))] if charts else []
    return section("Held-out tasks, before and after", note, *parts)


def survivors(counts: dict[str, int]) -> list[tuple[str, float, str]]:
    """Return the filter's funnel, from the attempts to the tasks kept: (what is known of the rest, its share, as text)."""
    total = left = sum(counts.values())
    rows = [("attempts", 1.0, str(total))]
    for stage, survived in SURVIVED.items():
        if counts.get(stage):
            left -= counts[stage]
            rows.append((survived, left / total, f"{left} ({left / total:.0%})"))
    return rows


def filter_section(counts: dict | None, rejected: list[dict], tasks: list[dict]) -> str:
    """How many attempts survived each stage of the filter, and an example of every kind of rejection."""
    note = ("The challenger's attempts, and the share that survives each stage. Few survivors are normal: of an 8B model's "
            "tasks on Retail the paper kept 5 %. Many duplicates mean that the challenger has run out of ideas.")
    counts = counts or {**Counter(str(line.get("stage")) for line in rejected), "ok": len(tasks)}
    kinds: dict[str, list[dict]] = {}  # a kind: the same stage, and the same first words but for numbers
    for line in rejected:
        reason = str(line.get("reason")).split("\n")[0][:80].rstrip(":")
        kinds.setdefault(f"{line.get('stage')}: {re.sub('[0-9]+', 'N', reason)}", []).append(line)
    frequent = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    examples = [folded(kind, f"× {len(lines)}", task_parts(lines[0])) for kind, lines in frequent]
    parts = [bars(survivors(counts)), "<h3>Why tasks were rejected</h3>", *examples] if any(counts.values()) else []
    return section("The filter", note, *parts)


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
    chart = figure("Reward and signal", f"reward and signal over {len(metrics)} steps; the first and the last are given below",
                   line_chart([(name, [line.get(name, 0.0) for line in metrics]) for name in ("signal", "reward")]))
    figures = [f"<p><b>{name}</b> {shown(metrics[0].get(name))} → {shown(metrics[-1].get(name))}<br><small>{normal}</small>"
               for name, normal in NORMAL.items()]
    colours = legend([("reward", "reward"), ("signal", "share of tasks with signal")])
    return section("Learning curve", note, colours, chart, "<h3>First and last step, and what is normal</h3>", *figures)


def tasks_section(tasks: list[dict]) -> str:
    """Six of the kept tasks, spread evenly over the file."""
    note = f"Up to six of {len(tasks)}, evenly spread. Judge for yourself whether each checks what it asks."
    chosen = tasks if len(tasks) <= 6 else [tasks[i * len(tasks) // 6] for i in range(6)]
    cards = [folded(str(t.get("instruction")), f"{t.get('env')}, seed {t.get('seed')}", task_parts(t)) for t in chosen]
    return section("Tasks that were kept", note, *cards)


def transcripts_section(trajectories: list[dict]) -> str:
    """A few episodes: the reward, the tools that were called, and every message."""
    note = "Where there is one, a held-out task that failed before training and succeeded after it; then one of each phase."
    return section("Transcripts", note, *map(transcript, chosen_trajectories(trajectories)))


def transcript(t: dict) -> str:
    """One episode."""
    messages, reward = t.get("messages") or [], t.get("reward")
    verdict = "no reward" if reward is None else f"{'✓' if reward else '✗'} reward {shown(reward)}"  # None does not count
    mark = f"<b class={'won' if reward else 'lost'}>{verdict}</b> "
    quiet = f"{t.get('env')}, {t.get('status')}{', greedy' if t.get('greedy') else ''}; tools: {tools_called(messages) or 'none'}"
    parts = (titled(message.get("role"), message.get("content")) for message in messages)
    return folded(f"{t.get('phase')}: {t.get('instruction')}", quiet, *parts, mark=mark)


def tools_called(messages: list[dict]) -> str:
    """Return which functions an episode's actions call, other than Python's own, and how often, as in "amount, add × 2"."""
    calls: Counter = Counter()
    for message in messages:
        with suppress(FormatError):  # what cannot be read was not run
            step = parse_step(str(message.get("content")))
            if message.get("role") == "assistant" and step.kind == "action":
                calls.update(re.findall(r"(?<![\w.])(?<!def )[^\W\d]\w*(?=\()", step.content))
    tools = {name: number for name, number in calls.items() if not (hasattr(builtins, name) or iskeyword(name))}
    return ", ".join(name + (f" × {number}" if number > 1 else "") for name, number in tools.items())


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
    """Seconds and peak memory of each phase, options and versions."""
    note = "Rollouts, not gradient steps, are the usual cost: in the paper challenging and rollouts take over nine tenths."
    seconds, memory = summary.get("wall_s", {}), summary.get("memory_bytes", {})
    times = bars([(phase, value / (sum(seconds.values()) or 1), f"{value:.1f} s") for phase, value in seconds.items()])
    peaks = bars([(phase, value / (max(memory.values()) or 1), f"{value / 2**30:.2f} GiB") for phase, value in memory.items()])
    details = table(["name", "value"], [*config.items(), *summary.get("versions", {}).items()])
    return section("Time and memory, options and versions", note, times, *(["<h3>Peak memory</h3>", peaks] if memory else []),
                   folded("Options and versions", "", details))


# The colours, which suit all kinds of colour vision, and what a drawing needs; also in the pictures of tests/figures.py.
DRAWN = """:root { color-scheme: light dark; --page: #faf9f7; --card: #fff; --ink: #23272c; --quiet: #5d656e; --line: #e1dfda;
  --before: #a4acb6; --after: #0072b2; --signal: #c65300; --kept: #00805d; --third: #a0508a; --fourth: #7a6a00; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #15181b; --card: #1d2125; --ink: #e4e7ea; --quiet: #a3abb4;
  --line: #343a40; --before: #7d8792; --after: #56b4e9; --signal: #f0a35e; --kept: #40bf95; --third: #e09fce; --fourth: #d8c84a; } }
.before { --colour: var(--before); } .after, .reward, .c0 { --colour: var(--after); } .signal, .c1 { --colour: var(--signal); }
.c2 { --colour: var(--kept); } .c3 { --colour: var(--third); } .c4 { --colour: var(--fourth); }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; text-anchor: middle; } .axis { stroke: var(--line); }
rect, circle, polygon { fill: var(--colour); } .pale { opacity: .4; } .error { stroke: var(--ink); stroke-width: 1.3; }
polyline { fill: none; stroke: var(--colour); stroke-width: 2; } polyline.signal { stroke-dasharray: 4 3; }
polyline.thin { stroke-width: 1; opacity: .5; } circle.thin { display: none; } polyline.thick { stroke-width: 2.6; }
polygon { opacity: .2; }"""
# Should an escape ever be forgotten, the policy in the second meta line still forbids every script and connection.
PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'">
<meta name=viewport content="width=device-width, initial-scale=1">
<title>Self-challenging run</title>
<style>
""" + DRAWN + """
* { box-sizing: border-box; print-color-adjust: exact; }
body { max-width: 52rem; margin: 0 auto; padding: 1.5rem 1rem 5rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
section { margin-top: 3.25rem; } h1 { margin: 1rem 0 0; line-height: 1.2; } h2 { margin: 0; font-size: 1.3rem; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1rem; } h4 { margin: .9rem 0 .25rem; font-size: .8rem; color: var(--quiet); }
.note, small, .legend { color: var(--quiet); font-size: .88rem; } .note { margin: .3rem 0 1.1rem; } summary { cursor: pointer; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .88rem; white-space: nowrap; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left; } th { color: var(--quiet); }
@media (max-width: 30rem) { table { font-size: .74rem; } th, td { padding-right: .45rem; } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0 1rem; }
figure, details { margin: .6rem 0; padding: .65rem .95rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; } svg { display: block; width: 100%; max-width: 28rem; margin: .3rem auto 0; }
.legend span { display: inline-block; margin-right: .9rem; } .legend i { display: inline-block; width: .85rem; margin: 0 .1rem -.05rem 0; }
i { background: var(--colour); } .won { color: var(--kept); } .lost { color: var(--signal); }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: .5rem .9rem; align-items: center; font-size: .9rem; }
.track { background: var(--line); --colour: var(--kept); } .track, i { display: block; height: .85rem; border-radius: 4px; }
pre { margin: 0; padding: .65rem .8rem; border-radius: 6px; background: var(--page); white-space: pre-wrap;
  font: .83rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
@media print { :root { --page: #fff; } body { max-width: none; padding: 0; } pre { border: 1px solid var(--line); }
  .wide { overflow: visible; } table { white-space: normal; font-size: .75rem; } th { overflow-wrap: normal; }
  h2, h3, h4, summary, .note, .legend { break-after: avoid; }
  figure, tr, .note { break-inside: avoid; } details::details-content { content-visibility: visible; block-size: auto; } }
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
            finished, write = continued(arguments.episodes, setting)
            with advice_on_memory(arguments.policy):
                policy = load_policy(arguments.policy, arguments.adapter, seed=arguments.seed)
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


def continued(path: Path | None, setting: dict) -> tuple[list[dict], Callable[[list[dict]], None]]:
    """Return the episodes in a file of an interrupted evaluation, if there is one, and the function that appends others.

    The file's first line is the setting. Raises ValueError if it is another one.
    """
    if path is None:
        return [], lambda lines: None
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[:text.rfind("\n") + 1]  # without the half line that a crash may have left
    lines = [json.loads(line) for line in whole.splitlines()] or [setting]
    if lines[0] != setting:
        raise ValueError(f"{str(path)!r} holds the episodes of another evaluation: give --episodes a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(whole or json.dumps(setting) + "\n", encoding="utf-8")
    return lines[1:], partial(append_lines, path)


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
    add("--episodes", type=Path, metavar="FILE", help="write the episodes here, --parallel at a time; those in it already are not played again")
    add("--json", action="store_true", help="print one JSON object, {suite: numbers}, instead of the table")
    add_rollout_options(parser)
    add("--report", metavar="RUN", type=Path, nargs="+",
        help="only rebuild report.html in the folder of the first run; with several, it begins with their comparison")
    arguments = parser.parse_args()

    def work() -> None:
        if arguments.report:
            print(write_report(*dict.fromkeys(arguments.report)))
            return
        results = measure(arguments)
        print(json.dumps(results) if arguments.json else format_table(results))

    def how_to_go_on() -> str:
        if arguments.report:
            return "the report was not written"
        if not arguments.episodes:
            return "nothing was measured (with --episodes FILE it could go on from here)"
        return f"the same command goes on from the episodes in {arguments.episodes}"

    return guarded("eval.py", work, how_to_go_on)


if __name__ == "__main__":
    sys.exit(main())
