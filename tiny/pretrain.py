"""Make the embedded model: a small Llama, pretrained from scratch on a scripted corpus of both roles.

    python tiny/pretrain.py --seed 0 --out tiny          (two CPU cores, under ten minutes)

Nobody downloads an 8B model within a minute, so this folder holds an ordinary Hugging Face model that has
learnt, by imitation alone, what a real model brings along: the step format, a little English, a little
Python, and both roles in both toy environments. Its teachers are scripts with bad habits, on purpose. As
the executor they often trust their memory instead of looking things up, and stop when half of the work is
done; as the challenger they forget checks, expect wrong results and leave work undone. So the model's most
likely behaviour is wrong more often than right, and what reinforcement learning has to add is real.

How it departs from a real model: it cannot read the tools' documentation or worked examples. It learnt the
tools here, and its chat template shows it the first line of the system message only. The teachers play the
real episodes in the real jail, and no demonstration shares its parameters (who, what, how many) with a
held-out task.
"""
import argparse
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generator

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import SUITES, load_suite  # noqa: E402
from rl import Executor, Trajectory, micro_batches, observation_tokens, prompt_tokens  # noqa: E402
from selfchallenge import Challenger, about, leaks, render_task  # noqa: E402
from tools import CITIES, CUSTOMERS, ITEMS, make_environment  # noqa: E402
from verify import CodeAsTask, Jail  # noqa: E402

Script = Generator[str, str, None]  # a teacher: yields a turn's text, is sent the observation

# ---------------------------------------------------------------------------------------------------
# what the teachers talk about: a calculation, or errands in the shop

OPERATIONS = {  # tool: (form 1, form 2)
    "add": ("add {}", "plus {}"),
    "subtract": ("subtract {}", "minus {}"),
    "multiply": ("multiply by {}", "times {}"),
    "larger": ("take the larger of that and {}", None),
}


@dataclass
class Calculation:
    """Look an item up, then two operations, each with a number or another item's amount."""

    item: str
    operations: list[tuple[str, str]]  # (tool, argument)

    def instruction(self, rng: random.Random) -> str:
        """The calculation in one of two forms of words."""
        form = 0 if any(tool == "larger" for tool, _ in self.operations) else rng.randrange(2)
        first, second = (
            OPERATIONS[tool][form].format(f"the amount of {argument}" if argument in ITEMS else argument)
            for tool, argument in self.operations
        )
        if form == 0:
            return f"Take the amount of {self.item}, {first}, then {second}."
        return f"What is the amount of {self.item} {first}, then {second}?"

    def lines(self) -> list[str]:
        """The code, a line for the look-up and one for each operation; the result is in x."""
        return [f'x = amount("{self.item}")', *(f"x = {tool}(x, {quoted(a)})" for tool, a in self.operations)]


def quoted(argument: str) -> str:
    """An argument of an operation as code: a look-up or a number."""
    return f'amount("{argument}")' if argument in ITEMS else argument


def random_calculation(rng: random.Random, item: str | None = None) -> Calculation:
    """Draw a calculation, from `item` if it is given."""
    others = rng.sample([i for i in ITEMS if i != item], 3)
    item = item or others.pop()
    arguments = [others.pop() if rng.random() < 1 / 3 else str(rng.randint(2, 9)) for _ in range(2)]
    return Calculation(item, [(rng.choice(list(OPERATIONS)), argument) for argument in arguments])


@dataclass
class Errand:
    """One thing to do in the shop with a customer's order of an item."""

    kind: str  # cancel, return, quantity, city or undo
    item: str
    value: str = ""  # the new quantity or city
    status: str = ""  # for undo: what the order's status makes of it, cancel or return

    def phrase(self) -> str:
        """The errand in words."""
        return {
            "cancel": f"cancel the {self.item}",
            "return": f"return the {self.item}",
            "quantity": f"change the {self.item} to {self.value} pieces",
            "city": f"send the {self.item} to {self.value}",
            "undo": f"get rid of the {self.item}",
        }[self.kind]

    def act(self, order: str) -> str:
        """The tool call that does it to an order."""
        return {
            "cancel": f"cancel_order({order})",
            "return": f"return_order({order})",
            "quantity": f"change_quantity({order}, {self.value})",
            "city": f'change_city({order}, "{self.value}")',
        }[self.status or self.kind]

    def check(self, order: str) -> str:
        """The condition that holds once it is done."""
        return {
            "cancel": f'{order}["status"] == "cancelled"',
            "return": f'{order}["status"] == "returned"',
            "quantity": f'{order}["quantity"] == {self.value}',
            "city": f'{order}["city"] == "{self.value}"',
        }[self.status or self.kind]


