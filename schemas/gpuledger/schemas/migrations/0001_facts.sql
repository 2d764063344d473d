-- What happened. `facts` keeps every accepted event as it came; the typed tables hold the greatest revision of each id.
-- `rank` = revision * 2^20 + 20 bits of the content's hash: greater revision wins, equal ones are decided by content,
-- never by arrival. Times are UTC milliseconds; NULL `end_ms` means it has not ended.

CREATE TABLE facts (
    kind LowCardinality(String),
    id String,
    revision UInt64,
    rank UInt64,
    claimed_at DateTime64(3, 'UTC'),
    recorded_at DateTime64(3, 'UTC') COMMENT 'broker append time',
    topic LowCardinality(String),
    partition UInt32,
    offset UInt64,
    document String CODEC(ZSTD(3)) COMMENT 'the event as JSON'
) ENGINE = ReplacingMergeTree ORDER BY (kind, id, rank, topic, partition, offset);

CREATE TABLE placements (
    id String,
    rank UInt64,
    claimed_at DateTime64(3, 'UTC'),
    recorded_at DateTime64(3, 'UTC'),
    gpu String,
    node String,
    pool LowCardinality(String),
    site LowCardinality(String),
    model LowCardinality(String),
    gpu_index Nullable(Int32),
    start_ms Int64,
    end_ms Nullable(Int64),
    void UInt8
) ENGINE = ReplacingMergeTree(rank) ORDER BY id;

CREATE TABLE nodes (
    node String,
    claimed_at_ms Int64,
    recorded_at DateTime64(3, 'UTC'),
    boot_id String,
    agent_version String,
    driver_version Nullable(String),
    cuda_version Nullable(String),
    config_hash String,
    health String,
    gpus UInt32
) ENGINE = ReplacingMergeTree(claimed_at_ms) ORDER BY node;

CREATE TABLE allocations (
    id String,
    rank UInt64,
    claimed_at DateTime64(3, 'UTC'),
    recorded_at DateTime64(3, 'UTC'),
    node String,
    boot_id String,
    gpu String,
    instance UInt16,
    job_id String,
    source LowCardinality(String),
    account LowCardinality(String),
    user LowCardinality(String),
    namespace LowCardinality(String),
    tenant LowCardinality(String),
    weight_num UInt32,
    weight_den UInt32,
    start_ms Int64,
    end_ms Nullable(Int64),
    confidence_pct UInt8,
    void UInt8
) ENGINE = ReplacingMergeTree(rank) ORDER BY id;

CREATE TABLE jobs (
    id String,
    rank UInt64,
    claimed_at DateTime64(3, 'UTC'),
    recorded_at DateTime64(3, 'UTC'),
    source LowCardinality(String),
    cluster LowCardinality(String),
    name String,
    account LowCardinality(String),
    user LowCardinality(String),
    tenant LowCardinality(String),
    queue LowCardinality(String),
    gpus Nullable(UInt32),
    submitted_ms Nullable(Int64),
    started_ms Nullable(Int64),
    ended_ms Nullable(Int64),
    state LowCardinality(String),
    tags Map(String, String)
) ENGINE = ReplacingMergeTree(rank) ORDER BY id;

CREATE TABLE commitments (
    id String,
    rank UInt64,
    claimed_at DateTime64(3, 'UTC'),
    recorded_at DateTime64(3, 'UTC'),
    pool LowCardinality(String),
    tenant LowCardinality(String),
    gpus UInt32,
    start_ms Int64,
    end_ms Nullable(Int64),
    state LowCardinality(String),
    contract String,
    by String,
    why String
) ENGINE = ReplacingMergeTree(rank) ORDER BY (pool, id);

CREATE TABLE transfers (
    id String,
    rank UInt64,
    claimed_at DateTime64(3, 'UTC'),
    recorded_at DateTime64(3, 'UTC'),
    pool LowCardinality(String),
    gpus UInt32,
    from_tenant LowCardinality(String),
    to_tenant LowCardinality(String),
    start_ms Int64,
    end_ms Nullable(Int64),
    state LowCardinality(String),
    by String,
    why String
) ENGINE = ReplacingMergeTree(rank) ORDER BY (pool, id);

-- Asset costs, tariffs, rate cards and tenants: few, read whole, kept as their documents.
CREATE TABLE rates (
    kind LowCardinality(String),
    id String,
    rank UInt64,
    claimed_at DateTime64(3, 'UTC'),
    recorded_at DateTime64(3, 'UTC'),
    pool LowCardinality(String) COMMENT 'empty: not of one pool',
    document String CODEC(ZSTD(3))
) ENGINE = ReplacingMergeTree(rank) ORDER BY (kind, id);

CREATE TABLE alerts (
    id String,
    rank UInt64,
    claimed_at DateTime64(3, 'UTC'),
    recorded_at DateTime64(3, 'UTC'),
    rule LowCardinality(String),
    status LowCardinality(String),
    severity LowCardinality(String),
    pool LowCardinality(String),
    tenant LowCardinality(String),
    started_at DateTime64(3, 'UTC'),
    ended_at Nullable(DateTime64(3, 'UTC')),
    money_per_hour Nullable(Decimal(38, 9)),
    currency LowCardinality(String),
    summary String,
    action String,
    evidence Map(String, String)
) ENGINE = ReplacingMergeTree(rank) ORDER BY id;

CREATE TABLE dead_letters (
    topic LowCardinality(String),
    partition UInt32,
    offset UInt64,
    appended_at DateTime64(3, 'UTC'),
    reason String,
    key String,
    value String CODEC(ZSTD(3)) COMMENT 'the first bytes of the message',
    value_bytes UInt64
) ENGINE = ReplacingMergeTree ORDER BY (topic, partition, offset);
