"""A repository on the Hugging Face hub as files: listed once, each fetched when it is opened, or taken from the cache."""

from functools import cached_property
from pathlib import Path
from typing import Any

from sae import weights
from sae.errors import ConfigError, DataError, nearest
from sae.weights import Shapes


class HubFiles:
    """The files of one commit of a repository; `revision` is that commit once it is known."""

    def __init__(self, repo: str, revision: str | None = None, cache_dir: str | Path | None = None) -> None:
        self.label, self.identity, self.asked, self.cache_dir = f"hf://{repo}", repo, revision, cache_dir

    @cached_property
    def _listing(self) -> tuple[str | None, list[str]]:
        """Commit and names: from the hub or, where it cannot be reached, of what is cached."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            info = HfApi().model_info(self.identity, revision=self.asked)
            return info.sha, sorted(item.rfilename for item in info.siblings or [])
        except GatedRepoError as error:
            raise ConfigError(
                f"path: {self.identity} is gated: accept its terms at https://huggingface.co/{self.identity} and log in "
                "(`hf auth login`, or the variable HF_TOKEN)"
            ) from error
        except RevisionNotFoundError as error:
            raise ConfigError(f"revision: {self.asked!r} is no branch, tag or commit of {self.identity}") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            from sae import releases

            close = nearest(self.identity, [*releases.repositories(), *releases.names()])
            raise ConfigError(
                f"path: no folder and no hub repository {self.identity!r} (or it is private).{close}"
            ) from error
        except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
            cached = self._cached()
            if cached is None:
                raise ConfigError(
                    f"path: the hub cannot be asked for {self.identity} ({_reason(error)}) and no copy is cached; where "
                    f"there is a network, run `hf download {self.identity}` or `sae-load fetch {self.identity}`, then "
                    "copy the cache folder here or pass the downloaded folder"
                ) from error
            return cached

    def _cached(self) -> tuple[str, list[str]] | None:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        try:
            repos = scan_cache_dir(self.cache_dir).repos
        except CacheNotFound:
            return None
        for repo in repos:
            if repo.repo_id == self.identity and repo.repo_type == "model":
                wanted = self.asked or "main"
                for found in sorted(repo.revisions, key=lambda r: -r.last_modified):
                    if self.asked is None or wanted in found.refs or found.commit_hash.startswith(wanted):
                        root = Path(found.snapshot_path)
                        return found.commit_hash, sorted(f.file_path.relative_to(root).as_posix() for f in found.files)
        return None

    @property
    def revision(self) -> str | None:
        """Returns the commit."""
        return self._listing[0]

    def names(self) -> list[str]:
        """Returns the names of all files of the repository or, offline, of the cached ones."""
        return self._listing[1]

    def has(self, name: str) -> bool:
        """Returns whether the repository has a file of that name."""
        return name in self._listing[1]

    def path(self, name: str) -> Path:
        """Returns the file, fetched unless it is cached; DataError says how to get it by hand."""
        from huggingface_hub import hf_hub_download

        if name.startswith(("/", "../")) or "/../" in name or "\\" in name:
            raise DataError(f"{name!r} is refused: it points outside of {self.label}")
        options: dict[str, Any] = {"revision": self.revision, "cache_dir": self.cache_dir}
        try:
            return Path(hf_hub_download(self.identity, name, **options))
        except Exception as error:  # of the client, the network or the disk: all mean that the file is not here
            raise DataError(
                f"{self.label}/{name} cannot be fetched ({_reason(error)}) and is not cached; where there is a network, "
                f"run `hf download {self.identity} {name} --revision {self.revision}`"
            ) from error

    def shapes(self, name: str) -> Shapes:
        """Returns the shapes of a weight file's tensors; of safetensors, the header alone is fetched."""
        from huggingface_hub import HfApi, try_to_load_from_cache

        cached = try_to_load_from_cache(self.identity, name, self.cache_dir, self.revision)
        if not isinstance(cached, str) and name.endswith(weights.SAFETENSORS):
            try:
                found = HfApi().parse_safetensors_file_metadata(self.identity, name, revision=self.revision)
                return {tensor: tuple(info.shape) for tensor, info in found.tensors.items()}
            except Exception as error:
                raise DataError(f"{self.label}/{name}: its header cannot be fetched: {_reason(error)}") from error
        return weights.shapes(self.path(name))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
