"""`dodgeburn generate` with LoRAs: options, tags, records, and pictures made again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dodgeburn.checkpoint.slider_card import SliderCard
from dodgeburn.checkpoint.tensorfile import sha256_file, sha256_tensors
from dodgeburn.cli.main import main
from dodgeburn.errors import UserError
from dodgeburn.images.comfy import read_graph
from dodgeburn.images.png import read_png
from dodgeburn.models.adapter_file import load_adapter, save_adapter
from dodgeburn.models.loading import load_model
from dodgeburn.models.saving import save_single_file
from dodgeburn.sampling.adapted import Applied
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.sampling.loras import LoraUse, find_lora, named_values, parse_option, take_tags, uses_of, without
from dodgeburn.sampling.reproduce import request_of
from tests.adapters import random_adapter
from tests.tiny import tiny_model

pytestmark = pytest.mark.adapters
CARD = SliderCard(name="smile", unit="one step of smile", safe_range=(-2, 2), start=700)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loras")
    model = tiny_model()
    save_single_file(model, root / "tiny.safetensors")
    model.tokenizers[0].save_pretrained(str(root / "tokenizer"))
    (root / "below").mkdir()
    save_adapter(random_adapter(model, 1), root / "smile.safetensors", "sdxl", card=CARD)
    save_adapter(random_adapter(model, 2), root / "below" / "age.safetensors", "sdxl", "peft")
    save_adapter(random_adapter(tiny_model("sd15"), 2), root / "other.safetensors", "sd15")
    return root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRAs are looked for in the folder one works in too, where somebody may have trained one of the same name."""
    monkeypatch.chdir(tmp_path)


def run(place: Path, out: Path, *more: str, prompt: str = "A red hat!") -> int:
    return main(["generate", prompt, "--model", str(place / "tiny.safetensors"), "-o", str(out), "--steps", "3", *more])


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# -------------------- options, tags, records


@pytest.mark.parametrize(
    ("text", "file", "scale", "start"),
    [
        ("a.safetensors", "a.safetensors", 1.0, None),
        ("a.safetensors:0.8", "a.safetensors", 0.8, None),
        ("a.safetensors:-1.5:700", "a.safetensors", -1.5, 700.0),
        ("C:/x/a.safetensors:2", "C:/x/a.safetensors", 2.0, None),
        ("a:b.pt", "a:b.pt", 1.0, None),
        ("a:1:2:3", "a:1", 2.0, 3.0),
    ],
)
def test_an_option(text: str, file: str, scale: float, start: float | None) -> None:
    found = parse_option(text)
    assert (found.file, found.scale, found.start) == (file, scale, start)


def test_a_file_may_have_a_number_behind_a_colon(tmp_path: Path) -> None:
    (tmp_path / "a:2").write_text("")
    found = parse_option(f"{tmp_path / 'a:2'}:3")
    assert found.file == str(tmp_path / "a:2") and found.scale == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected FILE"), (":0.8", "expected FILE"), ("a.pt:", "expected FILE"), ("a:1:1001", "time step 1001"),
        ("a:1:-1", "time step"), ("a:1e9", "scale"),
    ],
)  # fmt: skip
def test_an_option_that_is_none(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_option(text)


def test_tags_are_taken_out_of_a_prompt() -> None:
    rest, tags = take_tags("a cat <lora:smile:0.8>, sitting<lora:age> <lora:x:te=1> <lyco:b: -1.5 >")
    assert rest == "a cat , sitting <lora:x:te=1>"
    assert [(use.name, use.scale, use.start) for _, use in tags] == [
        ("smile", 0.8, None),
        ("age", 1, None),
        ("b", -1.5, None),
    ]
    assert tags[0][1].tag == "<lora:smile:0.8>"
    assert without("a <lora:x:1> b <lora:x:1>", ["<lora:x:1>"]) == "a b <lora:x:1>"
    assert named_values("smile: ab12, my age: 00ff") == {"smile": "ab12", "my age": "00ff"} and named_values("") == {}


@given(st.text(max_size=40))
def test_no_prompt_stumbles_over_tags(prompt: str) -> None:
    rest, tags = take_tags(prompt)
    assert tags or rest == prompt


USES = st.builds(
    LoraUse, name=st.text(min_size=1, max_size=8), scale=st.floats(-9, 9), start=st.floats(0, 1000),
    blocks=st.dictionaries(st.sampled_from(["IN00", "M00"]), st.floats(-2, 2)), file=st.text(max_size=8),
    sha256=st.text("0123456789abcdef", max_size=64), strengths=st.dictionaries(st.text(max_size=5), st.floats(-2, 2)),
)  # fmt: skip


@given(st.lists(USES, max_size=3))
def test_a_record_is_read_back(uses: list[LoraUse]) -> None:
    assert uses_of(json.loads(json.dumps([use.record() for use in uses]))) == uses


KEYS = st.sampled_from(["name", "scale", "start", "blocks"])


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5) | st.floats(),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=4),
    )
)
def test_a_hostile_record_is_refused(value: object) -> None:
    try:
        assert all(isinstance(use.scale, float) for use in uses_of(value))
    except UserError:
        pass


