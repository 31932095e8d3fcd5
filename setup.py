"""Which packages an installation has: commands and recipes stand under `sae_interp`; `cli` is anyone's name."""

from setuptools import find_namespace_packages, setup


def found(*names: str) -> list[str]:
    """Returns the packages of these folders, those that hold data alone too."""
    return find_namespace_packages(include=[*names, *(f"{name}.*" for name in names)], exclude=["*__pycache__*"])


ours = {f"sae_interp.{name}": name.replace(".", "/") for name in found("cli", "configs")}
setup(packages=[*found("sae", "interp"), *ours], package_dir=ours)
