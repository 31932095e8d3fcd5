"""Pages read back from their files: the blocks of data in them."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

BLOCK = re.compile(r'<script type="text/plain" data-block="([^"]*)">([^<]*)</script>')


def blocks(path: Path) -> dict[str, Any]:
    """Returns the blocks of a page by their names."""
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return {name: json.loads(gzip.decompress(base64.b64decode(data))) for name, data in found}


def latents_of_blocks(found: dict[str, Any], run: int = 0) -> dict[int, dict[str, Any]]:
    """Returns by id what a page tells of the latents of a run."""
    parts = [value["latents"] for name, value in found.items() if name.startswith(f"{run}/")]
    return {one["latent"]: one for part in parts for one in part}
