"""How tables look: text beside the HTML, and words that stay whole."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

from IPython.core.formatters import PlainTextFormatter

from runbook_lib.core.display import Table, duration, frame_of, number, share, size, some, sql_html, statement_html
from runbook_lib.core.gates import collect, gate


def test_a_long_path_may_break_behind_its_marks_and_a_short_word_never() -> None:
    shown = Table(("file", "is"), [("/srv/runbook/params/articles/queries.jsonl", "a<b.c")])._repr_html_()
    assert "/<wbr>srv/<wbr>runbook/<wbr>params/<wbr>articles/<wbr>queries.<wbr>jsonl" in shown
    assert ">a&lt;b.c</td>" in shown


def test_a_notebook_keeps_tables_and_gates_as_text_beside_the_html() -> None:
    as_text = PlainTextFormatter()
    assert as_text(Table(("a", "b"), [(1, "x")])) == "a  b\n1  x"
    gates = collect([gate("m.holds", True, "t", found="1", needed="1")])
    assert as_text(gates) == "PASS    m.holds   t\n  found   1\n  needed  1"


def test_a_table_that_may_be_wider_than_its_place_scrolls_by_itself_and_has_a_name() -> None:
    narrow, wide = (Table(c, [tuple(c)], "<of it>")._repr_html_() for c in ("abcd", "abcde"))
    assert narrow.startswith("<table ") and "tabindex" not in narrow
    assert wide.startswith('<div class="scroll" tabindex="0" role="region" aria-label="&lt;of it&gt;"')


def test_no_value_is_read_as_a_formula_by_the_lab() -> None:
    assert Table(("statement",), [("$1 … $5",)])._repr_html_().startswith('<table class="mathjax_ignore"')
    shown = statement_html(1, "Makes it", [("lock", "none"), ("undo", "")], "SELECT $1, $runbook$ a < b $runbook$;")
    assert shown.startswith('<div class="mathjax_ignore"')
    assert "<strong>lock</strong> none</div>" in shown, "a fact without a value is left out"


def test_sql_is_coloured_and_no_letter_of_it_is_lost() -> None:
    text = "-- why\nCREATE FUNCTION f() RETURNS int LANGUAGE sql AS $runbook$\n    SELECT '<b>' || 1\n$runbook$;\n"
    shown = sql_html(text)
    assert '<pre class="mathjax_ignore"' in shown and "<code>" in shown
    assert re.sub(r"<[^>]+>", "", shown).replace("&lt;", "<").replace("&gt;", ">").replace("&#x27;", "'") == text
    assert "keyword" in shown and "comment" in shown


def test_of_many_the_first_are_named_and_the_others_counted() -> None:
    assert some(["a", "b", "c"], 3) == "a, b, c"
    assert some(range(7), 3) == "0, 1, 2 and 4 more"
    assert some(["a"] * 1235, 1, "; ") == "a and 1,234 more"
    assert some([], 3) == ""


def test_a_frame_has_numbers_where_the_table_shows_them_with_units() -> None:
    table = Table(
        ("index", "size", "took", "rows", "share", "p50", "valid"),
        [
            ("a", size(1536), duration(90), number(1_234_567), share(0.25), 1.5, True),
            ("b", size(2**40), "", number(0), None, None, False),
        ],
    )
    found = table.to_frame()
    assert list(found.columns) == ["index", "size (bytes)", "took (s)", "rows", "share", "p50", "valid"]
    assert found["size (bytes)"].tolist() == [1536, 2**40] and found["size (bytes)"].dtype == "int64"
    assert found["took (s)"].sum() == 90 and found["took (s)"].isna().tolist() == [False, True]
    assert (found["rows"].dtype, found["p50"].dtype, found["valid"].dtype) == ("int64", "float64", "bool")
    assert "1.5 kB" in str(table) and "1,234,567" in str(table), "the table is as it was"


def test_what_is_mixed_in_a_column_stays_as_it_is_shown() -> None:
    facts = Table(("", ""), [("table", size(2048)), ("build", duration(3)), ("rows", number(7))]).to_frame()
    assert facts["column 2"].tolist() == ["2.0 kB", "3.0 s", "7"], "bytes and seconds are not added up"
    some_text = Table(("size", "at"), [(size(1), "not measured"), ("unknown", "")]).to_frame()
    assert some_text["size"].tolist() == ["1 B", "unknown"]
    assert list(Table(("a", "b"), []).to_frame().columns) == ["a", "b"] and len(Table(("a",), []).to_frame()) == 0
    twice = Table(("n", "n"), [(1, "x")]).to_frame()
    assert twice.iloc[0].tolist() == [1, "x"], "two columns of one name are kept"


def test_timestamps_are_timestamps_and_decimals_are_floats() -> None:
    summer, winter = (datetime(2026, m, 1, 12, tzinfo=timezone(timedelta(hours=h))) for m, h in ((7, 2), (12, 1)))
    found = Table(("at", "cost", "local"), [(summer, Decimal("1.5"), datetime(2026, 1, 1)), (winter, None, None)])
    frame = found.to_frame()
    assert str(frame["at"].dtype).endswith("UTC]") and frame["at"][0] == datetime(2026, 7, 1, 10, tzinfo=UTC)
    assert frame["cost"].dtype == "float64" and frame["local"].dtype.kind == "M"
    assert "2026-07-01 12:00:00 UTC+02:00" in str(found)


def test_records_in_records_become_columns() -> None:
    found = frame_of([{"a": 1, "b": {"c": 2, "d": {"e": 0.5}}}, {"a": 3, "b": {}, "f": [1, 2]}])
    assert list(found.columns) == ["a", "b.c", "b.d.e", "b", "f"]
    assert found["b.c"].sum() == 2 and found["f"][1] == [1, 2]
    assert len(frame_of([])) == 0


def test_gates_are_a_row_each_with_their_figures_in_columns() -> None:
    gates = collect(
        [
            gate("m.recall", True, "t", found="0.98", needed="0.95", figures={"recall": 0.98, "found": 7}),
            gate("m.other", None, "t", found="?", needed="1", do="look"),
        ]
    )
    found = gates.to_frame()
    assert list(found.columns[:7]) == ["name", "verdict", "subject", "found", "needed", "danger", "do"]
    assert found["verdict"].tolist() == ["PASS", "UNKNOWN"] and found["found"].tolist() == ["0.98", "?"]
    assert found["figures.recall"][0] == 0.98 and found["figures.recall"].dtype == "float64"


def test_an_amount_is_text_wherever_text_is_taken() -> None:
    assert json.dumps(size(2048)) == '"2.0 kB"' and f"{duration(2)}, {size(1)}" == "2.0 s, 1 B"
    assert size(2048) == "2.0 kB" and size(0) == "0 B" and size(1024**5 * 3) == "3072 TB"


def test_nothing_imports_pandas_before_a_frame_is_asked_for() -> None:
    says = "import sys, runbook_lib.core.phase, runbook_lib.migrate.tune, runbook_lib.operate.compare_storage as c"
    told = subprocess.run(
        [sys.executable, "-c", f"{says}\nprint('pandas' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert told.stdout == "False\n"
