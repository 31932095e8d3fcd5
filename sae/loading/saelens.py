"""A coder as SAELens' users and what is built on SAELens (SAEBench, sae-probes, HookedSAETransformer) expect one.

    sae = as_saelens(coder)
    sae.encode(x)                 [..., d_sae], dense       sae.W_enc [d_in, d_sae], W_dec [d_sae, d_in]
    sae.decode(acts), sae(x)      [..., d_in]               sae.cfg.metadata.hook_name

The numbers are the coder's own. SAELens is not imported, nor does it have to be there.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae.base.errors import ConfigError
from sae.coder import wording
from sae.coder.coder import SparseCoder, as_floats
from sae.coder.normalization import undo
from sae.coder.spec import CoderSpec
from sae.formats import saelens
from sae.kernels.codes import SparseLatents
from sae.lm.site import Site
from sae.loading.hub import Address, load

if TYPE_CHECKING:
    from typing import Self

HOOKS = ("hook_sae_input", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_error", "hook_sae_output")
LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def as_saelens(
    coder: "SparseCoder | SaeLensCoder | Address", hook_name: str = "", hook_name_out: str = "", model_name: str = ""
) -> "SaeLensCoder":
    """Returns a coder, or the one at an address, with the interface of SAELens 6; its tensors are shared.

    `hook_name`, a transcoder's `hook_name_out` and `model_name` say how the model that it is used with calls the sites
    and itself, where that is not what the coder says: "blocks.12.hook_resid_post" for a HookedTransformer, of a coder
    that reads "model.layers.12".
    A scale on the inputs is folded into the weights, as SAELens does. ConfigError if the coder reads or writes several
    sites, is cross-layer, or looks at gradients, which SAELens has no coders for.
    """
    if isinstance(coder, SaeLensCoder):
        coder = coder.coder
    if not isinstance(coder, SparseCoder):
        if not isinstance(coder, (str, Path, tuple)):
            raise TypeError(f"coder: expected a SparseCoder, or a name to load one by, not a {type(coder).__name__}")
        coder = load(coder)
    spec = coder.spec
    if spec.cross_layer or max(len(spec.reads), len(spec.writes)) > 1:
        raise ConfigError(f"coder: a {wording.kind(spec)} of several sites; an SAE of SAELens reads one and writes one")
    if spec.selection.looks_at_gradients:
        raise ConfigError("coder: its selection looks at gradients, which SAELens' encode is not given")
    coder = coder.fold_scale() if spec.normalization.kind == "scalar" else coder
    reads = _renamed(spec.reads, hook_name, model_name)
    writes = reads if spec.is_autoencoder else _renamed(spec.writes, hook_name_out, model_name)
    return SaeLensCoder(coder, coder.spec.with_(reads=reads, writes=writes))


def _renamed(sites: tuple[Site, ...], hook: str, model: str) -> tuple[Site, ...]:
    """Returns the one site under another name; where none is known, the name makes it."""
    (site,) = sites or (Site(""),)
    site = replace(site, hook=hook or site.hook, side="output" if hook else site.side, model=model or site.model)
    return (site,) if sites or site.hook else ()


class Metadata(dict[str, Any]):
    """What a coder is of: by attribute or by key, None where it is not known."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __missing__(self, name: str) -> None:
        return None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return dict(self)


class Named(str):
    """A name that SAELens 6 calls and SAEBench compares."""

    def __call__(self) -> str:
        """Returns the name."""
        return str(self)


