"""Every identifier and expression that the runbook puts into SQL, quoted, made in one place from the parameters."""

from __future__ import annotations

import hashlib
import re

from psycopg import sql

from runbook_lib.params import Params
from runbook_lib.params.placeholders import OPAQUE, QUOTED_NAME
from runbook_lib.params.section import LONGEST_NAME_BYTES
from runbook_lib.sql.key import Key

OPERATORS = {"cosine": "<=>", "l2": "<->", "inner_product": "<#>"}
OPERATOR_CLASSES = {"cosine": "cosine_ops", "l2": "l2_ops", "inner_product": "ip_ops"}

# 16 of SHA-256's 32 bytes: at a billion texts the chance of one collision is below 1e-20, at half the room.
HASH_BYTES = 16
# Two of a few values or names alike in so many hex digits are beyond chance.
DIGITS_IN_A_NAME = 8


# The search function has one function for each of these that the parameters need. The last one does not answer: it
# returns the share of rows by which one of the others is chosen.
WAYS_TO_ANSWER = ("legacy", "vector", "vector_relaxed", "vector_exact", "hybrid", "hybrid_exact", "share")

# Of a text: which of a hundred shares of the calls it falls into. Exact to the types, so that nothing shadows it.
DRAW = sql.SQL(
    "pg_catalog.abs(pg_catalog.hashtextextended(coalesce(query_text, ''), 0::pg_catalog.int8)"
    " OPERATOR(pg_catalog.%%) 100::pg_catalog.int8)"
)


def verbatim(text: str) -> sql.SQL:
    """SQL that is written already, by PostgreSQL or by psycopg, with its per cent signs doubled as a statement with
    bound values needs them. Braces stay: nothing formats it again.
    """
    return sql.SQL(text.replace("%", "%%"))


def literal(text: str) -> sql.SQL:
    """A string of SQL, with its per cent signs doubled likewise."""
    return verbatim(sql.Literal(text).as_string())


def identifier(*parts: str) -> sql.Composable:
    """A quoted, qualified name, with its per cent signs doubled as a statement with bound values needs them."""
    return verbatim(sql.Identifier(*parts).as_string())


def spelled(params: Params, name: str) -> str:
    """One of :func:`names` as SQL spells it, for ``to_regclass`` and messages."""
    return names(params)[name].as_string().replace("%%", "%")


def digits(text: str) -> str:
    """Hex digits that tell a text from others, where a name has no room for the text itself."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS_IN_A_NAME]


def shortened(stem: str, tail: str, unlike: str = "") -> str:
    """``stem`` and ``tail`` as one name that PostgreSQL does not cut: the tail whole, of the stem what fits.

    Never half a character of several bytes. unlike: what tells this name from others whose stems begin alike; where
    the stem must be cut, its :func:`digits` come before the tail.
    """
    if unlike and len((stem + tail).encode()) > LONGEST_NAME_BYTES:
        tail = f"_{digits(unlike)}{tail}"
    return stem.encode()[: LONGEST_NAME_BYTES - len(tail.encode())].decode(errors="ignore") + tail


def key_of(params: Params) -> Key:
    """The key of the target, which knows how blocks write it."""
    target = params.target
    return Key(target.key_columns, [identifier(c) for c in target.key_columns], lambda: target.key_types)


def index_name(params: Params) -> str:
    """Name of the vector index: table, column and method."""
    return shortened(params.target.table, f"_{params.vector.column}_{params.index.method}")


def side_table_name(params: Params) -> str:
    """Name of the table that holds the vectors, where they are not in a column."""
    return shortened(params.target.table, f"_{params.vector.column}")


def added_columns(params: Params) -> list[str]:
    """The columns that the runbook adds: to the table, or to the one that it makes for the vectors."""
    column = params.vector.column
    places = [f"{column}_{place}" for place in ("chunk", "start", "length")] if has_chunks(params) else []
    return [column, f"{column}_updated_at", f"{column}_hash", *places]


def has_side_table(params: Params) -> bool:
    """Are the vectors in a table of their own?"""
    return params.vector.layout != "column"


def has_chunks(params: Params) -> bool:
    """Does that table have a row for each chunk of a text?"""
    return params.vector.layout == "chunks"


def function_of(params: Params, way: str) -> str:
    """Name of the function, in the ledger's schema, that answers in one of WAYS_TO_ANSWER."""
    return f"{params.target.name}_by_{way}"


def words_functions(params: Params) -> dict[str, str]:
    """Names of the functions, in the ledger's schema, that return the weights of words and the weight of the
    vectors."""
    return {name: f"{params.target.name}_{name}" for name in ("weigh_words", "vector_weight")}


