"""No file runs code by being read: no module reads a pickle, and whatever opens weights says that it wants data only."""
import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("preprocessing", "networks", "evaluation", "training", "diffusion_utils", "benchmarks", "workflow")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
RUNS_CODE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}   # by being imported
REFUSED = {          # calls by the last word of their name
    "read_pickle", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "load_from_checkpoint", "load_state_dict_from_url",
    "add_safe_globals", "extractall", "unpack_archive", "instantiate", "eval", "exec", "system", "popen", "read_hdf", "__import__",
}
REFUSED_WHOLE = {"torch.jit.load", "torch.hub.load", "torch.serialization.load", "torch.package.PackageImporter"}
METHODS = {"eval"}   # nn.Module.eval() is fine, the builtin is not
NEEDED = {           # call -> the keyword and value that make it safe
    "torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False), "AutoModel.from_pretrained": ("use_safetensors", True),
    "trainer.fit": ("weights_only", True),
}
YAML_LOADERS = {"yaml.load", "yaml.load_all"}
NEVER = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False, "shell": True}


def unsafe(source: str) -> list[str]:
    """What in this text could run code of a file it reads, one line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {alias.name}" for alias in node.names if alias.name.split(".")[0] in RUNS_CODE]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            hidden = module in {"torch", "numpy", "yaml"} and {alias.name for alias in node.names} & {"load", "load_all"}
            found += [f"{node.lineno}: from {node.module} import"] if module in RUNS_CODE or hidden else []
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {said}" for said in _unsafe_call(node)]
        elif isinstance(node, ast.Assign) and ast.unparse(node.value) in NEEDED:
            found.append(f"{node.lineno}: {ast.unparse(node.value)} under another name")
    return found


def _unsafe_call(node: ast.Call) -> list[str]:
    name, last = ast.unparse(node.func), ast.unparse(node.func).rsplit(".", 1)[-1]
    given = {keyword.arg: keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)}
    found = [f"{name}({key}={value})" for key, value in NEVER.items() if given.get(key) is value]
    if name in REFUSED_WHOLE or last in REFUSED and not (last in METHODS and isinstance(node.func, ast.Attribute)) or name in YAML_LOADERS:
        found.append(f"{name}()")
    if name in NEEDED:
        key, value = NEEDED[name]
        found += [] if given.get(key) is value else [f"{name}() without {key}={value}"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_reads_what_can_run_code(path):
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize("line", [
    "import pickle", "import dill as safe", "from joblib import load", "from torch import load", "torch.load(path)",
    "torch.load(path, weights_only=False)", "np.load(path)", "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)",
    "yaml.load(text, Loader=yaml.SafeLoader)", "pd.read_pickle(path)", "AutoModel.from_pretrained(folder)",
    "Pipeline.from_pretrained(folder, trust_remote_code=True)", "archive.extractall(folder)", "hydra.utils.instantiate(cfg)",
    "eval(text)", "subprocess.run(line, shell=True)", "CLIP.load_from_checkpoint(path)",
    "torch.jit.load(path)", "torch.hub.load(repo, name)", "torch.serialization.load(path)", "__import__('pickle')", "os.popen(line)",
    "pd.read_hdf(path)", "load = torch.load", "torch.load(path, **options)",
])
def test_the_check_finds_what_it_is_for(line):
    assert unsafe(line) != []


def test_the_check_lets_safe_reading_pass():
    assert unsafe("torch.load(p, weights_only=True)\nnp.load(p, mmap_mode='r', allow_pickle=False)\nnet.eval()\nyaml.safe_load(t)") == []


def requirements(name: str) -> dict[str, Requirement]:
    lines = (line.split(" #")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}


@pytest.mark.parametrize(("package", "version"), [
    ("torch", "2.9.1"), ("pytorch-lightning", "2.6.2"), ("pytorch-lightning", "2.6.3"), ("openslide-bin", "4.0.0"), ("pillow", "11.3.0"),
    ("hydra-core", "1.3.2"),
])
def test_the_ranges_leave_out_versions_below_the_floors_and_those_with_malware(package, version):
    assert not requirements("requirements.txt")[package].specifier.contains(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.12.0", "2.15.0"])
def test_the_ranges_admit_every_torch_that_we_say_works(version):
    assert requirements("requirements.txt")["torch"].specifier.contains(version)


def test_the_meta_package_lightning_is_nowhere():
    assert "lightning" not in {**requirements("requirements.txt"), **requirements("requirements-cohort.txt")}


def locked() -> list[tuple[Requirement, int]]:
    """Each line of the lock: the package with its version and marker, and how many hashes it carries."""
    entries = re.split(r"\n(?=\S)", re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "requirements-lock.txt").read_text()).strip())
    parts = [entry.replace("\\\n", " ").split("--hash=") for entry in entries]
    return [(Requirement(first.strip()), len(hashes)) for first, *hashes in parts]


def test_every_package_of_the_lock_is_one_version_with_hashes_inside_our_ranges():
    ranges = {**requirements("requirements.txt"), **requirements("requirements-cohort.txt")}
    assert set(ranges) <= {requirement.name for requirement, _ in locked()}
    for requirement, hashes in locked():
        (pin,) = requirement.specifier
        assert pin.operator == "==" and hashes > 0, requirement
        assert Version(pin.version) in ranges.get(requirement.name, requirement).specifier, requirement


def test_the_lock_names_no_registry_and_no_meta_package():
    text = (ROOT / "requirements-lock.txt").read_text()
    assert not re.search(r"https?://|--index-url|--find-links|file:", text)
    assert "lightning" not in {requirement.name for requirement, _ in locked()}
