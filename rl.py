"""The policy: a 4-bit base with a LoRA adapter, batched multi-turn rollouts, REINFORCE with a baseline.

Some words: a policy is the model as one that acts, a rollout is an episode that it plays. The advantage of a rollout
is how much better its reward was than a baseline, that is, than what was to be expected; REINFORCE raises the
log-probability of each sampled token in proportion to it. LoRA freezes the weights and trains small additions to them,
of low rank; NF4 stores a weight in 4 bits, and QLoRA is both. The KV cache keeps what attention needs of earlier
tokens (keys and values), so that only new tokens are computed.

The paper (section 3) trains the executor by REINFORCE with the 0/1 reward and no baseline, which is rejection
fine-tuning (RFT): only the successes carry gradient. What differs here, and why:

* a leave-one-out baseline (Kool et al. 2019; RLOO, arXiv 2402.14740), so that failures teach as well and the gradient
  has less variance. `baseline="none"` is the paper's RFT.
* fresh rollouts at every step (on-policy) instead of 12,000 offline trajectories: at this size they are cheap.
* QLoRA instead of full fine-tuning, and logits in chunks, so that a card of 24 GB can train an 8B model on the paper's
  context of 16,192 tokens: `python rl.py --fit MODEL` says what else fits, before any weights are downloaded.
* the learning rate of Adam is about ten times that of full fine-tuning, as LoRA wants ("LoRA Without Regret", 2025):
  1e-4 for an 8B model, where the paper has 1e-5. The default, 3e-3, is for the embedded model.
* an episode without an ANSWER, cut off at its last step or by the context, is rewarded 0 and not judged, as in
  TauBench; the paper evaluates the final state and answer, and does not say what counts where there is no answer.

What the paper's comparisons by PPO and GRPO add is left out, as in its own REINFORCE: clipped ratios and a KL term,
which one gradient step per batch of rollouts does not need, and division by a group's standard deviation or by a
trajectory's length, which bias the gradient (Dr. GRPO, arXiv 2503.20783).

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
import signal
import sys
import time
import warnings
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # while the libraries load: seconds, in which they may swallow an exception
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted; nothing was begun\n"), os._exit(1)))

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # waiting threads soon sleep: else one busy core slows all five-fold
import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Adam, Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# Warnings that ask nothing of us: of names that change in transformers 5.40, which requirements.txt leaves out (peft,
# too, uses the old ones), and of the ranks of experts' LoRA, which peft says that it ignores, but applies.
warnings.filterwarnings("ignore", message=".*(gradient_checkpointing|past_key_values|(rank|alpha)_pattern keys)")
warnings.filterwarnings("ignore", message="Synchronization debug mode")  # is a prototype: see `recorded`
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it announces optional kernels that we do not need
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less of a GPU's memory is lost in gaps
torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length, and in a rollout each token brings another
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import DynamicCache, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from tools import AGENT_TOKENS, ENVIRONMENTS, STOP, TINY, endpoint_model, load_benchmarks
from tools import make_environment, open_conversation, spoken
from verify import CodeAsTask, FormatError, Jail, Task, TaskError, add_common_options
from verify import guarded, observation, parse_step, read_lines, verdict_on

transformers_logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt when there is no network
MAX_STEPS = 15  # the paper's limit for the executor (section 4)
CHUNK_TOKENS = 512  # whose logits exist at once in training
Speaker = Callable[[list[list[dict]]], list[str | None]]  # from conversations to the next message in each, or None


# ---------------------------------------------------------------------------------------------------
# the policy

class PolicyError(ValueError):
    """A model, a file or an option that cannot be used; the message is one sentence that says what to do."""


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU, in one of its libraries, or on a CPU."""
    told = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sentence in str(error) for sentence in told)


@contextmanager
def in_a_sentence(what: str, advice: str) -> Iterator[None]:
    """Turn what is wrong with a model or a file into PolicyError: what cannot be done, why, and what to do about it."""
    try:
        yield
    except Exception as error:  # whatever its files, or code made for another one, make the libraries raise
        if is_out_of_memory(error):  # see advice_on_memory
            raise
        lines = str(error).strip().split("\n")  # of which some list all models that there are
        reason = " ".join(lines[:1 + lines[0].endswith(":")]).partition(". Please ")[0].strip()[:300]
        raise PolicyError(f"cannot {what}: {reason or type(error).__name__} ({advice})") from error


def load_policy(name: str, adapter: str | Path | None = None, rank: int = 8, seed: int = 0) -> Policy:
    """Load a model from a folder (tiny: the one beside this file) or the hub, as NF4, with an adapter, saved or new.

    `rank` and `seed` are for a new one. Raises PolicyError if the model is missing or broken, if its chat template is
    missing or rewrites earlier turns, if a saved adapter does not fit, or if sampler and trainer would not compute the
    model's own probabilities.
    """
    if (name.startswith((".", "/", "~")) or name.endswith("/")) and not Path(name).is_dir():
        raise PolicyError(f"there is no model folder {name!r}: give a folder, or a name on the hub, such as owner/name")
    path = TINY if name == "tiny" else name
    if Path(path, "adapter_config.json").exists() and not Path(path, "config.json").exists():
        raise PolicyError(f"{name!r} holds an adapter and no model: give it with --adapter")
    advice = "give the folder or hub name of another; a gated one needs its licence accepted there, then: hf auth login"
    with in_a_sentence(f"load the model {name!r}", advice):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise PolicyError(f"the model {name!r} has no chat template: use an instruction-tuned model")
    check_template(tokenizer)  # before gigabytes of weights are downloaded
    with in_a_sentence(f"load the model {name!r}", advice):
        base = load_base(path, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    with in_a_sentence(f"find where the turns of {name!r} end", advice):  # without a vocabulary, for instance
        stops = stop_tokens(base, tokenizer)
    policy = Policy(attach_adapter(base, adapter, rank, seed).train(), tokenizer, stops)
    check_probabilities(policy, name)
    return policy


def load_base(path: str | Path, compute_type: torch.dtype) -> torch.nn.Module:
    """Load a model on a GPU if any; all nn.Linear but the head become NF4, doubly quantised (QLoRA, arXiv 2305.14314).

    Always in training mode, and without dropout or noise: in evaluation mode bitsandbytes swaps in another CPU kernel,
    but sampler and trainer must compute the same probabilities.
    """
    config = AutoConfig.from_pretrained(path)
    for part in (config, config.get_text_config()):
        vars(part).update({name: 0.0 for name in vars(part) if name.endswith(("dropout", "pdrop", "jitter_noise"))})
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=compute_type)
    place = {"": 0 if torch.cuda.is_available() else "cpu"}
    model, loaded = AutoModelForCausalLM.from_pretrained(
        path, config=config, quantization_config=nf4, dtype=compute_type, device_map=place, output_loading_info=True,
        attn_implementation="sdpa")  # which takes our masks
    if loaded["missing_keys"]:  # which would be random
        raise ValueError(f"its weights lack {min(loaded['missing_keys'])}")
    return model.train()


def stop_tokens(base: torch.nn.Module, tokenizer) -> frozenset[int]:
    """Return the tokens that end a turn: the model's, the tokenizer's, and the template's, which may be another.

    The template's counts only if it is a special token, for the agent may write any other within its turn.
    """
    ends = base.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return frozenset(ends | {end_of_turn(tokenizer)[-1]} & special_tokens(tokenizer))


def attach_adapter(base: torch.nn.Module, adapter: str | Path | None, rank: int, seed: int) -> PeftModel:
    """Freeze a base, with LoRA (arXiv 2106.09685) on its linear layers but the head: a folder's adapter, or a new one.

    A new one changes nothing yet; its weights depend on seed and rank. Raises PolicyError if one cannot be attached.
    """
    if adapter is not None:
        files = {file.stem for file in Path(adapter).glob("adapter_*")}
        if Path(adapter).is_dir() and not files >= {"adapter_config", "adapter_model"}:
            raise PolicyError(f"{str(adapter)!r} holds no adapter: give a folder such as runs/NAME/adapter")
        with (in_a_sentence(f"load the adapter {str(adapter)!r}", "give the folder of one trained on this model"),
              warnings.catch_warnings()):
            warnings.filterwarnings("error", message="Found missing adapter keys")  # which would be as new
            model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # see load_base
        return model
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with in_a_sentence("put LoRA on all linear layers of the model", "use another model"):
        return get_peft_model(base, lora)


