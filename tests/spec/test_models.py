"""The named models: parameter counts are the published ones."""

from __future__ import annotations

from math import prod

import pytest

from shardlab.errors import UserError
from shardlab.spec.models import MODELS, find_model
from shardlab.spec.param_counts import num_params
from shardlab.spec.params import parameter_table

PUBLISHED = {
    "gpt2-124m": 124_439_808,  # Hugging Face gpt2: sum of parameter sizes
    "gpt2-1.5b": 1_557_611_200,  # Hugging Face gpt2-xl
    "llama3-8b": 8_030_261_248,  # meta-llama/Meta-Llama-3-8B, safetensors index
    "llama3-70b": 70_553_706_496,  # meta-llama/Meta-Llama-3-70B
    "llama3-405b": 405_853_388_800,  # meta-llama/Llama-3.1-405B
    "mistral-7b": 7_241_732_096,  # mistralai/Mistral-7B-v0.1, safetensors index
    "mixtral-8x7b": 46_702_792_704,  # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x22b": 140_620_634_112,  # mistralai/Mixtral-8x22B-v0.1, safetensors index
    "llama2-7b": 6_738_415_616,  # meta-llama/Llama-2-7b-hf
    "llama2-13b": 13_015_864_320,  # meta-llama/Llama-2-13b-hf
    "llama2-70b": 68_976_648_192,  # meta-llama/Llama-2-70b-hf
    # Hugging Face DeepseekV3ForCausalLM(DeepseekV3Config()): 671,026,404,352 in parameters, and the biases of
    # 58 routers for 256 experts; the README's "671B of the main model", without 14B of multi-token prediction
    "deepseek-v3": 671_026_404_352 + 58 * 256,
    # Hugging Face Gemma3ForCausalLM with the dimensions of google/gemma-3-*-pt, less 64 rows for images; with
    # the vision tower Gemma3ForConditionalGeneration has 4,300,079,472, 12,187,325,040 and 27,432,406,640
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168 - 64 * 2_560,
    "gemma3-12b": 11_766_034_176 - 64 * 3_840,
    "gemma3-27b": 27_009_346_304 - 64 * 5_376,
}
# Billions, as printed: GPT-3 in arXiv:2005.14165 table 2.1; 174.6, 529.6 and 1008.0 in Megatron-LM,
# arXiv:2104.04473 tables 1 and 2; 22 in arXiv:2205.05198 table 3.
PRINTED = {
    "gpt3-175b": "175",
    "megatron-22b": "22",
    "megatron-175b": "174.6",
    "megatron-530b": "529.6",
    "megatron-1t": "1008.0",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert num_params(MODELS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_counts_of_gpts_are_those_in_print(name: str) -> None:
    digits = len(PRINTED[name].partition(".")[2])
    assert f"{num_params(MODELS[name]) / 1e9:.{digits}f}" == PRINTED[name]


@pytest.mark.parametrize("name", [name for name in PRINTED if name.startswith("megatron")])
def test_megatron_counts_obey_equation_2(name: str) -> None:
    """arXiv:2104.04473, equation 2: P = 12 L h² (1 + 13/(12 h) + (V + s)/(12 L h)); the last norm, 2 h."""
    L, h, V, s = (getattr(MODELS[name], field) for field in ("layers", "embed", "vocab", "context"))
    assert num_params(MODELS[name]) == 12 * L * h**2 + 13 * L * h + (V + s) * h + 2 * h


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
    known = ", ".join(MODELS)
    with pytest.raises(UserError) as caught:
        find_model("Llama3-7b")
    assert known.startswith("tiny, gpt2-124m")
    fix = f"did you mean 'llama3-70b'? known models: {known}"
    assert str(caught.value) == f"--model: unknown model 'Llama3-7b'; {fix}"
