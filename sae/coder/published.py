"""Coders by name as users of Hugging Face's libraries load, save and publish models.

What is declared here is done by `sae/loading/published.py`, which the package supplies.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae.base.lazy import supplied

if TYPE_CHECKING:
    from typing import Self

DOING = "coders by name"


class Published:
    """The three methods that a coder has beside `sae.load` and `sae.save`, with the arguments of `transformers`."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        subfolder: str = "",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: str | torch.device | None = None,
        device_map: Any = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        **hints: Any,
    ) -> "Self":
        """Returns the coder of a folder, a hub id or a released name, or in a folder below it; as `sae.load` does.

        `token` is of the hub (False: none); `local_files_only` asks it for nothing. `device_map` is a device, "auto",
        "disk", several devices, or their shares; `dtype` a torch.dtype or its name, "auto" the stored one, float32 by
        default. `hints` are those of `sae.load`, and `lazy`. ConfigError and DataError as there.
        """
        options = {"device": device, "device_map": device_map, "dtype": dtype, "torch_dtype": torch_dtype, **hints}
        where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return supplied(DOING).from_pretrained(name, subfolder, **where, **options)

    def save_pretrained(
        self, folder: str | Path, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> None:
        """Writes the coder to a folder that `from_pretrained` reads back bit for bit, as `sae.save` does.

        With `push_to_hub`, also to the repository `repo_id` (by default called like the folder), with the options of
        `push_to_hub`.
        """
        supplied(DOING).save_pretrained(self, folder, push_to_hub, repo_id, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        format: str = "native",
    ) -> str:
        """Puts the coder with a model card into a repository, made if need be; returns the address of the commit.

        `repo_id` is OWNER/NAME, or NAME for the owner of the token; `revision` a branch, made if need be; `format` one
        that is written, such as "saelens". ConfigError without a token, if the hub refuses, or if the format cannot say
        what the coder is.
        """
        said = {"private": private, "token": token, "commit_message": commit_message, "revision": revision}
        return supplied(DOING).push_to_hub(self, repo_id, **said, create_pr=create_pr, format=format)
