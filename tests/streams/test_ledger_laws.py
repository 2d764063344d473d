"""The ledger's laws on generated worlds, against the naive oracle: what a minute holds, however it was seen.

Every run asks the same worlds. By hand, many others: `GPULEDGER_LAW_EXAMPLES=5000 pytest tests/streams -k laws`.
"""

from __future__ import annotations

from hypothesis import given

from tests.streams import laws
from tests.streams.worlds import World, asked, worlds


@asked()
@given(worlds())
def test_the_ledger_is_what_the_oracle_counts(w: World) -> None:
    laws.agreement(w)


@asked()
@given(worlds())
def test_law_1_every_gpu_and_minute_is_accounted_exactly(w: World) -> None:
    laws.conservation(w)


@asked()
@given(worlds())
def test_law_2_order_and_repetition_change_nothing(w: World) -> None:
    laws.order_and_repetition(w)


@asked()
@given(worlds())
def test_law_3_a_replay_from_any_offset_writes_the_same_rows(w: World) -> None:
    laws.replay(w)


@asked()
@given(worlds())
def test_law_4_any_split_of_the_range_adds_up(w: World) -> None:
    laws.additivity(w)


@asked()
@given(worlds())
def test_law_5_held_time_is_that_of_the_allocations(w: World) -> None:
    laws.held_time(w)


@asked()
@given(worlds())
def test_law_6_unobserved_is_held_less_observed(w: World) -> None:
    laws.unobserved(w)


@asked()
@given(worlds())
def test_law_8_energy_is_the_difference_of_the_counters(w: World) -> None:
    laws.energy(w)
