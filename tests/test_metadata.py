"""Settings in pictures: written as A1111 and ComfyUI read them, and read back from theirs and ours."""

import json
import re
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dodgeburn.cli.main import main
from dodgeburn.errors import UserError
from dodgeburn.images.comfy import ComfyRequest, read_graph, write_graph
from dodgeburn.images.png import Infotext, png_bytes, read_png, write_infotext, write_picture
from dodgeburn.models.loading import load_model
from dodgeburn.models.saving import save_single_file
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.sampling.reproduce import request_of
from dodgeburn.sampling.saving import graph_of, infotext_of, record_of
from dodgeburn.sampling.settings import Thresholding
from tests.tiny import tiny_model

pytestmark = pytest.mark.metadata
CARD = Thresholding(
    mimic_scale=30, threshold_percentile=0.9, mimic_mode="Half Cosine Up", mimic_scale_min=4,
    cfg_mode="Half Cosine Up", cfg_scale_min=4, scheduler_value=4,
)  # fmt: skip


def run(*more: str) -> int:
    return main(["generate", *more, "--device", "cpu"])


def saved(tmp_path: Path, text: str) -> Path:
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    return tmp_path / "a.png"


# ------------------------------------------------------------------------------------------------------- A1111


def parse_as_a1111(text: str) -> dict[str, str]:
    """A1111's reading rules, written anew: prompts above, one line of settings below, JSON quotes, sizes split."""
    *lines, last = text.strip().split("\n")
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    if len(pair.findall(last)) < 3:
        lines, last = [*lines, last], ""
    found, negative = {"Prompt": "", "Negative prompt": ""}, False
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            negative, line = True, line[16:].strip()
        key = "Negative prompt" if negative else "Prompt"
        found[key] += ("\n" if found[key] else "") + line
    for key, value in pair.findall(last):
        value = json.loads(value) if value[:1] == '"' else value
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        found |= {f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: value}
    return found


def test_our_infotext_as_a1111_reads_it() -> None:
    model = tiny_model()
    settings = GenerateSettings(steps=2, guidance=1.5, sampler="dpmpp_3m_sde", spacing="exponential", clip_skip=-2,
                                negative="blurry: a, b", thresholding=CARD)  # fmt: skip
    with pytest.warns(UserWarning):
        (made,) = generate(model, ["robotic (Chicken:1.1) ,\n漢字: é"], [7], settings)
    found = parse_as_a1111(write_infotext(infotext_of(made, model)))
    assert found["Prompt"] == "robotic (Chicken:1.1) ,\n漢字: é" and found["Negative prompt"] == "blurry: a, b"
    assert (found["Sampler"], found["Schedule type"], found["CFG scale"]) == ("DPM++ 3M SDE", "Exponential", "1.5")
    assert (found["Size-1"], found["Size-2"], found["Seed"], found["Clip skip"]) == ("16", "16", "7", "2")
    assert found["Dynamic thresholding enabled"] == "True" and found["Mimic scale"] == "30"
    assert found["Threshold percentile"] == "90" and found["Scheduler value"] == "4"
    assert found["Mimic mode"] == found["CFG mode"] == "Half Cosine Up"
    assert found["Mimic scale minimum"] == found["CFG scale minimum"] == "4"


def test_their_infotext(tmp_path: Path) -> None:
    text = (
        "a hat <lora:smile:0.8>\nNegative prompt: b\nSteps: 30, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 12, "
        'Size: 512x768, Model hash: abcdef0123, Model: foo, Clip skip: 2, Hires upscale: 2, Lora hashes: "smile: ab"'
    )
    asked = request_of(saved(tmp_path, text))
    assert asked.kind == "A1111" and asked.prompt == "a hat" and asked.seeds == [12]
    s = asked.settings
    assert (s.steps, s.sampler, s.spacing, s.guidance, s.width, s.height, s.clip_skip, s.negative) == (
        30, "dpmpp_2m", "karras", 6.5, 512, 768, 2, "b")  # fmt: skip
    assert asked.model == "foo" and asked.model_hash == "abcdef0123"
    said = " | ".join(asked.not_honoured)
    assert [(a.name, a.scale, a.start, a.sha256_tensors) for a in asked.adapters] == [("smile", 0.8, 1000.0, "ab")]
    assert "Hires upscale: 2" in said and "RNG" in said


