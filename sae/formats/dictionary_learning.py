"""dictionary_learning: a folder with `ae.pt`, a plain state dict, and `config.json`, as its trainers save them.

    AutoEncoder                             a = ReLU(h)             h = W_enc (x - b) + b_enc
    AutoEncoderNew                          a = ReLU(h)             h = W_enc x + b_enc
    AutoEncoderTopK                         a = TopK_k(ReLU(h))     h = W_enc (x - b) + b_enc
    BatchTopKSAE, MatryoshkaBatchTopKSAE    a = ReLU(h) 1[h > t]    h = W_enc (x - b) + b_enc, one t for all
    JumpReluAutoEncoder                     a = ReLU(h) 1[h > t]    h = W_enc x + b_enc, a t for each latent
    GatedAutoEncoder                        a = 1[g + gate_bias > 0] ReLU(exp(r_mag) g + mag_bias)    g = W_enc (x - b)

and out = W_dec a + b. The config names the class. `encoder.weight` is [d_sae, d] and `decoder.weight` [d, d_sae], as
torch's linear layers are; `W_enc` is [d, d_sae] and `W_dec` [d_sae, d]. Where t is -1 it was never set, and k latents a
token are kept. The library divides by decoder norms when it loads an AutoEncoder; here the file stays as it is.

Checkpoints `checkpoints/ae_<step>.pt` have their config one folder up. A backup {step, ae, optimizer, config,
norm_factor} is of inputs x / norm_factor, by which the biases of all other files have been multiplied.
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.base.files import write_json, write_whole
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.formats import _exporting
from sae.formats._specs import released_spec
from sae.lm.site import Site
from sae.lm.sites import model_id
from sae.selection import Selection
from sae.selection.gated import Gated
from sae.selection.jumprelu import JumpReLU
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.topk import TopK
from sae.untrusted.configs import as_int, one_of
from sae.untrusted.pickles import read_pickle
from sae.untrusted.places import Place
from sae.untrusted.tensors import Tensors, check_finite

log = logging.getLogger(__name__)

WEIGHTS = r"ae(_\w+)?\.pt"
FILE, CONFIG = "ae.pt", "config.json"
LAYERS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
MATRICES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
CLASSES = {  # our tensors -> the class's
    "AutoEncoder": {**LAYERS, "b_dec": "bias"},
    "AutoEncoderNew": {**LAYERS, "b_dec": "decoder.bias"},
    "AutoEncoderTopK": {**LAYERS, "b_dec": "b_dec"},
    "BatchTopKSAE": {**LAYERS, "b_dec": "b_dec"},
    "MatryoshkaBatchTopKSAE": MATRICES,
    "MatroyshkaBatchTopKSAE": MATRICES,  # as it was first spelled
    "JumpReluAutoEncoder": {**MATRICES, "threshold": "threshold"},
    "GatedAutoEncoder": {
        **LAYERS,
        "b_enc": "gate_bias",
        "b_dec": "decoder_bias",
        "r_mag": "r_mag",
        "b_mag": "mag_bias",
    },
}
TURNED = ("decoder.weight", "W_enc")  # stored as [d, d_sae]
NO_PRE_BIAS = ("AutoEncoderNew", "JumpReluAutoEncoder")
WRITTEN = {
    ("relu", "decoder"): "AutoEncoder",
    ("relu", "none"): "AutoEncoderNew",
    ("topk", "decoder"): "AutoEncoderTopK",
    ("mutual_choice", "decoder"): "BatchTopKSAE",
    ("jumprelu", "none"): "JumpReluAutoEncoder",
    ("gated", "decoder"): "GatedAutoEncoder",
}


def detect(place: Place) -> bool:
    """Returns whether the config is of one of the library's trainers."""
    return "dict_class" in _part(_config(place), "trainer")


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors); DataError if the tensors are not those of the class that the config names."""
    config = _config(place)
    trainer = _part(config, "trainer")
    kind = one_of(trainer.get("dict_class"), CLASSES, "trainer.dict_class", place)
    found, normalization = _opened(place)
    for name in CLASSES[kind].values():
        if name not in found:
            raise DataError(f"{place}: trainer.dict_class is {kind!r}, but there is no tensor {name}")
    d_in = as_int(trainer.get("activation_dim"), "trainer.activation_dim", place)
    d_sae = as_int(trainer.get("dict_size"), "trainer.dict_size", place)
    tensors = {}
    for name, theirs in CLASSES[kind].items():
        if name in ("W_enc", "W_dec"):
            tensors[name] = _matrix(found, theirs, d_in, d_sae)
        else:
            tensors[name] = found.take(theirs, d_in if name == "b_dec" else d_sae)
    selection, cut = _selection(place, kind, trainer, found)
    sites = _sites(place, trainer)
    spec = released_spec(
        (d_in, d_in, d_sae),
        selection,
        (sites, sites),
        calibration=cut,
        pre_bias="none" if kind in NO_PRE_BIAS else "decoder",
        normalization=normalization,
        context_length=as_int(_part(config, "buffer").get("ctx_len") or 0, "buffer.ctx_len", place),
        training={"dict_class": kind},
    )
    return spec, tensors


def write(folder: Path, coder: SparseCoder) -> None:
    """Writes a coder so that the library's `utils.load_dictionary` gives the same map, latent by latent.

    Raises ConfigError naming what of it the library cannot say.
    """
    spec, kind = coder.spec, _written_as(coder)
    _, constants = _exporting.rule_of(spec)
    state = {theirs: _stored(getattr(coder, name), theirs) for name, theirs in CLASSES[kind].items()}
    site = spec.reads[0] if spec.reads else Site("")
    layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site.hook)
    residual = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", site.hook)
    trainer: dict[str, Any] = {
        "dict_class": kind,
        "activation_dim": spec.d_in,
        "dict_size": spec.d_sae,
        "layer": int(layer[1]) if layer else None,
        "lm_name": site.model,
        "submodule_name": f"resid_post_layer_{residual[1]}" if residual else site.hook or None,
    }
    if "k" in constants:
        trainer["k"] = constants["k"]
        state["k"] = torch.tensor(constants["k"], dtype=torch.int)
        state["threshold"] = torch.tensor(spec.calibration[0] if spec.calibration else -1.0)
    check_finite(state, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, lambda path: torch.save(state, path))
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {"ctx_len": spec.context_length}})


def _written_as(coder: SparseCoder) -> str:
    """Returns the class that computes what a coder does."""
    target, spec = "dictionary_learning", coder.spec
    rules = {rule for rule, _ in WRITTEN}
    _exporting.check_expressible(target, spec, selection=rules, pre_bias=("decoder",))
    rule, _ = _exporting.rule_of(spec)
    if (rule, spec.pre_bias) not in WRITTEN:
        other = next(pre_bias for known, pre_bias in WRITTEN if known == rule)
        raise ConfigError(f"pre_bias: {target} has {rule} with pre_bias {other!r} only, not {spec.pre_bias!r}")
    if not spec.is_autoencoder:
        raise ConfigError(f"writes: {target} cannot say that a coder writes another site than it reads")
    if spec.is_placed and spec.reads[0].side != "output":
        raise ConfigError(f"reads: {target} names modules whose output is read, and cannot say {spec.reads[0].name!r}")
    if rule == "mutual_choice" and not spec.calibration:
        raise ConfigError(f"calibration: {target} needs a threshold, and this coder has none; train it further")
    norms = coder.decoder_norms().float()
    if rule == "relu" and spec.pre_bias == "decoder" and not torch.allclose(norms, torch.ones_like(norms)):
        raise ConfigError(
            f"decoder_norm: {target} divides the decoder of an AutoEncoder by its norms when it loads it, which would "
            "scale the latents; only a unit decoder keeps them"
        )
    return WRITTEN[rule, spec.pre_bias]


def _stored(tensor: Tensor, name: str) -> Tensor:
    """Returns a tensor of ours as the library lays it out, with a storage of its own."""
    return (tensor.T if name in TURNED else tensor).detach().cpu().clone(memory_format=torch.contiguous_format)


def _matrix(found: Tensors, name: str, d_in: int, d_sae: int) -> Tensor:
    """Returns a matrix of the library as [d_sae, d_in]."""
    return found.take(name, d_in, d_sae).T if name in TURNED else found.take(name, d_sae, d_in)


def _config(place: Place) -> dict[str, Any]:
    return place.config(CONFIG, f"../{CONFIG}")


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _opened(place: Place) -> tuple[Tensors, Normalization]:
    """Returns the coder's own tensors, and what is done to its inputs."""
    found = place.tensors()
    own = {name.removeprefix("ae."): found[name] for name in found if name.startswith("ae.")}
    if not own:
        return found, Normalization()
    found.ignore("step", "norm_factor", *(name for name in found if name.startswith("optimizer.")))  # of the training
    factor = read_pickle(place.path(place.name)).get("norm_factor")
    if factor is None:
        why = "it is a backup without norm_factor, whose inputs may have been scaled"
        scale = float(place.required_hint("scale", why, "1 / norm_factor, or 1"))
    else:
        scale = 1 / float(factor)
    return place.as_tensors(own), Normalization() if scale == 1 else Normalization("scalar", scale)