# ---------------------------------------------------------------------------------------------------
# from messages to tokens: a trajectory is append-only, because decoding and encoding again changes tokens

def defuse(tokenizer, text: str) -> str:
    """Return `text` with a space inside its special tokens: an `<|end|>` that a model has written must end no turn."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in text:
            text = text.replace(token.content, token.content[0] + " " + token.content[1:])
    return text


def prompt_tokens(tokenizer, messages: list[dict], after: str = "") -> list[int]:
    """Return the token ids of the messages, from behind the text `after`, up to where the agent's next turn begins."""
    messages = [{**message, "content": defuse(tokenizer, message["content"])} for message in messages]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text[text.index(after) + len(after):], add_special_tokens=False).input_ids


def observation_tokens(tokenizer, observation: str) -> list[int]:
    """Return the token ids between two turns of the agent: the end of its turn, the observation, its next header."""
    turns = [("user", "?"), ("assistant", "MARKER"), ("user", observation)]  # as in any conversation: check_template
    return prompt_tokens(tokenizer, [{"role": role, "content": content} for role, content in turns], after="MARKER")


def end_of_turn(tokenizer) -> list[int]:
    """Return the tokens with which the chat template ends the agent's turn, such as " </s>": up to a special one."""
    tokens, special = observation_tokens(tokenizer, ""), special_tokens(tokenizer)
    return tokens[:1 + next((n for n, token in enumerate(tokens) if token in special), 0)]


def special_tokens(tokenizer) -> set[int]:
    """Return the tokens that no text stands for."""
    return {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}


# ---------------------------------------------------------------------------------------------------
# episodes and trajectories

class Episode:
    """What a rollout plays: a role in a world, which takes the agent's turns and gives the next observations.

    `messages` begins with the system message and the user's; `rollout` appends every turn, for the reader and another
    `model`. A role says in `answer` what becomes of an ANSWER, and in `max_steps` how many turns it may take. `status`
    is "running", "answered", "out of steps", "out of context", "user failed", "model failed", or a challenger's stage.
    """

    max_steps: int
    reward, steps, status = 0.0, 0, "running"
    asks = False  # whether the agent has just spoken to a simulated user, whose reply goes to `hear`

    def __init__(self, jail: Jail, env: str, seed: int):
        self.jail, self.env, self.seed = jail, env, seed
        self.environment = make_environment(env, seed)
        self.session = jail.session(self.environment, replica=seed)  # which spreads the work over the servers
        self.messages: list[dict] = []

    def act(self, code: str) -> str | None:
        """Run the agent's code in its session; return the next observation, or None at the end of the episode."""
        return observation(self.session.run(code))

    def answer(self, content: str) -> str | None:
        """Take the agent's answer; return the next observation, or None at the end of the episode."""
        raise NotImplementedError

    def step(self, text: str) -> str | None:
        """Take the agent's turn; return the next observation, None at the end, or "" if a user is to speak first."""
        self.steps += 1
        try:
            step = parse_step(text)
            reply = self.act(step.content) if step.kind == "action" else self.answer(step.content)
        except FormatError as reminder:
            reply = str(reminder)
        if reply is None or self.steps < self.max_steps:
            return reply and f"Observation:\n{reply}"
        self.status, self.asks = "out of steps", False
        return None

    def close(self) -> None:
        """End the jailed session, and let go of the world, whose database may have megabytes."""
        self.session.close()
        self.environment = self.session.environment = None


EXECUTOR_PROMPT = """\
You are the executor in the environment {env}.
{summary}

You act by writing Python that calls the tools below; one that refuses raises ToolError. Variables persist from action
to action, and you see only what your code prints. Every reply has this form, with either an action or an answer, never
both:

THOUGHT: what to do next, in a sentence END THOUGHT
ACTION:
print(some_tool("an argument"))
END ACTION

or, when {when}:

THOUGHT: what you know by now, in a sentence END THOUGHT
ANSWER: {answer} END ANSWER

You have at most {steps} replies. Look things up; do not invent ids or values.

Tools:
{documentation}"""


class Executor(Episode):
    """The executor's episode: it gets an instruction, acts, answers, and is rewarded with 0 or 1, by `verdict_on`."""

    max_steps = MAX_STEPS
    when, answer_is = "the task is done", "the final answer alone, a list or dict as JSON; or the word done"

    def __init__(self, jail: Jail, task: Task):
        super().__init__(jail, task.env, task.seed)
        self.task, self.final = task, None  # the final answer
        prompt = EXECUTOR_PROMPT.format(
            env=task.env, summary=self.environment.summary, documentation=self.environment.documentation(),
            when=self.when, answer=self.answer_is, steps=MAX_STEPS)
        self.messages = [{"role": "system", "content": prompt}, {"role": "user", "content": task.instruction}]

    def answer(self, content: Any) -> None:
        """Evaluate the final answer and the state; the episode ends."""
        self.session.close()  # first, so that nothing of the executor's code still runs while it is judged
        self.final = content
        verdict = verdict_on(self.jail, self.task, self.environment, content, replica=self.seed)
        self.reward, self.status = float(verdict.passed), "answered"


def executor(jail: Jail, task: Task) -> Executor:
    """Return the executor's episode of a task, in a conversation where its world has users."""
    return (SupportAgent if ENVIRONMENTS[task.env].has_user else Executor)(jail, task)


@dataclass
class Trajectory:
    """An episode in tokens, for the trainer, and how far it has come; the first three fields have one entry a token."""

    tokens: list[int]  # append-only: the prompt, then the agent's turns and the observations in turn
    mask: list[bool]  # True where the agent sampled the token: only these carry loss
    logprobs: list[float]  # the sampler's log-probability of each sampled token, 0 elsewhere
    episode: Episode | None = None
    over: bool = False
    prompt: tuple[int, ...] = ()  # the tokens of the opening, which the rollouts of a task share
    turn: int = 0  # where in the tokens the agent's turn begins
    fed: int = 0  # tokens that the KV cache holds: while the agent samples, all but the last
    text: str | None = None  # of the agent's turn, from its end until the episode has taken it

    def extend(self, tokens: list[int], sampled: bool, logprobs: list[float] | None = None) -> None:
        """Append tokens, either all sampled by the agent or none."""
        ### BEGIN SOLUTION
        self.tokens += tokens
        self.mask += [sampled] * len(tokens)
        self.logprobs += logprobs if sampled else [0.0] * len(tokens)
        ### END SOLUTION

    def end(self) -> None:
        """Close the episode."""
        self.over = True
        self.episode.close()


# ---------------------------------------------------------------------------------------------------
# rollouts

