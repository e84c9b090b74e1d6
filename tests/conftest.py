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


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with its processor."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from tests.tiny import tiny_tokenizer

    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 514, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tiny_tokenizer()).save_pretrained(path)
    return path
