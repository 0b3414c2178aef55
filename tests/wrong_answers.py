"""Planted wrong answers: plausible mistakes, of which the tests of each exercise must reject every one.

    python tests/wrong_answers.py               plays them all, and the solutions, and prints how each ended
    python tests/wrong_answers.py pass_at_k     only those of an exercise

Each is the text that stands in the place of a solution. Found another mistake in a solved copy? Add it here: if no test
rejects it, the exercise needs one more.
"""
import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from textwrap import dedent, indent

from grade import in_parallel, play
from make_assignment import all_exercises, make_copy

EXERCISES = {exercise.name: exercise for exercise in all_exercises()}
SOLUTIONS = {name: dedent(exercise.solution) for name, exercise in EXERCISES.items()}


def altered(name: str, *changes: tuple[str, str]) -> str:
    """Return the solution of an exercise in which some text, which must occur, is replaced by other text."""
    solution = SOLUTIONS[name]
    for old, new in changes:
        assert old in solution, old
        solution = solution.replace(old, new)
    return solution


WRONG = {
    "parse_step": {
        "a second action is overlooked": altered("parse_step", ('re.search(r"\\b(ACTION|ANSWER):", after) or ', "")),
        "what is not closed is taken": altered("parse_step", ("not closed or ", "")),
        "the thought is searched for an action": altered("parse_step", ('ANSWER):", rest)', 'ANSWER):", text)'), ("rest[", "text[")),
        "the fence stays": altered("parse_step", ("strip_fence(content)", "content.strip()")),
        "an empty action is taken": altered("parse_step", (' or kind == "ACTION" and not content', "")),
        "the thought is the whole text": altered("parse_step", ("thought.strip()", "text.strip()")),
        "a second action counts only if it follows at once": altered("parse_step", (
            're.search(r"\\b(ACTION|ANSWER):", after)', 're.match(r"\\s*(ACTION|ANSWER):", after)')),
        "an answer before the action is overlooked": altered("parse_step", (
            're.search(r"\\b(ACTION|ANSWER):", rest)', '(re.search(r"\\b(ACTION):", rest) or re.search(r"\\b(ANSWER):", rest))')),
        "a thought may begin anywhere": altered("parse_step", ('text.lstrip().startswith("THOUGHT:")', '"THOUGHT:" in text')),
        "answers lose their fence as well": altered("parse_step", ('strip_fence(content) if kind == "ACTION" else content.strip()',
                                                                   "strip_fence(content)")),
        "only what is closed is looked for": altered("parse_step", (
            're.search(r"\\b(ACTION|ANSWER):", rest)', 're.search(r"\\b(ACTION|ANSWER):(?=.*?END \\1)", rest, re.DOTALL)')),
        "a second one counts only if it is closed": altered("parse_step", (
            're.search(r"\\b(ACTION|ANSWER):", after)', 're.search(r"\\b(ACTION|ANSWER):.*END \\1", after, re.DOTALL)')),
        "a second answer is overlooked": altered("parse_step", (
            're.search(r"\\b(ACTION|ANSWER):", after)', 're.search(r"\\b(ACTION|ANSWER):" if kind == "ACTION" else r"\\bACTION:", after)')),
        "a thought ends at the last END THOUGHT": altered("parse_step", (
            'thought, _, rest = text.partition("THOUGHT:")[2].partition("END THOUGHT")',
            'thought, end, rest = text.partition("THOUGHT:")[2].rpartition("END THOUGHT")\n    thought = thought if end else rest')),
        "a thought after the thought is one as well": altered("parse_step", (
            "if text.lstrip", "while rest.lstrip"), ("text.partition", "rest.partition")),
        "a thought ends at any END": altered("parse_step", ('.partition("END THOUGHT")', '.partition("END ")')),
        "code is stripped before its lines lose what they share": altered("parse_step", (
            "strip_fence(content)", "strip_fence(content.strip())")),
        "no word has to begin with the tag": altered("parse_step", ('re.search(r"\\b(ACTION|ANSWER):", rest)', 're.search(r"(ACTION|ANSWER):", rest)')),
        "an answer speaks of no action": altered("parse_step", (
            're.search(r"\\b(ACTION|ANSWER):", after)', 're.search(r"\\b(ACTION|ANSWER):", (content if kind == "ANSWER" else "") + after)')),
        "code speaks of no action": altered("parse_step", (
            're.search(r"\\b(ACTION|ANSWER):", after)', 're.search(r"\\bACTION:", content) or re.search(r"\\b(ACTION|ANSWER):", after)')),
        "only blanks are taken off": altered("parse_step", ("else content.strip()", 'else content.strip(" ")'), ("thought.strip()", 'thought.strip(" ")')),
        "a thought ends after a blank": altered("parse_step", ('.partition("END THOUGHT")', '.partition(" END THOUGHT")')),
        "a REACTION is a second action": altered("parse_step", (
            're.search(r"\\b(ACTION|ANSWER):", after)', 're.search(r"(ACTION|ANSWER):", after)')),
        "only after a blank there is a second one": altered("parse_step", (
            're.search(r"\\b(ACTION|ANSWER):", after)', 're.search(r"\\s(ACTION|ANSWER):", after)')),
        "any word that begins like a thought": altered("parse_step", ('.startswith("THOUGHT:")', '.startswith("THOUGHT")')),
        "code loses its powers": altered("parse_step", ("strip_fence(content)", 'strip_fence(content.replace("**", ""))')),
        "an unfinished thought ends at an answer": altered("parse_step", (
            "opening = re", 'rest = rest or "ANSWER:" + thought.partition("ANSWER:")[2] * ("ANSWER:" in thought)\nopening = re')),
        "an empty thought is malformed": altered("parse_step", ("if not closed or", 'if text.lstrip().startswith("THOUGHT:") and not thought.strip() or not closed or')),
        "what is closed comes first": altered("parse_step", (
            're.search(r"\\b(ACTION|ANSWER):", rest)',
            '(re.search(r"\\b(ACTION|ANSWER):", rest) if "END ANSWER" in rest else re.search(r"\\b(ACTION):", rest) or re.search(r"\\b(ANSWER):", rest))')),
        "the first line of an answer": altered("parse_step", ("else content.strip()", 'else content.strip().partition("\\n")[0]')),
    },
    "evaluate": {
        "a verdict by exit code": "return Verdict(outcome.error is None, outcome.error)",
        "a verdict by printed text": 'return Verdict(outcome.value is True or "True" in outcome.printed, outcome.error)',
        "printed text is a verdict where nothing is returned": altered("evaluate", (
            "if outcome.error is None and",
            "if outcome.value is None and outcome.printed.strip() == 'True':\n    return Verdict(True)\nif outcome.error is None and")),
        "only the last line of an error": altered("evaluate", (
            "outcome.value is True, outcome.error)", "outcome.value is True, outcome.error and outcome.error.splitlines()[-1])")),
        "what counts as true passes": altered("evaluate", (" is True", ""), ("outcome.value is not True", "not outcome.value")),
        "the value counts before the state is put back": (
            "if outcome.error is None and not isinstance(outcome.value, bool):\n"
            "    return Verdict(False, f'evaluate returned {outcome.value}')\n" + SOLUTIONS["evaluate"]),
        "the value itself is the reason": (
            "if outcome.error is None and not isinstance(outcome.value, bool) and environment.state == pickle.loads(before):\n"
            "    return Verdict(False, str(outcome.value))\n" + SOLUTIONS["evaluate"]),
        "what is empty is a plain fail": altered("evaluate", ("value is not False:", "value is not False and outcome.value not in ('', [], {}):")),
        "an assertion that fails is a plain fail": altered("evaluate", (
            "outcome.value is True, outcome.error)", "outcome.value is True, None if 'AssertionError' in str(outcome.error) else outcome.error)")),
        "a refused tool is a plain fail": altered("evaluate", (
            "outcome.value is True, outcome.error)", "outcome.value is True, None if 'ToolError' in str(outcome.error) else outcome.error)")),
        "the beginning of an error": altered("evaluate", ("True, outcome.error)", "True, outcome.error and outcome.error[:200])")),
        "what equals True passes": altered("evaluate", ("value is True", "value == True"), ("value is not True", "value != True")),
        "what equals False is a fail without a reason": altered("evaluate", ("is not False", "!= False")),
        "no value is a fail without a reason": altered("evaluate", ("outcome.error is None and", "False and")),
        "the state may be changed": altered("evaluate", ("if changed:", "if False:")),
        "the state becomes a fresh one": altered("evaluate", ("environment.state = untouched", "environment.reset(task.seed)")),
        "only a world that is judged by its state is looked at": altered("evaluate", (
            "if changed:", "if changed and not environment.judged_by_answer:")),
        "the state is not put back": altered("evaluate", ("environment.state = untouched\n", "")),
    },
    "check": {
        "doing nothing may pass": altered("check", ("if not passing and", "if False and")),
        "failure cases may pass": altered("check", ("if solved and accepts", "if False and accepts")),
        "the solution need not pass": altered("check", ("if not solved:", "if False:"), ("if solved and", "if")),
        "only the first failure case is played": altered("check", ("dict.fromkeys(task.failures)", "task.failures[:1]")),
        "failure cases go on in the solution's state": altered("check", ("what, code)\n", '"the example solution", code)\n')),
        "a failure case that breaks has failed": altered("check", (
            "    state_and_answer = what_is_left(jail, task, replica, what, code)\n",
            "    try:\n        state_and_answer = what_is_left(jail, task, replica, what, code)\n    except TaskError:\n        continue\n")),
        "doing nothing must not break the evaluation": altered("check", (
            "evaluate(jail, task, make_environment(task.env, task.seed), None, replica).passed",
            "accepts(jail, task, replica, what, make_environment(task.env, task.seed), None)")),
        "what passes counts before the solution": altered("check", (
            "if solved and accepts(jail, task, replica, what, *state_and_answer):",
            "if accepts(jail, task, replica, what, *state_and_answer) if solved else evaluate(jail, task, *state_and_answer, replica).passed:"),
            ("if not solved:", "if not solved and not passing:")),
        "doing nothing counts before the solution": altered("check", (
            "if not solved:", "if not solved and not evaluate(jail, task, make_environment(task.env, task.seed), None, replica).passed:")),
        "all that pass are named": altered("check", ("{passing[0]} passes", "{', '.join(passing)} passes")),
        "the last one is named": altered("check", ("passing[0]", "passing[-1]")),
        "the first failure case that passes ends the check": altered("check", (
            "passing.append(what)\nif not", "raise TaskError('failures', f'{what} passes the evaluation')\nif not")),
        "an evaluation that breaks after a failure case has failed it": altered("check", (
            "accepts(jail, task, replica, what, *state_and_answer)", "evaluate(jail, task, *state_and_answer, replica).passed")),
        "the evaluation must not break after an unsolved task's failure cases": altered("check", ("if solved and accepts(", "if accepts(")),
        "numbers count what differs": altered("check", (
            "for code in dict.fromkeys(task.failures):", "for number, code in enumerate(dict.fromkeys(task.failures), start=1):"),
            ("task.failures.index(code) + 1", "number")),
        "doing nothing begins where the last failure case ended": altered("check", (
            "make_environment(task.env, task.seed), None", "state_and_answer[0], None")),
        "doing nothing counts only for a solution without an answer": altered("check", (
            "if not passing and", "if not passing and answer is None and")),
        "a failure case without an answer has failed": altered("check", (
            "if solved and", "if solved and state_and_answer[1] is not None and")),
        "the first that passes ends the evaluations": altered("check", (
            "if solved and accepts(", "if solved and not passing and accepts(")),
        "failure cases share a state": altered("check", ("for code in", "shared = make_environment(task.env, task.seed)\nfor code in"), (
            "state_and_answer = what_is_left(jail, task, replica, what, code)",
            "what_is_left(jail, task, replica, what, code)\n    with jail.session(shared, replica) as session:\n"
            "        state_and_answer = shared, session.run(code).value")),
        "always the first server": altered("check", ("replica, what", "0, what"), ("None, replica", "None, 0")),
    },
    "extend": {
        "a token of id 0 is none": altered("extend", ("self.tokens += tokens", "tokens = [t for t in tokens if t]\nself.tokens += tokens")),
        "every token is the agent's": altered("extend", ("[sampled] *", "[True] *")),
        "the mask is inverted": altered("extend", ("[sampled] *", "[not sampled] *")),
        "off by one in the mask": altered("extend", ("[sampled] * len(tokens)", "([False] + [sampled] * len(tokens))[:len(tokens)]")),
        "log-probabilities of sampled tokens only": altered("extend", ("[0.0] * len(tokens)", "[]")),
        "one entry a turn": altered("extend", ("[sampled] * len(tokens)", "[sampled]"), ("[0.0] * len(tokens)", "[0.0]")),
        "a mask of numbers, which would pick entries by their place": altered("extend", ("[sampled] *", "[int(sampled)] *")),
        "log-probabilities whoever spoke": altered("extend", ("logprobs if sampled", "logprobs if logprobs")),
        "what was certain was not sampled": altered("extend", (
            "[sampled] * len(tokens)", "[sampled and p != 0 for p in logprobs or tokens]")),
        "whole numbers, which make a tensor of whole numbers": altered("extend", ("[0.0]", "[0]")),
    },
    "advantages": {
        "a biased baseline: the mean with the rollout itself": "return rewards - rewards.mean(1, keepdim=True)",
        "the mean of all tasks": "return rewards - rewards.mean()",
        "divided by the standard deviation": altered("advantages", (
            "rewards - others", "(rewards - others) / (rewards.std(1, keepdim=True) + 1e-6)")),
        "doubled": altered("advantages", ("rewards - others", "2 * (rewards - others)")),
        "zero": "return torch.zeros_like(rewards)",
        "the wrong sign": altered("advantages", ("rewards - others", "others - rewards")),
        "not beyond -1 and 1": altered("advantages", ("(rewards - others)", "(rewards - others).clamp(-1, 1)")),
        "divided by K": altered("advantages", ("(count - 1)", "count")),
        "without a baseline": "return rewards.nan_to_num(0.0)",
        "the rewards themselves are changed": "rewards[rewards.isnan()] = 0.0\n" + SOLUTIONS["advantages"],
        "what does not count is a failure": "rewards = rewards.nan_to_num(0.0)\n" + SOLUTIONS["advantages"],
        "what does not count spoils its group": "return rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)",
    },
    "signal_share": {
        "any success is signal": "return (rewards > 0).any(1).float().mean().item()",
        "a mean strictly between 0 and 1 is signal": "mean = rewards.mean(1)\nreturn ((mean > 0) & (mean < 1)).float().mean().item()",
        "the first against the last rollout": "return (rewards[:, 0] != rewards[:, -1]).float().mean().item()",
        "of the rollouts, not of the tasks": "return (rewards != rewards.mean(1, keepdim=True)).float().mean().item()",
        "tasks without signal": "return (rewards == rewards[:, :1]).all(1).float().mean().item()",
        "what does not count is signal": "return (rewards != rewards[:, :1]).any(1).float().mean().item()",
        "any difference is signal": "return ((rewards - rewards.nanmean(1, keepdim=True)).abs().nansum(1) > 0).float().mean().item()",
        "more than nothing is a success": altered("signal_share", ("rewards == 1", "rewards > 0")),
        "what is nearer to 1 is a success": altered("signal_share", ("rewards == 1", "rewards > 0.5")),
        "what is nearer to 0 is a failure": altered("signal_share", ("rewards == 0", "rewards < 0.5")),
        "the rewards themselves are changed": "rewards.nan_to_num_(0.5)\n" + SOLUTIONS["signal_share"],
        "different from the first one by 1": "return ((rewards - rewards[:, :1]).abs() == 1).any(1).float().mean().item()",
        "a number of tasks": "return float((rewards != rewards[:, :1]).any(1).sum())",
    },
    "trajectory_logprobs": {
        "off by one: a token is scored by itself": altered("trajectory_logprobs", ("states[:, :-1]", "states[:, 1:]")),
        "off by one in the mask": altered("trajectory_logprobs", ("mask[:, 1:]", "mask[:, :-1]")),
        "observations are scored as well": altered("trajectory_logprobs", ("mask[:, 1:]", "torch.ones_like(mask[:, 1:])")),
        "a mask by token id": altered("trajectory_logprobs", ("mask[:, 1:]", "mask[:, 1:] & (ids[:, 1:] != 0)")),
        "zero gradient": altered("trajectory_logprobs", ("states[:, :-1]", "states.detach()[:, :-1]")),
        "without the temperature": altered("trajectory_logprobs", ("temperature)", "1.0)")),
        "in the model's 16 bits": altered("trajectory_logprobs", ("sampled.new_zeros(agent.shape).masked_scatter(agent, sampled)",
            "states.new_zeros(agent.shape).masked_scatter(agent, sampled.to(states.dtype))")),
        "what was certain is not the agent's": altered("trajectory_logprobs", (
            "mask[:, 1:]", "padded([t.logprobs for t in batch], policy.device)[:, 1:] != 0")),
        "as wide as the first row": altered("trajectory_logprobs", ("sampled.new_zeros(agent.shape)", "sampled.new_zeros(len(batch), len(batch[0].tokens) - 1)")),
        "no gradient where nothing was said": "if not mask[:, 1:].any():\n    return torch.zeros(mask[:, 1:].shape), mask[:, 1:]\n" + SOLUTIONS["trajectory_logprobs"],
        "every token goes through the head": (
            "agent = mask[:, 1:]\nlogprobs = token_logprobs(head, states[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), temperature)\n"
            "return logprobs.view(agent.shape) * agent, agent"),
    },
    "token_logprobs": {
        "all logits at once": altered("token_logprobs", ("CHUNK_TOKENS", "len(tokens)")),
        "neither chunks nor checkpoints": (
            "return torch.log_softmax(head(states).float() / temperature, -1).gather(1, tokens[:, None])[:, 0]"),
        "logits are kept for the gradient": altered("token_logprobs", (
            "checkpoint(logprobs, *chunk, use_reentrant=False)", "logprobs(*chunk)")),
        "all chunks' logits at once in the backward pass": altered("token_logprobs", (
            "torch.cat([checkpoint(logprobs, *chunk, use_reentrant=False) for chunk in chunks])",
            "checkpoint(lambda: torch.cat([logprobs(*chunk) for chunk in chunks]), use_reentrant=False)"),
            ("chunks = zip(states.split(CHUNK_TOKENS), tokens.split(CHUNK_TOKENS))",
             "chunks = [*zip(states.split(CHUNK_TOKENS), tokens.split(CHUNK_TOKENS))]")),
        "so many chunks instead of chunks of so many": altered("token_logprobs", (".split(", ".chunk(")),
        "exponentials that overflow": altered("token_logprobs", ("logits.logsumexp(-1)", "logits.exp().sum(-1).log()")),
        "without the temperature": altered("token_logprobs", (" / temperature", "")),
        "zero gradient": altered("token_logprobs", ("head(states)", "head(states.detach())")),
        "not normalised": altered("token_logprobs", (" - logits.logsumexp(-1)", "")),
        "in 16 bits": altered("token_logprobs", (".float()", "")),
        "the head is given 32 bits": altered("token_logprobs", ("head(states)", "head(states.float())")),
        "no gradient where there is nothing": "if not len(tokens):\n    return torch.zeros(0)\n" + SOLUTIONS["token_logprobs"],
        "the last, shorter chunk is forgotten": altered("token_logprobs", (
            "for chunk in chunks", "for chunk in chunks if len(chunk[0]) in (CHUNK_TOKENS, len(tokens))")),
    },
    "reinforce_step": {
        "zero gradient": altered("reinforce_step", ("-(weight", "-0.0 * (weight")),
        "doubled": altered("reinforce_step", ("-(weight", "-2 * (weight")),
        "downhill": altered("reinforce_step", ("-(weight", "(weight")),
        "divided by the micro-batch": altered("reinforce_step", ("len(trajectories)", "len(batch)")),
        "divided by the trajectories with signal": altered("reinforce_step", ("len(trajectories)", "len(teaching)")),
        "divided by the temperature once more": altered("reinforce_step", ("len(trajectories)", "len(trajectories) / temperature")),
        "divided by each length": altered("reinforce_step", (".sum() /", ".sum(1).div(agent.sum(1)).sum() /")),
        "the ratio without its cap": altered("reinforce_step", (".clamp(max=importance_cap)", "")),
        "the ratio upside down": altered("reinforce_step", ("(-log_ratio)", "log_ratio")),
        "the inverse of the cap is a floor": altered("reinforce_step", ("(max=importance_cap)", "(1 / importance_cap, importance_cap)")),
        "weighed even without a cap": altered("reinforce_step", (
            "if importance_cap is not None:", "if True:"), ("max=importance_cap", "max=importance_cap or 1.0")),
        "the ratio that was given is changed": altered("reinforce_step", ("(-log_ratio).exp()", "log_ratio.neg_().exp_()")),
        "the mask that was given is changed": "agent = torch.ones_like(agent)\n" + SOLUTIONS["reinforce_step"],
        "the cap is a floor": altered("reinforce_step", ("max=importance_cap", "min=importance_cap")),
    },
    "pass_at_k": {
        "biased: as if trials could repeat": "return 1 - (1 - c / n) ** k",
        "the share of successes": "return c / n",
        "all of k instead of one": "return math.comb(c, k) / math.comb(n, k)",
        "any success is enough": "return float(c > 0)",
    },
}


