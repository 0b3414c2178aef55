"""What eval.py promises: metrics equal to their definitions, sound suites, and a report that shows all text as text."""
import dataclasses
import io
import itertools
import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402  (the module's name is also that of a builtin)
import figures  # noqa: E402
import results  # noqa: E402
from verify import CodeAsTask, Jail  # noqa: E402

ATTACK = """<script src="https://evil.example/x.js">alert(1)</script><img src=x onerror='alert(1)'>"'></pre></details></svg>&amp;"""


@pytest.fixture(scope="module")
def jail():
    with Jail(allow_weak=True) as jail:
        yield jail


# ---------------------------------------------------------------------------------------------------
# metrics

@pytest.mark.parametrize("n, c, k, at_least_one, all_of_them", [
    (4, 0, 4, 0, 0),
    (4, 1, 4, 1, 0),
    (4, 4, 4, 1, 1),
    (4, 1, 1, 1 / 4, 1 / 4),
    (4, 2, 2, 5 / 6, 1 / 6),
    (5, 2, 3, 9 / 10, 0),
    (8, 3, 4, 13 / 14, 0),
    (10, 6, 4, 209 / 210, 15 / 210),
])
def test_metrics_by_hand(n, c, k, at_least_one, all_of_them):
    assert evaluation.pass_at_k(n, c, k) == pytest.approx(at_least_one, abs=1e-12)
    assert evaluation.pass_all_k(n, c, k) == pytest.approx(all_of_them, abs=1e-12)


def test_metrics_equal_counting_all_subsets():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            trials = [1] * c + [0] * (n - c)
            subsets = list(itertools.combinations(trials, k))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
            assert evaluation.pass_all_k(n, c, k) == pytest.approx(sum(map(all, subsets)) / len(subsets))


def test_pass_at_k_has_no_bias():
    """Averaged over the binomial number of successes, the estimates are 1 - (1-p)^k and p^k exactly."""
    n, k, p = 6, 4, 0.3
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    at_least_one = sum(chance * evaluation.pass_at_k(n, c, k) for c, chance in enumerate(chances))
    all_of_them = sum(chance * evaluation.pass_all_k(n, c, k) for c, chance in enumerate(chances))
    assert at_least_one == pytest.approx(1 - (1 - p) ** k)
    assert all_of_them == pytest.approx(p**k)


def test_standard_error_by_hand():
    assert evaluation.standard_error([0.0, 1.0]) == pytest.approx(0.5)  # std sqrt(1/2), over sqrt(2)
    assert evaluation.standard_error([1.0, 1.0, 1.0]) == 0
    assert evaluation.standard_error([0.0, 0.25, 0.5, 0.25]) == pytest.approx(math.sqrt(0.125 / 3 / 4))
    assert evaluation.standard_error([1.0]) == 0


REWARDS = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.float)
GREEDY = torch.tensor([0, 0, 1, 1], dtype=torch.float)


def test_summarize_by_hand():
    numbers = evaluation.summarize(REWARDS, GREEDY)
    assert numbers == pytest.approx({
        "pass@1": 0.5,  # per task 0, 1/4, 3/4, 1: squared deviations 1/4, 1/16, 1/16, 1/4
        "pass@1_se": math.sqrt(0.625 / 3 / 4),
        "pass@4": 0.75,
        "pass@4_se": 0.25,  # of 0, 1, 1, 1
        "pass^4": 0.25,
        "pass^4_se": 0.25,  # of 0, 0, 0, 1
        "greedy": 0.5,
        "greedy_se": math.sqrt(1 / 3 / 4),
        "n": 4,
    })


def test_summarize_ignores_the_order_of_tasks_and_of_trials():
    rewards, greedy = (torch.rand(23, 6) < 0.4).float(), (torch.rand(23) < 0.4).float()
    order = torch.randperm(23)
    shuffled = torch.stack([row[torch.randperm(6)] for row in rewards[order]])
    assert evaluation.summarize(shuffled, greedy[order]) == evaluation.summarize(rewards, greedy)


