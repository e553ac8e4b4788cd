"""One verl actor update on CPU, from grpo.yaml and from fiberpo_domain.yaml.

    python examples/verl/cpu_step.py                                          # one process
    torchrun --standalone --nproc_per_node 2 examples/verl/cpu_step.py        # two

verl's own worker, engine and configuration; only the rollout is made up, since the engines that
sample need an accelerator. The model is a random Llama with 20 thousand parameters.
"""

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
os.environ.update(
    VERL_USE_EXTERNAL_MODULES="cpu_platform", VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda",
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
)  # fmt: skip
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import verl.utils.tensordict_utils as tu
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from verl import DataProto
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

ON_CPU = [
    "actor_rollout_ref.model.use_remove_padding=false",
    "actor_rollout_ref.model.enable_gradient_checkpointing=false",
    "+actor_rollout_ref.model.override_config.attn_implementation=eager",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp32}",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
    "actor_rollout_ref.rollout.name=hf",
]
SMALL = [
    "data.train_batch_size=8",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.use_kl_loss=false",
    "actor_rollout_ref.actor.optim.lr=0.003",
]


class CPUWorker(ActorRolloutRefWorker):
    """verl's worker; the process group is made first, since verl asks for a device's as well."""

    def __init__(self, *args, **kwargs):
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        super().__init__(*args, **kwargs)


def make_model(folder, seed=0, vocabulary=32):
    """A random Llama with a tokenizer, saved where verl can load it."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w3"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def make_config(name, model, *overrides):
    """The configuration ``name``.yaml of this folder, for a CPU."""
    with initialize_config_dir(str(HERE), version_base=None):
        path = f"actor_rollout_ref.model.path={model}"
        return compose(name, overrides=[path, *ON_CPU, *SMALL, *overrides])


def make_rollout(prompts, n, seed=0, vocabulary=32, width=(5, 8)):
    """Prompts with ``n`` answers each from two domains, as verl's trainer holds them."""
    generator = torch.Generator().manual_seed(seed)
    rows = prompts * n

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    prompt = draw(4, vocabulary, prompts, width[0]).repeat_interleave(n, 0)
    answer = draw(4, vocabulary, rows, width[1])
    prompt_mask = torch.arange(width[0])[None] >= draw(0, width[0], prompts, 1)
    answer_mask = torch.arange(width[1])[None] < draw(2, width[1] + 1, rows, 1)
    attention = torch.cat([prompt_mask.repeat_interleave(n, 0), answer_mask], 1).long()
    group = np.arange(rows) // n
    reward = ((answer % 2 == 0) & answer_mask).double().sum(1) / answer_mask.sum(1)
    token_reward = torch.zeros(rows, width[1]).double()
    token_reward[:, 0] = reward
    uid = np.array([f"prompt-{g}" for g in group], dtype=object)
    advantages, _ = compute_grpo_outcome_advantage(token_reward, answer_mask.long(), uid)
    return DataProto.from_dict(
        tensors={
            "prompts": prompt,
            "responses": answer,
            "input_ids": torch.cat([prompt, answer], 1),
            "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
            "response_mask": answer_mask.long(),
            "advantages": advantages.float(),
        },
        non_tensors={
            "uid": uid,
            "data_source": np.array([("math", "code")[g % 2] for g in group], dtype=object),
        },
        meta_info={"temperature": 1.0},
    )


def my_rows(batch):
    """What verl's dispatch gives to this rank."""
    ranks = torch.distributed.get_world_size()
    return batch.chunk(ranks)[torch.distributed.get_rank()]


def old_log_probs(worker, batch):
    """As in verl's trainer: the actor scores its own rollout."""
    data = left_right_2_no_padding(batch.to_tensordict())
    tu.assign_non_tensor(data, calculate_entropy=False, compute_loss=False)
    log_probs = tu.get(worker.compute_log_prob(data), "log_probs")
    return no_padding_2_padding(log_probs, data).float()


def for_update(batch, config):
    """As in verl's trainer: what ``update_actor`` takes."""
    actor, n = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    data = left_right_2_no_padding(batch.to_tensordict())
    tu.assign_non_tensor(
        data, calculate_entropy=actor.entropy_coeff != 0, distillation_use_topk=False,
        distillation_only=False, global_batch_size=actor.ppo_mini_batch_size * n,
        mini_batch_size=actor.ppo_mini_batch_size * n, epochs=actor.ppo_epochs,
        seed=actor.data_loader_seed, dataloader_kwargs={"shuffle": actor.shuffle},
        compute_loss=True,
    )  # fmt: skip
    return data


def main():
    """Two rollouts of 32 answers, two updates each."""
    if "RANK" not in os.environ:  # not under torchrun
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    if rank == 0:
        make_model(folder[0])
    torch.distributed.barrier()
    for name in ("grpo", "fiberpo_domain"):
        config = make_config(name, folder[0])
        worker = CPUWorker(config.actor_rollout_ref, role="actor")
        worker.init_model()
        for step in range(2):
            batch = my_rows(make_rollout(prompts=8, n=4, seed=step))
            batch.batch["old_log_probs"] = old_log_probs(worker, batch)
            metrics = tu.get(worker.update_actor(for_update(batch, config)), "metrics")
            if rank == 0:
                for i, norm in enumerate(metrics["grad_norm"]):
                    shown = [f"{name:14} rollout {step} update {i}  grad_norm {norm:.6f}"]
                    for key in ("actor/pg_clipfrac", "gate/active", "gate/domain/zeroed_frac"):
                        if key in metrics:
                            shown.append(f"{key} {np.atleast_1d(metrics[key])[i]:.3f}")
                    print("  ".join(shown), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