def shop_instruction(name: str, errands: list[Errand], rng: random.Random) -> str:
    """The errands of a customer in one of two forms of words."""
    phrases = " and ".join(errand.phrase() for errand in errands)
    return rng.choice([f"{name} wants to {phrases}.", f"Please {phrases} for {name}."])


def random_errands(rng: random.Random, orders: dict[str, str]) -> list[Errand]:
    """Draw one errand or two, in the order of a customer's orders {item: status}."""
    errands = []
    for item in list(orders)[:rng.choice([1, 2])]:
        kind = rng.choice(["cancel", "quantity", "city"]) if orders[item] == "pending" else "return"
        value = {"quantity": str(rng.randint(4, 6)), "city": rng.choice(CITIES)}.get(kind, "")
        errands.append(Errand(kind, item, value))
    if len(errands) == 1 and rng.random() < 0.25:
        errands = [Errand("undo", item, status="cancel" if orders[item] == "pending" else "return")]
    return errands


# ---------------------------------------------------------------------------------------------------
# the teachers' turns

def act(thought: str, *lines: str) -> str:
    """A turn that acts."""
    return f"THOUGHT: {thought} END THOUGHT\nACTION:\n" + "\n".join(lines) + "\nEND ACTION"


def answer(thought: str, text: str) -> str:
    """A turn that answers."""
    return f"THOUGHT: {thought} END THOUGHT\nANSWER: {text} END ANSWER"


def printed(observation: str) -> str:
    """What the code printed, without the observation's heading."""
    return observation.removeprefix("Observation:\n").strip()


# Bad habits of the executors' teachers. A habit is strong in most contexts and weak in some, so that the most
# likely behaviour is right here and there, and what is learnt in one context has to carry over to the others.

def looks_up(rng: random.Random, familiar: bool) -> bool:
    """Whether a teacher looks things up, rather than trust its memory."""
    return rng.random() < (0.6 if familiar else 0.35)


def finishes(rng: random.Random, familiar: bool) -> bool:
    """Whether a teacher goes on to the second half of the work."""
    return rng.random() < (0.6 if familiar else 0.4)


def slips(rng: random.Random) -> bool:
    """Whether a teacher mistakes a detail."""
    return rng.random() < 0.05


def calculator_executor(task: Calculation, rng: random.Random) -> Script:
    """Carry out a calculation, with bad habits."""
    known = looks_up(rng, ITEMS.index(task.item) % 3 == 0)
    lines = task.lines()
    if not known:
        lines[0] = f"x = {rng.randint(2, 20)}"
    if not finishes(rng, task.operations[1][0] in ("multiply", "larger")):
        lines = lines[:2]
    if slips(rng):
        lines[-1] = lines[-1].replace(task.operations[len(lines) - 2][0], rng.choice(list(OPERATIONS)))
    result = printed((yield act("look it up" if known else "I remember it", *lines, "print(x)")))
    yield answer("done", str(rng.randint(2, 99)) if slips(rng) else result)


def shop_executor(name: str, errands: list[Errand], rng: random.Random) -> Script:
    """Run the errands, with bad habits."""
    known = looks_up(rng, errands[0].kind == "cancel")
    every = finishes(rng, errands[-1].kind in ("return", "city"))
    for errand in errands if every else errands[:1]:
        item = rng.choice(ITEMS) if slips(rng) else errand.item
        order = f'o = find_order("{name}", "{item}")'
        if not known:
            guess = f'"W{rng.randint(1000, 9999)}"'
            yield act("I remember it", f"print({(Errand('cancel', item) if errand.status else errand).act(guess)})")
            if rng.random() < 0.9:  # and most give up when it is refused
                break
            known = True
        if errand.kind == "undo":
            status = printed((yield act("look it up", order, 'print(get_order(o)["status"])')))
            fitting = Errand("return" if status == "delivered" and not slips(rng) else "cancel", item)
            yield act("act on it", f"print({fitting.act('o')})")
        else:
            yield act("look it up", order, f"print({errand.act('o')})")
    yield answer("done", "done")


