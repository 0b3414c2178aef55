"""The policy: a 4-bit base with a LoRA adapter, batched multi-turn rollouts, REINFORCE with a baseline.

The paper (section 3.3) trains the executor by REINFORCE with the 0/1 reward and no baseline, which is
rejection fine-tuning (RFT): only the successes carry gradient. What differs here, and why:

* a leave-one-out baseline (Kool et al. 2019; RLOO, arXiv 2402.14740), so that failures teach as well and
  the gradient has less variance. `baseline="none"` is the paper's RFT.
* fresh rollouts at every step (on-policy) instead of 12,000 offline trajectories: at this size they are cheap.
* QLoRA instead of full fine-tuning, and logits in chunks, so that an 8B model and the paper's context of 16,192
  tokens are meant for one card: `python rl.py --fit MODEL` says what fits, before any weights are downloaded.
* no division by a group's standard deviation and none by a trajectory's length (Dr. GRPO, arXiv 2503.20783),
  no clipping and no KL term: one gradient step per batch of rollouts needs none of them.

Where a world has users (Retail, Airline), the executor's ANSWER is a message, and the episode a conversation.

The data flow: episodes --rollout--> trajectories --advantages--> A --reinforce_step--> policy.

Read next: eval.py, which measures a policy; before: verify.py, which runs and judges the model's code.
"""
import argparse
import hashlib
import json
import logging
import math
import os
import platform
import random
import sys
import time
import warnings
import weakref
from bisect import bisect
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from jinja2 import TemplateError  # of the language of chat templates; it comes with torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

warnings.filterwarnings("ignore", message=".*gradient_checkpointing")  # a new name is coming; peft uses the old one, too
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it announces optional kernels that we do not need
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt when there is no network
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # of a GPU's memory less is lost in gaps; read at its first use
torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length, and in a rollout each token brings another
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedConfig,
)
from transformers.cache_utils import DynamicLayer  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from tools import ENVIRONMENTS, STOP, endpoint_model, load_benchmarks, make_environment, open_conversation, spoken  # noqa: E402
from verify import (  # noqa: E402
    CodeAsTask,
    FormatError,
    Jail,
    TaskError,
    Verdict,
    add_benchmark_options,
    evaluate,
    guarded,
    observation,
    parse_step,
    read_lines,
)

transformers_logging.disable_progress_bar()
HERE = Path(__file__).resolve().parent
MAX_STEPS = 15  # the paper's limit for the executor (section 4)
FEED_COLUMNS = 8192  # rows x columns of the cache in a pass that fills it with prompts and observations: attention may copy them
FEED_TOKENS = 1024  # rows x new tokens in such a pass
CHUNK_TOKENS = 512  # whose logits exist at once in training
CONTEXTS = (2048, 4096, 8192, 16_192)  # of which --fit speaks; the last is the paper's
User = Callable[[list[list[dict]], torch.Generator], list[str | None]]  # from conversations to the users' next messages


# ---------------------------------------------------------------------------------------------------
# the policy

class PolicyError(ValueError):
    """A model that cannot be used; the message is one sentence that says what to do."""


@dataclass
class Policy:
    """A language model that acts: the network (4-bit base + LoRA) and its tokenizer."""

    model: torch.nn.Module
    tokenizer: object
    stop_ids: frozenset[int]  # any of these tokens ends a turn

    @property
    def device(self) -> torch.device:
        """Where the network's inputs must lie."""
        return self.model.device


def load_policy(name: str, adapter: str | Path | None = None, rank: int = 8, seed: int = 0) -> Policy:
    """Load a model directory or hub name as NF4 and put a LoRA adapter on it: a saved one, or a fresh one.

    `tiny` is short for the folder tiny/ beside this file. The base is quantised to NF4 with double
    quantisation (QLoRA, arXiv 2305.14314) and frozen; LoRA (arXiv 2106.09685) of `rank` lies on all linear
    layers. A fresh adapter is the identity, and its initial weights depend on `seed` alone.
    Raises PolicyError if the model is missing or broken, or has no chat template.
    """
    path = HERE / "tiny" if name == "tiny" else name
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise PolicyError(f"there is no model folder {name!r}: give a folder, or the name of a model on the hub, such as owner/name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        base = load_base(path, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    except torch.OutOfMemoryError:  # a RuntimeError, too: see advice_on_memory
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PolicyError(f"cannot load the model {name!r}: {reason} (give a model folder or a hub name; for a gated model accept "
                          f"its licence on the hub first, then run: hf auth login)") from error
    if tokenizer.chat_template is None:
        raise PolicyError(f"the model {name!r} has no chat template: use an instruction-tuned model")
    check_template(tokenizer)
    if not head_is_linear(base):
        raise PolicyError(f"the model {name!r} does more to its logits than one linear layer, which the trainer relies on: use another")
    model = attach_adapter(base, adapter, rank, seed).train()
    ends = base.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return Policy(model, tokenizer, frozenset(i for i in [*ends, tokenizer.eos_token_id] if i is not None))


def load_base(path: str | Path, compute_type: torch.dtype) -> torch.nn.Module:
    """Load a model with its linear layers as NF4 with double quantisation, on the GPU if there is one.

    Always in training mode. There is no dropout, so the function is the same, but in evaluation mode bitsandbytes swaps
    in another CPU kernel, and sampler and trainer must compute the same probabilities.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_type,
    )
    device = 0 if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=compute_type, device_map={"": device}).train()


@torch.no_grad()
def head_is_linear(base: torch.nn.Module) -> bool:
    """Whether the logits are those of the output layer alone, not scaled or capped (as those of Gemma 2 are)."""
    ids = torch.tensor([[0, 1]], device=base.device)
    states = base.get_decoder()(input_ids=ids).last_hidden_state
    return torch.equal(base.get_output_embeddings()(states), base(input_ids=ids).logits)


def attach_adapter(base: torch.nn.Module, adapter: str | Path | None, rank: int, seed: int) -> PeftModel:
    """Put LoRA on a base: the adapter saved in a folder, or a fresh one. Raises PolicyError if it does not fit."""
    if adapter is not None:
        try:
            return PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise PolicyError(f"cannot load the adapter {str(adapter)!r}: {reason}") from error
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


# ---------------------------------------------------------------------------------------------------
# from messages to tokens: a trajectory is append-only, because decoding and encoding again changes tokens

def defuse(tokenizer, text: str) -> str:
    """Return `text` with a space inside every special token that stands in it as text.

    Tool results and instructions are written by a model: `<|end|>` in them must stay text, not end the turn.
    """
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in text:
            text = text.replace(token.content, token.content[0] + " " + token.content[1:])
    return text


def prompt_tokens(tokenizer, messages: list[dict]) -> list[int]:
    """Return the token ids of the opening messages, up to where the agent's first turn begins."""
    messages = [{**message, "content": defuse(tokenizer, message["content"])} for message in messages]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def check_template(tokenizer) -> None:
    """Raise PolicyError unless a conversation in the tokenizer's chat template only ever grows at its end.

    Some templates rewrite earlier turns when a new one comes; those of models that reason drop their thoughts.
    """
    system, ask = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}
    for turn in ("T", "<think>\nT\n</think>\n\nT"):
        conversation = [system, ask, {"role": "assistant", "content": turn}]
        try:
            before, after = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in (conversation, [*conversation, ask])]
        except TemplateError as error:
            raise PolicyError(f"the model's chat template takes no system message, or no turns: {error}; use another model") from error
        if not after.startswith(before):
            raise PolicyError("the model's chat template rewrites earlier turns, so a trajectory cannot grow: use another model")


