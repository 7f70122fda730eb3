"""From one release of pgvector to a newer one: the vectors stay, the index is rebuilt where it must be.

The package on the server is the administrator's to install; the fixes are in its library. What is done here is the
catalogue's part, the proof that the new library is the one at work, and recall before and after.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from runbook_lib.benchmark import index_recall
from runbook_lib.core import db, versions
from runbook_lib.core.display import Table, number, some
from runbook_lib.core.gates import BadInput, Gate, Gates, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import index_name, spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.migrate import build_index, extension, pgvector_releases
from runbook_lib.operate import rebuild_index
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("upgrade")
SHOWN_SESSIONS = 5


def _releases(connection: db.Connection, params: Params) -> tuple[str | None, str | None]:
    """Installed by the catalogue, and wanted: the one asked for, or the one that the server's files offer."""
    row = db.one(connection, extension.SQL["state"], params)
    return row["installed"], params.extension.version or row["default_version"]


def loaded_release(connection: db.Connection, params: Params) -> str | None:
    """The release of this session's library, where the server says so (PostgreSQL 18); otherwise None."""
    if not versions.names_loaded_libraries(connection.info.server_version):
        return None
    found = db.rows(connection, SQL["loaded"], params)
    return found[0]["version"] if found else None


def check(phase: Phase) -> Gates:
    """Before anything is changed: both releases are known by their tags."""
    installed, wanted = _releases(phase.connection, phase.params)
    unknown = [v for v in (installed, wanted) if v is None or pgvector_releases.release(v) is None]
    return collect(
        [
            gate(
                "upgrade.releases_are_tagged",
                not unknown,
                "vector",
                found=f"from {installed or 'not installed'} to {wanted or 'not available'}"
                + (f"; not known: {', '.join(str(v) for v in unknown)}" if unknown else ""),
                needed="two releases whose tags are listed in pgvector_releases.py",
                danger="what lies between is not written down, nor whether indexes must be rebuilt",
                do=f"install a tagged release, {pgvector_releases.RELEASES[-1].version} for instance; a newer tag is"
                " added to RELEASES in pgvector_releases.py first, with what it fixes",
            )
        ]
    )


def why_rebuild(connection: db.Connection, params: Params) -> str:
    """Why the index must be rebuilt after the update; empty where it need not."""
    installed, wanted = _releases(connection, params)
    safe = pgvector_releases.VACUUMS_HNSW_SAFELY
    if params.index.method != "hnsw" or installed is None or versions.at_least(installed, safe):
        return ""
    if wanted is None or not versions.at_least(wanted, safe):
        return ""
    row = db.one(connection, SQL["vacuums"], params, vectors=spelled(params, "vectors"))
    since = row["counted_since"]
    if not row["vacuums"] and since is None:
        return ""
    times = f"{number(row['vacuums'])} vacuums counted" + (f" since {since:%Y-%m-%d}" if since else "")
    faults = "; ".join(f for r in pgvector_releases.between(installed, safe) for f in r.fixes if "vacuum" in f)
    return f"{times} under {installed}: {faults}"


def plan(phase: Phase) -> db.Plan:
    """ALTER EXTENSION UPDATE where the catalogue is behind, then the index where it must be rebuilt.

    Raises BadInput for a release that no known tag carries.
    """
    connection, params = phase.connection, phase.params
    untagged = check(phase).failed
    if untagged:
        raise BadInput(untagged)
    update = tuple(extension.plan(phase))
    anew = (
        tuple(rebuild_index.plan(phase))
        if (update and why_rebuild(connection, params)) or must_rebuild(connection, phase.ledger, params)
        else ()
    )
    return db.Plan((*update, *anew), connection)


def brings(phase: Phase) -> Table:
    """What each release between fixes, and whether the index must be rebuilt."""
    connection, params = phase.connection, phase.params
    found = extension.brings(connection, params)
    why = why_rebuild(connection, params) or _pending(connection, phase.ledger, params)
    last = ("index", "", "rebuilt, concurrently" if why else "stays as it is", why)
    return Table(found.columns, [*found.rows, last], found.caption)


