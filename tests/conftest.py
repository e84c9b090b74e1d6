"""What all tests share. Property tests draw the same examples each time: what passed here passes on any machine.

`pytest --hypothesis-profile explore` draws new ones, for finding what the fixed ones miss.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.pop("TQDM_DISABLE", None)  # tqdm reads it once, when it is imported: tests of bars need them

settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL as a single file, beside a copy of it named other, and its tokenizer's folder."""
    from dodgeburn.models.saving import save_single_file
    from tests.tiny import tiny_model

    root = tmp_path_factory.mktemp("model")
    model = tiny_model()
    for name in ("tiny", "other"):
        save_single_file(model, root / f"{name}.safetensors")
    model.tokenizers[0].save_pretrained(str(root / "tokenizer"))
    return root / "tiny.safetensors"
