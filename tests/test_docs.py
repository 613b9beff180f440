"""What README.md and docs/ show is run: snippets, commands, the notebook. What they say agrees with the files.

Every page is followed from top to bottom in an empty folder that looks like a clone, with tiny models where the page
has real ones. Python blocks run one after the other. A bash block under `<!-- test: run -->` runs too, and so does the
server of one under `<!-- test: serve -->`, at a port that is free and until the page ends. The commands of all other
bash blocks need a GPU, the Hub or much time: their own parsers read them, and they stop there.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from complexity_deep.workflow.data.conversation_formats import FORMATS
from complexity_deep.workflow.main import list_of_commands
from pretraining import write_recipe
from served import Served
from support import GOLDEN, REPOSITORY, run_command

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES += [REPOSITORY / "docs" / name for name in ("evidence/claims.md", "evidence/scaling.md", "example/README.md")]
BLOCK = re.compile(r"(?:<!-- test: (run|serve) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
SCRIPT = re.compile(r"\bscripts/\w+\.py$")


class Parsed(BaseException):  # commands turn an Exception into a sentence of their own
    """A command's parser took all of its arguments."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the files of a clone and tiny models under the names that the pages use."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "recipes", "configs", "metrics", "tests", "constraints.txt"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "benchmarks").mkdir()
    shutil.copy(REPOSITORY / "benchmarks" / "results.csv", folder / "benchmarks")
    small = tmp_path_factory.mktemp("small")
    run_command(
        "pretrain", "--config", write_recipe(small, {}), "--output-dir", folder / "runs/demo/model", "--max-steps", 2
    )
    shutil.copytree(folder / "runs/demo/model", folder / "runs/30m")
    shutil.copytree(GOLDEN / "v0.13-tiny", folder / "path/to/published")
    return folder


