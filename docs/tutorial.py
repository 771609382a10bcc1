# %% [markdown]
# # From photographs to a diffusion model's samples
#
# This page trains an autoencoder on nine photographs, caches their latents, trains a diffusion model on them and
# samples from it. It is a notebook (`docs/tutorial.ipynb`); all output below is of one run of it, on one core of a CPU,
# on 2026-11-29. The two trainings are much shorter than is useful: the point is the order of work and what each step
# gives.
#
# Lines that begin with `!` are shell commands. Everything is written below the current folder.

# %% [markdown]
# ## The images
#
# `ldm-vae assets demo` writes photographs of scikit-image and scikit-learn (public domain or free licences, see
# `photos/ATTRIBUTION.md`): seven for training and two that are held out, whole in `photos/photographs` and cut into
# tiles of 96 px in `photos/train` and `photos/heldout`. A folder of your own images would do as well; the pages on
# [data](data.md) name the other sources.

# %%
# !ldm-vae assets demo photos

# %% [markdown]
# Look at a dataset before training on it: sizes, formats, files that cannot be read, and whether the values use their
# range.

# %%
# !ldm-vae inspect photos/train

# %% [markdown]
# ## The autoencoder
#
# An autoencoder of latent diffusion has an encoder, which maps an image of H x W pixels to a posterior with a mean
# and a variance at each of H/f x W/f positions, and a decoder, which maps a sample of it back. The config `demo` is a
# small one, with f = 4 and 8 latent channels, so a latent has a sixth as many numbers as its image. It minimises
#
#     L1 + 0.3 LPIPS + 1e-6 KL
#
# L1 and LPIPS compare the reconstruction with the image, pixel by pixel and by features of a network. The KL
# divergence from N(0, I) has a small weight: it bounds the latents' scale and does not make them Gaussian, which is
# left to the diffusion model. The network does not start from random weights but as the best linear code of its size
# ([`init: linear`](training.md#a-start-from-the-linear-code)), so that a few hundred images are enough to see
# something. The config asks for 6,000 images; here are 480.

# %%
# !ldm-vae train demo --data.path photos/train --validation_data.path photos/heldout --output_dir runs/tutorial --max_train_images 480 --validate_every_images 240 --validation_images 16

# %% [markdown]
# The run's folder holds `config.yaml` with every setting, `metrics.jsonl` with one line per interval, checkpoints, a
# report for a browser (`report/index.html`) and the network itself as a folder of diffusers, `vae`. The same command
# again would resume it. Validation uses the averaged weights.

# %%
import json
from pathlib import Path

lines = [json.loads(line) for line in Path("runs/tutorial/metrics.jsonl").read_text().splitlines()]
for line in lines:
    if "validation/psnr" in line:
        print(
            f"{line['images']:4} images: PSNR {line['validation/psnr']:.2f} dB, LPIPS {line['validation/lpips_alex']:.4f}"
        )

# %% [markdown]
# ## Reconstructions
#
# In Python, pixels are tensors [B, C, H, W] in [-1, 1]. `encode` gives the posterior's moments; the decoder is given
# their mean, or a sample.

# %% Left: the two photographs that are held out, a cat and a cup of coffee; right: their reconstructions
import torch
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from ldm_vae import decode, encode, load_autoencoder, measure, open_images
from ldm_vae.data.transforms import to_pixels
from ldm_vae.metrics.batches import image_batches


def grid(pixels, columns, enlarge=2):
    """A picture of pixels [B, C, H, W] in [-1, 1]."""
    picture = to_pil_image(make_grid(pixels.clamp(-1, 1) / 2 + 0.5, nrow=columns, padding=1, pad_value=1))
    return picture.resize((picture.width * enlarge, picture.height * enlarge), resample=0)


vae = load_autoencoder("runs/tutorial")
heldout = open_images("photos/photographs/heldout", vae)
batch = next(iter(image_batches(heldout, None, 256, batch_size=2)))
pixels = to_pixels(batch.pixels)
with torch.no_grad():
    moments = encode(vae, pixels)
    decoded = decode(vae, moments.mean)
grid(torch.stack([pixels, decoded], dim=1).flatten(0, 1), columns=2, enlarge=1)

# %%
print("pixels ", tuple(pixels.shape), "mean", tuple(moments.mean.shape))
print("PSNR of each, dB:", [round(value, 2) for value in measure(pixels, decoded, metrics=["psnr"])["psnr"].tolist()])
print("KL of each, nats:", [round(value) for value in moments.kl().sum(dim=(1, 2, 3)).tolist()])

