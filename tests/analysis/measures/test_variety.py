"""Words about variety: how often they are wrong, and what it takes to say them."""

import numpy as np
import pytest

from analysis.measures import variety
from analysis.measures.image_sets import Spread
from controls.intervals import LEVEL

PROMPTS, SEEDS = 24, 8


def plans(random: np.random.Generator, *means: float, prompts: int = PROMPTS, noise: float = 0.15) -> list:
    """Varieties per prompt of several plans: prompts differ in all alike, each plan has chance beside."""
    of_prompt = 1 + 0.3 * random.normal(size=prompts)
    return [of_prompt * mean + noise * random.normal(size=prompts) for mean in means]


def words(mean: float, tables: int = 1500, size: int = 1, **how) -> list[list[str]]:
    """The verdicts on so many plans of this mean beside a base of 1, table by table."""
    random, found = np.random.default_rng(4), []
    for _ in range(tables):
        base, *own = plans(random, 1.0, *[mean] * size, **how)
        found.append([said["verdict"] for said in variety.judged([(one, base, base) for one in own])])
    return found


@pytest.mark.parametrize("size", [1, 8])
def test_no_difference_is_called_one_in_five_tables_of_a_hundred(size):
    """Also where eight plans are tried: Holm."""
    tables = words(1.0, size=size, noise=0.3)
    assert np.mean([bool({"less", "more"} & set(table)) for table in tables]) <= 0.06


@pytest.mark.parametrize(("mean", "size"), [(0.9, 1), (1.1, 1), (0.9, 8)])
def test_a_change_of_the_margin_is_called_none_in_five_tables_of_a_hundred(mean, size):
    """The worst case of an equivalence: absent may not be said of what is a tenth of the base's variety."""
    assert np.mean(["same" in table for table in words(mean, size=size)]) <= 0.06


def test_what_is_plain_is_said_and_what_is_not_is_undecided():
    assert np.mean([table == ["less"] for table in words(0.6)]) > 0.99
    assert np.mean([table == ["same"] for table in words(1.0, noise=0.05)]) > 0.99
    assert np.mean([table == ["undecided"] for table in words(1.0, noise=0.4)]) > 0.9


def test_as_many_prompts_as_are_asked_for_do_tell():
    """Of undecided plans, those drawn anew with the number that was named are decided in most cases."""
    random, decided = np.random.default_rng(7), []
    for _ in range(300):
        base, own = plans(random, 1.0, 0.85, noise=0.35)
        said = variety.judged([(own, base, base)])[0]
        if said["verdict"] == "undecided" and said["prompts_needed"] and said["prompts_needed"] < 400:
            assert said["prompts_needed"] > PROMPTS
            base, own = plans(random, 1.0, 0.85, noise=0.35, prompts=said["prompts_needed"])
            decided.append(variety.judged([(own, base, base)])[0]["verdict"] != "undecided")
    assert len(decided) > 100 and np.mean(decided) > 0.4  # even odds, as the estimate is right on average


def test_nothing_is_needed_of_one_prompt():
    one = np.array([1.0])
    assert variety.judged([(one, one, one)])[0] == {
        "verdict": "undecided",
        "p": {"difference": 1.0, "equivalence": 1.0},
        "prompts_needed": None,
    }


def test_shares_of_a_loss_add_up_and_cover_the_truth():
    """.4 of a loss of .5 is guidance; the two shares are one whole."""
    random, held = np.random.default_rng(5), []
    for _ in range(1500):
        found = variety.shares(*plans(random, 1.0, 0.8, 0.5))
        assert sum(share["value"] for share in found.values()) == pytest.approx(1)
        held.append(found["guidance"]["low"] <= 0.4 <= found["guidance"]["high"])
    assert 0.93 <= np.mean(held) <= 0.97
    base = plans(random, 1.0)[0]
    assert variety.shares(base, base, base)["guidance"]["value"] is None


def test_a_known_dose_of_collapse_is_read_back():
    """A share p of a prompt's images has one cause in common: p² of its pairs lose what they lose when all
    have. Drawn from features: what is measured holds p² of the whole loss in 95 of 100 cases.
    """
    random, dose, held = np.random.default_rng(9), 0.6, []
    own = 0.5 * random.normal(
        size=(400, PROMPTS, SEEDS, 6)
    )  # what an image has of its own, whatever the cause
    for mine in own:
        causes, one = random.normal(size=(PROMPTS, SEEDS, 6)), random.normal(size=(PROMPTS, 1, 6))
        some = random.random((PROMPTS, SEEDS, 1)) < dose

        def seen(features: np.ndarray) -> np.ndarray:
            return np.array([Spread("squared").add(part).distance()["value"] for part in features])

        plain, part, all = (seen(mine + cause) for cause in (causes, np.where(some, one, causes), one))
        loss = variety.part(plain, part, plain, all)
        held.append(loss["low"] <= dose**2 <= loss["high"])
    assert LEVEL - 0.035 <= np.mean(held) <= LEVEL + 0.035
