"""What all scripts do alike: one sentence, Ctrl-C, the output folder, no path that is edited."""

import ast
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from complexity_deep.workflow.command import (
    ArgumentParser,
    InputError,
    check_output_folder,
    needs,
    run_script,
    shipped,
    uninterrupted,
    whole_files,
    whole_folder,
)
from complexity_deep.workflow.main import list_of_commands, main
from support import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
COMMANDS = sorted(path.name for path in SCRIPTS.glob("*.py"))
# What may import what: a folder uses itself and those before it.
ORDER = ["data", "evaluation", "training", "analysis", "publishing", "serving", "benchmarks", "evidence"]


def imports(path) -> set[str]:
    """The modules that a file of ours imports from workflow/ and scripts/."""
    names = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {name for name in names if name and name.startswith(("complexity_deep.workflow", "complexity_deep.scripts"))}


def test_no_file_edits_the_path():
    for folder in ("scripts", "workflow", "tests"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            text = path.read_text()
            assert not re.search(r"sys\.path\.(insert|append|remove|pop)|sys\.path(\[.*\])? = ", text), path.name


def test_parts_import_one_way():
    for path in (REPOSITORY / "workflow").rglob("*.py"):
        folder = path.parent.name
        for name in imports(path):
            assert name.startswith("complexity_deep.workflow."), f"{path} imports a command"
            used = name.split(".")[2]
            if used in ORDER:
                assert folder in ORDER, f"{path} is used by all and imports {name}"
                assert ORDER.index(used) <= ORDER.index(folder), f"{path} imports {name}"


def test_files_of_a_folder_import_each_other_one_way():
    """No two modules need each other, through whatever others."""
    modules = {
        "complexity_deep." + ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): imports(path)
        for path in (REPOSITORY / "workflow").rglob("*.py")
    }
    while leaves := [name for name, used in modules.items() if not used & modules.keys()]:
        for name in leaves:
            del modules[name]
    assert not modules


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_parses_calls_and_prints(name):
    """It ends by `run_script`, its parser is one that prints a single sentence, and its parts lie elsewhere."""
    text = (SCRIPTS / name).read_text()
    last = text.split('if __name__ == "__main__":')[1]
    assert "run_script(" in last and "try:" not in last
    assert "argparse.ArgumentParser(" not in text and "TrlParser(" not in text
    assert len(text.splitlines()) < 150
    assert not re.search(r"^class ", text, flags=re.MULTILINE)
    # What a missing package could stop is imported where that becomes a sentence.
    early = set(re.findall(r"^from complexity_deep\.workflow\.([\w.]+) import", text, flags=re.MULTILINE))
    assert early <= {"command", "provenance", "flops", "saved_model"}


# One process for all of them, because they import the same libraries. The folder of the scripts is first on the path,
# as in `python scripts/x.py`, and each of them has to hide it again.
AS_SCRIPTS = """
import contextlib, pathlib, runpy, sys
for path in pathlib.Path("scripts.txt").read_text().splitlines():
    sys.path_importer_cache.pop(str(pathlib.Path(path).parent), None)
    sys.modules.pop("complexity_deep.workflow.command", None)
    sys.argv = [path, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
"""


def test_commands_run_beside_modules_of_the_same_names(tmp_path):
    """From a folder with modules named like ours and like libraries, every command shows its help, in both forms."""
    for name in ("benchmark", "evaluate", "data", "kernels", "command", "training", "main", "generate", "workflow"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a module of somebody else was imported')")
    (tmp_path / "scripts.txt").write_text("\n".join(str(SCRIPTS / name) for name in COMMANDS))
    entry = "import sys; from complexity_deep.workflow.main import main; sys.exit(main())"
    first = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))
    for code, options, variables, shown in (
        (AS_SCRIPTS, [], {"PYTHONPATH": first}, [name[:-3] for name in COMMANDS]),
        (entry, ["evaluate", "--help"], {}, ["evaluate"]),
    ):
        command = [sys.executable, "-P", "-c", code, *options]
        result = subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert re.findall(r"^usage: (?:complexity-deep )?(\w+)", result.stdout, flags=re.MULTILINE) == shown


