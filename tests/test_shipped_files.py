"""The files that a saved model brings along: what they import from each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from complexity_deep.configuration_complexity_deep import SHIPPED_FILES
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


def test_the_modeling_file_can_be_read_in_one_sitting():
    assert len((REPOSITORY / f"{MODELING}.py").read_text(encoding="utf-8").splitlines()) < 850
