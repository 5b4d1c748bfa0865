"""The progress bar: an interrupt may fall anywhere."""
import sys

import pytest
import tqdm.std

from preprocessing.progress import ProgressBar


def made_but_interrupted_at(line: int) -> bool:
    """Make a bar with a Ctrl-C at the line-th line of tqdm; False where it was whole before."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        here = event == "line" and frame.f_code.co_filename == tqdm.std.__file__
        seen += here
        if here and seen == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        bar = ProgressBar(total=3)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    bar.close()
    return False


def test_a_bar_interrupted_at_any_line_of_its_making_is_deleted_in_silence(monkeypatch):
    complaints = []
    monkeypatch.setattr(ProgressBar, "monitor_interval", 0)
    monkeypatch.setattr(sys, "unraisablehook", lambda complaint: complaints.append((line, complaint.exc_value)))
    for line in range(1, 1000):
        interrupted = made_but_interrupted_at(line)
        if not interrupted:
            break
    else:
        pytest.fail("a bar of a thousand lines")
    assert line > 20 and complaints == []
