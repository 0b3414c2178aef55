"""What is given: these tests pass before the first exercise is solved. If they do not, mend the installation first."""
import importlib

import pytest
import torch

import eval as evaluation
import rl
from tools import make_environment


@pytest.mark.parametrize("script", ["tools", "verify", "rl", "eval", "selfchallenge"])
def test_a_script_is_imported(script):
    assert importlib.import_module(script).__doc__


def test_the_jail_runs_code_which_calls_a_tool(jail):
    shop = make_environment("shop", seed=3)
    with jail.session(shop) as session:
        outcome = session.run("result = stock('tea')")
    assert outcome.error is None and outcome.value == shop.state["stock"]["tea"]


def test_the_embedded_model_is_loaded_and_scores_a_text():
    policy = rl.load_policy("tiny")
    ids = torch.tensor([rl.prompt_tokens(policy.tokenizer, [{"role": "user", "content": "Cancel the tea."}])])
    assert policy.model(input_ids=ids).logits.shape == (1, ids.shape[1], policy.model.config.vocab_size)


def test_the_baseline_none_and_wrong_names_are_given():
    assert rl.advantages(torch.tensor([[1.0, 0.0]]), "none").tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="leave-one-out or none"):
        rl.advantages(torch.zeros(1, 2), "median")


def test_pass_all_k_is_given_beside_pass_at_k():
    assert evaluation.pass_all_k(5, 4, 2) == 6 / 10
