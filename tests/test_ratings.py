"""Ratings in the formats people share them in: read by their columns, brought to one scale, joined with pictures."""

import io
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dodgeburn.cli.main import main
from dodgeburn.errors import DodgeburnWarning, UserError
from dodgeburn.foresee.labels import one_opinion
from dodgeburn.foresee.rated import RatedSettings, collect_rated, fitted, rated_shard
from dodgeburn.foresee.ratings import Rated, RatingSet, read_ratings
from dodgeburn.foresee.shards import NOISED, TRUE, Store
from dodgeburn.sampling.loop import GenerateSettings, generate
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]


def pictures(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(path)


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def severities(found: RatingSet) -> dict[str, float]:
    return {row.id: round(row.label.severity, 3) for row in found.rows}


def test_diffusiondb_with_ai_horde(tmp_path: Path) -> None:
    pictures(tmp_path, "a.webp", "b.webp", "c.webp")
    meta = [{"image_name": f"{n}.webp", "prompt": f"p {n}", "seed": i, "step": 20, "cfg": 7.0, "sampler": s,
             "width": 16, "height": 16, "image_nsfw": 2.0 if n == "c" else 0.0}
            for i, (n, s) in enumerate([("a", 4), ("b", 2), ("c", 1)])]  # fmt: skip
    rows = [("a", "u", 0, "1"), ("a", "u", 5, "2"), ("a", "v", 4, "1"), ("b", "u", 0, "1"), ("b", "v", None, "1"),
            ("c", "u", 3, "1")]  # fmt: skip
    horde = [{"id": i, "user_id": u, "artifacts": x, "created_at": t, "rating": 5} for i, u, x, t in rows]
    found = read_ratings([table(tmp_path / "m.parquet", meta), table(tmp_path / "r.parquet", horde)], tmp_path)
    assert found.formats == {"m.parquet": "DiffusionDB", "r.parquet": "AI-Horde"}
    a, b = found.rows
    assert a.label.histogram == (0, 0, 0, 0, 1, 1)  # u's later rating counts, the first one doesn't
    assert a.made == {"seed": 0, "steps": 20, "guidance": 7.0, "sampler": "euler_a", "width": 16, "height": 16,
                      "spacing": "linspace"}  # fmt: skip
    assert b.label.histogram == (1, 0, 0, 0, 0, 0) and "sampler" not in b.made
    assert any("blurred" in line for line in found.said) and any("say nothing" in line for line in found.said)


def test_image_reward_hpd_and_plain(tmp_path: Path) -> None:
    pictures(tmp_path, "x/1.png", "x/2.png", "3.jpg")
    rows = [{"image_path": f"x/{i}.png", "prompt_id": "0", "prompt": "p", "fidelity_rating": f}
            for i, f in ((1, 7), (2, 1), (2, 3))]  # fmt: skip
    found = read_ratings([table(tmp_path / "r.jsonl", rows)], tmp_path)
    assert severities(found) == {"1": 0, "2": pytest.approx(25 / 6, abs=1e-3)}
    ranks = [{"prompt": "p", "image_path": ["x/1.png", "x/2.png", "3.jpg"], "rank": [1, 3, 2], "raw_annotations": []}]
    found = read_ratings([table(tmp_path / "h.jsonl", ranks)], tmp_path)
    assert severities(found) == {"1": 1.25, "2": 3.75, "3": 2.5}
    assert {row.label.source for row in found.rows} == {"preference"}
    pairs = [{"prompt": "p", "file_path": ["x/1.png", "x/2.png"], "human_preference": [0, 1]}]
    assert severities(read_ratings([table(tmp_path / "hp.jsonl", pairs)], tmp_path)) == {"1": 3.333, "2": 1.667}
    plain = [{"image": "3.jpg", "prompt": "p", "histogram": [0, 0, 0, 0, 1, 3]},
             {"image": "x/1.png", "prompt": "p", "histogram": [2, 0, 0, 0, 0, 0]}]  # fmt: skip
    assert severities(read_ratings([table(tmp_path / "n.jsonl", plain)], tmp_path)) == {"3.jpg": 4.75, "x/1.png": 0}


def test_pick_a_pic_brings_its_pictures(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    rows = [{"caption": "p", "image_0_uid": "u0", "image_1_uid": "u1", "label_0": a, "label_1": 1 - a,
             "jpg_0": buffer.getvalue(), "jpg_1": buffer.getvalue()} for a in (1.0, 1.0, 0.5)]  # fmt: skip
    found = read_ratings([table(tmp_path / "p.parquet", rows)], tmp_path)
    assert severities(found) == {"u0": 1.5, "u1": 3.5} and isinstance(found.rows[0].image, bytes)


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def chunk(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def test_rich_hf_tfrecord(tmp_path: Path) -> None:
    data = b""
    for name, score in (("a.png", 0.9), ("b.png", 0.2)):
        features = {"filename": chunk(1, chunk(1, name.encode())),
                    "artifact_score": chunk(2, chunk(1, struct.pack("<f", score)))}  # fmt: skip
        body = b"".join(chunk(1, chunk(1, key.encode()) + chunk(2, value)) for key, value in features.items())
        record = chunk(1, body)
        data += struct.pack("<Q", len(record)) + b"crc4" + record + b"crc4"
    (tmp_path / "train.tfrecord").write_bytes(data)
    pictures(tmp_path, "a.png", "b.png")
    found = read_ratings([tmp_path / "train.tfrecord"], tmp_path)
    assert severities(found) == {"a": 0.5, "b": 4.0}  # a plausibility: 1 is the best
    (tmp_path / "train.tfrecord").write_bytes(data[:-9])
    with pytest.raises(UserError, match="cut short"):
        read_ratings([tmp_path / "train.tfrecord"], tmp_path)


@pytest.mark.parametrize(("rows", "said"), [
    ([{"name": "a", "stars": 3}], "name, stars"),
    ([{"id": "a", "artifacts": 3}], "none of their pictures"),
    ([{"image": "1.png", "prompt": "p", "severity": 2}, {"image": "2.png", "prompt": "p", "severity": 2}], "constant"),
    ([{"image": "1.png", "prompt": "p", "severity": 1}, {"image": "2.png", "prompt": "p", "severity": 2}], "0 of 2"),
    ([{"image": "1.png", "prompt": "p", "severity": 9}], "no rating of artifacts"),
    ([{"image": "1.png", "prompt": "p", "histogram": [1, 2]}], "counts of severity"),
    ([{"id": "1", "artifacts": 0}], "no prompts"),
])  # fmt: skip
def test_bad_input(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    pictures(tmp_path, "1.png", "2.png")
    with pytest.raises(UserError, match=said):
        read_ratings([table(tmp_path / "r.jsonl", rows)], tmp_path)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no parquet")
    (tmp_path / "y.txt").write_text("")
    (tmp_path / "z.jsonl").write_text("[1]\n")
    for name, said in (("x.parquet", "cannot be read"), ("y.txt", "expected one of"), ("z.jsonl", "named columns"),
                       ("none.csv", "no such file")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            read_ratings([tmp_path / name], tmp_path)


def test_replayed_where_it_is_the_same_picture_and_noised_elsewhere(tmp_path: Path) -> None:
    model = tiny_model()
    made = GenerateSettings(steps=4, guidance=3.0, sampler="euler", spacing="linspace")
    latents: list[torch.Tensor] = []
    found = generate(model, ["a cat", "a dog", "a hat"], [5, 6, 7], made, lambda s: latents.append(s.latents.clone()))
    rows = []
    for i, one in enumerate(found):
        path = tmp_path / f"{i}.png"
        (one.image if i != 1 else Image.new("RGB", one.image.size, "white")).save(path)
        known = {"seed": 5 + i, "steps": 4, "guidance": 3.0, "sampler": "euler", "spacing": "linspace"}
        rows.append(Rated(str(i), one.prompt, one_opinion(i, "x"), path, known))
    rows.append(Rated("3", "a boat", one_opinion(5, "x"), tmp_path / "0.png"))
    shard = rated_shard(model, rows, RatedSettings(moments=4))
    assert [r.provenance for r in shard.records] == [TRUE, NOISED, TRUE, NOISED]
    for i in (0, 2):
        at = shard.rows(i)
        assert shard.tensors["step"][at].tolist() == [0, 1, 2, 3]
        for row, k in zip(range(at.start, at.stop), range(4), strict=True):
            assert torch.allclose(shard.tensors["x_t"][row].float(), latents[k][i], atol=5e-3, rtol=2e-3)
    assert set(shard.tensors["step"][shard.rows(1)].tolist()) == {-1}
    assert (shard.tensors["log_snr"][shard.rows(3)].diff() > 0).all()
    none = rated_shard(model, rows, RatedSettings(moments=4, replay=False))
    assert {r.provenance for r in none.records} == {NOISED}


def test_noise_stays_or_is_new_at_each_level(tmp_path: Path) -> None:
    model = tiny_model("sd15")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "a.png")
    rows = [Rated("a", "a cat", one_opinion(1, "x"), tmp_path / "a.png")]
    corr = []
    for fresh in (False, True):
        shard = rated_shard(model, rows, RatedSettings(moments=4, fresh_noise=fresh, replay=False))
        x = shard.tensors["x_t"].float().flatten(1)
        corr.append(float(torch.corrcoef(x[:2])[0, 1]))
    assert corr[0] > 0.8 > corr[1]


def test_pictures_are_cut_not_squeezed() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (fitted(wide, 10) == 200).all() and fitted(wide, 16).shape == (16, 16, 3)


def test_made_up_ratings_go_through_collect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = [sys.executable, str(ROOT / "examples" / "made_up_ratings.py"), str(tmp_path / "rated")]
    subprocess.run([*script, "--pictures", "8", "--steps", "6"], check=True, cwd=ROOT, capture_output=True)
    files = [str(tmp_path / "rated" / f"{name}.parquet") for name in ("metadata", "ratings")]
    args = ["artifacts", "collect", str(tmp_path / "t"), "--ratings", *files, "--moments", "3", "--json"]
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["trajectories"] == 8 and found["replayed"] == 3 and found["noised"] == 5  # the model's own, less one
    assert {r.label.source for r in Store(tmp_path / "t").records if r.label} == {"ai-horde"}
    assert main(args) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1])["there"] == 1


def test_dirty_rows_are_read_as_far_as_they_go_and_the_rest_is_counted(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{i}.png" for i in range(8)))
    base = {"prompt": "p", "severity": 1}
    rows = [
        {**base, "image": "0.png", "seed": "abc", "steps": "10.0", "guidance": "4.5", "width": float("nan")},
        {**base, "image": "1.png", "severity": 4, "seed": float("nan"), "steps": "many", "sampler": None},
        {"image": "2.png", "severity": 2},  # no prompt at all
        {**base, "image": "3.png", "prompt": None},
        {**base, "image": "4.png", "severity": 14},
        {**base, "image": "5.png", "severity": -1},
        {**base, "image": "6.png", "seed": 7, "steps": 2.5},
    ]
    found = read_ratings([table(tmp_path / "r.jsonl", rows)], tmp_path)
    assert {row.id: row.made for row in found.rows} == {
        "0.png": {"steps": 10, "guidance": 4.5}, "1.png": {}, "6.png": {"seed": 7},
    }  # fmt: skip
    said = "\n".join(found.said)
    assert (
        "1 of 7 rows" in said
        and "2 of 6 ratings say nothing" in said
        and "1 of 4 rated pictures have no prompt" in said
    )


def test_raters_of_one_picture_are_summed(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    rows = [{"image": "a.png", "prompt": "p", "severity": s} for s in (0, 2, 4)]
    rows.append({"image": "b.png", "prompt": "p", "severity": 5})
    found = {row.id: row.label for row in read_ratings([table(tmp_path / "r.jsonl", rows)], tmp_path).rows}
    assert found["a.png"].severity == pytest.approx(2) and sum(found["a.png"].histogram) == 3
    assert found["a.png"].weight > found["b.png"].weight == 1


def test_pictures_that_cannot_be_opened_are_left_out(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [
        Rated(n, "p", one_opinion(s, "x"), tmp_path / n) for n, s in (("a.png", 0), ("broken.png", 3), ("b.png", 5))
    ]
    with pytest.warns(DodgeburnWarning, match="broken.png"):
        counts = collect_rated(tiny_model(), RatingSet(rows, {}, []), RatedSettings(moments=2), tmp_path / "out")
    assert counts["made"] == 1 and [r.id for r in Store(tmp_path / "out").records] == ["a.png", "b.png"]


@pytest.mark.parametrize("wrong", [{"moments": 0}, {"seed": -1}])
def test_settings_of_rated_pictures(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected at least 1"):
        RatedSettings(**wrong)