def test_fewer_than_four_trials_have_no_pass_at_4():
    numbers = evaluation.summarize(REWARDS[:, :2], GREEDY)
    assert numbers["pass@1"] == pytest.approx(0.625)
    assert "pass@4" not in numbers and "pass^4" not in numbers
    assert "–" in evaluation.format_table({"shop": numbers})


def test_table_stands_before_and_after_side_by_side():
    numbers = evaluation.summarize(REWARDS, GREEDY) | {"nothing": 0.0, "reference": 1.0}
    lines = evaluation.format_table({"shop": numbers}, {"shop": numbers}).split("\n")
    assert lines[0].split() == ["suite", "Pass@1", "Pass@4", "pass^4", "greedy", "tasks", "nothing", "reference"]
    assert [line.split()[:5] for line in lines[1:3]] == [["shop", when, "50.0", "±", "22.8"] for when in ("before", "after")]
    assert len(lines[0]) == len(lines[1]) == len(lines[2])


# ---------------------------------------------------------------------------------------------------
# suites and baselines

def test_an_unknown_suite_is_answered_with_the_choices():
    with pytest.raises(ValueError, match="unknown suite 'chess': choose from calculator, shop"):
        evaluation.load_suite("chess")


@pytest.mark.parametrize("name", evaluation.SUITES)
def test_doing_nothing_passes_no_held_out_task_and_the_reference_passes_all(jail, name):
    tasks = evaluation.load_suite(name)
    assert len(tasks) >= 40 and {task.env for task in tasks} == {name}
    assert [task.instruction for task in tasks if evaluation.play_baseline("nothing", jail, task)] == []
    assert [task.instruction for task in tasks if not evaluation.play_baseline("reference", jail, task)] == []


def test_a_solution_that_breaks_off_does_not_pass(jail):
    lenient = CodeAsTask("calculator", 0, "?", "def evaluate(answer):\n    return answer == 1", "result = 1\n1 / 0", [])
    assert not evaluation.play_baseline("reference", jail, lenient)


def test_a_baseline_gets_the_numbers_of_a_policy(jail):
    numbers = evaluation.evaluate_policy("reference", jail, {"shop": evaluation.load_suite("shop")})["shop"]
    size = len(evaluation.load_suite("shop"))
    assert [numbers[key] for key in ("pass@1", "pass@4", "pass^4", "greedy", "n")] == [1, 1, 1, 1, size]
    assert (numbers["nothing"], numbers["reference"]) == (0, 1)


@pytest.mark.skipif(not (ROOT / "tiny" / "config.json").exists(), reason="the embedded model has not been made")
def test_a_policy_is_measured_reproducibly_and_with_a_record_of_every_episode(jail):
    policy = evaluation.load_policy("tiny")
    suites, limits, records = {"shop": evaluation.load_suite("shop")}, {"context": 160, "turn_tokens": 60}, []
    numbers = evaluation.evaluate_policy(policy, jail, suites, seed=1, trials=2, label="before", write=records.extend, **limits)
    again = evaluation.evaluate_policy(policy, jail, suites, seed=1, trials=2, label="before", **limits)
    size = len(evaluation.load_suite("shop"))
    assert numbers == again and numbers["shop"]["n"] == size
    sampled = [record for record in records if not record["greedy"]]
    greedy = [record for record in records if record["greedy"]]
    assert (len(sampled), len(greedy)) == (2 * size, size)
    assert {(record["phase"], record["env"]) for record in records} == {("before", "shop")}
    assert numbers["shop"]["pass@1"] == pytest.approx(sum(record["reward"] for record in sampled) / len(sampled))
    assert numbers["shop"]["greedy"] == pytest.approx(sum(record["reward"] for record in greedy) / len(greedy))


# ---------------------------------------------------------------------------------------------------
# the report

