"""The loop: the challenger's episode, what stays unseen, an exact resume, and what a run leaves."""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation  # the module's name is also that of a builtin
import selfchallenge
from eval import SUITES, evaluate_policy, load_suite
from rl import advantages, load_policy, make_optimizer
from selfchallenge import (EXAMPLES, Challenger, about, challenger_prompt, leaks, near_duplicates, parameters, parse_options,
                           render_task, sort_out, task_words, words)
from tools import CUSTOMERS, ENVIRONMENTS, make_environment
from verify import CodeAsTask, Jail, Judgement, evaluate, judge, parse_task

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = [task for suite in SUITES for task in load_suite(suite)]
SMALL = ["--env", "shop", "--challenges", "44", "--steps", "3", "--tasks-per-step", "4", "--rollouts", "4", "--parallel", "22", "--trials", "1", "--revisions", "0"]


@pytest.fixture(scope="module")
def jail():
    with Jail(allow_weak=True) as jail:
        yield jail


@pytest.fixture(scope="module")
def held_out():
    return [about(task) for task in HELD_OUT]


def command(*arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "selfchallenge.py"), *arguments], cwd=cwd, capture_output=True, text=True, timeout=600, **options
    )


@pytest.fixture
def here(monkeypatch, capsys):
    """Return a function that gives the script arguments, in this process and in a folder, and returns its status and errors."""
    def play(*arguments: str, cwd: Path) -> tuple[int, str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["selfchallenge.py", *arguments])
        try:
            status = selfchallenge.main()
        except SystemExit as leaving:  # by argparse, which has said what is wrong
            status = leaving.code
        return status, capsys.readouterr().err
    return play


# ---------------------------------------------------------------------------------------------------
# the challenger

@pytest.mark.parametrize("env", SUITES)
def test_the_worked_example_of_the_prompt_passes_the_filter(jail, env):
    assert judge(jail, EXAMPLES[env]).ok
    assert render_task(EXAMPLES[env]) in challenger_prompt(make_environment(env))


@pytest.mark.parametrize("env", SUITES)
def test_a_rendered_task_is_read_back_as_it_was(env):
    assert parse_task(render_task(EXAMPLES[env]), env, EXAMPLES[env].seed) == EXAMPLES[env]


@pytest.mark.parametrize("env", SUITES)
def test_the_challenger_s_prompt_documents_every_tool_and_every_tag(env):
    prompt = challenger_prompt(make_environment(env))
    for name in [*make_environment(env).tools, "<instruction>", "<evaluation_function>", "<solution>", "<failure_case>"]:
        assert name in prompt


def answer(task: CodeAsTask) -> str:
    return f"THOUGHT: sound END THOUGHT\nANSWER:\n{render_task(task)}\nEND ANSWER"


def test_a_sound_task_ends_the_episode(jail):
    episode = Challenger(jail, "shop", 0)
    assert "clock pending" in episode.step(
        'ACTION:\nfor o in list_orders(find_customer("Hugo")):\n    print(o["item"], o["status"])\nEND ACTION'
    )
    assert episode.step(answer(EXAMPLES["shop"])) is None
    assert episode.reward == 1.0 and episode.submissions[-1][1].ok


def test_a_rejection_is_the_next_observation_and_the_task_may_be_mended(jail):
    broken = CodeAsTask(**{**vars(EXAMPLES["shop"]), "evaluate": "def evaluate():\n    return unknown_name"})
    episode = Challenger(jail, "shop", 0, revisions=1)
    reply = episode.step(answer(broken))
    assert "unknown_name" in reply and "Traceback" not in reply.split("\n")[0]
    assert episode.step(answer(EXAMPLES["shop"])) is None
    assert [judgement.stage for _, judgement in episode.submissions] == ["runs", "ok"]


def test_revisions_are_bounded(jail):
    lenient = CodeAsTask(**{**vars(EXAMPLES["shop"]), "evaluate": "def evaluate():\n    return True"})
    episode = Challenger(jail, "shop", 0, revisions=1)
    assert episode.step(answer(lenient)) is not None
    assert episode.step(answer(lenient)) is None
    assert episode.reward == 0.0 and episode.status == "failures"


