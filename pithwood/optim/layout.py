"""Where the pieces of a parameter lie on a mesh: pure functions of sizes, the same in every process.

Processes of one pipeline stage that divide weights are numbered by their fold, their rank in `mesh.shard`. Dense
weights are cut between all folds; experts lie in `ep` parts, fold f having part f % ep, and each part is cut between
its folds. What cannot be cut into equal parts is held whole by all who would divide it, and replicas hold the same
pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

from pithwood.parallel.mesh import Mesh
from pithwood.parallel.pieces import Piece


@dataclass(frozen=True)
class Place:
    """A process among those of its pipeline stage."""

    replicas: int = 1
    folds: int = 1
    ep: int = 1
    replica: int = 0
    fold: int = 0

    @staticmethod
    def on(mesh: Mesh) -> Place:
        return Place(mesh.replicate.size, mesh.shard.size, mesh.ep.size, mesh.replicate.rank, mesh.shard.rank)

    @property
    def alone(self) -> bool:
        return self.replicas * self.folds == 1


@dataclass(frozen=True)
class Division:
    """How a parameter is divided between folds."""

    shape: tuple[int, ...]
    """Of the whole."""
    experts: bool
    cut: bool
    """Whether those who could divide it do; else each of them holds all of it."""

    def piece(self, place: Place, fold: int) -> Piece:
        """What a fold holds."""
        whole = Piece.whole(self.shape)
        part = whole.part(fold % place.ep, place.ep) if self.experts else whole
        if not self.cut:
            return part
        return part.part(fold // place.ep, place.folds // place.ep) if self.experts else part.part(fold, place.folds)

    def counts_here(self, place: Place) -> bool:
        """Whether this process is the one whose elements count in a sum over all processes, and who writes them."""
        first = place.fold // place.ep == 0 if self.experts else place.fold == 0
        return place.replica == 0 and (self.cut or first)


def find_division(name: str, piece: Piece, kind: str, place: Place) -> Division:
    """The division of which this process holds `piece`; ValueError if the mesh has none."""
    experts = kind == "experts"
    if experts and piece.shape[0] % place.ep:
        raise ValueError(f"{name}: mesh.ep={place.ep} must divide its {piece.shape[0]} experts")
    whole = Division(piece.shape, experts, cut=False)
    if piece == whole.piece(place, place.fold):
        return whole
    sharers = place.folds // place.ep if experts else place.folds
    part = whole.piece(place, place.fold)
    allowed = f"{part.start}:{part.stop}"
    if part.numel % sharers == 0:
        cut = Division(piece.shape, experts, cut=True)
        mine = cut.piece(place, place.fold)
        if piece == mine:
            return cut
        allowed += f" or {mine.start}:{mine.stop}"
    raise ValueError(
        f"{name}: this process holds elements {piece.start}:{piece.stop} of shape {piece.shape}, but as number "
        f"{place.fold} of {place.folds} it should hold {allowed}"
    )
