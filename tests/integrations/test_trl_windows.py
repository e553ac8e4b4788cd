"""Windows of the TRL path: which forward passes run, stops in mid-window, short windows, eval."""

import pytest
import torch
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

import fiberpo
from fiberpo.errors import DataError
from integrations.tiny import apart, double_model, gradients, rows, scripted, trainer, updates

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

BUDGET = (0.004, 0.003)
TRAJECTORY = fiberpo.recipes.fiberpo(BUDGET, 0.02, rollback=2.0)
GROUP = fiberpo.recipes.fiberpo_domain({"group": BUDGET, "trajectory": BUDGET}, 0.02, rollback=2.0)
DOMAIN = fiberpo.recipes.fiberpo_domain(
    {"domain": BUDGET, "group": BUDGET, "trajectory": BUDGET}, 0.02, rollback=2.0
)
FOUR_PARTS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 4,
    "num_iterations": 3, "max_steps": 3,
}  # fmt: skip


def make(tmp_path, objective=DOMAIN, **settings):
    settings = {"model": double_model(), **FOUR_PARTS, **settings}
    return scripted(trainer(tmp_path, objective=objective, **settings))


@pytest.mark.parametrize(
    ("objective", "size", "routes", "extra"),
    [
        (TRAJECTORY, 4, ["contained"] * 3, 0),  # trajectories never reach beyond a micro-batch
        (DOMAIN, 4, ["fresh", "two-phase", "two-phase"], 8),  # 4 more in updates 2 and 3
        (DOMAIN, 16, ["contained"] * 3, 0),  # one micro-batch holds all
    ],
)
def test_forward_passes(tmp_path, objective, size, routes, extra):
    """The second forward runs where a context reaches beyond a micro-batch, and there only."""
    parts = 16 // size
    run = make(
        tmp_path, objective, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        steps_per_generation=parts,
    )  # fmt: skip
    passes, found = [], []
    original, close = run._log_probs, run._log_window

    def spy(*args, **kwargs):
        passes.append(torch.is_grad_enabled())
        return original(*args, **kwargs)

    def note(window):
        found.append(window.route.value)
        close(window)

    run._log_probs, run._log_window = spy, note
    run.train()
    assert found == routes
    assert passes.count(True) == 3 * parts
    assert passes.count(False) == extra
    assert updates(run)[2]["gate/active"] > 0.3


class Kill(TrainerCallback):
    """Stop the process, so to speak, between two micro-batches."""

    def __init__(self, update):
        self.update = update

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            raise KeyboardInterrupt


@pytest.mark.parametrize("same_object", [True, False])
def test_resume_after_a_kill_in_mid_window(tmp_path, same_object):
    """Killed after the first micro-batch of update 3: the checkpoint of update 2 continues exactly,
    in a new process as in the same trainer."""
    whole = make(tmp_path / "whole", max_steps=4)
    wanted = gradients(whole)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    killed = make(tmp_path / "cut", **settings)
    killed.add_callback(Kill(2))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert killed._place == 1
    again = killed if same_object else make(tmp_path / "cut", **settings)
    again.remove_callback(Kill)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert [s["grad_norm"] for s in updates(again)] == [s["grad_norm"] for s in updates(whole)]
    assert len(wanted) == 4
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_again_begins_with_a_new_rollout(tmp_path):
    """The rollout in use at the end of a training is not taken for a fresh one."""
    first = make(tmp_path / "a", max_steps=2)
    first.train()
    other = make(tmp_path / "b", max_steps=2)
    other.model.load_state_dict(first.model.state_dict())
    assert apart(gradients(first), gradients(other)) < 1e-6


class Truncated(RepeatSampler):
    """TRL's sampler, which ends after some rows."""

    def __init__(self, *args, stop, **kwargs):
        super().__init__(*args, **kwargs)
        self.stop = stop

    def __iter__(self):
        yield from list(super().__iter__())[: self.stop]

    def __len__(self):
        return self.stop


def truncate(run, micro_batches):
    """Let the epoch end after so many micro-batches, as a sampler of the user's may."""
    per_rollout = run.args.per_device_train_batch_size * run.args.steps_per_generation
    prompts = per_rollout // run.num_generations
    run._get_train_sampler = lambda dataset=None: Truncated(
        run.train_dataset, mini_repeat_count=run.num_generations, batch_size=prompts,
        repeat_count=run.num_iterations * run.args.steps_per_generation, shuffle=False,
        stop=micro_batches * per_rollout,
    )  # fmt: skip
    return run


