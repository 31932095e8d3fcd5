"""Ends red unless a wheel holds what git knows of our packages and nothing else, and an sdist nothing of tests or docs.

contents.py FOLDER      with one of each
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name and not name.endswith(".md")}
known = subprocess.run(
    ["git", "ls-files", "sae", "interp", "cli", "configs"], capture_output=True, text=True, check=True
)
ours = {
    re.sub(r"^(cli|configs)/", r"sae_interp/\1/", name) for name in known.stdout.split() if not name.endswith(".md")
}
if held != ours:
    sys.exit(f"{wheel.name}: too many: {sorted(held - ours)}; missing: {sorted(ours - held)}")
with tarfile.open(sdist) as archive:
    beside = {name.split("/")[1] for name in archive.getnames() if "/" in name}
print(
    f"{wheel.name}: {len(held)} files, {wheel.stat().st_size / 1e6:.1f} MB; {sdist.name}: {', '.join(sorted(beside))}"
)
if beside & {"tests", "docs", ".ci"}:
    sys.exit(f"{sdist.name}: tests or docs are inside")
