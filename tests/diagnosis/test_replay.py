"""Replay against loops over tokens, and against the objective's own metrics."""

import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from diagnosis.cases import DOMAINS, Memory, batch, rows_of, steps, with_text
from fiberpo import FiberPOError, RatioBatch, StrataError, recipes
from fiberpo.diagnosis import replay
from fiberpo.diagnosis.changes import Largest
from fiberpo.diagnosis.tables import print_replay
from fiberpo.diagnosis.tally import Tokens, context_domains, domains_of
from fiberpo.recording import RecordedStep

TIGHT = recipes.fiberpo_domain(
    {"domain": (0.05, 0.04), "group": (0.02, 0.02), "trajectory": (0.05, 0.04)}, epsilon=0.2
)
OBJECTIVES = {"tight": TIGHT, "grpo": recipes.grpo(), "gspo": recipes.gspo(0.02)}


def masses(objective, tokens):
    """Whole, kept, reversed, amplified of each row, token by token."""
    out = objective(tokens)
    found = []
    for here in rows_of(tokens):
        sums = [0.0] * 4
        for i in range(here.start, here.stop):
            if out.weight[i] == 0:
                continue
            ungated = float(out.weight[i]) * math.exp(float(tokens.log_ratio[i]))
            gated = float(out.coefficients[i])
            sums[0] += abs(ungated)
            if gated * ungated > 0:
                sums[1] += min(abs(gated), abs(ungated))
                sums[3] += max(abs(gated) - abs(ungated), 0)
            else:
                sums[2] += abs(gated)
        found.append(sums)
    return np.array(found)


