"""Textual inversions: files of every writer, names in prompts, vectors in the place of tokens, records and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from dodgeburn.checkpoint import tensorfile
from dodgeburn.checkpoint.embedding_file import TextEmbedding, read_embedding
from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.images.png import read_png
from dodgeburn.models.saving import save_single_file
from dodgeburn.sampling.embeddings import as_comfy, named_in, used_in
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.sampling.prompts import encode, token_chunks
from tests.tiny import tiny_model

WIDTHS = {"sd15": [16], "sdxl": [16, 24]}


def vectors(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def embedding(name: str, layout: str, n: int = 2, seed: int = 0) -> TextEmbedding:
    return TextEmbedding(name, tuple(vectors(n, width, seed + i) for i, width in enumerate(WIDTHS[layout])))


# -------------------- names


def test_names_in_the_dialects() -> None:
    names = ["bad", "bad-hands", "a.b"]
    assert named_in("BAD-hands, badly (bad), a.b", "a1111", names) == ["", 1, ", badly (", 0, "), ", 2, ""]
    assert named_in("axb", "a1111", names) == ["axb"] and named_in("bad", "plain", names) == ["bad"]
    assert named_in("bad, embedding:bad.pt embedding:badly embedding:a.b", "comfy", names) == [
        "bad, ", 0, " embedding:badly ", 2, ""
    ]  # fmt: skip
    assert used_in(["a.b and bad", "bad"], "a1111", names) == [0, 2] and named_in("bad", "a1111", []) == ["bad"]
    assert as_comfy("(Bad:1.2), a.b", names) == "(embedding:bad:1.2), embedding:a.b"


def test_names_are_found_as_the_prompt_is_read() -> None:
    """Brackets are weights unless they are protected; a weight is no name."""
    names = ["style(v2)", "foo", "1.2"]
    model = tiny_model("sd15")
    model.embeddings = [embedding(name, "sd15") for name in names]
    for text, syntax, found in (
        (r"a style\(v2\) hat", "a1111", [0]), ("a style(v2) hat", "a1111", []), ("(a hat:1.2)", "a1111", []),
        ("(foo:1.2) 1.2", "a1111", [1, 2]), (r"embedding:style\(v2\).pt", "comfy", [0]),
        ("(embedding:foo:1.2)", "comfy", [1]), ("foo", "plain", []),
    ):  # fmt: skip
        ids = [i for row in token_chunks(model.tokenizers[0], text, syntax, model.embeddings) for i in row.ids if i < 0]
        assert used_in([text], syntax, names) == found and len(ids) == 2 * len(found)
    assert as_comfy(r"a style\(v2\), foo", names) == r"a embedding:style\(v2\), embedding:foo"


# -------------------- files


def test_files_of_every_writer(tmp_path: Path) -> None:
    v, g = vectors(3, 16), vectors(3, 24, 1)
    a1111 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(v.half())},
        "name": "x",
        "step": 9,
    }
    torch.save(a1111, tmp_path / "one.pt")
    torch.save({"<one>": v[0]}, tmp_path / "learned_embeds.bin")
    save_file({"emb_params": v}, tmp_path / "two.safetensors")
    save_file({"clip_g": g, "clip_l": v}, tmp_path / "xl.safetensors")
    one = read_embedding(tmp_path / "one.pt", [16])
    assert torch.equal(one.vectors[0], v.half().float()) and (one.name, one.file, len(one)) == ("one", "one.pt", 3)
    assert torch.equal(read_embedding(tmp_path / "learned_embeds.bin", [16]).vectors[0], v[:1])
    assert torch.equal(read_embedding(tmp_path / "two.safetensors", [16]).vectors[0], v)
    both = read_embedding(tmp_path / "xl.safetensors", [16, 24]).vectors
    assert torch.equal(both[0], v) and torch.equal(both[1], g)
    for name, widths in (("xl.safetensors", [16]), ("two.safetensors", [16, 24]), ("two.safetensors", [24])):
        with pytest.raises(UserError, match="another architecture"):
            read_embedding(tmp_path / name, widths)


def test_what_is_no_embedding(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"string_to_param": {"*": Evil()}}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"string_to_param": {"*": torch.zeros(2, 3, 16)}}, tmp_path / "deep.pt")
    save_file({"emb_params": torch.full((1, 16), torch.nan)}, tmp_path / "nan.safetensors")
    save_file({"a": torch.zeros(2, 16), "b": torch.zeros(2, 16), "c": torch.zeros(1)}, tmp_path / "m.safetensors")
    save_file({"emb_params": torch.zeros(2, 16, dtype=torch.int64)}, tmp_path / "int.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    torch.save({"a": torch.zeros(2, 16).to_sparse()}, tmp_path / "sparse.pt")
    torch.save({"a": torch.zeros(2, 16, device="meta")}, tmp_path / "meta.pt")
    # Tensors that claim to be larger than memory, of one value each.
    torch.save({"a": torch.zeros(1).half().as_strided((1, 10**13), (0, 0))}, tmp_path / "wide.pt")
    torch.save({"a": torch.zeros(1).half().as_strided((10**12, 16), (0, 0))}, tmp_path / "many.pt")
    for name, said in (
        ("evil.pt", "could run code"), ("list.pt", "no textual inversion"), ("deep.pt", "shape"),
        ("nan.safetensors", "NaN"), ("m.safetensors", "no textual inversion"),
        ("int.safetensors", "no textual inversion"), ("cut.safetensors", "cut"), ("none.pt", "is not there"),
        ("sparse.pt", "sparse"), ("meta.pt", "without data"), ("wide.pt", "another architecture"), ("many.pt", "shape"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            read_embedding(tmp_path / name, [16])


def test_a_file_of_another_shape_is_refused_before_it_is_read(tmp_path: Path, monkeypatch) -> None:
    save_file({"token_embedding.weight": torch.zeros(5000, 16)}, tmp_path / "large.safetensors")
    monkeypatch.setattr(tensorfile, "load_tensors", lambda path: pytest.fail("was read"))
    with pytest.raises(UserError, match=r"\[5000, 16\]"):
        read_embedding(tmp_path / "large.safetensors", [16])


# -------------------- tokens and states


def test_an_embedding_is_not_cut_where_a_chunk_ends() -> None:
    model = tiny_model("sd15")
    three = embedding("foo", "sd15", 3)
    rows = token_chunks(model.tokenizers[0], "a" * 74 + " foo b", "a1111", [three])
    assert [sum(i < 0 for i in row.ids) for row in rows] == [0, 3] and rows[1].ids[1:4] == [-1, -2, -3]
    rows = token_chunks(model.tokenizers[0], "a" * 72 + " (foo:1.5) b", "a1111", [three])
    assert [sum(i < 0 for i in row.ids) for row in rows] == [3, 0] and rows[0].weights[73:77] == [1.5] * 3 + [1.0]
    # Neighbours are told apart, and one that no chunk holds is cut after all.
    both = token_chunks(model.tokenizers[0], "a" * 73 + " bar foo", "a1111", [three, embedding("bar", "sd15", 2)])
    assert [[i for i in row.ids if i < 0] for row in both] == [[-5, -6], [-1, -2, -3]]
    long = token_chunks(model.tokenizers[0], "foo", "a1111", [embedding("foo", "sd15", 80)])
    assert [sum(i < 0 for i in row.ids) for row in long] == [75, 5]


@pytest.mark.oracle
@pytest.mark.parametrize("n", [1, 3])
def test_states_are_those_of_diffusers(n: int) -> None:
    model = tiny_model("sd15")
    one = embedding("foo", "sd15", n)
    model.embeddings = [one, embedding("unused", "sd15", 4, 9)]
    ours = encode(model, ["a foo, bb Foo", "plain"])
    oracle = tiny_model("sd15")
    parts = {"vae": oracle.vae, "text_encoder": oracle.text_encoders[0], "tokenizer": oracle.tokenizers[0],
             "unet": oracle.unet}  # fmt: skip
    none = dict.fromkeys(("scheduler", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
    pipe.load_textual_inversion({"<foo>": one.vectors[0]}, token="<foo>")
    for prompt, text in (("a <foo>, bb <foo>", "a foo, bb Foo"), ("plain", "plain")):
        expected = pipe.encode_prompt(prompt, torch.device("cpu"), 1, False)[0][0]
        assert torch.allclose(ours[text].embeds, expected, atol=1e-6)
    assert not torch.allclose(ours["a foo, bb Foo"].embeds, encode(tiny_model("sd15"), ["a foo, bb Foo"])[
        "a foo, bb Foo"].embeds, atol=1e-3)  # fmt: skip


def test_both_encoders_of_sdxl_see_their_own_vectors() -> None:
    """An embedding of the vectors that a word's letters have anyway is the word."""
    model = tiny_model("sdxl")
    ids = [token_chunks(t, "cat")[0].ids[1:4] for t in model.tokenizers]
    tables = [encoder.get_input_embeddings().weight for encoder in model.text_encoders]
    own = tuple(table[torch.tensor(i)].detach().clone() for table, i in zip(tables, ids, strict=True))
    expected = encode(model, ["a cat (cat:1.3) sat"])["a cat (cat:1.3) sat"]
    model.embeddings = [TextEmbedding("foo", own)]
    found = encode(model, ["a foo (foo:1.3) sat"])["a foo (foo:1.3) sat"]
    assert torch.equal(found.embeds, expected.embeds) and torch.equal(found.pooled, expected.pooled)
    comfy = encode(model, ["a embedding:foo (embedding:foo:1.3) sat"], syntax="comfy")
    assert torch.equal(
        comfy["a embedding:foo (embedding:foo:1.3) sat"].embeds,
        encode(model, ["a cat (cat:1.3) sat"], syntax="comfy")["a cat (cat:1.3) sat"].embeds,
    )
    assert encode(model, ["a foo"], syntax="plain")["a foo"].embeds.shape == found.embeds.shape


