"""The plans that the wire lab runs, each over N devices: mesh files as text, and models that show them."""

from __future__ import annotations

from dataclasses import dataclass

_SPLIT_HEADS = 'heads = ["tensor"]\nkv_heads = ["tensor"]\nmlp = ["tensor"]\nvocab = ["tensor"]'
# Code is generated without optimisation, most of a small compile: it comes after all that is counted.
_QUICK = '[compiler]\nflags = ["--xla_backend_optimization_level=0"]\n'


@dataclass(frozen=True, slots=True, kw_only=True)
class WirePlan:
    """axes: `NAME = N`, or several; batch: sequences per device that splits the batch, or in all; alone: the
    plan of the same model whose step of one device says what cores are worth to this one."""

    axes: str
    rules: str
    model: str = "tiny"
    batch: int = 8
    seq: int = 64
    alone: str = "data"

    def text(self, devices: int, *, quick: bool = False) -> str:
        """The mesh file for this many devices. quick: compiles in less time, and computes in more."""
        axes = self.axes.replace("N/2", str(devices // 2)).replace("N", str(devices))
        return f"[axes]\n{axes}\n{self.rules}\n{_QUICK if quick else ''}"


PLANS = {
    "data": WirePlan(axes="data = N", rules='[activations]\nbatch = ["data"]'),
    "fsdp": WirePlan(axes="fsdp = N", rules='[params]\nembed = ["fsdp"]\n[activations]\nbatch = ["fsdp"]'),
    "tensor": WirePlan(axes="tensor = N", rules=f"[params]\n{_SPLIT_HEADS}"),
    "sequence": WirePlan(
        axes="tensor = N", rules=f'[params]\n{_SPLIT_HEADS}\n[activations]\nnorm_seq = ["tensor"]'
    ),
    "ring": WirePlan(
        axes="ring = N", rules='[activations]\nseq = ["ring"]\n[method]\ncontext = "ring"', batch=4, seq=128
    ),
    "ulysses": WirePlan(
        axes="ulysses = N",
        rules='[activations]\nseq = ["ulysses"]\n[method]\ncontext = "ulysses"',
        batch=4,
        seq=128,
    ),
    "pipeline": WirePlan(
        axes="stage = 2\ndata = N/2",
        rules='[params]\nstage = ["stage"]\n[activations]\nbatch = ["data"]\n'
        '[method]\npipeline = "1f1b"\nmicrobatches = 4',
        batch=32,
    ),
    "expert": WirePlan(
        axes="expert = N",
        rules='[params]\nexpert = ["expert"]\n[activations]\nbatch = ["expert"]',
        model="tiny-deepseek",
        alone="expert",
    ),
}
