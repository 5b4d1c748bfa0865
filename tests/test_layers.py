"""Imports point downwards only; heavy libraries are imported where the architecture allows them and nowhere else."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "preprocessing": set(),
    "networks": {"preprocessing"},   # errors, inputs, outputs, output_places, done_manifests only: see below
    "evaluation": {"networks", "preprocessing"},
    "training": {"evaluation", "networks", "preprocessing"},
    "diffusion_utils": {"training", "evaluation", "networks", "preprocessing"},
}
PACKAGES = [package for package in MAY_IMPORT if (ROOT / package).exists()]
COMMANDS = {path.stem for path in ROOT.glob("*.py")} | {
    f"preprocessing.{name}" for name in
    ("extract_patches", "gex_preprocessing", "dump_patches", "gene_vocab", "import_st", "simulate_sample", "cohort_report")
} | {f"diffusion_utils.{name}" for name in ("train_diffusion", "generate_img", "dump_metadata",
                                              "choose_ema")} | {"training.doctor"}
CONFINED = {   # library -> the only files that may import it
    "torch": {"networks", "evaluation", "training", "diffusion_utils", "."},
    "pytorch_lightning": {"training/clip_module.py", "training/clip_fit.py", "training/clip_checkpoints.py"},
    "diffusers": {"diffusion_utils"},
    "accelerate": {"diffusion_utils"},
    "captum": {"interpretability.py", "evaluation/attribution.py"},
}


def source_files():
    return sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))])


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards_and_nobody_imports_a_command(path):
    relative = path.relative_to(ROOT)
    package = relative.parts[0] if len(relative.parts) > 1 else None
    modules = imported_modules(path)
    ours = {module.split(".")[0] for module in modules} & set(MAY_IMPORT)
    if package:
        assert ours <= MAY_IMPORT[package] | {package}
    if package == "networks":
        upward = {module for module in modules if module.startswith("preprocessing.")}
        assert all(module.split(".")[1] in {"errors", "inputs", "outputs", "output_places", "done_manifests"} for module in upward), upward
    own_name = ".".join(relative.with_suffix("").parts)
    assert not (modules & COMMANDS) - {own_name}


@pytest.mark.parametrize("library", CONFINED)
def test_heavy_libraries_stay_in_their_places(library):
    for path in source_files():
        relative = path.relative_to(ROOT)
        if any(module.split(".")[0] == library for module in imported_modules(path)):
            assert str(relative) in CONFINED[library] or str(relative.parent) in CONFINED[library], relative
