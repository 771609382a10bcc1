"""Measures of a latent space: numbers and pictures of a trained autoencoder, one idea a file.

channels.py       each channel's distribution: mean, variance, kurtosis, correlation, KL, whether it is used
information.py    what the latent knows of the image, and how far the aggregate posterior is from the prior
likelihood.py     bounds of log p(x): the evidence lower bound and the importance-weighted ones
spectrum.py       how the latents' power spreads over spatial frequencies
equivariance.py   whether to encode and to transform commute
walks.py          interpolations, linear and spherical, and traversals of one channel
mixture.py        a Gaussian mixture over whole latents, to draw new ones from

`ldm-vae latent_space` applies all of them to a data set.
"""
