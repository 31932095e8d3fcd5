"""Where threads of all ranks leave notes for each other, beside what the ranks themselves do at the same time."""

import json
from typing import Any

import torch.distributed as dist

from sae.parallel import ranks
from sae.parallel.agreement import PeerError
from sae.parallel.meeting import wait_for


class Desk:
    """Notes about one matter. All ranks make one at the same point; then a thread of each may use it."""

    def __init__(self) -> None:
        group = ranks.group()
        self.rank, self.peers = ranks.rank(), group.peers if group else []
        self.matter = f"desk{group.next_key()}" if group else ""
        self.failures = group.failures if group else []
        self.heard: BaseException | None = None
        """What a rank has left by `fail`, as it is raised here."""
        self.store = group.store.clone() if group else None  # pyright: ignore[reportAttributeAccessIssue]

    def put(self, name: str, value: Any) -> None:
        """Leaves a note, plain JSON values."""
        if self.store is not None:
            self.store.set(f"{self.matter}/{name}", json.dumps(value))

    def get(self, name: str) -> Any:
        """Returns the value of a note, once it is there; raises what a rank has left by `fail`."""
        return self._read([name])[0]

    def gathered(self, name: str, value: Any) -> list[Any]:
        """Returns the values that all ranks have of a note on rank 0, and [] on the others; raises as `get`."""
        if self.store is None:
            return [value]
        self.put(f"{name}/of/{self.rank}", value)
        return [] if self.rank else self._read([f"{name}/of/{rank}" for rank in range(len(self.peers))])

    def fail(self, error: BaseException) -> BaseException:
        """Leaves an error, which ends the waiting of all, and returns what to raise: the first that any rank has left.

        Of several ranks it is named.
        """
        if self.store is None or error is self.heard:
            return error
        number = error.errno if isinstance(error, OSError) else None
        text = (error.strerror if isinstance(error, OSError) else "") or str(error) or repr(error)
        try:
            self.store.compare_set(f"{self.matter}/failed", "", json.dumps([self.rank, number, text]))
            return self._failure()
        except dist.DistError:  # the others are gone
            return error

    def _failure(self) -> BaseException:
        """Rank 0 tells what it was; the others, that there was something."""
        assert self.store is not None
        rank, number, text = json.loads(self.store.get(f"{self.matter}/failed"))
        text = f"{self.peers[rank]}: {text}"
        named = RuntimeError(text) if number is None else OSError(number, text)
        self.heard = PeerError(1) if self.rank else named
        return self.heard

    def _read(self, names: list[str]) -> list[Any]:
        assert self.store is not None
        store, keys, failed = self.store, [f"{self.matter}/{name}" for name in names], f"{self.matter}/failed"
        ends = [failed, *self.failures]  # the latter where all were to make a desk
        if not wait_for(store, keys, other=lambda: any(store.check([key]) for key in ends)) and not store.check(keys):
            raise self._failure() if store.check([failed]) else PeerError(1)
        return [json.loads(value) for value in store.multi_get(keys)]
