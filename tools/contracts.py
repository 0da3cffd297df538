"""The contracts as code sees them: the YAML files of contracts/, and what must hold for them.

`python -m tools.contracts` checks both files against contracts/schema.json, and that each gate has an
implementation and a mutant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from tools.environment import ROOT

CONTRACTS = ROOT / "contracts"
NAMES = ("qwen3-moe-streaming-sse-v1", "qwen3-moe-serving-v1")
Document = dict[str, Any]


@dataclass(frozen=True)
class RedState:
    """A mutant of the app, and the check of the gate that has to fail on it."""

    mutant: str
    check: str


@dataclass(frozen=True)
class Gate:
    """One entry of `falsification`: its id, what it says, what it needs, its thresholds and its mutants."""

    id: str
    description: str
    test: str
    needs: tuple[str, ...]
    checks: tuple[str, ...]
    thresholds: Mapping[str, Any]
    red: tuple[RedState, ...]


@dataclass(frozen=True)
class Contract:
    """A contract's name, version and gates."""

    name: str
    version: str
    gates: tuple[Gate, ...]


def load_contract(name: str) -> Contract:
    """The contract `contracts/NAME.yaml`. Raises ValueError with every breach of the schema."""
    document = read_document(name)
    found = schema_problems(document, "schema.json")
    if found:
        raise ValueError(f"contracts/{name}.yaml: " + "; ".join(found))
    return Contract(document["name"], document["version"], tuple(map(_gate, document["falsification"])))


def read_document(name: str) -> Document:
    """contracts/NAME.yaml as it stands."""
    document: Document = yaml.safe_load((CONTRACTS / f"{name}.yaml").read_text())
    return document


def schema_problems(document: object, schema: str) -> list[str]:
    """What is wrong with `document` by contracts/SCHEMA, one sentence each."""
    validator = Draft202012Validator(json.loads((CONTRACTS / schema).read_text()))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def gate_problems(
    contract: Contract, *, implemented: set[str], mutants: set[str], known: set[str]
) -> list[str]:
    """Gates without an implementation or a mutant, and names that nothing answers to."""
    found = []
    for gate in contract.gates:
        named = {red.mutant for red in gate.red}
        checked = {red.check for red in gate.red}
        for wrong, sentence in (
            ({gate.id} - implemented, "no implementation"),
            (named - mutants, "unknown mutants"),
            (set(gate.needs) - known, "unknown needs"),
            (checked - set(gate.checks), "a red state names a check the gate does not list"),
            (set(gate.checks) - checked, "checks that no mutant turns red"),
        ):
            if wrong:
                found.append(f"{contract.name} {gate.id}: {sentence}: {', '.join(sorted(wrong))}")
    return found


def all_problems() -> list[str]:
    """What is wrong with the contracts and with what stands behind them; [] when all is well."""
    from tools.gates import GATES
    from tools.mutants import MUTANTS
    from tools.target import NEEDS

    found = []
    for name in NAMES:
        found += [f"{name}: {problem}" for problem in schema_problems(read_document(name), "schema.json")]
    if found:
        return found
    for name in NAMES:
        contract = load_contract(name)
        found += gate_problems(contract, implemented=set(GATES), mutants=set(MUTANTS), known=set(NEEDS))
    return found


def _gate(entry: Document) -> Gate:
    return Gate(
        id=entry["id"],
        description=entry["description"].strip(),
        test=entry["test"].strip(),
        needs=tuple(entry["needs"]),
        checks=tuple(entry["checks"]),
        thresholds=entry["thresholds"],
        red=tuple(RedState(red["mutant"], red["check"]) for red in entry["red_state"]),
    )


def main() -> int:
    found = all_problems()
    print("\n".join(found) or "the contracts are well formed; each gate is implemented and has its mutants")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
