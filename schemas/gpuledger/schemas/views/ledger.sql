-- People and dashboards read these; they hide versions. Filters on pool and minute (hour, interval_start) reach the
-- primary key and the partitions through the window.

CREATE OR REPLACE VIEW v_ledger_minute AS
SELECT pool, minute, tenant, kind, activity, gpu_us, energy_mj, complete
FROM (SELECT *, max(version) OVER (PARTITION BY pool, minute) AS newest FROM ledger_minute)
WHERE version = newest AND kind != 'marker';

CREATE OR REPLACE VIEW v_recomputes AS
SELECT pool, minute, gpu_us AS service_us, complete, fragments, fragments_hash, facts_hash, version
FROM (SELECT *, max(version) OVER (PARTITION BY pool, minute) AS newest FROM ledger_minute)
WHERE version = newest AND kind = 'marker';

CREATE OR REPLACE VIEW v_gpu_minute AS
SELECT pool, minute, gpu, instance, tenant, job_id, kind, activity, gpu_us, energy_mj
FROM (SELECT *, max(version) OVER (PARTITION BY pool, minute) AS newest FROM ledger_gpu_minute)
WHERE version = newest AND kind != 'marker';

CREATE OR REPLACE VIEW v_gpu_hour AS
SELECT pool, hour, gpu, instance, tenant, job_id, kind, activity, gpu_us, energy_mj
FROM (SELECT *, max(version) OVER (PARTITION BY pool, hour) AS newest FROM ledger_gpu_hour)
WHERE version = newest AND kind != 'marker';

CREATE OR REPLACE VIEW v_job_hour AS
SELECT pool, hour, tenant, job_id, user, kind, activity, gpu_us, energy_mj
FROM (SELECT *, max(version) OVER (PARTITION BY pool, hour) AS newest FROM ledger_job_hour)
WHERE version = newest AND kind != 'marker';

CREATE OR REPLACE VIEW v_conflicts AS
SELECT pool, hour, kind, subject, other, from_ms, to_ms, detail
FROM (SELECT *, max(version) OVER (PARTITION BY pool, hour) AS newest FROM conflicts)
WHERE version = newest AND kind != 'marker';

CREATE OR REPLACE VIEW v_charges AS
SELECT pool, interval_start, interval_end, tenant, job_id, kind, activity, payer, gpu_us, energy_mj,
    asset_cost, energy_cost, asset_currency, charge, charge_currency, rate_card, estimate, incomplete
FROM (SELECT *, max(version) OVER (PARTITION BY pool, interval_start) AS newest FROM charges)
WHERE version = newest AND kind != 'marker';

CREATE OR REPLACE VIEW v_asset_cost AS
SELECT pool, interval_start, interval_end, gpu_us AS service_us, asset_cost, energy_cost, asset_currency, estimate, incomplete
FROM (SELECT *, max(version) OVER (PARTITION BY pool, interval_start) AS newest FROM charges)
WHERE version = newest AND kind = 'marker';
