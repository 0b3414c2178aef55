"""What work takes in memory, counted tensor by tensor, on any device: test_rl.py and bench_rl.py hold `rl.memory_of` against it.

Large models are counted on PyTorch's meta device, on which tensors have shapes and no numbers: there the code of rl.py runs
as it is on a model of any size, on any machine, and every tensor that it would make is counted. What this cannot show is
the time, what kernels take for themselves, and the gaps between tensors.
"""
import copy
import gc
import math
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

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


class MetaMemory(LiveMemory):
    """The same for tensors on the meta device. Where the code needs a number it gets 1, and every mask is all True."""

    def __enter__(self) -> "MetaMemory":
        self.attention = patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
        self.attention.start()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.attention.stop()

    def __torch_dispatch__(self, function: Callable, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1
        if function is torch.ops.aten.index.Tensor and arguments[1][0].dtype is torch.bool:
            function, arguments = torch.ops.aten.clone.default, (arguments[0].flatten(0, arguments[1][0].dim() - 1),)
        if function is torch.ops.bitsandbytes.gemm_4bit.default:  # which may make the weights in 16 bits for a moment
            states, _, shape = arguments[:3]
            self.peak = max(self.peak, self.live + 2 * math.prod(shape) + 2 * shape[0] * states.shape[:-1].numel())
        return super().__torch_dispatch__(function, types, arguments, keywords)


class FusedAttention(torch.autograd.Function):
    """The tensors of attention in one kernel of a GPU, which keeps the queries, keys, values, results, and a number for each row."""

    @staticmethod
    def forward(context: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        result, sums = torch.empty_like(queries), queries.new_empty(queries.shape[:3], dtype=torch.float32)
        context.save_for_backward(queries, keys, values, result, sums)
        return result

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        queries, keys, values, _, sums = context.saved_tensors
        kept = torch.empty_like(queries), torch.empty_like(sums)
        groups = [states.new_empty(states.shape[0], queries.shape[1], *states.shape[2:]) for states in (keys, values)]  # for each head
        return kept[0], *(group.unflatten(1, (keys.shape[1], -1)).sum(2) for group in groups)


def fused_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, attn_mask: torch.Tensor | None = None,
                    **_: Any) -> torch.Tensor:
    """What takes the place of PyTorch's function of this name, which would count the attention matrices on the meta device."""
    added = None if attn_mask is None else attn_mask.to(queries.dtype)  # as PyTorch does
    result = FusedAttention.apply(queries, keys, values)
    del added
    return result


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


def shape_policy(config: PreTrainedConfig, rank: int = 8) -> rl.Policy:
    """Return a policy of a shape on the meta device, its linear layers in 4 bits as `rl.load_base` has them, and no tokenizer."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    bitsandbytes.functional.quantize_blockwise(torch.zeros(256), blocksize=256)  # its table has to be made where there are numbers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    replace_with_bnb_linear(model, ["lm_head"], quantization)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            full = torch.empty(module.weight.shape, dtype=torch.bfloat16, device="meta")
            weight, state = bitsandbytes.functional.quantize_4bit(full, compress_statistics=True, quant_type="nf4")
            if module.bias is not None:  # in 16 bits, or the first pass puts another tensor in its place, uncounted
                module.bias.data = module.bias.data.to(torch.bfloat16)
            module.weight = bitsandbytes.nn.Params4bit(weight, quant_state=state, bnb_quantized=True, quant_type="nf4", module=module)
    model.is_loaded_in_4bit = True
    return rl.Policy(rl.attach_adapter(model, None, rank, 0).train(), None, frozenset())


def memory_on(policy: rl.Policy, weights: list[torch.Tensor]) -> LiveMemory:
    """Return what counts the tensors of a policy's device."""
    return (MetaMemory if policy.device.type == "meta" else LiveMemory)(weights)


def training_peak(policy: rl.Policy, tokens: int) -> int:
    """The bytes at the height of a gradient step on one trajectory of so many tokens; another step has come before."""
    gc.collect()
    optimizer, weights = rl.make_optimizer(policy, 1e-4), weights_of(policy.model)
    with memory_on(policy, weights) as memory:
        for length in (8, tokens):
            memory.peak = memory.live
            rl.reinforce_step(policy, optimizer, [rl.Trajectory([1] * length, [False] + [True] * (length - 1), [0.0] * length)], torch.ones(1))
    return byte_count(weights) + memory.peak


@torch.inference_mode()
def rollout_peak(policy: rl.Policy, slots: int, context: int) -> int:
    """The bytes at the height of rollouts: when a cache of so many slots is filled, all sample, and an episode is over.

    Training has come before, and left Adam's two moments of each of the adapter's weights, in 32 bits.
    """
    gc.collect()
    weights = weights_of(policy.model)
    rows = max(1, min(slots - 1, rl.FEED_COLUMNS // context))
    tokens = min(rl.FEED_TOKENS // rows, context - 1)
    with memory_on(policy, weights) as memory:
        cache = rl.SlotCache(slots, context)
        rl.advance(policy, cache, range(rows), [[1] * tokens] * rows, [context - tokens] * rows)
        rl.sample_tokens(rl.advance(policy, cache, range(slots), [[1]] * slots, [context - 1] * slots), None, 1.0)
        cache.keep(list(range(1, slots)))
    moments = 2 * 4 * sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    return byte_count(weights) + moments + memory.peak
