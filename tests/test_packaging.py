"""pyproject.toml, the Makefile and the workflow say what is true: dependencies, targets, versions."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from complexity_deep.configuration_complexity_deep import SHIPPED_FILES

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings its twin
    import tomli as tomllib
from support import REPOSITORY

# Imported inside `try`: the extra `kernels`, and what Transformers itself sizes a cache with on a CPU.
OPTIONAL = {"triton", "psutil"}
# Imported by a script of one extra only in passing, and always there with what it belongs to.
COMES_WITH = {"fsspec": "huggingface-hub", "packaging": "huggingface-hub", "pyarrow": "datasets"}


def imported(paths: list[Path]) -> set[str]:
    """Distributions, in lower case, whose modules the files import anywhere."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    ours = {path.stem for path in (REPOSITORY / "scripts").glob("*.py")} | {"complexity_deep"}
    distributions = packages_distributions()
    found = {distributions[name][0] for name in names - ours - sys.stdlib_module_names if name in distributions}
    return {COMES_WITH.get(name, name) for name in (re.sub(r"[-_.]+", "-", name).lower() for name in found)}


def declared(*extras: str) -> set[str]:
    """Distributions, in lower case, that the package or one of its extras asks for."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [line for extra in extras for line in project["optional-dependencies"][extra]] or project["dependencies"]
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in lines}


def test_base_dependencies_are_what_the_package_imports():
    files = [REPOSITORY / name for name in (*SHIPPED_FILES, "__init__.py")]
    assert imported(files) - OPTIONAL == declared()


def with_parts(command: Path) -> set[Path]:
    """The file of a command and those of ours that it imports, and these import."""
    found, new = set(), {command}
    while new:
        found |= new
        nodes = [node for path in new for node in ast.walk(ast.parse(path.read_text()))]
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        paths = {REPOSITORY / f"{name.removeprefix('complexity_deep.').replace('.', '/')}.py" for name in names}
        new = {path for path in paths if path.is_file()} - found
    return found


@pytest.mark.parametrize("command", sorted((REPOSITORY / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_the_extra_that_a_command_names_has_what_it_imports(command):
    extras = set(re.findall(r'needs\("(\w+)"\)', command.read_text()))
    assert len(extras) <= 1
    allowed = declared() | OPTIONAL | (declared(*extras) if extras else set())
    missing = imported(sorted(with_parts(command))) - allowed
    assert not missing, f"{command.name} says {extras or 'nothing'} and needs {missing}"


def test_an_install_warns_of_no_folder_of_data():
    """setuptools would take each folder of data for a package that was forgotten, and pip prints that also if quiet."""
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["include-package-data"] is False and "package-data" in setuptools


def test_the_workflow_runs_what_our_ci_runs():
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    assert [step.get("run") for step in workflow["jobs"]["test"]["steps"]][-1] == ".ci/run"
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text()


def test_pre_commit_has_the_versions_of_the_constraints():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    constraints = (REPOSITORY / "constraints.txt").read_text()
    for hook in hooks:
        name = hook["repo"].rsplit("/", 1)[1].removesuffix("-pre-commit")
        assert f"{name}=={hook['rev'].removeprefix('v')}\n" in constraints, name