@pytest.mark.parametrize("objective", [TRAJECTORY, GROUP], ids=["trajectory", "group"])
def test_short_last_window(tmp_path, objective):
    """6 micro-batches in windows of 4: the second window has 2, which share a prompt group, and is
    exact over those two."""
    run = make(tmp_path, objective, max_steps=-1, num_train_epochs=1, num_generations=8)
    run = truncate(run, 6)
    seen = {}
    original = run._clip_grad_norm

    def spy(model):
        if run.state.global_step == 1:
            seen["ours"] = torch.cat([p.grad.flatten() for p in model.parameters()])
            parts = run._buffered_inputs[:2]
            batch = fiberpo.RatioBatch.from_padded(
                torch.cat([run._log_probs(model, x)[0] for x in parts]),
                *(torch.cat([x[name] for x in parts]) for name in
                  ("old_per_token_logps", "advantages", "completion_mask")),
                labels={name: torch.cat([x[f"{name}_id"] for x in parts])
                        for name in ("domain", "group")},
            )  # fmt: skip
            loss = objective(batch, gradient="autograd").loss
            whole = torch.autograd.grad(loss, list(model.parameters()))
            seen["whole"] = torch.cat([g.flatten() for g in whole])
            seen["loss"] = loss.item()
        return original(model)

    run._clip_grad_norm = spy
    run.train()
    assert run.state.global_step == 2
    assert len(run.last_window.parts) == run.current_gradient_accumulation_steps == 2
    assert updates(run)[1]["gate/active"] > 0.3
    assert apart([seen["ours"]], [seen["whole"]]) < 1e-6
    assert updates(run)[1]["loss"] == pytest.approx(seen["loss"], rel=1e-4)


def test_window_over_two_rollouts_is_refused(tmp_path):
    """After an epoch that ends in mid-rollout the next window would begin there."""
    run = truncate(make(tmp_path, GROUP, max_steps=-1, num_train_epochs=2), 6)
    with pytest.raises(DataError, match="begins at micro-batch 2 of a rollout of 4"):
        run.train()


def test_rows_that_fill_no_rollout_are_left_out(tmp_path):
    """TRL's own sampler yields whole rollouts: 11 prompts of 4 a rollout make 2, in full windows,
    and the second epoch begins with a new one."""
    found = []
    for name, size in (("a", 4), ("b", 16)):
        parts = 16 // size
        run = make(
            tmp_path / name, dataset=rows(11), max_steps=-1, num_train_epochs=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            steps_per_generation=parts,
        )  # fmt: skip
        sizes = []
        close = run._log_window
        run._log_window = lambda w, s=sizes, c=close: (s.append(len(w.parts)), c(w))
        found.append(gradients(run))
        assert sizes == [parts] * 12  # 2 epochs x 2 rollouts x 3 updates
    assert apart(*found) < 1e-5


def test_evaluation_leaves_training_alone(tmp_path):
    """Real sampling, evaluation in every update: the gradients are those without evaluation."""
    found = []
    for name, settings in (
        ("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 1}),
    ):  # fmt: skip
        run = trainer(
            tmp_path / name, objective=DOMAIN, max_steps=6, per_device_train_batch_size=8,
            gradient_accumulation_steps=2, steps_per_generation=4, per_device_eval_batch_size=16,
            eval_dataset=rows(8), **settings,
        )  # fmt: skip
        found.append(gradients(run))
    assert sum("eval_loss" in h for h in run.state.log_history) == 6
    assert any(h.get("gate/active", 0) > 0.3 for h in run.state.log_history)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("iterations", [1, 3])
def test_eval_loss_is_the_objective_on_the_eval_batch(tmp_path, iterations):
    """On policy every ratio is 1: minus the mean of the advantages over tokens. With one update per
    rollout TRL stores no anchor, which is not an anchor of 0."""
    run = make(
        tmp_path, fiberpo.recipes.dapo(), num_iterations=iterations, per_device_eval_batch_size=16
    )
    batches = []
    original = run._generate_and_score_completions
    run._generate_and_score_completions = lambda x: batches.append(original(x)) or batches[-1]
    result = run.evaluate(rows(16))
    assert len(batches) == 4
    assert all(("old_per_token_logps" in x) == (iterations == 3) for x in batches)
    wanted = []
    for x in batches:
        lengths = x["completion_mask"].sum(1)
        wanted.append(-float((x["advantages"] * lengths).sum() / lengths.sum()))
    assert abs(sum(wanted)) > 0.01
    assert result["eval_loss"] == pytest.approx(sum(wanted) / 4, rel=1e-5)
