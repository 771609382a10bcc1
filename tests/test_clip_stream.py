"""Clips chunk by chunk: in any chunking what the whole clip gives, in memory that does not depend on its length."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sentences import refused
from tiny_classes import CLIP_CONFIGS, clips_for, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.clip_stream import decode_clip, encode_clip, is_streamed
from ldm_vae.autoencoder.lengths import lengths_of
from ldm_vae.core.errors import UsageError

STREAMED = ["AutoencoderKLQwenImage", "AutoencoderKLWan", "AutoencoderKLWan 2.2", "Kandinsky6SRVAE"]


def test_which_classes_are_streamed() -> None:
    assert [name for name in sorted(CLIP_CONFIGS) if is_streamed(tiny(name))] == STREAMED


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("sizes", [[1] * 33, [5, 7, 21], [3, 30]])
def test_any_chunking_gives_the_whole_clip(name: str, sizes: list[int]) -> None:
    vae = tiny(name).double()
    clip = torch.rand(1, 3, 33, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        whole = latents.encode(vae, clip)
        parts = [*encode_clip(vae, clip.split(sizes, dim=2))]
        for field in ("mean", "logvar"):
            together = torch.cat([getattr(part, field) for part in parts], dim=2)
            torch.testing.assert_close(together, getattr(whole, field), rtol=1e-12, atol=1e-12)
        decoded = latents.decode(vae, whole.mean)
        for cut in (1, 7):
            shown = torch.cat([*decode_clip(vae, whole.mean.split(cut, dim=2))], dim=2)
            torch.testing.assert_close(shown, decoded, rtol=1e-12, atol=1e-12)
    assert len(parts) > 1 and float(decoded.std()) > 0


def test_two_streams_of_one_network_do_not_meet() -> None:
    vae = tiny("AutoencoderKLWan")
    one, two = clips_for(vae, 1, seed=1), clips_for(vae, 1, seed=2)
    with torch.no_grad():
        streams = [encode_clip(vae, clip.split(1, dim=2)) for clip in (one, two)]
        pairs = [*zip(*streams, strict=True)]
        for clip, parts in zip((one, two), zip(*pairs, strict=True), strict=True):
            torch.testing.assert_close(torch.cat([part.mean for part in parts], 2), latents.encode(vae, clip).mean)


@pytest.mark.parametrize("name", ["AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo"])
def test_a_class_with_statistics_over_time_is_given_the_whole_clip(name: str) -> None:
    vae = tiny(name).double()
    clip = clips_for(vae, 1).double()
    with torch.no_grad():
        (found,) = encode_clip(vae, clip.split(4, dim=2))
        assert torch.equal(found.mean, latents.encode(vae, clip).mean)
        (shown,) = decode_clip(vae, found.mean.split(1, dim=2))
        assert torch.equal(shown, latents.decode(vae, found.mean))
        # later frames are seen by earlier latents, or norms are over all of them: halves are not the whole
        first = latents.encode(vae, clip[:, :, : lengths_of(vae).first]).mean
        assert not torch.allclose(first, found.mean[:, :, :1], rtol=1e-6)


def test_a_clip_that_ends_between_is_refused() -> None:
    vae = tiny("AutoencoderKLWan")
    with torch.no_grad(), refused(UsageError, "T"):
        [*encode_clip(vae, torch.zeros(1, 3, 7, 16, 16).split(2, dim=2))]
    with torch.no_grad(), refused(UsageError, "T"):
        [*encode_clip(tiny("Kandinsky6SRVAE"), torch.zeros(1, 3, 15, 16, 16).split(2, dim=2))]


class Largest(TorchDispatchMode):
    """The most bytes of one tensor that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        sizes = [one.untyped_storage().nbytes() for one in tree_leaves(found) if torch.is_tensor(one)]
        self.bytes = max([self.bytes, *sizes])
        return found


def parts(count: int, size: int, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    for start in range(0, count, size):
        yield torch.zeros(1, shape[0], min(size, count - start), *shape[1:])


@pytest.mark.parametrize("name", STREAMED)
def test_memory_does_not_depend_on_the_length(name: str) -> None:
    vae, most = tiny(name), []
    shape = tuple(latents.encode(vae, torch.zeros(1, 3, 16, 16)).mean.shape[1:])
    for frames in (33, 65):
        with torch.no_grad(), Largest() as largest:
            count = sum(part.mean.shape[2] for part in encode_clip(vae, parts(frames, 6, (3, 16, 16))))
            shown = sum(part.shape[2] for part in decode_clip(vae, parts(count, 3, shape)))
        assert shown == frames
        most.append(largest.bytes)
    assert most[0] == most[1] > 0


@pytest.mark.slow
def test_two_thousand_frames_take_no_more_memory_than_a_hundred() -> None:
    vae, peaks = tiny("AutoencoderKLWan"), []
    with torch.no_grad():
        for frames in (101, 2_001):
            moments = encode_clip(vae, parts(frames, 16, (3, 32, 32)))
            shown = sum(part.shape[2] for part in decode_clip(vae, (part.mean for part in moments)))
            assert shown == frames
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB, the most so far
    assert peaks[1] - peaks[0] < 12 * 1024  # the clip alone is 24 MB in fp32