def test_thresholding_comes_back_from_an_infotext(tmp_path: Path) -> None:
    model = tiny_model()
    settings = GenerateSettings(steps=2, thresholding=CARD)
    with pytest.warns(UserWarning):
        (made,) = generate(model, ["a"], [7], settings)
    assert request_of(saved(tmp_path, write_infotext(infotext_of(made, model)))).settings.thresholding == CARD


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("Steps: x, Sampler: Euler, Seed: 1", "Steps is 'x'"),
        ("Steps: 5, Sampler: Euler, Seed: 1, CFG scale: NaN", "guidance is nan"),
        ("Steps: 5, Sampler: Euler, Seed: 1.5", "Seed is '1.5'"),
        ("Steps: 5, Sampler: Euler, Seed: 1, Size: 999999x8", "width or height"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, pairs: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        request_of(saved(tmp_path, f"p\nNegative prompt: \n{pairs}"))


def test_unknown_names_are_said(tmp_path: Path) -> None:
    asked = request_of(saved(tmp_path, "p\nSteps: 5, Sampler: UniPC, Schedule type: Beta, Seed: 1"))
    assert asked.settings.sampler == "dpmpp_2m" and asked.settings.spacing == "karras"
    assert any("UniPC" in line for line in asked.not_honoured) and any("Beta" in line for line in asked.not_honoured)


# ----------------------------------------------------------------------------------------------------- ComfyUI


REQUEST = ComfyRequest("m.safetensors", "p", "n", 5, 20, 4.0, "dpmpp_2m", "karras", 512, 768)
SIZES = {"original": (2048, 3072), "target": (2048, 3072), "crop": (8, 16)}
# Inputs of ComfyUI's core nodes, and how many outputs they have.
NODES = {
    "KSampler": ({"model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image",
                  "denoise"}, 1),
    "CheckpointLoaderSimple": ({"ckpt_name"}, 3), "EmptyLatentImage": ({"width", "height", "batch_size"}, 1),
    "CLIPTextEncode": ({"text", "clip"}, 1), "VAEDecode": ({"samples", "vae"}, 1),
    "SaveImage": ({"images", "filename_prefix"}, 0), "CLIPSetLastLayer": ({"clip", "stop_at_clip_layer"}, 1),
    "CLIPTextEncodeSDXL": ({"width", "height", "crop_w", "crop_h", "target_width", "target_height", "text_g", "text_l",
                            "clip"}, 1),
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"clip_stop": -3}, {"sizes": SIZES, "negative_sizes": SIZES}])
def test_graphs_are_valid_and_come_back(more: dict[str, object]) -> None:
    request = ComfyRequest(**{**vars(REQUEST), **more})  # type: ignore[arg-type]
    graph = write_graph(request)
    for node in graph.values():
        inputs, _ = NODES[node["class_type"]]
        assert set(node["inputs"]) == inputs
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[1] < NODES[graph[value[0]]["class_type"]][1]
    assert read_graph(json.loads(json.dumps(graph))) == request


def test_sdxl_sizes_of_a_generation_stand_in_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dodgeburn.sampling.saving.is_stock", lambda model: True)
    model = tiny_model("sdxl")
    save_single_file(model, tmp_path / "x.safetensors")
    model.source = tmp_path / "x.safetensors"
    (made,) = generate(model, ["a"], [1], GenerateSettings(steps=1, size_scale=4, negative_crop=(3, 5), clip_skip=2))
    graph = graph_of(made, model)
    assert graph is not None
    asked = read_graph(graph)
    assert asked is not None and asked.clip_stop == -2
    assert asked.sizes == {"original": (64, 64), "target": (64, 64), "crop": (0, 0)}
    assert asked.negative_sizes["crop"] == (3, 5)


