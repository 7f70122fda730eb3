-- What a step rests on, asked again while it is at work.

-- name: newest
-- purpose: The number of the newest ledger row of any target; later rows have higher ones.
SELECT coalesce(max(seq), 0) AS seq FROM {entry};

-- name: undone_since
-- purpose: Those of these phases that were undone after a ledger row, and by which notebook.
SELECT DISTINCT ON (phase) phase, coalesce(body ->> 'by', 'hand') AS by FROM {entry}
WHERE target = {target_name} AND kind = 'phase' AND phase = ANY (%(phases)s) AND seq > %(seq)s
  AND body ->> 'verdict' = 'UNDONE'
ORDER BY phase, seq DESC;
