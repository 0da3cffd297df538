"""Measure the demo model on held-out conversations, by skill, and that every way to ask answers the same.

`python -m tools.eval_demo MODEL.gguf [--items N] [--ways N] [--training FILE] [--answers FILE] [--out FILE]`
`python -m tools.eval_demo --compare ANSWERS ANSWERS [--out FILE]`

Greedy, 16 conversations at a time. --items counts conversations a skill, --ways those of each skill that are
also asked alone, and of a real server with stream=true and stream=false, one and 16 at a time. --out holds
all figures, with what --training (train_demo's training.json) says of how the model came to be; --answers
keeps every answer for --compare, which counts the equal ones of two devices and adds them to --out. Files are
JSON. Exit status: 0 when all goals are reached, 1 otherwise.

What held out means, by skill; a hash of the item decides, and training never sees such an item:

- arithmetic, compare: the pair of operands, in either order, as digits, as words, in a story or in JSON;
- counting, spelling, reversing: the range, the list or the word, in every phrasing;
- json: the keys, all but "answer", and the words; a sum or a capital as in arithmetic and facts;
- repeat, memory: the words and the names; unknown: the whole request;
- facts, identity, small_talk: the words of the question. The facts themselves are learned from others, as
  what was never said cannot be known. An answer counts only when it is, word for word, this question's own;
- tool_calls: the name of the tool, the names of its arguments, and their values, each of them unseen as such,
  except true and false and the choices of a well-known tool, such as days, which its schema lists. Half of
  the tools are for purposes that training knows under other names, half are made up. Some requests fit no
  declared tool or lack their arguments; the right answer then says so or asks;
- tool_results: a call as above, and the words of the result; the answer must tell every value.

Earlier turns of a held-out conversation, and system prompts, are as in training.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from jaxmoe import LLM, EngineConfig, SamplingParams
from tools.client import Ask, Client
from tools.demo_corpus import SKILL_NAMES, Conversation, make_conversation
from tools.demo_items import Check
from tools.demo_rows import Renderer, pack
from tools.demo_vocabulary import vocabulary_of
from tools.environment import host_name, read_environment
from tools.evidence import scrub
from tools.launch import launch

Document = dict[str, Any]
Ids = tuple[int, ...]

NUM_SLOTS: Final = 16
MAX_TOKENS: Final = 320
CONTEXT_LENGTH: Final = 2048
GOALS: Final = {"arithmetic": 0.97, "tool_calls": 0.90}
GOAL: Final = 0.95  # of every other skill
SHARE_GOALS: Final = (0.25, 4.0)  # of the even share
AGREEMENT_GOAL: Final = 0.99

_THOUGHT: Final = re.compile(r"<think>\n(?P<thought>.*?)\n</think>\n\n(?P<rest>.*)", re.DOTALL)
_CALL: Final = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_TAG: Final = re.compile(r"</?think>")


@dataclass(frozen=True)
class Item:
    """A held-out conversation, and the prompt that a client's request for its last answer becomes."""

    conversation: Conversation
    prompt: Ids


@dataclass(frozen=True)
class Verdict:
    """The final answer without its thought, whether its thoughts are in place, and whether it is right."""

    answer: str
    well_formed: bool
    right: bool


# --- Judging


def judge(text: str, conversation: Conversation) -> Verdict:
    """What an answer is worth; one that thinks when it must not, or does not when it must, is wrong."""
    answer, well_formed = text, not _TAG.search(text)
    if conversation.thinking:
        found = _THOUGHT.fullmatch(text)
        well_formed = found is not None and bool(found["thought"].strip()) and not _TAG.search(found["rest"])
        answer = found["rest"] if found else text
    return Verdict(answer, well_formed, well_formed and is_right(answer.strip(), conversation.check))


def is_right(answer: str, check: Check) -> bool:
    """Whether an answer is what its check asks for."""
    if check.kind == "equals":
        return answer == check.value
    if check.kind == "says":
        return all(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer) for text in check.value)
    try:
        if check.kind == "json":
            return _canonical(json.loads(answer)) == _canonical(check.value)
        calls = [json.loads(text) for text in _CALL.findall(answer)]
    except ValueError:
        return False
    expected = [{"name": name, "arguments": arguments} for name, arguments in check.value]
    return not _CALL.sub("", answer).strip() and _canonical(calls) == _canonical(expected)


def _canonical(value: Any) -> str:
    """JSON in which true is not 1."""
    return json.dumps(value, sort_keys=True)


# --- Asking


def held_out_items(renderer: Renderer, number: int) -> list[Item]:
    """So many conversations of every skill, each prompt once."""
    items: dict[Ids, Item] = {}
    for skill in SKILL_NAMES:
        taken, seed = 0, 0
        while taken < number and seed < 4 * number:  # a skill may have fewer questions
            conversation = make_conversation(seed, "held_out", skill)
            prompt, seed = tuple(renderer.prompt(conversation)), seed + 1
            if prompt not in items and len(prompt) + MAX_TOKENS <= CONTEXT_LENGTH:
                items[prompt] = Item(conversation, prompt)
                taken += 1
    return list(items.values())