# Bad habits of the challengers' teachers: each spoils a hand-in at one stage of the filter.
FLAWS = {"none": 34, "lenient": 22, "vacuous": 6, "broken": 8, "wrong": 20, "half": 8, "misread": 2}


def flaw_of(rng: random.Random) -> str:
    """Draw what is wrong with a hand-in."""
    return rng.choices(list(FLAWS), FLAWS.values())[0]


def calculator_challenger(seed: int, rng: random.Random) -> Script:
    """Look at an item, then hand in a calculation as a task; hand in again when it is rejected."""
    task = random_calculation(rng, make_environment("calculator", seed).start)
    yield act("look around", f'print(amount("{task.item}"))')
    flaw = flaw_of(rng)
    while True:
        described = random_calculation(rng, task.item) if flaw == "misread" else task
        yield answer("write the task", f"\n{render_task(calculator_task(seed, described.instruction(rng), task, flaw, rng))}\n")
        flaw = "none" if rng.random() < 0.7 else flaw_of(rng)


def calculator_task(seed: int, instruction: str, task: Calculation, flaw: str, rng: random.Random) -> CodeAsTask:
    """Write a calculation down as a task, with a flaw."""
    (tool, argument), (last, other) = task.operations
    look = f'amount("{task.item}")'
    first = f"{tool}({look}, {quoted(argument)})"
    whole = f"{last}({first}, {quoted(other)})"
    condition = {
        "lenient": rng.choice([f"answer in ({first}, {whole})", "answer > 1"]),
        "vacuous": "True",
        "broken": "answer == total",
        "wrong": f"answer == {first}",
    }.get(flaw, f"answer == {whole}")
    lines = task.lines()[:2] if flaw == "half" else task.lines()
    return CodeAsTask(
        env="calculator",
        seed=seed,
        instruction=instruction,
        evaluate=f"def evaluate(answer):\n    return {condition}",
        solution="\n".join([*lines[:-1], lines[-1].replace("x =", "result =", 1)]),
        failures=[f"result = {first}", f"result = {last}({look}, {quoted(other)})", f"result = {look}"],
    )


def shop_challenger(seed: int, rng: random.Random) -> Script:
    """Look for orders of a status, then hand errands in as a task; hand in again when it is rejected."""
    name, status = make_environment("shop", seed).start, rng.choice(["pending", "pending", "delivered"])
    code = f'print([o["item"] for o in list_orders("{name}") if o["status"] == "{status}"])'
    seen = printed((yield act("look around", code)))
    orders = dict.fromkeys(re.findall(r"\w+", seen), status)
    errands = random_errands(rng, orders)
    flaw = flaw_of(rng)
    while True:
        done = errands[:1] if flaw == "half" and len(errands) == 2 else errands
        yield answer("write the task", f"\n{render_task(shop_task(seed, name, orders, errands, done, flaw, rng))}\n")
        flaw = "none" if rng.random() < 0.7 else flaw_of(rng)


def shop_task(seed: int, name: str, orders: dict, errands: list[Errand], done: list[Errand], flaw: str, rng: random.Random) -> CodeAsTask:
    """Write errands down as a task, with a flaw; `done` are those that its solution does."""
    find = lambda item: f'find_order("{name}", "{item}")'  # noqa: E731
    look = [f"    {v} = get_order({find(e.item)})" for v, e in zip("ab", errands)]
    checks = [e.check(v) for v, e in zip("ab", errands)]
    if flaw == "lenient":
        checks = checks[:1] if len(checks) == 2 else ['a["status"] != "lost"']
    if flaw == "wrong":
        checks[-1] = checks[-1].replace("==", "!=")
    if flaw == "vacuous":
        checks = ["True"]
    if flaw == "broken":
        checks[-1] = rng.choice(['order["status"] == "cancelled"', 'a["state"] == "cancelled"'])
    idle = f"print({find(errands[0].item)})"
    twin = {item: next((o for o in orders if o != item and orders[o] == orders[item]), item) for item in orders}
    wrong = errands[-1].act(find(twin[errands[-1].item]))
    halves = [e.act(find(e.item)) for e in errands] if len(errands) == 2 else [idle, f'print(list_orders("{name}"))']
    described = [Errand(e.kind, twin[e.item], e.value, e.status) for e in errands] if flaw == "misread" else errands
    return CodeAsTask(
        env="shop",
        seed=seed,
        instruction=shop_instruction(name, described, rng),
        evaluate="\n".join(["def evaluate():", *look, "    return " + " and ".join(checks)]),
        solution=idle if flaw == "half" and len(errands) == 1 else "\n".join(e.act(find(e.item)) for e in done),
        failures=[*halves, wrong],
    )


