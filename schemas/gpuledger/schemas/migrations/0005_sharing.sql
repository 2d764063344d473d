-- MIG: an instance is (GPU, number, epoch), because numbers are used again; a geometry says which instances a GPU has.
-- A fragment's key gains the epoch, so that one batch may hold both sides of a reconfiguration.

ALTER TABLE fragments
    ADD COLUMN IF NOT EXISTS epoch_ms Int64 COMMENT 'when the MIG instance was made; 0: the whole GPU, or not known',
    MODIFY ORDER BY (minute, gpu, instance, run_start_ms, run_id, seq, epoch_ms);

ALTER TABLE allocations
    ADD COLUMN IF NOT EXISTS epoch_ms Int64 AFTER instance,
    ADD INDEX IF NOT EXISTS of_job job_id TYPE bloom_filter GRANULARITY 4;

CREATE TABLE geometries (
    id String,
    rank UInt64,
    claimed_at DateTime64(3, 'UTC'),
    recorded_at DateTime64(3, 'UTC'),
    gpu String,
    node String,
    slices UInt16,
    sliced UInt16 COMMENT 'slices that belong to instances',
    instances Array(UInt16),
    epochs_ms Array(Int64),
    instance_slices Array(UInt16),
    profiles Array(String),
    start_ms Int64,
    end_ms Nullable(Int64),
    void UInt8
) ENGINE = ReplacingMergeTree(rank) ORDER BY id;