def rollout(
    policy: Policy, episodes: list[Episode], generator: Generator, temperature: float = 1.0, parallel: int = 256,
    turn_tokens: int = 256, context: int = 2048, user: Speaker | None = None, bar: tqdm | None = None,
    model: Speaker | None = None,
) -> list[Trajectory]:
    """Play the episodes to their ends, `parallel` side by side; return their trajectories in the episodes' order.

    temperature 0 is greedy. A turn is cut after `turn_tokens` and at `context` tokens, where the episode ends. `user`
    speaks for the users of conversations; without one, the policy's base does. Another `model`, such as one behind an
    endpoint, may play in the policy's place; its turns are cut at `context` only. An episode whose prompt leaves no
    room in the context ends at once. Raises PolicyError if that is each of them, or, where the policy itself plays, if
    the context does not fit into its `longest_context`.
    """
    user = user or partial(own_user, policy, generator, parallel, turn_tokens)
    trajectories = begin(policy, episodes, user)
    running = [t for t in trajectories if not t.over]
    if (shortest := min((len(t.prompt) for t in running), default=0)) >= context:
        raise PolicyError(f"a prompt of {shortest:,} tokens leaves no room in --context {context:,}: raise it")
    if cramped := [t for t in running if len(t.prompt) >= context]:
        tqdm.write(f"of {len(running)} prompts {len(cramped)} leave no room in --context {context:,}: "
                   "these episodes end at once, and have failed", file=sys.stderr)
    for t in cramped:
        t.episode.status = "out of context"
        t.end()
    running = [t for t in running if not t.over]
    if bar is not None:
        bar.update(len(trajectories) - len(running))
    turns = (written_turns(policy, running, model, context) if model is not None else
             sampled_turns(policy, running, generator, temperature, parallel, turn_tokens, context))
    for ended in turns:
        take_steps(policy, [t for t in ended if not t.over], user, context)  # over: another model has failed
        if bar is not None:
            bar.update(sum(t.over for t in ended))
    return trajectories


def begin(policy: Policy, episodes: list[Episode], user: Speaker) -> list[Trajectory]:
    """Return the trajectories of episodes that have not begun: their prompts, in which a user may speak first."""
    for episode, first in hear_users(episodes, user).items():  # none in the toy worlds
        if first is not None:
            episode.messages.append({"role": "user", "content": first})
    trajectories = [opened(policy, episode.messages, episode) for episode in episodes]
    for t in trajectories:
        if t.episode.status != "running":  # the user has failed, or wants nothing
            t.end()
    return trajectories


def opened(policy: Policy, messages: list[dict], episode: Episode | None = None) -> Trajectory:
    """Return the trajectory that begins with these messages."""
    prompt = prompt_tokens(policy.tokenizer, messages)
    size = len(prompt)
    return Trajectory(prompt, [False] * size, [0.0] * size, episode, prompt=tuple(prompt), turn=size)


@torch.inference_mode()
def sampled_turns(
    policy: Policy, trajectories: list[Trajectory], generator: Generator, temperature: float, parallel: int,
    turn_tokens: int, context: int,
) -> Iterator[list[Trajectory]]:
    """Sample the agent's turns; yield trajectories whose turns have ended, with their texts, for the episodes to go on.

    Each has a slot of the KV cache from its first turn to its last. All slots sample a token in one pass of the
    network, until half have ended their turns. The code of these then runs side by side while the network rests, so
    none waits for the longest turn, and nothing depends on how fast code was. What is over makes room for others.
    Before it asks for more, the caller has, of each trajectory that it was given, either set `over`, or appended an
    observation, put `turn` behind it, and set `text` to None.
    Raises PolicyError if the context is beyond the model, or its probabilities are no numbers.
    """
    check_context(policy, context)
    slots, queue = trajectories[:parallel], iter(trajectories[parallel:])  # the trajectory in each slot
    cache, ended = SlotCache(len(slots), context), []
    while slots:
        feed(policy, cache, slots)
        logits = decode(policy, cache, slots, turn_tokens)  # [slots, vocabulary]
        # both as floats [2, slots], in one transfer: here a GPU is waited for
        tokens, logprobs = torch.stack(sample_tokens(logits, generator, temperature)).tolist()
        if any(map(math.isnan, logprobs)):
            raise PolicyError("the model's probabilities are no numbers any more: lower --learning-rate")
        for t, token, logprob in zip(slots, map(int, tokens), logprobs):
            if t.text is None:
                t.fed = len(t.tokens)  # the last of them just now
                t.extend([token], True, [logprob])
                if token in policy.stop_ids or len(t.tokens) == min(t.turn + turn_tokens, context):
                    t.text = turn_text(policy, t.tokens[t.turn:])
                    ended.append(t)
        if 2 * len(ended) >= len(slots):
            cache.replay = None  # what `decode` has recorded, for these slots only
            yield ended
            ended.clear()
            slots = [successor(t, queue) if t.over else t for t in slots]
            cache.keep([slot for slot, t in enumerate(slots) if not t.over])
            slots = [t for t in slots if not t.over]


def successor(ended: Trajectory, queue: Iterator[Trajectory]) -> Trajectory:
    """Return the trajectory for the slot of one that is over: the next that waits or, if none does, the same one.

    If it is a rollout of the same task, the cache holds its prompt already.
    """
    following = next(queue, ended)
    if following.prompt == ended.prompt:
        following.fed = len(ended.prompt) - 1
    return following


