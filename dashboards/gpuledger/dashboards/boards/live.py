"""The first screen: what the fleet costs this second, who bears it, and where capacity has moved."""

from __future__ import annotations

from gpuledger.dashboards.panels import Annotation, Board, Column, Panel

__all__ = ["LIVE"]

_CURRENCY = Column("currency", "Currency", "currency")
_NO_MINUTES = (
    "No minute has been computed in the last ten. Start a worker (gpuledger worker run), and an agent or the simulator."
)
_NO_MONEY = "No costs yet. Tell GPULedger what the fleet costs: gpuledger rates apply FILE."

# Four panels with one text: the page runs it once. One row per currency and state, the totals on each of them.
_NOW = (
    "SELECT asset_currency AS currency, state, sum(gpus) AS state_gpus, "
    "sum(asset_cost_per_second) * 3600 AS state_cost_per_hour, sum(sum(gpus)) OVER () AS in_service, "
    "sum(sumIf(gpus, state NOT IN ('reserved_unused', 'free', 'unsliced'))) OVER () AS held, "
    "sum(sum(asset_cost_per_second)) OVER (PARTITION BY currency) AS cost_per_second, "
    "cost_per_second * 3600 AS cost_per_hour, "
    "sum(sumIf(asset_cost_per_second, state IN ('idle', 'reserved_unused', 'free', 'unsliced'))) "
    "OVER (PARTITION BY currency) * 3600 AS idle_per_hour, "
    "idle_per_hour / nullIf(cost_per_hour, 0) AS idle_share "
    "FROM v_live_now WHERE $__timeFilter(minute) GROUP BY currency, state "
    "ORDER BY currency DESC, indexOf(['active', 'idle', 'down', 'unobserved', 'pending', 'unconfirmed', "
    "'reserved_unused', 'free', 'unsliced'], state)"
)

COST_RATE = Panel(
    id="cost-rate",
    title="Cost per second",
    description="What the whole fleet costs its operator per second, right now: purchase, facility and energy, idle "
    "GPUs included. A jump follows energy price or GPUs entering service; no value means that no asset cost covers "
    "this minute: apply one with gpuledger rates apply.",
    kind="stat",
    sql=_NOW,
    columns=(
        _CURRENCY,
        Column("cost_per_second", "Cost per second", "value", "money_per_second"),
        Column("cost_per_hour", "an hour", "second", "money"),
    ),
    unit="money_per_second",
    empty=_NO_MINUTES,
    width=5,
    height=4,
)

SPENT_TODAY = Panel(
    id="spent-today",
    title="Spent today",
    description="Asset cost since midnight UTC, to the nano-unit the sum of all tenants, idle capacity and what "
    "nobody could be found for. The open price interval is an estimate until its minutes are complete. If it stands "
    "still, the ledger is behind: see Ledger health.",
    kind="stat",
    sql="SELECT currency, sum(asset_cost) AS spent, sumIf(asset_cost, estimate = 1) AS estimated FROM v_money "
    "WHERE $__timeFilter(interval_start) AND isNotNull(asset_cost) GROUP BY currency ORDER BY currency",
    columns=(
        _CURRENCY,
        Column("spent", "Spent", "value", "money"),
        Column("estimated", "still an estimate", "second", "money"),
    ),
    unit="money",
    empty=_NO_MONEY,
    width=5,
    height=4,
    range="today",
    refresh_s=3,
)

CHARGED_TODAY = Panel(
    id="charged-today",
    title="Charged today",
    description="What tenants owe by their rate cards since midnight UTC. Well below Spent today means the fleet "
    "does not earn its cost: look at the idle money beside it, then at the rate cards.",
    kind="stat",
    sql="SELECT currency, sum(charge) AS charged, uniqExactIf(tenant, charge > 0) AS tenants FROM v_money "
    "WHERE $__timeFilter(interval_start) AND isNotNull(charge) GROUP BY currency ORDER BY currency",
    columns=(
        _CURRENCY,
        Column("charged", "Charged", "value", "money"),
        Column("tenants", "tenants", "second", "count"),
    ),
    unit="money",
    empty="No rate card covers today. Apply one: gpuledger rates apply FILE.",
    width=5,
    height=4,
    range="today",
    refresh_s=3,
)

GPUS_HELD = Panel(
    id="gpus-held-now",
    title="GPUs held",
    description="GPUs that jobs hold now, of those in service. A low share is capacity without work: see which part "
    "is reserved and unused, and which is free.",
    kind="stat",
    sql=_NOW,
    columns=(
        Column("held", "GPUs held", "value", "gpus"),
        Column("in_service", "in service", "second", "gpus"),
    ),
    unit="gpus",
    empty=_NO_MINUTES,
    width=4,
    height=4,
)

