"""Prints the oldest versions of what pyproject.toml declares, one `name==version` a line, as pip's constraints.

torch stays at the version whose CPU build is at hand: its older ones come from PyPI with gigabytes of CUDA.
"""

import re
import tomllib
from pathlib import Path

TORCH = "2.13.0"

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for declared in [*project["dependencies"], *project["optional-dependencies"]["view"]]:
    name, oldest = re.fullmatch(r"([\w-]+)>=([\d.]+)", declared).groups()
    print(f"{name}=={TORCH if name == 'torch' else oldest}")