async def _ask_all(
    ask: Callable[[Ids], Awaitable[Ids]], prompts: Sequence[Ids], together: int, what: str
) -> list[Ids]:
    """The answers of all prompts, `together` at a time."""
    gate = asyncio.Semaphore(together)
    with tqdm(total=len(prompts), desc=what, unit="answer") as bar:

        async def one(prompt: Ids) -> Ids:
            async with gate:
                answer = await ask(prompt)
            bar.update()
            return answer

        return list(await asyncio.gather(*map(one, prompts)))


def ask_engine(llm: LLM, prompts: Sequence[Ids], together: int) -> list[Ids]:
    """Answers by this process's engine."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

    async def ask(prompt: Ids) -> Ids:
        generation = llm.submit(prompt, params, loop=asyncio.get_running_loop())
        ids: list[int] = []
        while not generation.finished:
            ids += (i for event in await generation.next_events() for i in event.token_ids)
        return tuple(ids)

    return asyncio.run(_ask_all(ask, prompts, together, f"engine, {together} together"))


def ask_server(url: str, prompts: Sequence[Ids], together: int, stream: bool) -> list[Ids]:
    """Answers over HTTP."""
    client = Client.from_url(url)

    async def ask(prompt: Ids) -> Ids:
        body = {"prompt": list(prompt), "max_tokens": MAX_TOKENS, "temperature": 0, "return_token_ids": True}
        request = Ask("/v1/completions", {**body, "stream": stream})
        answer = await client.stream(request) if stream else await client.complete(request)
        return tuple(answer.token_ids)

    what = f"HTTP, stream={str(stream).lower()}, {together} together"
    return asyncio.run(_ask_all(ask, prompts, together, what))


def ask_in_all_ways(model: Path, prompts: Sequence[Ids]) -> Iterator[tuple[str, list[Ids]]]:
    """Answers of a real server, which has the device for itself."""
    settings = {"JAXMOE_SLOTS": str(NUM_SLOTS), "JAXMOE_CONTEXT_LENGTH": str(CONTEXT_LENGTH)}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with launch("server:app", model, log=log, environment=settings) as url:
            for stream in (True, False):
                for together in (1, NUM_SLOTS):
                    what = f"HTTP, stream={str(stream).lower()}, {together} together"
                    yield what, ask_server(url, prompts, together, stream)


# --- Figures


def skill_figures(items: Sequence[Item], verdicts: Sequence[Verdict]) -> Document:
    """Counts and rates by skill, against their goals."""
    figures: Document = {}
    for skill in SKILL_NAMES:
        right = [v.right for item, v in zip(items, verdicts, strict=True) if item.conversation.skill == skill]
        goal = GOALS.get(skill, GOAL)
        rate = sum(right) / len(right)
        figures[skill] = {"items": len(right), "right": sum(right), "rate": round(rate, 4), "goal": goal}
    for name, wanted in (("thinking_on", True), ("thinking_off", False)):
        good = [
            v.well_formed
            for item, v in zip(items, verdicts, strict=True)
            if item.conversation.thinking is wanted
        ]
        rate = sum(good) / len(good)
        figures[name] = {"items": len(good), "right": sum(good), "rate": round(rate, 4), "goal": GOAL}
    return figures


def expert_shares(model: Path, items: Sequence[Item], renderer: Renderer) -> list[list[float]]:
    """Per layer and expert, its share of the routes of all items' tokens over the even share."""
    import jax.numpy as jnp

    from tools.demo_model import Batch, Network, read_trained

    trained = read_trained(model)
    network = Network(trained.config, trained.weights, dtype=jnp.float32, rounding=False)
    rows = pack([renderer.sample(item.conversation) for item in items], Random(0))
    shares, weights = [], []
    for i in tqdm(range(len(rows.tokens)), desc="expert shares", unit="row"):
        batch = Batch(*(jnp.asarray(array[i : i + 1].astype(np.int32)) for array in rows))
        shares.append(np.asarray(network(batch)[1].shares))
        weights.append((rows.segments[i] > 0).sum())
    even = np.average(shares, axis=0, weights=weights) * trained.config.num_experts
    return [[round(float(share), 3) for share in layer] for layer in even]


def equal_figures(items: Sequence[Ids], others: Mapping[str, Sequence[Ids]]) -> Document:
    """How many answers of each way are the same ids."""
    return {
        what: {"items": len(items), "equal": sum(a == b for a, b in zip(items, answers, strict=True))}
        for what, answers in others.items()
    }