IDLE_MONEY = Panel(
    id="idle-money",
    title="Idle money per hour",
    description="Asset cost per hour of GPUs that do nothing: held but idle, reserved but unused, and free. It is "
    "the money a better placed job would save: start with the largest tenant under Fleet now.",
    kind="stat",
    sql=_NOW,
    columns=(
        _CURRENCY,
        Column("idle_per_hour", "Idle money per hour", "value", "money_per_hour"),
        Column("idle_share", "of all cost", "second", "share"),
    ),
    unit="money_per_hour",
    empty=_NO_MINUTES,
    width=5,
    height=4,
)

COST_BY_TENANT = Panel(
    id="cost-by-tenant",
    title="Cost per second by tenant",
    description="Asset cost per second that each tenant bears; together they are the cost of the whole fleet. "
    "(operator) bears what nobody holds or reserved. A tenant that grows without new jobs pays for idle reservations: "
    "offer them with gpuledger capacity apply.",
    kind="timeseries",
    sql="SELECT minute, payer, asset_currency AS currency, sum(asset_cost_per_second) AS cost_per_second "
    "FROM v_cost_minute(since = $__fromTime, until = $__toTime) GROUP BY minute, payer, currency "
    "ORDER BY minute, payer, currency",
    columns=(
        Column("minute", "Minute", "time", "time"),
        Column("payer", "Tenant", "series"),
        _CURRENCY,
        Column("cost_per_second", "Cost per second", "value", "money_per_second"),
    ),
    key=("minute", "payer", "currency"),
    unit="money_per_second",
    empty="No minutes with costs in this hour. Start a worker and apply an asset cost: gpuledger rates apply FILE.",
    width=16,
    height=9,
    refresh_s=2,
)

FLEET_NOW = Panel(
    id="fleet-now",
    title="Fleet now",
    description="Every GPU in service, by what happens with it: working, held but idle, reserved but unused, free, in "
    "no MIG instance (unsliced), or held and not seen. Idle: ask its holder. Reserved and unused: offer it. Not seen: "
    "its agent is silent. How held time splits follows the last three minutes seen.",
    kind="bargauge",
    sql=_NOW,
    columns=(
        Column("state", "State", "category"),
        Column("state_gpus", "GPUs", "value", "gpus"),
        Column("state_cost_per_hour", "Cost per hour", "second", "money_per_hour"),
        _CURRENCY,
    ),
    unit="gpus",
    empty=_NO_MINUTES,
    width=8,
    height=9,
)

HELD_BY_TENANT = Panel(
    id="held-by-tenant",
    title="GPUs held by tenant",
    description="GPUs that each tenant's jobs hold, minute by minute; a dashed line marks a capacity transfer taking "
    "effect. If the receiver's share does not grow after the line, its reservation stands unused.",
    kind="timeseries",
    sql="SELECT minute, tenant, sum(gpus) AS gpus FROM v_gpus_minute "
    "WHERE $__timeFilter(minute) AND kind IN ('held', 'unconfirmed') GROUP BY minute, tenant ORDER BY minute, tenant",
    columns=(
        Column("minute", "Minute", "time", "time"),
        Column("tenant", "Tenant", "series"),
        Column("gpus", "GPUs", "value", "gpus"),
    ),
    key=("minute", "tenant"),
    unit="gpus",
    empty="No GPU was held in this hour. Allocations come from agents, Slurm or Kubernetes: see gpuledger status.",
    width=16,
    height=9,
    refresh_s=2,
)

LAST_SHIFT = Panel(
    id="last-shift",
    title="Last capacity shift",
    description="What each tenant had reserved before and after the last transfer that took effect; the bold band "
    "changed hands. Numbers you do not expect: gpuledger capacity list names who entered the transfer, and why. "
    "(Grafana has no Sankey diagram of its own and shows the same rows as a table.)",
    kind="sankey",
    sql="SELECT from_tenant, to_tenant, gpus, moved, shift_at FROM v_last_shift ORDER BY from_tenant, moved, to_tenant",
    columns=(
        Column("from_tenant", "Before", "source"),
        Column("to_tenant", "After", "target"),
        Column("gpus", "GPUs", "value", "gpus"),
        Column("moved", "Changed hands", "mark"),
        Column("shift_at", "In effect since", "detail", "time"),
    ),
    unit="gpus",
    empty="No capacity has changed hands yet. Enter a transfer: gpuledger capacity apply FILE.",
    width=8,
    height=9,
    refresh_s=5,
)

