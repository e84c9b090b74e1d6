"""Searches: seeds one after another until a picture is good."""

import numpy as np
import pytest

from dodgeburn.foresee import savings
from dodgeburn.foresee.search import Search, Seeds, cheapest, run, searches, seeds_of


def seeds(severity: np.ndarray, noise: float = 0.0, seed: int = 0) -> Seeds:
    """Estimates that are the truth and some noise, the same at both looks and at the end."""
    rng = np.random.default_rng(seed)
    seen = {share: severity + noise * rng.normal(size=severity.shape) for share in (0.25, 0.5)}
    spent = {share: np.full(severity.shape, share) for share in seen}
    return Seeds(seen, spent, severity + noise * rng.normal(size=severity.shape), np.ones(severity.shape), severity)


def one_by_one(search: Search, s: Seeds, order: list[int], slot: int) -> tuple[float, float, float]:
    """The same in plain words, for one slot and one order of its seeds."""
    price, best, finished, handed = 0.0, np.inf, np.inf, np.nan
    for k, i in enumerate(order[: search.rounds]):
        spare = k == min(search.rounds, len(order)) - 1 and np.isinf(best)
        out = [share for share, theta in sorted(search.looks) if s.expected[share][slot, i] > theta and not spare]
        if out:
            price += s.spent[out[0]][slot, i]
            continue
        price += s.whole[slot, i]
        if s.end[slot, i] < best:
            best, handed = s.end[slot, i], s.severity[slot, i]
        finished = min(finished, s.severity[slot, i])
        if best <= search.stop:
            break
    return finished, price, handed


@pytest.mark.parametrize("looks", [(), ((0.25, 2.0),), ((0.25, 3.0), (0.5, 1.0))])
@pytest.mark.parametrize("stop", [-1.0, 0.5, 9.0])
def test_a_search_is_what_its_words_say(looks: tuple[tuple[float, float], ...], stop: float) -> None:
    s = seeds(np.random.default_rng(1).uniform(0, 5, (5, 4)), 1.0)
    search = Search(3, looks, stop)
    found = run(search, s, draws=7, seed=3)
    rng = np.random.default_rng(3)
    said = np.zeros((5, 3))
    for _ in range(7):
        order = rng.permuted(np.tile(np.arange(4), (5, 1)), axis=1)
        said += [one_by_one(search, s, order[i].tolist(), i) for i in range(5)]
    np.testing.assert_allclose(found.severity, said[:, 0] / 7)
    np.testing.assert_allclose(found.price, said[:, 1] / 7)
    np.testing.assert_allclose(found.chosen, said[:, 2] / 7)


def test_without_looks_or_stop_it_is_the_best_of_n() -> None:
    severity = np.random.default_rng(0).uniform(0, 5, (200, 6))
    found = run(Search(4, (), -1.0), seeds(severity), draws=60)
    slots = savings.Slots(np.zeros((200, 6, 20)), severity, np.arange(200).astype(str))
    assert found.price.tolist() == [4.0] * 200
    assert found.severity.mean() == pytest.approx(savings.best_of(slots)[:, 3].mean(), abs=0.02)


@pytest.mark.parametrize("noise, most", [(0.0, 3.0), (1.0, 4.0)])
def test_the_cheapest_is_as_good_on_other_slots_and_estimates_make_it_cheaper(noise: float, most: float) -> None:
    rng = np.random.default_rng(2)
    severity = np.where(rng.random((400, 8)) < 0.5, 0.0, rng.uniform(1, 5, (400, 8)))
    choice, test = seeds(severity[:200], noise, 1), seeds(severity[200:], noise, 2)
    slots = savings.Slots(np.zeros((400, 8, 20)), severity, np.arange(400).astype(str))
    curve = savings.best_of(slots)
    made = cheapest([choice], curve[:200, 3], slots.prompt[:200], 8)
    assert made is not None
    search, price = made
    found = run(search, test)
    assert price <= most and found.price.mean() == pytest.approx(price, rel=0.1)
    assert found.severity.mean() <= curve[200:, 3].mean() + 0.05
    plain = cheapest([choice], curve[:200, 3], slots.prompt[:200], 8, with_looks=False)
    assert plain is None or plain[1] >= price


def test_worthless_estimates_save_nothing() -> None:
    rng = np.random.default_rng(2)
    severity = np.where(rng.random((200, 8)) < 0.5, 0.0, rng.uniform(1, 5, (200, 8)))
    slots = savings.Slots(np.zeros((200, 8, 20)), severity, np.arange(200).astype(str))
    found = cheapest([seeds(rng.permuted(severity, axis=1), 50.0)], savings.best_of(slots)[:, 3], slots.prompt, 8)
    assert found is None or found[1] >= 3.9


def test_readings_must_serve_a_decision() -> None:
    s = seeds(np.random.default_rng(0).uniform(0, 5, (6, 4)))
    s.plan = (0.25, 1.0)
    assert all(0.25 in {share for share, _ in search.looks} for search in searches(s, 4))
    assert any(not search.looks for search in searches(seeds(s.severity), 4))


def test_seeds_from_ways_and_back_from_json() -> None:
    progress = np.array([0.222, 0.5, 1.0])
    ways = [{"progress": progress, "severity": np.array([1.0, 2, 3]) + i, "spent": progress + 0.1} for i in range(4)]
    s = seeds_of(ways, np.arange(4.0), np.array([[0, 1], [2, 3]]), (1.0,))
    assert s.expected[0.25].tolist() == [[1, 2], [3, 4]] and s.end.tolist() == [[3, 4], [5, 6]]
    assert s.spent[0.5][0, 0] == pytest.approx(0.6) and s.whole[1, 1] == pytest.approx(1.1)
    search = Search(5, ((0.5, 2.5),), 1.0, (1.0,))
    assert Search.of(search.as_dict()) == search
    assert [search.policy.first(way) for way in ways] == [None, 1, 1, 1]