def sample_tokens(logits: Tensor, generator: Generator, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of `logits` [rows, vocabulary]; return tokens and log-probabilities, both [rows].

    These are of the distribution that was sampled, logits / temperature with no top-k or top-p cut, so that the trainer
    can compute the same number. temperature 0 takes the most likely token, with its log-probability at temperature 1.
    To draw, each token i gets an exponential variable e_i: that p_i / e_i is the largest of all has probability p_i.
    (torch.multinomial does the same, but waits for the GPU.)
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        tokens = logprobs.exp().div_(torch.empty_like(logprobs).exponential_(generator=generator)).argmax(-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def turn_text(policy: Policy, tokens: list[int]) -> str:
    """Return the text of a turn, without the tokens that end it."""
    tokens = [token for token in tokens if token not in policy.stop_ids]
    return policy.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def take_steps(policy: Policy, ended: list[Trajectory], user: Speaker, context: int) -> None:
    """Hand the episodes their agents' turns, side by side, then let the users reply, all at once; all go on, or end."""
    episodes = [t.episode for t in ended]
    for t in ended:
        t.episode.messages.append({"role": "assistant", "content": t.text})
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as workers:
        replies = dict(zip(episodes, workers.map(lambda t: t.episode.step(t.text), ended)))
    replies |= hear_users(episodes, user)
    for t in ended:
        observe(policy, t, replies[t.episode], context)
        t.turn, t.text = len(t.tokens), None


def observe(policy: Policy, t: Trajectory, reply: str | None, context: int) -> None:
    """Append an observation to the trajectory; without one, or without room for it, the episode is over."""
    if reply is not None:
        t.episode.messages.append({"role": "user", "content": reply})
        tokens = observation_tokens(policy.tokenizer, reply)
        if (end := t.tokens[-1]) in policy.stop_ids and end in tokens:  # the agent itself has written its turn's end
            tokens = tokens[tokens.index(end) + 1:]
        if len(t.tokens) + len(tokens) < context:
            t.extend(tokens, False)
            return
        t.episode.status = "out of context"
    t.end()


# ---------------------------------------------------------------------------------------------------
# conversations, and other models: the toy worlds have neither (for a second reading)

class SupportAgent(Executor):
    """The executor in a world with a user: only the user knows the instruction, and an ANSWER is a message to the user.

    It ends when the user stops or the agent hands over to a human; the final answer is the list of what was said.
    """

    when = "you want to say something to the customer"
    answer_is = "your message; when all is settled, the customer ends it"

    def __init__(self, jail: Jail, task: Task):
        super().__init__(jail, task)
        del self.messages[1]  # the instruction
        self.conversation, self.said, self.asks = open_conversation(task.instruction), [], True

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
            self.reward, self.status = math.nan, "user failed"  # which is no fault of the agent's: it does not count
            return None
        self.conversation.append({"role": "assistant", "content": message})
        message = spoken(message)
        return self.end() if message == STOP else f"Customer:\n{message}"

    def end(self) -> None:
        """Evaluate the state and what was said; the episode ends."""
        super().answer(self.said)


def hear_users(episodes: list[Episode], user: Speaker) -> dict[Episode, str | None]:
    """Let the users of the episodes that ask speak, all at once; return what these observe, None at their end."""
    asking = [episode for episode in episodes if episode.asks]
    messages = user([episode.conversation for episode in asking]) if asking else []
    return {episode: episode.hear(message) for episode, message in zip(asking, messages)}


def own_user(
    policy: Policy, generator: Generator, parallel: int, turn_tokens: int, conversations: list[list[dict]]
) -> list[str]:
    """Return what users say, played by the policy's base: without the adapter, so that training does not matter.

    Raises PolicyError if a conversation, with room for a turn, is beyond the model's `longest_context`.
    """
    turns = [opened(policy, conversation) for conversation in conversations]
    context = turn_tokens + max(len(t.prompt) for t in turns)
    with policy.model.disable_adapter():
        for ended in sampled_turns(policy, turns, generator, 1.0, parallel, turn_tokens, context):
            for t in ended:
                t.over = True
    return [t.text for t in turns]


def written_turns(
    policy: Policy, trajectories: list[Trajectory], model: Speaker, context: int
) -> Iterator[list[Trajectory]]:
    """Let another model write the agent's turns; yield the trajectories with the texts, for the episodes to go on.

    Their tokens are those that the policy would have had to sample to write the same, with log-probabilities 0. An
    episode whose model fails ends as "model failed" and does not count. Raises PolicyError if all of them do.
    """
    tokenizer = policy.tokenizer
    while running := [t for t in trajectories if not t.over]:
        for t, text in zip(running, model([t.episode.messages for t in running])):
            if text is None:
                t.episode.reward, t.episode.status = math.nan, "model failed"
                t.end()
            else:
                said = tokenizer(defuse(tokenizer, text), add_special_tokens=False).input_ids + end_of_turn(tokenizer)
                kept = said[:context - len(t.tokens)]
                t.text = text if kept == said else turn_text(policy, kept)
                t.extend(kept, True, [0.0] * len(kept))
        yield running
    if trajectories and all(t.episode.status == "model failed" for t in trajectories):
        raise PolicyError("the other model failed in every episode: is its endpoint up?")


# ---------------------------------------------------------------------------------------------------
# the KV cache of rollouts, which only saves time and memory, and what a model must be like (for a second reading)

FEED_COLUMNS = 8192  # rows x columns of the cache in a pass that feeds it: attention may copy them
FEED_TOKENS = 512  # rows x new tokens in such a pass


class SlotCache(DynamicCache):
    """A KV cache of slots, each of which holds an episode: a token's column in it is its position in the trajectory.

    What the next pass of the network feeds, and where it writes, is set by `aim`.
    """

    def __init__(self, slots: int, columns: int):
        super().__init__()
        self.slots, self.columns = slots, columns
        self.stores: dict[int, list[Tensor]] = {}  # of each layer keys and values [slots, heads, columns, size]
        self.replay: Callable[[], Tensor] | None = None  # the pass that `decode` has recorded

    def aim(
        self, device: torch.device, slots: Sequence[int], tokens: Sequence[list[int]], starts: Sequence[int]
    ) -> None:
        """Say where the next pass writes: into the slots `rows`, at the columns `targets`. See `advance`."""
        width = max(map(len, tokens))
        columns = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)  # [rows, width]
        self.ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=device)  # [rows, width]
        self.last = torch.tensor([len(row) - 1 for row in tokens], device=device)  # [rows], in each row
        self.rows = torch.tensor(slots, device=device)  # [rows]
        self.targets = columns.clamp(max=self.columns - 1)  # [rows, width]
        together = slots[-1] - slots[0] + 1 == len(slots)
        self.part = slice(slots[0], slots[-1] + 1) if together else self.rows  # a view, or a copy
        self.end = min(max(starts) + width, self.columns)  # the first column that no row looks at
        self.replay = None  # it was recorded on the tensors that were here before

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write states [rows, heads, width, size]; return all up to `end` [rows, heads, columns, size]."""
        if layer not in self.stores:  # in the first pass
            self.stores[layer] = [new.new_zeros(self.slots, new.shape[1], self.columns, new.shape[3])
                                  for new in (keys, values)]  # of which widths may differ
        for store, new in zip(self.stores[layer], (keys, values)):
            store[self.rows[:, None], :, self.targets] = new.transpose(1, 2)
        return tuple(store[self.part, :, :self.end] for store in self.stores[layer])

    def copy(self, source: int, slot: int, end: int) -> None:
        """Give a slot the same columns as another one, up to `end`."""
        for store in chain(*self.stores.values()):
            store[slot, :, :end] = store[source, :, :end]

    def keep(self, slots: list[int]) -> None:
        """Keep these slots only, in ascending order, and number them anew; in place, for want of room for a copy."""
        for slot, source in enumerate(slots):
            if slot != source:
                self.copy(source, slot, self.end)  # of the last pass, which all slots took part in
        self.slots = len(slots)
        self.stores = {layer: [store[:self.slots] for store in stores] for layer, stores in self.stores.items()}


def feed(policy: Policy, cache: SlotCache, slots: list[Trajectory]) -> None:
    """Feed the cache what it lacks of each slot's trajectory, save for the last token, from which the next is sampled.

    Of rollouts that share a prompt one is fed with it; the others get a copy of its part of the cache. A pass is
    bounded in tokens, and in rows times columns, of which attention may make copies: a long prompt goes in pieces.
    """
    lacking = {slot: t.tokens[t.fed:-1] for slot, t in enumerate(slots) if len(t.tokens) > t.fed + 1}
    if not lacking:
        return
    holders = {t.prompt: slot for slot, t in enumerate(slots) if t.fed}  # of prompts that the cache holds, or will soon
    sources = {}  # of each slot's tokens: the slot itself, which is fed with them, or the one to copy from
    for slot in lacking:
        sources[slot] = slot if slots[slot].fed else holders.setdefault(slots[slot].prompt, slot)
    new = {slot: tokens for slot, tokens in lacking.items() if sources[slot] == slot}
    for first in range(0, max(map(len, new.values()), default=0), FEED_TOKENS):
        pieces = [(slot, tokens[first:first + FEED_TOKENS], slots[slot].fed + first)
                  for slot, tokens in new.items() if len(tokens) > first]
        # in columns; a token counts for at least FEED_COLUMNS / FEED_TOKENS, so that one bound keeps both
        sizes = [max(start + len(tokens), len(tokens) * FEED_COLUMNS // FEED_TOKENS) for _, tokens, start in pieces]
        for batch in micro_batches(sizes, FEED_COLUMNS):
            advance(policy, cache, *zip(*(pieces[number] for number in sorted(batch))))
    for slot, tokens in lacking.items():
        if sources[slot] != slot:
            cache.copy(sources[slot], slot, len(tokens))
        slots[slot].fed += len(tokens)


def advance(
    policy: Policy, cache: SlotCache, slots: Sequence[int], tokens: Sequence[list[int]], starts: Sequence[int]
) -> Tensor:
    """Feed slots, in ascending order, with tokens from columns `starts` on; return the last logits [slots, vocabulary].

    A token's column in the cache is its position, so a slot holds no padding. Shorter rows of the pass are padded on
    the right: what that writes into the cache lies behind all that the slot looks at, until its next tokens overwrite
    it. The last column, where padding ends up at the latest, is looked at only by a turn that was cut there, in vain.
    """
    cache.aim(policy.device, slots, tokens, starts)
    return next_logits(policy, cache)


def next_logits(policy: Policy, cache: SlotCache) -> Tensor:
    """Do the pass that the cache has been aimed at; return the logits [rows, vocabulary] of the next tokens."""
    columns = torch.arange(cache.end, device=policy.device)  # [columns]
    visible = columns <= cache.targets[:, None, :, None]  # [rows, 1, width, columns]
    model = policy.model.get_base_model()  # with the adapter in it
    states = model.get_decoder()(
        input_ids=cache.ids, attention_mask=visible, position_ids=cache.targets, past_key_values=cache, use_cache=True
    ).last_hidden_state  # [rows, width, hidden]
    states = states[torch.arange(len(cache.last), device=policy.device), cache.last]  # [rows, hidden]
    return model.get_output_embeddings()(states).float()


def decode(policy: Policy, cache: SlotCache, slots: list[Trajectory], turn_tokens: int) -> Tensor:
    """Feed each slot its trajectory's last token, in vain where a turn has ended; return logits [slots, vocabulary].

    Python takes longer to ask a GPU for such a pass, of some thousand operations, than the GPU to do it. So there it is
    recorded once, and played again until the slots change; attention then reaches as far as the turns may, from their
    first token on.
    """
    tokens, starts = [t.tokens[-1:] for t in slots], [t.fed for t in slots]
    if policy.device.type != "cuda":
        return advance(policy, cache, range(len(slots)), tokens, starts)
    if cache.replay is None:
        cache.aim(policy.device, range(len(slots)), tokens, starts)
        cache.end = min(max(t.turn for t in slots) + turn_tokens, cache.columns)
        cache.replay = recorded(partial(next_logits, policy, cache))
    else:  # into the tensors that it was recorded on
        cache.ids.copy_(torch.tensor(tokens))
        cache.targets.copy_(torch.tensor(starts)[:, None])
    return cache.replay()


def recorded(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return what does some work again, on the same tensors, into the same result: a CUDA graph of it, or the work.

    It is done without recording first, which loads its kernels and shows whether it waits for the GPU, as where a model
    chooses its experts in Python: then it cannot be recorded. PyTorch tells of nearly all such waiting.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return work
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def longest_context(config: PreTrainedConfig) -> float:
    """Return how many tokens a model's positions and attention reach; infinity if there is no limit.

    The cache of rollouts does not imitate a sliding window, and in a longer pass "longrope" changes all positions.
    """
    config = config.get_text_config()
    positions = getattr(config, "rope_parameters", None) or {}
    kinds = [positions, *(kind for kind in positions.values() if isinstance(kind, dict))]  # one, or one a kind of layer
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    limits += [getattr(config, name, None)
               for name in ("max_position_embeddings", "sliding_window", "attention_chunk_size")]
    return min(filter(None, limits), default=math.inf)


def check_context(policy: Policy, context: int) -> None:
    """Raise PolicyError if the context is beyond the model's `longest_context`."""
    if (limit := longest_context(policy.model.config)) < context:
        raise PolicyError(f"the model's positions or its window of attention end at {limit:,} tokens: lower --context")


