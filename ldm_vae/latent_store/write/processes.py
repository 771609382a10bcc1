"""Processes: how the work on a store is shared among the processes of a launch, among launches that do not communicate,
and with an engine that has processes of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ldm_vae.core.ownership import WHOLE, Part
from ldm_vae.data.source import Source
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.work_units import Unit
from ldm_vae.latent_store.storage.claims import Owner
from ldm_vae.latent_store.storage.places import Place
from ldm_vae.latent_store.write import sample_stream
from ldm_vae.latent_store.write.crops import Cutting
from ldm_vae.latent_store.write.encoder import Encoder
from ldm_vae.latent_store.write.freshness_cache import Sightings
from ldm_vae.latent_store.write.pipeline import Pipeline


@dataclass(frozen=True)
class Job:
    """The part of the work on a plan that any process can do, on any machine; it is sent as it stands."""

    out: Place
    wanted: Manifest
    digest: str
    """Of the plan, which the records carry."""
    owner: Owner
    cutting: Cutting
    batch_size: int
    num_workers: int
    threads: int

    def encode(
        self, source: Source, encoder: Encoder, units: Sequence[Unit], sightings: Sightings, *, show: bool
    ) -> int:
        """Encode these units, of which each has its record when this returns; how many of their samples are bad.

        Args:
            sightings: those of this process, which are added to.
            show: whether this process has the progress bar.
        """
        name, batch_size = self.wanted.recorded.data, encoder.batch_size
        stream = sample_stream.samples(source, name, self.cutting, units, batch_size, self.num_workers)
        pipeline = Pipeline(self.out, encoder, self.digest, self.owner, threads=self.threads, show=show)
        pipeline.run(sample_stream.noted(stream, sightings), sum(len(unit.indices) for unit in units))
        return pipeline.bad


Engine = Callable[[Job, Sequence[Unit]], None]
"""Has the units of a job encoded by processes of its own; each has its record when it returns."""


@dataclass(frozen=True)
class Processes:
    """This process, all of its launch, how they wait for each other; the launch's part where several share a job
    without communication; and the engine that encodes in place of this process."""

    rank: int = 0
    count: int = 1
    barrier: Callable[[], None] = lambda: None
    part: Part = WHOLE
    engine: Engine | None = None

    @property
    def launch(self) -> slice:
        """The launch's share of a list that all parts see alike."""
        return slice(self.part.index - 1, None, self.part.count)

    @property
    def own(self) -> slice:
        """This process's share of that list."""
        return slice(self.part.index - 1 + self.part.count * self.rank, None, self.part.count * self.count)
