"""A user's mistake is one line and an exit code from 2 to 5, whichever input of whichever command it is about; nothing is written.

Every input of every command of the walk is in turn not there, empty, a folder for a file or a file for a folder, a picture, or bytes
without sense, under the name that it should have. `make test` tries one of these an input, FAULT_ROUNDS=full all.
"""
import shutil
from pathlib import Path

import numpy as np
import pytest
from fault_rounds import FULL
from output_contents import contents, differences, leftovers
from PIL import Image
from walk import COMMANDS, WRITES

pytestmark = [pytest.mark.slow, pytest.mark.fault("wrong input")]
OUTPUTS = {**WRITES, "extract": "data", "vocabulary": "data/vocab.txt", "filter": "data/gex_filt.h5ad", "dump": "data/patches",
           "cohort_report": "cohort", "dump_metadata": "foreign/metadata.jsonl"}


def nothing(_path: Path) -> None:
    pass


def empty_file(path: Path) -> None:
    path.touch()


def empty_folder(path: Path) -> None:
    path.mkdir()


def a_file_for_a_folder(path: Path) -> None:
    (path / "folder.txt").parent.mkdir()
    (path / "folder.txt").write_text("words\n")


def a_picture(path: Path) -> None:
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(path, format="PNG")


def bytes_without_sense(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(3000))


WRONG = (nothing, empty_file, empty_folder, a_file_for_a_folder, a_picture, bytes_without_sense)


def inputs_of(name: str, folder: Path) -> list[tuple[int, str]]:
    """Places among a command's arguments at which it is given something to read, and the path in each."""
    found = []
    for place, argument in enumerate(COMMANDS[name]):
        path = str(argument).rpartition("=")[2].split(":")[0]
        if "/" not in path and path not in ("SIM", "generated", "diffusion", "embeddings", "foreign", "cohort"):
            continue
        written = path == OUTPUTS[name] or path.startswith(f"{OUTPUTS[name]}/") and name != "vocabulary"
        if (folder / path).exists() and not written:
            found.append((place, path))
    return found


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "simulate"])
def test_whatever_stands_where_an_input_should_is_one_line_and_nothing_is_written(commands, undisturbed, name, tmp_path, tried):
    folder = tmp_path / "walk"
    shutil.copytree(undisturbed[0], folder)
    out = folder / OUTPUTS[name]
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    before, inputs = contents(folder), inputs_of(name, undisturbed[0])
    assert inputs
    for number, (place, path) in enumerate(inputs):
        for kind in WRONG if FULL else (WRONG[(number + len(name)) % len(WRONG)],):
            wrong = tmp_path / "wrong" / Path(path).name
            shutil.rmtree(wrong.parent, ignore_errors=True)
            wrong.parent.mkdir()
            kind(wrong)
            arguments = [str(argument) for argument in COMMANDS[name]]
            arguments[place] = arguments[place].replace(path, str(wrong))
            run = commands.start(name, *arguments, before=f"import os; os.setpgid(0, 0); os.chdir({str(folder)!r})")
            tried()
            case = f"{kind.__name__} for {path}"
            assert run.wait() in (2, 3, 4, 5), (case, run.code, run.said[-2000:])
            said = [line for line in run.errors or run.said.splitlines() if line.lower().startswith("error: ") or "Traceback" in line]
            assert len(said) == 1 and str(wrong.parent) in said[0], (case, run.said[-2000:])
            assert differences(contents(folder), before) == [] and leftovers(folder) == [], case