def made_up_run(folder: Path, text: str) -> Path:
    """Write a run's files with `text` wherever a text may stand."""
    numbers = evaluation.summarize(REWARDS, GREEDY) | {"nothing": 0.0, "reference": 1.0}
    code = {"env": text, "seed": 3, "instruction": text, "evaluate": text, "solution": text, "failures": [text] * 3}
    trajectory = {"step": None, "env": text, "seed": 3, "instruction": text, "status": text, "greedy": True, "tools": {text: 2},
                  "messages": [{"role": text, "content": text},
                               {"role": "assistant", "content": f"ACTION:\ncall({text!r})\nEND ACTION"}]}
    files = {
        "config.json": {"model": text, "seed": text, text: text},
        "summary.json": {"model": text, "seed": 0, "before": {text: numbers, "shop": numbers}, "after": {text: numbers},
                         "filter": {text: 3, "runs": 2, "ok": 2}, "wall_s": {text: 1.5, "train": 100.25},
                         "memory_bytes": {text: 2**29, "train": 2**30}, "peak_memory_bytes": 2**30, "versions": {text: text}},
        "tasks.jsonl": [code] * 9,
        "rejected.jsonl": [{**code, "stage": text, "reason": text}, {"stage": "parse", "reason": text, "text": text}],
        "metrics.jsonl": [{"step": text, "reward": step / 4, "signal": 0.5, "loss": text, text: text} for step in range(4)],
        "trajectories.jsonl": [{**trajectory, "phase": phase, "reward": reward}
                               for phase, reward in [("challenge", 1.0), ("before", 0.0), ("after", 1.0), (text, 0.0)]],
    }
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        lines = content if isinstance(content, list) else [content]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


ELEMENTS = {"html", "meta", "title", "style", "section", "h1", "h2", "h3", "h4", "p", "b", "i", "br", "small", "span", "div",
            "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre", "figure", "figcaption", "svg", "rect",
            "path", "text", "polyline", "s"}


class Page(HTMLParser):
    """The elements, attributes and visible text of a page, and its structure: where every element begins and ends."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.attributes, self.structure, self.text = [], [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        self.structure.append((tag, [name for name, _ in attributes]))

    def handle_endtag(self, tag):
        self.structure.append(tag)

    def handle_data(self, data):
        self.text += data


def test_report_shows_a_models_html_as_text(tmp_path):
    page = Page(evaluation.write_report(made_up_run(tmp_path, ATTACK)))
    assert not {"script", "img", "link", "iframe", "object", "form", "a"} & set(page.elements)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.text.count(ATTACK) > 50
    assert ATTACK[:20] not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("runs", [1, 3])
def test_no_text_changes_the_structure_of_the_page(tmp_path, runs):
    """Every string of every file, keys included, and the folder's name are hostile; the elements are those of harmless words."""
    pages = []
    for text in ("words", ATTACK):
        folders = [made_up_run(tmp_path / f"{text[:8]}{number}", text) for number in range(runs)]
        config = folders[-1] / "config.json"
        config.write_text(json.dumps({text: text, "env": [text], "other": {text: text}}))  # a group of its own, if there are several
        pages.append(Page(evaluation.write_report(*folders)))
    harmless, hostile = pages
    assert hostile.structure == harmless.structure
    assert not any(ATTACK[:20] in str(value) for _, value in hostile.attributes)  # no text of a file stands in a tag


def test_report_loads_nothing_from_a_network(tmp_path):
    html = evaluation.write_report(made_up_run(tmp_path, "harmless")).read_text()
    assert not [word for word in ("http://", "https://", "//", "url(", "@import", "<script", "src=") if word in html]


def test_report_is_well_formed_and_has_every_section(tmp_path):
    page = Page(evaluation.write_report(made_up_run(tmp_path, "words")))
    for heading in ("Held-out tasks", "The filter", "Learning curve", "Tasks that were kept", "Transcripts", "Time"):
        assert heading in page.text
    assert page.text.count("words, seed 3") == 6  # six of the nine tasks are shown
    assert "✓ reward 1" in page.text and "✗ reward 0" in page.text and "tools: words ×\u00a02" in page.text
    assert "100.2 s" in page.text and "0.50 GiB" in page.text
    assert "before: words" in page.text and "after: words" in page.text
    assert "50.0 ± 22.8" in page.text


