"""Say what is wrong with what the user handed us: one line, no traceback, a fixed exit code.

Exit codes: 1 a training that diverged, 2 usage, 3 bad input, 4 I/O or no memory left, 5 damaged or incompatible weights, 130 Ctrl-C.
Every command is declared with `cls=Command`, which gives it `--debug` (show the traceback) and this rule.
"""
from __future__ import annotations

import math
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from preprocessing.interrupts import INTERRUPTED, Stopped, ctrl_c, first_ctrl_c_ends_in_order

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)   # torch's words
LOWER = ("Lower the batch size of this command (--batch-gpu where there is one) or the size of what it handles (--cfg); on a GPU, see "
         "whether other programs use it")
MOST_SHOWN, MOST_OF_AN_ITEM = 800, 120          # letters of what was found, or expected, that a message repeats
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 1e9     # of an option that has no range of its own: what indices, sizes and sums can bear
EXIT_DIVERGED, EXIT_USAGE, EXIT_INPUT, EXIT_IO, EXIT_WEIGHTS, EXIT_INTERRUPTED = 1, 2, 3, 4, 5, 130


class InputError(ValueError):
    """What the user handed us is not what this step needs. `next_step` says what to do about it, if anything."""

    exit_code = EXIT_INPUT

    def __init__(self, path: Path | str, field: str, expected: str, found: str, next_step: str = ""):
        hint = f". {next_step}" if next_step else ""
        super().__init__(f"{path}: {_shown(field)}: expected {_shown(expected)}; found {_shown(found)}{hint}")


class WeightsError(InputError):
    """Weights or a checkpoint are damaged, or belong to another model or gene list."""

    exit_code = EXIT_WEIGHTS


class DivergedError(InputError):
    """Losses or gradients of a training stayed NaN or infinite."""

    exit_code = EXIT_DIVERGED


class OptionError(ValueError):
    """Options that cannot hold together; raised when a config is built, before any data is read."""

    exit_code = EXIT_USAGE

    def __init__(self, option: str, expected: str, found: str):
        super().__init__(f"{_shown(option)}: expected {_shown(expected)}; found {_shown(found)}")


def _shown(text: str) -> str:
    """One line of what a file says: no line ends, no codes that move a terminal's cursor, no text without end."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(text)[:MOST_SHOWN])
    return line.strip() + (" ..." if len(str(text)) > MOST_SHOWN else "")


def first_few(items: Sequence[object], limit: int = 5) -> str:
    """`'3 (A, B, C)'`: the count and the first few, for messages that must not print a thousand barcodes, nor one of a thousand letters."""
    shown = ", ".join(str(item)[:MOST_OF_AN_ITEM] for item in items[:limit])
    return f"{len(items):,} ({shown}{', ...' if len(items) > limit else ''})"


@contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """Turn user errors into one line on stderr and `SystemExit`; with `debug`, the traceback comes before that line."""
    with first_ctrl_c_ends_in_order(), _one_line_warnings(debug):
        try:
            yield
        except Stopped as stopped:
            if not stopped.is_said:
                end_progress_bars()
                print(stopped.message, file=sys.stderr, flush=True)
                stopped.is_said = True
            raise
        except (Exception, KeyboardInterrupt) as error:
            interrupted = ctrl_c.pressed or isinstance(error, KeyboardInterrupt)
            if not (interrupted or isinstance(error, (InputError, OptionError, OSError)) or is_out_of_memory(error)):
                raise
            end_progress_bars()
            if debug:
                traceback.print_exception(error)
            print(INTERRUPTED if interrupted else f"error: {_said(error)}", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED if interrupted else getattr(error, "exit_code", EXIT_IO)) from error


@contextmanager
def _one_line_warnings(debug: bool) -> Iterator[None]:
    """Warnings that are meant for users without a line of our code beside them."""
    usual = warnings.formatwarning

    def format_warning(message, category, *where, **line) -> str:
        return f"warning: {message}\n" if category is UserWarning and not debug else usual(message, category, *where, **line)

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = usual


def end_progress_bars() -> None:
    """Those that are open would share the line of what is said next. tqdm is not imported here."""
    if (tqdm := sys.modules.get("tqdm")) is not None:
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what Python, numpy or torch (known by its words: it is not imported here) raise where memory does not suffice."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or NO_MEMORY.search(str(error)) is not None))


def _said(error: Exception) -> str:
    """The system's own errors without their number: `imgs.h5: No space left on device`. Memory: how much, and what to lower."""
    if is_out_of_memory(error):
        asked = re.search(r"(tried to |unable to )allocate [\d.,]+ ?\w+", str(error), re.IGNORECASE)
        return f"out of memory{f' ({asked[0][0].lower()}{asked[0][1:]})' if asked else ''}. {LOWER}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def require_bearable(option: str, number: float, bounded: bool = False) -> None:
    """Refuse NaN, infinite numbers and, of an option without a range of its own, those that overflow what is computed of them."""
    if isinstance(number, float) and not math.isfinite(number):
        raise OptionError(option, "a finite number", str(number))
    most = LARGEST_FLOAT if isinstance(number, float) else LARGEST_INT
    if not bounded and abs(number) > most:
        raise OptionError(option, f"at most {most:,}" if number > 0 else f"at least {-most:,}",
                          f"{number:g}" if isinstance(number, float) else str(number))


class Command(click.Command):
    """A click command that ends user errors in one line, and has `--debug` for the traceback before it."""

    def __init__(self, *args, **kwargs):
        kwargs["context_settings"] = {"show_default": True, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def make_context(self, *args, **kwargs) -> click.Context:
        with one_line_errors(debug="--debug" in sys.argv):      # options are not read yet; click's own exit code for Ctrl-C is 1
            context = super().make_context(*args, **kwargs)
            for parameter in self.params:
                value = context.params.get(parameter.name)
                for number in value if isinstance(value, tuple) else (value,):
                    if isinstance(parameter.type, (click.types.IntParamType, click.types.FloatParamType)) and number is not None:
                        require_bearable(parameter.opts[0], number, getattr(parameter.type, "max", None) is not None)
            return context

    def invoke(self, ctx: click.Context):
        with one_line_errors(debug=ctx.params.pop("debug", False)):
            return super().invoke(ctx)
