"""The vector index built and dropped while applications work, one partition after the other.

An index on a partitioned table alone holds no row. Each partition's own is built concurrently and attached; with the
last one that of the table turns valid, and a partition that is made later gets its index from PostgreSQL. An ordinary
table has one leaf and nothing to attach. What is left to do is always read from the catalogue, so a build that was
stopped anywhere resumes there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.display import Table, duration, number
from runbook_lib.core.gates import Gate, RunbookError, gate
from runbook_lib.core.names import identifier, indexed_rows, literal, names, spelled, verbatim
from runbook_lib.core.phase import Phase, changes
from runbook_lib.indexes import forecast, partitions, shards, vector_index
from runbook_lib.indexes.partitions import Part
from runbook_lib.indexes.shards import ShardIndex
from runbook_lib.indexes.vector_index import Options, VectorIndex
from runbook_lib.params import Params
from runbook_lib.sql import Block, load

SQL, OF_PARTITIONS, WATCH, CITUS = load("index"), load("index_partitions"), load("watch"), load("citus")

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 10.0
# A partition that appears while the last one is built is taken in another round; so many are enough for anybody.
MOST_ROUNDS = 10


@dataclass
class Built:
    """What a statement took: seconds, the server's notices, and samples of seconds, blocks done and blocks in all."""

    seconds: float = 0.0
    notices: list[str] = field(default_factory=list)
    samples: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class BuildStep:
    """A statement, the table or partition that it is about, and what kind of statement it is.

    index: the name of what is built. in_short_tries: in a transaction that waits briefly for its locks; every other
    runs CONCURRENTLY. shard: where it is built on one shard alone, that shard and its node.
    """

    part: Part
    statement: db.Statement
    index: str = ""
    in_short_tries: bool = False
    shard: str = ""


def create_statement(
    connection: db.Connection,
    params: Params,
    part: Part,
    name: str,
    options: Options | None = None,
    other: Mapping[str, sql.Composable] | None = None,
    *,
    bracket: bool = False,
) -> db.Statement:
    """CREATE INDEX on one relation, concurrently unless it is a ``bracket``: that of a partitioned table alone.

    options: in place of those of the parameters. other: what else the block is to say in place of its names.
    """
    blocks, block = (OF_PARTITIONS, "create_bracket") if bracket else (SQL, "create")
    chosen = _options(connection, params, part, options or {})
    held = {"of_rows": indexed_rows(params, part.name)}
    extra = {"index": identifier(name), **held, **{k: sql.Literal(v) for k, v in chosen.items()}, **(other or {})}
    return _about(params, blocks[f"{block}_{params.index.method}"], part, extra)


def _options(connection: db.Connection, params: Params, part: Part, given: Options) -> Options:
    chosen = vector_index.asked_for(params) | given
    if params.index.method == "ivfflat" and "lists" not in chosen:
        chosen["lists"] = forecast.lists_rule(rows_with_vector(connection, params, part))
    return chosen


def rows_with_vector(connection: db.Connection, params: Params, part: Part) -> int:
    """Counted; the planner's estimate of a parent's partitions, and in a plan made before there are vectors."""
    query = SQL["rows"].compose(names(params) | {"relation": identifier(part.schema, part.name)})
    try:
        row = connection.execute(query).fetchone() if part.is_leaf else None
    except (psycopg.errors.UndefinedColumn, psycopg.errors.UndefinedTable):
        row = None
    return int(row["rows"]) if row else part.rows


def _about(params: Params, block: Block, part: Part, extra: Mapping[str, sql.Composable]) -> db.Statement:
    """A block about one relation; the lock that it shows names that relation."""
    made = db.statement(block, params, {"relation": identifier(part.schema, part.name), **extra})
    return replace(made, lock=made.lock.replace("{relation}", part.shown))


