-- Exact answers, computed outside the server.

-- name: copy_out
-- purpose: Every vector once, with the codes of its filters and its key, in disk order.
COPY (SELECT {codes}{row_embedding}, {key} FROM {from_all_vectors} WHERE {row_embedding} IS NOT NULL AND {always})
    TO STDOUT (FORMAT BINARY);

-- name: nearest
-- purpose: The nearest rows by distance, equals by key; the expression around the distance keeps every index out.
SELECT {one t.key}::text AS key, {row_embedding} {distance} {query_vector} AS distance
FROM {from_vectors}
WHERE {filters} AND {row_embedding} IS NOT NULL
ORDER BY ({row_embedding} {distance} {query_vector}) + 0, {t.key}
LIMIT %(k)s;
