-- A dead letter keeps its message byte for byte, so that it can be sent again: `gpuledger deadletter replay`.

ALTER TABLE dead_letters
    ADD COLUMN IF NOT EXISTS last_offset UInt64 DEFAULT offset COMMENT 'of a batch that could not be unpacked: its end',
    ADD COLUMN IF NOT EXISTS no_key UInt8 COMMENT '1: the message had no key; an empty key is another thing',
    ADD COLUMN IF NOT EXISTS no_value UInt8,
    ADD COLUMN IF NOT EXISTS headers String DEFAULT '[]' CODEC(ZSTD(3)) COMMENT 'JSON: [[name, base64 or null], …]',
    ADD COLUMN IF NOT EXISTS complete UInt8 COMMENT '1: key, value and headers are here to the last byte';

-- Which letters were sent again, when, and where the message lies now. A letter may be sent again more than once.
CREATE TABLE dead_letter_replays (
    topic LowCardinality(String),
    partition UInt32,
    offset UInt64,
    replayed_at DateTime64(3, 'UTC'),
    to_partition UInt32,
    to_offset UInt64
) ENGINE = ReplacingMergeTree ORDER BY (topic, partition, offset, to_partition, to_offset);
