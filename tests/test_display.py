"""How tables look: text beside the HTML, and words that stay whole."""

import re

from IPython.core.formatters import PlainTextFormatter

from runbook_lib.core.display import Table, some, sql_html, statement_html
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
