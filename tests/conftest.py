"""Property tests draw the same examples each time: what passed here passes on any machine.

`pytest --hypothesis-profile explore` draws new ones, for finding what the fixed ones miss.
"""

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("fixed")
