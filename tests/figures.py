"""The README's pictures, drawn by the report's own code from what is kept of its runs: a few kilobytes each.

    python tests/results.py --seeds 0 1 2 3 4 --keep tests/figures/runs    (plays the runs and keeps these files)
    python tests/figures.py                                                 (draws learning.svg, results.svg and filter.svg)

Runs that differ in their seed only are one group; an error is one standard error over its runs. Both suites count alike.
"""
import sys
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "figures"
sys.path.insert(0, str(FOLDER.parent.parent))

from eval import (  # noqa: E402
    DRAWN,
    PHASES,
    SMALL_FILES,
    bar_chart,
    grouped,
    line_chart,
    mean_of,
    read_run,
    reward_curves,
    shown,
    survivors,
)
from verify import guarded  # noqa: E402

NAMES = {"filter = True": "filtered", "filter = False": "not filtered (--no-filter)"}
METRICS = {"pass@1": "Pass@1 (sampled)", "greedy": "greedy", "pass@4": "Pass@4"}


def picture(title: str, drawing: str, height: int, entries: list[tuple[str, str]]) -> str:
    """Return an SVG file in light and dark colours: a title, a drawing of 348 x `height` units, and a legend of (classes, text)."""
    for row, (classes, text) in enumerate(entries):
        y = height + 14 + 18 * row
        drawing += f"\n<rect class='{classes}' x='14' y='{y - 9}' width='11' height='11' rx='2'/>" if classes else ""
        drawing += f"<text class='left' x='{31 if classes else 14}' y='{y}'>{shown(text)}</text>"
    size = f"viewBox='0 -22 348 {height + 30 + 18 * len(entries)}' width='522'"
    return (f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' aria-label='{shown(title)}'>\n<style>\n{DRAWN}\n"
            "svg .left { text-anchor: start; } svg .title { fill: var(--ink); font-size: 12px; font-weight: 600; }\n</style>\n"
            f"<text class='title' x='174' y='-6'>{shown(title)}</text>\n{drawing}\n</svg>\n")


def learning(groups: dict[str, list[dict]]) -> str:
    """Draw the reward over the steps, the mean over the runs of each group."""
    curves = [(f"c{place % 5}", *reward_curves(runs)[1:]) for place, runs in enumerate(groups.values())]
    drawing = line_chart([(f"{classes} thick", means) for classes, means, _ in curves if means], curves)
    entries = [(classes, label) for (classes, *_), label in zip(curves, groups)]
    return picture("Reward on the training tasks", drawing, 184, [*entries, ("", "band: ± one standard error over seeds")])


def results(groups: dict[str, list[dict]]) -> str:
    """Draw the results before and after training, the mean over the suites and the runs of each group."""
    series, entries = [], []
    for place, (label, runs) in enumerate(groups.items()):
        for when, classes in zip(PHASES, (f"c{place % 5} pale", f"c{place % 5}")):
            series.append((classes, mean_of([mean_of(list(run["summary"].get(when, {}).values())) for run in runs])))
        entries.append((f"c{place % 5}", label))
    note = ("", "pale: before training; ± one standard error over seeds")
    return picture("Held-out tasks solved, in per cent", bar_chart(series, METRICS), 184, [*entries, note])


def funnel(runs: list[dict]) -> str:
    """Draw the share of the challenger's attempts that survives each stage of the filter, of all these runs together."""
    counts = sum((Counter(run["summary"].get("filter", {})) for run in runs), Counter())
    drawing = ""
    for row, (label, share, text) in enumerate(survivors(counts)):
        y = 16 + 24 * row
        drawing += f"<text class='left' x='4' y='{y}'>{shown(label)}</text><text class='left' x='270' y='{y}'>{shown(text)}</text>"
        drawing += f"<rect class='c2 pale' x='144' y='{y - 10}' width='116' height='13' rx='2'/>"
        drawing += f"<rect class='c2' x='144' y='{y - 10}' width='{116 * share:.1f}' height='13' rx='2'/>"
    return picture(f"What the filter keeps of the attempts of {len(runs)} runs", drawing, 24 * len(survivors(counts)), [])


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
    sys.exit(guarded("figures.py", lambda: print(*draw(FOLDER / "runs", FOLDER), sep="\n"), lambda: "nothing was drawn"))
