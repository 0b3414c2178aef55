"""Measuring a policy: held-out suites, pass@k and pass^k with their errors, the baselines beside them, the report.

    python eval.py --suite calculator shop --policy tiny --adapter runs/first/adapter
    python eval.py --suite retail --tau-bench PATH --policy reference
    python eval.py --report runs/first              (rebuilds runs/first/report.html)
    python eval.py --report runs/first runs/second  (... and compares the runs in it)

Like the paper (section 4) we report Pass@1 averaged over four trials, and Pass@4. Departures, and why:

* every metric of a policy has a standard error over tasks: with a few dozen tasks, several points are noise.
* greedy decoding is measured too. Training sharpens a policy, which lifts the sampled Pass@1 even where
  nothing new was learnt; the most likely behaviour shows whether something was.
* pass^4 of TauBench stands beside Pass@4: whether all four trials succeed, that is, whether one can rely on it.
* the users of Retail and Airline are played by the policy's own base, or whatever --user-endpoint names; at test the
  paper's were GPT-4o, so its figures, which the table shows below, are not of the same users.
* an episode whose simulated user failed (an endpoint that is down) is left out and counted, not scored 0.
* M3ToolEval's check accepts 68 for 68.71 and refuses some right answers: a tolerant check is reported beside it.
* two baselines stand beside every suite: doing nothing, which finds tasks that need no work, and the replayed
  reference solution, which finds tasks that cannot be solved.

The toy suites are tasks like any other. Those of the paper are judged by the benchmarks' own rules, in this process:
the code that a model writes never sees a reference answer.

Read next: selfchallenge.py, which measures before and after training; before: rl.py, which plays the episodes.
"""
import argparse
import hashlib
import json
import math
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from html import escape
from operator import itemgetter
from pathlib import Path
from statistics import fmean, stdev
from string import Template
from textwrap import shorten
from typing import Any

if __name__ == "__main__":  # while the libraries load: seconds, in which they may swallow an exception
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted; nothing was begun\n"), os._exit(1)))

from tqdm import tqdm

from rl import Help, Policy, add_rollout_options, advice_on_memory, append_lines, executor, in_a_sentence, load_policy
from rl import natural, positive, prepare, read_tasks, record, rollout, rollout_limits, seeded, versions
from tools import ENVIRONMENTS, BenchmarkEnvironment, make_environment
from verify import STAGES, BenchmarkTask, Jail, Task, TaskError, guarded, verdict_on, what_is_left

import torch  # after rl.py, which says how its threads wait

SUITES = ("calculator", "shop")  # the toy suites, which need no download
PAPER_MODELS = ["Llama-3.1-8B-Instruct", "... after self-challenging", "... one model for all",
                "... after distillation", "Llama-3.1-70B-Instruct"]
PAPER = {  # table 1 of the paper, a pair for each of these (it has PAE, too): Pass@1 averaged over four trials, Pass@4
    "calculation": [(0.203, 0.438), (0.318, 0.625), (0.307, 0.583), (0.432, 0.729), (0.573, 0.792)],
    "web": [(0.162, 0.421), (0.449, 0.676), (0.456, 0.676), (0.500, 0.824), (0.640, 0.794)],
    "retail": [(0.089, 0.157), (0.130, 0.252), (0.113, 0.235), (0.289, 0.487), (0.346, 0.565)],
    "airline": [(0.025, 0.100), (0.042, 0.100), (0.042, 0.100), (0.067, 0.233), (0.092, 0.200)],
}