def test_stops_are_replayed():
    """Contexts out of budget count as zeroed, tokens by epsilon; what is dropped is said."""
    items = steps(3)
    stop = recipes.fiberstop({"group": (0.12, 0.12), "trajectory": (0.14, 0.14)}, 0.3)
    result = replay(Memory(items), {"stop": stop, "grpo": recipes.grpo()})
    found = result.as_dict()["objectives"]
    rows = {r["stratum"]: r for r in found[0]["regimes"] if r["domain"] is None}
    assert list(rows) == ["group", "trajectory", "token"]
    outs = [stop(item.batch) for item in items]
    for name, row in rows.items():
        outside = []
        for out in outs:
            (found_by,) = out.stopped
            strata = found_by.layout.contexts.strata
            if name == "token":
                outside += found_by.far.tolist()
            else:
                here = strata.level(strata.names.index(name))
                outside += found_by.beyond[:, here].any(0).tolist()
        assert 0 < row["zeroed"] < 1
        assert (row["contexts"], row["rollback"]) == (len(outside), 0)
        assert row["zeroed"] == pytest.approx(np.mean(outside))
    lost = sum(int((out.coefficients == 0).sum()) for out in outs)
    assert found[0]["left_out"] == pytest.approx(lost / result.tokens)
    assert found[1]["left_out"] == 0
    assert found[0]["trajectories"][0]["regimes"].keys() == {"group", "trajectory"}
    out = io.StringIO()
    print_replay(result, Console(file=out, width=120))
    assert f"stop drops {100 * lost / result.tokens:.1f} % of the tokens" in out.getvalue()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_mass_is_that_of_a_loop_over_tokens(name):
    """In all, by domain and by step."""
    items = steps(3)
    found = replay(Memory(items), {name: OBJECTIVES[name]}).outcomes[0]
    expected = [masses(OBJECTIVES[name], item.batch) for item in items]
    np.testing.assert_allclose(found.total.mass, sum(e.sum(0) for e in expected), atol=1e-14)
    for item, mine in zip(items, expected, strict=True):
        whole, kept, turned, beyond = mine.sum(0)
        point = found.steps[item.step]
        assert point["kept"] == pytest.approx(kept / whole)
        assert point["reversed"] == pytest.approx(turned / whole, abs=1e-14)
        assert point["amplified"] == pytest.approx(beyond / whole, abs=1e-14)
    for domain in DOMAINS:
        code = DOMAINS.index(domain)
        here = [e[i.batch.labels["domain"].codes == code].sum(0)
                for i, e in zip(items, expected, strict=True)]  # fmt: skip
        np.testing.assert_allclose(found.total.mass_by_domain[domain], sum(here), atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_step_says_what_its_metrics_say(name):
    """The same definitions as ``gate/gradient_*`` and ``gate/<stratum>/*_frac``."""
    item = steps(1)[0]
    found = replay(Memory([item]), OBJECTIVES).as_dict()
    (mine,) = [o for o in found["objectives"] if o["name"] == name]
    metrics = OBJECTIVES[name](item.batch).metrics()
    for word in ("kept", "reversed", "amplified"):
        assert mine["gradient"][word] == pytest.approx(metrics[f"gate/gradient_{word}"], abs=1e-12)
    assert mine["gradient"]["removed"] == pytest.approx(1 - metrics["gate/gradient_kept"])
    assert mine["regimes"]
    for row in mine["regimes"]:
        domain = row["domain"]
        if row["stratum"] == "token" and domain is not None:
            continue  # metrics have no such row
        suffix = "" if domain is None else f"/domain={domain}"
        for word in ("pass", "rollback", "zeroed"):
            key = f"gate/{row['stratum']}/{word}_frac{suffix}"
            assert row[word] == pytest.approx(metrics[key]), key


def test_coupled_tokens_without_an_advantage_are_not_counted():
    """A rollback reaches tokens whose own gradient is 0; the shares are of those that have one."""
    item = batch()
    own = torch.randn(len(item), generator=torch.Generator().manual_seed(1)).clamp(min=0)
    tokens = batch(advantages=own)
    out = TIGHT(tokens)
    assert bool(((out.weight == 0) & (out.coefficients != 0)).any())
    found = replay(Memory([RecordedStep(1, tokens)]), {"tight": TIGHT}).outcomes[0]
    np.testing.assert_allclose(found.total.mass, masses(TIGHT, tokens).sum(0), atol=1e-14)


def test_tokens_by_domain_are_counted():
    """Regimes of tokens in each domain, one by one."""
    item = steps(1)[0]
    rows = replay(Memory([item]), {"tight": TIGHT}).as_dict()["objectives"][0]["regimes"]
    worst = TIGHT(item.batch).regimes["token"].max(0).values
    domain = item.batch.labels["domain"].codes[item.batch.row]
    for code, name in enumerate(DOMAINS):
        (row,) = [r for r in rows if r["stratum"] == "token" and r["domain"] == name]
        mine = worst[domain == code]
        assert row["contexts"] == len(mine)
        assert row["zeroed"] == pytest.approx(float((mine == 2).double().mean()))
        assert row["zeroed"] > 0


def test_a_tail_of_zero_weight_is_nobodys_mass():
    """Advantages of 0, and a ratio that overflows there, leave the sums alone."""
    zero = torch.zeros(4, dtype=torch.float64)
    tokens = RatioBatch.from_packed(
        torch.tensor([0.1, 0.2, 800.0, 0.3]).double(), zero, torch.tensor([1.0, 1.0, 0.0, -1.0]),
        [2, 2], labels={"domain": [0, 1], "group": [0, 1]},
    )  # fmt: skip
    item = RecordedStep(1, tokens)
    found = replay(Memory([item]), {"grpo": recipes.grpo()}).outcomes[0]
    np.testing.assert_allclose(found.total.mass, masses(recipes.grpo(), tokens).sum(0))
    assert np.isfinite(found.total.mass).all()


def test_cosines_are_those_of_all_coefficients_end_to_end():
    """And of each step by itself; a gradient of 0 has none."""
    items = steps(3)
    found = replay(Memory(items), OBJECTIVES)
    vectors = [
        np.concatenate([o(item.batch).coefficients.numpy() for item in items])
        for o in OBJECTIVES.values()
    ]
    for i, a in enumerate(vectors):
        for k, b in enumerate(vectors):
            expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert found.cosine()[i][k] == pytest.approx(expected)
    first = [o(items[0].batch).coefficients.numpy() for o in OBJECTIVES.values()]
    expected = first[0] @ first[1] / np.linalg.norm(first[0]) / np.linalg.norm(first[1])
    assert found.cosine(1)[0][1] == pytest.approx(expected)
    still = RecordedStep(1, batch(advantages=torch.zeros(24)))
    assert replay(Memory([still]), OBJECTIVES).cosine()[0] == [None] * 3


@pytest.mark.parametrize("workers", [1, 3])
def test_most_changed_are_found_among_all(workers):
    """Trajectories and tokens by the share of their step's gradient mass, over all steps."""
    items = [with_text(item) for item in steps(12, groups=3)]
    found = replay(Memory(items), {"tight": TIGHT}, workers=workers).outcomes[0]
    rows, single = [], []
    for item in items:
        out = TIGHT(item.batch)
        plain = (out.weight * item.batch.log_ratio.exp()).numpy()
        moved = np.abs(out.coefficients.numpy() - plain) / np.abs(plain).sum()
        mass = masses(TIGHT, item.batch)
        changed = mass[:, 0] - mass[:, 1] + mass[:, 2] + mass[:, 3]
        for row, here in enumerate(rows_of(item.batch)):
            rows.append((changed[row] / mass[:, 0].sum(), item.step, row))
            single += [
                (moved[i], item.step, row, i - here.start) for i in range(*here.indices(10**6))
            ]
    rows.sort(reverse=True)
    single.sort(reverse=True)
    assert [(r["step"], r["row"]) for r in found.trajectories] == [r[1:] for r in rows[:10]]
    mine = [(t["step"], t["row"], t["position"]) for t in found.tokens]
    assert mine == [t[1:] for t in single[:10]]
    first = found.trajectories[0]
    item = items[first["step"] - 1]
    here = rows_of(item.batch)[first["row"]]
    assert first["share"] == pytest.approx(rows[0][0])
    assert first["reward"] == first["row"]
    assert first["text"] == "".join(item.text(first["row"]))
    assert first["drift_pos"] == pytest.approx(
        float(item.batch.log_ratio[here].clamp(min=0).mean())
    )
    assert set(first["regimes"]) == {"domain", "group", "trajectory"}
    token = found.tokens[0]
    item = items[token["step"] - 1]
    at = rows_of(item.batch)[token["row"]].start + token["position"]
    assert token["token_id"] == at % 7
    assert token["text"] == f"<{at % 7}>"
    assert token["log_ratio"] == pytest.approx(float(item.batch.log_ratio[at]))
    assert token["coefficient"] == pytest.approx(float(TIGHT(item.batch).coefficients[at]))


def test_one_token_among_long_rows():
    """Twelve rows with many tokens that change a little, and one token that changes more."""
    lengths = [40] * 12 + [20]
    log_ratio = torch.full((sum(lengths),), 0.3).double()
    log_ratio[-20:] = 0.0
    log_ratio[-1] = 1.5
    advantages = torch.ones(13)
    advantages[12] = 2.0
    tokens = RatioBatch.from_packed(
        log_ratio, torch.zeros_like(log_ratio), advantages, lengths,
        labels={"domain": [0] * 13, "group": [0] * 13},
    )  # fmt: skip
    found = replay(Memory([RecordedStep(1, tokens)]), {"ppo": recipes.ppo()}).outcomes[0]
    assert 12 not in [r["row"] for r in found.trajectories]
    assert (found.tokens[0]["row"], found.tokens[0]["position"]) == (12, 19)


def test_the_largest_are_kept_in_order():
    """The first come wins where two are equal."""
    largest = Largest(2)
    largest.offer({"share": s, "name": n} for s, n in [(1, "a"), (3, "b"), (3, "c"), (1, "d")])
    assert [r["name"] for r in largest.ranked()] == ["b", "c"]
    assert largest.bar == 3


def test_regimes_of_any_forest():
    """Strata above the domain have no domain; turns have that of their answer."""
    item = batch(groups=4, answers=2, length=6)
    rows = item.rows
    labels = {
        "world": [0] * rows, "domain": [DOMAINS[i // 4] for i in range(rows)],
        "turn": torch.arange(len(item)) % 2,
    }  # fmt: skip
    tokens = RatioBatch.from_packed(
        item.log_probs, item.old_log_probs, item.advantages, item.lengths, labels=labels
    )
    names, codes = domains_of(tokens)
    strata = tokens.strata(["world", "domain", "trajectory", "turn"])
    found = context_domains(tokens, strata, codes)
    assert names == DOMAINS
    assert found[strata.level(0)].tolist() == [-1]
    assert found[strata.level(1)].tolist() == [0, 1]
    assert found[strata.level(2)].tolist() == codes.tolist()
    turn = {int(c): int(codes[r]) for c, r in zip(strata.leaf, tokens.row, strict=True)}
    assert {c: found[c] for c in turn} == turn


def test_chunks_of_one_step_add_up():
    """A step that comes in two pieces is one step in the series."""
    whole = batch(groups=4)
    labels = whole.rows // 2
    pieces = [whole.select(torch.arange(whole.rows)[:labels]),
              whole.select(torch.arange(whole.rows)[labels:])]  # fmt: skip
    items = [RecordedStep(1, piece, chunk=i) for i, piece in enumerate(pieces)]
    found = replay(Memory(items), {"grpo": recipes.grpo()})
    assert found.steps == [1]
    assert found.tokens == len(whole)
    (point,) = found.as_dict()["series"]
    regimes = torch.cat([recipes.grpo()(p).regimes["token"][0] for p in pieces])
    share = float((regimes != 0).double().mean())
    assert point["objectives"]["grpo"]["gated"]["token"] == pytest.approx(share)
    assert share > 0


def test_first_updates_and_idle_strata_are_counted():
    """Where no gate can act, it says so."""
    alone = RatioBatch.from_packed(
        torch.full((4,), -0.9), -torch.ones(4), torch.ones(2), [2, 2],
        labels={"domain": [0, 1], "group": [0, 1]},
    )  # fmt: skip
    items = [*steps(4, fresh_every=2), RecordedStep(9, alone)]
    found = replay(Memory(items), {"tight": TIGHT})
    assert found.fresh == {1, 3}
    assert found.idle == {"group": 1, "trajectory": 1}
    points = {p["step"]: p for p in found.as_dict()["series"]}
    assert points[1]["first_update"]
    assert points[1]["objectives"]["tight"]["kept"] == pytest.approx(1)
    assert not points[2]["first_update"]
    assert points[2]["objectives"]["tight"]["gated"]["trajectory"] > 0


def test_few_steps_are_in_memory_at_a_time():
    """Reading waits for the work."""
    state = {"read": 0, "done": 0, "ahead": 0}

    class Counted(Memory):
        def iterate(self, steps=None):
            for item in self.items:
                state["read"] += 1
                state["ahead"] = max(state["ahead"], state["read"] - state["done"])
                yield item

    def progress(tokens):
        state["done"] += 1

    items = steps(12, groups=2, length=4)
    replay(Counted(items), {"grpo": recipes.grpo()}, progress=progress, workers=2)
    assert state["done"] == 12
    assert state["ahead"] <= 3


def test_progress_and_threads():
    """Tokens so far, rising to all; torch has its threads again afterwards."""
    seen, before = [], torch.get_num_threads()
    items = steps(3)
    replay(Memory(items), {"grpo": recipes.grpo()}, progress=seen.append)
    assert seen == np.cumsum([len(i.batch) for i in items]).tolist()
    assert torch.get_num_threads() == before


def test_refusals():
    """Nothing to do, nothing recorded, labels that are not there."""
    with pytest.raises(FiberPOError, match="no objective"):
        replay(Memory(steps(1)), {})
    with pytest.raises(FiberPOError, match="nothing to replay"):
        replay(Memory([]), {"grpo": recipes.grpo()})
    plain = RatioBatch.from_packed(torch.zeros(2), torch.zeros(2), torch.ones(1), [2])
    with pytest.raises(StrataError, match="domain"):
        replay(Memory([RecordedStep(1, plain)]), {"tight": TIGHT})


def test_tokens_are_prepared_once():
    """Freshness is the size of the largest log ratio."""
    assert Tokens.of(batch(fresh=True)).fresh
    assert not Tokens.of(batch()).fresh
