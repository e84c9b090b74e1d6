"""Training: one loop, and what the pocket model and its readers are trained on."""
