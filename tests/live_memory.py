"""What work takes in memory, counted tensor by tensor, on any device: test_rl.py and bench_rl.py hold `rl.memory_of` against it."""
import copy
import gc
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rl  # noqa: E402


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and still alive: `live`, and `peak`, the most there were.

    Views of tensors that were there before, such as a model's weights, have to be told from new ones: these are `known`.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live, self.peak, self.storages = 0, 0, {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, function: Callable, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        tree_map_only(torch.Tensor, self.count, result)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless another tensor has brought it before, until it is freed."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self.storages:
            self.storages[address] = weakref.finalize(storage, self.forget, address, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def forget(self, address: int, size: int) -> None:
        """A storage was freed."""
        del self.storages[address]
        self.live -= size


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that a model consists of, with those that belong to its weights in 4 bits."""
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    extra = [tensor for state in states for tensor in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)]
    tensors = [*model.parameters(), *model.buffers(), *extra]
    return list({tensor.untyped_storage()._cdata: tensor for tensor in tensors}.values())  # shared ones once


def byte_count(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of some tensors' storages."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def random_policy(config: PreTrainedConfig, rank: int = 8) -> rl.Policy:
    """Return a policy with random weights of a shape, and no tokenizer."""
    config = copy.deepcopy(config)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        return rl.Policy(rl.attach_adapter(rl.load_base(folder, torch.bfloat16), None, rank, 0).train(), None, frozenset())


def training_peak(policy: rl.Policy, tokens: int) -> int:
    """The bytes at the height of a gradient step on one trajectory of so many tokens; another step has come before."""
    gc.collect()
    optimizer, weights = rl.make_optimizer(policy, 1e-4), weights_of(policy.model)
    with LiveMemory(weights) as memory:
        for length in (8, tokens):
            memory.peak = memory.live
            rl.reinforce_step(policy, optimizer, [rl.Trajectory([1] * length, [False] + [True] * (length - 1), [0.0] * length)], torch.ones(1))
    return byte_count(weights) + memory.peak


@torch.inference_mode()
def filling_peak(policy: rl.Policy, slots: int, context: int) -> int:
    """The bytes at the height of the largest pass that fills a cache of so many slots and columns."""
    gc.collect()
    weights = weights_of(policy.model)
    rows = max(1, min(slots - 1, rl.FEED_COLUMNS // context))
    tokens = min(rl.FEED_TOKENS // rows, context - 1)
    with LiveMemory(weights) as memory:
        cache = rl.SlotCache(policy.model.config, slots, context)
        rl.advance(policy, cache, range(rows), [[1] * tokens] * rows, [context - tokens] * rows)
    return byte_count(weights) + memory.peak
