"""The command `complexity-deep`: its first word names a file of scripts/, which gets the others.

complexity-deep pretrain --config recipes/demo.yaml
"""

import ast
import runpy
import sys

from complexity_deep.workflow.command import COMMANDS


def list_of_commands() -> str:
    """Each command with the first line of its docstring."""
    lines = ["usage: complexity-deep COMMAND [OPTIONS]", ""]
    for path in sorted(COMMANDS.glob("*.py")):
        description = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]
        lines.append(f"  {path.stem:16} {description}")
    return "\n".join([*lines, "", "complexity-deep COMMAND --help shows the options of a command."])


def main() -> None:
    given = sys.argv[1] if len(sys.argv) > 1 else "--help"
    name = given.replace("-", "_")
    if given in ("-h", "--help"):
        print(list_of_commands())
    elif (COMMANDS / f"{name}.py").is_file():
        sys.argv[:2] = [f"complexity-deep {name}"]
        runpy.run_module(f"complexity_deep.scripts.{name}", run_name="__main__")
    else:
        print(f"complexity-deep: error: there is no command '{given}'.\n\n{list_of_commands()}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
