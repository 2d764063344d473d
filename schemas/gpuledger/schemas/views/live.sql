-- What the live board reads. Business rules live here, so that a panel is one SELECT. The payer (or tenant) of what
-- nobody holds is shown as '(operator)'; parentheses keep it apart from a tenant of that name.
-- Views with {since} and {until} are called like tables: v_cost_minute(since = $__fromTime, until = $__toTime); the
-- bounds then reach the partitions and keys of both the ledger and the charges, which no outer filter could.

-- Cost and charge of each minute, from the price interval it lies in. Money is made per price interval; inside it, it
-- is spread by GPU time:
--   cost of a minute = asset_cost(interval, tenant, kind, payer)
--       x gpu_us(minute, tenant, kind) / gpu_us(interval, tenant, kind)
-- so the minutes of an interval sum to what was charged for it (but for the last nano-unit), and a second costs a
-- sixtieth. Four cases stand outside the formula, the first two marked as estimates:
--   a minute that no interval covers yet (money is made a little after GPU time) takes the rates of the last one
--   before it, at most an hour old;
--   a tenant and kind without money there takes its pool's average per GPU time; without any, NULL;
--   cost without any GPU time (nothing in service) is spread evenly over the minutes of its interval;
--   `pending` time is held, reserved or free like any other: only what it did is not known yet. So the open minute
--   counts whole, as it will be if nothing changes, and a rate read from it is steady from its first second.
CREATE OR REPLACE VIEW v_cost_minute AS
WITH
intervals AS (
    SELECT pool, interval_start, interval_end, toInt128(service_us) AS service_us, asset_cost, asset_currency, estimate
    FROM v_asset_cost
    WHERE interval_start >= {since:DateTime64(3, 'UTC')} - INTERVAL 1 HOUR
        AND interval_start <= {until:DateTime64(3, 'UTC')}
        -- A marker without length replaces an interval that a later change of rates has moved.
        AND interval_end > interval_start
),
money AS (
    SELECT pool, interval_start, tenant, kind, payer, asset_currency, charge_currency, cost, charge, lacks, 1 AS known,
        sum(us) OVER (PARTITION BY pool, interval_start, tenant, kind) AS key_us,
        -- Money without GPU time finds its minutes by their markers.
        if(key_us = 0, '', tenant) AS at_tenant, if(key_us = 0, 'marker', kind) AS at_kind
    FROM (
        SELECT pool, interval_start, tenant, kind, payer, max(asset_currency) AS asset_currency,
            max(charge_currency) AS charge_currency, sum(asset_cost) AS cost, sum(charge) AS charge,
            max(incomplete OR isNull(asset_cost)) AS lacks, sum(toInt128(gpu_us)) AS us
        FROM v_charges AS c
        WHERE interval_start >= {since:DateTime64(3, 'UTC')} - INTERVAL 1 HOUR
            AND interval_start <= {until:DateTime64(3, 'UTC')}
        GROUP BY pool, interval_start, tenant, kind, payer
    )
),
minutes AS (
    SELECT l.pool AS pool, l.minute AS minute, l.tenant AS tenant, l.kind AS kind, l.activity AS activity,
        l.us AS us, l.complete AS complete, i.interval_start AS interval_start, i.interval_end AS interval_end,
        i.service_us AS service_us, i.asset_cost AS pool_cost, i.asset_currency AS pool_currency,
        i.estimate AS estimate
    FROM (
        SELECT pool, minute, tenant, kind, activity, complete, toInt128(gpu_us) AS us
        FROM (
            SELECT pool, minute, tenant, kind, activity, complete, gpu_us, version,
                max(version) OVER (PARTITION BY pool, minute) AS newest
            FROM ledger_minute
            WHERE minute >= {since:DateTime64(3, 'UTC')} AND minute <= {until:DateTime64(3, 'UTC')}
        )
        WHERE version = newest AND kind NOT IN ('overcommitted', 'unallocated')
    ) AS l
    ASOF LEFT JOIN intervals AS i ON l.pool = i.pool AND l.minute >= i.interval_start
)
SELECT pool, minute, tenant, if(payer = '', '(operator)', payer) AS payer, kind, activity, gpu_us, asset_currency,
    charge_currency,
    CAST(round(cost, 9), 'Nullable(Decimal(38, 9))') AS asset_cost,
    CAST(round(cost / 60, 9), 'Nullable(Decimal(38, 9))') AS asset_cost_per_second,
    CAST(round(charged, 9), 'Nullable(Decimal(38, 9))') AS charge,
    CAST(round(charged / 60, 9), 'Nullable(Decimal(38, 9))') AS charge_per_second,
    complete, estimate, incomplete
