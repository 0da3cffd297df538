"""The contracts as files: their schema, and that every gate is implemented and has its mutants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools import contracts
from tools.contracts import NAMES, RedState, all_problems, gate_problems, load_contract, read_document

ROOT = Path(__file__).parents[1]
Document = dict[str, Any]


def first_gate(document: Document) -> Document:
    gate: Document = document["falsification"][0]
    return gate


BREAKAGES: dict[str, Callable[[Document], object]] = {
    "name": lambda document: document.update(name="Qwen3 MoE"),
    "version": lambda document: document.update(version="1"),
    "falsification": lambda document: document.pop("falsification"),
    "scope_extension": lambda document: document["scope_extension"].pop("out_of_scope"),
    "references": lambda document: document["metadata"].update(references=[]),
    "date": lambda document: document["status_history"][0].update(date="today"),
    "formula": lambda document: next(iter(document["equations"].values())).pop("formula"),
    "author_": lambda document: document["metadata"].update(author_="somebody"),
    "red_state": lambda document: first_gate(document).update(red_state=[]),
    "if_fails": lambda document: first_gate(document).pop("if_fails"),
    "id": lambda document: first_gate(document).update(id="V1-1"),
    "thresholds": lambda document: first_gate(document).update(thresholds={"most": "many"}),
}


def test_there_is_nothing_wrong_with_the_contracts() -> None:
    assert all_problems() == []
    assert contracts.main() == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", BREAKAGES)
def test_the_schema_refuses(name: str, what: str) -> None:
    document = copy.deepcopy(read_document(name))
    BREAKAGES[what](document)
    assert contracts.schema_problems(document, "schema.json"), what


@pytest.mark.parametrize("name", NAMES)
def test_a_contract_is_named_as_its_file(name: str) -> None:
    document = read_document(name)
    assert document["name"] == name
    assert document["version"] == document["metadata"]["version"] == document["status_history"][-1]["version"]


def test_a_broken_contract_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**read_document(NAMES[0]), "version": "new"}
    monkeypatch.setattr(contracts, "read_document", lambda name: broken)
    with pytest.raises(ValueError, match=r"\$\.version: 'new' does not match"):
        load_contract(NAMES[0])
    assert [problem.split(" does")[0] for problem in all_problems()] == [
        f"{name}: $.version: 'new'" for name in NAMES
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"id": "V1_009"}, "no implementation: V1_009"),
        ({"needs": ("wings",)}, "unknown needs: wings"),
        ({"red": (RedState("nobody", "median_gap"),)}, "unknown mutants: nobody"),
        ({"red": (RedState("slow", "taste"),)}, "a red state names a check the gate does not list: taste"),
        ({"checks": ("median_gap", "taste")}, "checks that no mutant turns red: taste"),
        ({"red": ()}, "checks that no mutant turns red: median_gap"),
    ],
)
def test_a_gate_that_nothing_stands_behind_is_found(change: Document, sentence: str) -> None:
    contract = load_contract(NAMES[0])
    gate = next(gate for gate in contract.gates if gate.id == "V1_003")
    changed = replace(contract, gates=(replace(gate, **change),))
    found = gate_problems(changed, implemented={"V1_003"}, mutants={"slow"}, known={"health"})
    assert any(problem.endswith(sentence) for problem in found), found


def test_the_gates_and_thresholds_are_those_that_were_asked_for() -> None:
    streaming, serving = (load_contract(name) for name in NAMES)
    assert [gate.id for gate in streaming.gates] == ["V1_001", "V1_002", "V1_003"]
    assert [gate.id for gate in serving.gates] == [f"SERVING_{number:03}" for number in range(1, 12)]
    first, _, third = (gate.thresholds for gate in streaming.gates)
    assert (first["max_tokens"], first["first_token_ratio"], first["longest_gap_share"]) == (
        [8, 64, 256],
        1.5,
        0.25,
    )
    assert (third["max_tokens"], third["tiny"], third["other"]) == (
        128,
        {"over_engine_ms": 2},
        {"median_ms": 500},
    )
    assert third["h200_30b"] == {"median_ms": 3, "p95_over_median": 2}
    assert serving.gates[5].thresholds["streams"] == 8


def test_the_files_a_contract_names_are_there() -> None:
    for name in NAMES:
        for phase in read_document(name)["implementation_phases"]:
            for file in phase["files"]:
                assert (ROOT / file).is_file(), file
