"""report.html of explained runs: what a run and each of its latents are told by, as blocks of a page."""
