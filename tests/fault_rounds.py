"""How much the fault tests try: enough to notice a change in `make test`, everything in `make faults` (FAULT_ROUNDS=full)."""
import os

FULL = os.environ.get("FAULT_ROUNDS", "bounded") == "full"


def rounds(bounded: int, full: int) -> int:
    """How many faults of one kind this run tries."""
    return full if FULL else bounded
