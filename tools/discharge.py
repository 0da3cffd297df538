"""Discharge the contracts at the socket of a real server.

`python -m tools.discharge [--model FILE | --url URL] [--contract NAME] [--out DIR] [--red]`

Without --model and --url the file named by QWEN3_MOE_GGUF_PATH is served, or else the demo model.
Exit status: 0 all gates passed, 1 a gate failed (with --red: did not turn red), 3 none failed but some could
not be run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxmoe import demo_model
from tools.client import Client, ProtocolError, ServerError
from tools.contracts import NAMES, Contract, Gate, RedState, load_contract
from tools.environment import Environment, read_environment
from tools.evidence import RedOutcome, Subject, scrub, shown_path, write_findings, write_red
from tools.gates import GATES
from tools.gates_traffic import CHUNK_LENGTH
from tools.launch import LaunchError, launch
from tools.mutants import HEADER, RELEASE_PATH
from tools.target import NEEDS, Target, probe
from tools.trial import FULL, RED, Outcome, Scale, Verdict, run_gate
from tools.vocabulary import Vocabulary

PASSED, FAILED, NOT_RUN = 0, 1, 3
TINY_SIZE = 1_000_000_000  # bytes
BIG_SIZE = 10_000_000_000  # bytes
IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class Server:
    """A running server: where it is, and what is known of the model behind it."""

    url: str
    model: str | None = None
    model_arch: str | None = None
    speed: str = "other"
    vocabulary: Vocabulary | None = None


@dataclass
class Journal:
    """Lines for the terminal and for the log."""

    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.lines.append(scrub(line))
        print(self.lines[-1], flush=True)

    def row(self, what: str, verdict: str, seconds: float, evidence: str) -> None:
        """One row of the table; the evidence is wrapped."""
        first, *rest = textwrap.wrap(evidence, 90) or [""]
        self.say(f"{what:<38} {verdict:<8} {seconds:6.1f} s  {first}")
        for line in rest:
            self.say(" " * 58 + line)


async def discharge(
    server: Server, contracts: Sequence[Contract], *, command: str, out: Path, scale: Scale = FULL
) -> int:
    """Try every gate of the contracts on a running server and write the findings; the exit status."""
    env = read_environment()
    verdicts = []
    target: Target | None = None
    for contract in contracts:
        journal = Journal()
        target = target or await _probed(server)
        _say_heading(journal, contract, target, env, command)
        outcomes = [await _green(target, gate, scale, journal) for gate in contract.gates]
        verdicts += [outcome.verdict for outcome in outcomes]
        subject = Subject(server.model or target.model, server.model_arch, command, env)
        folder = out / contract.name
        journal.say(f"findings: {shown_path(folder / 'findings.json')}")
        write_findings(contract, outcomes, subject, folder, journal.lines)
    return exit_status(verdicts)


def exit_status(verdicts: Sequence[Verdict]) -> int:
    """0 when all passed, 1 when one failed, 3 when none failed but some were not run."""
    if "failed" in verdicts:
        return FAILED
    return NOT_RUN if "not_run" in verdicts else PASSED


async def turn_red(
    server: Server, contracts: Sequence[Contract], *, command: str, out: Path, scale: Scale = RED
) -> int:
    """Try every gate unchanged and on each of its mutants and write what happened; the exit status."""
    env = read_environment()
    target = await _probed(server)
    good = True
    for contract in contracts:
        journal = Journal()
        _say_heading(journal, contract, target, env, command)
        green, red = [], []
        for gate in contract.gates:
            green.append(await _green(target, gate, scale, journal))
            red += [await _red(target, gate, state, scale, journal) for state in gate.red]
        subject = Subject(server.model or target.model, server.model_arch, command, env)
        folder = out / contract.name
        turned = sum(outcome.as_expected for outcome in red)
        journal.say(f"{turned} of {len(red)} mutants turned their gate red by the check that was meant")
        write_red(contract, green, red, subject, folder, journal.lines)
        good = good and turned == len(red) and all(outcome.verdict == "passed" for outcome in green)
    return PASSED if good else FAILED


async def _probed(server: Server) -> Target:
    client = Client.from_url(server.url, _access())
    return await probe(client, speed=server.speed, vocabulary=server.vocabulary)


def _access() -> dict[str, str]:
    key = os.environ.get("JAXMOE_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def _say_heading(
    journal: Journal, contract: Contract, target: Target, env: Environment, command: str
) -> None:
    journal.say(f"{contract.name} {contract.version}: {command}")
    journal.say(", ".join(f"{name} {value}" for name, value in env.items()))
    has = ", ".join(need for need in NEEDS if need not in target.lacks) or "nothing beyond the OpenAI API"
    journal.say(f"the server ({target.model}) has {has}")
    for need, seen in target.lacks.items():
        journal.say(f"the server lacks {NEEDS[need]}: {seen}")


async def _green(target: Target, gate: Gate, scale: Scale, journal: Journal) -> Outcome:
    outcome = await run_gate(target, gate, scale, GATES[gate.id])
    journal.row(gate.id, outcome.verdict, outcome.seconds, outcome.evidence)
    await _settle(target)
    return outcome


async def _red(target: Target, gate: Gate, state: RedState, scale: Scale, journal: Journal) -> RedOutcome:
    headers = {**target.client.headers, HEADER: state.mutant}
    broken = replace(target, client=replace(target.client, headers=headers))
    outcome = await run_gate(broken, gate, scale, GATES[gate.id])
    red = RedOutcome(
        gate.id, state.mutant, state.check, outcome.verdict, outcome.check, outcome.evidence, outcome.seconds
    )
    verdict = "red" if red.as_expected else "NOT RED"
    told = f"{outcome.check or outcome.verdict}: {outcome.evidence}"
    expected = "" if red.as_expected else f" (expected {state.check})"
    journal.row(f"{gate.id} {state.mutant}", verdict, outcome.seconds, told + expected)
    with suppress(ServerError, ProtocolError, OSError):
        await target.client.get(RELEASE_PATH)
    await _settle(target)
    return red


async def _settle(target: Target) -> None:
    """Wait until the engine has nothing left to do; a server that has gone fails the gates to come."""
    if "health" not in target.lacks:
        with suppress(ServerError, ProtocolError, OSError):
            await target.idle(IDLE_SECONDS)


@contextmanager
def serve(model: Path, app: str) -> Iterator[Server]:
    """Serve a model file from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"loading {model.name} into a server of its own", flush=True)
        settings = {"JAXMOE_PREFILL_CHUNK": str(CHUNK_LENGTH)}
        with launch(app, model, log=Path(folder) / "server.log", environment=settings) as url:
            yield Server(url, model.name, "qwen3moe", _speed(model), Vocabulary.from_gguf(model))


