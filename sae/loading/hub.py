"""Coders by name: load one, or all of a repository, from wherever they were released; save one to a folder.

An address is a folder or weight file, "owner/repo" on the hub with a path below it, or a name by which a released coder
is known: SAELens' "release/sae_id" and Neuronpedia's "model/source" (`sae/loading/releases.py`).
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from sae import formats
from sae.base.arguments import wrong
from sae.base.errors import ConfigError, DataError, nearest
from sae.base.paths import can_only_be_local, near
from sae.coder.arguments import CoderLike, as_coder
from sae.coder.coder import SparseCoder
from sae.coder.parts import cut, in_parts
from sae.coder.spec import RELEASED, CoderSpec
from sae.formats import native
from sae.lm.devices import resolve_device
from sae.loading import releases
from sae.loading.hints import REFUSED_WHERE_UNUSED, Hints, checked_hints, known_release, with_known_hints
from sae.loading.placing import AUTO, placing
from sae.loading.remote import HubFiles
from sae.parallel.mesh import Mesh
from sae.untrusted.files import Files, LocalFiles
from sae.untrusted.places import Place
from sae.untrusted.tensors import check_finite

MOST_OPENED = 16  # files beside each other that are looked into to tell which of them is a coder
PRECISIONS = ("float32", "float64", "bfloat16", "float16")
Address = str | Path | tuple[str, str]


def load(
    path: Address,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    lazy: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
    device_map: Any = None,
    **hints: Any,
) -> SparseCoder:
    """Returns the one coder at an address, without gradients.

    The format is found by file names, tensor names and shapes (`sae/formats/`). `device` "auto" is a GPU where there is
    one; `dtype` a torch.dtype or its name, "auto" the precision of the stored decoder; thresholds stay float32. `lazy`
    maps the tensors into memory, in the precision they are stored in; it reads what is looked at. `device_map` lets
    latents lie on several devices or on disk (`sae/loading/placing.py`). `revision`,
    `cache_dir`, `token` and `local_files_only` are those of huggingface_hub. `hints` say what the files do not
    (`sae.loading.hints.Hints`: model, site, pre_bias, scale, format).
    `spec.training["released"]` says where it came from.

    Raises ConfigError if there is no coder or several (naming them), a format is unknown or ambiguous, or a hint is
    needed; DataError naming the file or tensor that is missing, damaged, of the wrong shape, unknown, or not finite.
    """
    place = find_place(path, "", revision, cache_dir, token, local_files_only, **hints)
    return read_coder(replace(place, lazy=lazy), device, dtype, device_map)


def find_place(
    path: Address,
    name: str = "",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **hints: Any,
) -> Place:
    """Returns the place of the one coder at an address, or of the one called `name` among several there.

    A name is that of `load_all`, or its last part, or what follows "coders/" in a run's folder.
    """
    files, below = locate(path, revision, cache_dir, token, local_files_only)
    if not name:
        return _single_place(files, below, checked_hints(hints))
    found = places_below(files, below, checked_hints(hints))
    for fitting in ([name], [f"coders/{name}"], [full for full in found if full.endswith(f"/{name}")]):
        if len(fitting) == 1 and fitting[0] in found:
            return found[fitting[0]]
    raise ConfigError(f"name: no {name!r} in {path}.{nearest(name, found)} It has: {', '.join(found) or 'no coder'}")


def load_all(
    repo: Address,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    lazy: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
    device_map: Any = None,
    **hints: Any,
) -> dict[str, SparseCoder]:
    """Returns every coder at or below an address by its name there; arguments and errors as those of `load`."""
    files, below = locate(repo, revision, cache_dir, token, local_files_only)
    found = places_below(files, below, checked_hints(hints))
    said = [name for name in ("site", "scale") if hints.get(name) is not None]
    if said and len(found) > 1:
        raise ConfigError(f"{said[0]}: there are {len(found)} coders, which it cannot fit alike; load them one by one")
    if not found:
        raise ConfigError(f"path: {why_no_coder(files, below)}")
    return {name: read_coder(replace(place, lazy=lazy), device, dtype, device_map) for name, place in found.items()}


def save(coder: CoderLike, folder: str | Path) -> None:
    """Writes a coder to a folder that `load` reads back bit for bit."""
    if not isinstance(folder, str | os.PathLike):
        raise wrong("folder", folder, "the path of a folder")
    native.write(Path(folder).expanduser(), as_coder(coder))


def save_together(coders: Mapping[Path, SparseCoder], mesh: Mesh) -> None:
    """Writes the same files of coders by folder, or of what this rank has of them, so that none needs the whole.

    Each rank writes its rows of the weights; all call it, also those that have none of any.
    """
    native.write_together(coders, mesh)


def describe(folder: Path, spec: CoderSpec) -> None:
    """Writes anew what a folder says of the coder whose weights are in it."""
    native.describe(folder, spec)


def locate(
    path: Address,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> tuple[Files, str]:
    """Returns (files, name below them) of an address; nothing is fetched but the list of a repository's files.

    Raises ConfigError if there is no such folder, repository or release, naming the nearest.
    """
    parts = path if isinstance(path, tuple) else (path,)
    if not parts or not all(isinstance(part, str | os.PathLike) for part in parts):
        raise wrong("path", path, "a folder or file, a hub id, or a released name")
    text = "/".join(str(part) for part in parts)
    local = Path(text).expanduser()
    if not isinstance(path, tuple) and local.exists():
        return (LocalFiles(local), "") if local.is_dir() else (LocalFiles(local.parent), local.name)
    release = releases.find_release(text)
    if release is not None:
        return HubFiles(release.repo, revision, cache_dir, release.path, token, local_files_only), release.path
    owner, name, *below = *text.removeprefix("hf://").strip("/").split("/"), ""
    wanted = "/".join(below).strip("/")
    files = HubFiles(f"{owner}/{name}", revision, cache_dir, wanted, token, local_files_only)
    if not name or (can_only_be_local(text) and not files.folder.is_dir()):
        close = near(text, folders=True) or nearest(text, releases.names())
        hint = " A run is there once it is trained: train first (sae-train)." if can_only_be_local(text) else ""
        raise ConfigError(f"path: no such folder: {text}.{close}{hint}")
    return files, wanted


def places_below(files: Files, below: str = "", hints: Hints | None = None) -> dict[str, Place]:
    """Returns the coders at or below a name, by their own names there: folders or, where those hold several, files."""
    found = [place for place in formats.candidates(files, below, hints) if formats.formats_of(place)]
    alone = {place.folder for place in found if sum(other.folder == place.folder for other in found) == 1}
    start = f"{below}/" if below else ""
    own = PurePosixPath(below or files.identity).name  # of the coder that lies in the folder itself
    names = [place.folder if place.folder in alone else place.weights for place in found]
    return {own if n in ("", below) else n.removeprefix(start): p for n, p in zip(names, found, strict=True)}


def read_coder(
    place: Place,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    device_map: Any = None,
) -> SparseCoder:
    """Returns the coder at a place."""
    if device_map is not None:
        return _placed(place, device, dtype, device_map)
    where, precision = resolve_device(str(device or "cpu"), "device"), _precision(dtype)
    if place.lazy and (where.type, precision) != ("cpu", torch.float32):
        raise ConfigError(
            "lazy: mapped weights stay on the CPU in the precision they are stored in; leave out the rest"
        )
    typed = {name for name in REFUSED_WHERE_UNUSED if getattr(place.hints, name) is not None}
    known = known_release(place)
    place = with_known_hints(place, known)
    name, spec, tensors = formats.read(place)
    for unused in sorted(typed - place.hints_read):
        raise ConfigError(f"{unused}: {place} is complete without it; leave it out")
    if known is not None and known.l0 is not None:
        spec = spec.with_(metrics={"advertised": {"l0": known.l0}, **spec.metrics})
    source = {"format": name, "file": place.weights, "from": place.files.identity, "revision": place.files.revision}
    if name != formats.NATIVE:
        spec = spec.with_(training={**spec.training, RELEASED: source})
    coder = coder_from_tensors(spec, tensors, str(place))
    if place.lazy:
        return coder.to_dtype(None)
    coder = coder.to(where).to_dtype(precision or coder.W_dec.dtype)
    check_finite(coder.state_dict(), place)  # in the precision asked for: float16 ends at 65,504
    return coder


def _placed(place: Place, device: str | torch.device | None, dtype: str | torch.dtype, device_map: Any) -> SparseCoder:
    """Returns the coder at a place with its latents where a map says."""
    if place.lazy:
        raise ConfigError("lazy: device_map says where weights lie; leave one of them out")
    precision, where = _precision(dtype), placing(device_map, device)
    if where.whole is None or device_map == AUTO:
        mapped = read_coder(replace(place, lazy=True, opened=[]))
        precision = precision or mapped.W_dec.dtype
        size = sum(tensor.numel() for tensor in mapped.state_dict().values()) * precision.itemsize
        where = placing(device_map, device, size)
        if where.whole is None:
            coder = in_parts(mapped, cut(mapped.spec, where.shares), where.device, precision)
            for piece in coder.held:
                check_finite({**piece.encoders, "W_dec": piece.decoder}, place)
            return coder
    return read_coder(place, where.whole, dtype)


def _precision(dtype: str | torch.dtype) -> torch.dtype | None:
    """Returns the floating-point type that is meant; None of "auto"."""
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return None
    if name not in PRECISIONS:
        raise ConfigError(f"dtype: {name} is not one of auto, {', '.join(PRECISIONS)}.{nearest(name, PRECISIONS)}")
    return getattr(torch, name)


def coder_from_tensors(spec: CoderSpec, tensors: dict[str, Tensor], source: str) -> SparseCoder:
    """Returns the coder of a spec with these tensors; DataError names one that does not belong.

    Nothing is allocated before the shapes are known to fit: a config may declare any size.
    """
    with torch.device("meta"):
        coder = SparseCoder(spec, "meta")
    expected = {name: tuple(parameter.shape) for name, parameter in coder.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise DataError(f"{source}: tensor {name} is missing.{nearest(name, tensors)}")
        if tuple(tensors[name].shape) != shape:
            raise DataError(f"{source}: tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
        if not tensors[name].is_floating_point():
            raise DataError(f"{source}: tensor {name} holds {tensors[name].dtype}, expected floating-point numbers")
    for name in tensors:
        if name not in expected:
            raise DataError(f"{source}: tensor {name} is not part of this coder.{nearest(name, expected)}")
    coder.load_state_dict(dict(tensors), assign=True)
    return coder.requires_grad_(False).eval()


def _single_place(files: Files, below: str, hints: Hints) -> Place:
    named = formats.candidates(files, below, hints)
    own = [place for place in named if place.weights == below] or [p for p in named if p.folder == below] or named
    if len(own) > 1 and len({place.folder for place in own}) == 1 and len(own) <= MOST_OPENED:
        own = [place for place in own if formats.formats_of(place)] or own
    if len(own) == 1:
        return own[0]
    if not own:
        raise ConfigError(f"path: {why_no_coder(files, below)}")
    listed = ", ".join(place.weights for place in own[:6]) + (", ..." if len(own) > 6 else "")
    raise ConfigError(f"path: {files.label}/{below} is not one coder; it holds {len(own)}: {listed}")


def why_no_coder(files: Files, below: str) -> str:
    """Returns why there is no coder at or below a name: what is there instead, or what name is near."""
    names = files.names()
    there = [name for name in names if name == below or name.startswith(f"{below}/")] if below else names
    if below and not there:
        return f"{files.label} has no {below!r}.{nearest(below, {n.rpartition('/')[0] for n in names} | set(names))}"
    if isinstance(files, LocalFiles) and not below and {"config.yaml", "env.json"} <= set(names):
        if any(name.startswith("shards/") for name in names):
            return f"{files.label} is an explained run, it holds no coder; name the folder of the coder"
        return f"{files.label} has trained no coder to its end yet; go on with sae-train --resume {files.label}"
    return f"{files.label}/{below} holds no coder in a known format; its files are {', '.join(there[:6]) or 'none'}"
