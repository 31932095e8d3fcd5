"""Steps on their way: what coders say of them is heard when the next is on its way, and told to all ranks alike.

Ranks that train the same coders hear the same. Where several groups train different ones, what went wrong with a coder
of one is known to all before the step after the next is given: one number beside the flag that says whether to stop
tells that something did, and what it is moves only then. Figures of all coders move when they are to be written down.
"""

from dataclasses import dataclass, field
from typing import Any

from sae.parallel import agreement
from sae.stream.batch import ActivationBatch
from sae.training.step import Figures, NonFiniteError
from sae.training.trainer import CoderTrainer


@dataclass(frozen=True)
class Given:
    """A step that the coders of this rank were given."""

    batch: ActivationBatch
    """What this rank has drawn."""
    step: int
    """Counted from 1."""
    figures: dict[str, Figures]
    """By coder."""
    errors: dict[str, str] = field(default_factory=dict)
    """Once it was heard of: what kept coders from taking it, by name."""


class Hearing:
    """What the steps of a run have come to, in their order."""

    def __init__(self, trainers: dict[str, CoderTrainer], order: list[str], several: bool) -> None:
        """Takes the trainers of this rank, the names of all coders, and whether other ranks train other ones."""
        self.trainers, self.order, self.several = trainers, order, several
        self.on_its_way = list[Given]()
        self.untold = list[Given]()
        """Heard of here; other groups have not said what they have heard."""

    @property
    def wrong(self) -> bool:
        """Returns whether there is an error that other groups may not know."""
        return any(given.errors for given in self.untold)

    def give(self, given: Given) -> list[Given]:
        """Takes note of a step; returns the one before if it is known to have gone wrong."""
        self.on_its_way.append(given)
        if len(self.on_its_way) > 1:
            self._hear()
        return [] if self.several else self._told()

    def told(self, wrong: bool) -> list[Given]:
        """Returns the steps that went wrong with a coder of any rank; all must call it, and say the same.

        `wrong` says whether there are any.
        """
        return self.settled([])[0] if wrong else self._told()

    def settle(self) -> tuple[list[Given], list[dict[str, Any]]]:
        """Hears of all steps; where several groups train, all ranks must call it.

        Returns those that went wrong, and the metrics of the coders that took the last one, if it was still on its way.
        """
        for trainer in self.trainers.values():
            trainer.settle()
        lines: list[dict[str, Any]] = []
        while self.on_its_way:
            given = self._hear()
            lines = [
                {"step": given.step, "coder": name, **figures, **_active(self.trainers[name])}
                for name, figures in given.figures.items()
                if name not in given.errors
            ]
        return self.settled(lines)

    def settled(self, lines: list[dict[str, Any]]) -> tuple[list[Given], list[dict[str, Any]]]:
        """Returns the steps that went wrong, with the errors of all ranks, and lines of metrics of all coders."""
        if self.several:
            own = {"errors": [given.errors for given in self.untold], "lines": lines}
            found = agreement.concluded(own, self._merged)
            lines = found["lines"]
            for given, errors in zip(self.untold, found["errors"], strict=True):
                given.errors.update(errors)
        return self._told(), lines

    def _merged(self, every: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns what all ranks say; those that train the same coders say the same of them."""
        lines = {line["coder"]: line for own in every for line in own["lines"]}
        errors = [
            {name: told for own in said for name, told in own.items()}
            for said in zip(*(o["errors"] for o in every), strict=True)
        ]
        return {"errors": errors, "lines": [lines[name] for name in self.order if name in lines]}

    def _hear(self) -> Given:
        """Hears of the oldest step on its way."""
        given = self.on_its_way.pop(0)
        for name, figures in given.figures.items():
            try:
                figures.check()
            except NonFiniteError as error:
                given.errors[name] = str(error)
        self.untold.append(given)
        return given

    def _told(self) -> list[Given]:
        found, self.untold = [given for given in self.untold if given.errors], []
        return found

    def described(self, given: Given) -> str:
        """Returns what kept coders from taking a step."""
        return "; ".join(f"coder {name}: {given.errors[name]}" for name in self.order if name in given.errors)


def _active(trainer: CoderTrainer) -> dict[str, int]:
    return {f"active_steps.{name}": count for name, count in trainer.active_steps.items() if name != "reconstruction"}
