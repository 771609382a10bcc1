"""Compare residual codes of a codec with Opus at the same bits per second, on whole sounds.

    python -m eval.opus runs/demo_audio data/sounds/heldout --output compared

For each number of --codebooks the first so many codes are decoded; their rate is log2 K bits for each code, without an
entropy coder. Opus is libopus by PyAV (application audio, frames of 20 ms, complexity 10, variable rate) at that rate,
or a little more where it would stay below, counted in packets without a container. Its sound is shifted to where it
fits best, as its resampling delays it; ours is not. SI-SDR and mel distance are means over sounds with 95 % intervals.

DIR then holds opus.json, opus.md and, to listen to, NAME.original.wav and NAME.CODER-RATE.wav.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.codebooks import ResidualCodebooks, beside
from ldm_vae.autoencoder.geometry import downsampling_factor
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import preparation_of
from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.progress import Progress
from ldm_vae.core.request import Parser
from ldm_vae.data.footage import Video
from ldm_vae.data.named_images import find_images
from ldm_vae.data.sounds import crops_of, write_sound
from ldm_vae.metrics import result
from ldm_vae.metrics.evaluate import measure
from ldm_vae.metrics.running import Running

Json = dict[str, Any]
METRICS = ("si_sdr", "mel_distance")
OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)  # of sounds that libopus takes
LONGEST_SHIFT = 0.02  # seconds


def arguments() -> argparse.Namespace:
    parser = Parser(program="eval.opus", description=__doc__)
    add = parser.add_argument
    add("vae", metavar="VAE", help="run or folder of a codec of mono sounds with residual codes")
    add("data", nargs="+", type=Path, metavar="SOUND", help="sound files, and folders of them")
    add("--output", required=True, type=Path, metavar="DIR", help="where the results go")
    add("--codebooks", type=int, nargs="+", metavar="K", help="numbers of codes (default: half of them, and all)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    vae = load_autoencoder(options.vae)
    decoding = replace(preparation_of({options.vae: vae}).decoding, samples=None)
    books, rate = beside(vae), decoding.sample_rate or 0
    if not isinstance(books, ResidualCodebooks):
        raise UsageError(f"VAE {options.vae}: expected residual codes (quantizer.kind residual), it has none")
    if rate not in OPUS_RATES or decoding.channels != 1:
        raise UsageError(
            f"VAE {options.vae}: expected mono sounds of {', '.join(map(str, OPUS_RATES))} Hz, of Opus, it has "
            f"{decoding.channels} channels of {rate} Hz"
        )
    counts = options.codebooks or [max(1, books.shape.codebooks // 2), books.shape.codebooks]
    if odd := [count for count in counts if not 1 <= count <= books.shape.codebooks]:
        raise UsageError(f"--codebooks: expected 1 to {books.shape.codebooks}, got {odd[0]}")
    hop = downsampling_factor(vae)
    targets = {count: count * math.log2(books.shape.codes) * rate / hop for count in counts}

    options.output.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str, int], Json] = {}
    seconds = 0.0
    for found in Progress(find_images(options.data, sounds=True), "sounds", unit="sounds"):
        (crop,), _ = crops_of(Video(str(found.path)), decoding)
        sound = crop.pixels[:, : crop.box[3] // hop * hop]  # whole hops; Opus gets no more
        seconds += sound.shape[1] / rate
        name = found.path.stem
        write_sound(options.output / f"{name}.original.wav", sound, rate)
        with torch.inference_mode():
            indices = books.indices(latents.encode(vae, sound[None]).mean)
        for count, target in targets.items():
            with torch.inference_mode():
                ours = latents.pixels_of(vae, books.vectors(indices[:, :count]), force_not_quantize=True)[0]
            packets = packets_at(sound[0].numpy(), rate, target)
            theirs = torch.from_numpy(aligned(opus_sound(packets, rate), sound[0].numpy(), rate))[None]
            for coder, heard, bits in (
                ("ours", ours, target * sound.shape[1] / rate),
                ("Opus", theirs, 8.0 * sum(map(len, packets))),
            ):
                row = rows.setdefault(
                    (coder, count), {"bits": 0.0, "metrics": {metric: Running() for metric in METRICS}, "sounds": {}}
                )
                values = measure(sound[None], heard[None], metrics=METRICS, sample_rate=rate)
                for metric in METRICS:
                    row["metrics"][metric].update(values[metric])
                row["bits"] += bits
                row["sounds"][name] = {metric: float(values[metric]) for metric in METRICS}
                write_sound(options.output / f"{name}.{coder.lower()}-{round(target)}.wav", heard, rate)

    table = [
        {
            "coder": coder, "codebooks": count,  # of Opus: those at whose rate it is
            "bits_per_second": row["bits"] / seconds, "sounds": row["sounds"],
            **{metric: running.summary().to_json() for metric, running in row["metrics"].items()},
        }
        for (coder, count), row in rows.items()
    ]  # fmt: skip
    text = markdown(table)
    result.write(options.output / "opus.json", {"seconds": seconds, "rows": table} | result.command("eval.opus"))
    result.write(options.output / "opus.md", text + "\n")
    print(text)


def packets_at(samples: Any, rate: int, target: float) -> list[bytes]:
    """Opus packets of samples float32 [L] of at least so many bits per second."""
    packets: list[bytes] = []
    for more in (1.0, 1.05, 1.1, 1.2, 1.4):  # at low rates libopus stays below what it is asked for by a few per cent
        packets = opus_packets(samples, rate, round(more * target))
        if 8 * sum(map(len, packets)) >= target * len(samples) / rate:
            break
    return packets


def opus_packets(samples: Any, rate: int, bits_per_second: int) -> list[bytes]:
    """Opus packets of samples float32 [L]."""
    import av

    codec: Any = av.CodecContext.create("libopus", "w")
    codec.sample_rate, codec.layout, codec.format, codec.bit_rate = rate, "mono", "flt", bits_per_second
    codec.time_base = Fraction(1, rate)
    codec.options = {"application": "audio", "vbr": "on", "frame_duration": "20", "compression_level": "10"}
    size, packets = rate // 50, []
    for start in range(0, len(samples), size):
        part = np.pad(samples[start : start + size], (0, max(0, start + size - len(samples))))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part[None], dtype=np.float32), "flt", "mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        packets += codec.encode(frame)
    return [bytes(packet) for packet in [*packets, *codec.encode(None)]]


def opus_sound(packets: list[bytes], rate: int) -> Any:
    """Opus packets => samples float32 [L'], by FFmpeg's decoder, which gives 48 kHz."""
    import av

    codec: Any = av.CodecContext.create("libopus", "r")
    codec.sample_rate, codec.layout = 48_000, "mono"
    resampler = av.AudioResampler("flt", "mono", rate)
    frames = [frame for packet in packets for frame in codec.decode(av.Packet(packet))]
    parts = [part for frame in [*frames, None] for part in resampler.resample(frame)]
    return np.concatenate([part.to_ndarray()[0] for part in parts])


def aligned(heard: Any, original: Any, rate: int) -> Any:
    """`heard` shifted by up to LONGEST_SHIFT to where it fits `original` [L] best, at its length."""
    size, reach = len(original), int(LONGEST_SHIFT * rate)
    heard = np.pad(heard, (0, max(0, size + reach - len(heard))))
    spectra = [np.fft.rfft(one[: size + reach], 2 * (size + reach)) for one in (heard, original)]
    fits = np.fft.irfft(spectra[0] * spectra[1].conj())[: reach + 1]
    shift = int(np.argmax(fits))  # the decoder's delay is never negative
    return np.ascontiguousarray(heard[shift : shift + size], dtype=np.float32)


def markdown(rows: list[Json]) -> str:
    """A row for each coder and rate."""
    lines = ["| coder | bits per second | SI-SDR, dB | mel distance |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["codebooks"], row["coder"] == "Opus")):
        cells = [f"{row[metric]['mean']:.2f}" for metric in METRICS]
        coder = row["coder"] if row["coder"] == "Opus" else f"{row['coder']}, {row['codebooks']} codes"
        lines.append(f"| {coder} | {row['bits_per_second']:,.0f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
