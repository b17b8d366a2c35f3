"""Makes the golden files beside it: tiny random Llama, Mixtral, DeepSeek-V3, Gemma 3 and GPT-2 models of
Hugging Face, with logits and gradients.

Run in an environment with torch and transformers (versions used: torch 2.13, transformers 5):

    python -m venv /tmp/vhf && /tmp/vhf/bin/pip install torch transformers numpy
    /tmp/vhf/bin/python tests/golden/hf/make_golden.py [NAME...]

Each file holds `tokens` and `targets` [B, L], `logits` [B, L, V], `loss` (mean cross-entropy), and for every
parameter
`weight:NAME` and `gradient:NAME` under Hugging Face's own names. All parameters are random, biases and norms
too, so
that none of them can be forgotten. llama_gqa has 4 query heads on 2 KV heads, epsilon 1e-2 and RoPE theta
100.
mixtral has 4 experts, 2 for each token; its loss holds 0.5 times the load-balance loss.
deepseek has one dense layer and two of 8 experts in 4 groups, 3 experts of 2 groups for each token, whose
biases are as large as the scores' differences; Hugging Face's model has no load-balance loss.
gemma3 has windows of 5 in the first and the third of its three layers, other positions in the second, and a
query scalar that is not the size of a head.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

BATCH, LENGTH, VOCAB = 2, 12, 50


def llama(**changes: object) -> LlamaForCausalLM:
    """A two-layer Llama; `changes` are LlamaConfig's own fields."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))


def mixtral() -> MixtralForCausalLM:
    """A two-layer Mixtral of four experts with its load-balance loss."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        )
    )


def deepseek() -> DeepseekV3ForCausalLM:
    """A three-layer DeepSeek-V3, the first layer dense."""
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=40,
            moe_intermediate_size=12,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_shared_experts=2,
            n_routed_experts=8,
            routed_scaling_factor=2.5,
            kv_lora_rank=12,
            q_lora_rank=20,
            qk_rope_head_dim=4,
            v_head_dim=6,
            qk_nope_head_dim=8,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=3,
            first_k_dense_replace=1,
            max_position_embeddings=32,
        )
    )


def gemma3() -> Gemma3ForCausalLM:
    """The text layers of a three-layer Gemma 3, the second of which sees all."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=32,
            query_pre_attn_scalar=12,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            },
            attn_implementation="eager",
        )
    )


def gpt2() -> GPT2LMHeadModel:
    """A two-layer GPT-2 without dropout."""
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, **none)
    )


def golden(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Randomise every parameter, run the model forward and backward, and keep what came out."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.15
        is_scale = ("norm" in name or "ln_" in name) and not isinstance(model, Gemma3ForCausalLM)
        parameter.data = noise + 1.0 if is_scale and name.endswith("weight") else noise
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.15)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    outputs = model.eval()(inputs)
    logits = outputs.logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
    if isinstance(model, MixtralForCausalLM):
        loss = loss + model.router_aux_loss_coef * outputs.aux_loss
    loss.backward()
    arrays = {"tokens": inputs, "targets": targets, "logits": logits.detach(), "loss": loss.detach()}
    for name, parameter in model.named_parameters():
        arrays[f"weight:{name}"] = parameter.data
        arrays[f"gradient:{name}"] = parameter.grad
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            arrays[f"weight:{name}"] = buffer
    return {name: np.asarray(array) for name, array in arrays.items()}


def main() -> None:
    """Write one file per model, or of those that are named."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    models = {
        "llama_gqa": llama(num_key_value_heads=2, rms_norm_eps=1e-2, **rope),
        "llama_default": llama(),
        "gpt2": gpt2(),
        "mixtral": mixtral(),
        "deepseek": deepseek(),
        "gemma3": gemma3(),
    }
    for name, model in ((n, m) for n, m in models.items() if n in (sys.argv[1:] or models)):
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **golden(model))


if __name__ == "__main__":
    main()