def operator_class(params: Params) -> str:
    """Of the index, for instance ``vector_cosine_ops``. Bits have one distance, whatever the vectors' own is."""
    if params.index.storage == "bit":
        return "bit_hamming_ops"
    return f"{params.indexed_type}_{OPERATOR_CLASSES[params.vector.distance]}"


def of_pgvector(params: Params, name: str) -> sql.Composable:
    """A type, function or operator class of pgvector, with the schema that it is in: others may create in that schema
    (in public everybody may, up to PostgreSQL 14), so no path of the runbook's has it.
    """
    return identifier(params.extension.schema_, name)


def operator(params: Params, symbol: str) -> sql.Composable:
    """An operator of pgvector, likewise."""
    return sql.SQL("OPERATOR({}.{})").format(identifier(params.extension.schema_), sql.SQL(symbol))


def as_indexed(params: Params, vector: sql.Composable) -> sql.Composable:
    """A vector, of a row or of a query, as the index holds it; both sides of its operator must be written so."""
    form = {"vector": "{v}", "halfvec": "{v}::{halfvec}({d})", "bit": "{binary_quantize}({v})::bit({d})"}
    parts = {name: of_pgvector(params, name) for name in ("halfvec", "binary_quantize")}
    return sql.SQL(form[params.index.storage]).format(v=vector, d=sql.Literal(params.vector.dimension), **parts)


def unquoted(params: Params, text: str) -> str:
    """As PostgreSQL writes names that need neither quotes nor pgvector's schema; the runbook always writes both."""
    return text.replace('"', "").replace(f"{params.extension.schema_}.", "")


def indexed(params: Params) -> sql.Composable:
    """The column, or the expression over it, that the index is on, as CREATE INDEX wants it."""
    column = identifier(params.vector.column)
    plain = params.index.storage == "vector"
    return column if plain else sql.SQL("({})").format(as_indexed(params, column))


def indexed_rows(params: Params, relation: str) -> sql.Composable:
    """``WHERE …`` of an index on a relation of this name, which has no alias; empty where the index has every row."""
    if params.index.rows == "all" or not params.target.always:
        return sql.SQL("")
    name = identifier(relation).as_string().replace("%%", "%")
    own = re.compile(rf"{OPAQUE}|{QUOTED_NAME}|(?<![\w.$])(?P<alias>t)\s*\.", re.S | re.I)
    text = own.sub(lambda match: f"{name}." if match["alias"] else match[0], params.target.always)
    return sql.SQL(" WHERE ({})").format(verbatim(text))


def changing(params: Params) -> dict[str, sql.Composable]:
    """What ``{text}``, ``{has_text}`` and ``{text_hash}`` are in a statement that changes rows: on a distributed
    table functions of the runbook's own, since Citus takes only IMMUTABLE ones of a column there."""
    ledger, name = params.ledger.schema_, params.target.name
    functions = {
        "text_function": identifier(ledger, f"{name}_text"),
        "text_hash_function": identifier(ledger, f"{name}_text_hash"),
    }
    if not params.target.distributed:
        return dict(functions)
    columns = sql.SQL(", ").join(sql.SQL("{}::text").format(identifier("t", c)) for c in params.target.text_columns)
    call = sql.SQL("{}({})")
    text = call.format(functions["text_function"], columns)
    return {
        **functions,
        "text": text,
        "has_text": has_text(text),
        "text_hash": call.format(functions["text_hash_function"], columns),
    }


# What names() has worked out, by the id of the parameters.
_made: dict[int, tuple[Params, dict[str, sql.Composable]]] = {}
PARAMETERS_KEPT = 16


def has_text(text: sql.Composable) -> sql.Composed:
    """Is there more than blanks and ends of lines in it? btrim reads every character, so one is tried first."""
    first = "left({text}, 1) NOT IN ('', ' ', E'\\t', E'\\r', E'\\n')"
    return sql.SQL(f"({first} OR btrim({{text}}, E' \\t\\r\\n') <> '')").format(text=text)


def trigger_name(params: Params, event: str) -> str:
    """Name of the capture trigger for ``insert`` or ``update``."""
    return f"runbook_{params.target.name}_{event}"