def load_suite(name: str, airline: str = "paper") -> list[Task]:
    """Return the tasks of a suite, which occur nowhere in training; raises ValueError if it is unknown or not at hand.

    Of the 50 tasks for Airline the paper leaves out the 20 whose reference writes nothing; airline="all" keeps them.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown suite {name!r}: choose from {', '.join(ENVIRONMENTS)}")
    if not issubclass(ENVIRONMENTS[name], BenchmarkEnvironment):
        return list(read_tasks(ENVIRONMENTS[name].suite))
    world, tasks = make_environment(name), []
    for number, task in enumerate(world.held_out):
        if name != "airline" or airline == "all" or world.writes(number):
            seed, group = world.place(number)
            tasks.append(BenchmarkTask(name, seed, task.instruction, number, group))
    return tasks


# ---------------------------------------------------------------------------------------------------
# metrics
#
# The example's held-out cousin, whose parameters never occur together in training:
#   "Take the amount of chair, add 4, then multiply by 7."
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
    the tasks. With fewer than four trials there is no "pass@4" and no "pass^4". NaN is a trial that does not count:
    "user_failed" is the number of these, if there are any. Raises ValueError if none of the sampled ones counts.
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
    numbers = {"n": len(trials)}
    for metric, per_task in values.items():
        if per_task:
            numbers |= {metric: fmean(per_task), f"{metric}_se": standard_error(per_task)}
    failed = int(rewards.isnan().sum() + greedy.isnan().sum())
    return numbers | ({"user_failed": failed} if failed else {})


# ---------------------------------------------------------------------------------------------------
# what is measured: two baselines, and a policy

BASELINES = ("nothing", "reference")


def play_baseline(name: str, jail: Jail, task: Task) -> bool:
    """Whether a baseline passes the task: in a sound suite, "nothing" passes none of them and "reference" all.

    "nothing" does nothing and answers None; "reference" is the task's own solution, or that of the benchmark.
    """
    environment, answer = make_environment(task.env, task.seed), None
    if name == "reference" and isinstance(task, BenchmarkTask):
        answer = environment.solve(task.number)
    elif name == "reference":
        try:
            environment, answer = what_is_left(jail, task, 0, name, task.solution)
        except TaskError:  # it breaks off
            return False
    return verdict_on(jail, task, environment, answer).passed


def play_baselines(jail: Jail, tasks: list[Task]) -> dict[str, list[bool]]:
    """Return {baseline: whether it passes each of a suite's tasks}."""
    with ThreadPoolExecutor(2) as workers:
        return {name: list(workers.map(partial(play_baseline, name, jail), tasks)) for name in BASELINES}


def evaluate_policy(
    policy: Policy | str, jail: Jail, suites: dict[str, list[Task]], seed: int = 0, trials: int = 4,
    label: str = "evaluate", finished: Iterable[dict] = (), write: Callable[[list[dict]], None] = lambda lines: None,
    parallel: int = 256, **limits: Any,
) -> dict[str, dict]:
    """Play every task of {suite: tasks} `trials` times at temperature 1 and once greedily; return {suite: numbers}.

    The numbers of a suite (`numbers_of`) do not depend on which others are played. `parallel` episodes are a wave, and
    what one samples depends on its whole wave. As a wave ends its records go to `write`: lines of trajectories.jsonl
    (`rl.record`) of the phase `label`, with "greedy", "task" and "trial". With those of an interrupted evaluation in
    `finished` and the same `parallel` the rest comes out as if nothing had happened. `limits` (turn_tokens, context,
    user) go to `rl.rollout`. The policy may be the name of a baseline, whose trials are all alike, and which has no
    records. Raises ValueError if no sampled episode of a suite counts (`summarize`), and what `rollout` does.
    """
    results = {}
    for suite, tasks in suites.items():
        baselines = play_baselines(jail, tasks)
        sampled = [(False, number, trial) for number in range(len(tasks)) for trial in range(trials)]
        greedy = [(True, number, 0) for number in range(len(tasks))]
        waves = [(first, places[first:first + parallel])
                 for places in (sampled, greedy) for first in range(0, len(places), parallel)]
        lines = {(line["greedy"], line["task"], line["trial"]): line for line in finished if line["env"] == suite}
        if isinstance(policy, str):
            lines = {place: {"reward": float(baselines[policy][place[1]])} for place in sampled + greedy}
        with tqdm(total=len(sampled + greedy), desc=f"{label} {suite}", unit="episode", dynamic_ncols=True) as bar:
            for first, wave in waves:
                if all(place in lines for place in wave):
                    bar.update(len(wave))
                    continue
                generator = seeded(policy.device, seed, "evaluate", suite, first)
                played = play_wave(policy, jail, tasks, wave, generator, label, bar=bar, **limits)
                new = {place: line for place, line in zip(wave, played) if place not in lines}
                write(list(new.values()))
                lines |= new
        results[suite] = numbers_of(tasks, baselines, [lines[place] for place in sampled + greedy])
    return results


def play_wave(
    policy: Policy, jail: Jail, tasks: list, wave: list[tuple], generator: torch.Generator, label: str, **limits: Any
) -> list[dict]:
    """Play the episodes (greedy, task, trial) of a wave, all greedy or none, side by side; return their records."""
    episodes = [executor(jail, tasks[number]) for _, number, _ in wave]
    rollout(policy, episodes, generator, 0.0 if wave[0][0] else 1.0, len(wave), **limits)
    lines = []
    for (greedy, number, trial), episode in zip(wave, episodes):
        line = record(label, None, episode) | {"greedy": greedy, "task": number, "trial": trial}
        if tolerantly := getattr(ENVIRONMENTS[episode.env], "passes_tolerantly", None):
            line["tolerant"] = float(tolerantly(tasks[number].number, episode.final))
        lines.append(line)
    return lines


def numbers_of(tasks: list, baselines: dict, lines: list[dict]) -> dict:
    """Return a suite's numbers: in all, of the baselines, and in "groups", of which M3ToolEval's tolerant check is one.

    `lines` are the sampled episodes, all trials of a task one after the other, and then the greedy ones.
    """
    def rewards(check: str) -> tuple[torch.Tensor, torch.Tensor]:  # [tasks, trials] and [tasks]; NaN does not count
        values = torch.tensor([math.nan if line[check] is None else line[check] for line in lines])
        return values[:-len(tasks)].view(len(tasks), -1), values[-len(tasks):]

    sampled, greedy = rewards("reward")
    groups = {"tolerant check": summarize(*rewards("tolerant"))} if "tolerant" in lines[0] else {}
    for group in dict.fromkeys(task.group for task in tasks if isinstance(task, BenchmarkTask) and task.group):
        rows = [row for row, task in enumerate(tasks) if task.group == group]
        groups[group] = summarize(sampled[rows], greedy[rows])
    numbers = summarize(sampled, greedy) | {name: fmean(passed) for name, passed in baselines.items()}
    return numbers | ({"groups": groups} if groups else {}) | ENVIRONMENTS[tasks[0].env].provenance


# ---------------------------------------------------------------------------------------------------
# the table of results

METRICS = {"pass@1": "Pass@1", "pass@4": "Pass@4", "pass^4": "pass^4", "greedy": "greedy"}
COLUMNS = ["suite", *METRICS.values(), "tasks", *BASELINES]
PHASES = ("before", "after")  # when a run is measured


def percent(numbers: dict, metrics: Iterable[str]) -> list[str]:
    """Return metrics in per cent, with the standard errors that they have; "–" is one that was not measured."""
    cells = []
    for metric in metrics:
        error = f" ± {100 * numbers[f'{metric}_se']:.1f}" if f"{metric}_se" in numbers else ""
        cells.append(f"{100 * numbers[metric]:.1f}{error}" if metric in numbers else "–")
    return cells


def result_rows(before: dict[str, dict], after: dict[str, dict] | None = None) -> list[list[str]]:
    """Return the table's rows: one a suite, or one before and one after training, each followed by its groups."""
    phases = {"": before} if after is None else {" before": before, " after": after}
    named = []
    for suite in before:
        for when, results in phases.items():
            if suite in results:
                failed = results[suite].get("user_failed")
                named.append((suite + when + f" ({failed} episodes not counted)" * bool(failed), results[suite]))
                named += [(f"- {group}", numbers) for group, numbers in results[suite].get("groups", {}).items()]
    return [[name, *percent(numbers, METRICS), str(numbers.get("n", "–")), *percent(numbers, BASELINES)]
            for name, numbers in named]


def format_table(before: dict[str, dict], after: dict[str, dict] | None = None) -> str:
    """Return {suite: numbers} as text, before and after training if there is an `after`, above the paper's results."""
    paper = {f"paper: {model}, {suite}": {"pass@1": once, "pass@4": four}
             for suite in before for model, (once, four) in zip(PAPER_MODELS, PAPER.get(suite, []))}
    rows = [COLUMNS, *result_rows(before, after), *result_rows(paper)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    users = "; in the paper GPT-4o played the users" if any(ENVIRONMENTS[suite].has_user for suite in before) else ""
    return "\n".join([*lines, f"(per cent of the tasks, ± one standard error{users})"])


# ---------------------------------------------------------------------------------------------------
# the report: a page of HTML from a run's files, with everything that a model wrote escaped (for a second reading)

RUN_FILES = ["config.json", "summary.json", "metrics.jsonl", "tasks.jsonl", "rejected.jsonl", "trajectories.jsonl"]
SMALL_FILES = RUN_FILES[:3]  # which are all that a comparison needs
NORMAL = {  # what the learning curve's figures are, and what is normal for them
    "reward": "mean over the step's rollouts; rises, with noise, because every step plays other tasks",
    "signal": "share of tasks with successes and failures: with a baseline only they teach; falls as tasks get easy",
    "loss": "of either sign, near 0 or not: REINFORCE's loss is no error that has to fall; look at the reward",
    "gradient_norm": "before it is cut to 1; differs from step to step, and 0 means that nothing was learnt",
    "mismatch_kl": "sampler against trainer, which are one model: near 0; above 0.01 something is wrong",
    "trained_tokens": "sampled tokens of the episodes that teach; falls with the signal, rises as episodes grow longer",
}


def read_run(run: Path, names: Iterable[str] = RUN_FILES) -> dict[str, Any]:
    """Return {name without its ending: content} of a run's files, empty where one lacks, and the run's "path".

    Raises ValueError if there is none, or if one is damaged.
    """
    if not any((run / name).exists() for name in RUN_FILES):
        raise ValueError(f"{str(run)!r} is not the folder of a run: it holds none of {', '.join(RUN_FILES)}")
    files: dict[str, Any] = {"path": str(run)}
    for path in map(run.joinpath, names):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        of_lines, lines = path.suffix == ".jsonl", text.split("\n")
        with suppress(ValueError, RecursionError):  # a crash may have left half a line behind the last whole one
            json.loads(lines[-1])
            lines.append("")
        with in_a_sentence("read a file of the run", f"{str(path)!r} is damaged"):
            objects = [dict(json.loads(part)) for part in (lines[:-1] if of_lines else [text or "{}"])]
        files[path.stem] = objects if of_lines else objects[0]
    return files


def write_report(run: Path, *others: Path) -> Path:
    """Write report.html from the files of a run, interrupted or not, and of others to compare it with; return its path.

    Raises ValueError if a folder is not that of a run, or a file is damaged.
    """
    files, compared = read_run(run), [read_run(other, SMALL_FILES) for other in others]
    folders = " or ".join(repr(str(folder)) for folder in (run, *others))
    with in_a_sentence(f"make a report of {folders}", "a file is damaged, or not one that a run writes"):
        parts = page_parts(files, grouped([files, *compared]))
    path = run / "report.html"
    page = PAGE.substitute({name: part or "<p>Nothing was recorded.</p>" for name, part in parts.items()})
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def grouped(runs: list[dict]) -> dict[str, list[dict]]:
    """Return {label: runs}: runs that differ in their seed only, labelled by the options in which any two differ."""
    configs = [run["config"] for run in runs if run["config"]]
    names = dict.fromkeys(name for config in configs for name in config if name != "seed")
    differing = [name for name in names if len({str(config.get(name)) for config in configs}) > 1]
    groups: dict[str, list[dict]] = {}
    for run in runs:
        label = " ".join(as_option(name, run["config"].get(name)) for name in differing) or "all runs"
        groups.setdefault(label if run["config"] else "without config.json", []).append(run)
    return groups


def as_option(name: str, value: object) -> str:
    """Return an option as the command line has it; one that was not given, or that an old run lacks, as "no --name"."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    if isinstance(value, list):
        value = " ".join(value)
    return f"no --{option}" if value is None else f"--{option} {value}"


def mean_of(results: list[dict]) -> dict:
    """Return each metric as the mean over runs (or suites), with the standard error over them if there are several.

    The numbers of a single run stay as they are, with their errors over tasks.
    """
    if len(results) == 1:
        return results[0]
    values = {metric: [numbers[metric] for numbers in results if metric in numbers] for metric in METRICS}
    means = {metric: fmean(of_runs) for metric, of_runs in values.items() if of_runs}
    return means | {f"{metric}_se": standard_error(of_runs) for metric, of_runs in values.items() if len(of_runs) > 1}


def page_parts(run: dict[str, Any], groups: dict[str, list[dict]]) -> dict[str, str]:
    """Return {place in PAGE: HTML}: about a run, and of all groups the results and the curves."""
    config, summary, metrics, tasks = run["config"], run["summary"], run["metrics"], run["tasks"]
    seconds, state = summary.get("wall_s", {}), "not finished, or a run of rl.py alone: some sections are empty"
    if summary:
        minutes, memory = sum(seconds.values()) / 60, summary.get("peak_memory_bytes", 0) / 2**30
        state = f"{minutes:.1f} minutes, {memory:.2f} GiB at its peak"
    others = sum(map(len, groups.values())) - 1
    state += f"; compared with {others} other run{'s' * (others > 1)}" if others else ""
    named = (Path(run["path"]).name, config.get("model", "?"), config.get("seed", "?"), state)
    counts = summary.get("filter") or {**Counter(line["stage"] for line in run["rejected"]), "ok": len(tasks)}
    first, last = (metrics[0], metrics[-1]) if metrics else ({}, {})
    chosen = tasks if len(tasks) <= 6 else [tasks[i * len(tasks) // 6] for i in range(6)]  # spread over the file
    cards = [card(t["instruction"], f"{t['env']}, seed {t['seed']}", task_parts(t)) for t in chosen]
    settings = [(title, "\n".join(f"{name}: {value}" for name, value in values.items()))
                for title, values in [("options", config), ("versions", summary.get("versions", {}))]]
    return {
        "run": fill("<b>{}</b>: model {}, seed {}, {}", named),
        "results": results_section(groups),
        "funnel": bars(survivors(counts)),
        "rejections": rejections(run["rejected"]),
        "learning": learning(groups),
        "figures": fill("<p><b>{}</b> {} → {}<br><small>{}</small></p>",
                        *((name, first.get(name), last.get(name), normal) for name, normal in NORMAL.items())),
        "tasks": "".join(cards),
        "transcripts": "".join(map(transcript, chosen_trajectories(run["trajectories"]))),
        "time": phase_bars(seconds, 1, "{:.1f} s"),
        "memory": phase_bars(summary.get("memory_bytes", {}), 2**30, "{:.2f} GiB"),
        "options": card("Options and versions", "", settings),
    }


def fill(pattern: str, *rows: Iterable[object]) -> str:
    """Return a pattern of HTML for each row, its values in it as text. All that a model wrote is escaped here."""
    texts = [["–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value) for value in row]
             for row in rows]
    return "".join(pattern.format(*map(escape, row)) for row in texts)


def card(title: object, quiet: str, parts: Iterable[tuple], mark: str = "") -> str:
    """A title that opens to its parts (name, text); only the `mark` before it is HTML."""
    summary = fill("{} <small>{}</small>", (title, quiet))
    return f"<details><summary>{mark}{summary}</summary>{fill('<h4>{}</h4><pre>{}</pre>', *parts)}</details>"


def table(columns: list[str], rows: list[list]) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    head = fill("<th scope=col>{}</th>", *zip(columns))
    body = "".join(f"<tr>{fill('<td>{}</td>', *zip(row))}</tr>" for row in rows)
    return f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def bars(rows: Iterable[tuple[str, str, float, float, str]]) -> str:
    """Horizontal bars from (classes, label, length and its error from 0 to 1, text behind)."""
    pattern = ("<span>{1}</span><span class=track style='--length:{2};--error:{3}'><i class='{0}'></i><s></s></span>"
               "<b>{4}</b>")
    lines = fill(pattern, *rows)
    return f"<div class=bars>{lines}</div>" if lines else ""


def phase_bars(values: dict[str, float], unit: float, pattern: str) -> str:
    """Bars of what each phase took, the longest of which is full."""
    most = max(values.values(), default=1)
    return bars(("c2", phase, value / most, 0, pattern.format(value / unit)) for phase, value in values.items())


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """What colours mean, from (classes, text)."""
    return "<p class=legend>" + fill("<span><i class='{}'></i> {}</span> ", *entries) + "</p>"


def results_section(groups: dict[str, list[dict]]) -> str:
    """The results before and after training: bars for each group, of means over its runs, and a table of each run."""
    series, rows = [], []
    for place, (label, runs) in enumerate(groups.items()):
        for when, shade in zip(PHASES, (" pale", "")):
            name = f"{label}, {when} training" if len(groups) > 1 else f"{when} training"
            series.append((f"c{place % 5}{shade}", name, [run["summary"].get(when, {}) for run in runs]))
        for run in runs:
            of_run = result_rows(*(run["summary"].get(when, {}) for when in PHASES)) or [["not finished"]]
            group = [label] if len(groups) > 1 else []
            rows += [[run["path"], run["config"].get("seed", "?"), *group, *row] for row in of_run]
    suites = dict.fromkeys(suite for _, _, of_runs in series for of_run in of_runs for suite in of_run)
    charts = "".join(suite_chart(suite, series) for suite in suites)
    head = legend((classes, name) for classes, name, _ in series) + f"<div class=charts>{charts}</div>"
    if sum(map(len, groups.values())) > 1:
        each = table(["run", "seed", *["group"] * (len(groups) > 1), *COLUMNS], rows)
        note = ("Here bars are means over the runs of a group, and ± is over its runs if it has several. Below, all "
                "but the learning curve is about the run named above.")
        return f"<p class=note>{note}</p>{head}<details><summary>Each run</summary>{each}</details>"
    return head + table(COLUMNS, [row[2:] for row in rows]) if charts else ""


def suite_chart(suite: str, series: list[tuple[str, str, list[dict]]]) -> str:
    """Bars of each metric, one for each series (classes, name, the results of runs)."""
    rows = []
    for metric, label in METRICS.items():
        for classes, _, results in series:
            numbers = mean_of([of_run[suite] for of_run in results if suite in of_run])
            if metric in numbers:
                (text,) = percent(numbers, [metric])
                rows.append((classes, label, numbers[metric], numbers.get(f"{metric}_se", 0), text))
                label = ""  # which stands beside the first bar only
    return f"<figure><figcaption>{fill('<b>{}</b>', [suite])}</figcaption>{bars(rows)}</figure>"


def survivors(counts: dict[str, int]) -> list[tuple[str, str, float, float, str]]:
    """Return the filter's funnel as rows of `bars`, from all attempts to what is known of those that are kept."""
    total = left = sum(counts.values())
    rows = [("c2", "attempts", 1.0, 0.0, str(total))] if total else []
    for stage, survived in STAGES.items():
        if counts.get(stage):
            left -= counts[stage]
            rows.append(("c2", survived, left / total, 0.0, f"{left} ({left / total:.0%})"))
    return rows


def rejections(rejected: list[dict]) -> str:
    """An example of every kind of rejection, the most frequent first; numbers make no difference of kind."""
    kinds: dict[str, list[tuple[str, dict]]] = {}
    for line in rejected:
        reason = shorten(line["reason"].partition("\n")[0].rstrip(":"), 80, placeholder=" …")
        title = f"{line['stage']}: {reason}"
        kinds.setdefault(re.sub("[0-9]+", "N", title), []).append((title, line))
    frequent = sorted(kinds.values(), key=len, reverse=True)
    return "".join(card(title, f"× {1 + len(more)}", task_parts(line)) for (title, line), *more in frequent)


def task_parts(task: dict) -> list[tuple[str, object]]:
    """The parts (name, text) of a task or of a rejection, as far as it has them."""
    parts = [(name, task.get(name)) for name in ("reason", "text", "instruction", "evaluate", "solution")]
    parts += [(f"failure case {number}", code) for number, code in enumerate(task.get("failures") or [], start=1)]
    return [(name, text) for name, text in parts if text]


def line_chart(lines: list[tuple[str, list[float]]]) -> str:
    """Draw shares from 0 to 1 over the steps as lines (classes, values) of SVG, in 348 x 184 units."""
    steps = max((len(values) for _, values in lines), default=1)
    drawing = f"<text x='58' y='178'>step 0</text><text x='322' y='178'>step {steps - 1}</text>"
    for y, text in [(25, "100%"), (92.5, "50%"), (160, "0%")]:
        drawing += f"<path class='axis' d='M40 {y}H344'/><text x='18' y='{y + 4}'>{text}</text>"
    for classes, values in lines:
        points = [f"{40 + 300 * step / max(steps - 1, 1):.1f},{160 - 135 * y:.1f}" for step, y in enumerate(values)]
        line = " ".join([*points, points[-1]])  # its round end is a dot, which is all that one step shows
        drawing += f"<polyline class='{classes}' points='{line}'/>"
    return drawing


def curves(groups: dict[str, list[dict]], metric: str) -> list[tuple[str, list[float]]]:
    """Return lines (classes, values) of a metric: thin ones of runs, thick ones of the means of groups.

    The mean of a group goes as far as its shortest run.
    """
    thin, thick = [], []
    for place, runs in enumerate(groups.values()):
        values = [[line.get(metric, 0.0) for line in run["metrics"]] for run in runs if run["metrics"]]
        thin += [(f"c{place % 5} thin", of_run) for of_run in values]
        thick += [(f"c{place % 5} thick", [fmean(step) for step in zip(*values)])] if values else []
    return thin + thick


def learning(groups: dict[str, list[dict]]) -> str:
    """Reward and signal over the steps."""
    charts = ""
    for metric in ("reward", "signal"):
        if lines := curves(groups, metric):
            spoken = f"{len(lines)} curves of the {metric} over {max(len(values) for _, values in lines)} steps"
            charts += (f"<figure><figcaption><b>{metric}</b></figcaption>"
                       f"<svg viewBox='0 0 348 184' role=img aria-label='{spoken}'>{line_chart(lines)}</svg></figure>")
    names = [f"{label} (runs: {len(runs)})" for label, runs in groups.items()]
    colours = legend((f"c{place % 5}", name) for place, name in enumerate(names)) if len(groups) > 1 else ""
    return f"{colours}<div class=charts>{charts}</div>" if charts else ""


def transcript(t: dict) -> str:
    """An episode: the reward, the tools that were called, and every message."""
    reward = t["reward"]  # None: it does not count
    verdict = "no reward" if reward is None else f"{'✓' if reward else '✗'} reward {reward:g}"
    mark = fill("<b class={}>{}</b> ", ("c2" if reward else "c1", verdict))
    greedy, called = ", greedy" * t.get("greedy", False), t.get("tools", {"?": 1}).items()  # which old runs lack
    tools = ", ".join(name + (f" ×\u00a0{number}" if number > 1 else "") for name, number in called) or "none"
    parts = ((message["role"], message["content"]) for message in t["messages"])
    return card(f"{t['phase']}: {t['instruction']}", f"{t['env']}, {t['status']}{greedy}; tools: {tools}", parts, mark)


def chosen_trajectories(trajectories: list[dict]) -> list[dict]:
    """Of each environment a failure before training and a success at that task after it; of each phase one more."""
    task = itemgetter("env", "seed", "instruction")
    ordered = sorted(trajectories, key=lambda t: (t.get("greedy", False), t["reward"] or 0))  # the best ones last
    phases = {t["phase"]: t for t in ordered}
    failures = {task(t): t for t in ordered if t["phase"] == "before" and t["reward"] == 0}
    lucky = {task(t) for t in ordered if t["phase"] == "before" and t["reward"]}  # that another trial solved already
    solved = [t for t in ordered if t["phase"] == "after" and t["reward"] and task(t) in failures]
    pairs = {t["env"]: [failures[task(t)], t] for t in sorted(solved, key=lambda t: task(t) not in lucky)}
    chosen = [t for pair in pairs.values() for t in pair]
    return chosen + [t for t in phases.values() if t not in chosen]


# The colours, which suit all kinds of colour vision, and what a drawing needs: for tests/figures.py, too.
DRAWN = """:root { color-scheme: light dark; --page: #faf9f7; --card: #fff; --ink: #23272c;
  --quiet: #5d656e; --line: #e1dfda; --c0: #0072b2; --c1: #c65300; --c2: #00805d; --c3: #a0508a; --c4: #7a6a00; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #15181b; --card: #1d2125; --ink: #e4e7ea;
  --quiet: #a3abb4; --line: #343a40; --c0: #56b4e9; --c1: #f0a35e; --c2: #40bf95; --c3: #e09fce; --c4: #d8c84a; } }
.c0 { --colour: var(--c0); } .c1 { --colour: var(--c1); } .c2 { --colour: var(--c2); } .c3 { --colour: var(--c3); }
.c4 { --colour: var(--c4); } rect { fill: var(--colour); } .pale { opacity: .4; } .axis { stroke: var(--line); }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; text-anchor: middle; }
polyline { fill: none; stroke: var(--colour); stroke-width: 2.6; stroke-linecap: round; }
.thin { stroke-width: 1; opacity: .5; }"""
# Should an escape ever be forgotten, the policy in the second meta line still forbids every script and connection.
PAGE = Template("""<!doctype html>
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
h1 { margin: 1rem 0 0; line-height: 1.2; } h2 { margin: 3.25rem 0 0; font-size: 1.3rem; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1rem; } h4 { margin: .9rem 0 .25rem; font-size: .8rem; color: var(--quiet); }
.note, small, .legend { color: var(--quiet); font-size: .88rem; } .note { margin: .3rem 0 1.1rem; }
.note span { white-space: nowrap; }
figure, details { margin: .6rem 0; padding: .65rem .95rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; } figcaption { margin-bottom: .4rem; } summary b { color: var(--colour); }
.wide { margin-top: 1rem; overflow-x: auto; background: /* a shadow at the edge behind which there is more */
  linear-gradient(90deg, var(--page) 1rem, transparent 2rem) local,
  linear-gradient(270deg, var(--page) 1rem, transparent 2rem) local,
  linear-gradient(90deg, var(--line), transparent 1rem), linear-gradient(270deg, var(--line), transparent 1rem); }
details .wide { --page: var(--card); } table { border-collapse: collapse; width: 100%; font-size: min(.88rem, 3vw);
  white-space: nowrap; } th, td { padding: .4rem .7em .4rem 0; border-bottom: 1px solid var(--line); text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0 1rem; }
.charts p { margin: .4rem 0; } svg { display: block; } .legend span { display: inline-block; margin-right: .9rem; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: .5rem .9rem; align-items: center; font-size: .9rem; }
i { display: inline-block; width: .85rem; height: .85rem; border-radius: 4px; background: var(--colour); }
figure .bars > :is(span:not(.track, :empty, :first-child), span:not(.track, :empty, :first-child) + .track,
  span:not(.track, :empty, :first-child) + .track + b) { margin-top: .6rem; }
.track { position: relative; height: .85rem; border-radius: 4px; background: var(--line); }
.track i { display: block; width: calc(100% * var(--length)); }
s { position: absolute; left: calc(100% * (var(--length) - var(--error))); top: .3rem; height: .25rem;
  width: calc(200% * var(--error)); border: solid var(--card); border-width: 1px 0; background: var(--ink); }
pre { margin: 0; padding: .65rem .8rem; border-radius: 6px; background: var(--page); white-space: pre-wrap;
  font: .83rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
details table { font-size: min(.8rem, 3vw); } details :is(th, td) { padding-right: .4em; }
.bars + details { margin-top: 1.5rem; } @page { margin: 15mm 12mm; }
@media print { :root { --page: #fff; } body { max-width: none; padding: 0; } pre { border: 1px solid var(--line); }
  .wide { overflow: visible; background: none; } table, details table { font-size: .68rem; overflow-wrap: normal; }
  td:first-child { white-space: normal; overflow-wrap: anywhere; }
  h2 { margin-top: 2rem; } h2, h3, h4, summary, .note, .legend { break-after: avoid; }
  figure .bars { gap: .15rem .9rem; }
  figure, tr, .note, .legend, .bars, .charts p, summary, pre { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
</style>
<h1>Self-challenging run</h1>
<p>$run</p>
<h2>Held-out tasks, before and after</h2>
<p class=note>Hand-written tasks that occur nowhere in training; per cent, ± one standard error over tasks. Pass@1: one
sampled trial; Pass@4: at least one of four; pass^4: all four; greedy: the most likely behaviour. Doing nothing should
pass no task, the reference solution every task. A change below two standard errors may be noise.</p>
$results
<h2>The filter</h2>
<p class=note>The challenger's attempts, and the share that survives each stage. Few survivors are normal: of an 8B
model's tasks on Retail the paper kept 5 %. Many duplicates mean that the challenger has run out of ideas. (With
<span>--no-filter</span> nothing is rejected but what cannot be read, held-out tasks and duplicates.)</p>
$funnel
<h3>Why tasks were rejected</h3>
<p class=note>One of each kind, and how many there were. Reasons that differ in numbers only are of one kind.</p>
$rejections
<h2>Learning curve</h2>
<p class=note>On the training tasks; whether it carries over to unseen ones is what the held-out suites say. Thin lines
are runs, thick ones the mean of a group, as far as its shortest run goes.</p>
$learning
<h3>First and last step, and what is normal</h3>
<div class=charts>$figures</div>
<h2>Tasks that were kept</h2>
<p class=note>Up to six, evenly spread. Judge for yourself whether each checks what it asks.</p>
$tasks
<h2>Transcripts</h2>
<p class=note>A held-out task that failed before training and succeeded after it, if any; then one of each phase.</p>
$transcripts
<h2>Time and memory, options and versions</h2>
<p class=note>Rollouts, not gradient steps, are the usual cost: with challenging over nine tenths in the paper.</p>
$time
<h3>Peak memory</h3>
$memory
$options
</html>
""")


# ---------------------------------------------------------------------------------------------------
# the command line (for a second reading)

def measure(arguments: argparse.Namespace) -> dict[str, dict]:
    """Return {suite: numbers} of the policy that the command line asks for, each with the "setting" of `setting_of`."""
    prepare(arguments)
    if arguments.adapter and arguments.policy in BASELINES:
        raise ValueError(f"--adapter is for a model, and --policy {arguments.policy} is none")
    suites = {name: load_suite(name, arguments.airline) for name in arguments.suite}  # a wrong name is noticed first
    setting = setting_of(arguments)
    with Jail(allow_weak=arguments.allow_weak_jail) as jail:
        print(jail.describe(), file=sys.stderr)
        finished, write = continued(arguments.episodes, setting)
        with advice_on_memory(arguments.policy):
            policy = arguments.policy
            if policy not in BASELINES:
                policy = load_policy(policy, arguments.adapter, seed=arguments.seed)
            results = evaluate_policy(policy, jail, suites, arguments.seed, arguments.trials,
                                      finished=finished, write=write, **rollout_limits(arguments))
    return {suite: numbers | {"setting": setting} for suite, numbers in results.items()}


def setting_of(options: argparse.Namespace) -> dict:
    """Return what numbers depend on, save for --parallel and checkouts: model, users, decoding, versions."""
    named = ["policy", "model", "adapter", "seed", "trials", "turn_tokens", "context", "airline"]
    endpoint = options.user_endpoint
    adapter = getattr(options, "adapter", None)  # whose name says little: another may have taken its place
    weights = sorted(Path(adapter).glob("adapter_model.*")) if adapter else []
    return {
        **{name: str(getattr(options, name)) for name in named if getattr(options, name, None) is not None},
        **{"adapter_sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in weights},
        "user": f"{options.user_model} at {endpoint}" if endpoint else "the policy's own base",
        "decoding": "Pass@k at temperature 1, greedy at 0; neither top-k nor top-p",
        "versions": versions(),
    }


def continued(path: Path | None, setting: dict) -> tuple[list[dict], Callable[[list[dict]], None]]:
    """Return the episodes in the file of an interrupted evaluation, if there is one, and what appends others to it.

    The file's first line is the setting. Raises ValueError if it is another one, or something else.
    """
    if path is None:
        return [], lambda lines: None
    head = (json.dumps(setting) + "\n").encode()
    content = path.read_bytes() if path.exists() else b""
    whole = content[:content.rfind(b"\n") + 1] or head  # without the half line that a crash may have left
    if not head.startswith(content[:len(head)]):  # of which a crash may have left a part only
        raise ValueError(f"{str(path)!r} holds the episodes of another evaluation, or of other versions of the "
                         "libraries, or something else: name another file, or delete it to begin anew")
    with in_a_sentence(f"go on from {str(path)!r}", "it is damaged: delete it, or name another, to begin anew"):
        lines = [dict(json.loads(line)) for line in whole.splitlines()[1:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    if content.startswith(head):
        os.truncate(path, len(whole))  # what is there is not written again: that might be interrupted, too
    else:
        path.write_bytes(head)
    return lines, partial(append_lines, path)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=Help)
    add = parser.add_argument
    add("--suite", nargs="+", default=list(SUITES), metavar="NAME", help=f"some of {', '.join(ENVIRONMENTS)}")
    add("--policy", default="tiny", help="a model folder or hub name, or a baseline: nothing or reference")
    add("--adapter", help="the folder of a trained adapter, such as runs/<name>/adapter")
    add("--trials", type=positive, default=4, help="sampled trials of each task; at least 4 for Pass@4")
    add("--seed", type=natural, default=0, help="of the sampling")
    add("--airline", default="paper", choices=["paper", "all"], help="the paper's 30 tasks for Airline, or all 50")
    add("--episodes", type=Path, metavar="FILE",
        help="write the episodes here, --parallel at a time; those in it already are not played again")
    add("--json", action="store_true", help="print one JSON object, {suite: numbers}, instead of the table")
    add("--report", metavar="RUN", type=Path, nargs="+",
        help="only rebuild report.html in the folder of the first run; with several, it begins with their comparison")
    add_rollout_options(parser)
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
