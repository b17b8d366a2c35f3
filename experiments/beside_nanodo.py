"""Tokens per second of our transformer beside google-deepmind/nanodo's of the same dimensions.

git clone https://github.com/google-deepmind/nanodo
pip install clu ml-collections sentencepiece tensorflow_datasets tensorflow-cpu tensorboard
python experiments/beside_nanodo.py --nanodo=nanodo

Both are trained by their own step in one process, on one device with the same cores and compiler: a decoder
of the same layers, widths, vocabulary and learned positions, layer norms (ours with a bias), GELU, tied
embeddings, AdamW after clipping by the global norm, the same tokens. They take turns, blocks of steps A B A
B, each block timed from its first step to the end of its last.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from absl import app, flags
from windows import Windows, read_text, windows_of_steps

_NANODO = flags.DEFINE_string("nanodo", None, "A clone of google-deepmind/nanodo.", required=True)
_EMBED = flags.DEFINE_integer("embed", 512, "Width of the model.")
_HEADS = flags.DEFINE_integer("heads", 8, "Attention heads.")
_LAYERS = flags.DEFINE_integer("layers", 6, "Transformer blocks.")
_MLP = flags.DEFINE_integer("mlp", 2048, "Width of the MLP.")
_VOCAB = flags.DEFINE_integer("vocab", 8192, "Tokens; the text is bytes, the rest is never met.")
_SEQ = flags.DEFINE_integer("seq", 256, "Tokens per sequence.")
_BATCH = flags.DEFINE_integer("batch", 4, "Sequences.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations, in both.")
_BLOCKS = flags.DEFINE_integer("blocks", 5, "Blocks of each trainer.")
_BLOCK_STEPS = flags.DEFINE_integer("block_steps", 4, "Steps of a block.")
_SCAN = flags.DEFINE_bool("scan", False, "Whether ours scans its layers; nanodo's are unrolled.")
_RATE, _WARMUP, _STEPS = 1e-3, 20, 1000

OneStep = Callable[[np.ndarray], Any]  # tokens [B, L + 1] -> the loss, perhaps not there yet


def ours() -> OneStep:
    """The step of `train.py`."""
    import jax
    import jax.numpy as jnp

    from shardlab.parallel.optimizer import OptimizerConfig
    from shardlab.parallel.step import build_step, init_state
    from shardlab.spec.case import make_case
    from shardlab.spec.models import ModelConfig
    from shardlab.spec.plan import plan_from_text

    model = ModelConfig(
        name="nanodo", layers=_LAYERS.value, embed=_EMBED.value, heads=_HEADS.value, kv_heads=_HEADS.value,
        head_dim=_EMBED.value // _HEADS.value, mlp=_MLP.value, vocab=_VOCAB.value, context=_SEQ.value,
        norm="layernorm", norm_epsilon=1e-6, activation="gelu", positions="learned", tied_embeddings=True,
    )  # fmt: skip
    plan = plan_from_text('[axes]\ndata = 1\n[method]\nremat = "none"\n')  # as nanodo, by default
    case = make_case(plan, model, "cpu:1", _BATCH.value, _SEQ.value, scan_layers=_SCAN.value)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), tuple(case.plan.axes))
    optimizer = OptimizerConfig(
        peak_learning_rate=_RATE, warmup_steps=_WARMUP, total_steps=_STEPS, b2=0.98, epsilon=1e-9
    )
    step = build_step(case, mesh, target="cpu", compute_dtype=jnp.dtype(_DTYPE.value), optimizer=optimizer)
    compiled = step.function.lower(*step.arguments).compile()
    state = init_state(case, mesh, 0, optimizer=optimizer)
    sharding = step.arguments[1].tokens.sharding

    def one(tokens_BxL1: np.ndarray) -> Any:
        nonlocal state
        split = (tokens_BxL1[:, :-1], tokens_BxL1[:, 1:])
        state, metrics = compiled(state, type(step.arguments[1])(*jax.device_put(split, sharding)))
        return metrics.loss

    return one


def nanodos() -> OneStep:
    """The step of nanodo's own `Trainer`."""
    sys.path.insert(0, _NANODO.value)
    import jax
    import ml_collections
    from nanodo import model_factory, train

    c = ml_collections.ConfigDict()
    c.model = ml_collections.config_dict.create(
        D=_EMBED.value, H=_HEADS.value, L=_SEQ.value, N=_LAYERS.value, F=_MLP.value, dtype=_DTYPE.value,
        fsdp_enabled=True, remat=False,
    )  # fmt: skip
    c.opt = ml_collections.config_dict.create(
        num_train_steps=_STEPS, peak_learning_rate=_RATE, init_learning_rate=_RATE / _WARMUP,
        final_learning_rate=_RATE / 10, warmup_steps=_WARMUP, decay_type="cosine", weight_decay=0.1,
        clip_by_global_norm=1.0, optimizer="adamw", b1=0.9, b2=0.98, eps=1e-9,
    )  # fmt: skip
    c.log_internal_metrics = False
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    model, get_loss_fn = model_factory.get_model_and_loss(c, _VOCAB.value)
    shardings, state = train._init_train_state(c, model, rng=jax.random.PRNGKey(0), mesh=mesh)
    trainer = train.Trainer(c=c, state=state, mesh=mesh, shardings=shardings, get_loss_fn=get_loss_fn)

    def one(tokens_BxL1: np.ndarray) -> Any:
        # nanodo shifts by itself, and gives no weight to token 0, which it pads with.
        return trainer.do_step(1, tokens_BxL1[:, 1:])["train_loss"]

    return one


def block_s(one: OneStep, batches: Sequence[np.ndarray]) -> tuple[float, float]:
    """Seconds of a block of steps, and its last loss."""
    began = time.perf_counter()
    for batch in batches:
        loss = one(batch)
    last = float(loss)
    return time.perf_counter() - began, last


def main(argv: Sequence[str]) -> None:
    """Take turns."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    windows = Windows(read_text(None, 2_000_000), _SEQ.value)
    steps = windows_of_steps(windows, batch=_BATCH.value, seed=0, rows=range(_BATCH.value), first_step=1)
    trainers = {"shardlab": ours(), "nanodo": nanodos()}
    warm = [next(steps) for _ in range(2)]
    for one in trainers.values():
        block_s(one, warm)
    rates: dict[str, list[float]] = {name: [] for name in trainers}
    losses: dict[str, float] = {}
    for _ in range(_BLOCKS.value):
        batches = [next(steps) for _ in range(_BLOCK_STEPS.value)]
        for name, one in trainers.items():
            took_s, losses[name] = block_s(one, batches)
            rates[name].append(_BLOCK_STEPS.value * _BATCH.value * _SEQ.value / took_s)
    for name, found in rates.items():
        said = ", ".join(f"{rate:,.0f}" for rate in found)
        print(f"{name}: {median(found):,.0f} tokens/s ({said}), loss {losses[name]:.3f}")
    ratios = [a / b for a, b in zip(rates["shardlab"], rates["nanodo"], strict=True)]
    print(f"shardlab / nanodo: {median(ratios):.3f} (by block {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    app.run(main)