FROM (
    SELECT m.pool AS pool, m.minute AS minute, m.activity AS activity, m.complete AS complete,
        if(m.kind = 'marker', c.tenant, m.tenant) AS tenant, if(m.kind = 'marker', c.kind, m.kind) AS kind,
        multiIf(c.known = 1, c.payer, m.kind IN ('free', 'unsliced'), '', m.kind = 'unconfirmed', 'unattributed', m.tenant) AS payer,
        -- Where payers share a tenant's time, each has its own row; the time is told once.
        if(m.kind = 'marker' OR (c.known = 1 AND row_number() OVER
            (PARTITION BY m.pool, m.minute, m.tenant, m.kind, m.activity ORDER BY c.payer) > 1), 0, m.us) AS gpu_us,
        if(m.kind = 'marker', 1, m.us) AS part,
        multiIf(m.kind = 'marker', toInt128(dateDiff('minute', m.interval_start, m.interval_end)),
            c.known = 1, c.key_us,
            m.service_us) AS whole,
        if(c.known = 1, c.asset_currency, m.pool_currency) AS asset_currency, c.charge_currency AS charge_currency,
        toDecimal256(if(c.known = 1, c.cost, m.pool_cost), 18) * part / nullIf(toInt256(whole), 0) AS cost,
        if(c.known = 1, toDecimal256(c.charge, 18) * part / nullIf(toInt256(whole), 0), NULL) AS charged,
        if(c.known = 1 AND m.minute < m.interval_end, m.estimate, 1) AS estimate, c.lacks AS incomplete
    FROM minutes AS m
    LEFT JOIN money AS c
        ON m.pool = c.pool AND m.tenant = c.at_tenant AND m.kind = c.at_kind
            AND m.interval_start = c.interval_start
    WHERE m.kind != 'marker' OR c.known = 1
);

-- The fleet as it is, from the newest minute of each pool (none older than ten minutes: then nothing is known now).
-- How many GPUs are held, reserved or free comes from that minute's intervals, its pending time included. What held
-- time does is not known yet for all of it: it is split as the last three minutes' seen time of the same tenant was;
-- where nothing was seen it says pending. `state`: active, idle, unobserved, down, pending (all held), unconfirmed,
-- reserved_unused, free, unsliced. Rates as in v_cost_minute.
CREATE OR REPLACE VIEW v_live_now AS
WITH
newest AS (
    SELECT pool, max(minute) AS last FROM v_recomputes
    WHERE minute >= now64(3, 'UTC') - INTERVAL 10 MINUTE AND minute <= now64(3, 'UTC') GROUP BY pool
),
present AS (
    SELECT r.pool AS pool, r.minute AS minute, r.tenant AS tenant, r.payer AS payer, r.kind AS kind,
        max(r.asset_currency) AS asset_currency, max(r.charge_currency) AS charge_currency, sum(r.gpu_us) AS us,
        sum(r.asset_cost_per_second) AS cost, sum(r.charge_per_second) AS charge
    FROM v_cost_minute(since = now64(3, 'UTC') - INTERVAL 10 MINUTE, until = now64(3, 'UTC')) AS r
    INNER JOIN newest AS n ON r.pool = n.pool AND r.minute = n.last
    GROUP BY r.pool, r.minute, r.tenant, r.payer, r.kind
),
seen AS (
    SELECT pool, tenant, 'held' AS kind, activity, us, sum(us) OVER (PARTITION BY pool, tenant) AS all_us, 1 AS known
    FROM (
        SELECT l.pool AS pool, l.tenant AS tenant, l.activity AS activity, sum(toInt128(l.gpu_us)) AS us
        FROM v_ledger_minute AS l INNER JOIN newest AS n ON l.pool = n.pool
        WHERE l.minute >= now64(3, 'UTC') - INTERVAL 15 MINUTE AND l.minute > n.last - INTERVAL 3 MINUTE
            AND l.kind = 'held' AND l.activity NOT IN ('pending', '')
        GROUP BY pool, tenant, activity
        HAVING us > 0
    )
)
SELECT p.pool AS pool, p.minute AS minute, p.tenant AS tenant, p.payer AS payer,
    multiIf(p.kind != 'held', p.kind, s.known = 1, s.activity, 'pending') AS state,
    CAST(round(toDecimal256(p.us, 18) * if(s.known = 1, s.us, 1) / if(s.known = 1, s.all_us, 1) / 60000000, 6),
        'Decimal(38, 6)') AS gpus,
    p.asset_currency AS asset_currency, p.charge_currency AS charge_currency,
    CAST(round(toDecimal256(p.cost, 18) * if(s.known = 1, s.us, 1) / if(s.known = 1, s.all_us, 1), 9),
        'Nullable(Decimal(38, 9))') AS asset_cost_per_second,
    CAST(round(toDecimal256(p.charge, 18) * if(s.known = 1, s.us, 1) / if(s.known = 1, s.all_us, 1), 9),
        'Nullable(Decimal(38, 9))') AS charge_per_second
