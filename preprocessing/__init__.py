"""Space Ranger folder + slide -> patches and expression. Imports no torch."""
