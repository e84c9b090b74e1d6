import re
from pathlib import Path

import pytest
import torch
from test_compare import ColourReader
from tiny import tiny_model, tiny_tokenizer

from dodgeburn.errors import UserError
from dodgeburn.merge.recipe import MergeRecipe
from dodgeburn.models.saving import save_single_file
from dodgeburn.tour import full_size, tour


@pytest.fixture
def models(tmp_path) -> tuple[Path, ...]:
    folder = tmp_path / "models"
    tiny_tokenizer().save_pretrained(str(folder / "tokenizer"))
    for i, name in enumerate(("draw", "one", "two")):
        save_single_file(tiny_model(seed=i), folder / f"{name}.safetensors", dtype=torch.float16)
    return tuple(folder / f"{name}.safetensors" for name in ("draw", "one", "two"))


def test_tour_makes_one_page_and_the_file_equals_what_was_compared(models, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dodgeburn.merge.compare_report.add_plot", lambda *_: None)  # seconds each, tested elsewhere
    found = tour(quick=True, models=models, device="cpu", reader=ColourReader())
    assert found.report == Path("tour/report.html") and found.largest_difference == 0
    page = found.report.read_text()
    headings = ("Pictures from words", "Two sliders", "the recipe", "Contact sheets")
    for word in (*headings, "the same in every pixel", "one.safetensors"):
        assert word in page
    assert not re.search(r"(https?:)?//\w", re.sub(r"data:[^\"]*", "", page))
    assert str(tmp_path) not in page
    recipe = re.search(r"<summary>the recipe</summary><pre><code>(.*?)</code>", page, re.S)
    assert recipe is not None
    assert MergeRecipe.from_json(recipe[1].replace("&quot;", '"')).preset == found.comparison.rows[0].preset
    assert all((Path("tour") / name).exists() for name in ("smile.safetensors", "sweep.png", "grid.png"))
    again = tour(quick=True, models=models, device="cpu", reader=ColourReader())
    assert again.report == found.report and again.comparison.resumed == 6
    other = tour(quick=True, models=models[::-1], device="cpu", reader=ColourReader())
    assert other.report == Path("tour-2/report.html")


def test_folder_with_something_else_is_refused(models, tmp_path) -> None:
    with pytest.raises(UserError, match="models"):
        tour(tmp_path, quick=True, models=models, device="cpu")


def test_usual_size_is_what_the_help_promises() -> None:
    size = full_size().compare
    assert len(size.presets) == 16 and len(size.bases) == 1 and len(size.prompts) == 4 and len(size.seeds) == 2
    assert size.generate.steps == 12
