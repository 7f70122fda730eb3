"""How tables look: text beside the HTML, and words that stay whole."""

from IPython.core.formatters import PlainTextFormatter

from runbook_lib.display import Table
from runbook_lib.gates import collect, gate


def test_a_long_path_may_break_behind_its_marks_and_a_short_word_never() -> None:
    shown = Table(("file", "is"), [("/srv/runbook/params/articles/queries.jsonl", "a<b.c")])._repr_html_()
    assert "/<wbr>srv/<wbr>runbook/<wbr>params/<wbr>articles/<wbr>queries.<wbr>jsonl" in shown
    assert ">a&lt;b.c</td>" in shown


def test_a_notebook_keeps_tables_and_gates_as_text_beside_the_html() -> None:
    as_text = PlainTextFormatter()
    assert as_text(Table(("a", "b"), [(1, "x")])) == "a  b\n1  x"
    gates = collect([gate("m.holds", True, "t", found="1", needed="1")])
    assert as_text(gates) == "PASS    m.holds   t\n  found   1\n  needed  1"
