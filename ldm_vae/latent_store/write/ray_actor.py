"""The actor of a Ray cluster: a process that keeps a VAE and encodes one unit at a call.

Each opens VAE and DATA by their names, as a process of a launch does, and makes sure that they are those of the driver:
what a node does not see must not become a unit of unreadable images.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ldm_vae import __version__
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import Preparation, preparation_of
from ldm_vae.core.errors import UsageError, WorkError, environment_failure
from ldm_vae.core.launch import build_accelerator
from ldm_vae.core.validation import first_line
from ldm_vae.data.flags import NO_FLAGS, DataFlags
from ldm_vae.data.source import Source
from ldm_vae.data.stream import by_index
from ldm_vae.latent_store.format.manifest import read_manifest
from ldm_vae.latent_store.format.work_units import Unit, source_identity
from ldm_vae.latent_store.write.encoder import Encoder
from ldm_vae.latent_store.write.freshness_cache import Sightings
from ldm_vae.latent_store.write.processes import Job


@dataclass(frozen=True)
class Inputs:
    """Names of a VAE and of DATA, with what it takes to open them in any process."""

    vae: str
    data: str
    config: str | None = None
    flags: DataFlags = NO_FLAGS
    folder: str = field(default_factory=os.getcwd)
    """Relative names are meant from here."""

    def open(self) -> tuple[Any, Preparation, Source]:
        """Load the VAE and open DATA as it takes them. Raises UsageError and WorkError as those do."""
        vae = load_autoencoder(self.vae, self.config)
        preparation = preparation_of({self.vae: vae}, self.flags)
        return vae, preparation, by_index(preparation.open(self.data))


@dataclass
class Told:
    """An answer of an actor: its node, the bad samples of a unit, and its warnings."""

    node: str
    node_id: str
    bad: int = 0
    warnings: list[str] = field(default_factory=list)


class Actor:
    """One process. An error of its calls is a UsageError or a WorkError that names the node."""

    def __init__(self, job: Job, inputs: Inputs, version: str) -> None:
        self._job, self._inputs, self._version = job, inputs, version

    def begin(self) -> Told:
        """Open everything, and compare it with what the driver has opened."""
        with _told() as told:
            wanted = self._job.wanted
            if self._version != __version__:
                raise WorkError(f"ldm-vae: expected version {self._version}, that of the driver, got {__version__}")
            with contextlib.suppress(OSError):  # no such folder here: absolute names and URLs need none
                os.chdir(self._inputs.folder)
            device = build_accelerator(wanted.identity.mixed_precision).device
            vae, _, self._source = self._inputs.open()
            if encoder_fingerprint(vae) != wanted.identity.encoder:
                raise UsageError(f"VAE {self._inputs.vae}: expected the driver's, got another encoder under its name")
            if (found := source_identity(self._source)) != wanted.source:
                raise UsageError(
                    f"DATA {self._inputs.data}: expected the driver's {wanted.source.samples:,} images, got "
                    f"{found.samples:,} with other keys"
                )
            read_manifest(self._job.out)  # the sentence of a folder that only the driver sees
            self._job.owner.check()
            self._encoder = Encoder(vae, wanted.identity, batch_size=self._job.batch_size, device=device)
            self._sightings = Sightings(self._job.out)
        return told

    def encode(self, unit: Unit) -> Told:
        """Encode and publish one unit."""
        with _told() as told:
            told.bad = self._job.encode(self._source, self._encoder, [unit], self._sightings, show=False)
        return told


@contextlib.contextmanager
def _told() -> Iterator[Told]:
    """An answer, with the warnings of the block; its errors name the node."""
    import ray

    told = Told(socket.gethostname(), ray.get_runtime_context().get_node_id())
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ldm_vae").addHandler(handler)
    try:
        yield told
    except (UsageError, WorkError) as error:
        raise type(error)(f"node {told.node}: {error}") from None
    except Exception as error:
        said = environment_failure(error) or f"{type(error).__name__}: {first_line(error)}"
        raise WorkError(f"node {told.node}: {said}") from error
    finally:
        logging.getLogger("ldm_vae").removeHandler(handler)
