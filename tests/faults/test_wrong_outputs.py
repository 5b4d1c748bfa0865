"""An output that a command must not, or cannot, write to is one line and an exit code from 2 to 4, and changes nothing.

Every output of every command is in turn a file that is read, a folder for a file, a file for a folder, a place below a file, or a
folder full of something else. `make test` tries one of these a command, FAULT_ROUNDS=full all.
"""
import re
import shutil

import pytest
from fault_rounds import FULL
from output_contents import contents, differences, leftovers
from walk import COMMANDS

pytestmark = [pytest.mark.slow, pytest.mark.fault("wrong output")]
FILE, BELOW, FOLDER = "beside/genes.txt", "beside/genes.txt/{}", "mine"      # a file, a place below one, a folder of somebody's notes
# command -> option -> what it must not name; `{}` is the last name of the walk's own
WRONG = {
    "simulate": {"--out-dir": (FILE, BELOW, FOLDER, "data", "diffusion")},
    "extract": {"--out-dir": (FILE, BELOW)},
    "vocabulary": {"--out": ("data/gex.h5ad", FOLDER, BELOW)},
    "filter": {"--out-file": ("data/gex.h5ad", "data/vocab.txt", FOLDER, BELOW)},
    "dump": {"--out-dir": (FILE, BELOW, FOLDER, "data", "SIM", "clip/clip")},
    "clip": {"run_dir": (FILE, BELOW, "clip", ".", "diffusion", "clip/clip")},
    "embeddings": {"--out-dir": (FILE, BELOW, "data/patches")},
    "gan": {"--outdir": (FILE, BELOW)},
    "gen_images": {"--outdir": (FILE, BELOW, "data/patches"), "--out-h5": ("data/imgs.h5", "data/gex_filt.h5ad", FOLDER, BELOW)},
    "diffusion": {"--output-dir": (FILE, BELOW, "clip", "clip/clip")},
    "generate_img": {"--gen-img-path": (FILE, BELOW, "data/patches")},
    "metrics": {"--report": ("data/gex_filt.h5ad", FOLDER, BELOW), "--out-dir": (FILE, BELOW)},
    "perturb": {"--outdir": (FILE, BELOW, "data/patches")},
    "interpolate": {"--outdir": (FILE, BELOW, "data/patches")},
    "interpretability": {"--out-file": ("data/gex_filt.h5ad", "beside/clusters.csv", FOLDER, BELOW)},
    "evaluate_sections": {"--out": ("beside/train.csv", "beside/val.csv", "data/gex_filt.h5ad", "sections/new.html", FOLDER, BELOW),
                          "--report": (FOLDER, BELOW)},
    "import_st": {"--out-dir": (FILE, BELOW)},
    "cohort_report": {"--out-dir": (FILE, BELOW)},
    "choose_ema": {"--out-dir": (FILE, BELOW, FOLDER, "data", "diffusion", "diffusion/pipeline", "clip/clip")},
}
OTHERWISE = {"gen_images": ("--images", "data/imgs.h5"), "metrics": ("--gex", "data/gex_filt.h5ad"),
             "evaluate_sections": ("--report", "sections/new.html")}


@pytest.fixture(scope="module")
def folder(undisturbed, tmp_path_factory):
    copy = tmp_path_factory.mktemp("outputs") / "walk"
    shutil.copytree(undisturbed[0], copy)
    (copy / FOLDER).mkdir()
    (copy / FOLDER / "thesis.txt").write_text("precious")
    (copy / "sections" / "new.html").write_text("an older page")
    return copy


def with_output(name: str, option: str, path: str) -> list[str]:
    """The command's arguments with another output; `clip` without ckpt_path, which begins anew."""
    arguments = [str(argument) for argument in COMMANDS[name] if argument != "ckpt_path=auto"]
    if name in OTHERWISE:
        arguments = replaced(arguments, *OTHERWISE[name])
    old = next((argument for place, argument in enumerate(arguments) if arguments[place - 1] == option), "new.h5")
    return replaced(arguments, option, path.format(old.rpartition("/")[2]))


def replaced(arguments: list[str], option: str, value: str) -> list[str]:
    if not option.startswith("--"):
        return [f"{option}={value}" if argument.startswith(f"{option}=") else argument for argument in arguments]
    if option not in arguments:
        return [*arguments, option, value]
    place = arguments.index(option) + 1
    return [*arguments[:place], value, *arguments[place + 1:]]


@pytest.mark.parametrize("name", WRONG)
def test_an_output_that_is_an_input_or_anybody_elses_is_one_line_and_changes_nothing(commands, folder, name, tried):
    cases = [(option, path) for option, paths in WRONG[name].items() for path in paths]
    before = contents(folder)
    for option, path in cases if FULL else [cases[len(name) % len(cases)]]:
        run = commands.start(name, *with_output(name, option, path), before=f"import os; os.setpgid(0, 0); os.chdir({str(folder)!r})")
        tried()
        case = f"{name} {option} {path}"
        assert run.wait() in (2, 3, 4), (case, run.code, run.said[-2000:])
        said = [line for line in run.errors or run.said.splitlines() if line.lower().startswith("error: ") or "Traceback" in line]
        assert len(said) == 1 and path.split("/{}")[0] in said[0], (case, run.said[-2000:])
        assert differences(contents(folder), before) == [] and leftovers(folder) == [], case
        assert re.search(r"training spots|\d+%", run.said) is None, (case, "said before the work", run.said[-2000:])


def test_a_link_to_a_folder_stays_a_link_and_the_folder_behind_it_is_written(commands, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0] / "data", tmp_path / "data")
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/real")
    for _ in range(2):
        commands.succeeds("dump", "--images", tmp_path / "data" / "imgs.h5", "--no-normalize", "--out-dir", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "real" / "metadata.jsonl").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk", "link"] and leftovers(tmp_path) == []
