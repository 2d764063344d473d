"""Every law is seen to fail: on a product with a deliberate mistake it breaks within a few worlds, and on the first of
these it holds again once the mistake is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.streams import laws, laws_money
from tests.streams.chance import Seeded
from tests.streams.worlds import BASES, World, world
from tests.streams.wrong import IN_THE_STORE, MISTAKES, Mistake

#: Worlds in which a mistake has to show.
PATIENCE = 60


def asked_of(law: str, seed: int) -> None:
    """A law on the world of a seed."""
    if law == "shares":
        laws_money.shares(laws_money.shared_gpu(Seeded(seed)))
    elif law == "money":
        laws_money.money(world(seed, BASES), Seeded(seed))
    else:
        getattr(laws, law)(world(seed, BASES))


def broken(law: str, seeds: Iterator[int]) -> int | None:
    """The first seed on which a law breaks."""
    for seed in seeds:
        try:
            asked_of(law, seed)
        except (AssertionError, ValueError):
            return seed
    return None


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_law_notices(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        mistake.make(patch)
        seed = broken(mistake.law, iter(range(PATIENCE)))
    assert seed is not None, f"{PATIENCE} worlds do not show that {mistake.what}"
    asked_of(mistake.law, seed)


def test_every_law_is_seen_to_fail_and_the_table_says_on_what() -> None:
    names = {mistake.law for mistake in MISTAKES}
    assert names == {*laws.__all__, "shares", "money"}
    assert {case.mistake.law for case in IN_THE_STORE} == {"2", "3", "9"}
    table = Path(__file__).with_name("README.md").read_text()
    made = [*MISTAKES, *(case.mistake for case in IN_THE_STORE)]
    assert [mistake.what for mistake in made if mistake.what not in table] == []


def test_a_world_can_be_read() -> None:
    """A failing example is printed as its story."""
    w: World = world(5)
    assert len(repr(w).splitlines()) < 40 and "allocation" not in repr(w).splitlines()[0]
