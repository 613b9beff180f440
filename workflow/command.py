"""What all commands do alike: an error is one sentence, Ctrl-C is one line, and the output folder is tried first."""

import argparse
import contextlib
import difflib
import errno
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended: 128 + SIGINT
COMMANDS = Path(__file__).resolve().parents[1] / "scripts"
SHIPPED = ("configs", "recipes")  # folders of the package that hold what commands take


class InputError(ValueError):
    """Input that cannot be used; the message is one sentence for the person who gave it."""


def one_line(error: BaseException | str) -> str:
    """The message of an error on one line, or the name of its class where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, where a library writes a page, or the name of its class without one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_first_process() -> bool:
    """Whether this is the first process that torchrun or accelerate started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(what: str) -> None:
    """Tell a person what is being done, on stderr, beside the results; of several processes the first one does."""
    if is_first_process():
        print(f"{what} ...", file=sys.stderr, flush=True)


class OneSentence:
    """Put before a parser in the bases of a class: its errors come without the pages of usage, with exit code 2."""

    def meant(self, option: str) -> str:
        """The question whether another option was meant, where one of the parser's has nearly that name."""
        given, *_ = option.replace("_", "-").split("=")
        names = {name.replace("_", "-") for name in self._option_string_actions}
        return "".join(f": did you mean {name}?" for name in difflib.get_close_matches(given, names, n=1, cutoff=0.75))

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message += self.meant(unknown.split()[0])
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """A description keeps its lines, and the help of an option ends with its default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        has_one = isinstance(default, (str, int, float)) and default not in ("", argparse.SUPPRESS)
        has_one = has_one and not isinstance(default, bool)  # that of a switch
        return f"{text} (default: %(default)s)" if has_one and "default" not in text else text


class ArgumentParser(OneSentence, argparse.ArgumentParser):
    """argparse's parser with a description that keeps its lines, and the defaults of options in their help."""

    def __init__(self, **options):
        super().__init__(formatter_class=_Help, **options)


def at_least(minimum: int) -> Callable[[str], int]:
    """A type for `add_argument`: whole numbers from `minimum` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {minimum}")
        return int(text)

    return number


def shipped(path: str) -> str:
    """`path`, or where no such file is there, the package's own file of that name, as of recipes/demo.yaml.

    So the recipes that pip installs, and the configs that they name, are found from any folder.
    """
    parts = Path(path).parts
    ours = COMMANDS.parent.joinpath(*parts)
    if parts[:1] and parts[0] in SHIPPED and ".." not in parts and ours.is_file() and not os.path.exists(path):
        return str(ours)
    return path


def number_of(text: str) -> float:
    """The number that `text` says; not a number (nan) where it says none, which no comparison takes."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def positive(text: str) -> float:
    """A type for `add_argument`: numbers above 0."""
    if not 0 < number_of(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return float(text)


def share(text: str) -> float:
    """A type for `add_argument`: numbers from 0 to 1."""
    if not 0 <= number_of(text) <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return float(text)


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around a command's imports: where a package is missing, the command ends with a sentence on what to install."""
    try:
        yield
    except ImportError as error:
        sys.exit(
            f"{Path(sys.argv[0]).name}: error: a package is missing ({one_line(error)}): run "
            f"`pip install 'complexity-deep-transformers[{extra}]'`, or `pip install -e .[{extra}]` in a clone."
        )


def run_script(main: Callable, *arguments) -> None:
    """Call `main`; an `InputError` ends the process with its sentence, and Ctrl-C with one line and exit code 130.

    A disk that takes no more ends it with a sentence too, for that is no fault of the command.
    """
    name = Path(sys.argv[0]).name
    try:
        main(*arguments)
    except InputError as error:
        sys.exit(f"{name}: error: {one_line(error)}")
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        sys.exit(f"{name}: error: A file cannot be written ({error.strerror}): make room, or name another folder.")
    except KeyboardInterrupt:
        print(f"\n{name}: stopped by Ctrl-C; every file that is there is whole", file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it Ctrl-C waits, so that files are not left half-written; of use in the main thread only."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def is_there(path: Path) -> bool:
    """Whether anything has that name. A name that no file can have raises an error, which `Path.exists` hides."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_output_folder(folder: str | Path, option: str = "--output-dir") -> None:
    """Raise `InputError` where no file could be written into `folder`, which need not exist. Nothing is left there."""
    folder = Path(folder)
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if is_there(path))
        if not place.is_dir():
            raise InputError(f"{option} '{folder}' cannot be a folder, for '{place}' is a file: name another.")
        with tempfile.TemporaryFile(dir=place):
            pass
    except InputError:
        raise
    except (OSError, ValueError) as error:  # the latter is a null character in the name
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{option} '{folder}' cannot be written ({reason}): name another.") from error


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into. It takes the name of `folder` when the block ends without an error.

    A folder that had the name before is replaced. After an error it is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        new.rename(folder)


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into. All files in it move into `folder` when the block ends without an error.

    Other files of `folder` stay. After an error all of its files are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        yield Path(scratch)
        for file in [path for path in Path(scratch).rglob("*") if path.is_file()]:
            place = folder / file.relative_to(scratch)
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)


class NothingFound:
    """In Python's cache of importers, it stands for a folder in which no module is found."""

    @staticmethod
    def find_spec(name: str, target=None) -> None:
        return None


def hide_running_script() -> None:
    """Let nobody import the files beside a command that runs as `python scripts/evaluate.py`.

    Python puts the folder of a script first on its path. A library that imports `evaluate` would get our command.
    """
    script = Path(sys.argv[0]).resolve()
    if script.parent.name == COMMANDS.name and (COMMANDS / script.name).is_file():
        for place in sys.path:
            if Path(place).resolve() == script.parent:
                sys.path_importer_cache[place] = NothingFound


hide_running_script()