@pytest.mark.parametrize("missing", range(len(evaluation.RUN_FILES)))
def test_report_does_without_any_one_file_and_with_any_one_alone(tmp_path, missing):
    made_up_run(tmp_path, "words")
    name = evaluation.RUN_FILES[missing]
    content = (tmp_path / name).read_text()
    (tmp_path / name).unlink()
    assert "<h2>Transcripts" in evaluation.write_report(tmp_path).read_text()
    for other in evaluation.RUN_FILES:
        (tmp_path / other).unlink(missing_ok=True)
    (tmp_path / name).write_text(content)
    assert "<h2>Transcripts" in evaluation.write_report(tmp_path).read_text()


def test_report_survives_half_a_last_line_but_names_a_damaged_file(tmp_path):
    made_up_run(tmp_path, "words")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    assert "4 steps" in evaluation.write_report(tmp_path).read_text()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="metrics.jsonl' is damaged"):
        evaluation.write_report(tmp_path)


def test_transcripts_show_a_task_that_training_has_solved():
    def episode(phase, seed, reward, greedy=True):
        return {"phase": phase, "env": "shop", "seed": seed, "instruction": "?", "reward": reward, "greedy": greedy}

    always, never = [[episode(phase, seed, reward) for phase in ("before", "after")] for seed, reward in [(1, 1.0), (2, 0.0)]]
    sampled = [episode("before", 3, 0.0, greedy=False), episode("after", 3, 1.0, greedy=False)]
    learnt = [episode("before", 4, 0.0), episode("after", 4, 1.0)]
    assert evaluation.chosen_trajectories([*always, *sampled, *never, *learnt])[:2] == learnt
    assert evaluation.chosen_trajectories([*always, *sampled, *never])[:2] == sampled
    assert evaluation.chosen_trajectories([*learnt, *sampled])[:2] == learnt  # what is greedy is shown rather
    uncounted = [dict(before, reward=None) for before in learnt[:1]] + learnt[1:]
    assert evaluation.chosen_trajectories([*uncounted, *sampled])[:2] == sampled
    assert evaluation.chosen_trajectories(always) == always


def test_the_filters_bars_count_down_to_the_kept_tasks(tmp_path):
    counts = {"parse": 20, "runs": 30, "solution": 25, "failures": 15, "held-out": 0, "duplicate": 0, "ok": 10}
    (tmp_path / "summary.json").write_text(json.dumps({"filter": counts}))
    text = Page(evaluation.write_report(tmp_path)).text
    assert all(f"{left} ({left}%)" in text for left in (80, 50, 25, 10)) and "is new" not in text


def test_report_survives_random_text(tmp_path):
    generator = random.Random(0)
    alphabet = "<>&\"'`{}\\/=-!\0\u2028\ud800é0a \n"
    text = "".join(generator.choice(alphabet) for _ in range(300))
    page = Page(evaluation.write_report(made_up_run(tmp_path, text)))
    assert set(page.elements) <= ELEMENTS


def test_a_transcript_names_the_tools_that_were_called():
    t = {"phase": "after", "env": "shop", "instruction": "?", "reward": 1.0, "status": "answered", "messages": []}
    assert "tools: amount ×\u00a02, add<" in evaluation.transcript({**t, "tools": {"amount": 2, "add": 1}})
    assert "tools: none<" in evaluation.transcript({**t, "tools": {}})
    assert "tools: ?<" in evaluation.transcript(t)  # of a run that did not note them yet


# ---------------------------------------------------------------------------------------------------
# several runs

def small_run(folder: Path, config: dict, before: float | None = None, after: float | None = None, rewards: list[float] = []) -> Path:
    """Write the three files that a comparison reads; without results, it is a run that has not finished."""
    folder.mkdir()
    results = {when: {"shop": {"pass@1": share, "n": 44}} for when, share in [("before", before), ("after", after)] if share is not None}
    summary = results and {**results, "filter": {"runs": 30, "ok": 10}, "wall_s": {"train": 60.0}, "peak_memory_bytes": 2**30}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "reward": r}) + "\n" for step, r in enumerate(rewards)))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three seeds with the filter, two without it, of which one is older and lacks an option, and one that has not finished."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return [
        small_run(folder / "a", {"seed": 0, "filter": True, "cap": None}, 0.1, 0.5, [0.0, 0.5, 1.0]),
        small_run(folder / "b", {"seed": 1, "filter": True, "cap": None}, 0.2, 0.7, [0.5, 0.5]),
        small_run(folder / "c", {"seed": 2, "filter": True, "cap": None}, 0.3, 0.6, [0.25, 0.5, 0.0]),
        small_run(folder / "d", {"seed": 0, "filter": False, "cap": None}, 0.1, 0.4),
        small_run(folder / "e", {"seed": 1, "filter": False}, 0.2, 0.5),
        small_run(folder / "f", {"seed": 2, "filter": False, "cap": None}, rewards=[0.5]),
    ]


