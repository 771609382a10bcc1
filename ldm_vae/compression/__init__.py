"""Compressed images: a likelihood as a file of that many bits.

entropy_coder.py  the package `constriction`, and computing that gives the same bits in both directions
bits_back.py      lossless: a VAE with a likelihood of pixel levels
indices.py        lossy: codes of a VQ autoencoder under a prior
file.py           the format of the file
"""
