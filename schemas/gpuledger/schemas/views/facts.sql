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

-- MIG instances: one row for each instance of each geometry. What no instance has is unsliced capacity.
CREATE OR REPLACE VIEW v_instances AS
SELECT gpu, node, instance, fromUnixTimestamp64Milli(epoch_ms, 'UTC') AS made_at, profile, instance_slices AS slices,
    slices AS gpu_slices, fromUnixTimestamp64Milli(start_ms, 'UTC') AS start_at,
    if(isNull(end_ms), NULL, fromUnixTimestamp64Milli(assumeNotNull(end_ms), 'UTC')) AS end_at
FROM (
    SELECT gpu, node, slices, start_ms, end_ms, each.1 AS instance, each.2 AS epoch_ms, each.3 AS instance_slices,
        each.4 AS profile
    FROM geometries FINAL ARRAY JOIN arrayZip(instances, epochs_ms, geometries.instance_slices, profiles) AS each
    WHERE NOT void
);

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

-- As text; the table has the bytes. `last_offset` is greater than `offset` where a whole batch could not be unpacked.
CREATE OR REPLACE VIEW v_dead_letters AS
SELECT topic, partition, offset, appended_at, reason, toValidUTF8(key) AS key, toValidUTF8(value) AS value, value_bytes,
    last_offset, complete
FROM dead_letters FINAL;

CREATE OR REPLACE VIEW v_dead_letter_replays AS
SELECT topic, partition, offset, replayed_at, to_partition, to_offset FROM dead_letter_replays FINAL;

CREATE OR REPLACE VIEW v_progress AS
SELECT topic, partition, fromUnixTimestamp64Milli(max(appended_ms), 'UTC') AS appended_at, max(offset) AS offset
FROM progress GROUP BY topic, partition;
