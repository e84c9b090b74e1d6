"""A concept with two hair colours, and a classifier that reads them off two pixels."""

import numpy as np

from dodgeburn.measure.bias import UNREAD
from dodgeburn.rework.bias.concept import make_concept

CONCEPT = make_concept(
    ["a doctor"],
    "hair",
    ["black", "red"],
    {"black": ["black hair", "dark hair"]},
    phrasings=["a doctor, smiling"],
    watched=["a doctor, frowning"],
    others=["a cat"],
)


class Hair:
    """Reads the first pixel: 0 black, 1 red, else unreadable."""

    name = "hair"
    classes = {"hair": ("black", "red"), "hat": ("none", "cap")}

    def labels(self, pictures):
        first = pictures[:, 0, 0, 0]
        hair = np.where(first == 0, "black", np.where(first == 1, "red", UNREAD))
        return {"hair": hair, "hat": np.where(pictures[:, 0, 1, 0] == 0, "none", "cap")}

    def named(self, prompt):
        return frozenset({"hair"}) if any(w in prompt for w in ("hair", "red")) else frozenset()
