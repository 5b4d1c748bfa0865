"""Every file we write, with one bit changed, cut short or gone: read to the same contents, made anew, or refused in one line.

Where a checksum or a manifest stands beside it no damage may pass as other contents; without one it may, but never as a traceback,
a crash or a hang. What is written and read: `written_data.py`, `written_runs.py`, and blocks of a stopped run in `test_damaged_parts.py`.

Written, and never read again by us:
  pages and pictures      *.html, grid.png, strip.png, contact sheets, quality.png, training samples, pictures of perturb.py
  logs                    log.txt, TensorBoard events, csv/metrics.csv of a CLIP run (a resumed one begins another), events of W&B
  numbers beside a page   results.json, <report>.json, perturbation.csv and .json, <attributions>.json, cohort.csv
  what a run was          config.json, split.json and retrieval.json of CLIP, config.json of diffusion, README.md of weights
  for other programs      latents.npy of generate_img, the .h5ad for scGPT, truth/ of a simulated sample
Of a format read elsewhere: patches and counts of gen_images.py as .h5 (patch_file, manifest), rows of a walk as .npy, prompts of other
embeddings (embeddings), tissue.geojson of a simulated sample (tissue), null/samples.csv (diffusion_images), metadata.jsonl of
dump_metadata (patch_folder), the CLIP's columns that are added to an .h5ad (expression).
"""
import shutil

import pytest
import torch
from damaged_reading import damages_of, digest, outcomes
from fault_rounds import rounds
from written_data import ALWAYS_THE_SAME, DATA_FORMATS
from written_runs import RUN_FORMATS

from training.checkpoints import latest_checkpoint, save_checkpoint

FLIPS, CUTS = rounds(10, 150), rounds(3, 20)
FORMATS = {make.__name__: make for make in (*DATA_FORMATS, *RUN_FORMATS)}
HARMLESS = ("COMMIT", "stain.json")          # that it is there counts; how patches were stained, which pairs without it


@pytest.mark.fault("flipped bit or cut file")
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_as_it_was_or_refused_in_one_line(name, tmp_path, tried, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    files, read, guarded = FORMATS[name](tmp_path)
    whole = digest(read())
    assert digest(read()) == whole, "the contents are the same whenever they are read"
    for number, path in enumerate(files):
        content = path.read_bytes()
        damages = damages_of(path, content, FLIPS, CUTS, seed=number)
        tried(len(damages))
        found = list(outcomes(read, damages, whole))
        path.write_bytes(content)
        assert len(found) == len(damages)
        wrong = [said for said in found if said.startswith("crash") or said == "hang"]
        if guarded == ALWAYS_THE_SAME:
            wrong += [said for said in found if said != "same"]
        elif path in guarded:
            wrong += [said for said in found if said == "other" and path.name not in HARMLESS]
        assert wrong == [], (path.name, len(wrong), wrong[0])
        if guarded == ALWAYS_THE_SAME:
            read()


@pytest.mark.fault("damaged newest checkpoint")
@pytest.mark.parametrize("name", ["state.json", "generator.safetensors", "generator.pt", "SHA256SUMS", "COMMIT"])
def test_of_a_damaged_newest_checkpoint_the_one_before_is_used_with_a_warning(name, tmp_path, tried, caplog):
    tensors = {"generator": {"a": torch.arange(40.0)}}
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state={}, tensors=tensors, optimisers={"generator": {"lr": 0.1}})
    path = tmp_path / "checkpoint-00000002" / name
    content = path.read_bytes()
    for damage in damages_of(path, content, rounds(8, 60), 3, seed=0):
        tried()
        damage()
        caplog.clear()
        found = latest_checkpoint(tmp_path)
        step = found.state["step"]
        assert step == 1 and "skipping a damaged checkpoint" in caplog.text or step == 2 and digest(found.tensors) == digest(tensors)
        path.write_bytes(content)
    shutil.rmtree(tmp_path / "checkpoint-00000002")
    assert latest_checkpoint(tmp_path).state["step"] == 1
