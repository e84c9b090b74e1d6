"""Models reworked as a whole, in three jobs: `dpo` aligns with preferences, `bias` finds ties that nobody asked for and
takes them away, `deconstruct` does the second by taking a model apart first. Each may import those named before it.
"""
