"""The files that a saved model brings along: what they import from each other, and what other engines read in them."""

import ast
import inspect
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from complexity_deep.configuration_complexity_deep import SHIPPED_FILES
from complexity_deep.modeling_complexity_deep import ComplexityDeepAttention
from support import REPOSITORY

MODELING = "modeling_complexity_deep"


def tree_of(name: str) -> ast.Module:
    return ast.parse((REPOSITORY / name).read_text(encoding="utf-8"))


def imports_of(tree: ast.Module) -> set[str]:
    """The siblings that a file imports when it runs, by their flat names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)
    return {node.module.removeprefix("kernels.") for node in found}


def test_imports_go_in_one_direction_and_end_at_the_modeling_file():
    graph = {Path(name).stem: imports_of(tree_of(name)) for name in SHIPPED_FILES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError where two files need each other
    assert set(order) == set(graph) and order[-1] == MODELING


def test_every_marked_method_has_a_fast_path_and_no_fast_path_stands_for_nothing():
    pytest.importorskip("triton")
    from complexity_deep.accelerated_complexity_deep import ACCELERATED

    decorators = [
        decorator
        for node in ast.walk(tree_of(f"{MODELING}.py"))
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
    ]
    marked = [call.args[0].value for call in decorators if getattr(call.func, "id", None) == "accelerated"]
    assert sorted(marked) == sorted(ACCELERATED["triton"]) and ACCELERATED["eager"] == {}


def test_attention_looks_its_function_up_once_and_calls_it_once():
    """vLLM reads the source of the forward, to put its own attention in the place of this call."""
    (forward,) = ast.parse(textwrap.dedent(inspect.getsource(ComplexityDeepAttention.forward))).body
    assignments = [node for node in ast.walk(forward) if isinstance(node, (ast.Assign, ast.AnnAssign))]
    look_ups = [
        node
        for node in assignments
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
    ]
    assert len(look_ups) == 1
    target = look_ups[0].target if isinstance(look_ups[0], ast.AnnAssign) else look_ups[0].targets[0]
    uses = [node for node in ast.walk(forward) if isinstance(node, ast.Name) and node.id == target.id]
    calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call) and ast.unparse(node.func) == target.id]
    assert len(calls) == 1 and len(uses) == 2  # it is given to nothing else


def test_the_modeling_file_can_be_read_in_one_sitting():
    assert len((REPOSITORY / f"{MODELING}.py").read_text(encoding="utf-8").splitlines()) < 850
