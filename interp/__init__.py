"""Labels for the latents of a sparse coder: evidence, explanation, score.

    records      the plain data that passes between all: windows, examples, explanations, judgements
    prompts/     the only place where text of a data set becomes a message
    client/      requests -> replies, of models on servers (remote/) and in this process (local/)
    evidence/    text -> rows (corpus) -> codes -> what every latent does (first_pass into a tally), where to look again
                 (places) and what is there (second_pass) -> what is shown of a latent (examples, promotes)
    scoring/     what scorers share: judging, tasks, metrics, steering
    explainers/  examples -> explanations: plug-ins
    scorers/     explanation + tasks -> requests -> replies -> judgements -> score: plug-ins
    run/         config -> preparing -> pipeline (one latent: flows) -> journal -> results; estimate, compare
    exchange/    other people's files: delphi, Neuronpedia

Each knows those above it alone; prompts, client and evidence do not know each other.
"""

from typing import TYPE_CHECKING

from sae.base.lazy import on_demand

if TYPE_CHECKING:
    from interp.view.firing.prompting import prompt
    from interp.view.notebook import examples, explain, results

    __version__: str

_HOMES: dict[str, str] = dict.fromkeys(("examples", "explain", "results"), "interp.view.notebook")
_HOMES["prompt"] = "interp.view.firing.prompting"

__all__ = ["__version__", "examples", "explain", "prompt", "results"]

__getattr__, __dir__ = on_demand(__name__, _HOMES)
