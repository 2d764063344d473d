"""Whatever is changed behind the ledger's back, the audit names the place: each table, each kind of row, each kind of
fact whose dirty mark is withheld. On the real engine.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from gpuledger.cli.database import migrate_database
from gpuledger.schemas.config import ClickHouse
from gpuledger.schemas.events import (
    AccountRule,
    AssetCost,
    Commitment,
    EnergyTariff,
    Fact,
    Geometry,
    Instance,
    Job,
    Placement,
    PricePoint,
    RateCard,
    Tenant,
    Transfer,
)
from gpuledger.streams.audit import AuditReport, Finding, audit
from tests.fixtures.clickhouse import ClickHouse as Server
from tests.streams.small_ledger import (
    B200,
    END_MS,
    H100,
    HOUR_MS,
    MINUTE_MS,
    RULES,
    START_MS,
    SmallLedger,
    allocation,
    batches,
    minute,
    world,
)

pytestmark = pytest.mark.services

TABLES = {
    **{"ledger_minute": "minute", "ledger_gpu_minute": "minute", "ledger_gpu_hour": "hour"},
    **{"ledger_job_hour": "hour", "charges": "interval_start"},
}


def fact(kind: type[Any], id_: str, revision: int = 1, **fields: Any) -> Any:
    return kind(id=id_, revision=revision, claimed_at_ms=START_MS, **fields)


def of_account(tenant: str, account: str = "physics", revision: int = 1, start: int = 0) -> Tenant:
    rules = [AccountRule(match="account", value=account, start_ms=minute(start))]
    return fact(Tenant, tenant, revision, rules=rules)


@pytest.fixture(scope="module")
def template(clickhouse: Server) -> Iterator[SmallLedger]:
    """`small_ledger`'s world, and a job that runs on, whose tenant the account map tells and a boot can end."""
    name = f"template_{uuid.uuid4().hex}"
    made = SmallLedger(ClickHouse(url=clickhouse.url, database=name))
    migrate_database(made.settings)
    made.add(*world(), of_account("chem", "chem"), of_account("phys"))
    runs = {"node": "n9", "boot_id": "first", "account": "physics"}
    made.add(allocation("open", "g3", "", 60, None, **runs), allocation("two", "b1", "acme", 100, 150, node="n2"))
    made.add_batches(batches())
    boot(made, "first", minute(-60))
    naming = {"allocation_id": pa.array(["open"]), "named_ms": pa.array([END_MS], type=pa.int64())}
    made.store.insert("confirmed", pa.table(naming))
    made.stored_until(END_MS + 10 * MINUTE_MS)
    made.compute()
    yield made
    made.store.client.command(f"DROP DATABASE {name} SYNC")
    made.store.close()


@pytest.fixture
def ledger(template: SmallLedger) -> Iterator[SmallLedger]:
    """A copy that a test may change."""
    name = f"test_{uuid.uuid4().hex}"
    made = SmallLedger(replace_database(template.settings, name), offset=template.offset)
    migrate_database(made.settings)
    source = template.settings.database
    tables = template.store.rows(
        "SELECT name FROM system.tables WHERE database = {db:String} AND total_rows > 0", {"db": source}
    )
    for (table,) in tables:
        if not table.startswith("schema"):
            made.sql(f"INSERT INTO {table} SELECT * FROM {source}.{table}")
    yield made
    made.store.client.command(f"DROP DATABASE {name} SYNC")
    made.store.close()


def replace_database(settings: ClickHouse, name: str) -> ClickHouse:
    return msgspec.structs.replace(settings, database=name)


def boot(ledger: SmallLedger, boot_id: str, start_ms: int) -> None:
    rows = {"node": pa.array(["n9"]), "boot_id": pa.array([boot_id])}
    ledger.store.insert("boots", pa.table({**rows, "start_ms": pa.array([start_ms], type=pa.int64())}))


def audited(ledger: SmallLedger, **options: Any) -> AuditReport:
    """Without a sample: every row counts, not those drawn."""
    defaults: dict[str, Any] = {"sample": 0, "pauses_s": ()}
    return audit(ledger.store, RULES, START_MS, END_MS, **{**defaults, **options})


