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
    "torch.load": ("weights_only", True), "np.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False), "from_pretrained": ("use_safetensors", True),
    "trainer.fit": ("weights_only", True),
}
REFUSED_WHOLE |= {"yaml.load", "yaml.load_all"}
NEVER = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False}
ONLY_FALSE, ABSENT = ("shell",), ("checkpoint_path",)              # timm reads the second as a pickle
OURS = ("networks.clip.CLIP.from_pretrained",)                                   # `networks/weights.py` opens what these read


def unsafe(source: str) -> list[str]:
    """What in this text could run code of a file it reads, one line each."""
    tree = ast.parse(source)
    aliases, called = _aliases(tree), {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [name.replace("numpy.", "np.") for name in _imported(node)]
            said = [name for name in names if name.split(".")[0] in RUNS_CODE or name in NEEDED or name in REFUSED_WHOLE]
        elif isinstance(node, ast.Call):
            said = _unsafe_call(node, aliases)
        elif isinstance(node, ast.Attribute | ast.Name) and id(node) not in called and isinstance(node.ctx, ast.Load):
            name = _name(node, aliases)                            # under another name, in a table, in a partial
            said = [name] if name in NEEDED or name in REFUSED_WHOLE or "." in name and _is_refused(name, node) else []
        else:
            continue
        found += [f"{node.lineno}: {word}" for word in said]
    return found


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
    return [prefix + alias.name for alias in node.names]


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Name in this text -> what was imported under it, where the two differ."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    named = {alias.asname or alias.name: name for node in nodes for alias, name in zip(node.names, _imported(node), strict=True)}
    return {name: {"numpy": "np"}.get(whole, whole) for name, whole in named.items()}


def _name(node: ast.expr, aliases: dict[str, str]) -> str:
    first, dot, rest = ast.unparse(node).partition(".")
    whole = aliases.get(first, first).removeprefix("builtins.")
    return whole + dot + rest


def _is_refused(name: str, node: ast.expr) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last in REFUSED and not (last in METHODS and isinstance(node, ast.Attribute))


def _unsafe_call(node: ast.Call, aliases: dict[str, str]) -> list[str]:
    name = _name(node.func, aliases)
    last = name.rsplit(".", 1)[-1]
    given = {keyword.arg: keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)}
    keywords = {keyword.arg for keyword in node.keywords}
    texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]
    found = [f"{name}({key}={value})" for key, value in NEVER.items() if given.get(key) is value]
    found += [f"{name}({key}=)" for key in ONLY_FALSE if key in keywords and given.get(key) is not False]
    found += [f"{name}({key}=)" for key in ABSENT if key in keywords]
    if name in REFUSED_WHOLE or _is_refused(name, node.func) or name.startswith("runpy."):
        found.append(f"{name}()")
    if name == "getattr" and {"load", *REFUSED} & set(texts) or last == "import_module" and RUNS_CODE & set(texts):
        found.append(f"{name}({', '.join(texts)})")
    needed = NEEDED.get(name) or next((NEEDED[part] for part in ("from_pretrained", "trainer.fit")
                                       if name not in OURS and f".{name}".endswith(f".{part}")), None)
    if needed and given.get(needed[0]) is not needed[1]:
        found.append(f"{name}() without {needed[0]}={needed[1]}")
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
    "import torch as t\nt.load(path)", "getattr(torch, 'load')(path)", "partial(torch.load, path)", "readers = {'pt': torch.load}",
    "from hydra.utils import instantiate as make\nmake(config)", "from builtins import eval as e\ne(text)", "runpy.run_path(path)",
    "from yaml import unsafe_load as read\nread(text)", "importlib.import_module('pickle')", "subprocess.run(line, shell=flag)",
    "UNet2DConditionModel.from_pretrained(folder)", "timm.create_model(name, checkpoint_path=path)", "self.trainer.fit(module)",
    "import numpy\nnumpy.load(path)", "from numpy import load\nload(path)",
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
