"""The named models: parameter counts are the published ones."""

from __future__ import annotations

from math import prod

import pytest

from shardlab.errors import UserError
from shardlab.spec.models import MODELS, find_model, num_params
from shardlab.spec.params import parameter_table

PUBLISHED = {
    "gpt2-124m": 124_439_808,  # Hugging Face gpt2: sum of parameter sizes
    "gpt2-1.5b": 1_557_611_200,  # Hugging Face gpt2-xl
    "llama3-8b": 8_030_261_248,  # meta-llama/Meta-Llama-3-8B, safetensors index
    "llama3-70b": 70_553_706_496,  # meta-llama/Meta-Llama-3-70B
    "llama3-405b": 405_853_388_800,  # meta-llama/Llama-3.1-405B
    "mixtral-8x7b": 46_702_792_704,  # mistralai/Mixtral-8x7B-v0.1
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert num_params(MODELS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_the_parameter_table_holds_the_padded_count(name: str, scan_layers: bool) -> None:
    config = MODELS[name]
    table = parameter_table(config, scan_layers=scan_layers)
    assert sum(prod(spec.shape) for spec in table) == num_params(config, padded=True)
    extra = (config.padded_vocab - config.vocab) * config.embed * (1 if config.tied_embeddings else 2)
    assert num_params(config, padded=True) - num_params(config) == extra


def test_tiny_divides_by_eight() -> None:
    tiny = MODELS["tiny"]
    sizes = (tiny.embed, tiny.heads, tiny.kv_heads, tiny.head_dim, tiny.mlp, tiny.vocab, tiny.context)
    assert all(size % 8 == 0 for size in sizes)
    assert (tiny.layers, tiny.heads, tiny.kv_heads) == (2, 8, 8)


def test_llama3_is_not_llama2() -> None:
    config = MODELS["llama3-8b"]
    assert (config.rope_theta, config.norm_epsilon, config.vocab, config.context) == (
        5e5,
        1e-5,
        128_256,
        8_192,
    )
    assert config.padded_vocab == 128_256
    assert MODELS["gpt2-124m"].padded_vocab == 50_304


def test_an_unknown_model_lists_the_known_ones() -> None:
    known = "tiny, gpt2-124m, gpt2-1.5b, llama3-8b, llama3-70b, llama3-405b, mixtral-8x7b"
    with pytest.raises(UserError) as caught:
        find_model("Llama3-7b")
    fix = f"did you mean 'llama3-70b'? known models: {known}"
    assert str(caught.value) == f"--model: unknown model 'Llama3-7b'; {fix}"
