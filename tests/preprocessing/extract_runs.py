"""Run the command `extract_patches` in a test, expecting success or a one-line error."""
from click.testing import CliRunner

from preprocessing.extract_patches import main

WRITTEN = ("imgs.h5", "gex.h5ad", "dropped_spots.tsv", "qc.png", "qc.html")


def run(*arguments) -> str:
    """Run the command; it must succeed."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def fails(exit_code: int, *arguments) -> str:
    """Run the command; it must end with this exit code in one line, without a traceback. Returns what it said."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    return result.output