def test_their_graph(tmp_path: Path) -> None:
    graph = write_graph(REQUEST)
    graph["20"] = {"class_type": "LoraLoader", "inputs": {"model": ["4", 0], "clip": ["4", 1], "lora_name": "s.st",
                                                          "strength_model": 0.7, "strength_clip": 1}}  # fmt: skip
    graph["21"] = {"class_type": "PrimitiveNode", "inputs": {"value": 77}}
    graph["22"] = {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0], "strength": 1}}
    graph["23"] = {"class_type": "KSampler", "inputs": {**graph["3"]["inputs"], "latent_image": ["3", 0]}}
    graph["3"]["inputs"] |= {"model": ["20", 0], "seed": ["21", 0], "positive": ["22", 0], "sampler_name": "uni_pc"}
    info = PngInfo()
    info.add_text("prompt", json.dumps(graph))
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    asked = request_of(tmp_path / "a.png")
    assert asked.kind == "ComfyUI" and asked.prompt == "p" and asked.seeds == [77] and asked.model == "m.safetensors"
    said = " | ".join(asked.not_honoured)
    assert all(part in said for part in ("strength 1 of LoRA s.st", "ControlNetApply", "further pass", "uni_pc"))
    assert [(a.name, a.file, a.scale, a.start) for a in asked.adapters] == [("s", "s.st", 0.7, 1000.0)]


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5) | st.lists(st.text(max_size=2), max_size=2),
                    lambda x: st.dictionaries(st.sampled_from(["1", "2", "inputs", "class_type", "positive", "model",
                                                               "negative", "KSampler"]), x, max_size=4)))  # fmt: skip
@hypothesis_settings(max_examples=100, deadline=None)
def test_no_graph_crashes_the_reader(value: object) -> None:
    if isinstance(value, dict):
        read_graph(value)


def test_a_circle_of_links_ends() -> None:
    graph = write_graph(REQUEST)
    graph["6"] = {"class_type": "ConditioningCombine", "inputs": {"conditioning": ["6", 0]}}
    graph["4"] = {"class_type": "Loop", "inputs": {"model": ["4", 0]}}
    assert read_graph(graph) is not None


# ------------------------------------------------------------------------------------------------ files and --from


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_every_format_carries_everything(tmp_path: Path, ending: str) -> None:
    info = Infotext('é: 漢字, "x"\nsecond', "n", {"Steps": "1", "Seed": "2", "Size": "8x8"})
    graph, own = write_graph(REQUEST), {"prompt": "é", "seed": 3}
    write_picture(tmp_path / f"a.{ending}", Image.new("RGB", (8, 8), (9, 8, 7)), info, own, graph)
    found = read_png(tmp_path / f"a.{ending}")
    assert (found.infotext, found.own, found.graph) == (info, own, graph)
    with Image.open(tmp_path / f"a.{ending}") as again:
        assert again.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[ending]
        assert ending == "jpg" or again.getpixel((0, 0)) == (9, 8, 7)


