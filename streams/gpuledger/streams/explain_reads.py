"""What `explain` reads: the journal of facts, fragments, stored versions, conflicts and money of one GPU and minute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from gpuledger.schemas.events import Fact, decode_event
from gpuledger.streams.explain_facts import Learnt, Naming
from gpuledger.streams.explanation import Gap, MinuteVersion, Oddity, PoolRow, Segment
from gpuledger.streams.marks import HOUR_MS
from gpuledger.streams.store import Store

__all__ = ["Reads"]

_DAY_MS = 86_400_000
_JOURNAL = """
    SELECT rank, topic, partition, offset, toUnixTimestamp64Milli(recorded_at), document FROM facts
    WHERE kind IN {kinds:Array(String)} AND id IN (
        SELECT id FROM facts WHERE kind IN {kinds:Array(String)} AND ($condition))
    ORDER BY kind, id, rank, topic, partition, offset
"""
_FRAGMENTS = """
    SELECT instance, epoch_ms, run_id, run_start_ms, seq, node, samples, segment_start_ms, segment_duration_ms,
        segment_activity, segment_energy_from_mj, segment_energy_to_mj,
        toUnixTimestamp64Milli(minute) AS at_ms, toUnixTimestamp64Milli(appended_at) AS appended_ms
    FROM fragments FINAL
    WHERE minute = fromUnixTimestamp64Milli({minute:Int64}, 'UTC') AND gpu = {gpu:String}
    SETTINGS do_not_merge_across_partitions_select_final = 1
"""
#: All versions: FINAL and the views would hide what was superseded.
_MARKERS = """
    SELECT version, max(gpu_us), max(complete), max(fragments) FROM ledger_minute
    WHERE pool = {pool:String} AND minute = fromUnixTimestamp64Milli({minute:Int64}, 'UTC') AND kind = 'marker'
    GROUP BY version
"""
_GPU_ROWS = """
    SELECT DISTINCT version, kind, tenant, job_id, instance, activity, gpu_us, energy_mj FROM ledger_gpu_minute
    WHERE pool = {pool:String} AND minute = fromUnixTimestamp64Milli({minute:Int64}, 'UTC') AND gpu = {gpu:String}
    ORDER BY version, kind, tenant, job_id, instance, activity
"""
#: What counts now, of a GPU; no rows where the minute is open or nobody saw the GPU.
_STORED = """
    SELECT kind, tenant, job_id, instance, activity, gpu_us, energy_mj FROM v_gpu_minute
    WHERE pool = {pool:String} AND minute = fromUnixTimestamp64Milli({minute:Int64}, 'UTC') AND gpu = {gpu:String}
    ORDER BY kind, tenant, job_id, instance, activity
"""
_UNHELD = """
    SELECT kind, tenant, gpu_us, energy_mj FROM v_ledger_minute
    WHERE pool = {pool:String} AND minute = fromUnixTimestamp64Milli({minute:Int64}, 'UTC')
        AND kind IN ('reserved_unused', 'free', 'unsliced', 'overcommitted')
    ORDER BY kind, tenant
"""
_CHARGES = """
    SELECT toUnixTimestamp64Milli(interval_start) AS start_ms, toUnixTimestamp64Milli(interval_end) AS end_ms, tenant,
        job_id, kind, activity, payer, gpu_us, energy_mj, asset_cost, energy_cost, asset_currency, charge,
        charge_currency, rate_card, estimate, incomplete
    FROM v_charges
    WHERE pool = {pool:String} AND interval_start <= fromUnixTimestamp64Milli({minute:Int64}, 'UTC')
        AND interval_start >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')
        AND interval_end > fromUnixTimestamp64Milli({minute:Int64}, 'UTC')
    ORDER BY kind, tenant, job_id, activity, payer
"""
_CONFLICTS = """
    SELECT pool, kind, subject, other, from_ms, to_ms, detail FROM v_conflicts
    WHERE hour = fromUnixTimestamp64Milli({hour:Int64}, 'UTC') AND from_ms < {minute:Int64} + 60000
        AND to_ms > {minute:Int64} AND (subject IN {names:Array(String)} OR other IN {names:Array(String)})
    ORDER BY ALL
