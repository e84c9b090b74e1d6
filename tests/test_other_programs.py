"""What users of other programs type is answered with how it is said here."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file
from tiny_checkpoints import configs, single_file

from dodgeburn.checkpoint.moves import moves_to_diffusers
from dodgeburn.cli.main import main
from dodgeburn.errors import UserError


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("merge a.safetensors b.safetensors --multiplier 0.3 -o m.safetensors", "B's share is --base"),
        ("merge a.safetensors b.safetensors --alpha=0.3 -o m.safetensors", "B's share is --base"),
        ("merge a.safetensors b.safetensors --ratio 0.6 -o m.safetensors", "its 0.6 is --base 0.4"),
        ("merge a.safetensors b.safetensors c.safetensors -o m.safetensors", "a third model is given with --also"),
        ("merge recipe.toml b.safetensors -o m.safetensors", "names its models itself: leave b.safetensors out"),
        ("bake a.safetensors lora.safetensors 0.8 -o m.safetensors", "write it behind its LoRA, FILE:0.8"),
    ],
)
def test_one_line_says_how(args: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_checkpoint_without_its_vae_is_named_so() -> None:
    shapes = {key: tuple(t.shape) for key, t in single_file("sd15").items() if not key.startswith("first_stage_model.")}
    with pytest.raises(UserError, match="the checkpoint has no VAE: .* --vae"):
        moves_to_diffusers(shapes, configs("sd15"))


def test_one_rank_is_one_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate("ab"):
        save_file(single_file("sd15", seed), tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "lora")]
    assert main(["delta", "extract", *files[:2], "-o", files[2], "--as", "lora", "--rank", "2"]) == 0
    assert "modules, rank 2, " in capsys.readouterr().out
