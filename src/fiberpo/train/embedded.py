"""The embedded model: a character-level Llama of 0.76 million parameters that ships in the package.

It reads and writes the prompts of `fiberpo.train.tasks`, so that a training run needs no download.
"""

from __future__ import annotations

from importlib.resources import as_file, files

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fiberpo.errors import ConfigError

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Special tokens in the order of their ids: pad 0, begin of sequence 1, end of sequence 2,
unknown 3."""

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789TF+-*/=<>()&|~^:;,.?!#"
"""The 60 characters that the tokenizer knows, in the order of their ids from 4 on."""

ATTENTION = "eager"
"""Attention implementation, the fastest one on a CPU at these lengths."""

MAX_POSITIONS = 128
"""Longest sequence, prompt and completion together, in tokens."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token per character, ``<bos>`` in front, padding on the left.

    A character outside `CHARACTERS` becomes ``<unk>``. Decoding joins tokens without spaces.
    """
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    pad, bos, eos, unk = SPECIAL_TOKENS
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Build the Llama with random weights drawn from ``seed``: 763,008 parameters.

    Vocabulary 64, hidden size 128, 4 layers, 4 heads, feed-forward size 320, tied embeddings. The
    global random state of torch is left as it was.
    """
    config = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(CHARACTERS),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation(ATTENTION)
    torch.nn.Module.to(model, dtype)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model


def load_embedded(
    dtype: torch.dtype = torch.float32,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the checkpoint that ships in the package; return (model in eval mode, tokenizer).

    Args:
        dtype: Floating type of the parameters in memory; the file holds float16.

    Raises:
        ConfigError: ``dtype`` is no floating type, or the installed package lacks the checkpoint.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating type, got {dtype}: use torch.float32")
    resource = files("fiberpo").joinpath("assets").joinpath("embedded")
    if not resource.joinpath("model.safetensors").is_file():
        raise ConfigError(
            f"no checkpoint at {resource}: reinstall fiberpo, or rebuild the checkpoint with "
            "fiberpo.train.warmstart.warmstart"
        )
    with as_file(resource) as directory:
        model = LlamaForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    return model.eval(), tokenizer