MONEY_BY_TENANT = Panel(
    id="money-by-tenant",
    title="Money so far today by tenant",
    description="Since midnight UTC: the asset cost each tenant bears, and what its rate cards charge it. Charged less "
    "than borne: the tenant is priced under cost. No charge at all: no rate card names it.",
    kind="barchart",
    sql="SELECT tenant, currency, sum(asset_cost) AS asset_cost, sum(charge) AS charge FROM v_money "
    "WHERE $__timeFilter(interval_start) AND currency != '' GROUP BY tenant, currency "
    "ORDER BY asset_cost DESC NULLS LAST, tenant LIMIT 50",
    columns=(
        Column("tenant", "Tenant", "category"),
        _CURRENCY,
        Column("asset_cost", "Asset cost", "value", "money"),
        Column("charge", "Charged", "second", "money"),
    ),
    key=("tenant", "currency"),
    unit="money",
    empty=_NO_MONEY,
    width=10,
    height=9,
    range="today",
    refresh_s=5,
)

MONEY_BY_POOL = Panel(
    id="money-by-pool",
    title="Money so far today by pool",
    description="Asset cost of each pool since midnight UTC, whoever bears it. A pool that costs more than its share "
    "of the work is a candidate for other jobs, or for a transfer.",
    kind="donut",
    sql="SELECT pool, currency, sum(asset_cost) AS cost FROM v_money "
    "WHERE $__timeFilter(interval_start) AND isNotNull(asset_cost) GROUP BY pool, currency "
    "ORDER BY cost DESC, pool LIMIT 50",
    columns=(Column("pool", "Pool", "category"), _CURRENCY, Column("cost", "Asset cost", "value", "money")),
    key=("pool", "currency"),
    unit="money",
    empty=_NO_MONEY,
    width=6,
    height=9,
    range="today",
    refresh_s=5,
)

TRANSFERS = Panel(
    id="transfers",
    title="Transfers of a day, and to come",
    description="Capacity transfers of the last 24 hours and all that are planned, soonest last. One that should not "
    "happen is withdrawn by applying it again with state cancelled: gpuledger capacity apply FILE.",
    kind="table",
    sql="SELECT start_at, if(start_at > now64(3, 'UTC'), 'planned', 'done') AS status, gpus, from_tenant, to_tenant, "
    "pool, why FROM v_transfers WHERE state != 'cancelled' AND (start_at > now64(3, 'UTC') OR "
    "($__timeFilter(start_at))) ORDER BY start_at DESC LIMIT 100",
    columns=(
        Column("start_at", "When", "time", "time"),
        Column("status", "State", "detail", "status"),
        Column("gpus", "GPUs", "value", "count"),
        Column("from_tenant", "From", "series"),
        Column("to_tenant", "To", "series"),
        Column("pool", "Pool"),
        Column("why", "Why"),
    ),
    empty="No transfer in the last day and none planned. Enter one: gpuledger capacity apply FILE.",
    look="moves",
    width=8,
    height=9,
    range="24h",
    refresh_s=5,
)

RUNNING_JOBS = Panel(
    id="running-jobs",
    title="Running jobs",
    description="Jobs that hold GPUs now, the most expensive first, with their cost so far and the share of observed "
    "time in which they worked. A low share on many GPUs is worth a call to its user.",
    kind="table",
    sql="SELECT job_id, name, tenant, user, gpus, active_share, asset_cost, charge, asset_currency AS currency, "
    "started_at, nullIf(cost_since, started_at) AS cost_since FROM v_running_jobs WHERE started_at <= $__toTime "
    "ORDER BY asset_cost DESC NULLS LAST, job_id LIMIT 200",
    columns=(
        Column("job_id", "Job", "category"),
        Column("name", "Name", "under"),
        Column("tenant", "Tenant", "series"),
        Column("user", "User"),
        Column("gpus", "GPUs", "value", "count"),
        Column("active_share", "Working", "value", "share"),
        Column("asset_cost", "Cost so far", "value", "money"),
        Column("charge", "Charged", "second", "money"),
        _CURRENCY,
        Column("started_at", "Started", "detail", "time"),
        Column("cost_since", "Cost since", "detail", "time"),
    ),
    empty="No job holds a GPU. Allocations come from agents, Slurm or Kubernetes: see gpuledger status.",
    width=16,
    height=10,
    refresh_s=5,
)

