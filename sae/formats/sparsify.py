"""sparsify (EleutherAI): a folder named like its module, with `cfg.json` and `sae.safetensors`; `config.json` above it.

    a = select(ReLU(y W_enc^T + b_enc))    out = a W_dec + b_dec [+ x W_skip^T]

`select` is TopK, or `groupmax`: the largest of each of k groups of neighbors. Coders that are `signed`, as some of 2024
are, have no ReLU and take the k of largest magnitude. W_dec is stored with one latent a row, like the encoder of
torch's Linear. Autoencoders are of a module's output, and y = x - b_dec. Transcoders (`transcode`) go from its input to
its output. Until February 2025 they subtracted b_dec as well; the change that ended it (pull request 49) brought the
field `activation`, so without this field the user has to say. Module names are relative to the base model.

The map is sparsify's decode(encode(x)); under `multi_topk`, a loss, its forward returns what 4 k latents make.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.files import save_tensors, write_json
from sae.base.settings import choose
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.formats import _exporting
from sae.formats._specs import released_spec, unsaid_sites
from sae.lm.site import Site
from sae.lm.sites import ALIAS
from sae.selection import Selection
from sae.selection.groupmax import GroupMax
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK
from sae.untrusted.configs import as_flag, as_int, one_of
from sae.untrusted.places import Place
from sae.untrusted.tensors import check_finite

CONFIG, FILE, RUN = "cfg.json", "sae.safetensors", "config.json"
WEIGHTS = r"sae\.safetensors"
RULES: dict[tuple[str, bool], type[TopK] | type[SignedTopK] | type[GroupMax]] = {
    ("topk", False): TopK,
    ("topk", True): SignedTopK,
    ("groupmax", False): GroupMax,
}
MAP = {"activation", "signed", "k", "d_in", "d_sae", "num_latents", "expansion_factor", "skip_connection", "transcode"}
TRAINING = {"normalize_decoder", "multi_topk", "naive_decoder", "lookup_max_order"}  # of no effect on the map
HOOK = re.compile(r"([A-Za-z_]\w*\.)+\d+(\.\w+)*|(\w+\.)*(embed_tokens|embed_in|wte)")


def detect(place: Place) -> bool:
    """Returns whether config and tensors are those of a sparse coder, and the config is not our own."""
    config = place.config(CONFIG)
    return "format_version" not in config and {"k", "d_in"} <= config.keys() and "encoder.weight" in place.shapes()


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors)."""
    config, run = place.config(CONFIG), _run(place)
    for name, value in config.items():
        if value and name not in MAP | TRAINING:
            raise ConfigError(f"{name}: {place} has {value!r}, which is not known of sparsify's coders")
    d_in = as_int(config["d_in"], "d_in", place)
    d_sae = as_int(config.get("num_latents") or config.get("d_sae") or 0, "num_latents", place)
    d_sae = d_sae or d_in * as_int(config.get("expansion_factor"), "expansion_factor", place)
    found, transcodes, skip = (
        place.tensors(),
        as_flag(config, "transcode", place),
        as_flag(config, "skip_connection", place),
    )
    d_out = found["b_dec"].numel() if transcodes else d_in
    tensors = {
        "W_enc": found.take("encoder.weight", d_sae, d_in),
        "b_enc": found.take("encoder.bias", d_sae),
        "b_dec": found.take("b_dec", d_out),
    }
    if "W_dec" in found:
        tensors["W_dec"] = found.take("W_dec", d_sae, d_out)
    else:  # of the very first versions, where it was a Linear
        tensors["W_dec"] = found.matrix("decoder.weight", d_sae, d_out, transposed=True)
    if skip:
        tensors["W_skip"] = found.take("W_skip", d_out, d_in)
    reads, writes = _sites(place, run, transcodes)
    spec = released_spec(
        (d_in, d_out, d_sae),
        _selection(place, config),
        (reads, writes),
        pre_bias=_pre_bias(place, config) if transcodes else "decoder",
        skip=skip,
        context_length=as_int(run.get("ctx_len") or 0, "ctx_len", place),
        training={"dataset": run.get("dataset")},
    )
    return spec, tensors