def _speed(path: Path) -> str:
    """Which thresholds of V1_003 hold for this file on this machine."""
    size = path.stat().st_size
    if size < TINY_SIZE:
        return "tiny"
    return "h200_30b" if size > BIG_SIZE and "H200" in str(read_environment()["gpu"]) else "other"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.discharge", description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", type=Path, metavar="FILE", help="a GGUF file to serve")
    where.add_argument("--url", help="a running OpenAI-compatible server, http://host:port")
    parser.add_argument("--contract", choices=NAMES, help="one contract only")
    parser.add_argument("--out", type=Path, default=Path("out/discharge"), metavar="DIR")
    parser.add_argument("--red", action="store_true", help="run every gate on its mutants as well")
    found = parser.parse_args(argv)
    if found.red and found.url:
        parser.error("--red serves its mutants itself; it does not go with --url")
    return found


def _command(arguments: argparse.Namespace) -> str:
    parts = ["python -m tools.discharge"]
    parts += [f"--model {shown_path(arguments.model)}"] if arguments.model else []
    parts += [f"--url {arguments.url.rpartition('@')[2]}"] if arguments.url else []
    parts += [f"--contract {arguments.contract}"] if arguments.contract else []
    return " ".join(parts + ["--red"] * arguments.red)


Run = Callable[..., Coroutine[Any, Any, int]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _arguments(argv)
    contracts = [load_contract(name) for name in NAMES if arguments.contract in (None, name)]
    model = arguments.model or Path(os.environ.get("QWEN3_MOE_GGUF_PATH") or demo_model())
    run: Run = turn_red if arguments.red else discharge
    asked: dict[str, Any] = {"command": _command(arguments), "out": arguments.out}
    try:
        if arguments.url:
            return asyncio.run(run(Server(arguments.url), contracts, **asked))
        with serve(model, "tools.mutant_app:app" if arguments.red else "server:app") as server:
            return asyncio.run(run(server, contracts, **asked))
    except (LaunchError, ServerError, ProtocolError, OSError, ValueError) as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
