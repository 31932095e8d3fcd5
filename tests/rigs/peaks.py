"""The most memory that the ranks of a run had, in processes of their own, beside what rank 0 estimated."""

import json
import os
import subprocess
import sys
from pathlib import Path

from rigs.children import ranks

ROOT = Path(__file__).parents[2]
CODE = """
import json, re, sys
from pathlib import Path
import sae.training.estimate as module
from cli.train import main
told, original = [], module.estimate
def estimate(*given):
    told.append(original(*given))
    return told[0]
module.estimate = estimate
assert main(sys.argv[1:]) == 0
# the peak of this address space; that of getrusage begins with the size of the process that started this one
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
found = {"estimated": told[0].peak_memory, "others": told[0].peak_memory_others, "disk": told[0].disk,
         "seconds": told[0].seconds, "parts": told[0].memory} if told else {}
print(json.dumps({"peak": peak, **found}))
"""


def peaks(n: int, argv: list[str], run_dir: Path) -> list[dict[str, float]]:
    """Returns, by rank, the `peak` of sae-train in bytes, on rank 0 with what it has estimated."""
    environments = ranks(n) if n > 1 else [{}]
    command = [sys.executable, "-c", CODE, *argv, "--run_dir", str(run_dir)]
    made = [
        subprocess.Popen(
            command,
            cwd=run_dir.parent,
            env={**os.environ, **own, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for own in environments
    ]
    said = [process.communicate()[0] for process in made]
    assert not any(process.returncode for process in made)
    return [json.loads(text.splitlines()[-1]) for text in said]
