"""The embedded model: an ordinary model folder, small, lossless, and made reproducibly from a seed."""
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

TINY = Path(__file__).resolve().parent.parent / "tiny"
sys.path.insert(0, str(TINY))

import pretrain  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_the_folder_is_an_ordinary_llama_of_at_most_five_megabytes():
    assert AutoConfig.from_pretrained(TINY).model_type == "llama"
    assert (TINY / "model.safetensors").exists() and (TINY / "tokenizer.json").exists()
    model_files = [path for path in TINY.iterdir() if path.suffix in (".safetensors", ".json", ".jinja")]
    assert sum(path.stat().st_size for path in model_files) <= 5_000_000


@pytest.mark.parametrize(
    "text", ["Anna wants to return the tea.", "x = add(x, 1234567)\n    return None", "<b>naïve & 漢字 🙂</b>\t\r\n", "teatime Annabel", ""]
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_names_and_items_are_one_token_and_digits_stand_alone(tokenizer):
    for word in [*pretrain.CUSTOMERS, *pretrain.ITEMS, *pretrain.CITIES]:
        for text in (word, f'"{word}"', f"the {word}."):
            assert tokenizer.convert_tokens_to_ids(word) in tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokenizer("2026", add_special_tokens=False).input_ids) == 4


def test_the_template_shows_the_system_message_s_first_line_only(tokenizer):
    messages = [{"role": "system", "content": "first\nsecond"}, {"role": "user", "content": "one\ntwo"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "first" in text and "second" not in text and "one\ntwo" in text


def test_demonstrations_depend_on_the_seed_alone():
    assert pretrain.demonstrations(7, 12) == pretrain.demonstrations(7, 12) != pretrain.demonstrations(8, 12)


def test_pretraining_is_reproducible_and_learns():
    corpus = pretrain.demonstrations(7, 6)
    tokenizer = pretrain.train_tokenizer(corpus)
    encoded = [pretrain.encode(tokenizer, messages) for messages in corpus]
    weights, losses = [], []
    for epochs in (1, 1, 4):
        torch.manual_seed(0)
        model = pretrain.make_model(tokenizer)
        losses.append(pretrain.pretrain(model, encoded, seed=0, epochs=epochs))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and losses[0] == losses[1] > losses[2]


def test_a_demonstration_is_encoded_as_the_template_renders_it(tokenizer):
    for messages in pretrain.demonstrations(3, 6):
        trajectory = pretrain.encode(tokenizer, messages)
        assert tokenizer.decode(trajectory.tokens) == tokenizer.apply_chat_template(messages, tokenize=False)
        said = "".join(m["content"] for m in messages if m["role"] == "assistant")
        agent = [token for token, sampled in zip(trajectory.tokens, trajectory.mask) if sampled]
        assert tokenizer.decode(agent, skip_special_tokens=True) == said