def observation_tokens(tokenizer, observation: str) -> list[int]:
    """Return the token ids between two turns of the agent: the end of its turn, the observation, its next header.

    They are cut out of the chat template's own rendering of a short conversation, so they do not depend on
    the conversation so far (`check_template`).
    """
    marker = "MARKER"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}, {"role": "user", "content": defuse(tokenizer, observation)}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(text[text.index(marker) + len(marker):], add_special_tokens=False).input_ids


# ---------------------------------------------------------------------------------------------------
# episodes and trajectories

class Episode:
    """What a rollout plays: a role in a world, which takes the agent's turns and gives the next observations.

    `messages` begins with the system message and the user's; `rollout` appends every turn, for the reader.
    A role says in `answer` what becomes of an ANSWER, and in `max_steps` how many turns it may take.
    """

    max_steps: int
    asks = False  # whether the agent has just spoken to a simulated user, whose reply goes to `hear`

    def __init__(self, jail: Jail, env: str, seed: int):
        self.jail, self.env, self.seed = jail, env, seed
        self.environment = make_environment(env, seed)
        self.session = jail.session(self.environment, replica=seed)  # which spreads the work over the servers
        self.messages: list[dict] = []
        self.reward, self.steps, self.status = 0.0, 0, "running"

    def act(self, code: str) -> str | None:
        """Run the agent's code in its session; return the next observation, or None at the end of the episode."""
        return observation(self.session.run(code))

    def answer(self, content: str) -> str | None:
        """Take the agent's answer; return the next observation, or None at the end of the episode."""
        raise NotImplementedError

    def step(self, text: str) -> str | None:
        """Take the agent's turn; return the next observation, or None at the end of the episode."""
        self.steps += 1
        try:
            step = parse_step(text)
        except FormatError as reminder:
            reply = str(reminder)
        else:
            reply = self.act(step.content) if step.kind == "action" else self.answer(step.content)
        if reply is None or self.steps < self.max_steps:
            return reply and f"Observation:\n{reply}"
        self.status, self.asks = "out of steps", False
        return None

    def close(self) -> None:
        """End the jailed session; it may be called at any time."""
        self.session.close()


EXECUTOR_PROMPT = """\
You are the executor in the environment {env}.
{summary}

You act by writing Python that calls the tools below. Variables persist from action to action, and you see
only what your code prints. Every reply has this form, with either an action or an answer, never both:

THOUGHT: what to do next, in a sentence END THOUGHT
ACTION:
print(some_tool("an argument"))
END ACTION

or, when {when}:

THOUGHT: why it is done END THOUGHT
ANSWER: {answer} END ANSWER

You have at most {steps} replies. Look things up; do not invent ids or values.

Tools:
{documentation}"""


class Executor(Episode):
    """The executor's episode: it gets a task's instruction, acts, answers, and is rewarded with 0 or 1.

    The reward is the verdict of `judge` (of the task's own `evaluate`, unless a benchmark brings another) on the
    state that the episode leaves, and on the answer.
    """

    max_steps = MAX_STEPS
    when, answer_is = "the task is done", "the final answer alone, or the word done"

    def __init__(self, jail: Jail, task: Any, judge: Callable[..., Verdict] = evaluate):
        super().__init__(jail, task.env, task.seed)
        self.task, self.judge, self.final = task, judge, None  # the final answer
        prompt = EXECUTOR_PROMPT.format(
            env=task.env,
            summary=self.environment.summary,
            steps=MAX_STEPS,
            when=self.when,
            answer=self.answer_is,
            documentation=self.environment.documentation(),
        )
        self.messages = [{"role": "system", "content": prompt}, {"role": "user", "content": task.instruction}]

    def answer(self, content: Any) -> None:
        """Judge the final answer and the state; the episode ends."""
        self.close()  # first, so that nothing of the executor's code still runs while it is judged
        self.final = content
        verdict = self.judge(self.jail, self.task, self.environment, content, replica=self.seed)
        self.reward, self.status = float(verdict.passed), "answered"


@dataclass
class Trajectory:
    """An episode as the trainer sees it; `tokens`, `mask` and `logprobs` have one entry a token."""

    tokens: list[int]  # append-only: the prompt, then the agent's turns and the observations in turn
    mask: list[bool]  # True where the agent sampled the token: only these carry loss
    logprobs: list[float]  # the sampler's log-probability of each sampled token, 0 elsewhere
    reward: float = 0.0
    status: str = ""
    messages: list[dict] = field(default_factory=list)

    def extend(self, tokens: list[int], sampled: bool, logprobs: list[float] | None = None) -> None:
        """Append tokens, either all sampled by the agent or none."""
        ### BEGIN SOLUTION
        self.tokens += tokens
        self.mask += [sampled] * len(tokens)
        self.logprobs += logprobs if sampled else [0.0] * len(tokens)
        ### END SOLUTION


def rollout(
    policy: Policy,
    episodes: list[Episode],
    generator: torch.Generator,
    temperature: float = 1.0,
    parallel: int = 256,
    turn_tokens: int = 256,
    context: int = 2048,
    user: User | None = None,
    bar: tqdm | None = None,
) -> list[Trajectory]:
    """Play the episodes to their ends, `parallel` side by side; return their trajectories in the episodes' order.

    temperature 0 is greedy. A turn is cut after `turn_tokens` and at `context` tokens, where the episode ends. `user` speaks
    for the users of conversations; without one, the policy's base model does. Raises PolicyError if a prompt does not
    fit into the context, or the context not into the model's sliding window, which the cache does not imitate.
    """
    window = getattr(policy.model.config.get_text_config(), "sliding_window", None)
    if window and window < context:
        raise PolicyError(f"the model sees a sliding window of {window:,} tokens: lower --context to that")
    user = user or own_user(policy, parallel, turn_tokens)
    seats = begin(policy, episodes, user, generator)
    running = [seat for seat in seats if not seat.over]
    if (longest := max((len(seat.prompt) for seat in running), default=0)) >= context:
        raise PolicyError(f"a prompt of {longest:,} tokens leaves no room in --context {context:,}: raise it")
    play(policy, running, generator, temperature, parallel, turn_tokens, context, user, bar)
    return [seat.trajectory for seat in seats]


