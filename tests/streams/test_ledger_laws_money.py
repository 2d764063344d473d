"""Law 7 on generated worlds: GPUs over their holders, money over everybody, through both changes of the clocks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.streams import laws_money
from tests.streams.chance import Drawn
from tests.streams.worlds import BASES, World, asked, worlds


@asked(40)
@given(laws_money.shared_gpus())
def test_law_7_a_shared_gpu_is_divided_exactly(w: World) -> None:
    laws_money.shares(w)


@asked()
@given(worlds(), st.data())
def test_law_7_money_is_divided_exactly(w: World, data: st.DataObject) -> None:
    laws_money.money(w, Drawn(data.draw))


@pytest.mark.parametrize(("zone", "changes"), [("Europe/Oslo", 2), ("America/New_York", 1)])
def test_clocks_do_change_in_the_worlds(zone: str, changes: int) -> None:
    """A base of time that misses its change would test nothing."""
    found = 0
    for base in BASES:
        before = datetime.fromtimestamp(base / 1000, UTC)
        offsets = {(before + timedelta(minutes=n)).astimezone(ZoneInfo(zone)).utcoffset() for n in range(5)}
        found += len(offsets) == 2
    assert found == changes