def test_exploring_leaves_no_trace_in_the_world_in_which_the_task_is_judged(jail):
    episode = Challenger(jail, "shop", 0)
    episode.step('ACTION:\ncancel_order(find_order(find_customer("Hugo"), "clock"))\nEND ACTION')
    assert episode.step(answer(EXAMPLES["shop"])) is None and episode.reward == 1.0


def test_an_endless_challenger_runs_out_of_steps(jail):
    episode = Challenger(jail, "shop", 0)
    replies = [episode.step("ACTION:\nprint(1)\nEND ACTION") for _ in range(Challenger.max_steps)]
    assert replies[-1] is None and all(replies[:-1]) and episode.status == "out of steps"


# ---------------------------------------------------------------------------------------------------
# what is kept

def handed_in(task: CodeAsTask | str, judgement: Judgement):
    episode = Challenger.__new__(Challenger)  # an episode that is over: only its submissions count
    episode.env, episode.seed, episode.status = "shop", 0, "running"
    episode.submissions = [(task, judgement)]
    return episode


KEPT, REJECTED = Judgement(True, "ok", "", 0.0), Judgement(False, "failures", "failure case 1 passes", 0.0)


def test_every_attempt_is_sorted_out(held_out):
    task = EXAMPLES["shop"]
    words_of_it = task_words(vars(task))
    assert sort_out(handed_in(task, REJECTED), [], held_out, filtered=True)["stage"] == "failures"
    assert sort_out(handed_in(task, KEPT), [], held_out, filtered=True) == vars(task)
    assert sort_out(handed_in(task, KEPT), [("shop", words_of_it)], held_out, filtered=True)["stage"] == "duplicate"
    assert sort_out(handed_in(task, KEPT), [("another", words_of_it)], held_out, filtered=True) == vars(task)
    line = sort_out(handed_in("no <task>", REJECTED), [], held_out, filtered=True)
    assert (line["stage"], line["text"]) == ("parse", "no <task>")
    assert sort_out(handed_in(HELD_OUT[-1], KEPT), [], held_out, filtered=True)["stage"] == "held-out"


def test_what_cannot_be_read_is_kept_as_it_was_handed_in_whatever_came_after(jail, held_out):
    episode = Challenger(jail, "shop", 0)
    for turn in ["THOUGHT: done END THOUGHT ANSWER: no <task> END ANSWER", *["ACTION: print(1) END ACTION"] * Challenger.max_steps]:
        if episode.step(turn) is None:
            break
    line = sort_out(episode, [], held_out, filtered=True)
    assert (line["stage"], line["text"], episode.status) == ("parse", "no <task>", "out of steps")


def test_without_the_filter_a_rejected_task_is_kept_but_a_held_out_one_is_not(held_out):
    assert sort_out(handed_in(EXAMPLES["shop"], REJECTED), [], held_out, filtered=False) == vars(EXAMPLES["shop"])
    assert sort_out(handed_in(HELD_OUT[-1], REJECTED), [], held_out, filtered=False)["stage"] == "held-out"


def test_near_duplicates_share_nine_tenths_of_their_words():
    a = words("Anna wants to cancel the tea and return the lamp.")
    assert near_duplicates(a, words("anna wants to cancel the tea, and return the lamp"))
    assert not near_duplicates(a, words("Anna wants to cancel the tea and return the drum."))


# ---------------------------------------------------------------------------------------------------
# what stays unseen

def test_parameters_are_who_what_and_how_many():
    shop = next(task for task in load_suite("shop") if "pieces" in task.instruction)
    named = parameters(shop)
    assert any(word.isdigit() for word in named) and named & {name.lower() for name in CUSTOMERS}
    assert not named & {"wants", "to", "change", "the", "pieces", "please", "for"}


def test_a_held_out_task_leaks_in_whatever_words(held_out):
    for task in HELD_OUT:
        assert leaks(task.instruction, held_out)
        assert leaks("Quite other words, but about " + ", ".join(sorted(parameters(task))), held_out)
    assert leaks("Take the amount of chair, add four, then multiply by seven.", held_out)


