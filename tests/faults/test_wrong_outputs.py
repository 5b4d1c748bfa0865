"""An output that a command must not, or cannot, write to is one line and an exit code from 2 to 4, and changes nothing.

Every output of every command is in turn a file that is read, a folder for a file, a file for a folder, a place below a file, and every
file and folder that another command or the user has written. `make test` tries two of these a command, FAULT_ROUNDS=full all.
"""
import random
import re
import shutil

import h5py
import pytest
from fault_rounds import rounds
from output_contents import differences, leftovers
from walk import COMMANDS, GAN_RUN, WRITES

pytestmark = [pytest.mark.slow, pytest.mark.fault("wrong output")]
FILE, BELOW, FOLDER = "beside/genes.txt", "beside/genes.txt/{}", "mine"      # a file, a place below one, a folder of somebody's notes
# command -> option -> what it must not name; `{}` is the last name of the walk's own
WRONG = {
    "simulate": {"--out-dir": (FILE, BELOW)},
    "extract": {"--out-dir": (FILE, BELOW)},
    "vocabulary": {"--out": (FOLDER, BELOW)},
    "filter": {"--out-file": (FOLDER, BELOW)},
    "dump": {"--out-dir": (FILE, BELOW)},
    "clip": {"run_dir": (FILE, BELOW, "clip")},
    "embeddings": {"--out-dir": (FILE, BELOW)},
    "gan": {"--outdir": (FILE, BELOW)},
    "gen_images": {"--outdir": (FILE, BELOW), "--out-h5": (FOLDER, BELOW)},
    "diffusion": {"--output-dir": (FILE, BELOW)},
    "generate_img": {"--gen-img-path": (FILE, BELOW)},
    "metrics": {"--report": ("sections/results.html", FOLDER, BELOW), "--out-dir": (FILE, BELOW)},
    "perturb": {"--outdir": (FILE, BELOW)},
    "interpolate": {"--outdir": (FILE, BELOW)},
    "interpretability": {"--out-file": ("scores/index.csv", FOLDER, BELOW)},
    "evaluate_sections": {"--out": ("beside/train.csv", "beside/val.csv", "sections/new.html", FOLDER, BELOW), "--report": (FOLDER, BELOW)},
    "import_st": {"--out-dir": (FILE, BELOW)},
    "cohort_report": {"--out-dir": (FILE, BELOW)},
    "choose_ema": {"--out-dir": (FILE, BELOW)},
}
# a file that was not written by the command may stand in the place of none of these; what it has written itself may be replaced
FILES = ("data/imgs.h5", "data/gex.h5ad", "data/gex_filt.h5ad", "data/vocab.txt", "data/qc.html", "data/dropped_spots.tsv",
         "clip/config.json", "generated/samples.csv", "generated/grid.png", "embeddings/gene_clip_emb.npy", "embeddings/embeddings.json",
         "scores/index.html", "scores/index.json", "scores/image_quality_metrics.csv", "sections/index.html", "sections/results.json",
         "perturbed/index.html", "perturbed/perturbation.csv", "attributions/genes.csv", "attributions/genes.json", "beside/clusters.csv",
         "beside/genes.txt", *(f"{FOLDER}/thesis.{suffix}" for suffix in ("txt", "html", "csv", "json", "h5", "h5ad")))
OWN_FILES = {("vocabulary", "--out"): "data/vocab.txt", ("filter", "--out-file"): "data/gex_filt.h5ad",
             ("metrics", "--report"): "scores/index.html", ("interpretability", "--out-file"): "attributions/genes.csv",
             ("evaluate_sections", "--out"): "sections/results.json", ("evaluate_sections", "--report"): "sections/index.html",
             ("gen_images", "--out-h5"): None, ("extract", "--out-file"): None}
# of a folder that is all the command's; `.` is that of the walk
FOLDERS = (*dict.fromkeys(WRITES.values()), "data", "data/patches", "imported", "foreign", "clip/clip", "diffusion/pipeline",
           "averaged", GAN_RUN, FOLDER, ".")
OWN_FOLDERS = {("simulate", "--out-dir"): "SIM", ("dump", "--out-dir"): "data/patches", ("clip", "run_dir"): "clip",
               ("gen_images", "--outdir"): "generated",
               ("diffusion", "--output-dir"): "diffusion", ("generate_img", "--gen-img-path"): "drawn",
               ("perturb", "--outdir"): "perturbed", ("interpolate", "--outdir"): "between",
               ("choose_ema", "--out-dir"): "averaged/pipeline"}