@dataclass
class Seat:
    """An episode at play, its trajectory, and how far the cache has followed it."""

    episode: Episode
    trajectory: Trajectory
    prompt: tuple[int, ...]  # the tokens of the opening, which the rollouts of a task share
    turn: int                # where in the trajectory the agent's turn begins
    fed: int = 0             # tokens that the cache holds: while the agent samples, all but the last
    text: str | None = None  # of the agent's turn, once that has ended: the seat waits
    over: bool = False

    def end(self) -> None:
        """Close the episode, and note how it ended."""
        self.episode.close()
        self.trajectory.reward, self.trajectory.status = self.episode.reward, self.episode.status
        self.episode.environment, self.over = None, True  # a database may have megabytes


def begin(policy: Policy, episodes: list[Episode], user: User, generator: torch.Generator) -> list[Seat]:
    """Return the seats of episodes that have not begun, with their prompts, in which a user may speak first."""
    asked = [episode for episode in episodes if episode.asks]
    for episode, message in zip(asked, user([episode.conversation for episode in asked], generator) if asked else []):
        if first := episode.hear(message):
            episode.messages.append({"role": "user", "content": first})
    seats = []
    for episode in episodes:
        prompt = prompt_tokens(policy.tokenizer, episode.messages)
        trajectory = Trajectory(list(prompt), [False] * len(prompt), [0.0] * len(prompt), messages=episode.messages)
        seats.append(Seat(episode, trajectory, tuple(prompt), turn=len(prompt)))
        if episode.status != "running":  # the user has failed, or wants nothing
            seats[-1].end()
    return seats


@torch.inference_mode()
def play(
    policy: Policy, seats: list[Seat], generator: torch.Generator,
    temperature: float, parallel: int, turn_tokens: int, context: int, user: User, bar: tqdm | None,
) -> None:
    """Play the episodes to their ends, each in a slot of the KV cache, which lasts from its first turn to its last.

    All slots sample a token in one pass of the network. An episode whose turn has ended waits; when half of the slots
    wait, `take_steps` runs the code of all their turns side by side, while the network rests, and they all go on. So none
    waits for the slowest, the network has the processor to itself, and what happens never depends on how fast code was.
    That is also when waiting episodes take the slots of those that are over.
    """
    queue = deque(seats)
    slots = [queue.popleft() for _ in range(min(parallel, len(queue)))]  # the seat in each slot
    cache, waiting = SlotCache(policy.model.config, len(slots), context), []
    while slots:
        fill(policy, cache, slots)
        last = [[0] if seat.text is not None else seat.trajectory.tokens[-1:] for seat in slots]  # 0 for a slot that waits
        logits = advance(policy, cache, range(len(slots)), last, [seat.fed for seat in slots])
        sampled = torch.stack(sample_tokens(logits, generator, temperature)).tolist()  # [2, slots]: here alone a GPU is waited for
        if any(map(math.isnan, sampled[1])):
            raise PolicyError("the model's probabilities are no numbers any more: lower --learning-rate")
        for seat, token, logprob in zip(slots, map(int, sampled[0]), sampled[1]):
            if seat.text is None:
                seat.fed = len(seat.trajectory.tokens)
                seat.trajectory.extend([token], True, [logprob])
                if token in policy.stop_ids or len(seat.trajectory.tokens) == min(seat.turn + turn_tokens, context):
                    seat.text = turn_text(policy, seat.trajectory.tokens[seat.turn:])
                    waiting.append(seat)
        if 2 * len(waiting) >= len(slots):
            take_steps(policy, waiting, user, generator, context)
            if bar is not None:
                bar.update(sum(seat.over for seat in waiting))
            waiting.clear()
            slots = [queue.popleft() if seat.over and queue else seat for seat in slots]
            if any(seat.over for seat in slots):
                cache.keep([slot for slot, seat in enumerate(slots) if not seat.over])
                slots = [seat for seat in slots if not seat.over]


