"""Concept Sliders: low-rank directions in weight space, trained, calibrated, composed and measured."""
