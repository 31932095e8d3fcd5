"""The hub, asked once whether it is there: its clients would try for half a minute, for every file anew."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from sae.base.errors import ConfigError

PATIENCE_S = 5.0


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Lets what the block loads from the hub come from its cache alone, at once, where the hub cannot be reached.

    What fails then becomes an OSError that says so. Nothing is asked where the clients are offline already.
    """
    from huggingface_hub import constants

    unreachable = "" if constants.HF_HUB_OFFLINE else _why_unreachable(constants.ENDPOINT)
    if not unreachable:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except ConfigError:  # of what was cached
        raise
    except Exception as error:
        raise OSError(f"{constants.ENDPOINT} cannot be reached ({unreachable}), and no whole copy is cached") from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _why_unreachable(endpoint: str) -> str:
    try:
        _reach(endpoint)
    except Exception as error:  # of the client, which is another package in its next version, or of a proxy
        return " ".join(str(error).split())[:100] or type(error).__name__
    return ""


@lru_cache
def _reach(endpoint: str) -> None:
    """Returns once anything answers at an address; that it did is kept, that it did not is not."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PATIENCE_S)
    except Exception as error:
        if type(error).__name__ != "RemoteProtocolError":  # somebody is there, who does not know the question
            raise
