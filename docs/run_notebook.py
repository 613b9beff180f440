"""Execute a notebook and write its outputs into it.

    python docs/run_notebook.py docs/quickstart.ipynb
    python docs/run_notebook.py docs/quickstart.ipynb --output /tmp/checked.ipynb

The cells run one after the other in this process, from the root of the repository, as in Jupyter. What they print
and the value of a last expression become their outputs. A cell that fails stops the run, and nothing is written. This
needs no Jupyter, whose kernel and its twenty packages would be the largest part of what CI installs for documentation.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def run_cell(source: str, names: dict, number: int) -> list[dict]:
    """The outputs of one code cell, in the notebook's format."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"<cell {number}>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), names)
    outputs = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path, help="notebook to execute")
    parser.add_argument("--output", type=Path, help="where to write it with its outputs; default: in place")
    arguments = parser.parse_args()
    target = (arguments.output or arguments.notebook).resolve()
    notebook = json.loads(arguments.notebook.read_text(encoding="utf-8"))
    os.chdir(REPOSITORY)
    names = {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), start=1):
        print(f"cell {number}", file=sys.stderr)
        cell["outputs"], cell["execution_count"] = run_cell("".join(cell["source"]), names, number), number
    target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
