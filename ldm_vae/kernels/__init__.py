"""Fused operations of the networks: what each computes in torch, its kernel for CUDA, and how it is put in."""
