"""The remembered pools of a GPU are never older than the question."""

from collections.abc import Iterable

from gpuledger.cli.database import migrate_database
from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.events import Inventory, Placement, encode_event
from gpuledger.streams.blocks import Record
from gpuledger.streams.pool_map import PoolMap
from gpuledger.streams.sinks import FactsSink
from gpuledger.streams.store import Store
from tests.fixtures.clickhouse import ClickHouseDatabase

T0 = 1_760_000_000_000


async def no_mark(_: object) -> None:
    """Marks are not looked at here."""


def place(store: Store, gpu: str, pool: str, revision: int) -> None:
    placement = Placement(
        id=f"{gpu}/{pool}", revision=revision, claimed_at_ms=T0, gpu=gpu, node="n", pool=pool, site="s", start_ms=T0
    )
    value = encode_event(Inventory(node="n", claimed_at_ms=T0, placements=[placement]))
    assert not FactsSink(store, "inventory", no_mark, 0).store([Record("inventory", 0, 0, T0, b"n", value)]).rejected


def test_a_placement_stored_by_another_is_seen_at_once(clickhouse_database: ClickHouseDatabase) -> None:
    settings = ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name)
    migrate_database(settings)
    store, other = Store(settings), Store(settings)
    pools = PoolMap(store)
    assert pools.of(["a", "b"]) == {"a": frozenset(), "b": frozenset()}
    place(other, "a", "red", T0)
    assert pools.of(["a", "b"]) == {"a": {"red"}, "b": frozenset()}
    assert pools.of(["b"]) == {"b": frozenset()}
    place(other, "a", "blue", T0 + 1)
    place(other, "b", "blue", T0 + 1)
    assert pools.of(["a", "b"]) == {"a": {"red", "blue"}, "b": {"blue"}}
    other.client.command("OPTIMIZE TABLE placements FINAL")
    assert pools.of(["a", "b"]) == {"a": {"red", "blue"}, "b": {"blue"}}


def test_gpus_that_are_known_are_not_asked_for_again(clickhouse_database: ClickHouseDatabase) -> None:
    settings = ClickHouse(url=clickhouse_database.url, database=clickhouse_database.name)
    migrate_database(settings)

    class Counting(Store):
        asked = 0

        def pools_of(self, gpus: Iterable[str]) -> dict[str, set[str]]:
            self.asked += 1
            return super().pools_of(gpus)

    store = Counting(settings)
    place(store, "a", "red", T0)
    store.asked = 0
    pools = PoolMap(store)
    for _ in range(3):
        assert pools.of(["a"]) == {"a": {"red"}}
    assert store.asked == 1
    pools.of(["a", "c"])
    assert store.asked == 2