def names(params: Params) -> dict[str, sql.Composable]:
    """What ``{…}`` may say in a block of ``runbook_lib/sql``.

    ``{text}`` is the text that is embedded and ``{text_hash}`` its hash, both over alias ``t`` of the target;
    ``{has_text}`` says whether a row has any, and so is one of the rows that count: that get a vector, and of which
    none may be missing;
    ``{key}`` are the columns of the key, and ``{own_key}`` those that hold it in tables of the runbook's own;
    :mod:`runbook_lib.sql.key` has what else may be said of it.
    ``{new_text_differs}`` is the condition of the update trigger: the text, or the key.

    Whatever the layout: ``{vectors}`` is the relation that holds the vectors; ``{from_vectors}`` every row that can
    be searched, and ``{with_vectors}`` every row of the target, both with alias ``t`` for the target;
    ``{row_embedding}``, ``{row_embedding_hash}`` and ``{row_embedding_updated_at}`` are that row's. Where the vectors
    are of chunks, a row's first chunk stands for it here, so that each row comes once; all chunks of a row have the
    hash of its whole text. ``{from_all_vectors}`` has every chunk. ``{staged}`` is the staging table, likewise.

    ``{always}`` is the condition on ``t`` of every search; true where there is none. ``{is_counted}`` says which rows
    may count as missing or stale: all, or those of ``{always}``; ``{is_indexed}`` which rows the index holds, and
    ``{of_rows}`` is the same as the end of its CREATE INDEX.

    ``{by_legacy}``, ``{by_vector}`` and so on are the functions, one for each way, that answer for ``{function}``.

    ``{of_trusted_owner}`` is the condition that no stranger has made the function ``p``; ``{is_called}`` that it is,
    of those named like the search function, the one that answers, and none of those that pass other types on to it.

    ``{counted}`` is the ledger's rows that open phases and seal records: those that its owner's role wrote.

    ``{distance}`` is the operator of the vectors. What the index holds may be smaller: ``{indexed}`` is its column
    or expression, ``{row_indexed}`` the same of a row above, ``{index_distance}`` the operator that it serves.
    """
    # Asked for with each statement, and worked out in a millisecond. Identity, since parameters hold lists; they are
    # kept with their names, so that no others can come to have their id.
    if (made := _made.get(id(params))) is None:
        if len(_made) >= PARAMETERS_KEPT:
            _made.clear()
        _made[id(params)] = made = (params, _names(params))
    return dict(made[1])


def _names(params: Params) -> dict[str, sql.Composable]:
    target, vector = params.target, params.vector
    ledger, key = params.ledger.schema_, key_of(params)
    text = _text(target.text_columns, "t")
    always = sql.SQL("({})").format(verbatim(target.always)) if target.always else sql.SQL("true")
    vector_type = sql.SQL("{}({})").format(of_pgvector(params, vector.type), sql.Literal(vector.dimension))
    return {
        "schema": identifier(target.schema_),
        "table": identifier(target.schema_, target.table),
        "key": key,
        "own_key": key.own_list,
        "embedding": identifier(vector.column),
        "embedding_updated_at": identifier(f"{vector.column}_updated_at"),
        "embedding_hash": identifier(f"{vector.column}_hash"),
        "vector_type": vector_type,
        "distance": operator(params, OPERATORS[vector.distance]),
        "inner_product": operator(params, "<#>"),
        "vector_dims": of_pgvector(params, "vector_dims"),
        "operator_class": of_pgvector(params, operator_class(params)),
        "indexed": indexed(params),
        "index_distance": operator(params, "<~>" if params.index.storage == "bit" else OPERATORS[vector.distance]),
        "index": identifier(index_name(params)),
        "qualified_index": identifier(target.schema_, index_name(params)),
        "text": text,
        "has_text": has_text(text),
        "text_hash": sql.SQL("substring(pg_catalog.sha256(pg_catalog.convert_to({}, 'UTF8')) from 1 for {})").format(
            text, sql.Literal(HASH_BYTES)
        ),
        "always": always,
        "is_indexed": sql.SQL("true") if params.index.rows == "all" else always,
        "of_rows": indexed_rows(params, target.table),
        "is_counted": always if target.counted_rows == "searched" else sql.SQL("true"),
        "first_text_column": identifier(target.text_columns[0]),
        "new_text_differs": sql.SQL(" OR ").join(
            # As text and by its bytes, as it is hashed: to citext and to some collations other letters are equal.
            sql.SQL('OLD.{c}::text COLLATE "C" IS DISTINCT FROM NEW.{c}::text COLLATE "C"').format(c=identifier(c))
            for c in dict.fromkeys((*target.text_columns, *target.key_columns))
        ),
        "ledger": identifier(ledger),
        "entry": identifier(ledger, "entry"),
        "counted": _counted(ledger),
        "chain_lock": identifier(ledger, "chain_lock"),
        "claims": identifier(ledger, "claims"),
        "route": identifier(ledger, "route"),
        "strategy": identifier(ledger, "strategy"),
        "way_to_search": identifier(ledger, "way_to_search"),
        "check_vector": identifier(ledger, "check_vector"),
        "words": identifier(ledger, "words"),
        "hybrid": identifier(ledger, "hybrid"),
        **{name: identifier(ledger, function) for name, function in words_functions(params).items()},
        **{f"by_{way}": identifier(ledger, function_of(params, way)) for way in WAYS_TO_ANSWER},
        "staging": identifier(ledger, f"{target.name}_staging"),
        "rejected": identifier(ledger, f"{target.name}_rejected"),
        "queue": identifier(ledger, f"{target.name}_queue"),
        "window": identifier(ledger, f"{target.name}_window"),
        "control": identifier(ledger, "control"),
        "move": identifier(ledger, f"{target.name}_move"),
        "move_queue": identifier(ledger, f"{target.name}_move_queue"),
        "move_capture": identifier(ledger, f"{target.name}_move_capture"),
        "move_trigger": identifier(trigger_name(params, "move")),
        "move_truncate_trigger": identifier(trigger_name(params, "move_truncate")),
        "capture_function": identifier(ledger, f"{target.name}_capture"),
        "insert_trigger": identifier(trigger_name(params, "insert")),
        "update_trigger": identifier(trigger_name(params, "update")),
        "function": identifier(target.schema_, params.function_name),
        "of_trusted_owner": _of_trusted_owner(params),
        "is_called": sql.SQL("(p.proargtypes[1] = 'pg_catalog.float4[]'::pg_catalog.regtype AND {})").format(
            _of_trusted_owner(params)
        ),
        "target_name": sql.Literal(target.name),
        "draw": DRAW,
        **_where_vectors_stand(params),
    }