HEALTH = Panel(
    id="ledger-health",
    title="Ledger health",
    description="Whether the figures on this screen can be trusted: how fresh and complete the ledger is, and whether "
    "time and money add up. Each line that is not ok says what to do; gpuledger audit proves it in depth.",
    kind="table",
    sql="SELECT name, value, status, action FROM v_live_health ORDER BY position",
    columns=(
        Column("name", "Check", "category"),
        Column("value", "Now", "value"),
        Column("status", "Status", "detail", "status"),
        Column("action", "What to do"),
    ),
    empty="The ledger has no checks. Bring the database up to date: gpuledger db migrate.",
    look="checks",
    width=8,
    height=10,
)

ALERTS = Panel(
    id="alerts",
    title="Alerts firing",
    description="Rules that fire now, with the money at stake. Follow the action of each; it resolves by itself when "
    "its cause is gone.",
    kind="table",
    sql="SELECT severity, summary, tenant, pool, money_per_hour, currency, started_at, action FROM v_alerts "
    "WHERE status = 'firing' ORDER BY money_per_hour DESC NULLS LAST, started_at LIMIT 100",
    columns=(
        Column("severity", "Severity", "detail", "status"),
        Column("summary", "What"),
        Column("tenant", "Tenant", "series"),
        Column("pool", "Pool"),
        Column("money_per_hour", "At stake", "value", "money_per_hour"),
        _CURRENCY,
        Column("started_at", "Since", "time", "time"),
        Column("action", "What to do"),
    ),
    empty="No alert is firing.",
    look="alerts",
    width=10,
    height=7,
    refresh_s=2,
)

GAPS = Panel(
    id="telemetry-gaps",
    title="Telemetry gaps of a day",
    description="Batches that never came: an agent had no broker for longer than its spool holds, and dropped the "
    "oldest. The ledger has this time as unobserved; who held the GPUs, and what it costs, stands. Again and again: "
    "set a larger agent.spool_max_bytes, or see why the node loses its broker.",
    kind="table",
    sql="SELECT to_at, from_at, node, batches, reason FROM v_gaps WHERE $__timeFilter(to_at) "
    "ORDER BY to_at DESC, node, from_at LIMIT 100",
    columns=(
        Column("to_at", "To", "time", "time"),
        Column("from_at", "From", "detail", "time"),
        Column("node", "Node", "series"),
        Column("batches", "Batches", "value", "count"),
        Column("reason", "Why"),
    ),
    empty="No spool has dropped telemetry in the last day.",
    look="gaps",
    width=7,
    height=7,
    range="24h",
    refresh_s=5,
)

MINUTES = Panel(
    id="ledger-minutes",
    title="Ledger minutes by pool",
    description="Each minute of each pool: complete, still open (the last two or three are), or unbalanced, which "
    "must never be. For an unbalanced or long open minute run gpuledger audit, then gpuledger ledger recompute.",
    kind="statetimeline",
    sql="SELECT minute, pool, state FROM v_minute_state WHERE $__timeFilter(minute) ORDER BY minute, pool",
    columns=(
        Column("minute", "Minute", "time", "time"),
        Column("pool", "Pool", "series"),
        Column("state", "State", "value", "status"),
    ),
    key=("minute", "pool"),
    unit="status",
    empty="No minute has been computed in this hour. Start a worker: gpuledger worker run.",
    width=7,
    height=7,
    refresh_s=5,
)

LIVE = Board(
    id="live",
    title="Live TCO and capacity shifts",
    description="What the fleet costs this second, who bears it, what stands idle, and where capacity has moved.",
    panels=(
        COST_RATE,
        SPENT_TODAY,
        CHARGED_TODAY,
        GPUS_HELD,
        IDLE_MONEY,
        COST_BY_TENANT,
        FLEET_NOW,
        HELD_BY_TENANT,
        LAST_SHIFT,
        MONEY_BY_TENANT,
        MONEY_BY_POOL,
        TRANSFERS,
        RUNNING_JOBS,
        HEALTH,
        ALERTS,
        GAPS,
        MINUTES,
    ),
    annotations=(
        Annotation(
            id="transfer-marks",
            title="Capacity transfers",
            sql="SELECT start_at AS time, concat(toString(sum(gpus)), ' GPUs ', from_tenant, ' → ', to_tenant) AS text "
            "FROM v_transfers WHERE state = 'active' AND $__timeFilter(start_at) "
            "GROUP BY start_at, from_tenant, to_tenant ORDER BY time",
        ),
    ),
    status="ledger-health",
)