def build_steps(
    connection: db.Connection,
    index: VectorIndex,
    *,
    options: Options | None = None,
    of_partitions: Mapping[str, Options] | None = None,
    drop: Block = SQL["drop"],
) -> list[BuildStep]:
    """What is left to do until the index is whole: what holds no row, then each leaf's, attached once it is built.

    options, of_partitions: in place of the parameters', the latter by partition. drop: drops what was left invalid.
    """
    if index.root and index.shards:
        return _on_shards(connection, index, drop)
    params, todo = index.params, list[BuildStep]()
    by_oid = {part.oid: part for part in index.parts}
    for part in index.parts:
        if part.kind not in (partitions.PARTITIONED, partitions.TABLE):
            continue  # a foreign table takes no index
        own, name = index.own.get(part.oid), index.name_on(part)
        if own is not None and part.is_leaf and not own.usable:
            todo.append(_repair(index, part, drop))
            own = own if index.is_attached(part) else None
        if own is None:
            given = (of_partitions or {}).get(part.shown, options)
            largest = replace(part, rows=max((leaf.rows for leaf in index.leaves), default=0))
            bracket = not part.is_leaf
            create = create_statement(connection, params, largest if bracket else part, name, given, bracket=bracket)
            todo.append(BuildStep(part, create, name, in_short_tries=bracket))
        above = by_oid.get(part.parent or 0)
        if above is not None and (own is None or not index.is_attached(part)):
            pair = {
                "parent_index": identifier(above.schema, index.name_on(above)),
                "index": identifier(part.schema, name),
            }
            todo.append(BuildStep(part, _about(params, OF_PARTITIONS["attach"], part, pair), in_short_tries=True))
    if not todo and index.own and not index.usable and not index.lacking:
        # A parent's that turned invalid never turns valid again, whatever is attached to it.
        scratch = replace(index, own={})
        again = build_steps(connection, scratch, options=options, of_partitions=of_partitions, drop=drop)
        return [*drop_steps(index, drop), *again]
    # Those of parents first: from then on PostgreSQL gives each new partition its index by itself.
    return sorted(todo, key=lambda step: step.part.is_leaf)


def _on_shards(connection: db.Connection, index: VectorIndex, drop: Block) -> list[BuildStep]:
    """Builds the index where shards lack it, each on its node; all of it again where none has it, or one that lacks
    it lies on the coordinator: a build there would wait for the very session that asks for it. Nothing is dropped,
    nor called whole, while a node does not say what it has.
    """
    lacking, (part,), root = index.lacking_shards, index.parts, index.root
    if root is None or index.usable:
        return []
    known = [x for x in lacking if x.state != "unknown"]
    if len(known) == len(index.shards) or (known == lacking and any(x.coordinator for x in lacking)):
        return [*drop_steps(index, drop), *build_steps(connection, replace(index, own={}, shards=()), drop=drop)]
    todo = [_on_shard(connection, index, part, x) for x in known if not x.coordinator]
    if not root.usable and len(todo) == len(lacking):
        whole = {"qualified_index": identifier(part.schema, root.name), "index_name": literal(root.shown)}
        todo.append(BuildStep(part, db.statement(CITUS["index_is_whole"], index.params, whole), in_short_tries=True))
    return todo


def _on_shard(connection: db.Connection, index: VectorIndex, part: Part, shard: ShardIndex) -> BuildStep:
    """The command is that of the whole table, about this shard; the node carries it out."""
    if shard.state == "invalid":
        command = OF_PARTITIONS["reindex"].compose({"index": verbatim(shard.name)})
    else:
        other = {"relation": verbatim(shard.relation)}
        command = create_statement(connection, index.params, part, shard.bare_name, other=other).query
    own = {
        "node": literal(shard.node),
        "port": sql.Literal(shard.port),
        "command": literal(command.as_string(connection).replace("%%", "%")),
    }
    made = db.statement(CITUS["build_on_shard"], index.params, own)
    where = f"{shard.relation} on {shard.node}:{shard.port}"
    lock = made.lock.replace("{relation}", where)
    return BuildStep(part, replace(made, lock=lock), index.name_on(part), shard=where)


def _repair(index: VectorIndex, part: Part, drop: Block) -> BuildStep:
    """An invalid index goes; one that is part of another cannot be dropped alone, and is built again in its place."""
    name = index.name_on(part)
    if index.is_attached(part):
        again = {"index": identifier(part.schema, name)}
        return BuildStep(part, _about(index.params, OF_PARTITIONS["reindex"], part, again), name)
    return BuildStep(part, _about(index.params, drop, part, {"dropped": identifier(part.schema, name)}))


def drop_steps(index: VectorIndex, drop: Block = SQL["drop"]) -> list[BuildStep]:
    """A leaf's index that is part of no other goes concurrently; that of a parent, with all that it holds, under a
    short lock, since PostgreSQL has no other way.
    """
    alone = [part for part in index.parts if part.oid in index.own and not index.is_attached(part)]
    todo = []
    for part in sorted(alone, key=lambda part: (not part.is_leaf, -part.level)):
        block = drop if part.is_leaf else OF_PARTITIONS["drop_bracket"]
        name = {"dropped": identifier(part.schema, index.name_on(part))}
        todo.append(BuildStep(part, _about(index.params, block, part, name), in_short_tries=not part.is_leaf))
    return todo


