"""What `SparseCoder.from_pretrained`, `save_pretrained` and `push_to_hub` do (`sae/coder/published.py`)."""

from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.loading import card, hub


def from_pretrained(
    name: str | Path,
    subfolder: str = "",
    *,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    **options: Any,
) -> SparseCoder:
    """Returns the coder at an address, or below it."""
    address = f"{str(name).rstrip('/')}/{subfolder.strip('/')}" if subfolder else name
    precision = _one("dtype", dtype, "torch_dtype", torch_dtype)
    said = {"device": device, "device_map": device_map, "dtype": precision}
    return hub.load(address, **{key: value for key, value in said.items() if value is not None}, **options)


def save_pretrained(
    coder: SparseCoder, folder: str | Path, push: bool = False, repo_id: str | None = None, **options: Any
) -> None:
    """Writes a coder to a folder, and to the hub if that is said."""
    for name, value in {"repo_id": repo_id, **options}.items():
        if value is not None and not push:
            raise ConfigError(f"{name}: {value!r} is of push_to_hub, which is off; push_to_hub=True puts it on the hub")
    if Path(folder).expanduser().is_file():
        raise ConfigError(f"folder: {folder} is a file; name a folder")
    hub.save(coder, folder)
    if push:
        coder.push_to_hub(repo_id or Path(folder).expanduser().resolve().name, **options)


def push_to_hub(coder: SparseCoder, repo_id: str, **options: Any) -> str:
    """Puts a coder into a repository on the hub."""
    return card.push({"": coder}, repo_id if "/" in repo_id else _owned(repo_id, options.get("token")), **options)


def _owned(name: str, token: str | bool | None) -> str:
    """Returns NAME as OWNER/NAME, of the owner of the token."""
    from huggingface_hub import HfApi

    try:
        return f"{HfApi(token=token).whoami()['name']}/{name}"
    except Exception as error:  # of the client or of the network
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"repo_id: {name!r} has no owner, and whose token this is cannot be asked ({why})") from error


def _one(name: str, value: Any, other: str, same: Any) -> Any:
    if value is not None and same is not None and str(value).removeprefix("torch.") != str(same).removeprefix("torch."):
        raise ConfigError(f"{name}: {value} and {other}: {same} are two answers to one question; give one")
    return same if value is None else value
