"""Callbacks: who hears of a run while it trains, and how the run is kept from whatever they do."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sae.base.arguments import wrong
from sae.base.errors import nearest
from sae.coder.coder import SparseCoder


def _put_device(device: torch.device) -> None:
    """Makes a device the default one; the CPU by none, as torch asks a default device at every call."""
    torch.set_default_device(None if device.type == "cpu" else device)


KEPT: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _put_device),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (os.getcwd, os.chdir),
)
"""What the next step depends on and anybody may set: (how it is read, how it is put back)."""


class StopTraining(Exception):
    """Raised by a callback to end the training after this step; the run is then finished as it is."""


@dataclass(frozen=True, eq=False)
class Moment:
    """What a callback is told: where the run is and what has been measured. It is a copy, to do with as one likes."""

    step: int
    """Optimizer steps taken."""
    steps: int
    """Optimizer steps planned."""
    tokens: int
    """Tokens streamed so far, those that are masked as outliers included."""
    metrics: dict[str, dict[str, Any]]
    """By coder name. on_step: the step's figures, named as in metrics.jsonl, of every coder that took it. on_evaluate
    and on_end: the held-out evaluation, as `sae.evaluate` returns it. on_save: nothing."""
    run_dir: Path
    """The run folder."""
    checkpoint: Path | None
    """The newest checkpoint, if there is one yet."""
    snapshot: Callable[[], dict[str, SparseCoder]] = field(repr=False)
    """Makes `coders`, as long as the hook runs."""

    @cached_property
    def coders(self) -> dict[str, SparseCoder]:
        """Returns copies of the coders by name, as they would be saved now; made when first asked for, and kept.

        RuntimeError once the hook has returned, when the coders have moved on.
        """
        return self.snapshot()


class Callback:
    """Hears of a run: `sae.train(config, callbacks=[...])`. Define the hooks that you want.

    Whatever a hook does to what it is given, and to torch's settings, the run is the one that it would be without. What
    it returns is ignored; it may raise `sae.StopTraining`. Of several ranks, the first one alone calls it.
    """

    def on_step(self, moment: Moment) -> None:
        """Called after every optimizer step, one that was skipped included."""

    def on_evaluate(self, moment: Moment) -> None:
        """Called after every held-out evaluation: those on the way, and the last one, when all is saved."""

    def on_save(self, moment: Moment) -> None:
        """Called after every checkpoint."""

    def on_end(self, moment: Moment) -> None:
        """Called once, when the run is finished and all is saved; not when a signal or an error ends it."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))
Hook = Callable[[Moment], object]
Listener = Callback | Hook
"""What `sae.train` takes as a callback; any object that defines a hook will do."""


class Callbacks:
    """The callbacks of a run. An error of theirs is kept until what has been trained is saved."""

    def __init__(self, given: Any) -> None:
        """TypeError for what is no callback."""
        several = given if isinstance(given, list | tuple) else [] if given is None else [given]
        self.hooks: dict[str, list[tuple[str, Hook]]] = {hook: [] for hook in HOOKS}
        for place, one in enumerate(several):
            callback = one() if isinstance(one, type) else one
            for hook, function in _hooks(f"callbacks[{place}]", callback).items():
                name = getattr(callback, "__name__", type(callback).__name__)
                self.hooks[hook].append((name if function is callback else f"{name}.{hook}", function))
        self.failure: BaseException | None = None
        self.failed = ""
        """Which hook raised it."""
        self.stopping = False
        """Whether one has raised StopTraining."""

    @property
    def ending(self) -> bool:
        """Returns whether the training is to end here."""
        return self.stopping or self.failure is not None

    def tell(self, hook: str, moment: Callable[[], Moment]) -> None:
        """Calls a hook of all who have it, one after the other, until one fails."""
        if not self.hooks[hook] or self.failure is not None:
            return
        now = moment()
        for name, function in self.hooks[hook]:
            try:
                with _kept():
                    function(now)
            except StopTraining:
                self.stopping = True
            except BaseException as error:  # an exit too waits until all is saved
                self.failure, self.failed = error, name
                break
        object.__setattr__(now, "snapshot", _gone)


@contextmanager
def _kept() -> Iterator[None]:
    """Puts back what the next step depends on."""
    before = [read() for read, _ in KEPT]
    try:
        yield
    finally:
        for (read, put), value in zip(KEPT, before, strict=True):
            if read() != value:
                put(value)


def _gone() -> dict[str, SparseCoder]:
    raise RuntimeError("moment.coders: the hook has returned, and they have moved on; ask for them while it runs")


def _hooks(where: str, callback: Any) -> dict[str, Hook]:
    """Returns the hooks that a callback defines; a function is told of every step."""
    names = [name for name in dir(callback) if name.startswith("on_") and callable(getattr(callback, name))]
    for name in names:
        if name not in HOOKS:
            raise TypeError(f"{where}: {name} is no hook; there are {', '.join(HOOKS)}.{nearest(name, HOOKS)}")
    found = {name: getattr(callback, name) for name in names}
    found = {name: it for name, it in found.items() if getattr(it, "__func__", None) is not vars(Callback)[name]}
    if not names and callable(callback):
        found = {"on_step": callback}
    if not found:
        raise wrong(where, callback, f"a function of a step, or an object with any of {', '.join(HOOKS)}")
    for name, function in found.items():
        _check(where if function is callback else f"{where}.{name}", function)
    return found


def _check(where: str, function: Hook) -> None:
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{where}: it is async, and nobody would wait for it; define it with def")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of something built in, which does not tell
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(f"{where}: it is called with one argument, what has happened ({error})") from None