"""
_GAPS = """
    SELECT node, run_id, first_seq, last_seq, from_ms, to_ms, batches, reason FROM gaps FINAL
    WHERE node IN {nodes:Array(String)} AND from_ms < {minute:Int64} + 60000 AND to_ms > {minute:Int64}
    ORDER BY ALL
"""
_CLOSE = """
    SELECT gpu FROM (SELECT DISTINCT gpu FROM placements)
    ORDER BY editDistance(lower(gpu), lower({gpu:String})), gpu LIMIT 3
"""


class Reads:
    """Reads about one GPU in one minute."""

    def __init__(self, store: Store, gpu: str, minute_ms: int) -> None:
        self._store = store
        self.gpu = gpu
        self._minute_ms = minute_ms
        self._parameters: dict[str, Any] = {"gpu": gpu, "minute": minute_ms}

    # -- facts

    def naming_gpu(self, kinds: Iterable[str]) -> list[Learnt]:
        """Every revision of the facts of which any revision names the GPU."""
        return self._journal(
            kinds, "position(document, {text:String}) > 0", text=_field("gpu", self._parameters["gpu"])
        )

    def naming_pools(self, kinds: Iterable[str], pools: Sequence[str]) -> list[Learnt]:
        """Every revision of the facts of which any revision names one of the pools."""
        texts = [_field("pool", pool) for pool in pools]
        return self._journal(kinds, "multiSearchAny(document, {texts:Array(String)})", texts=texts) if texts else []

    def with_ids(self, kind: str, ids: Iterable[str]) -> list[Learnt]:
        """Every revision of the facts with these ids."""
        return self._journal([kind], "id IN {ids:Array(String)}", ids=sorted(set(ids)))

    def all_of(self, kind: str) -> list[Learnt]:
        """Every revision of every fact of a kind of which there are few."""
        return self._journal([kind], "1")

    def _journal(self, kinds: Iterable[str], condition: str, **parameters: Any) -> list[Learnt]:
        rows = self._store.rows(_JOURNAL.replace("$condition", condition), {"kinds": list(kinds), **parameters})
        found: list[Learnt] = []
        for rank, topic, partition, offset, recorded_ms, document in rows:
            event = decode_event(document.encode())
            if isinstance(event, Fact):
                found.append(Learnt(event, int(rank), topic, int(partition), int(offset), int(recorded_ms)))
        return found

    def naming(self, allocations: Iterable[str], nodes: Iterable[str], confirm_ms: int) -> Naming:
        """What decides how long open allocations last."""
        sql = "SELECT allocation_id, max(named_ms) FROM confirmed WHERE allocation_id IN {ids:Array(String)} GROUP BY 1"
        named = self._store.rows(sql, {"ids": sorted(set(allocations))})
        boots: dict[str, dict[str, int]] = {}
        sql = "SELECT node, boot_id, min(start_ms) FROM boots WHERE node IN {nodes:Array(String)} GROUP BY ALL"
        for node, boot, start in self._store.rows(sql, {"nodes": sorted(set(nodes))}):
            boots.setdefault(node, {})[boot] = int(start)
        return Naming({id_: int(at) for id_, at in named}, boots, confirm_ms)

    # -- telemetry

    def fragments(self) -> list[dict[str, Any]]:
        """Rows of `fragments` with `at_ms` and `appended_ms`."""
        return self._dicts(_FRAGMENTS)

    def fragments_table(self, columns: Sequence[str]) -> Any:
        """The same as Arrow, with the ledger's columns."""
        sql = (
            "SELECT $columns FROM fragments FINAL "
            "WHERE minute = fromUnixTimestamp64Milli({minute:Int64}, 'UTC') AND gpu = {gpu:String}"
        )
        return self._store.table(sql.replace("$columns", ", ".join(columns)), self._parameters)

    def gaps(self, nodes: Iterable[str]) -> list[Gap]:
        """What agents of the nodes say they dropped."""
        rows = self._store.rows(_GAPS, {**self._parameters, "nodes": sorted(set(nodes))})
        return [Gap(n, run, int(a), int(b), int(t0), int(t1), int(k), why) for n, run, a, b, t0, t1, k, why in rows]

    # -- ledger

    def versions(self, pool: str) -> list[MinuteVersion]:
        """Every version of the pool's minute that is still stored, oldest first."""
        markers = {int(v): rest for v, *rest in self._store.rows(_MARKERS, self._of(pool))}
        rows: dict[int, list[Segment]] = {}
        for version, *row in self._store.rows(_GPU_ROWS, self._of(pool)):
            rows.setdefault(int(version), []).append(_segment(row))
        rows.pop(0, None)
        newest = max([*markers, *rows], default=0)
        out: list[MinuteVersion] = []
        for version in sorted({*markers, *rows}):
            service, complete, fragments = markers.get(version, (None, None, None))
            out.append(
                MinuteVersion(
                    epoch=version >> 96,
                    offset=version >> 40 & (1 << 56) - 1,
                    random=version & (1 << 40) - 1,
                    counts=version == newest,
                    complete=None if complete is None else bool(complete),
                    service_us=None if service is None else int(service),
                    fragments=None if fragments is None else int(fragments),
                    gpu_rows=rows.get(version, []),
                )
            )
        return out

    def stored(self, pool: str) -> list[Segment]:
        """The GPU's rows of the pool's minute that count."""
        return [_segment(row) for row in self._store.rows(_STORED, self._of(pool))]

    def unheld(self, pool: str) -> list[PoolRow]:
        """What the pool's minute says of time that nobody held."""
        rows = self._store.rows(_UNHELD, self._of(pool))
        return [PoolRow(kind, tenant, int(us), None if mj is None else int(mj)) for kind, tenant, us, mj in rows]

    def charges(self, pool: str, longest_ms: int) -> list[dict[str, Any]]:
        """Rows of `v_charges` of the price interval around the minute; none is longer than `longest_ms`."""
        return self._dicts(_CHARGES, **self._of(pool), since=self._minute_ms - max(longest_ms, HOUR_MS))

    def conflicts(self, names: Iterable[str]) -> list[Oddity]:
        """Conflicts that touch the minute and have one of the names as subject or other side."""
        hour = self._minute_ms // HOUR_MS * HOUR_MS
        rows = self._store.rows(_CONFLICTS, {**self._parameters, "hour": hour, "names": sorted(set(names))})
        return [Oddity(p, k, s, o, int(a), int(b), d) for p, k, s, o, a, b, d in rows]

    # -- around

    def close_names(self) -> list[str]:
        """The known GPUs with the most similar names."""
        return [gpu for (gpu,) in self._store.rows(_CLOSE, self._parameters)]

    def last_seen(self) -> int | None:
        """The newest minute in which any telemetry of the GPU is stored, looking back two days from its minute on."""
        since = self._minute_ms - 2 * _DAY_MS
        sql = (
            "SELECT toUnixTimestamp64Milli(max(minute)) FROM fragments WHERE gpu = {gpu:String} "
            "AND minute >= fromUnixTimestamp64Milli({since:Int64}, 'UTC') HAVING count() > 0"
        )
        rows = self._store.rows(sql, {**self._parameters, "since": since})
        return int(rows[0][0]) if rows else None

    def progress(self) -> Mapping[tuple[str, int], int]:
        """How far each partition has been stored, in broker time."""
        sql = "SELECT topic, partition, max(appended_ms) FROM progress GROUP BY topic, partition"
        return {(topic, int(partition)): int(ms) for topic, partition, ms in self._store.rows(sql)}

    def epoch(self) -> int:
        """The epoch in which marks are made now."""
        return int(self._store.rows("SELECT max(epoch) FROM epochs")[0][0])

    def _of(self, pool: str) -> dict[str, Any]:
        return {**self._parameters, "pool": pool}

    def _dicts(self, sql: str, **more: Any) -> list[dict[str, Any]]:
        answer = self._store.client.query(sql, parameters={**self._parameters, **more})
        return [dict(row) for row in answer.named_results()]


def _field(name: str, value: Any) -> str:
    """The field as our own encoder writes it."""
    return f'"{name}":{msgspec.json.encode(value).decode()}'


def _segment(row: Sequence[Any]) -> Segment:
    kind, tenant, job_id, instance, activity, us, mj = row
    return Segment(kind, tenant, job_id, int(instance), activity, int(us), None if mj is None else int(mj), [], [])