@changes
def measure(phase: Phase) -> Table:
    """Recall before the update, written down once for each release that the catalogue has named.

    Run this notebook before the server's package is replaced as well: the figures then are of the old library.
    """
    if not phase.execute:
        return Table(("not measured (execute is false)",), [])
    before = _recall_of(phase.ledger, _releases(phase.connection, phase.params)[0]) or _measure(phase)
    return Table.of([before], "recall before the update")


def _measure(phase: Phase) -> dict[str, Any]:
    connection, params = phase.connection, phase.params
    asked = index_recall.questions(connection, params)
    others = [s.name for s in rebuild_index.standing(connection, params) if s.usable and s.role != "current"]
    found = index_recall.through(connection, params, asked, index_name(params), others)
    body = {
        "catalogue": _releases(connection, params)[0],
        "library": loaded_release(connection, params),
        **(found.as_data() if found else {}),
    }
    phase.note("release_recall", body)
    return body


def _recall_of(ledger: Ledger, release: str | None) -> dict[str, Any] | None:
    """The last recall that was measured while the catalogue named this release."""
    bodies = [e["body"] for e in ledger.entries() if e["kind"] == "release_recall"]
    return next((b for b in reversed(bodies) if b["catalogue"] == release and "recall" in b), None)


@changes
def apply(phase: Phase) -> Table:
    """Updates the catalogue. No row of the table is touched, no vector made again."""
    connection, params = phase.connection, phase.params
    update = extension.plan(phase)
    if phase.execute and update.statements:
        installed, wanted = _releases(connection, params)
        body = {
            "from": installed,
            "to": wanted,
            "why_rebuild": why_rebuild(connection, params),
            "index": _serving(connection, params),
        }
        # Before the update: after it the catalogue no longer says where it came from.
        phase.note("upgrade", body)
    return phase.carry_out(update)


def _serving(connection: db.Connection, params: Params) -> int:
    return build_index.index(connection, params).oid


def _pending(connection: db.Connection, ledger: Ledger, params: Params) -> str:
    """Why the last update asks for a rebuilt index, as long as the index of that time still serves."""
    last = ledger.latest("upgrade")
    if not last or not last["why_rebuild"]:
        return ""
    # Earlier releases wrote down the oid of a partition's.
    serving = {own.oid for own in build_index.index(connection, params).own.values()}
    return str(last["why_rebuild"]) if last["index"] in serving else ""


def must_rebuild(connection: db.Connection, ledger: Ledger, params: Params) -> bool:
    """Is the index still to be rebuilt, or a rebuild half done?"""
    return bool(_pending(connection, ledger, params)) or any(
        s.role in ("new", "old") for s in rebuild_index.standing(connection, params)
    )


@changes
def build_beside(phase: Phase) -> Table:
    """Builds a new index, where the update asks for one; the old one stays in use meanwhile."""
    if not must_rebuild(phase.connection, phase.ledger, phase.params) and not (
        not phase.execute and why_rebuild(phase.connection, phase.params)
    ):
        return Table(("index",), [("stays as it is",)])
    return rebuild_index.apply(phase)


def verify_new(phase: Phase) -> Gates:
    """The rebuilt index, proved before it takes its place; one that stays as it is, present."""
    return (
        rebuild_index.verify_new(phase)
        if must_rebuild(phase.connection, phase.ledger, phase.params)
        else rebuild_index.check(phase)
    )


@changes
def swap(phase: Phase) -> Table:
    """Puts the new index into its place, where there is one."""
    if not must_rebuild(phase.connection, phase.ledger, phase.params):
        return Table(("index",), [("stays as it is",)])
    return rebuild_index.swap(phase)


def verify(phase: Phase) -> Gates:
    """Catalogue, files and library are of one release, in every session; the index is sound and finds as much."""
    connection, params = phase.connection, phase.params
    return extension.verify(phase) + collect(
        [
            *_library_is_new(connection, params),
            holders(connection, params),
            _index_is_sound(connection, phase.ledger, params),
            _recall_is_kept(phase),
        ]
    )