def place(finding: Finding) -> tuple[str, int]:
    return finding.pool, (finding.at_ms - START_MS) // MINUTE_MS


def at(n: int, column: str = "minute") -> str:
    return f"{column} = fromUnixTimestamp64Milli({minute(n)}, 'UTC')"


def test_the_ledger_is_right_before_anything_is_changed(ledger: SmallLedger) -> None:
    report = audited(ledger, sample=30)
    assert report.findings == [] and report.unhashed == 0
    tenants = {row[0] for row in ledger.store.rows("SELECT DISTINCT tenant FROM v_ledger_minute")}
    assert {"phys", "acme", "nord"} <= tenants


# ------------------------------------------------------------------------------------------------- rows of the ledger

#: Table, place and condition of a row that is there, and the GPU of it.
ROWS: dict[str, tuple[str, int, str, str]] = {
    "ledger_minute": (H100, 33, "kind = 'held' AND tenant = 'acme'", ""),
    "ledger_gpu_minute": (H100, 14, "gpu = 'g1' AND tenant = 'acme' AND activity = 'active'", "g1"),
    "ledger_gpu_hour": (H100, 60, "gpu = 'g1' AND tenant = 'acme' AND activity = 'unobserved'", "g1"),
    "ledger_job_hour": (H100, 60, "job_id = 'job-a1' AND activity = 'unobserved'", ""),
    "charges": (H100, 15, "job_id = 'job-a1' AND activity = 'active'", ""),
}


def where(table: str) -> str:
    pool, n, condition, _ = ROWS[table]
    return f"pool = '{pool}' AND {at(n, TABLES[table])} AND {condition}"