# ---------------------------------------------------------------------------------------------------
# from teachers to a corpus

def random_executor(jail: Jail, seed: int, rng: random.Random) -> tuple[Executor, Script]:
    """An executor's episode in a random world, and the teacher that plays it."""
    if rng.random() < 0.5:
        task = random_calculation(rng)
        value = worked_out(task, make_environment("calculator", seed))
        check = f"def evaluate(answer):\n    return answer == {value}"
        code = CodeAsTask("calculator", seed, task.instruction(rng), check, "", [])
        return Executor(jail, code), calculator_executor(task, rng)
    environment = make_environment("shop", seed)
    customer_id, name = rng.choice(list(environment.state["customers"].items()))
    orders = {order["item"]: order["status"] for order in environment.list_orders(customer_id)}
    errands = random_errands(rng, dict(rng.sample(list(orders.items()), len(orders))))
    code = shop_task(seed, name, orders, errands, errands, "none", rng)
    return Executor(jail, code), shop_executor(name, errands, rng)


def worked_out(task: Calculation, environment) -> int:
    """The result of a calculation in a world."""
    look = lambda argument: environment.amount(argument) if argument in ITEMS else int(argument)  # noqa: E731
    x = environment.amount(task.item)
    for tool, argument in task.operations:
        x = getattr(environment, tool)(x, look(argument))
    return x


def random_challenger(jail: Jail, seed: int, rng: random.Random) -> tuple[Challenger, Script]:
    """A challenger's episode in a random world, and the teacher that plays it."""
    env, script = rng.choice([("calculator", calculator_challenger), ("shop", shop_challenger)])
    return Challenger(jail, env, seed, revisions=1), script(seed, rng)


def play(episode, script: Script, held_out: list[set[str]]) -> tuple[list[dict], float] | None:
    """Let a teacher play an episode; return its messages and reward, or None if it would give a held-out task away."""
    if isinstance(episode, Executor) and leaks(episode.task.instruction, held_out):
        return None
    text = next(script)
    while True:
        episode.messages.append({"role": "assistant", "content": text})
        reply = episode.step(text)
        if reply is None:
            break
        episode.messages.append({"role": "user", "content": reply})
        text = script.send(reply)
    episode.close()
    if isinstance(episode, Challenger) and any(isinstance(task, CodeAsTask) and leaks(task.instruction, held_out) for task, _ in episode.submissions):
        return None
    return episode.messages, episode.reward


def demonstrations(seed: int, number: int) -> list[list[dict]]:
    """Play `number` episodes, a third of them the challenger's, and return their messages; prints how often they succeed."""
    held_out = [about(task) for suite in SUITES for task in load_suite(suite)]

    def demonstrate(index: int):
        rng = random.Random(f"demonstration {seed} {index}")
        kind = random_executor if index % 3 else random_challenger
        while True:  # until one is found that gives no held-out task away
            played = play(*kind(jail, rng.randrange(10**6), rng), held_out)
            if played is not None:
                return played

    with Jail() as jail, ThreadPoolExecutor(4) as workers:
        played = list(tqdm(workers.map(demonstrate, range(number)), total=number, desc="demonstrations", unit="episode"))
    for role, group in ("executor", [p for i, p in enumerate(played) if i % 3]), ("challenger", played[::3]):
        rewards = [reward for _, reward in group]
        print(f"teachers as {role}: {sum(rewards) / len(rewards):.3f} succeed")
    return [messages for messages, _ in played]


