"""The README's result table: run the whole loop on several seeds, filtered and unfiltered, and compare.

    python tests/results.py --seeds 0 1 2 3 4                     (the shipped model, 2 x 5 runs)
    python tests/results.py --seeds 0 1 --model OTHER --filtered  (another pretraining seed, filtered runs only)
    python tests/results.py --keep tests/figures/runs             (... and keep of each run what tests/figures.py draws)

The runs go to runs/results/; one that is finished already is not run again, one that was interrupted goes on. Both environments count alike:
a figure is the mean over the two suites. Options that are not listed here are given to selfchallenge.py.
"""
import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from selfchallenge import parse_options  # noqa: E402

METRICS = ["pass@1", "greedy", "pass@4"]


def summary_of(model: str, seed: int, filtered: bool, keep: Path | None = None, others: Iterable[str] = ()) -> dict:
    """Return the summary of a run, which is run first, with `others` among its options, or resumed, if it is not finished.

    Its small files are copied to a folder in `keep`. Ends the program if it was played with other options.
    """
    name = f"{Path(model).name}-seed{seed}" + ("" if filtered else "-no-filter")
    folder = Path("runs") / "results" / name
    options = ["--model", model, "--seed", str(seed), *([] if filtered else ["--no-filter"]), *others]
    if begun := (folder / "config.json").exists():
        own, given = json.loads((folder / "config.json").read_text()), vars(parse_options(options))
        if differing := [option for option in own if option in given and own[option] != given[option]]:
            sys.exit(f"{folder} was played with other options ({', '.join(differing)}): delete it to play it anew")
    if not (folder / "summary.json").exists():
        command = [sys.executable, str(ROOT / "selfchallenge.py")]
        command += ["--resume", str(folder)] if begun else [*options, "--name", f"results/{name}"]
        if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            sys.exit(status)  # it has said why
    if keep is not None:
        (keep / name).mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "summary.json", "metrics.jsonl"):
            shutil.copy(folder / file, keep / name)
    return json.loads((folder / "summary.json").read_text())


def mean_of_suites(summary: dict, phase: str, metric: str) -> float:
    """The mean over the suites of a metric, in per cent."""
    return 100 * fmean(suite[metric] for suite in summary[phase].values())


def table(summaries: dict[int, dict]) -> str:
    """Return the figures of each seed before -> after, and their mean with the standard error over seeds."""
    columns = {metric: [(mean_of_suites(s, "before", metric), mean_of_suites(s, "after", metric)) for s in summaries.values()] for metric in METRICS}
    lines = [f"{'seed':>5}" + "".join(f"{metric:>18}" for metric in METRICS) + f"{'tasks':>7}{'MB':>7}"]
    for row, (seed, summary) in enumerate(summaries.items()):
        cells = "".join(f"{'%.1f -> %.1f' % columns[metric][row]:>18}" for metric in METRICS)
        lines.append(f"{seed:>5}{cells}{summary['filter']['ok']:>7}{summary['peak_memory_bytes'] / 1e6:>7.0f}")
    means = "".join(f"{'%.1f -> %.1f' % tuple(map(fmean, zip(*columns[metric]))):>18}" for metric in METRICS)
    lines.append(f"{'mean':>5}{means}")
    if len(summaries) > 1:
        errors = [tuple(stdev(phase) / len(summaries) ** 0.5 for phase in zip(*columns[metric])) for metric in METRICS]
        lines.append(f"{'±':>5}" + "".join(f"{'%.1f -> %.1f' % error:>18}" for error in errors) + "   (standard error over seeds)")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--filtered", action="store_true", help="leave the unfiltered runs out")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy config, summary and metrics of each run to a folder in this one")
    options, others = parser.parse_known_args()
    for filtered in [True] if options.filtered else [True, False]:
        summaries = {seed: summary_of(options.model, seed, filtered, options.keep, others) for seed in options.seeds}
        print(f"\n{options.model}, {'filtered' if filtered else 'unfiltered'} (per cent, mean of the suites, before -> after)")
        print(table(summaries), flush=True)


if __name__ == "__main__":
    main()
