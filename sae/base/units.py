"""Amounts as people say them."""


def duration(seconds: float) -> str:
    """Returns a duration: "45 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def per_time(rate: float, unit: str) -> str:
    """Returns a rate per second in the largest of s, min and h that gives one unit at least: "5.2 latents/min"."""
    name, seconds = next((span for span in (("s", 1), ("min", 60)) if rate * span[1] >= 1), ("h", 3600))
    count = rate * seconds
    return f"{count:,.0f} {unit}/{name}" if count >= 100 else f"{count:.3g} {unit}/{name}"


def data_size(count: float) -> str:
    """Returns a number of bytes: "500 B", "1.25 kB", "12.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
