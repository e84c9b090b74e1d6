"""Where a model's tokenizers come from. Real SD's are not shipped (one vocabulary of 49 408 tokens serves
all).
"""

from pathlib import Path
from typing import Any

from dodgeburn.errors import UserError

# Hub ids whose tokenizer may lie in the local Hugging Face cache already; never fetched from here.
_CACHED = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer"),
)
_CLIP_TOKENS = 49408
_CLIP_LENGTH = 77
_ENDLESS = 1 << 20  # transformers' own word for a length that nothing says is far above


def load_tokenizer(folder: Path) -> Any:
    """The CLIPTokenizer saved in `folder` (vocab.json and merges.txt, or tokenizer.json), else UserError."""
    from transformers import CLIPTokenizer

    if not ((folder / "tokenizer.json").exists() or (folder / "vocab.json").exists()):
        raise UserError(f"{folder} holds no tokenizer: expected vocab.json and merges.txt, or tokenizer.json")
    try:
        found = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise UserError(f"{folder} holds no readable tokenizer: {str(error).splitlines()[0]}") from error
    if found.model_max_length > _ENDLESS:  # vocab.json and merges.txt alone do not say it
        found.model_max_length = _CLIP_LENGTH
    return found


def find_tokenizers(configs: dict[str, dict[str, Any]], path: Path | None, folder: str | Path | None) -> list[Any]:
    """One tokenizer for each text encoder of `configs`, for a model that came as a single file.

    Looked for in `folder` (a tokenizer folder, or a model folder that has `tokenizer/`), in the package (if
    the vocabulary has the pocket's size), beside the file, in the local Hugging Face cache. Raises
    UserError that says what to do.
    """
    first = _find_first(int(configs["text_encoder"]["vocab_size"]), path, folder)
    if len(first) > int(configs["text_encoder"]["vocab_size"]):
        raise UserError(
            f"the tokenizer has {len(first)} tokens but the model's text encoder only "
            f"{configs['text_encoder']['vocab_size']}: give the folder of this model's own tokenizer"
        )
    if "text_encoder_2" not in configs:
        return [first]
    return [first, _second(first, configs["text_encoder_2"])]


def _find_first(vocabulary: int, path: Path | None, folder: str | Path | None) -> Any:
    if folder is not None:
        given = Path(folder)
        return load_tokenizer(given / "tokenizer" if (given / "tokenizer").is_dir() else given)
    from dodgeburn.pocket.model import VOCABULARY, tokenizer

    if vocabulary == VOCABULARY:
        return tokenizer()
    if path is not None:
        for near in (path.parent / "tokenizer", path.with_suffix("") / "tokenizer"):
            if near.is_dir():
                return load_tokenizer(near)
    from transformers import CLIPTokenizer

    for repository, subfolder in _CACHED:
        try:
            found = CLIPTokenizer.from_pretrained(repository, subfolder=subfolder, local_files_only=True)
        except (OSError, ValueError):
            continue
        if len(found) == _CLIP_TOKENS:  # transformers 5 makes one of two tokens where nothing is in the cache
            return found
    raise UserError(
        f"no CLIP tokenizer found for {path.name if path else 'the model'}: put the `tokenizer` folder "
        "of any Stable Diffusion model (vocab.json, merges.txt) beside the file, or name one with --tokenizer"
    )


def _second(first: Any, config: dict[str, Any]) -> Any:
    """SDXL's second tokenizer: the same words, but padded with token 0 ("!") instead of the end token.

    Only where the vocabulary is CLIP's own: a model whose text encoders were trained with one padding keeps
    it.
    """
    if len(first) != _CLIP_TOKENS:
        return first
    import copy

    second = copy.deepcopy(first)
    second.pad_token = "!"
    return second