def check_template(tokenizer) -> None:
    """Raise PolicyError unless conversations only grow, by what the agent wrote: some templates drop old thoughts.

    And unless they show the system message, which holds the tools and the format. Thoughts are tried in the project's
    own format and in three others, in turns of some length.
    """
    marks = ("THOUGHT:", "END THOUGHT"), ("<think>", "</think>"), ("<thought>", "</thought>"), ("[THINK]", "[/THINK]")
    turns = [f"{begin}\n{'why ' * 50}{end}\n\nTURN" for begin, end in marks]
    talk = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "U"}]
    for turn in turns:
        talk += [{"role": "assistant", "content": turn}, {"role": "user", "content": "U"}]
    with in_a_sentence("put a system message and turns into the model's chat template", "use another model"):
        texts = [tokenizer.apply_chat_template(talk[:size], tokenize=False, add_generation_prompt=True)
                 for size in range(2, len(talk) + 1, 2)]  # of a conversation that grows by one turn at a time
    for before, after, turn in zip(texts, texts[1:], turns):
        if not after.startswith(before) or not after[len(before):].lstrip().startswith(turn):
            raise PolicyError("the chat template rewrites earlier turns, or writes into them: use another model")
    if "SYSTEM" not in texts[0]:
        raise PolicyError("the chat template leaves the system message out: use another model")


@torch.inference_mode()
def check_probabilities(policy: Policy, name: str) -> None:
    """Raise PolicyError unless sampler and trainer compute the model's own probabilities.

    Both take its logits for those of one linear layer (Cohere's are scaled), and the cache takes its past for keys and
    values (that of a state-space model is another). Two slots are tried, one of them two tokens behind.
    """
    model, ids, states = policy.model.get_base_model(), list(range(2, 26)), []
    with in_a_sentence(f"play with the architecture of {name!r}", "use another model"):
        with checkpointed(policy.model):  # which a gradient step needs
            pass
        hook = model.get_decoder().register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
        logits = model(input_ids=torch.tensor([ids], device=policy.device), use_cache=False).logits  # [1, 24, all]
        hook.remove()
        cache = SlotCache(2, len(ids))
        for first, last in [(0, 9), (9, 12)]:  # a prompt and an observation
            begin = max(first - 2, 0)
            advance(policy, cache, (0, 1), [ids[first:last], ids[begin:last - 2]], [first, begin])
        for last in (13, 14):  # two sampled tokens, because a GPU plays the pass of the first one again
            slots = [Trajectory(ids[:end], [], [], turn=end, fed=end - 1) for end in (last, last - 2)]
            sampled = decode(policy, cache, slots, turn_tokens=9)
    if not logits.isfinite().all():
        raise PolicyError(f"the probabilities of the model {name!r} are no numbers: use another model or adapter")
    if not torch.equal(model.get_output_embeddings()(states[0]), logits):
        raise PolicyError(f"the model {name!r} does more to its logits than one linear layer: use another")
    ours, own = sampled.log_softmax(-1), logits[0, [13, 11]].float().log_softmax(-1)  # [2, vocabulary]
    if not (own.exp() * (own - ours)).sum(-1).max() < 0.05:  # KL; rounding in 16 bits is a tenth of that
        raise PolicyError(f"the model {name!r} computes other probabilities with a cache of its past: use another")


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
#   metrics     of the step: reward 0.125, signal 0.625, loss -0.469, gradient_norm 0.171, trained_tokens 3269