def plant(name: str, code: str) -> dict[str, str]:
    """Return how the tests of an exercise end where this code is its answer, and no other exercise is solved."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        make_copy(copy, {name: indent(code.strip("\n"), EXERCISES[name].indentation)})
        return play(copy, name)


def play_all(names: Iterable[str] = EXERCISES) -> dict[tuple[str, str], dict[str, str]]:
    """Return {(exercise, answer): {test: how it ended}} of all wrong answers, and of the solutions, called "the solution"."""
    answers = [(name, what, code) for name in names for what, code in {"the solution": SOLUTIONS[name], **WRONG[name]}.items()]
    ends = in_parallel(plant, [(name, code) for name, _, code in answers])
    return {(name, what): end for (name, what, _), end in zip(answers, ends)}


def main() -> int:
    """Print how all answers ended; return 1 if one ended as it should not."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("exercises", nargs="*", metavar="EXERCISE", help="only of these")
    names = parser.parse_args().exercises or list(EXERCISES)
    if unknown := [name for name in names if name not in EXERCISES]:
        parser.error(f"there is no exercise {', '.join(unknown)}, but {', '.join(EXERCISES)}")
    surprises = 0
    for (name, answer), ends in play_all(names).items():
        failed = sum(end != "passed" for end in ends.values())
        surprises += (failed == 0) != (answer == "the solution")
        print(f"{name:20} {answer:60} fails {failed:2} of {len(ends)} tests")
    return int(surprises > 0)


if __name__ == "__main__":
    sys.exit(main())
