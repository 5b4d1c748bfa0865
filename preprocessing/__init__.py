"""Space Ranger folder + slide -> patches and expression. Imports no torch."""
import preprocessing.interrupts  # noqa: F401   first: from here on a Ctrl-C is one line