def test_the_prompts_give_no_held_out_task_away(held_out):
    for task in EXAMPLES.values():
        assert not leaks(task.instruction, held_out)
    for env in SUITES:
        assert not any(task.instruction in challenger_prompt(make_environment(env)) for task in HELD_OUT)


def test_the_pretraining_corpus_gives_no_held_out_task_away(held_out):
    """A part of the very corpus from which tiny/ was made: no message of any demonstration leaks."""
    sys.path.insert(0, str(ROOT / "tiny"))
    import pretrain

    instructions = 0
    for messages in pretrain.demonstrations(seed=0, number=300):
        for message in messages[1:]:
            for line in message["content"].split("\n"):
                if line.startswith("<instruction>") or message is messages[1]:
                    instructions += 1
                    assert not leaks(line, held_out)
    assert instructions > 250


@pytest.mark.parametrize("instruction", ["Empty everything.", "取出一切"])
def test_a_held_out_task_that_names_nothing_of_its_world_leaks_by_its_words_alone(instruction):
    held_out = [about(CodeAsTask("shop", 0, instruction, "e", "s", ["a", "b", "c"]))]
    assert leaks(instruction, held_out) and not leaks("Hugo wants to cancel the clock.", held_out)


def test_a_corpus_would_leak_without_the_check(held_out):
    """The check has something to do: teachers left alone do hit held-out parameters."""
    sys.path.insert(0, str(ROOT / "tiny"))
    import random

    import pretrain

    rng = random.Random(0)
    drawn = [pretrain.random_calculation(rng).instruction(rng) for _ in range(5000)]
    assert any(leaks(instruction, held_out) for instruction in drawn)


# ---------------------------------------------------------------------------------------------------
# a run, whole and interrupted

@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = command(*SMALL, "--name", "a", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / "printed").write_text(done.stdout)
    return folder / "runs" / "a"


