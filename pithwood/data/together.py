"""The corpus of a run of several processes: the first makes it, the others open what it made."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from pathlib import Path

from pithwood.data.corpus import Corpus
from pithwood.data.mixture import Mixture, MixtureConfig, open_places, places_of
from pithwood.data.prepare import CorpusConfig
from pithwood.parallel.faults import Watch
from pithwood.parallel.mesh import Mesh

Data = Corpus | Mixture


def open_together(
    cfg: CorpusConfig | MixtureConfig, cache_dir: Path, mesh: Mesh, watch: Watch, make: Callable[[], Data | None]
) -> Data | None:
    """What `make` gives in the mesh's first process, `open_data` of the same configuration, however long it takes; the
    others open the same folders, in which it has checked every byte, and read no source. All processes call this.

    returns  None in all processes if make does: something stopped it
    raises   ValueError in a process that does not see the folders, and what make raises in the first
    """
    watch.phase("preparing data", math.inf)
    data = make() if mesh.is_first else None
    watch.phase("waiting for the corpus", math.inf)
    mesh.world.await_first()
    places = mesh.world.agree(places_of(data, cache_dir) if data is not None else None)
    if places is None or mesh.is_first:
        return data
    watch.phase("opening the corpus", math.inf)
    for folder in (cache_dir / place for place in places.values()):
        if not folder.exists():
            raise ValueError(
                f"process {mesh.rank} on {platform.node()} does not see {folder}, the corpus that the first process "
                "made; put the folder of the runs (--runs-dir) where all hosts see it"
            )
    return open_places(cfg, cache_dir, places)
