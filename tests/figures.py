"""The README's pictures, from what is kept of its runs, a few kilobytes each; the figures are computed by the report's own code.

    python tests/results.py --seeds 0 1 2 3 4 --keep tests/figures/runs    (plays the runs and keeps these files)
    python tests/figures.py                                                 (draws learning.svg, results.svg and filter.svg)

Runs that differ in their seed only are one group; an error is one standard error over its runs. Both suites count alike.
"""
import argparse
import sys
from collections import Counter
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "figures"
sys.path.insert(0, str(FOLDER.parent.parent))

from eval import DRAWN, PHASES, SMALL_FILES, curves, grouped, line_chart, mean_of, read_run, survivors  # noqa: E402
from verify import guarded  # noqa: E402

NAMES = {"--filter": "filtered", "--no-filter": "not filtered (--no-filter)"}
METRICS = {"pass@1": "Pass@1 (sampled)", "greedy": "greedy", "pass@4": "Pass@4"}


def picture(title: str, drawing: str, height: int, entries: list[tuple[str, str]]) -> str:
    """Return an SVG file in light and dark colours: a title, a drawing of 348 x `height` units, and a legend of (classes, text)."""
    for row, (classes, text) in enumerate(entries):
        y = height + 14 + 18 * row
        drawing += f"\n<rect class='{classes}' x='14' y='{y - 9}' width='11' height='11' rx='2'/>" if classes else ""
        drawing += f"<text class='left' x='{31 if classes else 14}' y='{y}'>{escape(text)}</text>"
    size = f"viewBox='0 -22 348 {height + 30 + 18 * len(entries)}' width='400'"
    return (f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' aria-label='{escape(title)}'>\n<style>\n{DRAWN}\n"
            "svg .left { text-anchor: start; } svg .title { fill: var(--ink); font-size: 12px; font-weight: 600; }\n"
            ".track { fill: var(--line); } .error { stroke: var(--ink); stroke-width: 1.3; }\n</style>\n"
            f"<text class='title' x='174' y='-6'>{escape(title)}</text>\n{drawing}\n</svg>\n")


def bars(rows: list[tuple[str, str, float, float, str]], left: int, right: int) -> str:
    """Draw the rows that the report's `bars` takes, of 24 units each, with full bars from `left` to `right`."""
    drawing, room = "", right - left
    for row, (classes, label, length, error, text) in enumerate(rows):
        y, end = 16 + 24 * row, left + room * length
        drawing += f"<text class='left' x='4' y='{y}'>{escape(label)}</text>"
        drawing += f"<text class='left' x='{right + 10}' y='{y}'>{escape(text)}</text>"
        drawing += f"<rect class='track' x='{left}' y='{y - 10}' width='{room}' height='13' rx='2'/>"
        drawing += f"<rect class='{classes}' x='{left}' y='{y - 10}' width='{room * length:.1f}' height='13' rx='2'/>"
        drawing += f"<path class='error' d='M{end - room * error:.1f} {y - 3.5}h{2 * room * error:.1f}'/>" if error else ""
    return drawing


def learning(groups: dict[str, list[dict]]) -> str:
    """Draw the reward over the steps: of each run, and the mean over the runs of each group."""
    entries = [(f"c{place % 5}", label) for place, label in enumerate(groups)]
    note = ("", "thin: each seed; thick: their mean")
    return picture("Reward on the training tasks", line_chart(curves(groups, "reward")), 184, [*entries, note])


def over_suites(results: dict[str, dict]) -> dict:
    """Return the means over the suites of a run's results, without their errors."""
    means = mean_of(list(results.values()))
    return {metric: means[metric] for metric in METRICS if metric in means}


def results(groups: dict[str, list[dict]]) -> str:
    """Draw the results before and after training, the mean over the suites and the runs of each group."""
    rows, entries = [], [(f"c{place % 5}", label) for place, label in enumerate(groups)]
    for metric, name in METRICS.items():
        for place, runs in enumerate(groups.values()):
            for when, shade in zip(PHASES, (" pale", "")):
                means = mean_of([over_suites(run["summary"].get(when, {})) for run in runs])
                if metric in means:
                    share, error = means[metric], means.get(f"{metric}_se", 0)
                    rows.append((f"c{place % 5}{shade}", name, share, error, f"{100 * share:.0f}"))
                    name = ""  # which stands beside the first bar only
    note = ("", "pale: before training; ± one standard error over seeds")
    return picture("Held-out tasks solved, in per cent", bars(rows, 132, 310), 24 * len(rows), [*entries, note])


def funnel(runs: list[dict]) -> str:
    """Draw the share of the challenger's attempts that survives each stage of the filter, of all these runs together."""
    rows = survivors(sum((Counter(run["summary"].get("filter", {})) for run in runs), Counter()))
    return picture(f"What the filter keeps of the attempts of {len(runs)} runs", bars(rows, 144, 260), 24 * len(rows), [])


def draw(runs: Path, out: Path) -> list[Path]:
    """Draw the pictures of the runs in the folder `runs` into the folder `out`; return their paths. Raises ValueError if there are none."""
    kept = [read_run(run, SMALL_FILES) for run in sorted(runs.glob("*")) if run.is_dir()]
    if not kept:
        raise ValueError("there are no runs in tests/figures/runs: make them with python tests/results.py --keep tests/figures/runs")
    groups = {NAMES.get(label, label): members for label, members in grouped(kept).items()}
    filtered = [run for run in kept if run["config"].get("filter")]
    pictures = {"learning": learning(groups), "results": results(groups), "filter": funnel(filtered)}
    for name, text in pictures.items():
        (out / f"{name}.svg").write_text(text, encoding="utf-8")
    return [out / f"{name}.svg" for name in pictures]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    sys.exit(guarded("figures.py", lambda: print(*draw(FOLDER / "runs", FOLDER), sep="\n"), lambda: "nothing was drawn"))