FROM present AS p
LEFT JOIN seen AS s ON p.pool = s.pool AND p.tenant = s.tenant AND p.kind = s.kind;

-- GPUs of each minute by who has them. `pending` time counts: who holds a GPU is known, what it does there not yet.
CREATE OR REPLACE VIEW v_gpus_minute AS
SELECT pool, minute, tenant, kind, CAST(toDecimal128(sum(toInt128(gpu_us)), 6) / 60000000, 'Decimal(38, 6)') AS gpus,
    min(complete) AS complete
FROM v_ledger_minute
GROUP BY pool, minute, tenant, kind;

-- Money by tenant: the asset cost it bears and the charges it owes, per price interval. One row has one of the two.
CREATE OR REPLACE VIEW v_money AS
SELECT pool, interval_start, interval_end, if(payer = '', '(operator)', payer) AS tenant, kind,
    asset_currency AS currency, asset_cost, CAST(NULL, 'Nullable(Decimal(38, 9))') AS charge, estimate, incomplete
FROM v_charges
UNION ALL
SELECT pool, interval_start, interval_end, tenant, kind, charge_currency AS currency,
    CAST(NULL, 'Nullable(Decimal(38, 9))') AS asset_cost, charge, estimate, 0 AS incomplete
FROM v_charges WHERE isNotNull(charge) AND tenant != '';

-- The last capacity shift: what each tenant of the pools concerned had reserved just before and just after it.
-- `moved` = 1 for the GPUs that changed hands. Several transfers of one instant are one shift.
-- A tenant that sent more than it had keeps nothing here, and the excess is a row of v_conflicts.
CREATE OR REPLACE VIEW v_last_shift AS
WITH
(SELECT max(start_at) FROM v_transfers WHERE state = 'active' AND start_at <= now64(3, 'UTC')) AS shift_at,
moves AS (
    SELECT pool, from_tenant, to_tenant, sum(toInt64(gpus)) AS n FROM v_transfers
    WHERE state = 'active' AND start_at = shift_at GROUP BY pool, from_tenant, to_tenant
),
reserved AS (
    SELECT pool, tenant, toInt64(gpus) AS n FROM v_commitments
    WHERE state = 'active' AND start_at <= shift_at AND (isNull(end_at) OR end_at > shift_at)
    UNION ALL
    SELECT pool, tenant, n FROM (
        SELECT pool, [from_tenant, to_tenant] AS tenants, [-toInt64(gpus), toInt64(gpus)] AS ns FROM v_transfers
        WHERE state = 'active' AND start_at < shift_at AND (isNull(end_at) OR end_at > shift_at)
    ) ARRAY JOIN tenants AS tenant, ns AS n
    UNION ALL
    SELECT pool, from_tenant AS tenant, -n AS n FROM moves
)
SELECT shift_at, from_tenant, to_tenant, sum(n) AS gpus, 1 AS moved FROM moves GROUP BY from_tenant, to_tenant
UNION ALL
SELECT shift_at, tenant AS from_tenant, tenant AS to_tenant, sum(kept) AS gpus, 0 AS moved
FROM (
    SELECT pool, tenant, sum(n) AS kept FROM reserved WHERE pool IN (SELECT pool FROM moves) GROUP BY pool, tenant
) WHERE kept > 0 GROUP BY tenant;

