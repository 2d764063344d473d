-- What was seen. Stored again a fragment replaces itself; a late one adds. Nothing here knows pools or tenants.

CREATE TABLE fragments (
    minute DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    gpu String CODEC(ZSTD(1)),
    instance UInt16 COMMENT '0 = the whole GPU; energy only there',
    run_start_ms Int64 CODEC(Delta, ZSTD(1)),
    run_id String CODEC(ZSTD(1)),
    seq UInt32 CODEC(Delta, ZSTD(1)),
    node LowCardinality(String),
    segment_start_ms Array(UInt16) COMMENT 'offset into the minute',
    segment_duration_ms Array(UInt16),
    segment_activity Array(UInt8) COMMENT '1 active, 2 idle, 3 unobserved, 4 down',
    segment_energy_from_mj Array(Nullable(Int64)) COMMENT 'counter at the start of the segment; linear inside',
    segment_energy_to_mj Array(Nullable(Int64)),
    energy_first_mj Nullable(Int64),
    energy_last_mj Nullable(Int64),
    power_integral_mj Nullable(Int64) COMMENT 'integrated power, kept beside the counter',
    samples UInt16,
    gpu_util_pct_count UInt16, gpu_util_pct_sum Float64, gpu_util_pct_max Float32,
    sm_active_count UInt16, sm_active_sum Float64, sm_active_max Float32,
    tensor_active_count UInt16, tensor_active_sum Float64, tensor_active_max Float32,
    dram_active_count UInt16, dram_active_sum Float64, dram_active_max Float32,
    memory_used_bytes_count UInt16, memory_used_bytes_sum Float64, memory_used_bytes_max Float32,
    power_mw_count UInt16, power_mw_sum Float64, power_mw_max Float32,
    temperature_gpu_c_count UInt16, temperature_gpu_c_sum Float64, temperature_gpu_c_max Float32,
    appended_at DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)) COMMENT 'broker append time'
) ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMMDD(minute)
ORDER BY (minute, gpu, instance, run_start_ms, run_id, seq)
TTL toDateTime(minute) + INTERVAL 90 DAY;

CREATE TABLE host_readings (
    node LowCardinality(String),
    ts DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    cpu_util_pct Nullable(Float32),
    cpu_count Nullable(Int32),
    load_1m Nullable(Float32),
    memory_used_bytes Nullable(Int64),
    memory_total_bytes Nullable(Int64),
    network_rx_bytes Nullable(Int64),
    network_tx_bytes Nullable(Int64),
    disk_read_bytes Nullable(Int64),
    disk_write_bytes Nullable(Int64),
    psi_cpu_pct Nullable(Float32),
    psi_memory_pct Nullable(Float32),
    psi_io_pct Nullable(Float32),
    node_power_mw Nullable(Int64),
    node_energy_mj Nullable(Int64)
) ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMMDD(ts)
ORDER BY (node, ts)
TTL toDateTime(ts) + INTERVAL 90 DAY;

-- Batches that spools dropped: stated, never guessed.
CREATE TABLE gaps (
    node LowCardinality(String),
    run_id String,
    first_seq UInt32,
    last_seq UInt32,
    from_ms Int64,
    to_ms Int64,
    batches UInt32,
    reason LowCardinality(String)
) ENGINE = ReplacingMergeTree ORDER BY (node, run_id, first_seq, last_seq);

-- The latest sample of a batch that named an allocation as running: for ever (the latest) and by minute (for marks).
CREATE TABLE confirmed (
    allocation_id String,
    named_ms SimpleAggregateFunction(max, Int64)
) ENGINE = AggregatingMergeTree ORDER BY allocation_id;

CREATE TABLE confirmations (
    minute DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    allocation_id String,
    named_ms SimpleAggregateFunction(max, Int64)
) ENGINE = AggregatingMergeTree
PARTITION BY toYYYYMMDD(minute)
ORDER BY (minute, allocation_id)
TTL toDateTime(minute) + INTERVAL 90 DAY;

-- The smallest start stored for each boot: a newer boot ends what the older one ran.
CREATE TABLE boots (
    node String,
    boot_id String,
    start_ms SimpleAggregateFunction(min, Int64)
) ENGINE = AggregatingMergeTree ORDER BY (node, boot_id);

-- How far each partition has been stored, in broker append time; the frontier is the smallest of them.
CREATE TABLE progress (
    topic LowCardinality(String),
    partition UInt32,
    appended_ms SimpleAggregateFunction(max, Int64),
    offset SimpleAggregateFunction(max, Int64)
) ENGINE = AggregatingMergeTree ORDER BY (topic, partition);

-- The frontier's own cursor: minutes before it have been marked as complete.
CREATE TABLE frontier (
    name LowCardinality(String),
    marked_until_ms SimpleAggregateFunction(max, Int64)
) ENGINE = AggregatingMergeTree ORDER BY name;
