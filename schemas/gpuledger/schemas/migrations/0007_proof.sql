-- What an audit compares with: the marker of each minute, hour and interval says what its rows were when they were
-- written, so that a row that is lost, doubled or changed afterwards shows, in whatever column. 0: written before there
-- were such sums, which says nothing.

ALTER TABLE ledger_minute
    ADD COLUMN IF NOT EXISTS facts_formula UInt8 COMMENT 'marker: how facts_hash was made; 0 lacks boots and the account map',
    ADD COLUMN IF NOT EXISTS rows_hash UInt64 COMMENT 'marker: sum of the hashes of all rows of the minute, order-free';

ALTER TABLE ledger_gpu_minute
    ADD COLUMN IF NOT EXISTS rows_hash UInt64 COMMENT 'marker: sum of the hashes of all rows of the minute, order-free';

ALTER TABLE ledger_gpu_hour
    ADD COLUMN IF NOT EXISTS rows_hash UInt64 COMMENT 'marker: sum of the hashes of all rows of the hour, order-free';

ALTER TABLE ledger_job_hour
    ADD COLUMN IF NOT EXISTS rows_hash UInt64 COMMENT 'marker: sum of the hashes of all rows of the hour, order-free';

ALTER TABLE charges
    ADD COLUMN IF NOT EXISTS rates_hash UInt64 COMMENT 'marker: sum of the hashes of the rates in force; 0: not known',
    ADD COLUMN IF NOT EXISTS rows_hash UInt64 COMMENT 'marker: sum of the hashes of all rows of the interval, order-free';