def test_settings_too_long_for_a_jpeg(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="write PNG instead"):
        write_picture(tmp_path / "a.jpg", Image.new("RGB", (8, 8)), Infotext("x" * 70_000))
    with pytest.raises(UserError, match=r"\.png"):
        write_picture(tmp_path / "a.gif", Image.new("RGB", (8, 8)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_3m_sde"])
def test_from_makes_a_picture_again_bit_for_bit(model_file: Path, tmp_path: Path, sampler: str) -> None:
    first = ["A red hat!", "--model", str(model_file), "-o", str(tmp_path / "a"), "--steps", "3", "-n", "3", "--seed",
             "4", "--sampler", sampler, "--negative", "b", "--cfg-rescale", "0.5", "--clip-skip", "2"]  # fmt: skip
    assert run(*first) == 0
    for seed in (4, 6):
        name = f"a-red-hat-{seed}.png"
        out = tmp_path / f"b{seed}"
        assert run("--from", str(tmp_path / "a" / name), "--model", str(model_file), "-o", str(out)) == 0
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_from_a_sheet_makes_all_its_pictures(model_file: Path, tmp_path: Path) -> None:
    model = ["--model", str(model_file)]
    assert run("a b", *model, "-o", str(tmp_path / "a"), "--steps", "2", "-n", "3") == 0
    assert run("--from", str(tmp_path / "a" / "a-b-sheet.png"), *model, "-o", str(tmp_path / "b")) == 0
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_options_given_win_over_the_picture(model_file: Path, tmp_path: Path) -> None:
    model = ["--model", str(model_file)]
    assert run("a b", *model, "-o", str(tmp_path), "--steps", "2", "--guidance", "3") == 0
    picture = ["--from", str(tmp_path / "a-b-0.png")]
    assert run(*picture, *model, "-o", str(tmp_path / "c"), "--steps", "4", "--seed", "9", "-n", "2") == 0
    own = read_png(tmp_path / "c" / "a-b-10.png").own
    assert own is not None and (own["steps"], own["guidance"], own["seed"]) == (4, 3.0, 10)


def test_from_says_what_it_cannot_do(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\nNegative prompt: \nSteps: 2, Sampler: Euler, Seed: 1, Size: 16x16, Model hash: 0123456789, Face: on"
    picture = ["--from", str(saved(tmp_path, text))]
    assert run(*picture, "-o", str(tmp_path / "o")) == 2
    assert "give its file with --model" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert run(*picture, "--model", str(model_file), "-o", str(tmp_path / "o"), "--json") == 0
    out = capsys.readouterr()
    assert "another model" in out.err and "Face: on" in out.err
    assert any("Face: on" in line for line in json.loads(out.out.splitlines()[-1])["not_honoured"])
    assert run("-o", str(tmp_path / "o")) == 2 and "no prompt" in capsys.readouterr().err
    assert run("a", "--format", "gif", "-o", str(tmp_path / "o")) == 2


def test_a_record_is_enough_whatever_the_file_name(model_file: Path) -> None:
    model = load_model(model_file, "cpu")
    made = generate(model, ["a", "b"], [1, 2], GenerateSettings(steps=2))
    record = record_of(made[1], model)
    assert record["batch"] == [1, 2]
    again = generate(model, ["b", "b"], [2, 2], GenerateSettings(steps=2))
    assert np.array_equal(np.asarray(made[1].image), np.asarray(again[1].image))


# ------------------------------------------------------------------------------------------------------- hostile


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def with_chunk(kind: bytes, data: bytes) -> bytes:
    plain = png_bytes(Image.new("RGB", (2, 2)))
    return plain[:33] + chunk(kind, data) + plain[33:]


@pytest.mark.parametrize(
    "data",
    [
        with_chunk(b"tEXt", b"parameters\0" + b"x" * 10_000_000),
        with_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"x" * 200_000_000)),
        with_chunk(b"tEXt", b'prompt\0{"a":'),
        with_chunk(b"tEXt", b"prompt\0" + b'{"a":' * 100_000),
        with_chunk(b"tEXt", b"dodgeburn\0" + json.dumps({"steps": "many", "seed": 1}).encode()),
        with_chunk(b"tEXt", b"dodgeburn\0" + json.dumps({"steps": 2, "seed": "1; rm"}).encode()),
        with_chunk(b"tEXt", b"dodgeburn\0" + json.dumps({"seed": 1, "batch": [0, 10**9]}).encode()),
        b"GIF89a" + bytes(20),
        b"",
    ],
    ids=["long", "bomb", "cut", "deep", "type", "seed", "batch", "gif", "empty"],
)
def test_hostile_pictures_are_refused_politely(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    assert run("--from", str(tmp_path / "a.png"), "-o", str(tmp_path / "o")) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and len(error[0]) < 500


def test_a_huge_line_is_read_in_no_time() -> None:
    data = png_bytes(Image.new("RGB", (2, 2)), Infotext("a " * 200_000))
    assert read_png(BytesIO(data)).infotext is not None  # type: ignore[arg-type]
