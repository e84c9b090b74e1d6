"""Alignment with preferences: pairs, Diffusion-DPO and its kin, the file written."""