def test_a_run_leaves_what_the_contract_names(whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        "config.json", "tasks.jsonl", "rejected.jsonl", "trajectories.jsonl", "metrics.jsonl", "summary.json", "report.html", "adapter", "checkpoint"
    }
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary) >= {"model", "seed", "before", "after", "filter", "wall_s", "peak_memory_bytes", "versions"}
    assert set(summary["memory_bytes"]) == set(summary["wall_s"]) == {"before", "challenge", "train", "after"}
    assert summary["peak_memory_bytes"] == max(summary["memory_bytes"].values()) > min(summary["memory_bytes"].values()) > 10**8
    for phase in ("before", "after"):
        assert set(summary[phase]) == {"shop"} and set(summary[phase]["shop"]) >= {"pass@1", "greedy", "n"}
    kept = (whole / "tasks.jsonl").read_text().splitlines()
    rejected = (whole / "rejected.jsonl").read_text().splitlines()
    assert len(kept) + len(rejected) == 44 == sum(summary["filter"].values())
    assert all(list(json.loads(line)) == ["env", "seed", "instruction", "evaluate", "solution", "failures"] for line in kept)
    assert all(json.loads(line)["reason"] for line in rejected)
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 3
    assert (whole / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_shows_a_task_that_was_kept_and_where_its_report_is(whole):
    printed = (whole.parent.parent / "printed").read_text()
    kept = CodeAsTask.from_json((whole / "tasks.jsonl").read_text().splitlines()[-1])
    assert f"the last that was kept:\n{render_task(kept)}\n" in printed and printed.endswith("report: runs/a/report.html\n")


def test_no_task_of_a_run_leaks(whole, held_out):
    lines = [json.loads(line) for line in (whole / "tasks.jsonl").read_text().splitlines()]
    assert lines and not any(leaks(line["instruction"], held_out) for line in lines)


def test_no_task_of_an_unfiltered_pool_leaks(jail, tmp_path, held_out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # as on a terminal
    options, policy = parse_options([*SMALL, "--no-filter"]), load_policy("tiny")
    run = selfchallenge.Run(tmp_path, policy, make_optimizer(policy, 1e-3))
    tasks = selfchallenge.challenge(jail, held_out, run, options)
    assert len(tasks) > 22 and not any(leaks(task.instruction, held_out) for task in tasks)
    assert run.read("tasks.jsonl") == [vars(task) for task in tasks]
    assert "\n44 attempts, " in capsys.readouterr().out  # below the bar, not behind it


def test_the_kept_tasks_pass_the_filter_again(whole):
    done = subprocess.run(
        [sys.executable, str(ROOT / "verify.py"), str(whole / "tasks.jsonl")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and all(json.loads(line)["ok"] for line in done.stdout.splitlines())


def test_the_saved_adapter_scores_what_the_trained_policy_scored(whole, monkeypatch, capsys):
    adapter = str(whole / "adapter")
    monkeypatch.setattr(sys, "argv", ["eval.py", "--suite", "shop", "--adapter", adapter, "--trials", "1", "--parallel", "22", "--json"])
    assert evaluation.main() == 0
    results = json.loads(capsys.readouterr().out)
    assert results["shop"].pop("setting")["adapter"] == adapter
    assert results == json.loads((whole / "summary.json").read_text())["after"]


COMPARED = ["tasks.jsonl", "rejected.jsonl", "metrics.jsonl", "trajectories.jsonl", "adapter/adapter_model.safetensors"]


def interrupt(folder: Path, arguments: list[str], name: str, lines: int) -> None:
    """Play the run runs/a in a folder, and interrupt it once a file of it has so many lines."""
    run = folder / "runs" / "a"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "selfchallenge.py"), *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job may be deaf to Ctrl-C
    )
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if (run / name).exists() and len((run / name).read_text().splitlines()) >= lines:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors[-2000:]
    assert "--resume" in errors and "Traceback" not in errors


def test_a_resumed_run_equals_one_that_was_never_interrupted(whole, tmp_path, here):
    """It is interrupted three times: while the model is measured, while it challenges itself, and while it trains."""
    run = tmp_path / "runs" / "a"
    interrupt(tmp_path, [*SMALL, "--name", "a"], "trajectories.jsonl", 1)
    assert not (run / "rejected.jsonl").exists()
    interrupt(tmp_path, ["--resume", str(run)], "rejected.jsonl", 1)
    assert not (run / "metrics.jsonl").exists()
    (run / "mine.jsonl").write_text("what a user keeps beside them\n")
    interrupt(tmp_path, ["--resume", str(run)], "metrics.jsonl", 2)
    assert not (run / "summary.json").exists() and "attempts" in (run / "report.html").read_text()  # of what there is so far
    seconds = torch.load(run / "checkpoint" / "state.pt", weights_only=True)["progress"]["wall_s"]
    assert list(seconds) == ["before", "challenge", "train"] and min(seconds.values()) > 0  # those of the interrupted phase as well
    assert here("--resume", str(run), cwd=tmp_path)[0] == 0
    for file in COMPARED:
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert (run / "mine.jsonl").read_text() == "what a user keeps beside them\n"
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    assert all(ours[key] == theirs[key] for key in ("before", "after", "filter"))
    assert ours["wall_s"]["train"] > seconds["train"] and ours["wall_s"]["challenge"] == round(seconds["challenge"], 1)


def test_a_resumed_run_may_be_given_less_memory_and_nothing_else(whole):
    own = json.loads((whole / "config.json").read_text())
    as_it_was = {**own, "resume": whole, "name": None}
    assert vars(parse_options(["--resume", str(whole)])) == as_it_was
    assert vars(parse_options(["--resume", str(whole), "--parallel", "3"])) == {**as_it_was, "parallel": 3}
    assert own["parallel"] == 22 and own["filter"]
    for other in (["--seed", "9"], ["--steps", "99"], ["--no-filter"]):
        with pytest.raises(ValueError, match=f"only --parallel and --micro-batch-tokens.*not {other[0].removeprefix('--no').strip('-')}"):
            parse_options(["--resume", str(whole), "--parallel", "3", *other])


def test_a_resumed_run_keeps_what_it_was_given_anew(whole, tmp_path, here):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert here("--resume", str(run), "--parallel", "5", cwd=tmp_path)[0] == 0
    own, before = (json.loads((folder / "config.json").read_text()) for folder in (run, whole))
    assert own == {**before, "parallel": 5}


def test_a_finished_run_is_not_overwritten(whole, here):
    status, errors = here(*SMALL, "--name", "a", cwd=whole.parent.parent)
    assert status == 2 and "exists already" in errors


def test_a_configuration_that_is_none_is_one_sentence(tmp_path, here):
    (tmp_path / "config.json").write_text("[]")
    status, errors = here("--resume", str(tmp_path), cwd=tmp_path)
    assert status == 2 and "no run to resume" in errors


@pytest.mark.parametrize("script", ["selfchallenge", "eval", "rl"])
def test_an_interrupt_while_the_libraries_are_loaded_is_one_sentence(tmp_path, script):
    """A stand-in for torch, which presses Ctrl-C when it is imported, where an exception would get lost."""
    (tmp_path / "torch.py").write_text("import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n")
    result = subprocess.run([sys.executable, str(ROOT / f"{script}.py")], cwd=tmp_path, capture_output=True, text=True, timeout=600,
                            env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1 and result.stderr == "interrupted; nothing was begun\n"


def flipped(content: bytes) -> bytes:
    """Return a checkpoint in which eight bytes of some weights are others: torch loads it all the same."""
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle:middle + 8]) + content[middle + 8:]


def pickled(content: bytes) -> bytes:
    """Return something else that torch has saved."""
    torch.save([1, 2], buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [lambda content: content[:2000], lambda content: b"", flipped, pickled],
                         ids=["cut", "empty", "flipped", "no checkpoint"])
def test_a_damaged_checkpoint_is_one_sentence_and_nothing_is_lost(whole, tmp_path, here, damage):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path.name: path.read_bytes() for path in run.glob("*.jsonl")}
    state = run / "checkpoint" / "state.pt"
    state.write_bytes(damage(state.read_bytes()))
    status, errors = here("--resume", str(run), cwd=tmp_path)
    assert status == 2 and "damaged" in errors
    assert {path.name: path.read_bytes() for path in run.glob("*.jsonl")} == before


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])], ids=["a file", "lines"])
def test_what_a_run_has_lost_is_one_sentence_and_the_rest_stays(whole, tmp_path, here, harm):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    harm(run / "tasks.jsonl")
    before = {path.name: path.read_bytes() for path in run.glob("*.jsonl")}
    status, errors = here("--resume", str(run), cwd=tmp_path)
    assert status == 2 and "tasks.jsonl has lost lines" in errors
    assert {path.name: path.read_bytes() for path in run.glob("*.jsonl")} == before


