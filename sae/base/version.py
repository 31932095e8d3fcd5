"""Which version this is, without importing anything else of ours."""

import tomllib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

NAME = "sae-interp"


def version() -> str:
    """Returns the version: of the checkout that this file lies in, else of the installed package.

    "0+unknown" of a copy that is neither.
    """
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    if checkout.is_file():  # an editable installation may tell what was true when it was made
        project = tomllib.loads(checkout.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == NAME:
            return project["version"]
    try:
        return installed(NAME)
    except PackageNotFoundError:
        return "0+unknown"
