"""What all scripts do alike: an error is one sentence, Ctrl-C one line, and the output folder is tried first."""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended: 128 + SIGINT


class InputError(ValueError):
    """Input that cannot be used; the message is one sentence for the person who gave it."""


def one_line(error: BaseException | str) -> str:
    """The message of an error on one line, or the name of its class where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


class OneSentence:
    """Put before a parser in the bases of a class: its errors come without the pages of usage, with exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


class ArgumentParser(OneSentence, argparse.ArgumentParser):
    """argparse's parser with a description that keeps its lines."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def run_script(main: Callable, *arguments) -> None:
    """Call `main`; an `InputError` ends the process with its sentence, and Ctrl-C with one line and exit code 130."""
    name = Path(sys.argv[0]).name
    try:
        main(*arguments)
    except InputError as error:
        sys.exit(f"{name}: error: {one_line(error)}")
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
    """Whether there is anything of that name; other than `Path.exists`, a name that cannot be raises its error."""
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