def named(ledger: SmallLedger, table: str, *, with_gpu: bool = True) -> AuditReport:
    """The report, whose first finding is at the table's place, with the GPU where the row has one."""
    pool, n, _, gpu = ROWS[table]
    report = audited(ledger)
    assert not report.balanced
    first = report.findings[0]
    assert place(first) in ((pool, n), (pool, n // 60 * 60)) and first.pool == pool
    assert (pool, n) in {place(finding) for finding in report.findings}
    assert not with_gpu or gpu in ("", first.gpu)
    return report


@pytest.mark.parametrize("table", sorted(TABLES))
def test_a_row_deleted(ledger: SmallLedger, table: str) -> None:
    before = ledger.store.rows(f"SELECT count() FROM {table}")[0][0]
    ledger.sql(f"ALTER TABLE {table} DELETE WHERE {where(table)}")
    assert before - ledger.store.rows(f"SELECT count() FROM {table}")[0][0] == 1
    named(ledger, table)


@pytest.mark.parametrize("table", sorted(TABLES))
def test_a_row_doubled(ledger: SmallLedger, table: str) -> None:
    ledger.copy_row(table, where(table), tenant="'nord'")
    named(ledger, table)


@pytest.mark.parametrize("table", sorted(TABLES))
def test_one_microsecond_moved_between_two_tenants(ledger: SmallLedger, table: str) -> None:
    """Every sum over tenants stays as it was."""
    other = where(table).replace("'acme'", "'nord'").replace("'job-a1'", "'job-a2'")
    kept = ledger.store.rows(f"SELECT sum(gpu_us) FROM {table}")
    ledger.sql(f"ALTER TABLE {table} UPDATE gpu_us = gpu_us + 1 WHERE {where(table)}")
    ledger.sql(f"ALTER TABLE {table} UPDATE gpu_us = gpu_us - 1 WHERE {other}")
    assert ledger.store.rows(f"SELECT sum(gpu_us) FROM {table}") == kept
    named(ledger, table)


@pytest.mark.parametrize("table", sorted(TABLES))
def test_one_millijoule(ledger: SmallLedger, table: str) -> None:
    ledger.sql(f"ALTER TABLE {table} UPDATE energy_mj = ifNull(energy_mj, 0) + 1 WHERE {where(table)}")
    named(ledger, table)


@pytest.mark.parametrize("table", sorted(TABLES))
def test_a_marker_removed(ledger: SmallLedger, table: str) -> None:
    pool, n, *_ = ROWS[table]
    ledger.sql(f"ALTER TABLE {table} DELETE WHERE pool = '{pool}' AND {at(n, TABLES[table])} AND kind = 'marker'")
    named(ledger, table, with_gpu=False)


@pytest.mark.parametrize("table", sorted(TABLES))
def test_all_rows_of_a_place_removed(ledger: SmallLedger, table: str) -> None:
    pool, n, *_ = ROWS[table]
    ledger.sql(f"ALTER TABLE {table} DELETE WHERE pool = '{pool}' AND {at(n, TABLES[table])}")
    named(ledger, table, with_gpu=False)


@pytest.mark.parametrize("table", sorted(TABLES))
def test_an_old_version_made_newest(ledger: SmallLedger, table: str) -> None:
    """What was right before a correction, with its own marker, put above what is right now."""
    pool, n, *_ = ROWS[table]
    there = f"pool = '{pool}' AND {at(n, TABLES[table])}"
    ledger.sql(f"CREATE TABLE old ENGINE = Memory AS SELECT * FROM {table} WHERE {there}")
    # The correction: a job on g1, which is shared by thirds, had two of them.
    ledger.add(replace_fact(allocation("a2", "g1", "nord", 12, 130, weight_num=2, weight_den=3), 2))
    ledger.add(fact(RateCard, "card", 2, pool=H100, currency="EUR", per_gpu_hour=Decimal(3), start_ms=START_MS))
    ledger.compute()
    assert audited(ledger).balanced
    names = ", ".join(row[0] for row in ledger.store.rows(f"DESCRIBE TABLE {table}") if row[0] != "version")
    newest = f"(SELECT max(version) + 1 FROM {table})"
    ledger.sql(f"INSERT INTO {table} ({names}, version) SELECT {names}, {newest} FROM old")
    report = audited(ledger)
    assert not report.balanced and (pool, n) in {place(finding) for finding in report.findings}


def replace_fact(made: Any, revision: int) -> Any:
    return msgspec.structs.replace(made, revision=revision)


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("charge", "+ toDecimal128('0.000000001', 9)"),
        ("asset_cost", "+ toDecimal128('0.000000001', 9)"),
        ("energy_cost", "- toDecimal128('0.000000001', 9)"),
        ("rate_card", "|| 'x'"),
        ("charge_currency", "|| 'x'"),
        ("incomplete", "+ 1"),
    ],
)
def test_a_charge_changed_by_a_nano_unit(ledger: SmallLedger, column: str, change: str) -> None:
    ledger.sql(f"ALTER TABLE charges UPDATE {column} = {column} {change} WHERE {where('charges')}")
    report = named(ledger, "charges")
    assert any("job job-a1" in f.subject or "job_id job-a1" in f.subject for f in report.findings)


def test_a_nano_unit_moved_between_two_tenants(ledger: SmallLedger) -> None:
    """The interval's cost is divided to the last nano-unit, and not as it was."""
    there = f"pool = 'h100' AND {at(15, 'interval_start')}"
    for sign, job in (("+", "job-a1"), ("-", "job-a2")):
        change = f"asset_cost = asset_cost {sign} toDecimal128('0.000000001', 9)"
        ledger.sql(f"ALTER TABLE charges UPDATE {change} WHERE {there} AND job_id = '{job}' AND activity = 'active'")
    report = audited(ledger)
    assert place(report.findings[0]) == (H100, 15)
    assert {f.check for f in report.findings} == {"stored charges", "recomputed money"}