def test_runs_are_grouped_by_the_options_in_which_they_differ(runs):
    read = [evaluation.read_run(run, evaluation.SMALL_FILES) for run in runs]
    groups = evaluation.grouped(read)
    assert {label: [Path(run["path"]).name for run in members] for label, members in groups.items()} == {
        "--filter": ["a", "b", "c"], "--no-filter": ["d", "e", "f"]}
    assert list(evaluation.grouped(read[:3])) == ["all runs"]
    read[1]["config"]["cap"] = 2
    assert list(evaluation.grouped(read[:3])) == ["no --cap", "--cap 2"]
    read[0]["config"] = {}
    assert list(evaluation.grouped(read[:3])) == ["without config.json", "--cap 2", "no --cap"]
    assert evaluation.as_option("env", ["calculator", "shop"]) == "--env calculator shop"


def test_means_over_runs_by_hand():
    numbers = evaluation.mean_of([{"pass@1": 0.1, "greedy": 0.5, "pass@1_se": 9}, {"pass@1": 0.2}, {"pass@1": 0.3}])
    assert numbers == pytest.approx({"pass@1": 0.2, "pass@1_se": 0.1 / math.sqrt(3), "greedy": 0.5})  # one value has no error
    assert evaluation.mean_of([]) == {}
    assert evaluation.mean_of([{"pass@1": 0.1, "pass@1_se": 0.2, "n": 3}]) == {"pass@1": 0.1, "pass@1_se": 0.2, "n": 3}


def test_mean_curve_by_hand():
    runs = [{"metrics": [{"reward": reward} for reward in rewards]} for rewards in ([0.0, 0.5, 1.0], [0.5, 0.5], [])]
    assert evaluation.curves({"a": [], "b": runs}, "reward") == [
        ("c1 thin", [0.0, 0.5, 1.0]), ("c1 thin", [0.5, 0.5]), ("c1 thick", [0.25, 0.5])]
    assert evaluation.curves({}, "reward") == []


def test_the_comparison_by_hand(runs):
    """Of 50, 70, 60 the mean is 60 and the error 10 / sqrt 3; of 40 and 50 they are 45 and 5."""
    html = evaluation.write_report(*runs).read_text()
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", html)]
    names = re.findall("<i class='(.*?)'></i> (.*?)</span>", html)
    assert names[:4] == [("c0 pale", "--filter, before training"), ("c0", "--filter, after training"),
                         ("c1 pale", "--no-filter, before training"), ("c1", "--no-filter, after training")]
    bars = re.findall("style='--length:(.*?);--error:(.*?)'><i class='(.*?)'></i><s></s></span><b>(.*?)</b>", html)
    assert bars[:4] == [("0.2", "0.0577", "c0 pale", "20.0 ± 5.8"), ("0.6", "0.0577", "c0", "60.0 ± 5.8"),
                        ("0.15", "0.05", "c1 pale", "15.0 ± 5.0"), ("0.45", "0.05", "c1", "45.0 ± 5.0")]
    assert [str(runs[5]), "2", "--no-filter", "not finished"] in rows
    assert [html.count(f"<polyline class='{classes}'") for classes in ("c0 thin", "c0 thick", "c1 thin", "c1 thick")] == [6, 2, 2, 2]  # reward and signal
    assert "<h2>Transcripts" in html and (runs[0] / "report.html").exists() and not (runs[1] / "report.html").exists()


