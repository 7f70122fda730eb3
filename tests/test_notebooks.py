"""The shape of a notebook: what a reader may rely on in every one of them."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

from runbook_lib.core import cell_order
from runbook_lib.core.registry import MIGRATE, OPERATE, STEPS, UNDO, UNDO_OPERATION, notebook

ROOT = Path(__file__).parent.parent / "notebooks"
PATHS = sorted(ROOT.glob("*/*.ipynb"))
MOST_CELLS, FEWEST_CELLS, MOST_LINES = 16, 12, 5
# A longer line scrolls in JupyterLab on a screen of 1,280 pixels.
LONGEST_LINE = 98
HEADINGS = ["What changes", "Parameters", "Where am I", "Must be true first", "Must be true now", "What comes next"]
LOOPS = (ast.For, ast.While, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ListComp, ast.DictComp)

notebooks = pytest.mark.parametrize("path", PATHS, ids=lambda p: f"{p.parent.name}/{p.stem}")


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def test_every_phase_and_every_way_back_has_its_notebook() -> None:
    assert sorted(ROOT / notebook(name) for name in STEPS) == PATHS
    assert {notebook(name).partition("/")[0] for name in MIGRATE} == {"migrate"}
    assert {notebook(name).partition("/")[0] for name in OPERATE} == {"operate"}
    assert {notebook(name).partition("/")[0] for name in (*UNDO, *UNDO_OPERATION)} == {"undo"}


def test_every_phase_is_taken_back_by_exactly_one_undo() -> None:
    assert sorted(p for rollback in UNDO for p in STEPS[rollback].rolls_back) == sorted(MIGRATE)


@notebooks
def test_it_is_valid_short_and_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert FEWEST_CELLS <= len(notebook.cells) <= MOST_CELLS
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in cells(path, "code"):
        assert (cell.outputs, cell.execution_count) == ([], None)
        assert len([x for x in cell.source.splitlines() if x.strip()]) <= MOST_LINES
        assert max(map(len, cell.source.splitlines())) <= LONGEST_LINE


@notebooks
def test_its_sections_stand_in_the_order_of_the_house(path: Path) -> None:
    text = "\n".join(c.source for c in cells(path, "markdown"))
    found = re.findall(r"^#{1,2} (.*)$", text, re.M)
    places = [next(i for i, title in enumerate(found) if title.startswith(wanted)) for wanted in HEADINGS]
    assert places == sorted(places)
    assert "| what | lock | whom it blocks | what it waits for | undo |" in text
    assert text.count("After a restart of the kernel (`NameError: name 'phase' is not defined`) run the cells") == 1


@notebooks
def test_a_cell_out_of_order_is_told_of_a_section_that_is_there(path: Path) -> None:
    titles = re.findall(r"^## (.*)$", "\n".join(c.source for c in cells(path, "markdown")), re.M)
    for told in (cell_order.OPEN, cell_order.REQUIRE, cell_order.PLAN, cell_order.PROVE, cell_order.CLOSE):
        assert [title for title in titles if title.startswith(told)], told


@notebooks
def test_a_function_that_its_text_names_can_be_called_in_it(path: Path) -> None:
    imported: dict[str, str] = {}
    for cell in cells(path, "code"):
        for package, names in re.findall(r"^from (runbook_lib[\w.]*) import ([\w, ]+)$", cell.source, re.M):
            imported |= {name: f"{package}.{name}" for name in names.split(", ")}
    text = "\n".join(c.source for c in cells(path, "markdown"))
    for module, function in re.findall(r"`(\w+)\.(\w+)\(phase", text):
        assert module == "phase" or hasattr(import_module(imported[module]), function), f"{module}.{function}"


@notebooks
def test_every_action_has_the_expected_result_above_it(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code" and ".apply(" in cell.source:
            assert before.cell_type == "markdown" or ".apply(" in before.source


@notebooks
def test_cells_call_the_library_and_do_nothing_of_their_own(path: Path) -> None:
    for cell in cells(path, "code"):
        if cell.source.startswith("%%sql"):
            assert re.match(r"%%sql\n\s*(SELECT|WITH)\b", cell.source), "a %%sql cell only reads"
            assert "'{" not in cell.source and not re.search(r"--", cell.source), "ipython-sql's traps"
            continue
        assert not re.search(r"^\s*[!%]", cell.source, re.M)
        tree = ast.parse(cell.source)
        assert not [n for n in ast.walk(tree) if isinstance(n, LOOPS)]


@notebooks
def test_what_its_cells_import_and_call_is_there(path: Path) -> None:
    code = "\n".join(c.source for c in cells(path, "code") if not c.source.startswith("%%"))
    tree = ast.parse(code)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    found: dict[str, object] = {}
    exec(compile(ast.Module(imports, []), str(path), "exec"), found)
    called = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    assert [ast.unparse(n) for n in called if n.value.id in found and not hasattr(found[n.value.id], n.attr)] == []  # type: ignore[attr-defined]
    ours = [n for n in called if n.value.id in found]  # type: ignore[attr-defined]
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        if call.func in ours:
            signature = inspect.signature(eval(ast.unparse(call.func), found))
            given = signature.bind(*call.args, **{str(k.arg): k.value for k in call.keywords}).arguments
            takes = [signature.parameters[name] for name, of in given.items() if ast.unparse(of) == "phase"]
            assert all(p.annotation == "Phase" for p in takes), ast.unparse(call)
        if ast.unparse(call.func) in ("phase.require", "phase.prove"):
            for look in (a for a in call.args if a in ours):
                (only,) = inspect.signature(eval(ast.unparse(look), found)).parameters.values()
                assert only.annotation == "Phase", ast.unparse(look)


@notebooks
def test_it_takes_three_parameters_and_changes_nothing_by_default(path: Path) -> None:
    tagged = [c for c in cells(path, "code") if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    values = {t.targets[0].id: ast.literal_eval(t.value) for t in ast.parse(tagged[0].source).body}  # type: ignore[attr-defined]
    assert values == {"params_file": "../../params/demo.yaml", "run_id": "", "execute": False}


@notebooks
def test_it_opens_the_phase_of_its_own_name_and_closes_it_last(path: Path) -> None:
    code = [c.source for c in cells(path, "code")]
    opened = re.findall(r'open_phase\("([^"]+)"', "\n".join(code))
    assert [ROOT / notebook(name) for name in opened] == [path]
    assert code[-1] == "phase.close()"


@notebooks
def test_it_says_how_its_figures_become_a_frame_and_names_what_is_there(path: Path) -> None:
    text = next(c.source for c in cells(path, "markdown") if "## Must be true now" in c.source)
    assert "`gates.to_frame()`" in text and "`phase.gates.to_frame()`" in text and "read-only" in text
    code = "\n".join(c.source for c in cells(path, "code"))
    frames = re.findall(r"`([\w.]+)\.to_frame\(([^`]*)\)`", text)
    assert len(frames) == 3
    for of, arguments in frames:
        assert of in ("phase.gates", "phase.ledger") or f"{of} = " in code
        assert of != "phase.ledger" or arguments.split(",")[0].strip('"') in kinds()


def kinds() -> set[str]:
    """Kinds of rows that the library writes into the ledger."""
    library = "\n".join(p.read_text() for p in (ROOT.parent / "runbook_lib").glob("*/*.py"))
    return set(re.findall(r'(?:\.(?:note|append)\(\s*|^KIND = )"([a-z_ ]+)"', library, re.M))
