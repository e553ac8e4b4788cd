"""The core in five lines: tokens, objective, loss, gradient, metrics. No trainer needed."""

import torch

import fiberpo

torch.manual_seed(0)
rows, width = 8, 16  # 8 answers of at most 16 tokens; 2 domains, 4 prompts, 2 answers each
mask = torch.arange(width) < torch.randint(8, width + 1, (rows, 1))
old_log_probs = -torch.rand(rows, width)
log_probs = (old_log_probs + 0.1 * torch.randn(rows, width)).requires_grad_()
advantages = torch.tensor([1.0, -1.0] * 4)
labels = {"domain": ["math"] * 4 + ["code"] * 4, "group": [0, 0, 1, 1, 2, 2, 3, 3]}

objective = fiberpo.recipes.fiberpo_domain()
batch = fiberpo.RatioBatch.from_padded(log_probs, old_log_probs, advantages, mask, labels=labels)
surrogate = objective(batch)
surrogate.loss.backward()
metrics = surrogate.metrics()

print(objective)
print(f"loss {surrogate.loss.item():.4f}, gradient norm {log_probs.grad.norm().item():.4f}")
for name, value in sorted(metrics.items()):
    print(f"{name:48} {value:.4f}")