def plan(connection: db.Connection, steps: Sequence[BuildStep]) -> db.Plan:
    """The statements of these steps."""
    return db.Plan(tuple(step.statement for step in steps), connection)


@changes
def build(phase: Phase, left: Callable[[], Sequence[BuildStep]], built: Callable[[], VectorIndex]) -> Table:
    """Carries out what is left until nothing is, then writes down what the whole index took.

    A partition that appears meanwhile is taken too, one that is gone is passed over. Raises LockNotObtained where a
    partition's index could not be attached; run again, it resumes there.
    """
    if not phase.execute:
        return phase.carry_out(plan(phase.connection, left()))
    rows: list[tuple[Any, ...]] = []
    for _ in range(MOST_ROUNDS):
        todo = left()
        if not todo:
            break
        rows += [_take(phase, step, where) for step, where in _numbered(todo)]
    if rows:
        _note_whole(phase, built())
    return _table(rows)


@changes
def carry_out(phase: Phase, steps: Sequence[BuildStep]) -> Table:
    """Carries out these steps, each by its own way."""
    if not phase.execute:
        return phase.carry_out(plan(phase.connection, steps))
    return _table([_take(phase, step, where) for step, where in _numbered(steps)])


def _table(rows: Sequence[tuple[Any, ...]]) -> Table:
    return Table(("table", "what", "lock", "seconds"), rows)


def _numbered(todo: Sequence[BuildStep]) -> Iterator[tuple[BuildStep, str]]:
    leaves = list(dict.fromkeys(step.part.oid for step in todo if step.part.is_leaf))
    for step in todo:
        counts = step.part.is_leaf and len(leaves) > 1
        place = f"partition {leaves.index(step.part.oid) + 1} of {len(leaves)}, " if counts else ""
        yield step, f"{place}{step.part.shown}"


def _take(phase: Phase, step: BuildStep, where: str) -> tuple[Any, ...]:
    """Carries out one step; returns its row of the table. Raises RunbookError where its index's name is taken."""
    part = step.part
    if part.oid and not partitions.is_there(phase.connection, phase.params, part):
        print(f"  {where}: gone meanwhile, passed over")
        return (part.shown, "gone meanwhile, passed over", "none", 0.0)
    print(f"  {where}, about {number(part.rows)} rows" if part.is_leaf else f"  {where}")
    try:
        seconds = phase.do(step.statement).seconds if step.in_short_tries else _concurrently(phase, step).seconds
    except psycopg.errors.DuplicateTable as error:
        raise RunbookError(
            found=error.diag.message_primary or str(error),
            needed=f"{step.index} free in schema {part.schema}",
            danger="the index cannot be built; what was built before stays",
            do="rename or drop what has this name, then run this again",
        ) from None
    except psycopg.errors.RaiseException as error:
        if not step.shard:
            raise
        # What a node said, which the coordinator passes on.
        raise RunbookError(
            found=f"{step.shard}: {error.diag.message_primary}",
            needed="the index built there",
            danger="every search reads this shard whole; the other shards keep their indexes",
            do="remove the cause, then run this again: it resumes with the shards that lack theirs",
        ) from None
    return (part.shown, step.statement.purpose, step.statement.lock, round(seconds, 3))


def _concurrently(phase: Phase, step: BuildStep) -> Built:
    name = identifier(step.part.schema, step.index).as_string().replace("%%", "%") if step.index else ""
    built = concurrently(phase, step.statement, name)
    if step.index:
        found = partitions.indexes(phase.connection, phase.params, [step.part])
        own = next((x for x in found if x.name == step.index), None)
        body = {"index": own.shown if own else "", "partition": step.part.shown, "bytes": own.bytes if own else 0}
        phase.note("partition_index", body | vars(built) | {"seconds": round(built.seconds, 3)})
    return built