def _selection(place: Place, kind: str, trainer: dict[str, Any], found: Tensors) -> tuple[Selection, tuple[float, ...]]:
    """Returns the rule, and the one threshold of all latents where it has one."""
    if kind == "GatedAutoEncoder":
        return Gated(), ()
    if kind == "JumpReluAutoEncoder":
        return JumpReLU(), ()
    if "TopK" not in kind:
        return ReLU(), ()
    k = trainer.get("k")
    if "k" in found:  # older files have none
        stored = found.number("k")
        if k not in (None, stored):
            raise DataError(f"{place}: trainer.k is {k}, but tensor k holds {stored:g}")
        k = stored
    k = as_int(k, "trainer.k", place)
    if kind == "AutoEncoderTopK":
        found.ignore("threshold")  # measured in training for those who want it; the class itself chooses by k
        return TopK(k), ()
    found.ignore("group_sizes")  # of the training loss; all groups are active afterwards
    cut = found.number("threshold")
    if cut < 0:
        log.warning("%s: its threshold was never set; each token keeps its %d largest latents instead", place, k)
        return MutualChoice(k), ()
    return MutualChoice(k), (cut,)


def _sites(place: Place, trainer: dict[str, Any]) -> tuple[Site, ...]:
    """Returns the site: a module path, or the stream after a layer by the name that configs and folders give it."""
    named, layer = str(trainer.get("submodule_name") or ""), trainer.get("layer")
    hook = named if "." in named else ""
    if not hook and layer is not None and "resid_post" in (named or place.identity):
        hook = f"blocks.{as_int(layer, 'trainer.layer', place)}.hook_resid_post"
    return (Site(hook, model=place.hints.model or model_id(str(trainer.get("lm_name") or ""))),) if hook else ()
