"""Run commands of the preprocessing in children of one process that has everything imported: a fault test needs dozens of runs.

Reads a line of JSON a request, answers with one. A child leaves through the interpreter's own exit, so that a crash there is seen.
Blocks are small, so that tiny samples have many. Not a test file: `fault_runs.py` starts it.
"""
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import threading

from tqdm import tqdm

from preprocessing import block_extraction, dump_patches, expression, extract_patches, gex_preprocessing

for module in ("quality_page", "spot_sums", "png_folder", "anndata_sample", "space_ranger", "tissue", "random_patches", "gene_selection",
               "spot_expression", "strips", "matplotlib.figure", "tqdm"):
    importlib.import_module(module if module in ("matplotlib.figure", "tqdm") else f"preprocessing.{module}")
"".encode("utf-8-sig")                    # another user may not be able to read Python's own folder, so its codec is loaded here
tqdm.set_lock(threading.RLock())          # tqdm's own is shared by all processes: a child killed while it holds it would stop the others
block_extraction.MOST_SPOTS = expression.ROWS_AT_ONCE = dump_patches.MOST_PATCHES = 64
COMMANDS = {"extract": extract_patches.main, "filter": gex_preprocessing.main, "dump": dump_patches.main}


def start(command: str, arguments: list[str], log: str, uid: int | None = None, before: str = ""):
    """In the parent: the child's number. In the child: does not return."""
    child = os.fork()
    if child:
        return child
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(os.devnull if descriptor == 0 else log, flags), descriptor)
    os.dup2(1, 2)
    if uid is not None:
        os.setgid(uid)
        os.setuid(uid)
    exec(before, {})
    sys.argv = [command]
    sys.exit(COMMANDS[command].main(arguments))


def main() -> None:
    gc.freeze()                            # else every child, as it leaves, copies the memory of all that was imported, to free it
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("kind")
        if kind == "start":
            answer = start(**request)
        elif kind == "wait":
            number, status = os.waitpid(request["child"], request["flags"])
            answer = os.waitstatus_to_exitcode(status) if number else None
        else:
            answer = subprocess.run(request["command"], capture_output=True, text=True).returncode
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