def test_files_are_found_by_name_and_content(place: Path, tmp_path: Path) -> None:
    assert find_lora(LoraUse("smile"), [tmp_path, place]) == place / "smile.safetensors"
    assert find_lora(LoraUse("smile.safetensors"), [place]) == place / "smile.safetensors"
    assert find_lora(LoraUse("age"), [place]) is None
    assert find_lora(LoraUse("age"), [place], deep=True) == place / "below" / "age.safetensors"
    assert find_lora(LoraUse("tiny"), [place]) is None, "a checkpoint is no LoRA"
    assert find_lora(LoraUse("../smile"), [place]) == place / "smile.safetensors"
    assert find_lora(LoraUse(".."), [place]) is None and find_lora(LoraUse("x/"), [place]) is None
    (tmp_path / "smile.safetensors").write_bytes((place / "below" / "age.safetensors").read_bytes())
    asked = LoraUse("smile", sha256=sha256_file(place / "smile.safetensors"))
    assert find_lora(asked, [tmp_path, place]) == place / "smile.safetensors"


# -------------------- the command


def test_pictures_say_their_loras_and_are_made_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--lora",
        f"{place / 'smile.safetensors'}:1.5",
        "--slider",
        f"{place / 'below' / 'age.safetensors'}:-0.5:600",
    ]
    assert run(place, tmp_path, *more, "--lora-blocks", "OUT*=0.5", "-n", "2", "--json") == 0
    printed = capsys.readouterr().out
    assert "LoRA smile at scale 1.5 (1.0 = one step of smile), off above time step 700" in printed
    assert "LoRA age at scale -0.5, off above time step 600" in printed
    said = json.loads(printed.splitlines()[-1])["adapters"]
    text = read_png(tmp_path / "a-red-hat-1.png")
    assert text.own is not None and text.own["adapters"] == said and text.own["prompt"] == "A red hat!"
    smile = said[0]
    assert smile["file"] == "smile.safetensors" and smile["scale"] == 1.5 and smile["start"] == 700
    assert smile["sha256"] == sha256_file(place / "smile.safetensors") and smile["blocks"]["OUT03"] == 0.5
    assert len(smile["blocks"]) == 9 and str(place) not in json.dumps(text.own)
    assert text.infotext is not None and text.infotext.prompt == "A red hat! <lora:smile:1.5> <lora:age:-0.5>"
    tensors = sha256_tensors(place / "smile.safetensors")[:12]
    assert text.infotext.settings["Lora hashes"].startswith(f"smile: {tensors}, age: ")
    assert text.infotext.settings["Lora starts"] == "smile: 700, age: 600"

    # What the API makes of the same is the same picture, and --from makes it again bit for bit.
    model = load_model(place / "tiny.safetensors", "cpu")
    blocks = smile["blocks"]
    adapters = [Applied(load_adapter(place / "smile.safetensors"), 1.5, 700, blocks=blocks),
                Applied(load_adapter(place / "below" / "age.safetensors"), -0.5, 600, blocks=blocks)]  # fmt: skip
    made = generate(model, ["A red hat!"] * 2, [0, 1], GenerateSettings(steps=3), adapters=adapters)
    assert np.array_equal(np.asarray(made[1].image), picture(tmp_path / "a-red-hat-1.png"))
    again = tmp_path / "again"
    source = str(tmp_path / "a-red-hat-1.png")
    assert main(["generate", "--from", source, "--model", str(place / "tiny.safetensors"), "-o", str(again),
                 "--lora-dir", str(place)]) == 0  # fmt: skip
    assert (again / "a-red-hat-1.png").read_bytes() == (tmp_path / "a-red-hat-1.png").read_bytes()
    assert main(["generate", "--from", source, "--model", str(place / "tiny.safetensors"), "-o", str(again)]) == 2
    assert "age.safetensors (sha256" in capsys.readouterr().err
    # Other LoRAs than the picture's, where some are given.
    assert main(["generate", "--from", source, "--model", str(place / "tiny.safetensors"), "-o", str(again),
                 "--lora", f"{place / 'smile.safetensors'}:0.25"]) == 0  # fmt: skip
    own = read_png(again / "a-red-hat-1-2.png").own
    assert own is not None and [one["scale"] for one in own["adapters"]] == [0.25]


