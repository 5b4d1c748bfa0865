"""The commands of diffusion as a user calls them: options, signals, two processes, secrets, and a walk between prompts."""
import csv
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from diffusion_world import PX, WIDTH, differing, run, start, weights, write_world
from PIL import Image
from processes import finish, press_twice

import interpolate_prompts
from diffusion_utils import choose_ema, dump_metadata, generate_img, train_diffusion
from preprocessing.outputs import only_writer
from training.checkpoints import latest_checkpoint

SECRET = "hf_abcdefSECRETabcdef"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("commands"))


def arguments(world, out, *more):
    return ["--train_data_dir", str(world / "patches"), "--dataset_embs", str(world / "emb.npy"), "--output_dir", str(out),
            "--from-scratch", "small", "--pixel-space", "--resolution", str(PX), "--train_batch_size", "4", "--max_train_steps", "3",
            "--report_to", "none", "--n-tokens", "3", "--no-progress", "--mixed_precision", "no", "--dataloader_num_workers", "1", *more]


@pytest.mark.parametrize("module", [train_diffusion, generate_img, dump_metadata, choose_ema],
                         ids=lambda module: module.__name__.split(".")[-1])
def test_help_teaches_without_loading_torch(module):
    code = f"import sys; sys.argv = ['x', '--help']\ntry:\n    import runpy; runpy.run_module('{module.__name__}', run_name='__main__')\n" \
           "except SystemExit: pass\nassert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "python -m diffusion_utils." in done.stdout, done.stderr