def sample_tokens(logits: torch.Tensor, generator: torch.Generator, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token from each row of `logits` [rows, vocabulary]; return tokens and their log-probabilities, both [rows].

    The log-probabilities are those of the distribution that was sampled: of logits / temperature, with no
    top-k or top-p cut, so that the trainer can compute the same number. temperature 0 takes the most likely token.
    Of exponential variables with the rates p the first to come is i with probability p_i: so torch.multinomial draws,
    too, but it also checks p, for which it has to wait for a GPU.
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        tokens = logprobs.exp().div_(torch.empty_like(logprobs).exponential_(generator=generator)).argmax(-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def turn_text(policy: Policy, tokens: list[int]) -> str:
    """Return the text of a turn, without the tokens that end it."""
    return policy.tokenizer.decode([token for token in tokens if token not in policy.stop_ids], skip_special_tokens=True)


def take_steps(policy: Policy, seats: list[Seat], user: User, generator: torch.Generator, context: int) -> None:
    """Hand the episodes their agents' turns, side by side, then let the users reply, all at once; all go on, or end."""
    def step(seat: Seat) -> str | None:
        seat.episode.messages.append({"role": "assistant", "content": seat.text})
        return seat.episode.step(seat.text)

    seats = [seat for first in range(8) for seat in seats[first::8]]  # a task's rollouts apart: what one's code did, the next finds remembered
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as workers:
        replies = list(workers.map(step, seats))
    asked = [number for number, seat in enumerate(seats) if seat.episode.asks]
    messages = user([seats[number].episode.conversation for number in asked], generator) if asked else []
    for number, message in zip(asked, messages):
        replies[number] = seats[number].episode.hear(message)
    for seat, reply in zip(seats, replies):
        observe(policy, seat, reply, context)
        seat.turn, seat.text = len(seat.trajectory.tokens), None


def observe(policy: Policy, seat: Seat, reply: str | None, context: int) -> None:
    """Append an observation to the trajectory; without one, or without room for it, the episode is over."""
    if reply is not None:
        seat.episode.messages.append({"role": "user", "content": reply})
        tokens = observation_tokens(policy.tokenizer, reply)
        if seat.trajectory.tokens[-1] == tokens[0]:  # the agent itself has written the end of its turn
            tokens = tokens[1:]
        if len(seat.trajectory.tokens) + len(tokens) < context:
            seat.trajectory.extend(tokens, False)
            return
        seat.episode.status = "out of context"
    seat.end()


# ---------------------------------------------------------------------------------------------------
# conversations, and other models (on a first reading skip this: the toy worlds have neither)

class SupportAgent(Executor):
    """The executor in a world with a user: only the user knows the instruction, and an ANSWER is a message to the user.

    `asks` says that the agent has spoken: the user's reply goes to `hear` and is the next observation. The episode
    ends when the user stops or the agent hands over to a human. The final answer is the list of what was said.
    """

    when, answer_is = "you want to say something to the customer", "your message; when all is settled, the customer ends it"

    def __init__(self, jail: Jail, task: Any, judge: Callable[..., Verdict] = evaluate):
        super().__init__(jail, task, judge)
        self.messages, self.conversation, self.said, self.asks = self.messages[:1], open_conversation(task.instruction), [], True

    def act(self, code: str) -> str | None:
        reply = super().act(code)
        return self.end() if self.environment.over else reply

    def answer(self, content: str) -> str:
        """Say something to the user; the observation is still to come."""
        self.said.append(content)
        self.conversation.append({"role": "user", "content": content})
        self.asks = True
        return ""  # no observation yet, and no end

    def hear(self, message: str | None) -> str | None:
        """Take the user's message, None if the user failed; return the next observation, or None at the end."""
        self.asks = False
        if message is None:
            self.reward, self.status = float("nan"), "user failed"  # which is no fault of the agent's: it does not count
            return None
        self.conversation.append({"role": "assistant", "content": message})
        message = spoken(message)
        return self.end() if message == STOP else f"Customer:\n{message}"

    def end(self) -> None:
        """Judge the state and what was said; the episode ends."""
        self.environment.over = False  # for an evaluation, which looks at the state through the tools
        super().answer(self.said)


def executor(jail: Jail, task: Any, judge: Callable[..., Verdict] = evaluate) -> Executor:
    """Return the executor's episode of a task, in a conversation where its world has users."""
    return (SupportAgent if ENVIRONMENTS[task.env].talks else Executor)(jail, task, judge)


class UserTurn(Episode):
    """One message of a simulated user whom a policy plays."""

    max_steps = 1

    def __init__(self, conversation: list[dict]):
        self.messages, self.reward, self.status = list(conversation), 0.0, "running"

    def step(self, text: str) -> None:
        self.text = text

    def close(self) -> None:
        """There is no session to end."""


def own_user(policy: Policy, parallel: int, turn_tokens: int) -> User:
    """Return a user whom the policy's own base model plays: without the adapter, so that training does not change it."""
    def reply(conversations: list[list[dict]], generator: torch.Generator) -> list[str]:
        turns = [UserTurn(conversation) for conversation in conversations]
        room = turn_tokens + max(len(prompt_tokens(policy.tokenizer, turn.messages)) for turn in turns)
        with policy.model.disable_adapter():
            rollout(policy, turns, generator, parallel=parallel, turn_tokens=turn_tokens, context=room)
        return [turn.text for turn in turns]
    return reply


def rollout_by(
    model: Callable, policy: Policy, episodes: list[Episode], generator: torch.Generator, context: int = 2048,
    user: User | None = None, bar: tqdm | None = None, **limits: Any,
) -> list[Trajectory]:
    """Play the episodes with another model, such as one behind an endpoint; return them as the policy's tokens.

    The trajectories hold what the policy would have had to sample to write the same text, with log-probabilities 0.
    An episode whose model fails ends as "model failed" and does not count.
    """
    user = user or own_user(policy, limits["parallel"], limits["turn_tokens"])
    seats = begin(policy, episodes, user, generator)
    end_of_turn = observation_tokens(policy.tokenizer, "")[:1]
    while running := [seat for seat in seats if not seat.over]:
        for seat, seat.text in zip(running, model([seat.episode.messages for seat in running])):
            if seat.text is None:
                seat.episode.reward, seat.episode.status = math.nan, "model failed"
                seat.end()
            else:
                said = policy.tokenizer(defuse(policy.tokenizer, seat.text), add_special_tokens=False).input_ids + end_of_turn
                seat.trajectory.extend(said, True, [0.0] * len(said))
        take_steps(policy, [seat for seat in running if not seat.over], user, generator, context)
        if bar is not None:
            bar.update(sum(seat.over for seat in running))
    return [seat.trajectory for seat in seats]


# ---------------------------------------------------------------------------------------------------
# the KV cache of rollouts (on a first reading go on at "REINFORCE": all of this only saves time and memory)

def fill(policy: Policy, cache: "SlotCache", slots: list[Seat]) -> None:
    """Feed the cache what it lacks of each slot's trajectory, save for the last token, from which the next is sampled.

    Of the rollouts of a task, which share their prompt, one is fed with it; the others get a copy of its part of the cache.
    A pass is bounded in tokens and in columns, rows times columns, of which attention may make copies: a long prompt goes
    in pieces.
    """
    lacking = {slot: seat.trajectory.tokens[seat.fed:-1] for slot, seat in enumerate(slots) if seat.text is None}
    lacking = {slot: tokens for slot, tokens in lacking.items() if tokens}
    fresh, copies = [slot for slot in lacking if slots[slot].fed == 0], {}  # {slot: the slot that it is copied from}
    if fresh:
        sources = {seat.prompt: slot for slot, seat in enumerate(slots) if slot not in fresh}
        for slot in fresh:
            if (source := sources.setdefault(slots[slot].prompt, slot)) != slot:
                copies[slot] = source
    new = {slot: tokens for slot, tokens in lacking.items() if slot not in copies}
    for first in range(0, max(map(len, new.values()), default=0), FEED_TOKENS):
        pieces = [(slot, tokens[first:first + FEED_TOKENS], slots[slot].fed + first) for slot, tokens in new.items() if len(tokens) > first]
        # a token counts for FEED_COLUMNS / FEED_TOKENS columns, so that one bound keeps both
        sizes = [max(start + len(tokens), len(tokens) * FEED_COLUMNS // FEED_TOKENS) for _, tokens, start in pieces]
        for batch in micro_batches(sizes, FEED_COLUMNS):
            advance(policy, cache, *zip(*(pieces[number] for number in sorted(batch))))
    for slot, source in copies.items():
        cache.copy(source, slot, len(lacking[slot]))
    for slot, tokens in lacking.items():
        slots[slot].fed += len(tokens)


def advance(policy: Policy, cache: "SlotCache", slots: Sequence[int], tokens: Sequence[list[int]], starts: Sequence[int]) -> torch.Tensor:
    """Feed some slots tokens, from the columns `starts` of their caches on; return the logits after the last [slots, vocabulary].

    A token's column in the cache is its position, so a slot holds no padding. Shorter rows of the pass are padded on the
    right: what that writes into the cache lies behind all that the slot looks at, until its next tokens overwrite it. The
    last column, where padding ends up at the latest, is never looked at: an episode ends before its last token is fed.
    """
    width = max(map(len, tokens))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=policy.device)  # [rows, width]
    columns = torch.tensor(starts, device=policy.device)[:, None] + torch.arange(width, device=policy.device)  # [rows, width]
    columns = columns.clamp(max=cache.columns - 1)
    ends = torch.tensor([len(row) - 1 for row in tokens], device=policy.device)  # [rows]
    cache.aim(slots, columns, min(max(starts) + width, cache.columns))
    visible = torch.arange(cache.end, device=policy.device) <= columns[:, None, :, None]  # [rows, 1, width, columns]
    model = policy.model.get_base_model()  # with the adapter in it
    states = model.get_decoder()(
        input_ids=ids, attention_mask=visible, position_ids=columns, past_key_values=cache, use_cache=True
    ).last_hidden_state  # [rows, width, hidden]
    return model.get_output_embeddings()(states[torch.arange(len(ends), device=policy.device), ends]).float()


class SlotLayer(DynamicLayer):
    """A layer of a SlotCache: `store` [2, slots, heads, columns, width] holds keys and values, all of it from the first pass on."""

    def __init__(self, cache: "SlotCache"):
        super().__init__()
        self.cache, self.store = weakref.proxy(cache), None  # a cycle would keep the memory until garbage is collected

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states [rows, heads, new columns, width]; return those that the rows may see, [rows, heads, columns, width]."""
        cache = self.cache
        if self.store is None:
            self.store = keys.new_zeros(2, cache.slots, keys.shape[1], cache.columns, keys.shape[3])
        self.store[0][cache.rows[:, None], :, cache.targets] = keys.transpose(1, 2)
        self.store[1][cache.rows[:, None], :, cache.targets] = values.transpose(1, 2)
        keys, values = self.store[:, :, :, :cache.end]
        return (keys, values) if len(cache.rows) == cache.slots else (keys[cache.rows], values[cache.rows])  # a copy for a part only


class SlotCache(DynamicCache):
    """A KV cache of slots, each of which holds an episode: a token's column in it is its position in the trajectory."""

    def __init__(self, config: Any, slots: int, columns: int):
        super().__init__(config=config)
        self.slots, self.columns, self.layers = slots, columns, [SlotLayer(self) for _ in self.layers]

    def aim(self, rows: Sequence[int], targets: torch.Tensor, end: int) -> None:
        """Say where the next pass writes: into the slots `rows`, in ascending order, at the columns `targets`, before `end`."""
        self.rows, self.targets, self.end = torch.tensor(rows, device=targets.device), targets, end

    def copy(self, source: int, slot: int, end: int) -> None:
        """Give a slot the same columns as another one, up to `end`."""
        for layer in self.layers:
            layer.store[:, slot, :, :end] = layer.store[:, source, :, :end]

    def keep(self, slots: list[int]) -> None:
        """Drop all slots but these, in ascending order, which are numbered anew; in place, for want of room for a copy."""
        for slot, source in enumerate(slots):
            if slot != source:
                self.copy(source, slot, self.end)  # of the last pass, which all slots took part in
        self.slots = len(slots)
        for layer in self.layers:
            layer.store = layer.store[:, :self.slots]


# ---------------------------------------------------------------------------------------------------
# REINFORCE with a baseline
#
# The example: K = 8 rollouts of it in step 4. One that succeeds, as tokens with their mask:
#   0  <|system|>You are the executor …<|end|><|user|>Take the amount of tea, …<|end|><|assistant|>
#   1  THOUGHT: look it up END THOUGHT ACTION: x = amount("tea") … print(x) END ACTION<|end|>
#   0  <|user|>Observation: 378<|end|><|assistant|>
#   1  THOUGHT: done END THOUGHT ANSWER: 378 END ANSWER<|end|>
# Two do that. The others guess ("I remember it": x = 7), stop half-way (42), or miscopy 378 as 3878:
#   rewards     0 1 0 0 0 1 0 0
#   advantages  1 - 1/7 = 0.857 for a success, 0 - 2/7 = -0.286 for a failure; their sum is 0
#   loss        of a success: -1/128 * 0.857 * (sum of log pi over the tokens with mask 1), 128 = 16 tasks * 8 rollouts
#   metrics     of the step: "reward": 0.125, "signal": 0.625, "loss": -0.469, "gradient_norm": 0.171, "trained_tokens": 3269

def advantages(rewards: torch.Tensor, baseline: str = "leave-one-out") -> torch.Tensor:
    """Return A_i = r_i - b_i for rewards [tasks, K], K rollouts of each task, in the same shape.

    leave-one-out: b_i is the mean reward of the task's other K-1 rollouts, so A = K/(K-1) (r - mean r)
                   (Kool et al. 2019; RLOO, arXiv 2402.14740). It does not bias the gradient, because b_i
                   does not depend on rollout i. A group whose rewards are all equal has A = 0: no signal.
    none:          b_i = 0, A = r: the paper's rejection fine-tuning, only successes carry gradient.

    NaN is the reward of a rollout that does not count: its A is 0, and it enters no baseline.
    """
    if baseline == "none":
        return rewards.nan_to_num(0.0)
    if baseline != "leave-one-out":
        raise ValueError(f"unknown baseline {baseline!r}: choose leave-one-out or none")
    if rewards.shape[1] < 2:
        raise ValueError("the leave-one-out baseline needs at least two rollouts of each task")
    ### BEGIN SOLUTION
    total, count = rewards.nansum(1, keepdim=True), (~rewards.isnan()).sum(1, keepdim=True)  # [tasks, 1]
    others = (total - rewards) / (count - 1)  # [tasks, K]
    return (rewards - others).nan_to_num(0.0)
    ### END SOLUTION


def signal_share(rewards: torch.Tensor) -> float:
    """Return the share of tasks of which some rollouts succeeded and some failed, for rewards [tasks, K]; the others teach nothing."""
    ### BEGIN SOLUTION
    return ((rewards == 1).any(1) & (rewards == 0).any(1)).float().mean().item()
    ### END SOLUTION


def trajectory_logprobs(policy: Policy, batch: list[Trajectory], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of the agent's tokens [rows, columns-1], 0 elsewhere, and the mask that marks them.

    Column t holds log pi(token t+1 | tokens up to t) under logits / temperature, the transform that sampled. Only the
    agent's tokens have logits computed for them (by `token_logprobs`), because these need the most memory.
    The padding is on the right, where causal attention never sees it, and is told by the agent's mask, never by token
    id: where pad equals the end of turn, a mask by id would keep the end from being learnt.
    """
    ids = pad_sequence([torch.tensor(t.tokens) for t in batch], batch_first=True).to(policy.device)  # [rows, columns]
    mask = pad_sequence([torch.tensor(t.mask) for t in batch], batch_first=True).to(policy.device)  # [rows, columns]
    model = policy.model.get_base_model()  # with the adapter in it
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # [rows, columns, width]
    head = model.get_output_embeddings()  # from states to logits
    ### BEGIN SOLUTION
    agent = mask[:, 1:]
    sampled = token_logprobs(head, states[:, :-1][agent], ids[:, 1:][agent], temperature)
    return sampled.new_zeros(agent.shape).masked_scatter(agent, sampled), agent
    ### END SOLUTION


def token_logprobs(head: Callable, states: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the log-probabilities of `tokens` [n] after `states` [n, width], under head(states) / temperature.

    The logits of all n tokens, of which each has one for every entry of a vocabulary of perhaps 128,000, would need more
    memory than the model. So they are computed for CHUNK_TOKENS tokens at a time, in 32 bits, and again when the gradient
    comes back (`checkpoint`, with use_reentrant=False).
    """
    ### BEGIN SOLUTION
    def logprobs(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = head(states).float() / temperature  # [chunk, vocabulary]
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)

    chunks = zip(states.split(CHUNK_TOKENS), tokens.split(CHUNK_TOKENS))
    return torch.cat([checkpoint(logprobs, *chunk, use_reentrant=False) for chunk in chunks])
    ### END SOLUTION


@contextmanager
def checkpointed(model: torch.nn.Module) -> Iterator[None]:
    """Keep only the input of each layer for the backward pass, and compute the rest again; it would switch off the KV cache."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def micro_batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """Split into batches of indices, sorted by length, each of at most `tokens` tokens with its padding (or one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and lengths[i] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def reinforce_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    trajectories: list[Trajectory],
    advantage: torch.Tensor,
    temperature: float = 1.0,
    micro_batch_tokens: int = 8192,
    max_norm: float = 1.0,
    importance_cap: float | None = None,
) -> dict:
    """Take one step up the gradient of the expected reward; `advantage` [N] belongs to the N trajectories.

    loss = -1/N sum_i A_i sum_t log pi(a_t | history)        (REINFORCE, Williams 1992; eq. 1 of the paper)

    The inner sum runs over the tokens that the agent sampled. N counts all trajectories, those without signal
    (A = 0) included, though no computation is spent on them: the divisor is a constant and the gradient does
    not depend on how the trajectories are split into micro-batches. With `importance_cap` C each token is weighed with
    min(p_trainer / p_sampler, C), for a sampler that computes other probabilities than the trainer (Yao et al. 2025).
    Returns the loss, the norm of the gradient before clipping to `max_norm`, and mismatch_kl, the mean of
    log p_sampler - log p_trainer over the sampled tokens.
    """
    chosen = [i for i, a in enumerate(advantage.tolist()) if a != 0]
    signal = [trajectories[i] for i in chosen]
    total, mismatch, sampled = 0.0, 0.0, 0
    optimizer.zero_grad()
    for rows in micro_batches([len(t.tokens) for t in signal], micro_batch_tokens):
        batch = [signal[row] for row in rows]
        weight = torch.tensor([float(advantage[chosen[row]]) for row in rows], device=policy.device)[:, None]  # [rows, 1]
        with checkpointed(policy.model):
            logprobs, agent = trajectory_logprobs(policy, batch, temperature)  # [rows, columns-1]
            before = pad_sequence([torch.tensor(t.logprobs) for t in batch], batch_first=True).to(policy.device)[:, 1:]
            difference = (before - logprobs.detach()) * agent
            ### BEGIN SOLUTION
            if importance_cap is not None:
                weight = weight * (-difference).exp().clamp(max=importance_cap)
            loss = -(weight * logprobs).sum() / len(trajectories)
            ### END SOLUTION
            loss.backward()
        total += loss.item()
        mismatch += difference.sum().item()
        sampled += int(agent.sum())
    norm = torch.nn.utils.clip_grad_norm_([p for p in policy.model.parameters() if p.requires_grad], max_norm).item()
    optimizer.step()
    return {"loss": total, "gradient_norm": norm, "mismatch_kl": mismatch / max(sampled, 1), "trained_tokens": sampled}


def make_optimizer(policy: Policy, learning_rate: float) -> torch.optim.Optimizer:
    """Adam over the adapter's weights; the 4-bit base is frozen."""
    return torch.optim.Adam([p for p in policy.model.parameters() if p.requires_grad], lr=learning_rate, betas=(0.9, 0.95))


def seeded(device: torch.device | str, *what) -> torch.Generator:
    """Return a random generator that depends on `what` alone, such as a seed, a phase and a step.

    Every step makes its own, so a resumed run draws the same numbers as one that was never interrupted.
    """
    digest = hashlib.sha256(repr(what).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def train(
    policy: Policy, optimizer: torch.optim.Optimizer, jail: Jail, tasks: list[CodeAsTask], options, first: int = 0
) -> Iterator[tuple[dict, list[dict]]]:
    """Train on `tasks`; yield, after each of the steps `first` to options.steps, its metrics and its episodes.

    A step draws options.tasks_per_step tasks, plays options.rollouts episodes of each, and takes one gradient
    step. With options.teacher_endpoint the model there plays them, and the step is one of cross-entropy on all that
    it wrote, failures included: the paper's distillation. What it draws depends on options.seed and the step alone.
    The metrics are a line of metrics.jsonl, the episodes lines of trajectories.jsonl.
    """
    if not tasks:
        raise PolicyError("there are no tasks to train on")
    if options.baseline == "leave-one-out" and options.rollouts < 2:
        raise PolicyError("the leave-one-out baseline needs at least two --rollouts of each task")
    limits = rollout_limits(options)
    teacher = endpoint_model(options.teacher_endpoint, options.teacher_model) if options.teacher_endpoint else None
    roll = partial(rollout_by, teacher) if teacher else rollout
    bar = tqdm(range(first, options.steps), desc="train", unit="step", dynamic_ncols=True)
    for step in bar:
        started = time.monotonic()
        chosen = random.Random(f"tasks {options.seed} {step}").sample(tasks, min(options.tasks_per_step, len(tasks)))
        episodes = [executor(jail, task) for task in chosen for _ in range(options.rollouts)]
        generator = seeded(policy.device, options.seed, "train", step)
        trajectories = roll(policy, episodes, generator, **limits)
        rewards = torch.tensor([t.reward for t in trajectories]).view(len(chosen), options.rollouts)  # [tasks, K]; NaN does not count
        advantage = ((~rewards.isnan()).float() if teacher else advantages(rewards, options.baseline)).flatten()  # [tasks * K]
        figures = reinforce_step(
            policy, optimizer, trajectories, advantage, micro_batch_tokens=options.micro_batch_tokens,
            importance_cap=None if teacher else options.importance_cap)
        if teacher:
            del figures["mismatch_kl"]  # the policy has not sampled these
        reward, signal = rewards.nanmean().nan_to_num(0.0).item(), signal_share(rewards)
        speed = sum(map(sum, (t.mask for t in trajectories))) / (time.monotonic() - started)
        bar.set_postfix(reward=f"{reward:.2f}", signal=f"{signal:.2f}", tokens_per_s=f"{speed:.0f}")
        metrics = {"step": step, "reward": reward, "signal": signal, **figures}
        yield metrics, [record("train", step, episode, t) for episode, t in zip(episodes, trajectories)]


def rollout_limits(options) -> dict:
    """The limits of a rollout among a run's options, and who plays the users."""
    user = endpoint_model(options.user_endpoint, options.user_model) if options.user_endpoint else None
    return {"parallel": options.parallel, "turn_tokens": options.turn_tokens, "context": options.context, "user": user}


def open_benchmarks(options) -> None:
    """Load the benchmarks whose checkouts the options name; raises BenchmarkError if one cannot be used."""
    load_benchmarks(options.m3tooleval, options.tau_bench, options.any_version)


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries on which figures depend."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "bitsandbytes", "peft")}}


def record(phase: str, step: int | None, episode: Episode, trajectory: Trajectory) -> dict:
    """Return an episode as a line of trajectories.jsonl, without the long system message."""
    return {
        "phase": phase,
        "step": step,
        "env": episode.env,
        "seed": episode.seed,
        "instruction": getattr(episode, "task", None) and episode.task.instruction or episode.messages[1]["content"],
        "reward": None if math.isnan(trajectory.reward) else trajectory.reward,  # None: it does not count
        "status": trajectory.status,
        "messages": trajectory.messages[1:],
    }


def read_tasks(path: Path) -> Iterator[CodeAsTask]:
    """Yield the tasks of a file; raises PolicyError that names the line if one cannot be read."""
    for number, line in enumerate(read_lines(path), start=1):
        try:
            yield CodeAsTask.from_json(line)
        except TaskError as error:
            raise PolicyError(f"line {number} of {path} is no task: {error}") from error


def append_lines(path: Path, records: list[dict]) -> None:
    """Append records to a file of JSON lines."""
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in records)


# ---------------------------------------------------------------------------------------------------
# will it fit? The memory of the code above, by arithmetic on a model's shape

SHAPES = {  # of models whose configuration the hub shows to registered users only
    f"meta-llama/Llama-{name}-Instruct": dict(
        model_type="llama", hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=width // heads, vocab_size=128_256, tie_word_embeddings=tied, max_position_embeddings=131_072)
    for name, width, inner, layers, heads, tied in [
        ("3.2-1B", 2048, 8192, 16, 32, True), ("3.2-3B", 3072, 8192, 28, 24, True),
        ("3.1-8B", 4096, 14_336, 32, 32, False), ("3.1-70B", 8192, 28_672, 80, 64, False)]
}
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a weight: 4 bits, 8 for a block of 64, 32 for 256 blocks (QLoRA, section 3)
LAYER_BYTES = 4.8  # a token at the height of a layer's backward pass, for each input and output of its linear maps: measured
LOGIT_BYTES = 16  # a logit, at the height of a chunk's backward pass and of sampling: measured
KEPT_FREE = 1 / 12  # of the GPU's memory, for CUDA itself and for gaps between tensors
RTX_3090 = 936e9, 71e12  # bytes that it reads in a second, and operations in 16 bits, by its data sheet


def shape_of(name: str) -> PreTrainedConfig:
    """Return a model's configuration, without its weights; raises PolicyError if it cannot be had."""
    if name in SHAPES:
        return AutoConfig.for_model(**SHAPES[name])
    try:
        return AutoConfig.from_pretrained(HERE / "tiny" if name == "tiny" else name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PolicyError(f"cannot read the configuration of {name!r}: {reason} (known without it: {', '.join(SHAPES)})") from error


def memory_of(config: PreTrainedConfig, rank: int, tokens: int) -> dict[str, float]:
    """Return the bytes that a model takes on a GPU, by what for, where a trajectory or an episode has so many tokens.

    weights: those of the linear layers in 4 bits, the others in 16; adapter: in 32 bits, with its gradient and Adam's two
    moments; checkpoints: the input of each layer, kept for the backward pass; layer: one of them at the height of that
    pass; logits: the same of one chunk; cache: an episode's keys and values; sampling: an episode's next token; feed: a pass
    that fills caches, with copies of keys and values for all heads, the mask as bytes and as numbers of 16 bits, and some
    states. The two constants are measured, and tests hold the sums against whole models: within a tenth.
    """
    with torch.device("meta"):  # shapes without numbers
        model = AutoModelForCausalLM.from_config(config)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()]
    in_4_bits = sum(module.weight.numel() for module in linear)
    ends = sum(module.in_features + module.out_features for module in linear)
    config = config.get_text_config()  # of a model that can see as well
    depth, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    token = 2 * 2 * groups * (getattr(config, "head_dim", None) or width // heads)  # of a layer's keys and values
    return {
        "weights": in_4_bits * NF4_BYTES + (model.num_parameters() - in_4_bits) * 2,
        "adapter": rank * ends * 16,
        "checkpoints": tokens * depth * width * 2,
        "layer": tokens * ends / depth * LAYER_BYTES,
        "logits": min(tokens, CHUNK_TOKENS) * config.vocab_size * LOGIT_BYTES,
        "cache": tokens * depth * token,
        "sampling": config.vocab_size * LOGIT_BYTES,
        "feed": max(tokens, FEED_COLUMNS) * token * (1 + heads // groups) + FEED_TOKENS * (tokens * 3 + width * 12),
    }


def training_bytes(memory: dict[str, float]) -> float:
    """Return the height of a gradient step: while a layer's inputs are computed again, or before, at the logits."""
    return memory["weights"] + memory["adapter"] + memory["checkpoints"] + max(memory["layer"], memory["logits"])


def rollout_bytes(memory: dict[str, float], parallel: int) -> float:
    """Return the height of rollouts with so many episodes side by side: while caches are filled, or while all sample."""
    return memory["weights"] + memory["adapter"] + parallel * memory["cache"] + max(memory["feed"], parallel * memory["sampling"])


def most_parallel(memory: dict[str, float], room: float) -> int:
    """Return how many episodes can be played side by side in so many bytes."""
    return bisect(range(1, 10**6), room, key=partial(rollout_bytes, memory))


def fit(name: str, gpu_gb: float, rank: int, episodes: int) -> str:
    """Return the table of what fits on a GPU, with the least time of a step of so many `episodes`, and of the paper's rollouts.

    The times are bounds, not forecasts: to sample, the weights and the caches are read once for each token of every
    slot, half of a context being sampled; to train, a token costs 6 operations a weight (forward, forward again, and
    backward to the adapter, whose own gradient is small). The paper plays 800 tasks 15 times each (section 4).
    """
    config, room = shape_of(name), gpu_gb * 2**30 * (1 - KEPT_FREE)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    lines = [f"{name}, LoRA of rank {rank}, on {gpu_gb:g} GB, of which {room / 2**30:.1f} GiB are used",
             f"{'context':>8} {'to train one':>14} {'most of it':>12} {'cache of one':>14} {'side by side':>13} {'a step, at least':>17} {'800 x 15 rollouts':>18}"]
    for context in CONTEXTS:
        memory = memory_of(config, rank, context)
        train, cache = training_bytes(memory), memory["cache"]
        parallel = most_parallel(memory, room)
        rollouts = context / 2 / max(parallel, 1) * (memory["weights"] + parallel * cache / 2) / RTX_3090[0]  # seconds of each
        step = episodes * (rollouts + context * 6 * parameters / RTX_3090[1])
        most = max(("weights", "checkpoints", "layer", "logits"), key=memory.get)
        times = [f"{step / 60:.1f} min", f"{12_000 * rollouts / 3600:.0f} h"] if parallel and train <= room else ["does not fit", "-"]
        lines.append(f"{context:8,} {train / 2**30:10.2f} GiB {most:>12} {cache / 2**30:10.2f} GiB {parallel:13,} {times[0]:>17} {times[1]:>18}")
    note = f"A step: {episodes} episodes (--tasks-per-step x --rollouts), at the speed that the data sheet of an RTX 3090 allows."
    return "\n".join([*lines, f"Weights: {memory['weights'] / 2**30:.2f} GiB. Give --context, --micro-batch-tokens of the same size, and at most so many "
                      f"--parallel as are side by side (fewer where the model itself plays users, who need a cache as well). {note}"])


@contextmanager
def advice_on_memory(model: str) -> Iterator[None]:
    """Turn an allocation that failed into MemoryError with a sentence that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 24
        raise MemoryError(f"the memory does not suffice: lower --parallel, --micro-batch-tokens or --context "
                          f"(python rl.py --fit {model} --gpu-gb {size:.0f} shows what fits)") from error


# ---------------------------------------------------------------------------------------------------
# the command line: training alone, on a file of tasks

def positive(text: str) -> int:
    """Return the whole number of at least 1 that an option gives; raises ValueError for others, which argparse reports."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of loading, rollouts and training; their defaults are those of the embedded model."""
    add = parser.add_argument
    add("--model", default="tiny", help="a model folder or a hub name")
    add("--seed", type=int, default=0, help="determines everything that is random")
    add("--steps", type=int, default=20, help="gradient steps")
    add("--tasks-per-step", type=positive, default=16, help="tasks of a step")
    add("--rollouts", type=positive, default=8, help="K, the rollouts of each task in a step")
    add("--baseline", default="leave-one-out", choices=["leave-one-out", "none"], help="none is the paper's rejection fine-tuning")
    add("--learning-rate", type=float, default=3e-3, help="of Adam; 1e-4 suits an 8B model")
    add("--teacher-endpoint", metavar="URL", help="learn from what the model at this address does, by cross-entropy (distillation)")
    add("--teacher-model", metavar="NAME", help="the model there")
    add("--rank", type=positive, default=8, help="of the LoRA adapter")
    add("--micro-batch-tokens", type=positive, default=8192, help="tokens, padding included, of one pass forward and backward")
    add("--importance-cap", type=float, metavar="C", help="weigh each token with min(p_trainer / p_sampler, C), if the two differ")
    add_rollout_options(parser)


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    """Add the limits of a rollout, and what is to happen where the jail is weak."""
    add = parser.add_argument
    add("--parallel", type=positive, default=192, help="episodes played side by side; fewer need less memory")
    add("--turn-tokens", type=positive, default=176, help="a turn is cut after so many tokens")
    add("--context", type=positive, default=512, help="an episode ends at so many tokens")
    add("--allow-weak-jail", action="store_true", help="run the model's code even where the jail cannot close files and network")
    add_benchmark_options(parser)
    add("--user-endpoint", metavar="URL", help="an OpenAI-compatible address whose model plays the users (its key: OPENAI_API_KEY)")
    add("--user-model", metavar="NAME", help="the model there; without an endpoint the policy's own base plays the users")


def main() -> int:
    """Train on the tasks of a file; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Train a policy on a file of tasks.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tasks", type=Path, help="task lines, such as runs/<name>/tasks.jsonl")
    parser.add_argument("--fit", metavar="MODEL", help="only say which context and how many episodes of a model fit on a GPU")
    parser.add_argument("--gpu-gb", type=float, default=24, help="the memory of that GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/rl"), help="new folder for metrics, trajectories and adapter")
    add_training_options(parser)
    options = parser.parse_args()

    def work() -> None:
        if options.fit:
            print(fit(options.fit, options.gpu_gb, options.rank, options.tasks_per_step * options.rollouts))
            return
        if not options.tasks:
            raise PolicyError("give --tasks FILE to train on, or --fit MODEL to see what fits on a GPU")
        open_benchmarks(options)
        tasks = list(read_tasks(options.tasks))
        with advice_on_memory(options.model):
            policy = load_policy(options.model, rank=options.rank, seed=options.seed)
        options.out.mkdir(parents=True)
        optimizer = make_optimizer(policy, options.learning_rate)
        with Jail(allow_weak=options.allow_weak_jail) as jail, advice_on_memory(options.model):
            print(jail.describe())
            for metrics, episodes in train(policy, optimizer, jail, tasks, options):
                append_lines(options.out / "metrics.jsonl", [metrics])
                append_lines(options.out / "trajectories.jsonl", episodes)
                policy.model.save_pretrained(options.out / "adapter")
        print(f"adapter: {options.out / 'adapter'}")

    return guarded("rl.py", work, lambda: f"what is finished is in {options.out}" if options.out.exists() else "nothing was begun")


if __name__ == "__main__":
    sys.exit(main())