# %% [markdown]
# Figures to report come from `ldm-vae evaluate`, which has a fixed protocol, confidence intervals and more metrics
# ([evaluation](evaluation.md)); here on the 48 held-out tiles. The last rows are the linear code that is best for these
# very tiles. After 480 images the network's LPIPS is better than that code's, and its PSNR a decibel worse. After the
# 6,000 images of `make demo` both are better: 34.3 dB and 0.016.

# %%
# !ldm-vae evaluate runs/tutorial photos/heldout --output measured --resolution 64 --metrics psnr,ssim,lpips_alex

# %% [markdown]
# ## Export
#
# A diffusion model expects latents of about unit variance. `export --stats` measures the standard deviation of the
# latents over images and writes its inverse as `scaling_factor` into `config.json`, where every pipeline of diffusers
# looks for it.

# %%
# !ldm-vae export runs/tutorial my-vae --stats photos/photographs --resolution 256

# %%
from diffusers import AutoencoderKL

AutoencoderKL.from_pretrained("my-vae").config["scaling_factor"]

# %% [markdown]
# ## Latents of the dataset
#
# The encoder is the expensive part of a diffusion model's input, and it does not change any more: its moments are
# computed once and stored.

# %%
# !ldm-vae encode my-vae photos/photographs my-latents --resolution 256

# %% [markdown]
# `LatentDataset` is a dataset of torch. It draws new noise of the posterior whenever a sample is read, and scales by
# `scaling_factor`, so a training loop uses `batch["latents"]` as it is. The complete loops of [using
# latents](using_latents.md) begin like this:

# %%
from torch.utils.data import DataLoader

from ldm_vae import LatentDataset

latents = LatentDataset("my-latents")
for batch in DataLoader(latents, batch_size=3, shuffle=True):
    z = batch["latents"]
    print(tuple(z.shape), f"mean {z.mean():+.2f}, standard deviation {z.std():.2f}:", ", ".join(batch["key"]))

# %% [markdown]
# The store is all that the decoder needs to show the photographs again.

# %% The photographs, decoded from the store
stored = torch.stack([latents[index]["latents"] for index in range(len(latents))])
with torch.no_grad():
    photographs = latents.decode(stored, vae)
grid(torch.nn.functional.avg_pool2d(photographs, 2), columns=5, enlarge=1)

# %% [markdown]
# ## A diffusion model
#
# The model learns to turn noise into latents by flow matching: on the straight path x_t = (1 - t) x + t e from a
# latent x to noise e, it predicts the velocity e - x; to sample, the path is followed back from pure noise. The
# config `diffusion/demo` is a U-Net of 0.7 M parameters, conditional on the photograph, which is its only notion of a
# class. It sees random crops of 16 x 16 latent positions, which are 64 px. The config asks for 16,000 of them; here
# are 3,200.

# %%
# !ldm-vae diffuse diffusion/demo --latents my-latents --output_dir runs/diffusion --max_train_images 3200 --sample_every_images 3200 --measure_images 36

# %% [markdown]
# The run's folder holds the network (`denoiser`), grids of samples (`samples`) and a report. `Generator` samples from
# it; the same keys give the same pictures.

# %% Samples of the diffusion model, one column for each photograph
from ldm_vae.diffusion.generator import Generator

generator = Generator.load("runs/diffusion", vae)
columns = len(generator.classes)
samples = generator.pixels(range(2 * columns))
grid(samples, columns)

# %% [markdown]
# After so short a training, the samples have the colours of their photographs, some large shapes, and noise where the
# fine texture should be. Without a diffusion model there is less: below are latents drawn independently, with the mean and
# deviation of the stored ones. At a KL weight of 1e-6 latents are far from independent, so the decoder makes no image of
# them ([why](latent_space.md#why-n0-i-gives-noise-at-a-kl-weight-of-1e-6)). The distances that the training printed say
# the same: between features of samples, and of such noise, and those of decoded latents of the store, smaller is closer.
# [Diffusion](diffusion.md) has those of the whole run of 16,000 images.

# %% Noise, decoded
noise = generator.noise(range(columns))
with torch.no_grad():
    decoded = latents.decode(noise * stored.std() + stored.mean(), vae)
grid(decoded, columns)

# %% [markdown]
# ## From here
#
# With images of your own: `ldm-vae train kl_f8_d4 --data.path PHOTOGRAPHS --dry_run` prints the plan, memory and
# operations of Stable Diffusion's architecture before anything is trained ([training](training.md)); `--init_from`
# fine-tunes an existing autoencoder instead ([fine-tuning](training.md#fine-tuning)). `ldm-vae probe` compares how
# well a small diffusion model learns the latents of several autoencoders
# ([diffusion](diffusion.md#which-vaes-latents-are-learnt-best)).