def test_a_comparison_with_any_one_file_missing(runs):
    for name in evaluation.SMALL_FILES:
        (runs[1] / name).rename(runs[1] / "away")
        assert "<summary>Each run" in evaluation.write_report(*runs).read_text()
        assert "<summary>Each run" in evaluation.write_report(*runs[1::-1]).read_text()
        (runs[1] / "away").rename(runs[1] / name)


@pytest.mark.parametrize("name, content", [
    ("config.json", '{"seed": 0'), ("config.json", "[1]"),
    ("summary.json", "[" * 10**5), ("summary.json", "\0\1"), ("summary.json", '{"before": 5}'),
    ("summary.json", '{"before": {"shop": {"pass@1": "x"}}}'), ("summary.json", '{"wall_s": [1]}'),
    ("summary.json", '{"peak_memory_bytes": null}'), ("summary.json", '{"filter": {"parse": "many"}}'),
    ("metrics.jsonl", "7\n"), ("metrics.jsonl", '{"reward": null}\n'),
])
@pytest.mark.parametrize("position", [0, 1])
def test_a_damaged_file_gets_one_sentence(runs, name, content, position, monkeypatch, capsys):
    (runs[position] / name).write_text(content)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--report", str(runs[0]), str(runs[1])])
    status = evaluation.main()
    complaint = capsys.readouterr().err
    if status == 0:
        assert position == 1 and complaint == ""  # where a comparison does not look
    else:
        assert (status, complaint.count("\n")) == (2, 1) and "damaged" in complaint


def test_empty_files_are_a_run_that_has_not_begun(tmp_path):
    for name in evaluation.RUN_FILES:
        (tmp_path / name).write_text("")
    assert "not finished" in evaluation.write_report(tmp_path).read_text()


def test_the_pictures_by_hand(runs, tmp_path):
    learning, shares, funnel = [ElementTree.parse(path).getroot() for path in figures.draw(runs[0].parent, tmp_path)]
    for picture, words in [(learning, ["filtered", "not filtered (--no-filter)", "step 2"]),
                           (shares, ["60", "20", "45", "15", "Pass@1 (sampled)"]),
                           (funnel, ["attempts", "120", "all its code runs", "30 (25%)"])]:
        text = list(picture.itertext())
        assert set(words) <= set(text) and "prefers-color-scheme: dark" in text[1]
    lines = [line.get("class") for line in learning.findall("{*}polyline")]
    assert lines == ["c0 thin", "c0 thin", "c0 thin", "c1 thin", "c0 thick", "c1 thick"]
    drawn = [bar.get("class") for bar in shares.findall("{*}rect") if bar.get("class") != "track"]
    assert drawn == ["c0 pale", "c0", "c1 pale", "c1", "c0", "c1"]  # of one metric, and the legend
    assert len(shares.findall("{*}path[@class='error']")) == 4


def test_the_pictures_show_hostile_options_as_text(tmp_path):
    shapes = []
    for text in ("words", ATTACK):
        folder = tmp_path / text[:2].strip("<")
        folder.mkdir()
        for number, option in enumerate([text, "another"]):
            small_run(folder / f"{number}", {"seed": text, text: option}, 0.5, 0.5, [0.5])
        pictures = [ElementTree.parse(path).getroot() for path in figures.draw(folder, tmp_path)]
        shapes.append([element.tag for picture in pictures for element in picture.iter()])
    assert shapes[0] == shapes[1] and any(ATTACK in text for text in pictures[0].itertext())


@pytest.mark.skipif(not (figures.FOLDER / "runs").exists(), reason="no runs have been kept")
def test_the_committed_pictures_are_those_of_the_committed_runs(tmp_path):
    for path in figures.draw(figures.FOLDER / "runs", tmp_path):
        assert path.read_text() == (figures.FOLDER / path.name).read_text(), "draw them again with python tests/figures.py"


def test_pictures_of_a_run_that_has_not_begun(tmp_path):
    small_run(tmp_path / "a", {"seed": 0})
    assert "step 0" in figures.draw(tmp_path, tmp_path)[0].read_text()


def test_no_runs_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="there are no runs in"):
        figures.draw(tmp_path, tmp_path)