def test_a_changed_file_is_one_sentence_and_nothing_is_lost(whole, tmp_path, here):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    tasks = run / "tasks.jsonl"
    tasks.write_text('{"a": 1}\n' + tasks.read_text())
    before = tasks.read_text()
    status, errors = here("--resume", str(run), cwd=tmp_path)
    assert status == 2 and "tasks.jsonl has lost lines, or was changed" in errors and tasks.read_text() == before


def test_two_processes_do_not_play_one_run(whole, tmp_path, here):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path.name: path.read_bytes() for path in run.glob("*.jsonl")}
    with selfchallenge.alone_in(run):
        status, errors = here("--resume", str(run), cwd=tmp_path)
    assert status == 2 and "another process plays the run" in errors and "Traceback" not in errors
    assert {path.name: path.read_bytes() for path in run.glob("*.jsonl")} == before
    with selfchallenge.alone_in(run):  # it is free again
        pass


def test_a_lost_checkpoint_is_one_sentence_and_nothing_is_lost(whole, tmp_path, here):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint")
    status, errors = here("--resume", str(run), cwd=tmp_path)
    assert status == 2 and "lost its checkpoint" in errors
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model", "./no/such-model"], "there is no model folder"),
        (["--model", "no-such-model/"], "there is no model folder"),
        (["--name", "../elsewhere"], "--name ../elsewhere is not below runs"),
        (["--name", "/elsewhere"], "is not below runs"),
        (["--resume", "nowhere"], "no run to resume"),
        (["--env", "chess"], "invalid choice"),
        (["--steps", "many"], "'many' is no whole number"),
        (["--parallel", "0"], "--parallel: '0' is no whole number from 1"),
        (["--trials", "0"], "--trials: '0' is no whole number from 1"),
        (["--rollouts", "1"], "at least two"),
        (["--seed", "1" + "0" * 20], "is no whole number from 0"),
        (["--no-filte"], "unrecognized arguments"),
        (["--context", "20"], "the challenger's prompt in calculator"),
        (["--no-joint", "--env", "shop", "retail"], "retail needs a checkout"),
        (["--teacher-endpoint", "http://127.0.0.1:9"], "--teacher-endpoint and --teacher-model go together"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path, here, arguments, said):
    status, errors = here(*arguments, cwd=tmp_path)
    assert status == 2 and said in errors and "Traceback" not in errors
    assert not list(tmp_path.glob("runs/*"))  # nothing was begun


