"""What ships with the package: the language model of the quickstart, and the table of releases."""

from pathlib import Path

QUICKSTART_LM = Path(__file__).parent / "quickstart-lm"
"""Folder of the bundled language model, loadable with `AutoTokenizer` and `AutoModelForCausalLM`."""
RELEASES = Path(__file__).parent / "releases.json"
"""The table of released coders, as `sae.loading.releases` reads it."""
