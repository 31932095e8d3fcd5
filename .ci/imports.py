"""Ends red unless `import sae, interp` takes 0.3 s at most, in the best of five processes, and imports no torch."""

import subprocess
import sys
import time

AT_MOST_S = 0.3
times = []
for _ in range(5):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import sys, sae, interp; assert 'torch' not in sys.modules"], check=True)
    times.append(time.perf_counter() - start)
print(f"import sae, interp: {min(times):.3f} s, the interpreter's start included")
sys.exit(min(times) > AT_MOST_S)