def advantages(rewards: Tensor, baseline: str = "leave-one-out") -> Tensor:
    """Return A_i = r_i - b_i for rewards [tasks, K], K rollouts of each task, in the same shape.

    leave-one-out: b_i is the mean reward of the task's other K-1 rollouts, so A = K/(K-1) (r - mean r). As b_i does not
                   depend on rollout i, the gradient stays unbiased. Where all rewards are equal, A = 0: no signal.
    none:          b_i = 0, A = r: the paper's rejection fine-tuning, only successes carry gradient.

    NaN is the reward of a rollout that does not count: its A is 0, and it enters no baseline. Where there are no others
    that count, A is 0 as well. Raises ValueError for an unknown baseline, and for K < 2 with leave-one-out.
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


def signal_share(rewards: Tensor) -> float:
    """Return the share of all tasks in rewards [tasks, K] with both a success, exactly 1, and a failure, exactly 0.

    With a baseline only they teach. NaN, the reward of a rollout that does not count, is neither, nor is any other.
    """
    ### BEGIN SOLUTION
    return ((rewards == 1).any(1) & (rewards == 0).any(1)).float().mean().item()
    ### END SOLUTION


def trajectory_logprobs(policy: Policy, batch: list[Trajectory], temperature: float) -> tuple[Tensor, Tensor]:
    """Return the agent's tokens' log-probabilities [rows, columns-1], in 32 bits, 0 elsewhere, and the mask of them.

    They have a gradient, even if there are no such tokens.

    Column t holds log pi(token t+1 | tokens up to t) under logits / temperature, the transform that sampled. Only the
    agent's tokens have logits computed for them (by `token_logprobs`), because these need the most memory.
    The padding is on the right, where causal attention never sees it, and is told by the agent's mask, never by token
    id: where pad equals the end of turn, a mask by id would keep the end from being learnt.
    """
    ids = padded([t.tokens for t in batch], policy.device)  # [rows, columns]
    mask = padded([t.mask for t in batch], policy.device)  # [rows, columns]
    model = policy.model.get_base_model()  # with the adapter in it
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # [rows, columns, hidden]
    head = model.get_output_embeddings()  # from states to logits
    ### BEGIN SOLUTION
    agent = mask[:, 1:]  # [rows, columns-1]
    sampled = token_logprobs(head, states[:, :-1][agent], ids[:, 1:][agent], temperature)  # [n]
    return sampled.new_zeros(agent.shape).masked_scatter(agent, sampled), agent
    ### END SOLUTION


def padded(rows: list[list], device: torch.device) -> Tensor:
    """Return lists of numbers as a tensor [rows, columns], in which 0, or False, follows the shorter ones."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def token_logprobs(head: Callable, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of `tokens` [n] after `states` [n, hidden], under head(states) / temperature.

    n may be 0: then the result is empty, and has a gradient all the same. The logits of all n tokens, each with perhaps
    128,000, would need more memory than the model. So they are computed for CHUNK_TOKENS tokens at a time, by the head
    in the states' own type, then in 32 bits, and again when the gradient comes back (`checkpoint`, with
    use_reentrant=False).
    """
    ### BEGIN SOLUTION
    def logprobs(states: Tensor, tokens: Tensor) -> Tensor:
        logits = head(states).float() / temperature  # [chunk, vocabulary]
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)

    chunks = zip(states.split(CHUNK_TOKENS), tokens.split(CHUNK_TOKENS))
    return torch.cat([checkpoint(logprobs, *chunk, use_reentrant=False) for chunk in chunks])
    ### END SOLUTION


@contextmanager
def checkpointed(model: torch.nn.Module) -> Iterator[None]:
    """Keep each layer's input only, and compute the rest again for the gradient; it would switch off the KV cache."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def micro_batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """Split into batches of indices, sorted by length, each of at most `tokens` tokens with padding (or one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and lengths[i] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def reinforce_step(
    policy: Policy, optimizer: Optimizer, trajectories: list[Trajectory], advantage: Tensor, temperature: float = 1.0,
    micro_batch_tokens: int = 8192, max_norm: float = 1.0, importance_cap: float | None = None,
) -> dict:
    """Take one step up the gradient of the expected reward; `advantage` [N] belongs to the N trajectories.

    loss = -1/N sum_i A_i sum_t log pi(a_t | history)    (REINFORCE, Williams 1992; equation 2 of the paper, with R_i)

    The inner sum runs over the tokens that the agent sampled. N counts all trajectories, also those without signal
    (A = 0), on which no computation is spent (but one is scored if there are no others): so the gradient does not
    depend on how they are split into micro-batches.
    With `importance_cap` C each token is weighed with min(p_trainer / p_sampler, C), for a sampler that computes other
    probabilities than the trainer (Yao et al. 2025). Returns "loss", "gradient_norm" before clipping to `max_norm`,
    "trained_tokens", and "mismatch_kl", the mean of log p_sampler - log p_trainer over the tokens that were scored,
    None if there are none. Raises PolicyError if the gradient is not finite.
    """
    teaching = [(t, a) for t, a in zip(trajectories, advantage.tolist()) if a != 0]
    scored = teaching or [(t, 0.0) for t in trajectories if any(t.mask)][:1]  # for mismatch_kl at least
    total, mismatch, sampled = 0.0, 0.0, 0
    optimizer.zero_grad()
    for rows in micro_batches([len(t.tokens) for t, _ in scored], micro_batch_tokens):
        batch = [scored[row][0] for row in rows]
        weight = torch.tensor([scored[row][1] for row in rows], device=policy.device)[:, None]  # [rows, 1]
        with checkpointed(policy.model):
            logprobs, agent = trajectory_logprobs(policy, batch, temperature)  # [rows, columns-1]
            sampler = padded([t.logprobs for t in batch], policy.device)[:, 1:]  # [rows, columns-1]
            # log p_sampler - log p_trainer [rows, columns-1], which is read again below, as `agent` is
            log_ratio = (sampler - logprobs.detach()) * agent
            ### BEGIN SOLUTION
            if importance_cap is not None:
                weight = weight * (-log_ratio).exp().clamp(max=importance_cap)
            loss = -(weight * logprobs).sum() / len(trajectories)
            ### END SOLUTION
            loss.backward()
        total += loss.item()
        mismatch += log_ratio.sum().item()
        sampled += int(agent.sum())
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_norm).item()
    if not math.isfinite(norm):  # or it would be saved over the last good weights
        raise PolicyError("the gradient is no number any more: lower --learning-rate")
    if teaching:  # or Adam's momentum would go on without a gradient
        optimizer.step()
    return {"loss": total, "gradient_norm": norm, "mismatch_kl": mismatch / sampled if sampled else None,
            "trained_tokens": sampled if teaching else 0}


def make_optimizer(policy: Policy, learning_rate: float) -> Optimizer:
    """Return Adam over the adapter's weights; the 4-bit base is frozen."""
    return Adam([p for p in policy.model.parameters() if p.requires_grad], lr=learning_rate, betas=(0.9, 0.95))


def seeded(device: torch.device | str, *what) -> Generator:
    """Return a generator that depends on `what` alone, a seed, a phase and a step: so a resumed run draws the same."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def train(
    policy: Policy, optimizer: Optimizer, jail: Jail, tasks: list[CodeAsTask], options, first: int = 0
) -> Iterator[tuple[dict, list[dict]]]:
    """Train on `tasks`; yield, after each of the steps `first` to options.steps - 1, its metrics and its `record`s.

    A step draws options.tasks_per_step tasks, plays options.rollouts episodes of each, and takes one gradient step.
    With options.teacher_endpoint the model there plays them, and the step is one of cross-entropy on all that it wrote,
    failures included: the paper's distillation (equation 3). What is drawn depends on options.seed and the step alone.
    Raises PolicyError if there are no tasks, or if the context is beyond the model.
    """
    if not tasks:
        raise PolicyError("there are no tasks to train on")
    check_context(policy, options.context)  # also where a teacher plays
    limits, teacher = rollout_limits(options), None
    if options.teacher_endpoint:
        teacher = endpoint_model(options.teacher_endpoint, options.teacher_model, AGENT_TOKENS)
    bar = tqdm(range(first, options.steps), desc="train", unit="step", dynamic_ncols=True)
    for step in bar:
        started = time.monotonic()
        draw = random.Random(f"tasks {options.seed} {step}")
        chosen = draw.sample(tasks, min(options.tasks_per_step, len(tasks)))
        episodes = [executor(jail, task) for task in chosen for _ in range(options.rollouts)]
        generator = seeded(policy.device, options.seed, "train", step)
        trajectories = rollout(policy, episodes, generator, model=teacher, **limits)
        rewards = torch.tensor([episode.reward for episode in episodes]).view(len(chosen), -1)  # [tasks, K]; or NaN
        advantage = (~rewards.isnan()).float() if teacher else advantages(rewards, options.baseline)  # [tasks, K]
        figures = reinforce_step(
            policy, optimizer, trajectories, advantage.flatten(), micro_batch_tokens=options.micro_batch_tokens,
            importance_cap=None if teacher else options.importance_cap)
        policy.model.zero_grad()  # rollouts need the gradient's memory
        if teacher:
            del figures["mismatch_kl"]  # the policy has not sampled these
        reward, signal = rewards.nanmean().nan_to_num(0.0).item(), signal_share(rewards)
        speed = sum(sum(t.mask) for t in trajectories) / (time.monotonic() - started)
        bar.set_postfix(reward=f"{reward:.2f}", signal=f"{signal:.2f}", tokens_per_s=f"{speed:.0f}")
        metrics = {"step": step, "reward": reward, "signal": signal, **figures}
        yield metrics, [record("train", step, episode) for episode in episodes]


# ---------------------------------------------------------------------------------------------------
# what the scripts share: limits, options that agree, files, versions (for a second reading)

def rollout_limits(options) -> dict:
    """The limits of a rollout among a run's options, and who plays the users."""
    user = endpoint_model(options.user_endpoint, options.user_model) if options.user_endpoint else None
    return {"parallel": options.parallel, "turn_tokens": options.turn_tokens, "context": options.context, "user": user}


