"""What the exercises' tests share: the scripts, which lie two folders above, a jail, and a small policy."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def jail():
    from verify import Jail

    with Jail(allow_weak=True) as jail:
        yield jail


@pytest.fixture(scope="session")
def policy():
    """A real Llama with random weights and a LoRA adapter, which is made faster than the embedded one is loaded."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import rl

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer)))
    model = rl.attach_adapter(base, None, rank=4, seed=0).train()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_B" in name:  # a fresh adapter is the identity, which would hide mistakes
                weights.normal_(0, 0.1)
    return rl.Policy(model, tokenizer, frozenset([tokenizer.eos_token_id]))
