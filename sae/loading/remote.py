"""A repository on the Hugging Face hub as files: listed once, each fetched when it is opened, or taken from the cache.

All files come from the one commit that was current when they were listed, and the listing is kept in the cache beside
them: without a network the same files are known, and what was never fetched is named rather than overlooked. What is
fetched is compared with the hub's digest (`untrusted/digests.py`), small files here and weights where they are read.
"""

import logging
import re
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sae.base.errors import ConfigError, DataError, nearest
from sae.base.files import atomic_write, read_json, safe_join, write_json
from sae.base.network import hub_or_cache
from sae.base.paths import near
from sae.loading import releases
from sae.untrusted import digests, weights
from sae.untrusted.ranged import TIMEOUT_S, Header, npz_header
from sae.untrusted.weights import Shapes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
LISTINGS = "sae-interp"  # folder beside the hub's own in a cached repository
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class HubFiles:
    """The files of one commit of a repository; `revision` is that commit once it is known.

    `wanted` is the part of it that is asked for, which errors name. `token` (False: none) is that of the environment or
    of `hf auth login` by default; with `local_files_only` the hub is not asked.
    """

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        wanted: str = "",
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        from huggingface_hub import constants

        self.label, self.identity, self.asked_revision = f"hf://{repo}", repo, revision
        self.wanted = f"{repo}/{wanted}".rstrip("/")
        self.cache_dir = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.folder = self.cache_dir / f"models--{repo.replace('/', '--')}"
        self.token, self.reachable = token, not local_files_only
        self._headers: dict[str, Header] = {}

    @cached_property
    def _listing(self) -> tuple[str, list[str]]:
        """Commit and names: from the hub or, where it cannot be asked, as they were when it was asked last."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        kept = self._kept(self.asked_revision) if COMMIT.fullmatch(self.asked_revision or "") else None
        if kept is not None:  # what a commit holds does not change
            return kept
        if not self.reachable:
            return self._cached(OfflineModeIsEnabled("local_files_only"))
        try:
            info = self._api.model_info(self.identity, revision=self.asked_revision, timeout=TIMEOUT_S)
        except Exception as error:  # the client's own, or of whatever it reaches the network with
            return self._cached(error)
        commit, names = str(info.sha), sorted(item.rfilename for item in info.siblings or [])
        if not COMMIT.fullmatch(commit):
            raise DataError(f"{self.label}: its commit is {commit!r}, expected 40 hexadecimal digits")
        for name in names:
            self._check(name)
        with suppress(OSError):  # a cache that cannot be written to
            write_json(self.folder / LISTINGS / f"{commit}.json", names)
            if self.asked_revision != commit:
                atomic_write(self._ref(), commit)
        return commit, names

    @property
    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(token=self.token)

    def _cached(self, error: Exception) -> tuple[str, list[str]]:
        """Returns what is known of the cached copy; ConfigError if there is none, saying how to get it."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        commit = self._cached_commit()
        if commit is None:
            raise self._unreachable(error) from error
        self.reachable = False
        if not isinstance(error, OfflineModeIsEnabled):
            log.warning("%s cannot be asked (%s): taken from the cache, commit %s", self.label, _reason(error), commit)
        kept = self._kept(commit)
        if kept is not None:
            return kept
        self.label = f"{self.label} (cached files only)"
        root = self.folder / "snapshots" / commit
        return commit, sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    def _cached_commit(self) -> str | None:
        """Returns the commit that was asked for, as far as the cache knows it."""
        if self._ref().is_file():
            return self._ref().read_text(encoding="utf-8").strip()
        found = [
            path.name for path in self.folder.glob("snapshots/*") if path.name.startswith(self.asked_revision or "")
        ]
        if len(found) > 1:
            raise ConfigError(f"revision: {self.label} is cached at {', '.join(found)}; say which")
        return found[0] if found else None

    def _ref(self) -> Path:
        return safe_join(self.folder / "refs", self.asked_revision or "main")

    def _kept(self, commit: str | None) -> tuple[str, list[str]] | None:
        path = self.folder / LISTINGS / f"{commit}.json"
        return (str(commit), list(read_json(path))) if path.is_file() else None

    def _unreachable(self, error: Exception) -> ConfigError:
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return ConfigError(_gated(self.identity))
        if isinstance(error, errors.RevisionNotFoundError):
            return ConfigError(f"revision: {self.asked_revision!r} is no branch, tag or commit of {self.identity}")
        if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
            close = near(self.identity) or nearest(self.identity, releases.repositories())
            close = close or nearest(self.identity.partition("/")[0], releases.names())
            return ConfigError(f"path: no folder and no hub repository {self.identity!r} (or it is private).{close}")
        return ConfigError(
            f"path: the hub cannot be asked for {self.identity} ({_reason(error)}), no copy is cached and no folder "
            f"is called so.{near(self.wanted)} A run is there once it is trained (sae-train); of a coder on the hub, "
            f"where there is a network, run `sae-load fetch {self.wanted}`, and copy {self.folder.name} to "
            f"{self.cache_dir}"
        )

    def _check(self, name: str) -> None:
        if not name or "\\" in name or "\0" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise DataError(f"{name!r} is refused: it points outside of {self.label}")

    @property
    def revision(self) -> str | None:
        """Returns the commit."""
        return self._listing[0]

    def names(self) -> list[str]:
        """Returns the names of all files of the repository; of the cached ones, where nothing else is known."""
        return self._listing[1]

    def has(self, name: str) -> bool:
        """Returns whether the repository has a file of that name."""
        return name in self._listing[1]

    @property
    def snapshot(self) -> Path:
        """Returns the folder of the cache that holds the commit's files."""
        return self.folder / "snapshots" / str(self.revision)

    def is_cached(self, name: str) -> bool:
        """Returns whether a file is on this disk."""
        return (self.snapshot / name).is_file()

    def path(self, name: str) -> Path:
        """Returns the file, fetched unless it is cached; DataError says how to get it by hand, or what is damaged."""
        self._check(name)
        if not self.has(name):
            raise DataError(f"{self.label} has no file {name!r}.{nearest(name, self.names())}")
        path = self._download(name, local_files_only=not self.reachable)
        if not any(path.resolve().is_relative_to(root.resolve()) for root in (self.folder, self.cache_dir)):
            raise DataError(f"{path} is refused: it points outside of {self.cache_dir}")
        if not weights.is_weights(name):
            digests.verify(path)
        return path

    def _unfetched(self, name: str, error: Exception) -> Exception:
        from huggingface_hub.errors import GatedRepoError

        if isinstance(error, GatedRepoError):
            return ConfigError(_gated(self.identity))
        others = [path.parts[-1 - len(PurePosixPath(name).parts)] for path in self.folder.glob(f"snapshots/*/{name}")]
        older = f"; of revision {' or '.join(others)} it is cached" if others else ""
        return DataError(
            f"{self.label}/{name} is not cached and cannot be fetched ({_reason(error)}){older}; where there is a "
            f"network, run `hf download {self.identity} {name} --revision {self.revision}`, and copy "
            f"{self.folder.name} to {self.cache_dir}"
        )

    def shapes(self, name: str) -> Shapes:
        """Returns the shapes of a weight file's tensors; of safetensors and npz, the headers alone are fetched."""
        found = self.header(name)
        return {tensor: shape for tensor, (_, shape) in found.items()} if found else weights.shapes(self.path(name))

    def header(self, name: str) -> Header | None:
        """Returns {tensor: (dtype, shape)} of a file on the hub; None if it is cached, or has no header."""
        from huggingface_hub import hf_hub_url

        if self.is_cached(name) or not name.endswith((*weights.SAFETENSORS, *weights.NPZ)):
            return None
        self._check(name)
        if not self.reachable:
            raise self._unfetched(name, OSError("the hub cannot be asked"))
        try:
            if name in self._headers:
                return self._headers[name]
            if name.endswith(weights.NPZ):
                url = hf_hub_url(self.identity, name, revision=self.revision)
                found = npz_header(url, self.sizes([name])[name], self.token)
            else:
                about = self._api.parse_safetensors_file_metadata(self.identity, name, revision=self.revision).tensors
                found = {t: (DTYPES.get(i.dtype, i.dtype.lower()), tuple(i.shape)) for t, i in about.items()}
        except DataError:
            raise
        except Exception as error:
            raise self._unfetched(name, error) from error
        return self._headers.setdefault(name, found)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Returns the sizes of some files in bytes; of cached ones only, where the hub cannot be asked."""
        names = list(names)
        found = {name: (self.snapshot / name).stat().st_size for name in names if self.is_cached(name)}
        left = [name for name in names if name not in found]
        for part in (left[i : i + 500] for i in range(0, len(left), 500)) if self.reachable else ():
            try:
                infos = self._api.get_paths_info(self.identity, part, revision=self.revision)
            except Exception as error:
                raise self._unfetched(part[0], error) from error
            found |= {info.path: int(getattr(info, "size", 0)) for info in infos}
        return found

    def copy_into(self, name: str, folder: Path) -> Path:
        """Returns a file put into a folder, with its digest beside it; DataError as `path`."""
        self._check(name)
        return self._download(name, local_dir=folder)

    def _download(self, name: str, **how: Any) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            where = {"revision": self.revision, "cache_dir": self.cache_dir, "token": self.token}
            with hub_or_cache() if self.reachable else nullcontext():
                found = hf_hub_download(self.identity, name, **where, **how)
            return Path(found)
        except Exception as error:  # of the client, the network or the disk: all mean that the file is not here
            raise self._unfetched(name, error) from error


def _gated(repo: str) -> str:
    return (
        f"path: {repo} is gated: accept its terms at https://huggingface.co/{repo} and log in (`hf auth login`, or the "
        "variable HF_TOKEN)"
    )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).partition(" For more information")[0]
    return text[:200] or type(error).__name__