def _note_whole(phase: Phase, index: VectorIndex) -> None:
    """A ledger row of the whole index, once there is nothing left to build.

    Partitions that an earlier, stopped run built count with what it noted.
    """
    connection, params = phase.connection, phase.params
    if not index.usable:
        return
    ours = {own.shown for own in index.own.values()}
    noted: dict[str, dict[str, Any]] = {}
    for entry in phase.ledger.entries():
        if entry["kind"] == "partition_index" and entry["body"]["index"] in ours:
            noted[entry["body"]["index"]] = entry["body"]
    samples: list[list[float]] = []
    for body in noted.values():
        began, before = (samples[-1][0], samples[-1][2]) if samples else (0.0, 0)
        samples += [[began + s, before + done, before + total] for s, done, total in body["samples"]]
    method, several = params.index.method, len(index.parts) > 1
    rows = [rows_with_vector(connection, params, part) for part in index.leaves if method == "ivfflat"]
    phase.note(
        "index",
        {
            "name": index.called("").name,
            "method": method,
            "partitions": len(index.leaves),
            "seconds": round(sum(body["seconds"] for body in noted.values()), 3),
            "bytes": index.bytes,
            "notices": [
                f"{body['partition']}: {n}" if several else n for body in noted.values() for n in body["notices"]
            ],
            "samples": samples,
            # Rows that were dead before are not in the index.
            "dead_before": db.one(connection, WATCH["size"], params, table=spelled(params, "vectors")),
            # What the age of its lists is told by.
            **({"rows": sum(rows)} if rows else {}),
        },
    )


@changes
def concurrently(phase: Phase, statement: db.Statement, index: str = "") -> Built:
    """Runs a CONCURRENTLY statement on a connection of its own, with lock and statement timeouts off. index: that is
    built, as SQL spells it.

    A timeout would let a build run to its end and then fail it, leaving an invalid index that every write pays for.
    """
    i = phase.params.index
    built = Built()
    with db.beside(phase.connection, phase.params, f"{phase.name} build") as connection:
        connection.execute(
            SQL["settings"].compose({}),
            {"memory": f"{i.maintenance_work_mem_mb}MB", "workers": str(i.parallel_workers)},
        )
        connection.add_notice_handler(lambda notice: built.notices.append(notice.message_primary or ""))
        stop = threading.Event()
        watched = phase.connection, phase.params, f"{phase.name} watch", db.server_pid(connection), index
        watcher = threading.Thread(target=_watch, args=(*watched, built, stop), daemon=True)
        started = time.perf_counter()
        watcher.start()
        try:
            connection.execute(statement.query, statement.values)
        finally:
            stop.set()
            watcher.join()
    built.seconds = time.perf_counter() - started
    print(f"  {statement.name}: done in {duration(built.seconds)}")
    for notice in built.notices:
        print(f"  NOTICE: {notice}")
    phase.note_statement(db.Done(statement, -1, built.seconds, 1))
    return built


def _watch(
    connection: db.Connection,
    params: Params,
    purpose: str,
    pid: int,
    index: str,
    built: Built,
    stop: threading.Event,
) -> None:
    """Samples the build's progress from a session of its own until told to stop."""
    started = last_line = time.perf_counter()
    with db.beside(connection, params, purpose) as watch:
        while not stop.wait(SECONDS_BETWEEN_LOOKS):
            row = _progress(watch, params, pid, index)
            if row is None:
                continue
            now = time.perf_counter()
            built.samples.append([round(now - started, 2), row["blocks_done"], row["blocks_total"]])
            if now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                done, total = row["blocks_done"], row["blocks_total"]
                left = f", about {duration((now - started) * (total - done) / done)} left" if done else ""
                print(f"  {row['phase']}: {number(done)} of {number(total)} blocks{left}")


def _progress(watch: db.Connection, params: Params, pid: int, index: str) -> db.Row | None:
    """phase, blocks_done and blocks_total of a build; of a distributed table, those of all shards added up."""
    held = shards.look(watch, params, index) if index else ()
    if not held:
        return next(iter(db.rows(watch, SQL["progress"], params, pid=pid)), None)
    block = [x.heap_bytes // forecast.PAGE for x in held]
    done = [whole if x.usable else x.blocks_done for x, whole in zip(held, block, strict=True)]
    phase = f"{sum(x.usable for x in held)} of {len(held)} shards built"
    return {"phase": phase, "blocks_done": sum(done), "blocks_total": sum(block)}


def none_under_way(name: str, subject: str, builds: int) -> Gate:
    """Gate before a build: no other is at work on the table. name: of the gate; builds: those that were found."""
    return gate(
        name,
        not builds,
        subject,
        found=f"{builds} builds at work on this table" if builds else "none",
        needed="none",
        danger="the two would wait for each other, and what looks left over may be at work",
        do="wait for it: SELECT * FROM pg_stat_progress_create_index;",
    )


def in_the_way(phase: Phase) -> Table:
    """Open transactions that the build will wait for at its end, longest first."""
    found = db.rows(phase.connection, SQL["in_the_way"], phase.params)
    return Table.of(found, "transactions that the build waits for")
