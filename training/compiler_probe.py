"""Try the compiler that `--compile` needs, before a run makes its folder: torch.compile would miss it only at the first step.

On a CPU Inductor calls a C++ compiler for every graph; on a GPU Triton calls a C compiler once to reach the driver.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from preprocessing.errors import OptionError
from training.gan_speed import Compile

SOURCE = "#include <Python.h>\nint main() { return 0; }\n"     # graphs are built as extensions of Python: its headers are needed, too
LONGEST_S = 120


def require_compiler(compiled: Compile, device: str) -> None:
    """OptionError if `--compile` asks for what this machine cannot do."""
    if compiled == "off":
        return
    on_gpu = device.startswith("cuda")
    if on_gpu and find_spec("triton") is None:
        raise OptionError("--compile", "the package triton on a GPU", "it is not installed; use --compile off")
    language = "c" if on_gpu else "c++"
    wanted = f"a working {'C' if on_gpu else 'C++'} compiler and the headers of Python (Python.h)"
    compiler = _c_compiler() if on_gpu else _cpp_compiler()
    if compiler is None:
        raise OptionError("--compile", wanted, f"none. Name one in {'CC' if on_gpu else 'CXX'}, or use --compile off")
    if found := _complaint(compiler, language):
        raise OptionError("--compile", wanted, f"{compiler}: {found}. Install what it misses, or use --compile off")


def _cpp_compiler() -> str | None:
    """The one that Inductor finds."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def _c_compiler() -> str | None:
    """The one that Triton finds."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _complaint(compiler: str, language: str) -> str:
    """What goes wrong when the compiler is given a few lines; nothing, if it works."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.txt"
        source.write_text(SOURCE)
        headers, built = sysconfig.get_paths()["include"], Path(folder) / "probe.o"
        command = [compiler, "-x", language, f"-I{headers}", "-c", str(source), "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LONGEST_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return next((line for line in lines if "error" in line), lines[0]).removeprefix(f"{source}:")[:160]
