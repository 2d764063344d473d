"""Commitments + transfers in - transfers out is what each tenant owned, at every instant."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuledger.agents.replay.capacity import CapacityFacts, CommitmentSpan, TransferSpan, capacity_facts

TENANTS = ("a", "b", "c")

steps = st.lists(st.dictionaries(st.sampled_from(TENANTS), st.integers(0, 9)), max_size=12)


def committed(facts: CapacityFacts, tenant: str, at_ms: int) -> int:
    """The ledger's sum, spelled out."""
    total = sum(c.gpus for c in facts.commitments if c.tenant == tenant and c.start_ms <= at_ms < c.end_ms)
    for move in facts.transfers:
        if move.start_ms <= at_ms < move.end_ms:
            total += move.gpus * ((move.to_tenant == tenant) - (move.from_tenant == tenant))
    return total


@given(numbers=steps)
@settings(max_examples=500, deadline=None)
def test_the_ledgers_sum_is_the_input_and_no_more_moves_than_must(numbers: list[dict[str, int]]) -> None:
    changes: Sequence[tuple[int, Mapping[str, int]]] = [*enumerate(numbers), (len(numbers), dict.fromkeys(TENANTS, 0))]
    facts = capacity_facts(changes)
    owned: dict[str, int] = dict.fromkeys(TENANTS, 0)
    for at_ms, step in changes:
        before = dict(owned)
        owned.update(step)
        for tenant in TENANTS:
            assert committed(facts, tenant, at_ms) == owned[tenant]
        lost = sum(max(0, before[t] - owned[t]) for t in TENANTS)
        gained = sum(max(0, owned[t] - before[t]) for t in TENANTS)
        moved = sum(move.gpus for move in facts.transfers if move.start_ms == at_ms)
        delivered = sum(c.gpus for c in facts.commitments if c.start_ms == at_ms)
        assert (moved, delivered) == (min(lost, gained), max(0, gained - lost))
    assert all(span.gpus > 0 and span.end_ms > span.start_ms for span in (*facts.commitments, *facts.transfers))
    spans = [(c.start_ms, c.end_ms, c.tenant) for c in facts.commitments]
    moves = [(m.start_ms, m.end_ms, m.from_tenant, m.to_tenant) for m in facts.transfers]
    assert len(set(spans)) == len(spans) and len(set(moves)) == len(moves)


def test_a_move_a_growth_and_a_withdrawal_read_as_such() -> None:
    facts = capacity_facts([(0, {"a": 10}), (5, {"a": 6, "b": 4}), (7, {"b": 3}), (8, {"a": 7}), (9, {"a": 0, "b": 0})])
    assert facts.commitments == (
        CommitmentSpan(0, 7, "a", 1),
        CommitmentSpan(0, 9, "a", 9),
        CommitmentSpan(8, 9, "a", 1),
    )
    assert facts.transfers == (TransferSpan(5, 7, "a", "b", 1), TransferSpan(5, 9, "a", "b", 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(0, {"a": 1})], "a still has 1 GPUs after the last entry"),
        ([(0, {"a": -1})], "negative"),
        ([(1, {"a": 1}), (1, {"a": 0})], "1 is not after 1"),
    ],
)
def test_input_that_is_no_history_is_refused(changes: list[tuple[int, dict[str, int]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        capacity_facts(changes)