def prepare(options) -> None:
    """Load the benchmarks that the options name; raises ValueError if one cannot be used, or options do not agree."""
    baseline = None if getattr(options, "teacher_endpoint", None) else getattr(options, "baseline", None)
    if baseline == "leave-one-out" and options.rollouts < 2:
        raise ValueError("the leave-one-out baseline needs at least two --rollouts of each task")
    for role in ("user", "teacher", "challenger"):
        address, model = (getattr(options, f"{role}_{part}", None) for part in ("endpoint", "model"))
        if bool(address) != bool(model):
            raise ValueError(f"--{role}-endpoint and --{role}-model go together: give both, or none")
    load_benchmarks(options.m3tooleval, options.tau_bench, options.any_version)


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the adapter in peft's format, which `PeftModel` and --adapter load; raises PolicyError if it cannot be."""
    with in_a_sentence(f"save the adapter to {str(folder)!r}", "is the disk full?"):
        policy.model.save_pretrained(folder)


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries on which figures depend."""
    libraries = ("torch", "transformers", "bitsandbytes", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def record(phase: str, step: int | None, episode: Episode) -> dict:
    """Return an episode that is over as a line of trajectories.jsonl, without the long system message.

    `step` is that of training, or the number of the first of the attempts that were played with it, or None.
    """
    task = getattr(episode, "task", None)  # which a challenger does not have
    instruction = task.instruction if task else episode.messages[1]["content"]
    reward = None if math.isnan(episode.reward) else episode.reward  # None: it does not count
    return {"phase": phase, "step": step, "env": episode.env, "seed": episode.seed, "instruction": instruction,
            "reward": reward, "status": episode.status, "tools": dict(episode.session.called),
            "messages": episode.messages[1:]}


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
# will it fit? The memory of the code above, by arithmetic on a model's shape (for a second reading)

SHAPES = {  # of models whose configuration is gated: widths, layers, heads, whether the embeddings are the head as well
    "meta-llama/Llama-3.2-1B-Instruct": (2048, 8192, 16, 32, True),
    "meta-llama/Llama-3.2-3B-Instruct": (3072, 8192, 28, 24, True),
    "meta-llama/Llama-3.1-8B-Instruct": (4096, 14_336, 32, 32, False),
    "meta-llama/Llama-3.1-70B-Instruct": (8192, 28_672, 80, 64, False),
}
CONTEXTS = (2048, 4096, 8192, 16_192)  # of the table; the last is the paper's
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a weight: 4 bits, 8 for a block of 64, 32 for 256 blocks (QLoRA)
LAYER_BYTES = 4.8  # measured: a token in a layer's backward pass, for each input and output of its linear maps
LOGIT_BYTES = 16  # measured: a logit, at the peak of a chunk's backward pass and of sampling
KEPT_FREE = 1 / 12  # of the GPU's memory, for CUDA itself and for gaps between tensors
RTX_3090 = 936e9, 71e12  # bytes that it reads in a second, and operations in 16 bits, by its data sheet
REACHED = 0.12, 0.24  # measured: of the same two of an H200 (4.8e12, 989e12), for an 8B model and 16 slots


def shape_of(name: str) -> PreTrainedConfig:
    """Return a model's configuration, without its weights; raises PolicyError if it cannot be had."""
    if name in SHAPES:
        width, inner, layers, heads, tied = SHAPES[name]
        return AutoConfig.for_model(
            "llama", hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, head_dim=width // heads, vocab_size=128_256, tie_word_embeddings=tied,
            max_position_embeddings=131_072)
    with in_a_sentence(f"read the configuration of {name!r}", f"known without it: {', '.join(SHAPES)}"):
        return AutoConfig.from_pretrained(TINY if name == "tiny" else name)


