"""Constructive deconstruction: overtrain, nightshade, bucket, retrain; a run with a SPEC, a report and a card."""
