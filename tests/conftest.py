"""Property tests draw the same examples each time: what passed here passes on any machine.

`pytest --hypothesis-profile explore` draws new ones, for finding what the fixed ones miss.
"""

import os

from hypothesis import settings

os.environ.pop("TQDM_DISABLE", None)  # tqdm reads it once, when it is imported: tests of bars need them

settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("fixed")