def memory_of(config: PreTrainedConfig, rank: int, tokens: int) -> dict[str, float]:
    """Return {purpose: bytes} of a model on a GPU, for a trajectory or an episode of so many tokens.

    Tests hold the sums against whole models: within a tenth; where experts hold most of the weights it may be a third
    too little. "parameters" is a number of weights. A layer's keys and values are taken to be of one width (those of
    DeepSeek-V3 are not).
    """
    with torch.device("meta"):  # shapes without numbers
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    parameters, head = model.num_parameters(), model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    # bitsandbytes leaves subclasses of Linear, such as Falcon's, in 16 bits
    in_4_bits = sum(module.weight.numel() for module in linear if type(module) is torch.nn.Linear)
    ends = sum(module.in_features + module.out_features for module in linear)
    with torch.device("meta"):  # only now, because it replaces the linear modules
        trained = attach_adapter(model, None, rank, seed=0).get_nb_trainable_parameters()[0]
    config = config.get_text_config()  # of a model that can see as well
    depth, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    layers = [(getattr(layer, "num_key_value_heads", None) or heads, getattr(layer, "head_dim", None) or width // heads)
              for layer in config.per_layer_config]
    cached = [2 * 2 * groups * size for groups, size in layers]  # of a token's keys and values, in each layer
    for_heads = max(token * (1 + heads // groups) for token, (groups, _) in zip(cached, layers))
    copies = max(tokens, FEED_COLUMNS) * for_heads  # of keys and values, for all heads
    return {
        "parameters": parameters,
        "weights": in_4_bits * NF4_BYTES + (parameters - in_4_bits) * 2,  # the others in 16 bits
        "adapter": trained * 16,  # in 32 bits, with its gradient and Adam's two moments
        "checkpoints": tokens * depth * width * 2,  # the input of each layer, kept for the backward pass
        "layer": tokens * ends / depth * LAYER_BYTES,  # at the peak of its backward pass
        "logits": min(tokens, CHUNK_TOKENS) * config.vocab_size * LOGIT_BYTES,  # of a chunk, at the same peak
        "cache": tokens * sum(cached),  # the keys and values of an episode
        "sampling": config.vocab_size * LOGIT_BYTES,  # an episode's next token
        "feed": copies + FEED_TOKENS * (tokens * 3 + width * 12),  # a pass that fills caches, with its mask and states
    }


def training_bytes(memory: dict[str, float]) -> float:
    """Return the peak of a gradient step: while a layer's inputs are computed again, or before, at the logits."""
    return memory["weights"] + memory["adapter"] + memory["checkpoints"] + max(memory["layer"], memory["logits"])


def rollout_bytes(memory: dict[str, float], parallel: int) -> float:
    """Return the peak of so many rollouts side by side: while caches are filled, or while all sample."""
    caches = parallel * memory["cache"]
    adapter = memory["adapter"] * 3 / 4  # without its gradient
    return memory["weights"] + adapter + caches + max(memory["feed"], parallel * memory["sampling"])


def most_parallel(memory: dict[str, float], room: float) -> int:
    """Return how many episodes can be played side by side in so many bytes."""
    return bisect(range(1, 10**6), room, key=partial(rollout_bytes, memory))  # how many fit


def fit(name: str, gpu_gb: float, rank: int, episodes: int) -> str:
    """Return the table of what fits on a GPU, with a `fit_row` for each of CONTEXTS, and how to read it."""
    if not 0 < gpu_gb < math.inf:
        raise PolicyError("--gpu-gb must be the memory of a GPU, such as 24")
    config, room = shape_of(name), gpu_gb * 2**30 * (1 - KEPT_FREE)
    with in_a_sentence(f"predict the memory of {name!r}", "its architecture is not one that can be played"):
        memories = {context: memory_of(config, rank, context) for context in CONTEXTS}
    rows = [("context", "to train one", "most of it", "cache of one", "side by side", "a step", "800 x 15 rollouts")]
    rows += [fit_row(config, context, memory, room, episodes) for context, memory in memories.items()]
    advice = f"""\
Give --context, --micro-batch-tokens of the same size, and at most so many
--parallel as are side by side (half of them if the model itself plays users, too). A step:
{episodes} episodes (--tasks-per-step x --rollouts) on an RTX 3090, from as fast as its data sheet allows
to where it reaches no more of that than an H200 did of its own."""
    if all(row[-2] == "beyond the model" for row in rows[1:]):
        advice = f"Its own context is shorter than {CONTEXTS[0]:,} tokens."
    elif all(row[-1] == "-" for row in rows[1:]):
        advice = "Nothing fits: take a smaller model, or a GPU with more memory."
    return "\n".join([
        f"{name}, LoRA of rank {rank}, on {gpu_gb:g} GB, of which {room / 2**30:.1f} GiB are used",
        *("{:>8} {:>13} {:>12} {:>13} {:>13} {:>16} {:>18}".format(*row) for row in rows),
        f"The weights take {memories[CONTEXTS[0]]['weights'] / 2**30:.2f} GiB. {advice}"])


def fit_row(
    config: PreTrainedConfig, context: int, memory: dict[str, float], room: float, episodes: int
) -> tuple[str, ...]:
    """Return the row of a context: what fits into so many bytes, and the times of a step and of the paper's work.

    To sample, the weights and the caches are read once for each token of every slot, half of a context being sampled;
    to train, a token costs 6 operations a weight (forward, forward again, and backward to the adapter, whose own
    gradient is small). The paper plays 800 tasks 15 times each (section 4). Each time is a range: from what the data
    sheet allows to what it takes where only the shares of it in REACHED are reached.
    """
    train, cache, parallel = training_bytes(memory), memory["cache"], most_parallel(memory, room)
    most = max(("weights", "adapter", "checkpoints", "layer", "logits"), key=memory.get)

    def sampling(slots: int) -> float:  # seconds of an episode, of which so many are side by side
        read = memory["weights"] + slots * cache / 2  # for a token of every slot
        return context / 2 / max(slots, 1) * read / RTX_3090[0]

    training = context * 6 * memory["parameters"] / RTX_3090[1]
    shares = (1, 1), REACHED
    step = [episodes * (sampling(min(parallel, episodes)) / of_reading + training / of_computing) / 60
            for of_reading, of_computing in shares]
    paper = [12_000 * sampling(parallel) / of_reading / 3600 for of_reading, _ in shares]
    times = "{:.1f} to {:.1f} min".format(*step), "{:.1f} to {:.1f} h".format(*paper)
    if context > longest_context(config):
        times = "beyond the model", "-"
    elif not parallel or train > room:
        times = "does not fit", "-"
    return f"{context:,}", f"{train / 2**30:.2f} GiB", most, f"{cache / 2**30:.2f} GiB", f"{parallel:,}", *times


@contextmanager
def advice_on_memory(model: str) -> Iterator[None]:
    """Turn an allocation that failed into MemoryError with a sentence that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 24
        advice = f"(python rl.py --fit {model} --gpu-gb {size:.0f} shows what fits)"
        raise MemoryError("the memory does not suffice: lower --parallel, or --micro-batch-tokens in training, or "
                          f"begin anew with a lower --context {advice}") from error


# ---------------------------------------------------------------------------------------------------
# the command line: training alone, on a file of tasks (for a second reading)

def whole(text: str, least: int) -> int:
    """Return the whole number that an option gives; argparse tells the user what it raises for anything else."""
    if not text.isdecimal() or not least <= int(text) <= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to 2**32")
    return int(text)


natural, positive = partial(whole, least=0), partial(whole, least=1)


def above_zero(text: str) -> float:
    """Return the number that an option gives, in the same way."""
    if not 0 < (number := float(text)) < 1e30:  # more does not fit into a tensor
        raise argparse.ArgumentTypeError("it must be above 0, and below 1e30")
    return number


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """What --help prints: with the defaults of the options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of loading, rollouts and training; their defaults are those of the embedded model."""
    add = parser.add_argument_group("the policy and its training").add_argument
    add("--model", default="tiny", help="a model folder or a hub name")
    add("--seed", type=natural, default=0, help="determines, with --parallel, all that is random")
    add("--steps", type=natural, default=20, help="gradient steps")
    add("--tasks-per-step", type=positive, default=16, help="tasks of a step")
    add("--rollouts", type=positive, default=8, help="K, the rollouts of each task in a step")
    add("--baseline", default="leave-one-out", choices=["leave-one-out", "none"], help="none: rejection fine-tuning")
    add("--learning-rate", type=above_zero, default=3e-3, help="of Adam; 1e-4 suits an 8B model")
    add("--teacher-endpoint", metavar="URL", help="learn from what the model there does (distillation)")
    add("--teacher-model", metavar="NAME", help="the model there")
    add("--rank", type=positive, default=8, help="of the LoRA adapter")
    add("--micro-batch-tokens", type=positive, default=8192, help="tokens, padded, of one pass forward and backward")
    add("--importance-cap", type=above_zero, metavar="C", help="weigh each token with min(p_trainer / p_sampler, C)")
    add_rollout_options(parser)


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    """Add the limits of a rollout, who plays users, and the options of all scripts."""
    add = parser.add_argument_group("rollouts").add_argument
    add("--parallel", type=positive, default=192, help="episodes played side by side; fewer need less memory")
    add("--turn-tokens", type=positive, default=176, help="a turn is cut after so many tokens")
    add("--context", type=positive, default=512, help="an episode ends at so many tokens")
    add("--user-endpoint", metavar="URL", help="an OpenAI-compatible API whose model plays users (key: OPENAI_API_KEY)")
    add("--user-model", metavar="NAME", help="the model there; without an endpoint the policy's base plays the users")
    add_common_options(parser)


def main() -> int:
    """Train on the tasks of a file; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Train a policy on a file of tasks.", allow_abbrev=False, formatter_class=Help)
    add = parser.add_argument
    add("--tasks", type=Path, help="task lines, such as runs/<name>/tasks.jsonl")
    add("--fit", metavar="MODEL", help="only say which context and how many episodes of a model fit on a GPU")
    add("--gpu-gb", type=float, default=24, help="the memory of that GPU")
    add("--out", type=Path, default=Path("runs/rl"), help="new folder for metrics, trajectories and adapter")
    add("--adapter", metavar="FOLDER", help="go on with this adapter")
    add_training_options(parser)
    options = parser.parse_args()
    out = options.out
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "fit", "gpu_gb")}

    def work() -> None:
        if options.fit:
            print(fit(options.fit, options.gpu_gb, options.rank, options.tasks_per_step * options.rollouts))
            return
        if not options.tasks:
            raise PolicyError("give --tasks FILE to train on, or --fit MODEL to see what fits on a GPU")
        prepare(options)
        tasks = list(read_tasks(options.tasks))
        if out.exists():
            raise PolicyError(f"{out} exists already: choose another --out, so that nothing is overwritten")
        out.mkdir(parents=True)  # whether it can be made should be known before a step is played
        out.rmdir()
        with Jail(allow_weak=options.allow_weak_jail) as jail, advice_on_memory(options.model):
            print(jail.describe())
            policy = load_policy(options.model, options.adapter, options.rank, options.seed)
            optimizer = make_optimizer(policy, options.learning_rate)
            for metrics, episodes in train(policy, optimizer, jail, tasks, options):
                if metrics["step"] == 0:
                    out.mkdir(parents=True)  # only now is there something to keep
                (out / "config.json").write_text(json.dumps(settings, indent=1, default=str))
                append_lines(out / "metrics.jsonl", [metrics])
                append_lines(out / "trajectories.jsonl", episodes)
                save_adapter(policy, out / "adapter")
        print(f"adapter: {out / 'adapter'}; for a report: python eval.py --report {out}" if out.exists() else
              "no step was taken, so nothing was written")

    def how_to_go_on() -> str:
        if not out.exists():
            return "nothing was begun"
        if not (out / "adapter").exists():
            return f"no step was finished; what there is of the first is in {out}: delete it to begin anew"
        return f"what is finished is in {out}: go on from there with --adapter {out / 'adapter'} and another --out"

    return guarded("rl.py", work, how_to_go_on)


if __name__ == "__main__":
    sys.exit(main())