def test_scale_0_is_the_plain_picture(place: Path, tmp_path: Path) -> None:
    assert (
        run(place, tmp_path / "a") == 0
        and run(place, tmp_path / "b", "--lora", f"{place / 'smile.safetensors'}:0") == 0
    )
    assert np.array_equal(picture(tmp_path / "a" / "a-red-hat-0.png"), picture(tmp_path / "b" / "a-red-hat-0.png"))


def test_tags_in_the_prompt(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "A red hat! <lora:age:1.5> <lora:nobody:1>"
    assert run(place, tmp_path, "--lora-dir", str(place), prompt=prompt) == 0
    assert "read as words: <lora:nobody:1>" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.png")
    text = read_png(path)
    assert text.own is not None and text.own["prompt"] == "A red hat! <lora:nobody:1>"
    assert [(one["name"], one["scale"], one["start"]) for one in text.own["adapters"]] == [("age", 1.5, 1000.0)]
    # Beside the model without --lora-dir; as words in plain syntax.
    assert run(place, tmp_path / "b", prompt="A <lora:smile:1>") == 0
    assert "LoRA smile at scale 1 " in capsys.readouterr().out
    assert run(place, tmp_path / "c", "--prompt-syntax", "plain", prompt="A <lora:smile:1>") == 0
    assert "LoRA" not in capsys.readouterr().out


def test_a1111s_pictures_bring_their_loras(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL.PngImagePlugin import PngInfo

    right = sha256_tensors(place / "smile.safetensors")[:12]
    for number, (found, wanted) in enumerate(((right, ""), ("0" * 12, "another smile: hash 000000000000"))):
        info = PngInfo()
        said = f'Steps: 2, Sampler: Euler, CFG scale: 4, Seed: 3, RNG: CPU, Lora hashes: "smile: {found}, gone: 123"'
        info.add_text("parameters", f"A hat <lora:smile:0.5> <lora:gone:2>\n{said}")
        source = tmp_path / f"{number}.png"
        Image.new("RGB", (2, 2)).save(source, pnginfo=info)
        asked = request_of(source)
        assert asked.prompt == "A hat" and [use.name for use in asked.adapters] == ["smile", "gone"]
        out = tmp_path / f"out{number}"
        assert (
            main(["generate", "--from", str(source), "--model", str(place / "tiny.safetensors"), "-o", str(out)]) == 0
        )
        printed = capsys.readouterr()
        assert "LoRA smile at scale 0.5" in printed.out and "LoRA gone at strength 2: no such file in" in printed.err
        assert ("another smile" in printed.err) == bool(wanted) and wanted in printed.err
        own = read_png(out / "a-hat-3.png").own
        assert own is not None and own["adapters"][0]["start"] == 1000, "A1111 has no late start"


def test_comfys_graph_has_the_loras(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dodgeburn.sampling.saving.is_stock", lambda model: True)
    lora = str(place / "smile.safetensors")
    assert run(place, tmp_path, "--lora", f"{lora}:0.5:1000", "--lora", f"{lora}:-1:1000", "--clip-skip", "2") == 0
    graph = read_png(tmp_path / "a-red-hat-0.png").graph
    assert (
        graph is not None and graph["10"]["inputs"]["clip"] == ["12", 1] and graph["3"]["inputs"]["model"] == ["12", 0]
    )
    assert graph["11"]["inputs"] == {"lora_name": "smile.safetensors", "strength_model": 0.5, "strength_clip": 0.5,
                                     "model": ["4", 0], "clip": ["4", 1]}  # fmt: skip
    asked = read_graph(graph)
    assert asked is not None and asked.loras == [("smile.safetensors", 0.5), ("smile.safetensors", -1)]
    assert asked.checkpoint == "tiny.safetensors" and asked.clip_stop == -2 and not asked.ignored
    graph["12"]["class_type"] = "LoraLoaderModelOnly"
    asked = read_graph(graph)
    assert asked is not None and asked.ignored == [
        "LoRA smile.safetensors for the U-Net only: the text encoders get its part too, if it has one"
    ]
    # A late start has no node.
    assert run(place, tmp_path / "late", "--lora", f"{lora}:0.5") == 0
    assert read_png(tmp_path / "late" / "a-red-hat-0.png").graph is None


def test_a_scale_that_is_not_safe_is_warned_of(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, tmp_path, "--lora", f"{place / 'smile.safetensors'}:-3") == 0
    assert "smile at scale -3: its safe range is -2 to 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora", "nothing.safetensors"], "no LoRA nothing.safetensors"),
        (["--lora", "tiny.safetensors:1"], "no LoRA tiny.safetensors"),
        (["--lora", "PLACE/tiny.safetensors:1"], "no adapter"),
        (["--lora", "PLACE/other.safetensors"], "is for Stable Diffusion 1.5, but tiny is SDXL"),
        (["--lora-blocks", "OUT*=1"], "no effect without a LoRA"),
        (["--lora", "smile", "--lora-blocks", "OUT77=1"], "has no block 'OUT77'"),
        (["--lora", "smile", "--lora-blocks", "M00=1", "--lora-blocks", "M00=1"], "2 --lora-blocks for 1 LoRAs"),
        (["--lora-dir", "nowhere"], "no such folder"),
    ],
)
def test_bad_input(more: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = [one.replace("PLACE", str(place)) for one in more]
    assert run(place, tmp_path / "out", *given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.png"))


def test_on_the_pocket_it_moves_the_picture(tmp_path: Path) -> None:
    """End to end on the model that ships: a random LoRA changes the picture, its negative changes it otherwise."""
    model = load_model("pocket", "cpu")
    save_adapter(random_adapter(model, 1, "noxattn", text=False, size=0.3), tmp_path / "r.safetensors", "sdxl")
    for scale in ("0", "1", "-1"):
        out = ["-o", str(tmp_path / scale), "--steps", "4"]
        assert main(["generate", "a doctor", "--lora", f"{tmp_path / 'r.safetensors'}:{scale}", *out]) == 0
    shown = [picture(tmp_path / scale / "a-doctor-0.png") for scale in ("0", "1", "-1")]
    assert all(np.abs(shown[i] - shown[j]).mean() > 2 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.is_grad_enabled()