-- Jobs that hold GPUs now, with the money of their price intervals so far. Reads charges back to the start of the
-- oldest of them, at most 31 days: `cost_since` says from when. GPU time that nobody saw is in neither share.
CREATE OR REPLACE VIEW v_running_jobs AS
WITH running AS (
    SELECT job_id, any(tenant) AS claimed_tenant, any(user) AS user, any(source) AS source, min(start_at) AS started_at,
        uniqExact(gpu) AS gpus
    FROM v_allocations
    WHERE start_at <= now64(3, 'UTC') AND (isNull(end_at) OR end_at > now64(3, 'UTC'))
    GROUP BY job_id
),
(SELECT greatest(min(started_at), now64(3, 'UTC') - INTERVAL 31 DAY) FROM running) AS oldest
SELECT r.job_id AS job_id, if(c.tenant != '', c.tenant, r.claimed_tenant) AS tenant, r.user AS user, j.name AS name,
    r.gpus AS gpus, r.started_at AS started_at, greatest(r.started_at, oldest) AS cost_since,
    toInt128(c.us) AS gpu_us,
    CAST(if(c.observed_us > 0, round(toDecimal256(c.active_us, 12) / c.observed_us, 6), NULL),
        'Nullable(Decimal(38, 6))') AS active_share,
    c.asset_currency AS asset_currency, c.asset_cost AS asset_cost, c.charge_currency AS charge_currency,
    c.charge AS charge
FROM running AS r
LEFT JOIN (
    SELECT job_id, any(tenant) AS tenant, sum(toInt128(gpu_us)) AS us,
        sumIf(toInt128(gpu_us), activity = 'active') AS active_us,
        sumIf(toInt128(gpu_us), activity IN ('active', 'idle')) AS observed_us,
        max(asset_currency) AS asset_currency, sum(asset_cost) AS asset_cost,
        max(charge_currency) AS charge_currency, sum(charge) AS charge
    FROM v_charges
    WHERE job_id != '' AND interval_start >= oldest - INTERVAL 1 HOUR
    GROUP BY job_id
) AS c ON r.job_id = c.job_id
LEFT JOIN (SELECT job_id, name FROM v_jobs WHERE job_id IN (SELECT job_id FROM running)) AS j ON r.job_id = j.job_id;

-- Each minute of a pool as the ledger has it: complete, open, or unbalanced (its segments do not sum to its GPU time).
CREATE OR REPLACE VIEW v_minute_state AS
SELECT pool, minute, service_us, segments_us, complete,
    multiIf(segments_us != service_us, 'unbalanced', complete = 1, 'complete', 'open') AS state
FROM (
    SELECT pool, minute, sumIf(toInt128(gpu_us), kind = 'marker') AS service_us, max(complete) AS complete,
        sumIf(toInt128(gpu_us), kind IN ('held', 'unconfirmed', 'reserved_unused', 'free', 'unsliced')) AS segments_us
    FROM (SELECT *, max(version) OVER (PARTITION BY pool, minute) AS newest FROM ledger_minute)
    WHERE version = newest
    GROUP BY pool, minute
);