def test_unknown_names_are_said_and_known_ones_are_not() -> None:
    model = tiny_model("sd15")
    model.embeddings = [embedding("foo", "sd15")]
    settings = GenerateSettings(steps=1, prompt_syntax="comfy")
    with pytest.warns(DodgeburnWarning, match="read as words: embedding:bar. "):
        generate(model, ["embedding:foo, embedding:bar"], [0], settings)


# -------------------- command line


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "ti" / "below").mkdir(parents=True)
    for name, seed in (("foo", 0), ("below/ugly", 5)):
        both = {"clip_l": vectors(2, 16, seed), "clip_g": vectors(2, 24, seed + 1)}
        save_file(both, tmp_path / "ti" / f"{name}.safetensors")
    return tmp_path


def last(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_pictures_say_their_embeddings_and_are_made_again(model_file: Path, place: Path, capsys) -> None:
    common = ["--model", str(model_file), "--steps", "2", "--json"]
    args = ["generate", "a foo hat", "--negative", "Ugly", "--embedding-dir", str(place / "ti"), *common]
    assert main([*args, "-o", str(place / "a")]) == 0
    said = capsys.readouterr().out
    assert "embedding foo: 2 vectors" in said and "embedding ugly: 2 vectors" in said
    picture = place / "a" / "a-foo-hat-0.png"
    text = read_png(picture)
    assert text.own is not None and [one["name"] for one in text.own["embeddings"]] == ["ugly", "foo"]
    assert text.infotext is not None
    assert text.infotext.settings["TI hashes"].startswith(f"ugly: {text.own['embeddings'][0]['sha256'][:12]}, foo: ")
    assert main(["generate", "a foo hat", "--negative", "Ugly", "-o", str(place / "b"), *common]) == 0
    assert (place / "b" / "a-foo-hat-0.png").read_bytes() != picture.read_bytes()

    again = ["generate", "--from", str(picture), *common, "-o", str(place / "c")]
    capsys.readouterr()
    assert main(again) == 2 and "made with the embedding ugly.safetensors" in capsys.readouterr().err
    assert main([*again, "--embedding-dir", str(place / "ti")]) == 0
    assert (place / "c" / "a-foo-hat-0.png").read_bytes() == picture.read_bytes()
    save_file({"clip_l": vectors(1, 16), "clip_g": vectors(1, 24)}, place / "ti" / "foo.safetensors")
    capsys.readouterr()
    assert main([*again, "--embedding-dir", str(place / "ti")]) == 0
    assert "made with another foo" in capsys.readouterr().err
    # In a grid, and where the picture's prompt no longer names them.
    grid = ["generate", "a foo hat", "--x", "prompt=foo,bare", "--embedding-dir", str(place / "ti"), *common]
    assert main([*grid, "-o", str(place / "grid")]) == 0
    rows = last(capsys)["pictures"]
    named = [read_png(row["path"]).own for row in rows]
    assert [own is not None and "embeddings" in own for own in named] == [True, False]


def test_each_cell_of_a_grid_has_the_embeddings_that_its_own_prompts_name(
    model_file: Path, place: Path, capsys
) -> None:
    common = ["generate", "a hat", "--model", str(model_file), "--steps", "2", "--json"]
    foo = str(place / "ti" / "foo.safetensors")
    alone = [*common, "--negative", "foo", "--embedding", foo]
    assert main([*alone, "-o", str(place / "alone")]) == 0
    expected = (place / "alone" / "a-hat-0.png").read_bytes()
    for number, more in enumerate((["--embedding", foo], ["--embedding-dir", str(place / "ti")])):
        assert main([*common, "--x", "negative=ugly dog,foo", *more, "-o", str(place / f"g{number}")]) == 0
        bare, named = (Path(row["path"]) for row in last(capsys)["pictures"])
        assert named.read_bytes() == expected
        assert "foo" not in str((read_png(bare).own or {}).get("embeddings"))
    # One that no cell names is still refused.
    assert main([*common, "--x", "negative=fool,bar", "--embedding", foo, "-o", str(place / "no")]) == 2
    assert "has no effect: no prompt names it" in capsys.readouterr().err and not (place / "no").exists()


def test_the_longest_name_alone_is_taken_from_the_folder(model_file: Path, place: Path, capsys) -> None:
    save_file({"emb_params": vectors(2, 16)}, place / "ti" / "big.safetensors")  # for another architecture
    (place / "ti" / "foo.safetensors").rename(place / "big-foo.safetensors")
    args = ["generate", "a big-foo hat", "--model", str(model_file), "--steps", "2", "-o", str(place / "o"), "--json"]
    assert main([*args, "--embedding-dir", str(place / "ti"), "--embedding", str(place / "big-foo.safetensors")]) == 0
    own = read_png(last(capsys)["pictures"][0]["path"]).own
    assert own is not None and [one["name"] for one in own["embeddings"]] == ["big-foo"]


def test_an_a1111_picture_names_them_too(model_file: Path, place: Path, capsys) -> None:
    infotext = (
        "a foo hat\nNegative prompt: nasty\nSteps: 2, Sampler: Euler, Schedule type: Karras, CFG scale: 4, Seed: 1, "
        'Size: 16x16, RNG: CPU, TI hashes: "foo: 123456789abc, nasty: 0"'
    )
    chunks = PngInfo()
    chunks.add_text("parameters", infotext)
    Image.new("RGB", (16, 16)).save(place / "a.png", pnginfo=chunks)
    args = ["generate", "--from", str(place / "a.png"), "--model", str(model_file), "-o", str(place / "o"), "--json"]
    assert main([*args, "--embedding", str(place / "ti" / "foo.safetensors")]) == 0
    said = capsys.readouterr()
    assert "embedding nasty: no such file, its name is read as words" in said.err and "another foo" in said.err
    assert json.loads(said.out.strip().splitlines()[-1])["not_honoured"] == [
        "embedding nasty: no such file, its name is read as words"
    ]


def test_bad_input_is_one_line(model_file: Path, place: Path, capsys) -> None:
    foo = str(place / "ti" / "foo.safetensors")
    save_file({"emb_params": vectors(2, 16)}, place / "old.safetensors")
    for more, said in (
        (["--embedding", foo, "--prompt-syntax", "comfy"], "say 'embedding:foo'"),
        (["--embedding", str(place / "none.pt")], "no such file"),
        (["--embedding-dir", str(place / "none")], "no such folder"),
        (["--embedding", foo, "--embedding", foo], "one name"),
    ):
        assert main(["generate", "a foo", "--model", str(model_file), "-o", str(place / "o"), *more]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
    assert main(["generate", "a hat", "--model", str(model_file), "-o", str(place / "o"), "--embedding", foo]) == 2
    assert "has no effect" in capsys.readouterr().err
    old = ["--embedding", str(place / "old.safetensors")]
    assert main(["generate", "an old hat", "--model", str(model_file), "-o", str(place / "o"), *old]) == 2
    assert "another architecture" in capsys.readouterr().err and not (place / "o").exists()


def test_inspect_says_what_it_is(place: Path, capsys) -> None:
    save_file({"emb_params": vectors(8, 768)}, place / "neg.safetensors")
    save_file({"<cat>": vectors(1, 768)[0]}, place / "cat.safetensors")
    save_file({"weight": vectors(2, 768)}, place / "odd.safetensors")
    save_file({"emb_params": vectors(2, 768).int()}, place / "whole.safetensors")
    save_file({"emb_params": torch.zeros(0, 768)}, place / "none.safetensors")
    save_file({"emb_params": vectors(2, 768).bfloat16()}, place / "bf16.safetensors")
    for name, said in (("neg", "textual inversion of 8 vectors for SD1.5"), ("cat", "inversion of 1 vector for SD1.5"),
                       ("odd", "unknown"), ("whole", "unknown"), ("none", "unknown"), ("bf16", "2 vectors for SD1.5"),
                       ("ti/foo", "2 vectors for text encoders 16 and 24 wide")):  # fmt: skip
        assert main(["inspect", str(place / f"{name}.safetensors")]) == 0
        assert said in capsys.readouterr().out


def test_comparisons_take_them_too(tmp_path: Path, capsys) -> None:
    model = tiny_model("sdxl")
    other = tiny_model("sdxl")
    with torch.no_grad():
        for weight in other.unet.parameters():
            weight.mul_(1.1)
    for name, one in (("a", model), ("b", other)):
        save_single_file(one, tmp_path / f"{name}.safetensors")
    model.tokenizers[0].save_pretrained(str(tmp_path / "tokenizer"))
    save_file({"clip_l": vectors(2, 16), "clip_g": vectors(2, 24)}, tmp_path / "foo.safetensors")
    (tmp_path / "prompts.txt").write_text("a hat\n")
    args = ["compare", *(str(tmp_path / f"{name}.safetensors") for name in "ab"), "--presets", "none", "--bases", "0.5"]
    args += ["--prompts", str(tmp_path / "prompts.txt"), "--seeds", "0", "--steps", "1", "--negative", "foo"]
    assert main([*args, "-o", str(tmp_path / "one")]) == 0
    assert main([*args, "-o", str(tmp_path / "two"), "--embedding", str(tmp_path / "foo.safetensors")]) == 0
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.npz")} for name in ("one", "two"))
    assert one and one.keys() == two.keys() and all(one[name] != two[name] for name in one)
    assert "foo" in json.loads((tmp_path / "two" / "job.json").read_text())["settings"]["embeddings"]
    capsys.readouterr()
    assert main([*args, "-o", str(tmp_path / "two")]) == 2 and "other settings" in capsys.readouterr().err
