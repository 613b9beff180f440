"""Use the installed wheel with the extras of its commands, in a folder that holds modules of other people.

`make test-commands` runs this. Every command shows its help. Then a tokenizer and a small model are trained, evaluated
and sampled from. The modules of the folder are named like ours and like libraries, and raise where they are imported.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import complexity_deep

PACKAGE = Path(complexity_deep.__file__).parent
COMMAND = Path(sys.executable).with_name("complexity-deep")
MODULES = (
    "benchmark",
    "evaluate",
    "data",
    "command",
    "training",
    "main",
    "generate",
    "workflow",
    "datasets",
    "tokenizers",
)
PACKAGES = ("kernels", "evaluation", "scripts")
TRAINING = """
train_tokenizer --sources embedded --max-characters 3e5 --vocab-size 512 --output-dir tokenizer
pretrain --config recipe.yaml
evaluate model --tasks --held-out-text held_out.jsonl --limit 3 --device cpu
generate model Once --max-new-tokens 8 --device cpu
"""
RECIPE = """
model_config: shape.json
tokenizer: tokenizer
sources: [embedded]
held_out_fraction: 0.05
held_out_rows: 4
row_length: 64
output_dir: model
max_steps: 4
per_device_train_batch_size: 4
logging_steps: 2
report_to: none
use_cpu: true
"""
HELD_OUT = '{"text": "The built-in function returns the value of the first item of a list, or raises an error."}\n' * 3


def run(arguments: list[str], folder: Path) -> str:
    """What the command prints on stdout; what it says of an error is shown where it fails."""
    start = time.monotonic()
    command = [str(COMMAND), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    print(f"{time.monotonic() - start:6.1f} s  complexity-deep {' '.join(arguments)}", flush=True)
    return result.stdout


def main() -> None:
    assert "site-packages" in complexity_deep.__file__, f"not the wheel: {complexity_deep.__file__}"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        somebody_else = "raise RuntimeError('a module of somebody else was imported')\n"
        for name in MODULES:
            (folder / f"{name}.py").write_text(somebody_else)
        for name in PACKAGES:
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(somebody_else)
        (folder / "recipe.yaml").write_text(RECIPE)
        shape = json.loads((PACKAGE / "configs" / "tiny.json").read_text())
        (folder / "shape.json").write_text(json.dumps({**shape, "vocab_size": None}))
        (folder / "held_out.jsonl").write_text(HELD_OUT)
        names = re.findall(r"^  (\w+) +\S", run([], folder), flags=re.MULTILINE)
        assert len(names) >= 10, names
        for name in names:
            assert run([name, "--help"], folder).startswith(f"usage: complexity-deep {name} "), name
        printed = [run(line.split(), folder) for line in TRAINING.strip().splitlines()]
        assert all(printed) and (folder / "model" / "evaluation" / "evaluation.json").is_file(), printed
        assert printed[-1].startswith("Once")
        print(printed[-1])
    print(f"{len(names)} commands run from a folder of other people's modules.")


if __name__ == "__main__":
    main()