-- The ledger's own health: one row per check, worst news in `status` (ok, warn, bad, unknown) and what to do about it.
-- Looks at the last hour; dead letters, conflicts and what spools dropped at the last day.
CREATE OR REPLACE VIEW v_live_health AS
WITH now64(3, 'UTC') AS at,
stored AS (
    SELECT count() AS n, dateDiff('second', min(newest), at) AS age
    FROM (SELECT topic, max(appended_at) AS newest FROM v_progress WHERE topic LIKE '%telemetry' GROUP BY topic)
),
newest AS (
    SELECT count() AS n, dateDiff('second', min(until), at) - 60 AS lag
    FROM (
        SELECT pool, maxIf(minute, complete = 1) AS until FROM v_minute_state WHERE minute >= at - INTERVAL 1 HOUR
        GROUP BY pool
    )
),
hour AS (
    SELECT countIf(minute < at - INTERVAL 4 MINUTE) AS due,
        countIf(minute < at - INTERVAL 4 MINUTE AND complete = 1) AS complete,
        count() AS n, countIf(state = 'unbalanced') AS unbalanced
    FROM v_minute_state WHERE minute >= at - INTERVAL 1 HOUR
),
seen AS (
    SELECT sumIf(toInt128(gpu_us), activity IN ('active', 'idle', 'down')) AS seen, sum(toInt128(gpu_us)) AS held
    FROM v_ledger_minute WHERE minute >= at - INTERVAL 1 HOUR AND kind = 'held' AND activity != 'pending'
),
money AS (
    SELECT count() AS n, countIf(isNotNull(due) AND due != ifNull(spread, toDecimal128(0, 9))) AS off
    FROM (
        SELECT sumIf(asset_cost, kind = 'marker') AS due, sumIf(asset_cost, kind != 'marker') AS spread
        FROM (SELECT *, max(version) OVER (PARTITION BY pool, interval_start) AS newest FROM charges)
        WHERE version = newest AND interval_start >= at - INTERVAL 1 HOUR
        GROUP BY pool, interval_start
    )
),
dead AS (SELECT count() AS n FROM v_dead_letters WHERE appended_at >= at - INTERVAL 1 DAY),
odd AS (SELECT count() AS n FROM v_conflicts WHERE hour >= at - INTERVAL 1 DAY),
gone AS (SELECT sum(batches) AS n, uniqExact(node) AS nodes FROM v_gaps WHERE to_at >= at - INTERVAL 1 DAY)
SELECT position, name, status, value, action FROM (
    SELECT 1 AS position, 'Telemetry stored' AS name,
        multiIf(n = 0, 'unknown', age <= 15, 'ok', age <= 60, 'warn', 'bad') AS status,
        if(n = 0, 'none yet', concat(toString(age), ' s ago')) AS value,
        'Nothing newer is stored: see that agents, Kafka and the worker run (gpuledger status).' AS action FROM stored
    UNION ALL
    SELECT 2, 'Complete until', multiIf(n = 0, 'unknown', lag <= 180, 'ok', lag <= 600, 'warn', 'bad'),
        multiIf(n = 0, 'none yet', lag > 86400, 'not in the last hour', concat(toString(lag), ' s ago')),
        'A pool waits for one partition: gpuledger status names the one that holds it back.' FROM newest
    UNION ALL
    SELECT 3, 'Minutes complete',
        multiIf(due = 0, 'unknown', complete = due, 'ok', complete * 100 >= due * 98, 'warn', 'bad'),
        if(due = 0, 'none due yet', concat(toString(complete), ' of ', toString(due))),
        'Minutes older than four are still open: the worker is behind, or stopped.' FROM hour
    UNION ALL
    SELECT 4, 'Held time seen',
        multiIf(held = 0, 'unknown', seen * 100 >= held * 98, 'ok', seen * 100 >= held * 90, 'warn', 'bad'),
        if(held = 0, 'nothing held', concat(toString(toDecimal32(seen * 100 / held, 1)), ' %')),
        'Agents are silent on GPUs that are held: find their nodes in gpuledger status.' FROM seen
    UNION ALL
    SELECT 5, 'GPU time balances', multiIf(n = 0, 'unknown', unbalanced = 0, 'ok', 'bad'),
        if(unbalanced = 0, concat(toString(n), ' minutes'), concat(toString(unbalanced), ' of ', toString(n), ' off')),
        'Run gpuledger audit: it names the first pool, GPU and minute that differ.' FROM hour
    UNION ALL
    SELECT 6, 'Money balances', multiIf(n = 0, 'unknown', off = 0, 'ok', 'bad'),
        multiIf(n = 0, 'no costs yet', off = 0, concat(toString(n), ' intervals'),
            concat(toString(off), ' of ', toString(n), ' off')),
        'Shares do not sum to the asset cost: run gpuledger audit. Without costs: gpuledger rates apply.' FROM money
    UNION ALL
    SELECT 7, 'Dead letters', if(n = 0, 'ok', 'warn'), if(n = 0, 'none in a day', toString(n)),
        'Messages that could not be read: their reasons are in v_dead_letters.' FROM dead
    UNION ALL
    SELECT 8, 'Conflicts', if(n = 0, 'ok', 'warn'), if(n = 0, 'none in a day', toString(n)),
        'Claims contradict each other: v_conflicts names both sides.' FROM odd
    UNION ALL
    SELECT 9, 'Batches dropped', if(n = 0, 'ok', 'warn'),
        if(n = 0, 'none in a day', concat(toString(n), if(nodes = 1, ' on a node', concat(' on ', toString(nodes), ' nodes')))),
        'Agents had no broker for longer than their spools hold: see Telemetry gaps.' FROM gone
) ORDER BY position;