def test_a_run_folder_in_which_another_process_trains_is_refused_at_once(world, tmp_path):
    with only_writer(tmp_path / "run"):
        result = CliRunner().invoke(train_diffusion.main, arguments(world, tmp_path / "run"))
    assert result.exit_code == 4 and f"error: {tmp_path / 'run'}: another process is at work in this folder" in result.output
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_a_run_by_command_trains_and_keeps_every_secret_out_of_its_files(world, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    result = CliRunner().invoke(train_diffusion.main, arguments(world, tmp_path / "run", "--checkpointing_steps", "2"))
    assert result.exit_code == 0 and f"wrote {tmp_path / 'run' / 'pipeline'}" in result.output, result.output
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    lines = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize("more, code, message", [
    (["--learning_rate", "0"], 2, "--learning-rate"), (["--train_batch_size", "64"], 3, "at least one step"),
    (["--uncond_embedding", "nowhere.npy"], 3, "nowhere.npy"), (["--resume_from_checkpoint", "nowhere"], 3, "nowhere")])
def test_a_mistake_ends_in_one_line(world, tmp_path, more, code, message):
    result = CliRunner().invoke(train_diffusion.main, arguments(world, tmp_path / "run", *more))
    assert result.exit_code == code and message in result.output and "Traceback" not in result.output


TINY_MAIN = "import diffusion_world; from diffusion_utils.train_diffusion import main; main()"


def tiny_script(folder):
    """train_diffusion with the tests' tiny denoiser, as a script that a launcher can start."""
    (folder / "tiny.py").write_text(TINY_MAIN + "\n")
    return str(folder / "tiny.py")


@pytest.mark.slow
def test_two_processes_train_save_and_resume_as_one_with_their_batch(world, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tiny_script(tmp_path)]     # gloo, on CPUs
    more = ["--train_batch_size", "2", "--checkpointing_steps", "1"]
    code, told, errors = finish(start(*launch, *arguments(world, tmp_path / "two", *more, "--max_train_steps", "1")), 500)
    assert code == 0 and told.count("wrote ") == 1 and "2 process(es), 4 images a step" in told, errors[-2000:]
    code, told, errors = finish(start(*launch, *arguments(world, tmp_path / "two", *more, "--resume_from_checkpoint", "latest")), 500)
    assert code == 0 and "from step 1" in told, errors[-2000:]

    def losses(folder):
        return [json.loads(line)["loss"] for line in (folder / "stats.jsonl").read_text().splitlines()]
    run(world, tmp_path / "one", max_train_steps=3)
    assert np.allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


def test_what_a_kill_left_half_written_goes_when_the_run_goes_on(world, tmp_path):
    out, more = tmp_path / "run", ("--power_ema", "--resume_from_checkpoint", "latest")
    assert CliRunner().invoke(train_diffusion.main, arguments(world, out, "--max_train_steps", "1", *more)).exit_code == 0
    for place in ("averages/update-00000002.tmp.7", "samples/step-00000002.png.tmp.7", "checkpoint-00000002.tmp.7"):
        (out / place).mkdir(parents=True)
    result = CliRunner().invoke(train_diffusion.main, arguments(world, out, "--max_train_steps", "2", *more))
    assert result.exit_code == 0, result.output
    assert not list(out.rglob("*.tmp.*")) and (out / "averages" / "update-00000002").is_dir()


@pytest.mark.slow
def test_a_term_signal_saves_and_the_same_command_goes_on(world, tmp_path):
    out = tmp_path / "run"
    process = start(tiny_script(tmp_path), *arguments(world, out, "--max_train_steps", "5000"))
    while process.poll() is None and not (out / "stats.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process, 500)
    saved = list(out.glob("checkpoint-*"))
    assert code == 143 and len(saved) == 1 and "Traceback" not in errors and not (out / "pipeline").exists(), errors[-2000:]
    step = int(saved[0].name.split("-")[1])
    resumed = run(world, out, max_train_steps=step + 2, resume_from_checkpoint="latest")
    straight = run(world, tmp_path / "straight", max_train_steps=step + 2)
    assert differing(weights(resumed), weights(straight)) == []


SLOW = """
import sys
import diffusion_world
from diffusion_utils import finetune
from diffusion_utils.train_diffusion import main
from processes import slow_places
finetune.losses_of = slow_places(finetune.losses_of, sys.argv.pop(1), after=2)
main()
"""


@pytest.mark.slow
@pytest.mark.fault("Ctrl-C")
@pytest.mark.parametrize("where", ["step", "save"])
def test_a_second_ctrl_c_kills_a_fine_tune_and_the_same_command_goes_on_from_the_checkpoint_before(world, tmp_path, where):
    out = tmp_path / "run"
    process = start("-c", SLOW, where, *arguments(world, out, "--checkpointing_steps", "2", "--max_train_steps", "4"))
    code, errors = press_twice(process, where)
    assert code == -signal.SIGINT and errors == "" and latest_checkpoint(out).state["step"] == 2
    resumed, straight = run(world, out, resume_from_checkpoint="latest"), run(world, tmp_path / "straight")
    assert differing(weights(resumed), weights(straight)) == []


def test_a_walk_between_prompts_is_drawn_by_a_pipeline_too(world, tmp_path):
    run(world, tmp_path / "run", max_train_steps=1)
    ends = ["--prompt1", f"{world / 'emb.npy'}:0", "--prompt2", f"{world / 'emb.npy'}:5"]
    walk = ["--network", str(tmp_path / "run"), "--outdir", str(tmp_path / "walk"), "--n-steps", "4", "--seeds", "0,2", "--steps", "2",
            "--device", "cpu"]
    result = CliRunner().invoke(interpolate_prompts.main, [*walk, *ends])
    assert result.exit_code == 0 and "wrote 8 patches" in result.output, result.output
    rows, given = np.load(tmp_path / "walk" / "embeddings.npy"), np.load(world / "emb.npy")
    assert rows.shape == (4, WIDTH) and np.array_equal(rows[0], given[0]) and np.array_equal(rows[3], given[5])
    assert [row["step"] for row in csv.DictReader(open(tmp_path / "walk" / "samples.csv"))] == list("01230123")
    asked = CliRunner().invoke(generate_img.main, ["--model-checkpoint", str(tmp_path / "run"), "--prompt-file", str(world / "emb.npy"),
                                                   "--gen-img-path", str(tmp_path / "gen"), "--seeds", "0,2", "--same-seed", "--steps", "2",
                                                   "--device", "cpu"])
    assert asked.exit_code == 0, asked.output
    for seed in (0, 2):
        for step, row in ((0, 0), (3, 5)):
            ours = np.asarray(Image.open(tmp_path / "walk" / f"seed{seed:04d}_step{step:02d}.png")).astype(int)
            theirs = np.asarray(Image.open(tmp_path / "gen" / f"prompt{row:05d}_seed{seed:04d}.png")).astype(int)
            assert np.abs(ours - theirs).max() <= 1
    for more, message in ((["--truncation", "0.5"], "a GAN snapshot"), (["--n-steps", "1"], "--n-steps"),
                          (["--prompt1", f"{world / 'emb.npy'}:99"], "0 to 11"), (["--prompt1", "x.h5ad:1"], "FILE.npy:ROW")):
        refused = CliRunner().invoke(interpolate_prompts.main, [*walk, *ends, *more])
        assert refused.exit_code in (2, 3) and message in refused.output