def test_a_run_of_which_no_task_survives_leaves_a_report_that_says_why(tmp_path, here):
    status, errors = here("--env", "shop", "--challenges", "1", "--trials", "1", "--turn-tokens", "8", "--name", "a", cwd=tmp_path)
    report = Path("runs", "a", "report.html")
    assert status == 2 and f"no task survived the filter: {report} shows why" in errors
    assert "<summary>parse: " in (tmp_path / report).read_text()


def test_a_name_that_is_taken_for_a_later_run_is_told_before_the_first(tmp_path, here):
    (tmp_path / "runs" / "a-shop").mkdir(parents=True)
    status, errors = here("--no-joint", "--name", "a", cwd=tmp_path)
    assert status == 2 and "runs/a-shop exists already" in errors and [path.name for path in tmp_path.glob("runs/*")] == ["a-shop"]


def test_an_interrupt_names_the_worlds_that_have_not_begun(tmp_path, monkeypatch, here):
    arguments = ["--no-joint", "--env", "calculator", "shop", "--name"]

    def play_run(folder: Path, options) -> None:
        if folder.name in begun:
            (folder / "config.json").write_text("{}")
        if folder.name == interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(selfchallenge, "play_run", play_run)
    begun, interrupted = ["a-calculator"], "a-calculator"
    status, errors = here(*arguments, "a", cwd=tmp_path)
    assert status == 130 and f"--resume {Path('runs', 'a-calculator')}" in errors and "--no-joint --env shop" in errors
    begun, interrupted = ["b-calculator"], "b-shop"  # while its model was being loaded
    status, errors = here(*arguments, "b", cwd=tmp_path)
    assert status == 130 and f"--resume {Path('runs', 'b-calculator')}" in errors and "--no-joint --env shop" in errors
    begun, interrupted = [], "c-calculator"
    status, errors = here(*arguments, "c", cwd=tmp_path)
    assert status == 130 and "nothing was begun" in errors
    assert sorted(path.name for path in tmp_path.glob("runs/*")) == ["a-calculator", "b-calculator"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path, here):
    run = tmp_path / "runs" / "full"
    (run / "checkpoint").mkdir(parents=True)
    options = vars(selfchallenge.parse_options(SMALL))
    (run / "config.json").write_text(json.dumps({k: v for k, v in options.items() if k not in ("resume", "name")}))
    os.symlink("/dev/full", run / "checkpoint" / "state.partial")
    status, errors = here("--resume", str(run), cwd=tmp_path)
    assert status == 2 and "No space left" in errors and "--resume" in errors