def run_script(path: str, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(str(REPOSITORY / path), run_name="__main__")


def parse_script(path: str, arguments: list[str]) -> None:
    """Let the command parse its arguments, and stop it there."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, *given, **options):
        _, unknown = parse(parser, *given, **options)
        assert not unknown, f"{path} does not know {unknown}"
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        with pytest.raises(Parsed):
            run_script(path, arguments)


def parse_command(words: list[str]) -> None:
    """Fail if the command names an option, a file, an extra or a target that does not exist."""
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(words[2:])
        assert Path(launch.config_file).is_file(), launch.config_file
        words = ["python", launch.training_script, *launch.training_script_args]
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words[1:])
        words = ["python", launch.training_script, *launch.training_script_args]
        if "--tensor-parallel" in words:  # each process takes as many key/value heads
            shape = json.loads(Path(words[words.index("--model-config") + 1]).read_text())
            assert shape["num_key_value_heads"] % int(launch.nproc_per_node) == 0, shape
    if words == ["complexity-deep"]:
        assert all(
            (REPOSITORY / "scripts" / f"{name}.py").is_file()
            for name in re.findall(r"^  (\w+) ", list_of_commands(), re.MULTILINE)
        )
    elif words[0] == "python" and SCRIPT.match(words[1]):
        parse_script(words[1], words[2:])
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all(Path(word).exists() for word in words[3:] if not word.startswith("-"))
    elif words[:2] == ["vllm", "serve"]:
        assert Path(words[2]).is_dir(), words  # `make test-vllm` runs these
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE), words
    elif words[:2] == ["pip", "install"]:
        extras = importlib.metadata.metadata("complexity-deep-transformers").get_all("Provides-Extra")
        named = re.search(r"\[(.*)\]", words[-1])[1].split(",")
        assert set(named) <= set(extras) and Path(words[words.index("-c") + 1]).is_file()
    else:
        pytest.fail(f"no test knows how to check this command: {shlex.join(words)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs_from_top_to_bottom(page, clone, monkeypatch, tmp_path, request):
    monkeypatch.chdir(clone)
    names, server = {"__name__": page.stem}, None
    for marker, language, code in BLOCK.findall(page.read_text()):
        if "torchao" in code and importlib.util.find_spec("torchao") is None:
            continue  # `make test-quantization` runs this page where it is installed
        if language == "python":
            code = code.replace("http://127.0.0.1:8000", server.url) if server else code
            exec(compile(code, f"{page.name}: {code.splitlines()[0]}", "exec"), names)
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if marker == "run":
                assert words[0] == "python" and SCRIPT.match(words[1]), f"{line} is not a script of ours"
                run_script(words[1], words[2:])
            elif marker == "serve":
                assert words[:2] == ["python", "scripts/serve.py"], f"{line} is not the server"
                server = Served(Path(words[2]).resolve(), tmp_path / f"{len(list(tmp_path.iterdir()))}.log", *words[3:])
                request.addfinalizer(server.stop)
            elif words:
                parse_command(words)


@pytest.mark.parametrize("words", (["python", "scripts/evaluate.py", "x", "--fewshot", "5"], ["make", "nothing"]))
def test_a_command_that_does_not_exist_is_found(words, clone, monkeypatch):
    monkeypatch.chdir(clone)
    with pytest.raises((AssertionError, SystemExit)):
        parse_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in set(LINK.findall(page.read_text())):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_readme_is_a_landing_page():
    readme = (REPOSITORY / "README.md").read_text()
    assert len(readme.splitlines()) <= 125
    assert "make demo" in readme and "make test" in readme


def test_every_yes_of_what_runs_where_has_a_command(clone, monkeypatch):
    monkeypatch.chdir(clone)
    table = (REPOSITORY / "README.md").read_text().split("## What runs where\n\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) >= 6 and all(len(row) == 5 for row in rows)
    for _, *places, commands in rows:
        given = [shlex.split(command) for command in re.findall("`(.+?)`", commands)]
        assert given and "yes" in places
        for words in given:
            parse_command(words)
        assert len(given) == 1 + (places[2] == "yes")  # several GPUs take a command of their own


def test_formats_of_fine_tuning_are_documented():
    rows = [
        line.split("|")[1:3] for line in (REPOSITORY / "docs" / "training.md").read_text().splitlines() if "|" in line
    ]
    told = {name.strip(): set(re.findall(r"`(\w+)`", columns)) for name, columns in rows}
    for name, (columns, _) in FORMATS.items():
        assert told.get(name) == columns, f"docs/training.md does not say which columns the format {name} has"


def test_numbers_of_the_speed_table_are_those_of_the_results():
    """Every figure of README's table stands in results.csv, rounded."""
    table = (REPOSITORY / "README.md").read_text().split("## Speed\n")[1].split("\n\n**")[0]
    with (REPOSITORY / "benchmarks" / "results.csv").open(newline="") as file:
        measured = {round(float(row["tokens_per_s"])) for row in csv.DictReader(file) if row["tokens_per_s"]}
    cells = [cell.strip(" *") for line in table.splitlines() for cell in line.split("|")]
    shown = {int(cell.replace(",", "")) for cell in cells if re.fullmatch(r"[\d,]+", cell)}
    assert len(shown) == 10 and shown <= measured, shown - measured


def test_picture_of_a_layer_is_what_its_script_draws():
    drawn = runpy.run_path(str(REPOSITORY / "docs" / "draw_layer.py"))["drawing"]()
    assert drawn == (REPOSITORY / "docs" / "layer.svg").read_text()
    words = "".join(ElementTree.fromstring(drawn).itertext())
    assert all(part in words for part in ("INL dynamics", "Token-routed MLP", "Mu highway", "Router"))


def test_notebook_runs(tmp_path):
    """Every cell of the notebook runs in a fresh process; the saved file has the outputs of all cells that print."""
    notebook = REPOSITORY / "docs" / "quickstart.ipynb"
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    assert all(cell["outputs"] for cell in cells if "print(" in "".join(cell["source"]))
    command = [sys.executable, REPOSITORY / "docs" / "run_notebook.py", notebook, "--output", tmp_path / "out.ipynb"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    again = [cell for cell in json.loads((tmp_path / "out.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    assert [bool(cell["outputs"]) for cell in again] == [bool(cell["outputs"]) for cell in cells]