# of a folder with outputs of several commands: those whose readers would take what is written there for their own, or lose a file
WHOLE = ("data/patches", "generated", "drawn", "between", "perturbed", "embeddings", "clip", "clip/clip", "diffusion", "diffusion/pipeline",
         "foreign", GAN_RUN)
SHARED_FOLDERS = {("extract", "--out-dir"): ("imported",), ("import_st", "--out-dir"): ("data", "cohort/SIM"), ("gan", "--outdir"): (),
                  ("embeddings", "--out-dir"): (),
                  ("cohort_report", "--out-dir"): ("mine/cohort",)}
OTHERWISE = {"gen_images": ("--images", "data/imgs.h5"), "metrics": ("--gex", "data/gex_filt.h5ad"),
             "evaluate_sections": ("--report", "sections/new.html")}
RANDOM_PATCHES = ("--tissue-seg-file", "auto")       # what --out-file of extract goes with


@pytest.fixture(scope="module")
def folder(undisturbed, tmp_path_factory):
    copy = tmp_path_factory.mktemp("outputs") / "walk"
    shutil.copytree(undisturbed[0], copy)
    (copy / FOLDER / "cohort").mkdir(parents=True)
    for suffix, text in {"txt": "a precious line\n", "html": "<html><title>Image quality: mine</title></html>", "csv": "barcode,mark\n",
                         "json": '{"mine": 1}'}.items():
        (copy / FOLDER / f"thesis.{suffix}").write_text(text)
    for suffix in ("h5", "h5ad"):
        with h5py.File(copy / FOLDER / f"thesis.{suffix}", "w") as file:
            file["mine"] = 1
    for name in ("cohort.csv", "cohort.html"):
        (copy / FOLDER / "cohort" / name).write_text("somebody's")
    shutil.copy(copy / "sections" / "index.html", copy / "sections" / "new.html")
    return copy


def untouched(folder) -> dict:
    """Name -> what changes when a file is written, be it with the content that it had; nothing hidden."""
    entries = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: (path.is_dir() or (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns)) for name, path in entries.items()
            if not any(part.startswith(".") for part in name.split("/"))}


def cases_of(name: str) -> list[tuple[str, str]]:
    """Every (option, path) that the command must refuse."""
    wrong = {option: list(paths) for option, paths in WRONG[name].items()}
    for own, every in ((OWN_FILES, FILES), (OWN_FOLDERS, FOLDERS)):
        for (command, option), mine in own.items():
            if command == name:
                wrong.setdefault(option, []).extend(path for path in every if path != mine)
    for (command, option), more in SHARED_FOLDERS.items():
        if command == name:
            wrong[option] += [path for path in (*WHOLE, *more) if path != command]         # embeddings/ is embeddings' own
    return [(option, path) for option, paths in wrong.items() for path in dict.fromkeys(paths)]


def with_output(name: str, option: str, path: str) -> list[str]:
    """The command's arguments with another output; `clip` without ckpt_path, which begins anew."""
    arguments = [str(argument) for argument in COMMANDS[name] if argument != "ckpt_path=auto"]
    if name in OTHERWISE:
        arguments = replaced(arguments, *OTHERWISE[name])
    if (name, option) == ("extract", "--out-file"):
        arguments += RANDOM_PATCHES
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
    cases = cases_of(name)
    before = untouched(folder)
    for option, path in random.Random(name).sample(cases, rounds(2, len(cases))):
        run = commands.start(name, *with_output(name, option, path), before=f"import os; os.setpgid(0, 0); os.chdir({str(folder)!r})")
        tried()
        case = f"{name} {option} {path}"
        assert run.wait() in (2, 3, 4), (case, run.code, run.said[-2000:])
        said = [line for line in run.errors or run.said.splitlines() if line.lower().startswith("error: ") or "Traceback" in line]
        shown = path.split("/{}")[0]
        assert len(said) == 1 and (shown.rpartition(".")[0] or shown) in said[0], (case, run.said[-2000:])
        assert differences(untouched(folder), before) == [] and leftovers(folder) == [], case
        assert re.search(r"training spots|\d+%", run.said) is None, (case, "said before the work", run.said[-2000:])


def test_a_link_to_a_folder_stays_a_link_and_the_folder_behind_it_is_written(commands, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0] / "data", tmp_path / "data")
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/real")
    for _ in range(2):
        commands.succeeds("dump", "--images", tmp_path / "data" / "imgs.h5", "--no-normalize", "--out-dir", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "real" / "metadata.jsonl").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk", "link"] and leftovers(tmp_path) == []