def test_the_readme_s_world_of_one_s_own_is_sound_and_short(jail, tmp_path, monkeypatch, capsys):
    """The code in the README, as it stands there, gives a world, a suite that its reference solves, and a sound example."""
    code = re.search(r'```python\n("""garden.py.*?)```', (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(code.splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ENVIRONMENTS, "garden", None)  # so that it is gone again afterwards
    monkeypatch.setitem(EXAMPLES, "garden", None)
    exec(compile(code, "garden.py", "exec"), {"__name__": "garden"})
    assert judge(jail, EXAMPLES["garden"]).ok
    numbers = evaluate_policy("reference", jail, {"garden": load_suite("garden")})["garden"]
    assert (numbers["pass@1"], numbers["nothing"], numbers["n"]) == (1, 0, 4)
    assert parse_options(["--env", "garden"]).env == ["garden"]
    del EXAMPLES["garden"]
    with pytest.raises(SystemExit):  # before anything is played
        parse_options(["--env", "garden"])
    assert "no example for garden" in capsys.readouterr().err


def test_the_example_that_the_files_follow_is_true(jail):
    """What the comments in the five files say of the task with seed 10."""
    world = make_environment("calculator", 10)
    assert world.starting_point() == "Start from the item tea." and world.call("amount", ["tea"], {}) == 14
    solution, lenient = 'x = amount("tea"); x = multiply(x, 3); result = multiply(x, 9)', "def evaluate(answer): return True"
    failures = [f"result = {code}" for code in ('multiply(amount("tea"), 3)', 'multiply(amount("tea"), 9)', 'amount("tea")')]
    answers = []
    for code in [solution, *failures]:
        with jail.session(make_environment("calculator", 10)) as session:
            answers.append(session.run(code).value)
    assert answers == [378, 42, 126, 14]
    first = CodeAsTask("calculator", 10, "What is the amount of tea times 6, then times 9?", lenient, solution, failures)
    assert judge(jail, first).reason == "failure case 1 passes the evaluation, but must fail it"
    strict = 'def evaluate(answer): return answer == multiply(multiply(amount("tea"), 3), 9)'
    assert judge(jail, CodeAsTask("calculator", 10, "Take the amount of tea, multiply by 3, then multiply by 9.", strict, solution, failures)).ok
    found = advantages(torch.tensor([[0.0, 1, 0, 0, 0, 1, 0, 0]]))[0]
    assert found[1].item() == pytest.approx(0.857, abs=5e-4) and found[0].item() == pytest.approx(-0.286, abs=5e-4)
    cousin = next(task for task in load_suite("calculator") if task.instruction == "Take the amount of chair, add 4, then multiply by 7.")
    assert evaluate(jail, cousin, make_environment("calculator", cousin.seed), 84).passed


# ---------------------------------------------------------------------------------------------------
# attempts, and what counts of a run's files

def test_attempts_go_through_the_worlds_each_with_a_seed_of_its_own(jail, held_out, tmp_path, monkeypatch):
    played, drawn = [], []

    def rollout(policy, episodes, generator, **limits):
        played.extend((episode.env, episode.seed, episode.revisions) for episode in episodes)
        drawn.append(torch.rand(1, generator=generator).item())
    monkeypatch.setattr(selfchallenge, "rollout", rollout)
    policy = load_policy("tiny")
    for seed, more, revisions in [(3, [], 2), (4, ["--no-filter"], 0)]:
        folder = tmp_path / str(seed)
        folder.mkdir()
        run = selfchallenge.Run(folder, policy, make_optimizer(policy, 1e-3))
        selfchallenge.challenge(jail, held_out, run, parse_options(["--seed", str(seed), "--challenges", "4", "--parallel", "2", "--revisions", "2", *more]))
        assert played[-4:] == [("calculator", seed * 10**5, revisions), ("shop", seed * 10**5 + 1, revisions),
                               ("calculator", seed * 10**5 + 2, revisions), ("shop", seed * 10**5 + 3, revisions)]
    assert len({*drawn}) == 4


def test_an_environment_that_is_named_twice_counts_once():
    assert parse_options(["--env", "shop", "calculator", "shop"]).env == ["shop", "calculator"]


def test_near_duplicates_share_over_nine_tenths():
    a = set("abcdefghijklmnopqrs")  # 19
    assert near_duplicates(a, a | {"t"}) and not near_duplicates(a, a | {"t", "u", "v"})


def test_a_resumed_run_forgets_what_was_written_after_its_checkpoint(tmp_path):
    policy = load_policy("tiny")
    run = selfchallenge.Run(tmp_path, policy, make_optimizer(policy, 1e-3))
    (tmp_path / "tasks.jsonl").write_text("1\n")
    run.save("challenge")
    (tmp_path / "tasks.jsonl").write_text("1\n2\n")
    (tmp_path / "metrics.jsonl").write_text("3\n")
    again = selfchallenge.Run(tmp_path, policy, make_optimizer(policy, 1e-3))
    assert again.read("tasks.jsonl") == [1] and again.read("metrics.jsonl") == []
    first = run.progress["wall_s"]["challenge"]
    again.save("challenge")
    assert again.progress["wall_s"]["challenge"] > first
