-- The current state of facts, with times as people read them.

CREATE OR REPLACE VIEW v_placements AS
SELECT gpu, node, pool, site, model, gpu_index,
    fromUnixTimestamp64Milli(start_ms, 'UTC') AS start_at,
    if(isNull(end_ms), NULL, fromUnixTimestamp64Milli(assumeNotNull(end_ms), 'UTC')) AS end_at, claimed_at, id
FROM placements FINAL WHERE NOT void;

CREATE OR REPLACE VIEW v_allocations AS
SELECT id, node, gpu, instance, job_id, source, account, user, namespace, tenant, weight_num, weight_den,
    fromUnixTimestamp64Milli(start_ms, 'UTC') AS start_at,
    if(isNull(end_ms), NULL, fromUnixTimestamp64Milli(assumeNotNull(end_ms), 'UTC')) AS end_at, confidence_pct
FROM allocations FINAL WHERE NOT void;

CREATE OR REPLACE VIEW v_jobs AS
SELECT id AS job_id, source, cluster, name, account, user, tenant, queue, gpus, state, tags,
    if(isNull(submitted_ms), NULL, fromUnixTimestamp64Milli(assumeNotNull(submitted_ms), 'UTC')) AS submitted_at,
    if(isNull(started_ms), NULL, fromUnixTimestamp64Milli(assumeNotNull(started_ms), 'UTC')) AS started_at,
    if(isNull(ended_ms), NULL, fromUnixTimestamp64Milli(assumeNotNull(ended_ms), 'UTC')) AS ended_at
FROM jobs FINAL;

CREATE OR REPLACE VIEW v_commitments AS
SELECT id, pool, tenant, gpus, state, contract, by, why,
    fromUnixTimestamp64Milli(start_ms, 'UTC') AS start_at,
    if(isNull(end_ms), NULL, fromUnixTimestamp64Milli(assumeNotNull(end_ms), 'UTC')) AS end_at
FROM commitments FINAL;

CREATE OR REPLACE VIEW v_transfers AS
SELECT id, pool, gpus, from_tenant, to_tenant, state, by, why,
    fromUnixTimestamp64Milli(start_ms, 'UTC') AS start_at,
    if(isNull(end_ms), NULL, fromUnixTimestamp64Milli(assumeNotNull(end_ms), 'UTC')) AS end_at
FROM transfers FINAL;

CREATE OR REPLACE VIEW v_alerts AS
SELECT id, rule, status, severity, pool, tenant, started_at, ended_at, money_per_hour, currency, summary, action, evidence
FROM alerts FINAL;

CREATE OR REPLACE VIEW v_dead_letters AS
SELECT topic, partition, offset, appended_at, reason, key, value, value_bytes FROM dead_letters FINAL;

CREATE OR REPLACE VIEW v_progress AS
SELECT topic, partition, fromUnixTimestamp64Milli(max(appended_ms), 'UTC') AS appended_at, max(offset) AS offset
FROM progress GROUP BY topic, partition;
