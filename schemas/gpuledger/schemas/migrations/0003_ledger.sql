-- Who held what. Every key begins with the pool. `version` = epoch (32 bits), offset of the last dirty mark taken
-- (56 bits), random (40 bits): only rows of the greatest version of their (pool, minute) or (pool, hour) count, see the
-- views. All rows of one (pool, minute) travel in one insert block with a row of kind 'marker', so that a minute that
-- lost its last holder is replaced too.
--   kind      held | unconfirmed | unallocated (GPU rows) | reserved_unused | free | overcommitted (pool rows) | marker
--   activity  active | idle | unobserved | down | pending; empty where it does not apply
-- Amounts are integer GPU-microseconds and millijoules. Sum them to Int128: Int64 wraps silently.

CREATE TABLE ledger_minute (
    pool LowCardinality(String),
    minute DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    tenant LowCardinality(String),
    kind LowCardinality(String),
    activity LowCardinality(String),
    gpu_us Int64 COMMENT 'marker: GPU time in service of the pool in that minute',
    energy_mj Nullable(Int64),
    version UInt128,
    complete UInt8,
    fragments UInt32 COMMENT 'marker: fragments read',
    fragments_hash UInt64 COMMENT 'marker: sum of their hashes, order-free',
    facts_hash UInt64 COMMENT 'marker: sum of the hashes of the facts read'
) ENGINE = ReplacingMergeTree(version)
PARTITION BY toYYYYMM(minute)
ORDER BY (pool, minute, tenant, kind, activity);

-- Written when a minute completes, and only where fragments exist: elsewhere facts alone determine it.
CREATE TABLE ledger_gpu_minute (
    pool LowCardinality(String),
    minute DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    gpu String CODEC(ZSTD(1)),
    instance UInt16,
    tenant LowCardinality(String),
    job_id String CODEC(ZSTD(1)),
    kind LowCardinality(String),
    activity LowCardinality(String),
    gpu_us Int64,
    energy_mj Nullable(Int64),
    version UInt128
) ENGINE = ReplacingMergeTree(version)
PARTITION BY toYYYYMMDD(minute)
ORDER BY (pool, minute, gpu, instance, tenant, job_id, kind, activity)
TTL toDateTime(minute) + INTERVAL 90 DAY;

CREATE TABLE ledger_gpu_hour (
    pool LowCardinality(String),
    hour DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    gpu String CODEC(ZSTD(1)),
    instance UInt16,
    tenant LowCardinality(String),
    job_id String CODEC(ZSTD(1)),
    kind LowCardinality(String),
    activity LowCardinality(String),
    gpu_us Int64,
    energy_mj Nullable(Int64),
    version UInt128
) ENGINE = ReplacingMergeTree(version)
PARTITION BY toYYYYMM(hour)
ORDER BY (pool, hour, gpu, instance, tenant, job_id, kind, activity);

CREATE TABLE ledger_job_hour (
    pool LowCardinality(String),
    hour DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    tenant LowCardinality(String),
    job_id String CODEC(ZSTD(1)),
    user LowCardinality(String),
    kind LowCardinality(String),
    activity LowCardinality(String),
    gpu_us Int64,
    energy_mj Nullable(Int64),
    version UInt128
) ENGINE = ReplacingMergeTree(version)
PARTITION BY toYYYYMM(hour)
ORDER BY (pool, hour, tenant, job_id, user, kind, activity);

-- What does not fit: placements or allocations that contradict each other, weights above one, unknown GPUs, jobs that
-- could not be placed, tenants that sent more than they had. Shown, never dropped; written with the minutes they touch.
CREATE TABLE conflicts (
    pool LowCardinality(String),
    hour DateTime64(3, 'UTC'),
    kind LowCardinality(String),
    subject String,
    other String,
    from_ms Int64,
    to_ms Int64,
    detail String,
    version UInt128
) ENGINE = ReplacingMergeTree(version)
PARTITION BY toYYYYMM(hour)
ORDER BY (pool, hour, kind, subject, other, from_ms);

-- Grows each time the dirty topic is made anew, because its offsets then start again; part of every version.
CREATE TABLE epochs (
    epoch UInt32,
    started_at DateTime64(3, 'UTC'),
    why String
) ENGINE = MergeTree ORDER BY epoch;
