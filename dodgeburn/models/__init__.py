"""Models in memory: `model` (what a loaded model is), `loading`, `saving`, `latents` (VAE access),
`tokenizers`.
"""
