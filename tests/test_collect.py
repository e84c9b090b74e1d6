"""Trajectories collected from a zoo: what a shard holds, that work goes on where it stopped, that models come back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dodgeburn.cli.main import main
from dodgeburn.errors import UserError
from dodgeburn.foresee.collect import (
    CollectSettings,
    Found,
    collect,
    moments,
    plan,
    trajectories,
    unlabelled,
)
from dodgeburn.foresee.labels import one_opinion
from dodgeburn.foresee.observe import SCALARS
from dodgeburn.foresee.shards import Store, read_shard, shard_name
from dodgeburn.foresee.zoo import CHANGES, MEMBERS, Drawn, Member, Zoo, draw, plain_zoo
from dodgeburn.sampling.loop import GenerateSettings, generate
from tests.tiny import tiny_model

PLAIN = ("sound", "few-steps", "disturbed", "rounded", "pruned")


def settings(**given: object) -> CollectSettings:
    base = {"prompts": ("a cat", "a dog", "a hat"), "members": PLAIN, "shards": 3, "prompts_per_shard": 2,
            "seeds_per_prompt": 2, "moments": 4, "steps": (3, 5)}  # fmt: skip
    return CollectSettings(**{**base, **given})  # type: ignore[arg-type]


def darkness(pictures: np.ndarray, prompts: object, drawn: object) -> list[Found]:
    """A made-up labeller."""
    return [Found(one_opinion(5 - 5 * float(p.mean()) / 255, "darkness"), (p.mean(-1) < 99).astype(np.uint8) * 255)
            for p in pictures]  # fmt: skip


@pytest.mark.parametrize("layout", ["sdxl", "sd15"])
def test_a_shard_is_what_the_sampler_went_through(layout: str) -> None:
    zoo = plain_zoo(tiny_model(layout))
    chosen = settings(members=("sound",))
    one = plan(chosen, zoo, 0)
    shard = trajectories(zoo, one, chosen, darkness)
    latents: list[torch.Tensor] = []
    again = generate(zoo.model, one.prompts, one.seeds, one.drawn.settings,
                     lambda step: latents.append(step.latents.clone()))  # fmt: skip
    kept = moments(one.drawn.settings.steps, 4)
    for i, record in enumerate(shard.records):
        rows = shard.rows(i)
        assert shard.tensors["step"][rows].tolist() == kept
        for at, k in zip(range(rows.start, rows.stop), kept, strict=True):
            assert torch.allclose(shard.tensors["x_t"][at].float(), latents[k][i], atol=2e-3, rtol=2e-3)
        assert record.seed == one.seeds[i] and record.prompt == one.prompts[i]
        assert np.array_equal(shard.tensors["picture"][i], again[i].image)
        assert record.label is not None and record.label.source == "darkness"
    assert shard.tensors["mask"].shape == (4, 16, 16)
    assert shard.tensors["cond"].dtype == torch.float16 and shard.tensors["scalars"].shape[1] == len(SCALARS)
    progress = shard.tensors["progress"][shard.rows(0)]
    assert progress[-1] == 1 and (progress.diff() > 0).all()
    assert (shard.tensors["log_snr"][shard.rows(0)].diff() > 0).all()


def test_moments() -> None:
    assert moments(20, 8) == [1, 4, 7, 9, 11, 14, 17, 19]  # 10 of 20 is step 9
    assert moments(8, 8) == list(range(8)) and moments(3, 8) == [0, 1, 2] and moments(1, 8) == [0]
    assert len(moments(50, 4)) == 4 and moments(1000, 1) == [999]


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    zoo, chosen = plain_zoo(tiny_model()), settings()
    assert collect(zoo, chosen, tmp_path / "whole", unlabelled, "none") == {"made": 3, "there": 0}

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(zoo, chosen, tmp_path / "cut", unlabelled, "none", progress=stop)
    assert not [p for p in (tmp_path / "cut").iterdir() if p.name.startswith(".")]
    assert collect(zoo, chosen, tmp_path / "cut", unlabelled, "none", part=(1, 2)) == {"made": 1, "there": 0}
    assert collect(zoo, chosen, tmp_path / "cut", unlabelled, "none") == {"made": 1, "there": 2}
    for i in range(3):
        a, b = ((tmp_path / f / shard_name(i)).read_bytes() for f in ("whole", "cut"))
        assert a == b, i
    store = Store(tmp_path / "cut")
    assert len(store) == 12 and {r.label for r in store.records} == {None}
    with pytest.raises(UserError, match="other settings"):
        collect(zoo, settings(seed=1), tmp_path / "cut", unlabelled, "none")
    # A collection can grow: what a shard holds does not depend on how many there are.
    assert collect(zoo, settings(shards=4), tmp_path / "cut", unlabelled, "none") == {"made": 1, "there": 3}


def test_what_a_shard_holds_depends_on_its_number_alone() -> None:
    zoo = plain_zoo(tiny_model())
    plans = [plan(settings(shards=40), zoo, i) for i in range(40)]
    assert plan(settings(), zoo, 7) == plans[7]
    seeds = [s for one in plans for s in one.seeds]
    assert len(set(seeds)) == len(seeds)
    assert {p for one in plans for p in one.prompts} == {"a cat", "a dog", "a hat"}
    drawn = [one.drawn.member.name for one in plans]
    shares = {m.name: m.share for m in zoo.members if m.name in PLAIN}
    for name, share in shares.items():
        assert drawn.count(name) == pytest.approx(40 * share / sum(shares.values()), abs=2), name
    assert len({one.drawn.settings.sampler for one in plans}) > 2


def test_fresh_noise_is_for_samplers_that_draw_it() -> None:
    zoo = plain_zoo(tiny_model())
    for i in range(12):
        chosen = plan(settings(fresh_noise=True, members=("ancestral", "default")), zoo, i).drawn
        assert chosen.settings.noise == ("fresh" if chosen.member.name == "ancestral" else "brownian")


@pytest.mark.parametrize("change", [*CHANGES, "towards"])
def test_a_change_changes_and_is_undone(change: str) -> None:
    model = tiny_model()
    zoo = Zoo(model, (Member("x", change=change, strength=(0.3, 0.3) if change != "round" else (3, 3)),),
              others=[tiny_model(seed=1)], held_out=None)  # fmt: skip
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    drawn = draw(zoo.members[0], np.random.default_rng(0))
    with zoo.changed(drawn):
        inside = {k: v.clone() for k, v in model.unet.state_dict().items()}
        assert not torch.equal(inside["conv_in.weight"], before["conv_in.weight"])
    with pytest.raises(RuntimeError), zoo.changed(drawn):
        assert all(torch.equal(v, inside[k]) for k, v in model.unet.state_dict().items())  # the same again
        raise RuntimeError
    assert all(torch.equal(v, before[k]) for k, v in model.unet.state_dict().items())


def test_changes_by_hand() -> None:
    w = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    generator = torch.Generator().manual_seed(0)
    assert CHANGES["prune"](w, 0.5, generator).tolist() == [[0, 0, 3, -4]]
    assert CHANGES["prune"](w, 0.0, generator) is w
    two_bits = CHANGES["round"](torch.linspace(-1, 1, 101)[None], 2.0, generator)
    assert len(two_bits.unique()) <= 5 and two_bits.abs().max() <= 1
    noisy = CHANGES["disturb"](torch.randn(100, 100, generator=generator), 0.1, generator)
    assert noisy.std() == pytest.approx(1.005, abs=0.02)


def test_people_label_what_was_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo, chosen = plain_zoo(tiny_model()), settings(shards=2)
    collect(zoo, chosen, tmp_path / "tr", unlabelled, "none")
    store = Store(tmp_path / "tr")
    label = ["artifacts", "label", str(tmp_path / "tr")]
    for _ in range(2):  # the same command again changes nothing
        assert main([*label, "--pictures", str(tmp_path / "rate")]) == 0
    listed = tmp_path / "rate" / "ratings.jsonl"
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [row["id"] for row in rows] == [r.id for r in store.records] and rows[0]["severity"] is None
    old = read_shard(store.paths[0])
    first = np.asarray(Image.open(tmp_path / "rate" / rows[0]["image"]))
    assert (first == old.tensors["picture"][0].numpy()).all()

    rows[0]["severity"], rows[1]["severity"], rows[2]["histogram"] = 4, 0.5, [0, 1, 1, 0, 0, 0]
    listed.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "id": "nobody"}]))
    assert main([*label, "--ratings", str(listed), "-o", str(tmp_path / "new"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["labelled"] == 3 and said["unknown"] == ["nobody"]
    new = Store(tmp_path / "new")
    labels = {r.id: r.label and r.label.severity for r in new.records}
    assert [labels[row["id"]] for row in rows[:4]] == [4, 0.5, 1.5, None]
    assert torch.equal(read_shard(new.paths[0]).tensors["x0"], old.tensors["x0"]) and new.digest != store.digest

    for more, message in (
        ([], "one of the two"), (["--ratings", str(listed)], "belong together"),
        (["--pictures", str(tmp_path / "tr")], "other settings"),
        (["--ratings", str(listed), "-o", str(tmp_path / "rate")], "other settings"),
    ):  # fmt: skip
        assert main([*label, *more]) == 2 and message in capsys.readouterr().err


def test_bad_settings(tmp_path: Path) -> None:
    for given, said in (({"prompts": ()}, "no prompts"), ({"shards": 0}, "shards"), ({"steps": (5, 3)}, "rising"),
                        ({"moments": 0}, "moments"), ({"seed": -1}, "seed is -1")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            settings(**given)
    zoo = plain_zoo(tiny_model())
    with pytest.raises(UserError, match="no generator 'nobody'"):
        collect(zoo, settings(members=("nobody",)), tmp_path, unlabelled, "none")
    with (
        pytest.raises(UserError, match="no other model"),
        zoo.changed(Drawn(Member("x", change="towards"), GenerateSettings(), 0.5, 0)),
    ):
        pass
    assert {m.name for m in MEMBERS} - {m.name for m in zoo.members} == {"merge", "overdone-merge", "slider"}


def test_the_verb_on_pocket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "t"
    args = ["artifacts", "collect", str(folder), "--trajectories", "8", "--seeds-per-prompt", "2", "--steps", "4", "4",
            "--generators", "slider", "--json"]  # fmt: skip
    assert main(args) == 0
    out = capsys.readouterr().out.strip().splitlines()
    found = json.loads(out[-1])
    assert found["trajectories"] == found["labelled"] == 8 and found["made"] == 1 and found["labels"] == "reader"
    assert main(args) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1])["there"] == 1
    assert Store(folder).space.model == "sdxl"


@pytest.mark.parametrize(("args", "said"), [
    ([], "which folder"),
    (["x", "--split", "valid"], "train or test"),
    (["x", "--label", "me"], "expected auto"),
    (["x", "--part", "2", "2"], "from 0 to N - 1"),
    (["x", "--prompts", "nowhere.txt"], "nowhere.txt"),
    (["x", "--generators", "prunned"], "did you mean pruned"),
    (["x", "--images", "y"], "without --ratings"),
    (["x", "--trajectories", "0"], "at least 1"),
])  # fmt: skip
def test_bad_input_of_the_verb(args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["artifacts", "collect", *args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:") and said in error
    assert not (tmp_path / "x" / "job.json").exists()
