"""Stable Diffusion on gene embeddings: everything that needs diffusers or accelerate, and nothing else does."""