def test_what_is_kept_of_a_run_is_what_the_pictures_need(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "results").mkdir()
    runs[0].rename(tmp_path / "runs" / "results" / "tiny-seed0")  # where it is taken for finished
    assert results.summary_of("tiny", 0, True, tmp_path / "kept")["filter"]["ok"] == 10
    assert {path.name for path in (tmp_path / "kept" / "tiny-seed0").iterdir()} == set(evaluation.SMALL_FILES)
    assert len(figures.draw(tmp_path / "kept", tmp_path)) == 3


# ---------------------------------------------------------------------------------------------------
# the command line

def test_the_script_answers_a_missing_model_with_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--policy", "no such name", "--allow-weak-jail"])
    assert evaluation.main() == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and "cannot load the model 'no such name'" in errors.splitlines()[-1]


def test_a_terminal_may_lack_characters(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--suite", "shop", "--policy", "nothing", "--allow-weak-jail"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert evaluation.main() == 0
    assert b"0.0 ? 0.0" in sys.stdout.buffer.getvalue()  # the question mark stands for a plus-minus


@pytest.mark.parametrize("arguments, sentence", [
    (["--suite", "shop", "chess"], "unknown suite 'chess': choose from calculator, shop"),
    (["--report", "nowhere"], "'nowhere' is not the folder of a run"),
    (["--policy", "nothing", "--adapter", "runs/run-1/adapter"], "--adapter is for a model"),
])
def test_a_users_mistake_gets_one_sentence(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    assert evaluation.main() == 2
    printed, complaint = capsys.readouterr()
    assert printed == "" and sentence in complaint and complaint.count("\n") == 1


def test_json_is_one_object_on_standard_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--suite", "calculator", "--policy", "nothing", "--json", "--allow-weak-jail"])
    assert evaluation.main() == 0
    assert json.loads(capsys.readouterr().out)["calculator"]["pass@1"] == 0


def test_the_last_line_of_a_file_counts_if_it_is_whole(tmp_path):
    for text, number in [('{"a": 1}\n{"a": 2}', 2), ('{"a": 1}\n{"a": ', 1), ('{"a": 1}\n', 1), ("", 0)]:
        (tmp_path / "tasks.jsonl").write_text(text)
        assert len(evaluation.read_run(tmp_path)["tasks"]) == number


def test_report_is_rebuilt_from_the_command_line(tmp_path, monkeypatch, capsys):
    made_up_run(tmp_path, "words")
    monkeypatch.setattr(sys, "argv", ["eval.py", "--report", str(tmp_path)])
    assert evaluation.main() == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


# ---------------------------------------------------------------------------------------------------
# an evaluation's waves, and runs that are not finished

@pytest.fixture
def waves(monkeypatch):
    """Return a list of what `rollout` is given; in its place the first two trials of every second task succeed, and greedy ones of the first."""
    seen, trials = [], {}

    def rollout(policy, episodes, generator, temperature, parallel, **limits):
        seen.append((temperature, len(episodes), torch.rand(1, generator=generator).item(), limits))
        for episode in episodes:
            place = episode.env, episode.task.instruction, temperature
            trial = trials[place] = trials.get(place, -1) + 1
            number = int(episode.task.instruction)
            episode.reward, episode.status = float(number % 2 == 0 and trial < 2 if temperature else number == 0), "answered"
    monkeypatch.setattr(evaluation, "rollout", rollout)
    return seen


def numbered(suite, size):
    return [dataclasses.replace(task, instruction=str(number)) for number, task in enumerate(evaluation.load_suite(suite)[:size])]


def test_trials_are_sampled_and_then_played_greedily_and_counted_by_task(jail, waves):
    suites = {name: numbered(name, 3) for name in ("shop", "calculator")}
    policy = SimpleNamespace(device="cpu")
    records = []
    results = evaluation.evaluate_policy(policy, jail, suites, seed=1, parallel=6, turn_tokens=9, write=records.extend)
    assert [wave[:2] for wave in waves] == [(1.0, 6), (1.0, 6), (0.0, 3)] * 2 and {wave[3]["turn_tokens"] for wave in waves} == {9}
    assert len({wave[2] for wave in waves if wave[0]}) == 4  # neither waves nor suites draw alike
    for numbers in results.values():
        assert [numbers[name] for name in ("pass@1", "pass@4", "pass^4", "greedy")] == pytest.approx([1 / 3, 2 / 3, 0, 1 / 3])
    first = [wave[2] for wave in waves]
    waves.clear()
    evaluation.evaluate_policy(policy, jail, suites, seed=2, parallel=6)
    assert not {wave[2] for wave in waves} & set(first)
    waves.clear()
    shop = [record for record in records if record["env"] == "shop"]
    evaluation.evaluate_policy(policy, jail, suites, seed=1, parallel=6, finished=shop)
    assert len(waves) == 3  # those of the other suite


def test_what_does_not_count_leaves_the_number_of_tasks_and_enters_no_estimate():
    nan = math.nan
    numbers = evaluation.summarize(torch.tensor([[1, 0, 0, 1, nan], [1, 1, 1, nan, nan], [nan] * 5]), torch.tensor([1, nan, 0]))
    assert numbers["n"] == 3 and numbers["user_failed"] == 9 and numbers["pass@1"] == 0.75 and numbers["greedy"] == 0.5
    assert (numbers["pass@4"], numbers["pass^4"]) == (1, 0)  # of the first task alone


def test_a_transcript_without_a_reward_is_shown_and_is_no_failure_that_training_mended(tmp_path):
    made_up_run(tmp_path, "words")
    with open(tmp_path / "trajectories.jsonl", "a") as file:
        file.write(json.dumps({"phase": "failed user", "env": "shop", "seed": 0, "instruction": "?", "status": "user failed", "reward": None, "messages": []}) + "\n")
    assert "no reward failed user" in Page(evaluation.write_report(tmp_path)).text


def test_the_report_of_a_run_that_is_not_finished_counts_its_files(tmp_path):
    made_up_run(tmp_path, "words")
    (tmp_path / "summary.json").unlink()
    tasks = [json.dumps({"env": "shop", "seed": 0, "instruction": f"task {number}.", "evaluate": "e", "solution": "s", "failures": []}) + "\n" for number in range(12)]
    (tmp_path / "tasks.jsonl").write_text("".join(tasks))
    rejected = [{"stage": "runs", "reason": f"line {number}"} for number in range(3)] + [{"stage": "parse", "reason": "no tags"}]
    (tmp_path / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rejected))
    text = Page(evaluation.write_report(tmp_path)).text
    assert "attempts16" in text.replace("\n", "") and "15 (94%)" in text and "12 (75%)" in text
    assert [number for number in range(12) if f"task {number}." in text] == [0, 2, 4, 6, 8, 10]
    assert text.index("runs: line 0 × 3") < text.index("parse: no tags × 1")
    assert "reward 0 → 0.75" in text


def test_an_evaluation_goes_on_with_the_same_setting_only(tmp_path):
    options = SimpleNamespace(policy="p", adapter="a", seed=1, trials=4, turn_tokens=9, context=99, airline="paper", user_endpoint=None)
    for name in ("policy", "adapter", "seed", "trials", "turn_tokens", "context", "airline"):
        other = SimpleNamespace(**vars(options) | {name: "other"})
        assert evaluation.setting_of(options) != evaluation.setting_of(other), name
    options.adapter = str(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"one")
    first = evaluation.setting_of(options)
    assert first == evaluation.setting_of(options)
    weights.write_bytes(b"another")  # in the same place
    assert first != evaluation.setting_of(options)


def test_what_an_interrupted_evaluation_has_written_is_not_written_again(tmp_path, monkeypatch):
    """Or an interruption at the beginning of the second try would lose it."""
    setting, path = {"policy": "p"}, tmp_path / "episodes.jsonl"
    _, write = evaluation.continued(path, setting)
    write([{"reward": 1}])
    with open(path, "a") as file:
        file.write('{"rew')  # a crash
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("it was written again"))
    lines, write = evaluation.continued(path, setting)
    write([{"reward": 0}])
    assert lines == [{"reward": 1}] and evaluation.continued(path, setting)[0] == [{"reward": 1}, {"reward": 0}]
