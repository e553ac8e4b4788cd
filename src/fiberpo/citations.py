"""The papers behind each objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .objective import Objective

PAPERS = {
    "fiberpo": "Fibration Policy Optimization, arXiv 2603.08239",
    "trm": "Trust Region Masking, arXiv 2512.23075",
    "ppo": "Proximal Policy Optimization Algorithms, arXiv 1707.06347",
    "grpo": "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, "
    "arXiv 2402.03300",
    "dr_grpo": "Understanding R1-Zero-Like Training: A Critical Perspective, arXiv 2503.20783",
    "dapo": "DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv 2503.14476",
    "gspo": "Group Sequence Policy Optimization, arXiv 2507.18071",
    "tis": "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    "mis": "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference "
    "Mismatch",
    "icepop": "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking "
    "Model, arXiv 2510.18855",
    "opsm": "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models, arXiv 2512.02556",
    "cispo": "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention, "
    "arXiv 2506.13585",
    "scale_rl": "The Art of Scaling Reinforcement Learning Compute for LLMs, arXiv 2510.13786",
    "sapo": "Soft Adaptive Policy Optimization, arXiv 2511.20347",
    "gmpo": "Geometric-Mean Policy Optimization, arXiv 2507.20673",
    "dppo": "Rethinking the Trust Region in LLM Reinforcement Learning, arXiv 2602.04879",
    "cppo": "Beyond Uniform Token-Level Trust Region in LLM Reinforcement Learning, "
    "arXiv 2606.10968",
    "spo": "Simple Policy Optimization, arXiv 2401.16025",
    "topr": "Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs, "
    "arXiv 2503.14286",
    "truly_ppo": "Truly Proximal Policy Optimization, arXiv 1903.07940",
}


def citation(objective: Objective) -> str:
    """The papers an objective rests on, one a line.

    >>> from fiberpo import recipes
    >>> print(citation(recipes.gspo()))
    Group Sequence Policy Optimization, arXiv 2507.18071
    """
    keys = list(objective.papers)
    for part in (objective.mask, *objective.factors):
        keys += getattr(part, "papers", ())
    return "\n".join(PAPERS[key] for key in dict.fromkeys(keys))
