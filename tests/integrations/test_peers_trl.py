"""CISPO, SAPO and GMPO follow TRL's own losses, and the one difference has its size."""

import pytest
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from fiberpo import recipes
from integrations.tiny import rows, tiny_model, trainer, vowels

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

KEPT = (
    "per_device_train_batch_size", "steps_per_generation", "num_generations", "seed", "optim",
    "max_completion_length", "learning_rate", "max_steps", "logging_steps", "max_grad_norm",
    "disable_tqdm", "shuffle_dataset", "bf16", "gradient_checkpointing", "num_iterations",
)  # fmt: skip


def norms(run):
    run.train()
    return [h["grad_norm"] for h in run.state.log_history if "grad_norm" in h]


def hosts_own(tmp_path, ours, host, kind=(GRPOTrainer, GRPOConfig)):
    """TRL's trainer with the settings of ours."""
    model, tokenizer = tiny_model()
    config = {name: getattr(ours.args, name) for name in KEPT}
    return kind[0](
        model, vowels,
        kind[1](output_dir=str(tmp_path / "b"), report_to="none", use_cpu=True, **config, **host),
        train_dataset=rows(), processing_class=tokenizer,
    )  # fmt: skip


def ours_with(tmp_path, objective, **settings):
    return trainer(tmp_path / "a", objective=objective, keep_groups_together=False, **settings)


ONE_BATCH = {"steps_per_generation": 1, "num_iterations": 4, "max_steps": 4}


@pytest.mark.parametrize(
    ("objective", "host", "settings", "kind"),
    [
        (
            recipes.cispo(None, 0.01),
            {"loss_type": "cispo", "epsilon_high": 1.01},  # TRL's is the bound itself
            ONE_BATCH, (GRPOTrainer, GRPOConfig),
        ),
        (
            recipes.sapo(2.0, 5.0),
            {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 5.0},
            {}, (GRPOTrainer, GRPOConfig),
        ),
        (
            recipes.gmpo(0.01, 0.02),
            {"epsilon": 0.01, "epsilon_high": 0.02, "beta": 0.0},
            {}, (GMPOTrainer, GMPOConfig),
        ),
    ],
    ids=["cispo", "sapo", "gmpo"],
)  # fmt: skip
def test_equals_the_host_own_loss(tmp_path, objective, host, settings, kind):
    """Same data, same weights: the same gradient norms to 6 digits over 4 updates."""
    ours = ours_with(tmp_path, objective, **settings)
    mine = norms(ours)
    statistics = ours.last_window.statistics.compute()
    assert statistics["gate/gradient_kept"] < 0.9995  # the method is not the plain one here
    assert mine == pytest.approx(norms(hosts_own(tmp_path, ours, host, kind)), rel=1e-6)


def test_cispo_in_trl_divides_by_the_mean_count_of_its_updates(tmp_path):
    """Of several updates a rollout TRL divides each by their mean token count, we by its own."""
    ours = ours_with(tmp_path, recipes.cispo(None, 4.0))
    mine = norms(ours)
    counts = [int(x["completion_mask"].sum()) for x in ours._buffered_inputs]
    theirs = norms(hosts_own(tmp_path, ours, {"loss_type": "cispo", "epsilon_high": 5.0}))
    mean = sum(counts) / len(counts)
    assert abs(counts[0] / mean - 1) > 1e-3
    assert mine[0] * counts[0] == pytest.approx(theirs[0] * mean, rel=1e-6)
