-- What it cost. Money is made once per (pool, price interval) and apportioned at this finest key; all else is a sum.
-- Same version rule as the ledger, per (pool, interval). `kind` 'marker' carries the interval's whole asset cost.
--   asset_cost   what the operator pays; the rows of an interval sum to the marker's, to the nano-unit
--   charge       what the tenant pays by its rate card; NULL: no rate card, 0: priced at nothing
--   payer        tenant that bears the asset cost; empty: the operator

CREATE TABLE charges (
    pool LowCardinality(String),
    interval_start DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    interval_end DateTime64(3, 'UTC'),
    tenant LowCardinality(String),
    job_id String CODEC(ZSTD(1)),
    kind LowCardinality(String),
    activity LowCardinality(String),
    payer LowCardinality(String),
    gpu_us Int64,
    energy_mj Nullable(Int64),
    asset_cost Nullable(Decimal(38, 9)) COMMENT 'NULL: no asset cost is known for the interval',
    energy_cost Nullable(Decimal(38, 9)) COMMENT 'the part of asset_cost that is energy',
    asset_currency LowCardinality(String),
    charge Nullable(Decimal(38, 9)),
    charge_currency LowCardinality(String),
    rate_card String,
    estimate UInt8 COMMENT '1 until every minute of the interval is complete',
    incomplete UInt8 COMMENT '1 where energy is not known: the cost lacks it',
    version UInt128
) ENGINE = ReplacingMergeTree(version)
PARTITION BY toYYYYMM(interval_start)
ORDER BY (pool, interval_start, tenant, job_id, kind, activity, payer);
