"""Draws pairs of hands to train a repair on: the pocket's captions never say how many fingers, so words cannot.

    python examples/sliders/draw_hands.py hands
    dodgeburn slider train --pairs hands --prompt "a person, waving" --attribute fingers -o fix-hands.safetensors
    dodgeburn slider evaluate fix-hands.safetensors --json

before/ has waving people with 3, 4, 6 or 7 fingers, after/ the same people with five.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dodgeburn.slide.repair import draw_hand_pairs


def main() -> None:
    """Write FOLDER/before and FOLDER/after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=8)
    args = parser.parse_args()
    draw_hand_pairs(args.folder, args.pairs)


if __name__ == "__main__":
    main()
