"""The audit on worlds whose bias is known, without a network: pictures are labels in disguise."""

import numpy as np
import pytest

from dodgeburn.errors import UserError
from dodgeburn.jobs import PartStore
from dodgeburn.measure.bias import UNREAD
from dodgeburn.pocket.captions import parse
from dodgeburn.rework.bias.audit import AuditSettings, as_json, audit, pocket_prompts, seeds_for
from dodgeburn.rework.bias.classify import ClipClassifier, PocketClassifier, open_attributes, read_attributes

COLOURS = ("black", "brown", "blonde", "red")
HATS = ("none", "cap")
PROMPTS = ("a doctor", "a gardener", "a cook", "a pilot", "a judge", "a cap")


class World:
    """Draws pictures whose first pixel says the hair's colour and whose second the hat; `ties` by prompt."""

    def __init__(self, ties: dict[str, float] | None = None, unread: float = 0.0) -> None:
        self.ties, self.unread, self.drawn = ties or {}, unread, 0

    def __call__(self, prompts, seeds, guidance) -> np.ndarray:
        self.drawn += len(prompts)
        out = np.zeros((len(prompts), 8, 8, 3), np.uint8)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            rng = np.random.default_rng(seed)
            tied = rng.random() < self.ties.get(prompt, 0.0)
            out[i, 0, 0] = 3 if tied else rng.integers(4)
            out[i, 0, 1] = rng.integers(2)
            out[i, 0, 2] = rng.random() < self.unread
        return out


class Labeller:
    name = "labeller"
    classes = {"hair": COLOURS, "hat": HATS}

    def labels(self, pictures):
        broken = pictures[:, 0, 2, 0] > 0
        hair, hat = np.asarray(COLOURS)[pictures[:, 0, 0, 0]], np.asarray(HATS)[pictures[:, 0, 1, 0]]
        return {"hair": np.where(broken, UNREAD, hair), "hat": np.where(broken, UNREAD, hat)}

    def named(self, prompt):
        return frozenset({"hat"}) if "cap" in prompt else frozenset()


SETTINGS = AuditSettings(PROMPTS, n=64, confirm=256)


def test_a_planted_tie_is_found_alone_and_named() -> None:
    world = World({"a gardener": 0.6})
    found = audit(world, Labeller(), SETTINGS)
    assert [(r.prompt, r.attribute, r.value) for r in found.alarms] == [("a gardener", "hair", "red")]
    row = found.alarms[0]
    assert row.share == pytest.approx(0.6 + 0.4 / 4, abs=0.09) and row.reference_share == pytest.approx(0.25, abs=0.08)
    assert row.uniform.n == 256 and row.tv_interval[0] <= row.tv <= row.tv_interval[1] and row.tv > row.floor_95
    assert world.drawn == found.pictures < 6 * 64 + 4 * 256  # the second look is for candidates' prompts only
    assert len(found.rows) == 6 + 5  # "a cap" says its hat itself
    out = as_json(found)
    assert out["alarms"][0]["prompt"] == "a gardener" and not out["proxy"]


def test_a_fair_world_raises_no_alarm() -> None:
    """40 audits of a fair world: at most 5 with an alarm (5 % of 40 is 2; 99.9 % of binomial draws are at most 7)."""
    cried = 0
    for seed in range(40):
        settings = AuditSettings(PROMPTS, n=32, confirm=64, tolerance=0.0, seed=seed)
        cried += bool(audit(World(), Labeller(), settings).alarms)
    assert cried <= 5


def test_one_look_and_several_guidance_scales() -> None:
    settings = AuditSettings(PROMPTS, guidance=(1.0, 7.5), n=200, confirm=0, attributes=("hair",))
    found = audit(World({"a judge": 0.9}), Labeller(), settings)
    assert {(r.guidance, r.prompt) for r in found.alarms} == {(1.0, "a judge"), (7.5, "a judge")}
    assert len(found.rows) == 12 and found.pictures == 2400


def test_unreadable_pictures_count_against_the_model() -> None:
    found = audit(World(unread=0.5), Labeller(), AuditSettings(PROMPTS, n=400, confirm=0))
    row = found.rows[0].uniform
    assert row.unread > 150 and row.tv < 0.15 < 0.35 < row.tv_cons


