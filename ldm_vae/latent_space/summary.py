"""Summary of latent_space.json in words and tables; for a terminal, a Markdown file and the page. It needs no torch."""

from __future__ import annotations

from typing import Any

from ldm_vae.metrics.result import how_decoded, in_words, noun
from ldm_vae.metrics.titles import Title, amount

Json = dict[str, Any]

# by name in latent_space.json, in the order of every table
TITLES = {
    "psnr": Title("PSNR", "dB", 2, "higher", "Of the posterior's mode, decoded: the distortion."),
    "snr": Title("SNR", "dB", 2, "higher", "Of the posterior's mode, decoded: the distortion."),
    "mse": Title(
        "MSE", "", 5, "lower", "Of a posterior sample, decoded and clamped to [-1, 1]: what the bound is made of."
    ),
    "rate_nats": Title("Rate", "nats/image", 1, "lower", "KL of the posterior to N(0, I): what the latent may cost."),
    "bits_per_pixel": Title("Rate", "bits/pixel", 4, "lower", "The same, per pixel of the image."),
    "bits_per_sample": Title("Rate", "bits/sample", 4, "lower", "The same, per sample of the sound."),
    "elbo_bits": Title("ELBO", "bits/dim", 4, "lower", "Bound of -log p(x) from one posterior sample."),
    "iwae_16_bits": Title("Bound, K = 16", "bits/dim", 4, "lower", "The same from 16 weighted samples."),
    "iwae_64_bits": Title("Bound, K = 64", "bits/dim", 4, "lower", "From 64: never above the ELBO."),
    "high_frequency_share": Title(
        "High frequencies", "of power", 4, "lower", "Share of the latents' power above 0.25 cycles per position."
    ),
    "equivariance_scale_0.5": Title("Error under scale 0.5", "", 4, "lower", "E(Tx) against T E(x); 0: they commute."),
    "equivariance_rotate_90": Title("Error under 90°", "", 4, "lower", "The same for a quarter turn."),
    "equivariance_rotate_180": Title("Error under 180°", "", 4, "lower", "Half a turn."),
    "equivariance_rotate_270": Title("Error under 270°", "", 4, "lower", "Three quarters."),
    "equivariance_psnr_scale_0.5": Title("PSNR under scale 0.5", "dB", 2, "higher", "D(T E(x)) against T x."),
    "equivariance_psnr_rotate_90": Title("PSNR under 90°", "dB", 2, "higher", "The same for a quarter turn."),
    "equivariance_psnr_rotate_180": Title("PSNR under 180°", "dB", 2, "higher", "Half a turn."),
    "equivariance_psnr_rotate_270": Title("PSNR under 270°", "dB", 2, "higher", "Three quarters."),
}


def rows(result: Json) -> list[Json]:
    """Table rows, one a metric: heading, arrow, value, interval (two cells or None), meaning."""
    found = []
    for name, title in TITLES.items():
        summary = result["metrics"].get(name)
        if summary is None or summary["mean"] is None:
            continue
        ends = [f"{end:.{title.decimals}f}" for end in summary["ci95"]] if summary["ci95"] else None
        heading = f"{title.heading} ({title.unit})" if title.unit else title.heading
        heading, meaning = (in_its_words(result, text) for text in (heading, title.meaning))
        found.append(
            {
                "heading": heading,
                "arrow": "↑" if title.better == "higher" else "↓",
                "value": f"{summary['mean']:.{title.decimals}f}",
                "interval": ends,
                "meaning": meaning,
            }
        )
    return found


def in_its_words(result: Json, text: str) -> str:
    """A text on images for what was measured: of sounds another word, and samples are not clamped."""
    if "sounds" not in result["data"]:
        return text
    return text.replace("image", "sound").replace(", decoded and clamped to [-1, 1]", ", decoded")


# --- sentences --------------------------------------------------------------------------------------------------------


