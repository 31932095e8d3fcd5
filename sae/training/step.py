"""What a step is given, and what it measures: numbers on the device, read when somebody asks, all at once."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.sums import in_float64
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.objectives import Objective, Spliced
from sae.parallel import collectives
from sae.parallel.ranks import Axis


class NonFiniteError(RuntimeError):
    """A loss, gradient or activation is NaN or infinite; the step was not applied."""


@dataclass(frozen=True)
class Batch:
    """The unmasked tokens of this rank's share of a batch."""

    x: Float[Tensor, "n d_in"]
    """Raw activations at the sites read, side by side."""
    target: Float[Tensor, "n d_out"]
    """Raw activations at the sites written; of an autoencoder, x."""
    gradients: Float[Tensor, "n d_out"] | None = None
    """Of the loss, at the sites written, for a rule that looks at them."""
    sizes: tuple[int, ...] | None = None
    """Tokens of each micro-batch, where these must be whole rows of text."""
    spliced: Callable[[int, Float[Tensor, "m d_out"]], Spliced] | None = None
    """Runs the language model on micro-batch i with these raw outputs in place, for end-to-end terms."""


@dataclass
class Sums:
    """What adds up over the micro-batches of a step, and over ranks."""

    terms: dict[str, Tensor]
    """The loss terms, without their weights."""
    error: Float[Tensor, "d_out"]
    square: Float[Tensor, ""]
    fired: Int[Tensor, "d_sae"]
    """Of the latents that this rank holds."""
    entries: Int[Tensor, ""]
    """Of those latents, that are kept, those included that do not fire."""
    failed: Float[Tensor, ""]
    """Above 0 if a rank had no room for all entries, or was given gradients that are not finite (then NaN)."""

    of_latents: frozenset[str] = frozenset()
    """The terms that add up over latents, too."""

    @classmethod
    def zero(cls, terms: Mapping[str, Objective], coder: SparseCoder) -> "Sums":
        """Returns nothing yet, of these terms."""
        like = coder.W_enc
        zeros = partial(torch.zeros, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        fired = zeros(coder.spec.d_sae, dtype=torch.int64)
        of_latents = frozenset(name for name, term in terms.items() if term.of_latents)
        found = {name: zeros(()) for name in terms}
        return cls(found, zeros(coder.spec.d_out), zeros(()), fired, fired.new_zeros(()), zeros(()), of_latents)

    def tensors(self) -> list[Tensor]:
        """Returns all of it, to be summed, in place, over ranks with other tokens."""
        return [*self.terms.values(), self.error, self.square, self.fired, self.entries, self.failed]

    def over_latents(self) -> list[Tensor]:
        """Returns what is then summed over ranks with other latents, too."""
        return [*(self.terms[name] for name in sorted(self.of_latents)), self.failed]

    def spread(self, n_tokens: int) -> Float[Tensor, ""]:
        """Returns the variance of the error, in float64."""
        return in_float64(self.square) / n_tokens - (in_float64(self.error) / n_tokens).square().sum()


@dataclass(frozen=True)
class Heard:
    """What the host knows of a step when it gives the next but one to the device."""

    per_token: float
    """Entries that this rank keeps of a token, those that carry a gradient to a threshold alone included."""
    everywhere: float
    """Those of all ranks."""
    idle: float = 0
    """Tokens since that latent has fired which has not for longest."""
    nearly: float = 0
    """Latents that will be dead in `margin` tokens if they do not fire."""
    margin: float = -1
    """Below 0: it is not known how many."""

    def may_be_dead(self, dead_after: int, since: int, latents: int) -> int:
        """Returns how many latents there may be, at most, that have not fired for so many tokens, `since` later."""
        if self.idle + since < dead_after:
            return 0
        return int(self.nearly) if since <= self.margin else latents

    def to_json(self) -> dict[str, float]:
        """Returns it as plain values."""
        return asdict(self)


def at_first(spec: CoderSpec) -> float:
    """Returns how many entries of a token a coder, or a part of one, is expected to keep at the first step."""
    return spec.n_blocks * spec.selection.l0_at_first(spec.d_sae / spec.n_blocks)


@dataclass(frozen=True)
class Planned:
    """A step as it is given to the device, and again if it must be repeated."""

    batch: Batch
    index: int
    before: int
    """Tokens of the ranks before this one."""
    n_tokens: int
    """Of all ranks."""
    heard: Heard
    """Of an earlier step, which says how many entries a token is expected to keep."""
    may_be_dead: int
    """Latents that are dead, at the most."""


class Figures(Mapping[str, float]):
    """The figures of one step by name, those of all ranks together.

    They are on their way from the device until they are read, which waits. Reading those of a step that was not applied
    raises NonFiniteError, on all ranks, which must then all read.
    """

    def __init__(
        self,
        values: dict[str, Tensor | float],
        read: Callable[[dict[str, float]], dict[str, float]],
        batch: Batch,
        n_tokens: int,
        settle: Callable[[], None],
        over: Axis,
    ) -> None:
        """Takes numbers of the device by name, what makes of them what is told, and what repeats a step.

        `over` are the ranks with the other tokens of the batch.
        """
        self._names, self._make, self._batch, self._n_tokens = list(values), read, batch, n_tokens
        self._settle, self._over = settle, over
        device = next(value.device for value in values.values() if isinstance(value, Tensor))
        parts = [in_float64(v if isinstance(v, Tensor) else torch.tensor(v, device=device)) for v in values.values()]
        together = torch.stack(parts)
        self._event = None
        if together.device.type == "cuda":
            self._host = torch.empty(len(parts), dtype=torch.float64, pin_memory=True)
            self._host.copy_(together, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = together if together.device.type == "cpu" else together.cpu()
        self._found: dict[str, float] | None = None

    def become(self, other: "Figures") -> None:
        """Becomes the figures of the same step, repeated."""
        self.__dict__.update(other.__dict__)

    def arrived(self) -> dict[str, float]:
        """Returns the numbers of the device by name, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._host.numpy().tolist(), strict=True))

    def had_no_room(self) -> bool:
        """Returns whether the step was not applied because a buffer was too small for its codes."""
        return self.arrived()["failed"] > 0

    def heard(self) -> Heard | None:
        """Returns what the next step but one is planned by; None if this one was not applied."""
        found = self.arrived()
        if not found["applies"]:
            return None
        own, every = (found[name] / max(1, self._n_tokens) for name in ("entries", "everywhere"))
        return Heard(own, every, found["idle"], found["nearly"], 2 * self._n_tokens)

    def check(self) -> None:
        """Raises NonFiniteError if the step was not applied, naming what was not finite; on all ranks."""
        if self.had_no_room():
            self._settle()
        found = self.arrived()
        watched = {n: v for n, v in found.items() if n.startswith(("loss.", "gradient.")) or n in ("square", "failed")}
        if all(map(math.isfinite, watched.values())):
            return
        parts = [part for part in (self._batch.x, self._batch.target, self._batch.gradients) if part is not None]
        own = torch.stack([~torch.isfinite(part).all(1) for part in parts]).any(0).sum()
        bad = int(collectives.total(own, self._over))
        if bad:
            raise NonFiniteError(f"NaN or Inf in what was streamed, at {bad} of {self._n_tokens} tokens")
        name, value = next((n, v) for n, v in watched.items() if not math.isfinite(v))
        kind, _, of = name.partition(".")
        raise NonFiniteError(f"gradient of {of} is not finite" if kind == "gradient" else f"loss term {of} is {value}")

    def _read(self) -> dict[str, float]:
        if self._found is None:
            self.check()
            self._found = self._make(self.arrived())
        return self._found

    def __getitem__(self, name: str) -> float:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(self._read())