def test_what_is_written_before_rows_had_hashes_is_compared_by_sums(ledger: SmallLedger) -> None:
    """An upgrade makes nothing look wrong; what sums can show is found all the same."""
    for table in TABLES:
        ledger.sql(f"ALTER TABLE {table} UPDATE rows_hash = 0 WHERE 1")
    ledger.sql("ALTER TABLE charges UPDATE rates_hash = 0 WHERE 1")
    # As formula 0 made it: without the account map, which is one rule for each of two tenants over all minutes.
    prints = "SELECT minute, facts_hash FROM v_recomputes WHERE pool = 'b200' ORDER BY minute"
    assert len(ledger.store.rows(prints)) == 180
    from gpuledger.streams.fingerprints import facts_hashes

    for pool in (H100, B200):
        facts = ledger.store.pool_facts(pool, START_MS, END_MS)
        hashes = facts_hashes(facts, START_MS, END_MS, RULES.confirm_ms, formula=0).tolist()
        told = ", ".join(map(str, hashes))
        ledger.sql(
            f"ALTER TABLE ledger_minute UPDATE facts_formula = 0, facts_hash = arrayElement([{told}], "
            f"toUInt32(intDiv(toUnixTimestamp64Milli(minute) - {START_MS}, 60000)) + 1) "
            f"WHERE pool = '{pool}' AND kind = 'marker'"
        )
    report = audited(ledger, sample=30)
    assert report.findings == [] and report.unhashed == report.minutes == 360
    ledger.sql(f"ALTER TABLE ledger_gpu_minute DELETE WHERE {at(14)} AND gpu = 'g2'")
    found = audited(ledger).findings
    assert place(found[0]) == (H100, 14) and found[0].gpu == "g2"


# ------------------------------------------------------------------------------------------------- fragments


def test_a_fragment_dropped(ledger: SmallLedger) -> None:
    ledger.sql(f"ALTER TABLE fragments DELETE WHERE {at(16)} AND gpu = 'g1' AND seq = 13")
    first = audited(ledger).findings[0]
    assert (place(first), first.gpu) == ((H100, 16), "g1") and first.check.startswith("fingerprint: fragments")


def test_a_fragment_altered_by_one_millisecond(ledger: SmallLedger) -> None:
    change = "segment_duration_ms = arrayMap((d, n) -> if(n = 1, d - 1, d), segment_duration_ms, "
    change += "arrayEnumerate(segment_duration_ms))"
    ledger.sql(f"ALTER TABLE fragments UPDATE {change} WHERE {at(16)} AND gpu = 'g1' AND seq = 13")
    first = audited(ledger).findings[0]
    assert (place(first), first.gpu, first.check) == ((H100, 16), "g1", "fingerprint: fragments' hash")


def test_a_fragment_that_is_stored_twice_is_no_finding(ledger: SmallLedger) -> None:
    """A redelivered batch: the same rows again, which a recompute reads once."""
    ledger.sql("SYSTEM STOP MERGES fragments")
    ledger.add_batches(batches())
    count, distinct = ledger.store.rows("SELECT count(), uniqExact(minute, gpu, seq) FROM fragments")[0]
    assert count == 2 * distinct
    assert audited(ledger, sample=10).findings == []


def test_a_fragment_moved_to_a_gpu_of_another_pool(ledger: SmallLedger) -> None:
    """The number of all fragments stays as it was."""
    row = ledger.store.rows(f"SELECT count() FROM fragments WHERE {at(16)} AND gpu = 'g1' AND seq = 13")
    assert row == [(1,)]
    ledger.copy_row("fragments", f"{at(16)} AND gpu = 'g1' AND seq = 13", gpu="'b1'")
    ledger.sql(f"ALTER TABLE fragments DELETE WHERE {at(16)} AND gpu = 'g1' AND seq = 13")
    found = {(f.pool, f.check) for f in audited(ledger).findings if f.at_ms == minute(16)}
    assert {(H100, "fingerprint: fragments"), (B200, "fingerprint: fragments")} <= found


# ------------------------------------------------------------------------------------------------- marks withheld


def store(*facts: Fact) -> Callable[[SmallLedger], None]:
    return lambda ledger: ledger.add(*facts)


