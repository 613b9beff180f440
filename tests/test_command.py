"""What all scripts do alike: one sentence, Ctrl-C, the output folder, no path that is edited."""

import ast
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import yaml

from support import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
sys.path.insert(0, str(SCRIPTS))

from command_line import InputError, check_output_folder, run_script, uninterrupted  # noqa: E402

COMMANDS = [path for path in sorted(SCRIPTS.glob("*.py")) if "__main__" in path.read_text()]


def test_no_script_edits_the_path():
    for path in SCRIPTS.glob("*.py"):
        assert "sys.path" not in path.read_text(), path.name


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_every_command_ends_alike(path):
    """By `run_script`, and its parser is one that prints a single sentence."""
    main = path.read_text().split('if __name__ == "__main__":')[1]
    assert "run_script(" in main and "try:" not in main
    assert "argparse.ArgumentParser(" not in path.read_text() and "TrlParser(" not in path.read_text()


def test_modules_of_the_same_names_elsewhere_are_not_taken(tmp_path):
    """Packages installed under the names of ours come after the folder of the script."""
    own = {path.stem for path in SCRIPTS.glob("*.py")} - {"evaluate"}
    for name in own:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a module of somebody else was imported')")
    imported = {
        alias.split(".")[0]
        for path in SCRIPTS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for alias in ([node.module] if isinstance(node, ast.ImportFrom) else [])
        if alias
    }
    assert {"provenance", "model_flops"} <= imported & own and "benchmark" not in imported
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), *sys.path[1:]]))}
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0 and "--held-out-text" in result.stdout, result.stderr


@pytest.mark.parametrize("name", ["generate.py", "compare_runs.py", "export_to_hub.py"])
def test_a_wrong_option_is_one_sentence(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--no-such-option"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
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
