"""Every claim of Trust Region Masking fares as recorded, and would not if the code were wrong."""

import dataclasses
import zlib

import numpy as np
import pytest

from fiberpo.theory import bounds, claims_masks, claims_trm, enumeration
from fiberpo.theory.claims import Verdict
from fiberpo.theory.claims_trm import CLAIMS

TRUE_SHARE = claims_trm.share


def tried(claim, seed=0):
    """The finding of one claim."""
    return claim.check(np.random.default_rng([seed, zlib.crc32(claim.name.encode())]))


def named(name):
    """One claim."""
    return next(claim for claim in CLAIMS if claim.name == name)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_verdict_is_the_recorded_one(claim, seed):
    """With any seed; a failing claim shows its counterexample, a holding one no error."""
    finding = tried(claim, seed)
    assert finding.verdict is claim.recorded, finding.detail
    assert finding.tried > 1
    if claim.recorded is Verdict.FAILS:
        assert finding.worst > 1e-3
    else:
        assert 0 <= finding.worst <= 1e-9
    if claim.recorded is not Verdict.HOLDS:
        assert any(character.isdigit() for character in finding.detail)


def test_names_are_unique_and_cover_all_bounds():
    """One claim a bound, among others."""
    names = [claim.name for claim in CLAIMS]
    assert len(set(names)) == len(names)
    assert {f"TRM bound {name}" for name in bounds.FORMULAS} <= set(names)


@pytest.mark.parametrize("name", bounds.FORMULAS)
def test_a_bound_that_is_too_small_is_found_out(name, monkeypatch):
    """A fifth of the bound: the search over policies exceeds it (mixed forms: a twentieth)."""
    part = 20 if name.startswith("mixed") else 5
    true = enumeration.Pair.bounds

    def wrong(pair, **options):
        found = true(pair, **options)
        return dataclasses.replace(found, **{name: found.known[name] / part})

    monkeypatch.setattr(enumeration.Pair, "bounds", wrong)
    assert tried(named(f"TRM bound {name}")).verdict is Verdict.FAILS


def third_of_reach(pair, **options):
    """The bounds of a pair with a reach that is too short."""
    found = enumeration.bounds(pair.roll.length, tv_max=pair.tv_max)
    return dataclasses.replace(found, reach=float(pair.mean_tv.sum()) / 3)


def too_large_share(pair, *names, **options):
    """As if every bound were 1.3 times smaller than it is."""
    return 1.3 * TRUE_SHARE(pair, *names, **options)


@pytest.mark.parametrize(
    ("claim", "owner", "name", "wrong"),
    [
        ("TRM error identity", enumeration.Pair, "surrogate",
         lambda pair, rewards: float(pair.roll.sequences @ rewards)),
        ("TRM factor 2 and product form", claims_trm, "share", too_large_share),
        ("Pinsker", claims_trm, "pinsker", lambda kl: (kl / 2.1) ** 0.5),
        ("TRM PM-KL simplified", claims_trm, "pm_simplified",
         lambda length, kl: 1.3 * length**1.5 * kl),
        ("TRM Mixed is tightest", claims_trm, "mixed_kl",
         lambda length, kl, seq: 2 * bounds.mixed_kl(length, kl, seq)),
        ("TRM certificate, all contexts", enumeration.Pair, "gain", lambda pair, rewards: -0.1),
        ("TRM reach of the surrogate", enumeration.Pair, "bounds", third_of_reach),
        ("masks on k2 and k3", claims_masks, "_k3", lambda ell: -ell),
        ("k2 and k3 estimate the KL", claims_masks, "_k3", lambda ell: ell**2 / 2),
    ],
)  # fmt: skip
def test_a_fault_is_found_out(claim, owner, name, wrong, monkeypatch):
    """The check measures; with a wrong formula the claim fails."""
    monkeypatch.setattr(owner, name, wrong)
    assert tried(named(claim)).verdict is Verdict.FAILS


def test_no_certificate_is_no_evidence(monkeypatch):
    """A check that met no case of its claim does not pass."""
    monkeypatch.setattr(enumeration.Pair, "surrogate", lambda pair, rewards: -1.0)
    assert tried(named("TRM certificate, all contexts")).verdict is Verdict.FAILS


def test_a_mask_that_renormalises_is_found_out(monkeypatch):
    """If the library divided by the kept sequences, the claim on the denominator would fail."""
    true = claims_masks._library_gradient

    def renormalised(*arguments):
        coefficients, kept, rho = true(*arguments)
        return coefficients * len(kept) / max(kept.sum(), 1), kept, rho

    monkeypatch.setattr(claims_masks, "_library_gradient", renormalised)
    assert tried(named("mask with the total denominator")).verdict is Verdict.FAILS