def about_channels(result: Json) -> str:
    """Sentence on the channels: how many carry something, how Gaussian and how independent they are."""
    channels = result["channels"]
    count, active = len(channels["mean"]), sum(channels["active"])
    heavy = max(channels["excess_kurtosis"], key=abs)
    parts = [f"{active} of {count} {plural('channel', count)} active (the variance of their mean is above 0.01)"]
    parts.append(f"largest excess kurtosis {heavy:+.2f} (a Gaussian has 0)")
    if count > 1:
        strongest = max(
            (abs(value), row, column)
            for row, line in enumerate(channels["correlation"])
            for column, value in enumerate(line[:row])
        )
        value = channels["correlation"][strongest[1]][strongest[2]]
        parts.append(f"strongest correlation {value:+.2f}, of channels {strongest[2]} and {strongest[1]}")
    return "; ".join(parts) + "."


def about_codes(result: Json) -> str | None:
    """Sentence on the use of codes over the whole set, a clause for each codebook; None without codebooks."""
    found = result.get("codes")  # absent from what earlier versions measured
    if not found:
        return None
    parts = []
    for number, book in enumerate(found):
        name = "codebook" if len(found) == 1 else f"codebook {number}"
        parts.append(
            f"{name}: {book['used']:,} of {book['codes']:,} codes used in {book['count']:,} positions, "
            f"{book['dead']:,} dead, perplexity {book['perplexity']:,.1f} ({book['entropy_bits']:.2f} bits)"
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def about_information(result: Json) -> str:
    """Mutual information and the gap to the prior, or why there are none."""
    found = result["information"]
    if found is None:
        return without_information(result)
    (low, high), (near, far) = found["mutual_information_nats"], found["prior_gap_nats"]
    images, cap = found["images"], found["cap_nats"]
    if found["saturated"]:
        return (
            f"I(x; z) is at least {low:.2f} nats, and {images:,} images cannot show more than log {images:,} = "
            f"{cap:.2f}: each image is told from all others, and how much more the latent knows of it these images "
            f"cannot say. Of the rate of {found['rate_nats']:,.1f} nats, KL(q(z)||p(z)), the gap to the prior, is "
            f"{near:,.1f} to {far:,.1f}."
        )
    return (
        f"I(x; z), what the latent knows of the image, is {low:.2f} to {high:.2f} nats; KL(q(z)||p(z)), the gap to the "
        f"prior, is {near:.2f} to {far:.2f}. Together they are the rate, {found['rate_nats']:.2f} nats. ({images:,} "
        f"images could show at most log {images:,} = {cap:.2f} nats.)"
    )


def without_information(result: Json) -> str:
    """Sentence on the missing rate of an encoder, and of all that is computed from it."""
    if result["data"]["images"] < 2:
        return "One image has no others to be told from."
    return "The encoder gives no variance, so there is no rate, no mutual information and no likelihood bound."


def about_likelihood(result: Json) -> str | None:
    """Sentence on the likelihood bounds: the settings they were computed with, and their variation."""
    found = result["likelihood"]
    if found is None:
        return None
    spread = ", ".join(f"{value:.1g} (K = {count})" for count, value in found["spread_bits"].items())
    few = (
        " So few carry the estimate that more draws would hardly move it: in so many dimensions read it as the ELBO."
        if found["effective_samples"] < 2
        else ""
    )
    return (
        f"Likelihood: Gaussian per pixel value, deviation {127.5 * found['variance'] ** 0.5:.2f} grey levels, fitted "
        f"on every other image; {found['images']:,} of the others, {found['repeats']} repeats, whose means deviate by "
        f"{spread} bits. Of 64 draws {found['effective_samples']:.1f} count.{few}"
    )


def about_normal(result: Json) -> str:
    """Sentence on samples of N(0, I): why they look as they do, from the numbers of this latent space."""
    channels, found = result["channels"], result["information"]
    if found is None:
        return ""
    std = sum(channels["std"]) / len(channels["std"])
    noise = sum(channels["posterior_std"]) / len(channels["posterior_std"])
    near = found["prior_gap_nats"][0]
    values = result["vae"]["latent_values"]
    # nats in each number; and a lower bound of them, which no dependence of positions enters: it says nothing of a
    # posterior that is far narrower than the prior
    if near < 0.5 * values and noise > 0.1:
        return (
            "The prior of the evidence bound. The KL had weight in training: latents of images and draws from N(0, I) "
            "lie in the same place, so the decoder makes images of both."
        )
    return (
        "The prior of the evidence bound, but not of these latents: at a KL weight of about 1e-6 nothing pulls them "
        f"to it. A channel deviates by {std:.2f} where N(0, I) has 1, the posterior's own noise is {noise:.2g} where a "
        "posterior near the prior would have 1, and neighbours depend on each other where N(0, I) draws each of "
        f"{values:,} numbers alone. KL(q(z)||p(z)) is {near:,.0f} nats or more: no image was ever encoded near such a "
        "draw, and the decoder makes noise of it. That is no fault: a diffusion model learns q(z) instead."
    )


def plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


# --- tables -----------------------------------------------------------------------------------------------------------


def channel_rows(result: Json) -> list[list[str]]:
    """Table rows, one a channel: number, mean, deviation, posterior's deviation, excess kurtosis, KL, active."""
    found = result["channels"]
    count = len(found["mean"])
    noise, kl = (found[name] or [None] * count for name in ("posterior_std", "kl_nats_per_image"))
    return [
        [
            str(channel),
            f"{found['mean'][channel]:+.3f}",
            f"{found['std'][channel]:.3f}",
            "" if noise[channel] is None else f"{noise[channel]:#.3g}",
            f"{found['excess_kurtosis'][channel]:+.2f}",
            "" if kl[channel] is None else amount(kl[channel]),
            "yes" if found["active"][channel] else "no",
        ]
        for channel in range(count)
    ]


CHANNEL_HEADS = ("channel", "mean", "deviation", "posterior noise", "excess kurtosis", "KL, nats", "active")


def markdown(result: Json) -> str:
    """latent_space.md: the metrics, the sentences, the channels, and what it takes to compare them."""
    lines = [f"# The latent space of {result['vae']['name']}", "", "| | mean | 95 % interval |", "|---|---:|---:|"]
    for row in rows(result):
        ends = f"{row['interval'][0]} to {row['interval'][1]}" if row["interval"] else "-"
        lines.append(f"| {row['heading']} {row['arrow']} | {row['value']} | {ends} |")
    lines += ["", *_paragraphs(result), f"| {' | '.join(CHANNEL_HEADS)} |", f"|{'---:|' * len(CHANNEL_HEADS)}"]
    lines += [f"| {' | '.join(row)} |" for row in channel_rows(result)]
    data = result["data"]
    crops = "" if "sounds" in data else f"{data['resolution']} px centre crops, "
    lines += [
        "",
        f"{data['images']:,} {noun(data)}{in_words(data)} of {data['source']}, {crops}"
        f"checksum {data['checksum'][:12]}; protocol {result['protocol']['name']} {result['protocol']['version']}."
        f"{how_decoded(data)}",
    ]
    return "\n".join(lines) + "\n"


def plain(result: Json) -> str:
    """The summary as plain text, for a terminal."""
    found = rows(result)
    width = max(len(row["heading"]) for row in found) + 2
    lines = []
    for row in found:
        ends = f"  ({row['interval'][0]} to {row['interval'][1]})" if row["interval"] else ""
        lines.append(f"{row['heading']} {row['arrow']}".ljust(width + 2) + row["value"].rjust(10) + ends)
    return "\n".join([*lines, "", *_paragraphs(result)]).rstrip()


def _paragraphs(result: Json) -> list[str]:
    found = [about_channels(result), about_codes(result), about_information(result), about_likelihood(result)]
    return [line for sentence in found if sentence for line in (in_its_words(result, sentence), "")]