def reached(document: Document) -> bool:
    """Whether every goal is."""
    skills = all(one["rate"] >= one["goal"] for one in document["skills"].values())
    ways = all(one["equal"] == one["items"] for one in document["same_ids"].values())
    low, high = SHARE_GOALS
    shares = all(low <= share <= high for layer in document["expert_shares_of_even"] for share in layer)
    return skills and ways and shares


def compare(first: Document, second: Document) -> Document:
    """How many final answers of two devices are the same; ValueError where model or items are not."""
    pairs = list(zip(first["answers"], second["answers"], strict=True))
    if first["model_sha256"] != second["model_sha256"]:
        raise ValueError("the answers are of two models")
    if any(a["question"] != b["question"] for a, b in pairs):
        raise ValueError("the answers are to other questions")
    same = sum(a["answer"] == b["answer"] for a, b in pairs)
    return {
        "machines": [first["machine"], second["machine"]],
        "model_sha256": first["model_sha256"],
        "items": len(pairs),
        "same_final_answer": same,
        "rate": round(same / len(pairs), 4),
        "goal": AGREEMENT_GOAL,
    }


# --- The command


def measure(model: Path, num_items: int, num_ways: int) -> tuple[Document, list[Document]]:
    """All figures, and every answer."""
    renderer = Renderer(vocabulary_of(model))
    items = held_out_items(renderer, num_items)
    some = [items[i] for skill in SKILL_NAMES for i in _first_of(items, skill, num_ways)]
    prompts = [item.prompt for item in some]
    others = dict(ask_in_all_ways(model, prompts)) if prompts else {}
    config = EngineConfig(num_slots=NUM_SLOTS, context_length=CONTEXT_LENGTH)
    with LLM(model, config) as llm:
        answers = ask_engine(llm, [item.prompt for item in items], NUM_SLOTS)
        if prompts:
            others["engine, 1 together"] = ask_engine(llm, prompts, 1)
        texts = [_text(llm, ids) for ids in answers]
    by_prompt = {item.prompt: ids for item, ids in zip(items, answers, strict=True)}
    verdicts = [judge(text, item.conversation) for item, text in zip(items, texts, strict=True)]
    figures = {
        "skills": skill_figures(items, verdicts),
        "same_ids": equal_figures([by_prompt[prompt] for prompt in prompts], others),
        "expert_shares_of_even": expert_shares(model, items, renderer),
    }
    return figures, [
        {
            "skill": item.conversation.skill,
            "thinking": item.conversation.thinking,
            "question": item.conversation.messages[-2]["content"],
            "answer": verdict.answer,
            "right": verdict.right,
            **({} if verdict.right else {"text": text, "expected": item.conversation.check.value}),
        }
        for item, text, verdict in zip(items, texts, verdicts, strict=True)
    ]


def _first_of(items: Sequence[Item], skill: str, number: int) -> list[int]:
    return [i for i, item in enumerate(items) if item.conversation.skill == skill][:number]


def _text(llm: LLM, ids: Ids) -> str:
    return llm.tokenizer.decode(i for i in ids if i not in llm.tokenizer.eos_ids)


def write(path: Path, document: Document) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or compare, as the command line says."""
    options = _parser().parse_args(arguments)
    if options.compare:
        first, second = (json.loads(path.read_text("utf-8")) for path in options.compare)
        agreement = compare(first, second)
        print(json.dumps(agreement, indent=1))
        if options.out is not None:
            write(options.out, {**json.loads(options.out.read_text("utf-8")), "agreement": agreement})
        return int(agreement["rate"] < AGREEMENT_GOAL)
    environment = read_environment()
    heading = {
        "machine": host_name(environment),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model_sha256": hashlib.sha256(options.model.read_bytes()).hexdigest(),
        "model_size": options.model.stat().st_size,
    }
    figures, answers = measure(options.model, options.items, options.ways)
    for skill, one in figures["skills"].items():
        print(f"{skill:14} {one['right']:5} of {one['items']:5}  {one['rate']:.4f}  (goal {one['goal']})")
    print(json.dumps({name: figures[name] for name in ("same_ids", "expert_shares_of_even")}, indent=1))
    if options.answers is not None:
        write(options.answers, {**heading, "answers": answers})
    document = {**heading, "command": _command(arguments), "env": environment, **figures}
    if options.training is not None:
        trained = json.loads(options.training.read_text("utf-8"))
        document["training"] = {name: value for name, value in trained.items() if name != "log"}
    if options.out is not None:
        write(options.out, document)
    return int(not reached(document))


def _command(arguments: Sequence[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return scrub(" ".join(("python -m tools.eval_demo", *given)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.eval_demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", metavar="MODEL.gguf", type=Path, nargs="?")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--ways", type=int, default=8)
    parser.add_argument("--training", type=Path, metavar="FILE.json")
    parser.add_argument("--answers", type=Path, metavar="FILE.json")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="ANSWERS.json")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
