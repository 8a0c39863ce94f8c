"""What `compiled.Passes` are called with: layers, what stands in for heads, and the batch."""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from mechgrok.replicas.distinct import Beginnings
from mechgrok.replicas.network import Norm
from mechgrok.replicas.packing import Linear

LINEARS = ("q", "rest", "out", "mlp_in", "mlp_out")


@dataclass(frozen=True)
class Layer:
    """What a layer computes with, heads side by side as in `network.Reads`. out: W_O and b_O. scale: of the scores."""

    norm: Norm
    q: Linear | None
    rest: Linear
    out: Linear
    n_heads: int
    scale: float
    mlp_norm: Norm | None = None
    mlp_in: Linear | None = None
    mlp_out: Linear | None = None

    def linears(self) -> list[Linear | None]:
        return [getattr(self, name) for name in LINEARS]

    def shape(self) -> tuple[Hashable, ...]:
        """All but the numbers."""
        norms = (None if norm is None else norm.kind() for norm in (self.norm, self.mlp_norm))
        return *_shapes(self.linears()), *norms, self.n_heads, self.scale


@dataclass(frozen=True)
class Heads:
    """Where heads of the first layer stand in for the model's own.

    normalized: what they read, Float[example, pos, d_model], of some examples. z: of the model's own, Float[head,
    example, row, d_head]. index: which of those examples the batch has, Int[chain, example].
    before: -W_O of the model's own, Float[head, d_head, d_model].

    What reads the residual stream next sees a head through its own rank: the MLP of the layer, or q, k, v of the next,
    or the readout. read: W by which it reads, None where the rank is of no use; before_read: -W_O W before.

    kept: where that is the readout, the logits of resid but for their bias, Float[example, scored, padded n_classes].
    """

    normalized: Tensor
    z: Tensor
    index: Tensor
    before: Linear
    read: Linear | None = None
    before_read: Linear | None = None
    kept: Tensor | None = None

    def n_kept(self) -> int:
        """Of how many examples it tells."""
        return self.z.shape[1]

    def linears(self) -> list[Linear | None]:
        return [self.before, self.before_read, self.read]


@dataclass(frozen=True)
class Direct:
    """The same where neurons and logits read heads of a last layer and no norm stands before them; see `direct`.

    read, logits: W_in and W_U. kept: what is read besides, but for the logits' bias, of
    each head and some examples, Float[head, example, scored, padded d_mlp + padded n_classes]; normalized, index: as
    above. The readout that goes with it reads the neurons.
    """

    normalized: Tensor
    read: Linear
    logits: Linear
    kept: Tensor
    index: Tensor

    def n_kept(self) -> int:
        """Of how many examples it tells."""
        return self.kept.shape[1]

    def linears(self) -> list[Linear | None]:
        return [self.read, self.logits]


@dataclass(frozen=True)
class Call:
    """One call of `compiled.Passes.run`, what its own `__call__` takes, and heads.

    resid: with `heads` Float[example, row, d_model], after the first layer's attention, at the positions that are read
    afterwards; of no use where these are `Direct`. begun: with `heads` what they read is of the distinct rows,
    Float[chain, distinct row, d_model].
    """

    layers: tuple[Layer, ...]
    readout: Linear
    resid: Tensor
    heads: Heads | Direct | None
    n_replicas: int
    targets: Tensor
    weights: Tensor
    begun: Beginnings | None

    def linears(self) -> list[Linear]:
        """Each that is there, once."""
        found = [*(linear for layer in self.layers for linear in layer.linears()), self.readout]
        found += [] if self.heads is None else self.heads.linears()
        return list({id(linear): linear for linear in found if linear is not None}.values())

    def shape(self) -> Hashable:
        """All that says where the passes have their numbers, but for how many distinct rows the batch has."""
        heads = self.heads
        given = None if heads is None else (type(heads), *_shapes(heads.linears()), heads.n_kept())
        layers = (layer.shape() for layer in self.layers)
        return *layers, self.readout.shape(), given, self.n_replicas, self.targets.shape


def _shapes(linears: list[Linear | None]) -> tuple[Hashable, ...]:
    return tuple(None if linear is None else linear.shape() for linear in linears)
