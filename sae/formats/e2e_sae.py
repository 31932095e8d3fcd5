"""e2e_sae (Braun 2024, 2405.12241): `samples_<n>.pt`, the state dict of coders by hook, and `final_config.yaml`.

    a = ReLU(W_enc x + b_enc),   out = sum_i a_i W_dec_i / |W_dec_i| + b_dec

`<hook>.encoder.0.weight` is [d_sae, d] and `<hook>.decoder.weight` [d, d_sae]; dots of a hook's name are written as
hyphens. The decoder is normalized in every forward pass, so its columns lie there at any length. A file may hold
coders of several hooks; `site` says which. They read a model as TransformerLens loads it by name: where that has layer
norms, the residual stream and what is written to it lack their mean over components, and N takes it out of a raw
activation. A model of their own, loaded from a path, stays as it is.
"""

from torch import Tensor
from torch.nn.functional import normalize

from sae.base.errors import ConfigError, DataError, nearest
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.formats._transformer_lens import centering
from sae.lm.site import Site
from sae.lm.sites import model_id
from sae.selection.relu import ReLU
from sae.untrusted.configs import as_int
from sae.untrusted.places import Place

WEIGHTS = r"samples_\d+\.pt"
CONFIG, MARK = "final_config.yaml", ".encoder.0.weight"


def detect(place: Place) -> bool:
    """Returns whether the file holds the encoder of a hook."""
    return any(name.endswith(MARK) for name in place.shapes())


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors) of the one hook, or of the one that `site` names; ConfigError lists them otherwise."""
    found, config = place.tensors(), place.config(CONFIG)
    if not config:
        raise DataError(f"{place}: {CONFIG} is not beside it, which says the model and how it was loaded")
    starts = [name.removesuffix(MARK) for name in found if name.endswith(MARK)]
    hooks = {start.replace("-", "."): start for start in starts}
    hook = place.hint("site") or (next(iter(hooks)) if len(hooks) == 1 else "")
    if hook not in hooks:
        asked = f"{hook!r} is not in {place}" if hook else f"{place} holds coders of {len(hooks)} hooks"
        raise ConfigError(f"site: {asked}; say one of {', '.join(hooks)}.{nearest(hook, hooks)}")
    start = hooks[hook]
    found.ignore(*(name for name in found if not name.startswith(f"{start}.")))  # coders of other hooks
    encoder, decoder = f"{start}.encoder.0", f"{start}.decoder"
    d_sae, d_in = found[f"{encoder}.bias"].numel(), found[f"{decoder}.bias"].numel()
    tensors = {
        "W_enc": found.take(f"{encoder}.weight", d_sae, d_in),
        "b_enc": found.take(f"{encoder}.bias", d_sae),
        "W_dec": normalize(found.take(f"{decoder}.weight", d_in, d_sae).float(), dim=0).T,
        "b_dec": found.take(f"{decoder}.bias", d_in),
    }
    model, data = str(config.get("tlens_model_name") or ""), config.get("train_data")
    data = data if isinstance(data, dict) else {}
    sites = (Site(hook, model=place.hints.model or model_id(model)),)
    spec = released_spec(
        (d_in, d_in, d_sae),
        ReLU(),
        (sites, sites),
        pre_bias="none",
        normalization=centering(place, hook, model),
        context_length=as_int(data.get("n_ctx") or 0, "train_data.n_ctx", place),
        training={"dataset": data.get("dataset_name")},
        decoder_norm="unit",
    )
    return spec, tensors