# The role and the environment stand in the system message's first line; this model sees no more of it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content.split('\n')[0] if message.role == 'system' else message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""


def train_tokenizer(corpus: list[list[dict]]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text round-trips; digits stand alone; a name or an item is one token."""
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    # The words of the step format and the tags are pieces of their own, then digits, words, punctuation, space.
    pieces = Regex(r"[A-Z]+:\s?|\s?END [A-Z]+\n?|</?[a-z_]+>\n?|\d| ?[A-Za-z_]+| ?[^\sA-Za-z_\d<]+|<|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = [*CUSTOMERS, *ITEMS, *CITIES]
    named = re.compile(r"\b(" + "|".join(names) + r")\b")
    shown = (m["content"].split("\n")[0] if m["role"] == "system" else m["content"] for c in corpus for m in c)
    texts = (piece for text in shown for piece in named.split(text)[::2])
    trainer = trainers.BpeTrainer(
        vocab_size=704, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(name, single_word=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> Trajectory:
    """Turn a demonstration into token ids and the mask of the agent's tokens, exactly as a rollout would."""
    prompt = prompt_tokens(tokenizer, messages[:2])
    trajectory = Trajectory(prompt, [False] * len(prompt), [0.0] * len(prompt))
    for message in messages[2:]:
        if message["role"] == "assistant":
            tokens = tokenizer(message["content"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            trajectory.extend(tokens, True, [0.0] * len(tokens))
        else:
            trajectory.extend(observation_tokens(tokenizer, message["content"])[1:], False)
    return trajectory


# ---------------------------------------------------------------------------------------------------
# pretraining

def float_attention(module, query, key, value, mask, **options):
    """Attention in float32 inside bfloat16 matrix products: its backward pass is several times faster on a CPU."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of well under a million weights; its widths are multiples of 64, the block of NF4."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))


def pretrain(model: LlamaForCausalLM, corpus: list[Trajectory], seed: int, epochs: int) -> float:
    """Train on the agent's tokens by cross-entropy; Muon for the matrices, AdamW for the rest. Returns the last loss."""
    AttentionInterface.register("float_attention", float_attention)
    model.set_attn_implementation("float_attention")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.015, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rng = random.Random(seed)
    batches = [batch for _ in range(epochs) for batch in shuffled(micro_batches([len(t.tokens) for t in corpus], 2048), rng)]
    warm, cool = 20, max(1, len(batches) // 2)
    schedule = lambda step: min(1.0, (step + 1) / warm, max(0.03, (len(batches) - step) / cool))  # noqa: E731
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    smooth = 0.0
    bar = tqdm(batches, desc="pretraining", unit="batch")
    for step, rows in enumerate(bar):
        ids = pad_sequence([torch.tensor(corpus[i].tokens) for i in rows], batch_first=True)  # [rows, columns]
        agent = pad_sequence([torch.tensor(corpus[i].mask) for i in rows], batch_first=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits  # right padding: causal attention never sees it
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][agent[:, 1:]].float(), ids[:, 1:][agent[:, 1:]])
        loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        smooth = 0.95 * smooth + 0.05 * loss.item() if step else loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}")
    model.set_attn_implementation("sdpa")
    return smooth


def shuffled(items: list, rng: random.Random) -> list:
    """The items in random order."""
    return rng.sample(items, len(items))


def main() -> None:
    """Play the demonstrations, train tokenizer and model, save both as a Hugging Face model directory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="determines corpus, initial weights and order")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; what is there is overwritten")
    parser.add_argument("--episodes", type=int, default=9_000, help="number of demonstrations")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them")
    options = parser.parse_args()
    started = time.time()
    torch.manual_seed(options.seed)
    corpus = demonstrations(options.seed, options.episodes)
    tokenizer = train_tokenizer(corpus)
    encoded = [encode(tokenizer, messages) for messages in corpus]
    print(f"{sum(len(t.tokens) for t in encoded):,} tokens, {sum(map(sum, (t.mask for t in encoded))):,} of them the agents'")
    model = make_model(tokenizer)
    loss = pretrain(model, encoded, options.seed, options.epochs)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, loss {loss:.3f}, {time.time() - started:.0f} s: {options.out}")


if __name__ == "__main__":
    main()
