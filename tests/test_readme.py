"""Every command of the README is a step of the demo or of the real-tissue walk, which other tests run from end to end."""
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_TISSUE = "bash assets/real_tissue.sh --data ../shared/data/her2st --train C2,C3 --val C4 --out runs/her2st"
ONE_PASS = ("python preprocessing/extract_patches.py --space-ranger-dir demo_run/SIM_B --wsi-file demo_run/SIM_B/slide.tif "
            "--sample-id SIM_B --out-dir demo_run/one_pass --stride 5 --dump-dir demo_run/one_pass/patches --no-h5")
COHORT = "snakemake --profile workflow/profiles/local --config samples=workflow/demo_sheet.csv out_dir=demo_run/cohort"
TORCHRUN = ("torchrun --nproc-per-node 2 gen_images.py --network demo_run/gan/00000-* --gex demo_run/data/SIM_B/gex_filt.h5ad --seeds 0-3 "
            "--batch-sz 64 --out-h5 demo_run/many/patches.h5 --outdir demo_run/many")
REPORT = ("python calculate_image_quality_metrics.py --experiment demo --ref-img-path demo_run/data/SIM_B/patches --gen-img-path "
          "demo_run/generated --features efficientnet_lite0 --match-px 64 --out-dir demo_run --report demo_run/faithful.html "
          "--gex demo_run/data/SIM_B/gex_filt.h5ad --train-img-path demo_run/data/SIM_A/patches")
GENES = ("python interpretability.py --network demo_run/clip/clip --gex demo_run/data/SIM_B/gex_filt.h5ad --cluster-labs cluster "
         "--out-file demo_run/genes.csv")
PERTURB = ("python perturb.py --network demo_run/gan/00000-* --gex demo_run/data/SIM_B/gex_filt.h5ad "
           "--genes Sim00011:+1,Sim00047:+1,Sim00056:+1 --seeds 0-7 --outdir demo_run/perturbed")
RUN_ELSEWHERE = {"make demo", "source .venv/bin/activate", REAL_TISSUE, ONE_PASS, COHORT, TORCHRUN, REPORT, GENES,
                 PERTURB}                                                              # by the tests of each


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def steps(command: str) -> list[str]:
    """What a walk would run, as it prints it itself."""
    found = subprocess.run(["bash", "-c", command], cwd=ROOT, env={**os.environ, "DRY_RUN": "1"}, capture_output=True, text=True,
                           check=True)
    return found.stdout.splitlines()


def test_the_readme_names_the_demo_and_the_real_tissue_walk():
    assert RUN_ELSEWHERE <= set(readme_commands())


def test_every_other_command_is_a_step_of_the_demo_or_of_the_real_tissue_walk(shared_data):
    walked = {*steps("bash assets/demo.sh"), *steps(f"{REAL_TISSUE} --dry-run")}
    strangers = [command for command in readme_commands() if command not in walked | RUN_ELSEWHERE]
    assert not strangers


def test_the_readme_shows_the_demo_and_the_real_tissue_walk_whole(shared_data):
    commands = set(readme_commands())
    assert [step for step in steps(f"{REAL_TISSUE} --dry-run") if step not in commands] == []
    assert [step for step in steps("bash assets/demo.sh") if step not in commands] == []


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()))))
def test_every_file_the_readme_links_is_there(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:preprocessing|networks|training|evaluation|assets|workflow)/[\w./]+)`",
                                                       (ROOT / "README.md").read_text()))))
def test_every_file_the_readme_names_is_there(name):
    assert (ROOT / name).exists() or name == "assets/gene_vocab.txt"    # that one lies in the authors' repository
