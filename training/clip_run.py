"""One run of CLIP training, from a checked configuration to a run folder with weights."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only

from evaluation.retrieval import retrieval_by_sample
from networks.clip import CLIP
from networks.histo_models import Encoder, build_encoder
from networks.weights import KIND as WEIGHTS
from preprocessing.done_manifests import program_versions
from preprocessing.errors import OptionError
from preprocessing.gene_sets import gene_sets_within
from preprocessing.output_places import FolderKind, require_own_folder, require_replaceable, require_shared_folder
from preprocessing.outputs import only_writer, write_json
from training.clip_checkpoints import newest_checkpoint, require_checkpoint
from training.clip_config import ClipConfig
from training.clip_continuation import ResumePoint, require_same_run, run_record
from training.clip_data import ClipData, centre_features, fit_inputs, load_clip_data, use_features
from training.clip_fit import fit_clip
from training.clip_module import flat_metrics
from training.clip_pairs import Pairs
from training.clip_ranks import all_ranks, find_devices

KIND = FolderKind("that of a CLIP run", r"config\.json|split\.json|checkpoints/")


def run_clip(config: ClipConfig, resolve: Callable[[str], Path]) -> Path | None:
    """Train and write the run folder: config.json, split.json, csv/, tensorboard/, checkpoints/, clip/.

    Returns the folder; None on the ranks that write nothing. What is wrong with the input is said before other ranks start.
    """
    limit_threads(config.trainer.num_threads)
    torch.manual_seed(config.seed)
    ranks = find_devices(config.trainer)
    if rank_zero_only.rank:   # known from the environment before ranks are joined
        config = replace(config, trainer=replace(config.trainer, progress_bar=False))
    _require_run_folder(config, resolve)
    weights = config.model.image_encoder_weights
    tower = build_encoder(config.model.image_encoder, resolve(weights) if weights else None,
                          config.model.image_encoder_px)   # fails early: before data is read
    start = _checkpoint(config, resolve)
    data = load_clip_data(config, resolve)
    record = run_record(config, data.sha256)
    require_same_run(start, record)
    gene_sets = _gene_sets(config, resolve, data.gene_names)
    with all_ranks(ranks), ExitStack() as held:
        run_dir = ranks.broadcast(_open_run(config, data, tower, resolve, held) if ranks.is_global_zero else None)
        tower.to(ranks.device)
        if config.image.cache_features:
            use_features(data, tower, config, resolve, ranks.device)
        centre_features(data, tower, config, ranks.device)
        torch.manual_seed(config.seed)
        clip = CLIP(config.model, data.gene_names, target_sum=config.data.target_sum, image_encoder=tower,
                    training={**data.record, "seed": config.seed}, gene_sets=gene_sets)
        if clip.needs_fitting:
            fit_inputs(clip, data, tower, ranks.device)
        clip = fit_clip(clip, data, config, run_dir, record, None if start is None else start.path)
        if not ranks.is_global_zero:
            return None
        if data.val is not None:
            clip.training_record["retrieval"] = _write_retrieval(clip, data.val, run_dir)
        clip.save_pretrained(run_dir / "clip")
    return run_dir


def _require_run_folder(config: ClipConfig, resolve: Callable[[str], Path]) -> None:
    """Refuse, before anything is read, a folder whose content this run would replace, or mix with its own."""
    from training.run_folder import require_own_config

    if not config.run_dir:
        require_shared_folder("out_dir", resolve(config.out_dir))
        return
    run_dir = resolve(config.run_dir)
    require_own_folder("run_dir", run_dir, KIND)
    require_replaceable(run_dir / "clip", WEIGHTS)
    require_own_config("run_dir", run_dir, ("data", "model", "trainer"), "a CLIP run")
    checkpoints = run_dir / "checkpoints"
    own = config.ckpt_path in ("auto", "last") or (config.ckpt_path and resolve(config.ckpt_path).resolve().parent == checkpoints.resolve())
    if not own and any(checkpoints.glob("*.ckpt")):
        raise OptionError("run_dir", "a folder without checkpoints, or ckpt_path=auto to go on with them", str(run_dir))


def _gene_sets(config: ClipConfig, resolve: Callable[[str], Path], gene_names: list[str]) -> dict[str, list[str]]:
    """Of the pathways encoder; none for the others. What was left out is said."""
    if config.model.pathways_file is None:
        return {}
    gene_sets, said = gene_sets_within(resolve(config.model.pathways_file), gene_names)
    if not rank_zero_only.rank:
        print(said, flush=True)
    return gene_sets


def _open_run(config: ClipConfig, data: ClipData, tower: Encoder, resolve: Callable[[str], Path], held: ExitStack) -> Path:
    """Make the run folder, hold it until `held` ends, write what is known before training, and say it."""
    from training.run_folder import next_run_folder

    run_dir = resolve(config.run_dir) if config.run_dir else next_run_folder(resolve(config.out_dir), "clip")
    run_dir.mkdir(parents=True, exist_ok=True)
    held.enter_context(only_writer(run_dir, parts=["checkpoints"]))
    print(f"{', '.join(data.record['samples'])}: {data.record['n_spots']:,} training spots, {data.record['n_val_spots']:,} validation "
          f"spots, {len(data.gene_names):,} genes; {tower.name} {tower.width}-d; {run_dir}", flush=True)
    write_json(run_dir / "config.json", {**asdict(config), "versions": program_versions()})
    if data.split:
        write_json(run_dir / "split.json", data.split)
    return run_dir


def _write_retrieval(clip: CLIP, val: Pairs, run_dir: Path) -> dict:
    """Retrieval of the final weights on the validation spots: retrieval.json. Returns the joint numbers with the samples' names."""
    keys = [(0, row) for row in range(len(val))]
    genes, images = [], []
    with torch.no_grad():
        for start in range(0, len(keys), 256):
            seen, expression, _, centre = val.__getitems__(keys[start:start + 256])
            genes.append(clip.encode_genes(expression))
            images.append(clip.encode_images(seen, centre) if seen.dim() == 4 else clip.project_views(seen, centre))
    found = retrieval_by_sample(torch.cat(genes).numpy(), torch.cat(images).numpy(), val.sample_ids)
    write_json(run_dir / "retrieval.json", {"n_spots": len(val), **flat_metrics(found["joint"]), **found})
    return {"samples": list(found["samples"]), **found["joint"]}


def _checkpoint(config: ClipConfig, resolve: Callable[[str], Path]) -> ResumePoint | None:
    if config.ckpt_path is None:
        return None
    if config.ckpt_path == "auto":
        return newest_checkpoint(resolve(config.run_dir) / "checkpoints")
    path = resolve(config.run_dir) / "checkpoints" / "last.ckpt" if config.ckpt_path == "last" else resolve(config.ckpt_path)
    return require_checkpoint(path)


def limit_threads(most: int | None) -> None:
    """Compute with at most so many threads, never with more than PyTorch has: beyond OMP_NUM_THREADS they wait for each other."""
    if most:
        torch.set_num_threads(min(most, torch.get_num_threads()))
