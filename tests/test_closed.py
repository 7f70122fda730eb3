"""A statement is carried out command by command: some servers refuse several in one message."""

from __future__ import annotations

import pytest

from runbook_lib.core.closed import commands


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("SELECT 1", ["SELECT 1"]),
        ("SELECT 1;\nSELECT 2;\n", ["SELECT 1", "\nSELECT 2"]),
        ("SELECT ';' || \"a;b\";", ["SELECT ';' || \"a;b\""]),
        ("CREATE FUNCTION f() AS $x$ BEGIN; END; $x$; SELECT E'\\';'", None),
        ("SELECT 1 -- one; and a half\n, 2", ["SELECT 1 -- one; and a half\n, 2"]),
        ("-- nothing; but words\n/* and; these */;", []),
        ("", []),
    ],
)
def test_commands_end_where_no_string_name_or_comment_holds_the_semicolon(text: str, found: list[str] | None) -> None:
    wanted = ["CREATE FUNCTION f() AS $x$ BEGIN; END; $x$", " SELECT E'\\';'"] if found is None else found
    assert commands(text) == wanted