def test_the_entry_point(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["complexity-deep"])
    main()
    assert capsys.readouterr().out.strip() == list_of_commands()
    listed = re.findall(r"^  (\w+) +\S", list_of_commands(), flags=re.MULTILINE)
    assert [f"{name}.py" for name in listed] == COMMANDS
    monkeypatch.setattr(sys, "argv", ["complexity-deep", "compare-runs", "--no-such-option"])
    with pytest.raises(SystemExit) as stop:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("complexity-deep compare_runs: error: ")
    monkeypatch.setattr(sys, "argv", ["complexity-deep", "nothing"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "there is no command 'nothing'" in capsys.readouterr().err


def test_files_of_the_package_are_found_where_a_folder_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = "recipes/evidence/headline.yaml"
    assert Path(shipped(plan)).samefile(REPOSITORY / plan)
    for path in ("recipes/none.yaml", "recipes/../pyproject.toml", "README.md", "configs", "", str(tmp_path)):
        assert shipped(path) == path
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.json").touch()
    assert shipped("configs/tiny.json") == "configs/tiny.json"


def test_help_says_defaults():
    parser = ArgumentParser()
    parser.add_argument("folder", help="where")
    parser.add_argument("--tokens", type=int, default=0, help="how many")
    parser.add_argument("--rows", default=4, help="default: 4")
    parser.add_argument("--page", action="store_true", help="whether")
    parser.add_argument("--key", help="which")
    shown = " ".join(parser.format_help().split())
    assert "how many (default: 0) --rows ROWS default: 4 --page whether --key KEY which" in shown


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/sft.py"])
    monkeypatch.setitem(sys.modules, "trl", None)
    sentence = (
        r"^sft\.py: error: a package is missing \(.*trl.*\): run `pip install '[\w-]+\[train\]'`, or .* in a clone\.$"
    )
    with pytest.raises(SystemExit, match=sentence), needs("train"):
        import trl  # noqa: F401


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    for write, before in ((whole_folder, ["new"]), (whole_files, ["new", "old"])):
        folder = tmp_path / write.__name__
        folder.mkdir()
        (folder / "old").write_text("old")
        with pytest.raises(OSError), write(folder) as place:
            (place / "old").write_text("new")
            raise OSError("no space left on device")
        assert [path.name for path in folder.iterdir()] == ["old"] and (folder / "old").read_text() == "old"
        with write(folder) as place:
            (place / "new").write_text("new")
        assert sorted(path.name for path in folder.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole_files", "whole_folder"]


@pytest.mark.parametrize(
    "given, meant",
    [
        ("--temprature", ": did you mean --temperature?"),
        ("--max_new_tokns=3", ": did you mean --max-new-tokens?"),
        ("-x", ""),
    ],
)
def test_a_misspelt_option_is_asked_for(given, meant, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "model", "prompt", given])
    with pytest.raises(SystemExit):
        runpy.run_module("complexity_deep.scripts.generate", run_name="__main__")
    assert capsys.readouterr().err == f"generate.py: error: unrecognized arguments: {given}{meant}\n"


@pytest.mark.parametrize("name", ["generate.py", "compare_runs.py", "export_to_hub.py"])
def test_a_wrong_option_is_one_sentence(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--no-such-option"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"complexity_deep.scripts.{name[:-3]}", run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"{name}: error: ")


def refusal(folder) -> str:
    with pytest.raises(InputError) as refused:
        check_output_folder(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_output_folders(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert "is a file" in refusal(tmp_path / "file") and "is a file" in refusal(tmp_path / "file" / "a" / "b")
    assert "is a file" in refusal(tmp_path / "dangling")
    assert "cannot be written" in refusal("/proc/run") and "cannot be written" in refusal("a\0b")
    assert "cannot be written" in refusal(tmp_path / ("x" * 300))
    before = sorted(tmp_path.iterdir())
    check_output_folder(tmp_path)
    check_output_folder(tmp_path / "a" / "b")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refusal(tmp_path / "run")


def test_ctrl_c_and_errors(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["some/script.py"])

    def interrupted():
        raise KeyboardInterrupt

    def refused():
        raise InputError("two\nlines")

    with pytest.raises(SystemExit) as stop:
        run_script(interrupted)
    assert stop.value.code == 130
    assert capsys.readouterr().err.split("\n")[1:] == [
        "script.py: stopped by Ctrl-C; every file that is there is whole",
        "",
    ]
    with pytest.raises(SystemExit, match=r"^script\.py: error: two lines$"):
        run_script(refused)


def test_files_are_written_to_their_end(tmp_path):
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        (tmp_path / "file").write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_target_of_the_makefile_has_a_rule():
    text = (REPOSITORY / "Makefile").read_text()
    rules = set(re.findall(r"^([\w-]+):(?!=)", text, flags=re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)", text, flags=re.MULTILINE)[1].split()
    assert phony and set(phony) == rules


def test_readme_and_cards_say_the_same_does_not_run():
    section = (REPOSITORY / "README.md").read_text().split("## What does not work\n")[1].split("\n#")[0]
    points = [" ".join(point.split()) for point in section.split("\n- ") if point.strip()]
    listed = yaml.safe_load((REPOSITORY / "hub_card" / "not_supported.yaml").read_text())
    assert [point["text"] for point in listed] == points