DAY_END = START_MS + 24 * HOUR_MS
#: What is stored without a mark, and the first place that it changes.
WITHHELD: dict[str, tuple[Callable[[SmallLedger], None], str, int]] = {
    "placement": (store(fact(Placement, "p-new", gpu="new", node="n5", pool=B200, start_ms=minute(40))), B200, 40),
    "placement ended": (
        store(fact(Placement, "p-b1", 2, gpu="b1", node="n2", pool=B200, start_ms=START_MS, end_ms=minute(160))),
        *(B200, 0),
    ),
    "geometry": (
        store(
            fact(
                Geometry,
                "mig",
                gpu="g3",
                node="n0",
                instances=[Instance(1, minute(20), 3)],
                start_ms=minute(20),
                end_ms=minute(25),
            )
        ),
        *(H100, 20),
    ),
    "allocation": (store(allocation("late", "b1", "acme", 95, 97, node="n2")), B200, 95),
    "commitment": (
        store(fact(Commitment, "c1", pool=B200, tenant="nord", gpus=1, start_ms=minute(30), end_ms=minute(50))),
        *(B200, 30),
    ),
    "transfer": (
        store(
            fact(
                Transfer,
                "t0",
                pool=H100,
                gpus=1,
                from_tenant="acme",
                to_tenant="nord",
                start_ms=minute(50),
                end_ms=minute(55),
            )
        ),
        *(H100, 50),
    ),
    "job end": (
        store(fact(Job, "job-open", source="slurm", started_ms=minute(60), ended_ms=minute(140), state="COMPLETED")),
        *(H100, 140),
    ),
    "account map, another tenant": (store(of_account("phys", "other", 2), of_account("nord", start=100)), B200, 0),
    "account map, a new rule": (store(of_account("nord", "maths", start=130)), B200, 130),
    "boot": (lambda ledger: boot(ledger, "second", minute(125)), H100, 125),
    "naming": (
        lambda ledger: ledger.add(allocation("quiet", "b1", "", 170, None, node="n2", account="chem")),
        *(B200, 170),
    ),
    "rate card": (
        store(fact(RateCard, "card", 2, pool=H100, currency="EUR", per_gpu_hour=Decimal(3), start_ms=START_MS)),
        *(H100, 0),
    ),
    "rate card of a tenant": (
        store(
            fact(
                RateCard,
                "own",
                pool=H100,
                tenant="nord",
                currency="EUR",
                per_gpu_hour=Decimal(1),
                start_ms=minute(60),
                end_ms=minute(90),
            )
        ),
        *(H100, 60),
    ),
    "tariff": (
        store(
            fact(
                EnergyTariff,
                "power",
                2,
                currency="EUR",
                prices=[PricePoint(START_MS, Decimal("0.1")), PricePoint(minute(20), Decimal("-0.03"))],
                end_ms=DAY_END,
            )
        ),
        *(H100, 0),
    ),
    "asset cost": (
        store(
            fact(
                AssetCost,
                "cost-b200",
                pool=B200,
                currency="EUR",
                period_cost=Decimal(100),
                start_ms=minute(45),
                end_ms=minute(105),
            )
        ),
        *(B200, 45),
    ),
}


@pytest.mark.parametrize("what", sorted(WITHHELD))
def test_a_dirty_mark_withheld(ledger: SmallLedger, what: str) -> None:
    """A fact is stored and nothing is computed again: the minutes and intervals that it touches are named, from the
    first on; computed again, all is right."""
    change, pool, first = WITHHELD[what]
    change(ledger)
    report = audited(ledger)
    assert not report.balanced
    places = [place(finding) for finding in report.findings]
    assert places[0] == (pool, first), places
    assert {finding.check.split(":")[0] for finding in report.findings} <= {"fingerprint", "price interval"}
    ledger.compute()
    assert audited(ledger).findings == []


def test_a_mark_of_rates_withheld_that_only_the_minutes_took(ledger: SmallLedger) -> None:
    """Minutes that were computed again know the new rates; their charges do not, and that is named."""
    from gpuledger.streams.ledger_rows import Version
    from gpuledger.streams.recomputer import Recomputer

    change, pool, _ = WITHHELD["rate card"]
    change(ledger)
    Recomputer(ledger.store, RULES).minutes(pool, START_MS, END_MS, Version(1, 99, 1))
    report = audited(ledger)
    assert {finding.check for finding in report.findings} == {"fingerprint: rates"}


def test_each_finding_is_named_once_more_where_only_one_pool_is_asked_for(ledger: SmallLedger) -> None:
    """One pool's fragments are read by themselves, all pools' together: both ways see the same."""
    ledger.sql(f"ALTER TABLE fragments DELETE WHERE {at(16)} AND gpu = 'g1' AND seq = 13")
    ledger.sql(f"ALTER TABLE ledger_gpu_minute DELETE WHERE {at(14)} AND gpu = 'g2'")
    every, one = audited(ledger), audited(ledger, pools=[H100])
    assert every.findings == one.findings
    assert audited(ledger, pools=[B200]).balanced
