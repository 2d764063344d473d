-- Batches that never arrived: an agent's spool dropped them before a broker took them, and a later batch of the node
-- said so. [from_at, to_at) is what they covered; the ledger has that time as unobserved, where no other batch saw it.
-- A gap that grew after it was told is told again, whole: the smaller row that lies inside it is left out. A reason that
-- ends in 'perhaps sent' is not certain: no answer came, and the batches may have arrived after all.
CREATE OR REPLACE VIEW v_gaps AS
SELECT node, fromUnixTimestamp64Milli(from_ms, 'UTC') AS from_at, fromUnixTimestamp64Milli(to_ms, 'UTC') AS to_at,
    batches, reason, run_id, first_seq, last_seq
FROM (
    SELECT *, row_number() OVER told AS nth, max(last_seq) OVER (told ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS until
    FROM gaps FINAL
    WINDOW told AS (PARTITION BY node, run_id ORDER BY first_seq, last_seq DESC)
)
WHERE nth = 1 OR last_seq > until;