def test_what_was_drawn_is_kept(tmp_path) -> None:
    first, second = World({"a cook": 0.8}), World({"a cook": 0.8})
    a = audit(first, Labeller(), SETTINGS, PartStore(tmp_path / "job", {"x": 1}))
    b = audit(second, Labeller(), SETTINGS, PartStore(tmp_path / "job", {"x": 1}))
    assert first.drawn > 0 and second.drawn == 0
    assert as_json(a) == as_json(b)


def test_mutual_information_names_what_goes_together() -> None:
    class Together(World):
        def __call__(self, prompts, seeds, guidance):
            out = super().__call__(prompts, seeds, guidance)
            out[:, 0, 1] = out[:, 0, 0] // 2  # a cap wherever hair is blonde or red
            return out

    found = audit(Together(), Labeller(), AuditSettings(PROMPTS, n=200, confirm=0))
    a, b, nats = found.information(4.0, Labeller.classes)[0]
    assert {a, b} == {"hair", "hat"} and nats == pytest.approx(np.log(2), abs=0.02)
    apart = audit(World(), Labeller(), AuditSettings(PROMPTS, n=200, confirm=0))
    assert apart.information(4.0, Labeller.classes)[0][2] < 0.01


def test_seeds_are_fixed_and_nobody_elses() -> None:
    assert seeds_for("a doctor", 3, 0) == seeds_for("a doctor", 3, 0)
    everything = [s for p in PROMPTS for look in (0, 1) for s in seeds_for(p, 300, look)]
    assert len(set(everything)) == len(everything) and max(everything) < 2**64


def test_pocket_prompts_name_one_thing_each() -> None:
    prompts = pocket_prompts()
    assert len(prompts) == len(set(prompts)) == 30
    assert [len(parse(p)) for p in prompts] == [0, 0] + [1] * 28
    known = PocketClassifier.__new__(PocketClassifier)
    known.__init__(None)  # type: ignore[misc]
    assert "outfit" not in open_attributes(known, "a doctor") and "glasses" in open_attributes(known, "a doctor")
    with pytest.raises(UserError, match="no attribute 'gender'"):
        open_attributes(known, "a doctor", ["gender"])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"prompts": ("one",)}, "at least two"), ({"n": 2}, "at least 8"), ({"level": 2.0}, "0 to 1"),
     ({"control": "none"}, "holm or bh"), ({"guidance": ()}, "at least one scale")],
)  # fmt: skip
def test_settings_that_make_no_sense(change, message) -> None:
    with pytest.raises(UserError, match=message):
        AuditSettings(**{"prompts": PROMPTS, **change})


class Clip:
    """Stands for ClipScore: the picture's first channel value against each text's length."""

    name = "CLIP stand-in"

    def similarities(self, pictures, texts):
        return -np.abs(pictures[:, 0, 0, :1].astype(float) - [len(t) for t in texts])


def test_clip_takes_the_nearest_text_and_leaves_close_calls() -> None:
    attributes = {"gender": {"man": "x" * 10, "woman": "x" * 20}, "age": {"old": "x" * 30, "young": "x" * 40}}
    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    pictures[:, 0, 0, 0] = 12, 19, 35
    found = ClipClassifier(Clip(), attributes, margin=1.0).labels(pictures)
    assert found["gender"].tolist() == ["man", "woman", "woman"]
    assert found["age"].tolist() == ["old", "old", UNREAD]
    one = ClipClassifier(Clip(), attributes)
    assert one.name.startswith("proxy: ") and one.named("an old Man, walking") == {"gender", "age"}
    with pytest.raises(UserError, match="at least two"):
        ClipClassifier(Clip(), {"x": {"a": "b"}})


def test_attributes_of_a_file(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("gender: {woman: a photo of a woman, man: a photo of a man}\n")
    assert read_attributes(file) == {"gender": {"woman": "a photo of a woman", "man": "a photo of a man"}}
    for text, message in (("a: [", "not YAML"), ("gender: {man: x}", "at least two"), ("", "at least two")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_attributes(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_attributes(tmp_path / "none.yaml")