def write(folder: Path, coder: SparseCoder) -> None:
    """Writes a coder that sparsify's `SparseCoder.load_from_disk` reads, with its site in a `config.json` beside it.

    ConfigError names what the format cannot say; weights come first, so that a folder with a config is whole.
    """
    spec = coder.spec
    _exporting.check_expressible("sparsify", spec, pre_bias=("decoder",), selection=("topk", "groupmax"), skip=(True,))
    if spec.d_in != spec.d_out:
        raise ConfigError(f"d_out: sparsify cannot say {spec.d_out}, other than d_in = {spec.d_in}")
    transcodes = not spec.is_autoencoder
    wanted = "none" if transcodes else "decoder"
    if spec.pre_bias != wanted:
        kind = "a transcoder" if transcodes else "an autoencoder"
        raise ConfigError(f"pre_bias: sparsify cannot say {spec.pre_bias!r} of {kind}, which has {wanted!r}")
    if spec.is_placed:
        (read,), (written,) = spec.reads, spec.writes
        sides = ("input" if transcodes else "output", "output")
        if read.hook != written.hook or (read.side, written.side) != sides or ALIAS.fullmatch(read.hook):
            raise ConfigError(
                f"reads: sparsify cannot say {read.name!r} to {written.name!r}; it knows the output of a module path "
                "such as 'layers.3', or its input to its output"
            )
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    tensors = {names.get(name, name): tensor for name, tensor in coder.state_dict().items()}
    check_finite(tensors, folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / FILE, tensors)
    site = spec.reads[0] if spec.reads else Site("")
    run = {
        "model": site.model,
        "revision": site.revision,
        "hookpoints": [site.hook] if site.hook else [],
        "ctx_len": spec.context_length,
        "dataset": spec.training.get("dataset"),
    }
    write_json(folder / RUN, {name: value for name, value in run.items() if value})
    activation, constants = _exporting.rule_of(spec)
    config = {
        "activation": activation,
        "d_in": spec.d_in,
        "k": constants["k"],
        "multi_topk": False,
        "normalize_decoder": spec.decoder_norm == "unit",
        "num_latents": spec.d_sae,
        "skip_connection": spec.skip,
        "transcode": transcodes,
    }
    write_json(folder / CONFIG, config)


def _run(place: Place) -> dict[str, Any]:
    """Returns the config of the whole run: beside the weights, one folder up, or at the root."""
    above = replace(place, weights=FILE)  # a coder of several seeds lies two folders down
    return place.config(RUN, f"../{RUN}") or above.config(RUN)


def _selection(place: Place, config: dict[str, Any]) -> Selection:
    activation = one_of(config.get("activation", "topk"), ("topk", "groupmax"), "activation", place)
    rule = RULES.get((activation, as_flag(config, "signed", place)))
    if rule is None:
        raise ConfigError(f"signed: {place} is signed, which sparsify knows of topk alone, not of {activation}")
    return rule(as_int(config.get("k"), "k", place))


def _pre_bias(place: Place, config: dict[str, Any]) -> str:
    said = place.hint("pre_bias")
    if said is None and "activation" in config:
        return "none"
    why = "a transcoder from before February 2025 subtracts b_dec from its input, a later one does not"
    said = said or place.required_hint("pre_bias", why, "none or decoder", ("none", "decoder"))
    choose("pre_bias", said, ("none", "decoder"))
    return said


def _sites(place: Place, run: dict[str, Any], transcodes: bool) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Returns the sites: the only one that a config beside the weights names, else the user's, else the folder's."""
    *_, above, name = ["", "", *place.identity.split("/")[:-1]]
    folder = above if re.fullmatch(r"seed\d+", name) else name
    listed = run.get("hookpoints") if place.has(RUN) else None
    known = listed[0] if listed and len(listed) == 1 else folder if HOOK.fullmatch(folder) else ""
    hook, model = place.hint("site") or known, place.hints.model or run.get("model") or ""
    if not hook:
        if not transcodes:
            return (), ()
        place.site_hint("a transcoder reads one place and writes another", "MODULE")
        unsaid = unsaid_sites(model)
        return unsaid[:1], unsaid[1:]
    read, _, written = hook.partition("->")
    if written and not transcodes:
        raise ConfigError(f"site: {hook!r} is of a transcoder, but {place} is an autoencoder")
    first, last = (
        Site(path, side or default, model, run.get("revision"))
        for (path, _, side), default in (
            (read.partition(":"), "input" if transcodes else "output"),
            ((written or read.partition(":")[0]).partition(":"), "output"),
        )
    )
    return (first,), (last if transcodes else first,)
