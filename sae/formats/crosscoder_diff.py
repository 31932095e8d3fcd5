"""Crosscoders of two models, as ckkissane/crosscoder-model-diff-replication trains them: `<n>.pt` and `<n>_cfg.json`.

    a = ReLU(sum_m W_enc[m] (s_m x_m) + b_enc),   out_m = (W_dec[:, m] a + b_dec[m]) / s_m,   m = first, second

W_enc is [2, d, d_sae], b_enc [d_sae], W_dec [d_sae, 2, d], b_dec [2, d]; there is no pre-bias. On the hub the two files
are `cc_weights.pt` and `cfg.json`. Both models are read at the same hook. Training scales the inputs of each model to a
mean norm of sqrt(d) by a factor s_m that no file holds: it is known of the released coder, and asked for of others.
"""

from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.lm.site import SECOND, Site
from sae.lm.sites import model_id
from sae.selection.relu import ReLU
from sae.untrusted.configs import as_int
from sae.untrusted.places import Place

WEIGHTS = r".+\.pt"
FIELDS = {"d_in", "dict_size", "hook_point"}
RELEASED = "ckkissane/crosscoder-gemma-2-2b-model-diff"
SCALES = (0.2758961493232058, 0.24422852496546169)  # of the released coder, from its authors' notebook
MODELS = ("google/gemma-2-2b", "google/gemma-2-2b-it")


def detect(place: Place) -> bool:
    """Returns whether the config of that file gives width, size and hook under the trainer's names."""
    return place.config(*_configs(place)).keys() >= FIELDS


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors), the columns of the first model before those of the second."""
    config, found = place.config(*_configs(place)), place.tensors()
    d, d_sae = as_int(config["d_in"], "d_in", place), as_int(config["dict_size"], "dict_size", place)
    tensors = {
        "W_enc": found.take("W_enc", 2, d, d_sae).permute(2, 0, 1).reshape(d_sae, 2 * d),
        "b_enc": found.take("b_enc", d_sae),
        "W_dec": found.take("W_dec", d_sae, 2, d).reshape(d_sae, 2 * d),
        "b_dec": found.take("b_dec", 2, d).reshape(2 * d),
    }
    hook, released = place.hint("site") or str(config["hook_point"]), RELEASED in place.identity
    first = place.hints.model or (MODELS[0] if released else model_id(str(config.get("model_name") or "")))
    models, scales = (first, MODELS[1] if released else ""), _scales(place, released)
    sites = tuple(
        Site(hook, model=model, tag=tag, width=d, scale=scale)
        for model, tag, scale in zip(models, ("", SECOND), scales, strict=True)
    )
    spec = released_spec(
        (2 * d, 2 * d, d_sae),
        ReLU(),
        (sites, sites),
        pre_bias="none",
        normalization=Normalization("scalar"),
        context_length=as_int(config.get("seq_len") or 0, "seq_len", place),
    )
    return spec, tensors


def _scales(place: Place, released: bool) -> tuple[float, ...]:
    """Returns the factor of each model: as the user says it, two numbers or one for both, or as it is known."""
    if released and place.hint("scale") is None:
        return SCALES
    why = "each model's inputs were scaled to a mean norm of sqrt(d)"
    said = place.required_hint("scale", why, "(FIRST, SECOND), two factors sqrt(d) / E|x|, or one number for both")
    scales = tuple(map(float, said if isinstance(said, (tuple, list)) else (said, said)))
    if len(scales) != 2 or not min(scales) > 0:
        raise ConfigError(f"scale: {said} is not one or two positive numbers, the factors of the two models of {place}")
    return scales


def _configs(place: Place) -> tuple[str, str]:
    return place.name.removesuffix(".pt") + "_cfg.json", "cfg.json"
