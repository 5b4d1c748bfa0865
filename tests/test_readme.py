"""Every command of the README is run by the demo or the real-tissue walk (both are run by tests), or right here."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT_NAMES = {"demo.sh": "demo_run", "real_tissue.sh": "runs/her2st"}
SET_UP = {"make demo", "make test", "source .venv/bin/activate"}   # what has already happened when this test runs


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


def script_commands(name: str) -> str:
    """A walk's text with the README's names in place of its variables."""
    text = (ROOT / "assets" / name).read_text().replace("\\\n", " ")
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    text = text.replace('"$OUT"', OUT_NAMES[name]).replace("$OUT", OUT_NAMES[name]).replace('"', "")
    return " ".join(text.split())


def walk_of(command: str) -> str | None:
    return next((name for name in OUT_NAMES if " ".join(command.replace('"', "").split()) in script_commands(name)), None)
