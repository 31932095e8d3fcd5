"""report.html of training runs: what a folder tells of a run, its curves, and runs beside each other."""
