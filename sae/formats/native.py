"""This toolkit's own format: a folder with `cfg.json` (the spec) and `sae.safetensors` (tensors as in spec.py).

Version 2 adds the digest of the weights to `cfg.json`; version 1 has none. Newer versions are refused.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sae.base.errors import DataError
from sae.base.files import read_json, save_tensors, sha256_file, write_json
from sae.base.tensorfile import Rows
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.parallel import agreement, ranks
from sae.parallel.mesh import Mesh
from sae.parallel.shared_file import own_rows, save_rows
from sae.untrusted.places import Place
from sae.untrusted.tensors import is_finite

CONFIG, FILE = "cfg.json", "sae.safetensors"
WEIGHTS = r"sae\.safetensors"


def detect(place: Place) -> bool:
    """Returns whether the config says a version of ours."""
    return "format_version" in place.config(CONFIG)


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors); DataError names a file or tensor that is damaged."""
    config = dict(place.config(CONFIG))
    digest = config.pop("sha256", None)
    try:
        spec = CoderSpec.from_json(config)
    except DataError as error:
        raise DataError(f"{place.path(CONFIG)}: {error}") from error
    if digest is not None and not place.lazy and digest != sha256_file(place.path(FILE)):
        raise DataError(f"{place} is damaged: its sha256 differs from the one in {CONFIG}")
    return spec, dict(place.tensors())


def write(folder: Path, coder: SparseCoder) -> None:
    """Writes a coder; weights first, so that a folder with a config is whole."""
    tensors = coder.state_dict()
    check_weights(tensors, folder)
    folder.mkdir(parents=True, exist_ok=True)
    told = save_tensors(folder / FILE, tensors)
    describe(folder, coder.spec, told["sha256"])


def write_together(coders: Mapping[Path, SparseCoder], mesh: Mesh) -> None:
    """Writes the same files of coders by folder, or of what this rank has of them, each its rows; all ranks call it."""
    if ranks.world_size() == 1:
        for folder, coder in coders.items():
            write(folder, coder)
        return
    rows: dict[Path, dict[str, Rows]] = {}
    for folder, coder in coders.items():
        held = coder.shard.rows if coder.shard else lambda name: None
        rows[folder] = {name: own_rows(x, mesh, held(name)) for name, x in coder.state_dict().items()}
    with agreement.together():
        for folder, of_coder in rows.items():
            check_weights({name: row.tensor for name, row in of_coder.items()}, folder)
            folder.mkdir(parents=True, exist_ok=True)
    first = not mesh.team.rank
    save_rows({folder / FILE: of_coder for folder, of_coder in rows.items()}, first)
    with agreement.together():
        for folder, coder in coders.items() if first else ():
            describe(folder, coder.whole, sha256_file(folder / FILE))


def check_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises DataError naming a tensor that is not finite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise DataError(f"{name}: holds NaN or Inf; not saved to {folder}")


def describe(folder: Path, spec: CoderSpec, digest: str | None = None) -> None:
    """Writes the config of a coder whose weights are there, of this digest; none: of that in the config so far."""
    digest = digest or read_json(folder / CONFIG)["sha256"]
    write_json(folder / CONFIG, {**spec.to_json(), "sha256": digest})
