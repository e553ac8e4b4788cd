"""A custom training loop: the exact gradient of group and domain gates, cut into micro-batches.

A gate on a group or a domain couples answers that lie in different micro-batches, so a loss per
micro-batch is not the objective. Two phases are:

1. log-probs of the whole batch without graph, one objective call, one coefficient a token;
2. per micro-batch, backward of ``-(coefficients * log_probs).sum()``.
"""

import warnings

import torch

import fiberpo

warnings.simplefilter("ignore", fiberpo.FiberPOWarning)  # the naive loop has only-child groups
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
ROWS, WIDTH, VOCABULARY, PART = 16, 12, 20, 4

model = torch.nn.Sequential(
    torch.nn.Embedding(VOCABULARY, 16), torch.nn.Tanh(), torch.nn.Linear(16, VOCABULARY)
)
tokens = torch.randint(VOCABULARY, (ROWS, WIDTH + 1))
mask = torch.arange(WIDTH) < torch.randint(4, WIDTH + 1, (ROWS, 1))
advantages = torch.randn(ROWS)
# answers of a prompt lie in different micro-batches, as after a shuffle
labels = {"domain": torch.arange(ROWS) % 2, "group": torch.arange(ROWS) % 8}
objective = fiberpo.recipes.fiberpo_domain(
    {"domain": (0.02, 0.015), "group": (0.03, 0.02), "trajectory": (0.08, 0.05)}, epsilon=0.2
)


def log_probs_of(rows: slice) -> torch.Tensor:
    """Log-probs of the sampled tokens of some rows, [rows, WIDTH]."""
    logits = model(tokens[rows, :-1])
    return logits.log_softmax(-1).gather(-1, tokens[rows, 1:, None])[..., 0]


def make_batch(log_probs: torch.Tensor, rows: slice) -> fiberpo.RatioBatch:
    """The part of the batch that some rows make up."""
    return fiberpo.RatioBatch.from_padded(
        log_probs, old_log_probs[rows], advantages[rows], mask[rows],
        labels={name: ids[rows] for name, ids in labels.items()},
    )  # fmt: skip


def gradient() -> torch.Tensor:
    """All gradients as one vector, which are then reset."""
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


everything = slice(0, ROWS)
parts = [slice(i, i + PART) for i in range(0, ROWS, PART)]
with torch.no_grad():
    old_log_probs = log_probs_of(everything)
    for p in model.parameters():  # earlier updates on the same rollout
        p += 0.15 * torch.randn_like(p)

# what is wanted: the objective on the undivided batch
objective(make_batch(log_probs_of(everything), everything)).loss.backward()
wanted = gradient()

# two phases: the same gradient from micro-batches
with torch.no_grad():
    whole = make_batch(torch.cat([log_probs_of(rows) for rows in parts]), everything)
    surrogate = objective(whole)
coefficients = whole.to_padded(surrogate.coefficients)  # 0 on masked positions
for rows in parts:
    log_probs = torch.where(mask[rows], log_probs_of(rows), 0.0)
    (-(coefficients[rows] * log_probs).sum()).backward()
two_phases = gradient()

# naive: the objective of each micro-batch by itself, weighed by its share of the answers
for rows in parts:
    part = make_batch(log_probs_of(rows), rows)
    (objective(part).loss * part.trajectories / whole.trajectories).backward()
naive = gradient()


def error(found: torch.Tensor) -> float:
    """Relative error in norm."""
    return ((found - wanted).norm() / wanted.norm()).item()


print(f"tokens with a gate that acts: {surrogate.metrics()['gate/active']:.2f}")
print(f"two phases: relative error {error(two_phases):.0e}")
print(f"naive:      relative error {error(naive):.2f}")
assert error(two_phases) < 1e-12
assert error(naive) > 0.01