def _of_trusted_owner(params: Params) -> sql.Composed:
    """Is the owner of the function ``p`` one who could change the table anyway? Others may make one of its name."""
    table = sql.Literal(sql.Identifier(params.target.schema_, params.target.table).as_string())
    return sql.SQL(
        "coalesce(pg_catalog.pg_has_role(p.proowner, (SELECT c.relowner FROM pg_catalog.pg_class c"
        " WHERE c.oid = pg_catalog.to_regclass({})), 'MEMBER'), true)"
    ).format(verbatim(table.as_string()))


def _counted(ledger: str) -> sql.Composed:
    """The rows of the ledger that its owner, or a member of that role, has written, as a sub-select without alias.

    The trigger marks each row as it is written; of a row that an earlier release wrote the writer's role of today is
    asked, and one that is no role any more does not count.
    """
    return sql.SQL(
        "(SELECT e.* FROM {entry} e WHERE coalesce(e.by_owner, EXISTS ("
        "SELECT FROM pg_catalog.pg_roles r, pg_catalog.pg_class c WHERE r.rolname = e.written_by"
        " AND c.oid = pg_catalog.to_regclass({spelled}) AND pg_catalog.pg_has_role(r.oid, c.relowner, 'MEMBER'))))"
    ).format(entry=identifier(ledger, "entry"), spelled=sql.Literal(sql.Identifier(ledger, "entry").as_string()))


def _where_vectors_stand(params: Params) -> dict[str, sql.Composable]:
    table = identifier(params.target.schema_, params.target.table)
    beside = has_side_table(params)
    vectors = identifier(params.target.schema_, side_table_name(params)) if beside else table
    column, alias = params.vector.column, "e" if beside else "t"
    parts = {"table": table, "vectors": vectors}
    key = key_of(params)
    parts |= {"same": key.alike("t.key", "e.key"), "same_or_none": key.alike("e.key", "t.key")}
    every, outer = (
        "{vectors} e JOIN {table} t ON {same}",
        "{table} t LEFT JOIN {vectors} e ON {same_or_none}",
    )
    own = {name: identifier(f"{column}_{name}") for name in ("chunk", "start", "length")}
    first = sql.SQL(" AND e.{chunk} = 0").format(**own) if has_chunks(params) else sql.SQL("")
    staging = identifier(params.ledger.schema_, f"{params.target.name}_staging")
    staged = "(SELECT x.* FROM {} x WHERE x.chunk = 0)" if has_chunks(params) else "{}"
    return {
        "vectors": vectors,
        "chunk": own["chunk"],
        "chunk_start": own["start"],
        "chunk_length": own["length"],
        "staged": sql.SQL(staged).format(staging),
        "from_all_vectors": sql.SQL(every if beside else "{table} t").format(**parts),
        "from_vectors": sql.SQL(every if beside else "{table} t").format(**parts) + first,
        "with_vectors": sql.SQL(outer if beside else "{table} t").format(**parts) + first,
        "row_embedding": identifier(alias, column),
        "row_indexed": as_indexed(params, identifier(alias, column)),
        "row_embedding_hash": identifier(alias, f"{column}_hash"),
        "row_embedding_updated_at": identifier(alias, f"{column}_updated_at"),
    }


def _text(columns: list[str], alias: str) -> sql.Composed:
    """The columns as one text, a line each; NULLs are left out. Compared by its bytes, as it is hashed."""
    parts = sql.SQL(", ").join(sql.SQL("{}::text").format(identifier(alias, c)) for c in columns)
    return sql.SQL("""(pg_catalog.concat_ws(E'\\n', {}) COLLATE pg_catalog."C")""").format(parts)
