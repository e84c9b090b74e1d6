"""Ties that nobody asked for: found (audit), taken away by plain methods (remedies), measured before and after."""
