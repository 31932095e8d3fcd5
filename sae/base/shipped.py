"""The configs that this package ships, by name, wherever it is installed."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def configs(kind: str) -> dict[str, Path]:
    """Returns the shipped configs of a kind by name: families, models, explain."""
    installed = ROOT / "sae_interp" / "configs"  # in an installation; in a checkout they lie beside this package
    folder = (installed if installed.is_dir() else ROOT / "configs") / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
