"""Pictures as files: `png` (generation settings in PNG metadata, both ways), `sheet` (contact sheets and
grids).
"""