class Config(SimpleNamespace):
    """The `cfg`: what SAELens 6 has there and, as SAELens 5 and SAEBench read it, what `metadata` says beside it."""

    metadata: Metadata

    def __getattr__(self, name: str) -> Any:
        metadata = self.__dict__.get("metadata", {})
        if name in metadata:
            return metadata[name]
        raise AttributeError(f"cfg has no {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data."""
        said = {name: str(value) if isinstance(value, Named) else value for name, value in vars(self).items()}
        return {**said, "metadata": self.metadata.to_dict()}


class SaeLensCoder(nn.Module):
    """A coder with the attributes and methods of `sae_lens.SAE`; `coder` is the coder itself."""

    def __init__(self, coder: SparseCoder, spec: CoderSpec) -> None:
        super().__init__()
        self.coder = coder
        self.cfg = _config(coder, spec)
        self.use_error_term = False
        self.d_head: int | None = None
        self.hook_z_reshaping_mode = self.cfg.reshape_activations == "hook_z"
        self._seen: Tensor | None = None
        self._hooks: dict[str, nn.Module] = {}
        self.train(coder.training)

    @property
    def hook_dict(self) -> dict[str, nn.Module]:
        """Returns the places where HookedSAETransformer looks; hook points of TransformerLens once that is imported."""
        kind = getattr(sys.modules.get("transformer_lens.hook_points"), "HookPoint", nn.Identity)
        if not all(isinstance(hook, kind) for hook in self._hooks.values()) or not self._hooks:
            self._hooks = {name: kind() for name in HOOKS}
            for name, hook in self._hooks.items():
                setattr(hook, "name", name)  # noqa: B010  # which TransformerLens' `setup` gives
                setattr(self, name, hook)
        return self._hooks

    def _hooked(self, name: str, x: Tensor) -> Tensor:
        self.hook_dict  # noqa: B018  # made here
        return getattr(self, name)(x)

    @property
    def W_enc(self) -> Tensor:
        """Returns the encoder [d_in, d_sae], a view."""
        return self.coder.W_enc.T

    @property
    def W_dec(self) -> nn.Parameter:
        """Returns the decoder [d_sae, d_out]."""
        return self.coder.W_dec

    @property
    def b_enc(self) -> nn.Parameter:
        """Returns the encoder's bias [d_sae]."""
        return self.coder.b_enc

    @property
    def b_dec(self) -> nn.Parameter:
        """Returns the decoder's bias [d_out]."""
        return self.coder.b_dec

    @property
    def threshold(self) -> Tensor:
        """Returns the thresholds [d_sae] of a JumpReLU coder; AttributeError of others."""
        found = self.coder.per_latent().get("threshold")
        if found is None:
            raise AttributeError("threshold")
        return found

    @property
    def W_skip(self) -> nn.Parameter:
        """Returns the skip path [d_out, d_in] of a coder that has one; AttributeError of others."""
        return self.coder.W_skip

    @property
    def dtype(self) -> torch.dtype:
        """Returns the precision of the weights."""
        return self.coder.dtype

    @property
    def device(self) -> torch.device:
        """Returns where the weights are."""
        return self.coder.device

    def encode(self, x: Tensor) -> Tensor:
        """Returns the codes of activations [..., d_in], or [..., heads, d_head] while heads are reshaped, densely."""
        x = as_floats(x).to(self.device, self.dtype)
        x = self._hooked("hook_sae_input", self.reshape_fn_in(x))
        self._seen = x if self.coder.spec.normalization.per_token else None
        return self._hooked("hook_sae_acts_post", self.coder.encode_dense(x))

    def decode(self, feature_acts: Tensor | SparseLatents) -> Tensor:
        """Returns the reconstruction of codes, without the skip path.

        As in SAELens, a normalization per token is undone by the activations that were encoded last.
        """
        out = self.coder.decode(feature_acts, self._seen)
        return self.reshape_fn_out(self._hooked("hook_sae_recons", out), self.d_head)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the reconstruction, or the prediction, of activations; with `use_error_term`, the activations."""
        x = as_floats(x)
        out = self.decode(self.encode(x))
        if self.coder.spec.skip:
            out = out + self.reshape_fn_out(self.coder.skipped(self.reshape_fn_in(x)), self.d_head).to(out)
        if self.use_error_term:
            out = out + self._hooked("hook_sae_error", (x - out).detach())
        return self._hooked("hook_sae_output", out)

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """Returns what the encoder is multiplied with: activations, normalized, less the pre-bias."""
        rows = self.reshape_fn_in(sae_in.to(self.device, self.dtype))
        return self.coder.centered(rows.reshape(-1, rows.shape[-1]))[0].reshape(rows.shape)

    def run_time_activation_norm_fn_in(self, x: Tensor) -> Tensor:
        """Returns activations as normalized for each token; what undoes that is kept."""
        self._seen = x if self.coder.spec.normalization.per_token else None
        return self.coder.spec.normalize(x.reshape(-1, x.shape[-1]))[0].reshape(x.shape)

    def run_time_activation_norm_fn_out(self, x: Tensor) -> Tensor:
        """Returns it undone with the numbers of the activations normalized last."""
        seen = x if self._seen is None else self._seen
        rows = seen.reshape(-1, seen.shape[-1])
        return undo(x.reshape(len(rows), -1), self.coder.spec.normalize(rows)[1]).reshape(x.shape)

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Lets heads come apart, [..., heads, d_head], as TransformerLens has them."""
        self.hook_z_reshaping_mode = True

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Lets heads come side by side, [..., heads * d_head]."""
        self.hook_z_reshaping_mode, self.d_head = False, None

    def reshape_fn_in(self, x: Tensor) -> Tensor:
        """Returns heads side by side, where they come apart."""
        if not self.hook_z_reshaping_mode:
            return x
        self.d_head = x.shape[-1]
        return x.flatten(-2)

    def reshape_fn_out(self, x: Tensor, d_head: int | None) -> Tensor:
        """Returns heads apart again."""
        return x.unflatten(-1, (-1, d_head)) if self.hook_z_reshaping_mode and d_head else x

    def fold_W_dec_norm(self) -> None:
        """Gives every decoder row norm 1, and its latent the norm."""
        self.coder = self.coder.fold_decoder_norm()

    def get_name(self) -> str:
        """Returns a name made of model, hook and width."""
        return f"sae_{self.cfg.metadata.model_name}_{self.cfg.metadata.hook_name}_{self.cfg.d_sae}"

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Writes a folder that `sae_lens.SAE.load_from_disk` reads; returns its files. ConfigError as when exported."""
        saelens.write(Path(path), self.coder)
        return Path(path, saelens.FILE), Path(path, saelens.CONFIG)

    def _apply(self, fn: Any, recurse: bool = True) -> "Self":
        super()._apply(fn, recurse)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        return self

    def extra_repr(self) -> str:
        """Returns that the adapter's own encoder is the other way round."""
        return "SAELens' interface; W_enc [d_in, d_sae]"


def _config(coder: SparseCoder, spec: CoderSpec) -> Config:
    """Returns the config of a coder; `spec` has the sites as the model calls them."""
    transcodes = not spec.is_autoencoder or spec.skip
    known = Metadata(saelens.metadata_of(spec, transcodes), hook_head_index=None, model_from_pretrained_kwargs={})
    known.context_size = spec.context_length or None
    layer = LAYER.search(known.hook_name or "")
    text = spec.training.get("text")
    known.hook_layer = int(layer[1]) if layer else None
    known.dataset_path = text.get("source") if isinstance(text, dict) else None
    name, constants = saelens.rule_of(spec)
    kind = saelens.RULES.get(name, name)
    return Config(
        d_in=spec.d_in,
        d_sae=spec.d_sae,
        **({"d_out": spec.d_out} if transcodes else {}),
        **({"k": constants["k"]} if "k" in constants else {}),
        architecture=Named(
            f"{'jumprelu_' * (kind == 'jumprelu')}{'skip_' * spec.skip}transcoder" if transcodes else kind
        ),
        dtype=str(coder.dtype).removeprefix("torch."),
        device=str(coder.device),
        apply_b_dec_to_input=spec.pre_bias == "decoder",
        normalize_activations=saelens.KINDS.get(spec.normalization.kind, "none"),
        reshape_activations="hook_z" if (known.hook_name or "").endswith("hook_z") else "none",
        metadata=known,
    )