def _library_is_new(connection: db.Connection, params: Params) -> list[Gate]:
    """On servers that name the libraries that a session has loaded."""
    loaded, (installed, _) = loaded_release(connection, params), _releases(connection, params)
    if loaded is None:
        return []
    return [
        gate(
            "upgrade.loaded_library_is_that_release",
            loaded == installed,
            "vector.so of this session",
            found=f"{loaded}, by its own word",
            needed=str(installed),
            danger="; ".join(f for r in pgvector_releases.between(loaded, installed or loaded) for f in r.fixes)
            or "catalogue and library are of two releases",
            do="install the server's package of that release; restart the server where shared_preload_libraries"
            " names vector",
        )
    ]


def _changed_at(connection: db.Connection, params: Params) -> tuple[datetime | None, str]:
    """When the library's file changed; None, and the role, where this role may not see it."""
    may = db.one(connection, SQL["may_look_at_files"], params)
    if not may["may"]:
        return None, may["role"]
    found = db.rows(connection, SQL["library_file"], params)
    return (found[0]["changed_at"] if found else None), may["role"]


def holders(connection: db.Connection, params: Params) -> Gate:
    """Sessions that may still have the old library loaded: a process keeps the file that it opened.

    What other sessions have loaded nobody can see from outside; what can be seen is that they began before the file
    changed. Where that cannot be seen either, every session older than this one may hold it.
    """
    changed_at, role = _changed_at(connection, params)
    older = db.rows(connection, SQL["older_sessions"], params, changed_at=changed_at)
    shown = some([f"pid {s['pid']} ({s['role']}, {s['application'] or 'no name'})" for s in older], SHOWN_SESSIONS)
    when = f"the library's file changed, {changed_at:%Y-%m-%d %H:%M:%S}" if changed_at else "this one"
    grants = f"GRANT EXECUTE ON FUNCTION pg_config(), pg_stat_file(text, boolean) TO {role};"
    return gate(
        "upgrade.no_session_holds_the_old_library",
        not older if changed_at or not older else None,
        "sessions of this database",
        found=f"{number(len(older))} began before {when}: {shown}" if older else f"all began after {when}",
        needed="none that began before the library's file changed",
        danger="they run with the faults of the old library until they reconnect, and write to the same index",
        do="have them reconnect, or end them: SELECT pg_terminate_backend(<pid>);"
        + ("" if changed_at else f" to see more, have a superuser run: {grants}"),
        figures={"sessions": len(older)},
    )


def _index_is_sound(connection: db.Connection, ledger: Ledger, params: Params) -> Gate:
    why = _pending(connection, ledger, params)
    return gate(
        "upgrade.index_is_not_of_a_faulty_vacuum",
        not why,
        index_name(params),
        found=why or "rebuilt since, or never at risk",
        needed=f"an HNSW index that no release before {pgvector_releases.VACUUMS_HNSW_SAFELY} has vacuumed",
        danger="links that were lost then stay lost: the new library does not bring them back",
        do="run operate/update_extension again with execute: true; it builds the index again next to this one",
    )


def _recall_is_kept(phase: Phase) -> Gate:
    last = phase.ledger.latest("upgrade")
    before = _recall_of(phase.ledger, last["from"]) if last else None
    was, now = (index_recall.IndexRecall.of_data(body) for body in (before, _measure(phase)))
    do = "run operate/rebuild_index: many rows with nearly the same vector, written since the build, hide others; or "
    return rebuild_index.recall_gate(phase.params, "upgrade.recall_is_kept", index_name(phase.params), was, now, do)


def undo_plan(connection: db.Connection) -> db.Plan:
    """Nothing: pgvector has no script from a newer release to an older one. :func:`way_back` says what there is."""
    return db.Plan((), connection)


def way_back(phase: Phase) -> Table:
    """What can be taken back, and who does it."""
    last = phase.ledger.latest("upgrade") or {"from": "the release before", "to": "this one"}
    return Table(
        ("what", "rollback"),
        [
            ("library", f"the administrator installs the package of {last['from']} and restarts the server"),
            (
                "catalogue",
                f"stays at {last['to']}; from 0.8.0 on the scripts change nothing, so an older library serves it",
            ),
            ("index", "stays: every release since 0.5.0 reads it"),
            ("vectors", "were never touched"),
        ],
    )
