"""What a coder is: the map that it computes, and all that is said of it beside its tensors.

A coder maps a row x of width d_in to a row of width d_out through d_sae latents, one latent per row of the matrices:

    y = N(x) - p        h = y W_enc^T + b_enc        a = select(h)        out = N^-1(a W_dec + b_dec) [+ x W_skip^T]

An autoencoder writes the sites that it reads, a transcoder others. A coder of several sites (crosscoder) has their
columns side by side. A cross-layer coder has one block of latents for each site read; block l sees that site alone and
writes to the l-th site and all later ones, so its rows of W_dec are shorter the later it reads.

`CoderSpec` says everything about that map which is not a tensor, as explicit fields.
"""

from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import draccus
import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.base.plugins import names
from sae.base.settings import choose, decode
from sae.coder.normalization import Normalization, Undo, by_site
from sae.encoders import Encoder
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection import Selection

FORMAT_VERSION = 2
PRE_BIASES = ("none", "decoder", "own")
DECODER_NORMS = ("unit", "free")
BUDGETS = ("block", "shared")
WIDEST = 2**30
RELEASED = "released"  # of `CoderSpec.training`: where a coder that was not trained here comes from


@dataclass(frozen=True)
class CoderSpec:
    """What a coder is, beside its tensors."""

    d_in: int
    d_out: int
    d_sae: int
    selection: Selection
    reads: tuple[Site, ...] = ()
    writes: tuple[Site, ...] = ()
    encoder: str = "linear"
    """What h is: of `sae/encoders/`, a name."""
    pre_bias: str = "decoder"
    """p above: "none", "decoder" (b_dec is subtracted) or "own" (a tensor b_pre)."""
    normalization: Normalization = field(default_factory=Normalization)
    cross_layer: bool = False
    """Whether latents fall into one block for each site read, which writes to that site's place and all later ones."""
    budget: str = "block"
    """Of a cross-layer coder: "block" selects in every block by itself, "shared" in all blocks together."""
    calibration: tuple[float, ...] = ()
    """What training found the per-token rule to need, for each block: a batch-wide rule's threshold, a gradient rule's
    mean effect."""
    select_by_decoder_norm: bool = False
    """Selection compares h_i |W_dec_i| instead of h_i."""
    decoder_norm: str = "unit"
    """"unit": rows of W_dec are kept at norm 1 in training; "free": they are not."""
    skip: bool = False
    """Whether x W_skip^T is added to the output."""
    mask: MaskSpec = field(default_factory=MaskSpec)
    context_length: int = 0
    bos: str = "row"
    """BOS policy of the training text: "row", "document" or "none"."""
    variance: float | None = None
    """E|N(x) - mean|^2 over training tokens, measured before step 0: the denominator of the training loss."""
    training: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from: data, tokens, seed, code version."""
    metrics: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("d_in", "d_out", "d_sae"):
            if not 1 <= getattr(self, name) <= WIDEST:
                raise ConfigError(
                    f"{name}: {getattr(self, name)} is not a width; it must be at least 1, at most {WIDEST}"
                )
        self.normalization.validate("normalization")
        choices = {"pre_bias": PRE_BIASES, "decoder_norm": DECODER_NORMS, "budget": BUDGETS}
        for name, allowed in {**choices, "encoder": tuple(names(Encoder))}.items():
            choose(name, getattr(self, name), allowed)
        if self.pre_bias == "decoder" and self.d_in != self.d_out:
            raise ConfigError(f"pre_bias: 'decoder' needs d_in = d_out, not {self.d_in} and {self.d_out}")
        if not self.is_autoencoder and self.normalization.per_token:
            raise ConfigError(
                f"normalization.kind: {self.normalization.kind!r} is undone with the input's own numbers, not those "
                "of another site; a transcoder takes none or scalar"
            )
        for name, sites in (("d_in", self.reads), ("d_out", self.writes)):
            if len(sites) > 1 and sum(site.width for site in sites) != getattr(self, name):
                widths = " + ".join(str(site.width) for site in sites)
                raise ConfigError(f"{name}: {getattr(self, name)} is not the sum of the sites' widths {widths}")
        if self.select_by_decoder_norm and self.selection.trains_thresholds:
            raise ConfigError(
                "select_by_decoder_norm: true does not go with trained thresholds, which are of raw latents"
            )
        if self.selection.encoder != (self.encoder if self.encoding.pursues else None):
            name = self.selection.encoder or self.encoder
            raise ConfigError(f"encoder: {name} and the selection of that name go together")
        if self.cross_layer:
            self._check_cross_layer()
        self.rule.validate(self.d_sae // (1 if self.budget == "shared" else self.n_blocks))

    def _check_cross_layer(self) -> None:
        if not self.reads or len(self.reads) != len(self.writes):
            raise ConfigError(f"cross_layer: {len(self.reads)} sites read and {len(self.writes)} written; pair them up")
        if len({site.width for site in self.reads}) > 1 or len({site.width for site in self.writes}) > 1:
            raise ConfigError("cross_layer: the sites that are read must have one width, and those written too")
        if self.d_sae % len(self.reads):
            raise ConfigError(f"d_sae: {self.d_sae} latents cannot be shared equally by {len(self.reads)} layers")
        if self.encoding.pursues or self.pre_bias == "decoder":
            name = "pre_bias: 'decoder'" if self.pre_bias == "decoder" else f"encoder: {self.encoder!r}"
            raise ConfigError(f"{name} does not go with cross_layer")

    @property
    def is_autoencoder(self) -> bool:
        """Returns whether the coder writes the sites that it reads."""
        return self.reads == self.writes and self.d_in == self.d_out

    @property
    def is_placed(self) -> bool:
        """Returns whether it says where in the model the coder reads and writes, which its map does not need."""
        sites = (*self.reads, *self.writes)
        return bool(self.reads and self.writes) and all(site.hook for site in sites)

    @property
    def n_blocks(self) -> int:
        """Returns the number of blocks of latents."""
        return len(self.reads) if self.cross_layer else 1

    @property
    def encoding(self) -> Encoder:
        """Returns the encoder."""
        return Encoder.get_choice_class(self.encoder)()

    @property
    def rule(self) -> Selection:
        """Returns the selection rule as it is asked: of one block, or with the budget of all of them together."""
        return self.selection.shared_by(self.n_blocks) if self.budget == "shared" else self.selection

    def normalize(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n d_in"], Undo]:
        """Returns N(x), and the (shift, spread) with which an output in the normalized space is undone."""
        y, how = by_site(self.normalization, [(site.width, site.scale) for site in self.reads], x)
        return y, how if self.is_autoencoder and self.normalization.undone else self._output_spread(x)

    def normalize_target(self, target: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Returns what the output is to equal in the normalized space: the target itself where nothing is undone."""
        if not self.normalization.undone:
            return target
        return by_site(self.normalization, [(site.width, site.scale) for site in self.writes], target)[0]

    def _output_spread(self, like: Tensor) -> Undo:
        if self.normalization.kind == "none" or not self.normalization.undone:
            return 0.0, 1.0
        sites = [(site.width or self.d_out, site.scale) for site in self.writes] or [(self.d_out, 1.0)]
        factors = [torch.full((width,), 1 / (self.normalization.scale * scale)) for width, scale in sites]
        return 0.0, torch.cat(factors).to(like)

    def to_json(self) -> dict[str, Any]:
        """Returns the spec as plain JSON values; a field newer than the format is there where it says something.

        So older versions read what is written, and what they wrote is that of the same coder: evidence goes by it.
        """
        data: dict[str, Any] = draccus.encode(self)
        if data["normalization"]["undone"]:
            del data["normalization"]["undone"]
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> "CoderSpec":
        """Returns the spec that `to_json` wrote, of this version or an older one; DataError names what is wrong."""
        version = data.get("format_version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise DataError(f"format_version: {version!r} is not a version")
        if version > FORMAT_VERSION:
            raise DataError(f"format_version: {version} is newer than {FORMAT_VERSION}; upgrade sae-interp to read it")
        try:
            return decode(CoderSpec, {**data, "format_version": FORMAT_VERSION})
        except ConfigError as error:
            decoding = error.__cause__  # which hides what the spec says of values that do not go together
            why = decoding.__cause__ if decoding and isinstance(decoding.__cause__, ConfigError) else error
            raise DataError(f"coder spec: {why}") from error

    def with_(self, **changes: Any) -> "CoderSpec":
        """Returns a copy with some fields replaced."""
        return replace(self, **changes)

    def unchecked(self, **changes: Any) -> "CoderSpec":
        """Returns such a copy, of whatever sizes: a shard may have fewer latents than its rule keeps, or none."""
        found = copy(self)
        vars(found).update(changes)
        return found
