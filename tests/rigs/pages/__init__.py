"""Pages read back: what is in their blocks."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any


def blocks(path: Path) -> dict[str, Any]:
    """Returns the blocks of a page, by name."""
    found = re.findall(r'data-block="([^"]*)">([^<]*)<', path.read_text(encoding="utf-8"))
    return {name: json.loads(gzip.decompress(base64.b64decode(data))) for name, data in found}
