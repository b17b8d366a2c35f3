"""What cannot be is an answer: exit 0, a reason, and the nearest values that can be, each of them tried."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command_line import run, written

from shardlab.spec.case import Case, Workload, make_case
from shardlab.spec.plan import plan_from_text

TENSOR = 'heads = ["tensor"]\nkv_heads = ["tensor"]\nmlp = ["tensor"]'
Changes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Ask:
    """An ask that cannot be. nearest: what the answer offers, and what to write instead in the plan or, where
    the key starts with --, on the command line; each must be feasible by itself."""

    axes: str
    params: str
    activations: str
    reason: str
    nearest: dict[str, Changes]
    method: str = ""
    model: str = "gpt2-124m"
    numbers: dict[str, int] = field(default_factory=dict)
    workload: Workload = "train"

    @property
    def plan(self) -> str:
        return (
            f"[axes]\n{self.axes}\n[params]\n{self.params}\n[activations]\n{self.activations}\n"
            f"[method]\n{self.method}\n"
        )


PIPE = {"axes": "stage = 4", "params": 'stage = ["stage"]', "activations": ""}
CONTEXT = 'seq = ["context"]'
ASKS = {
    "heads": Ask(
        "tensor = 8", TENSOR, "", "12 heads over 8 devices (tensor)",
        {"nearest size that divides: 6": (("tensor = 8", "tensor = 6"),)},
    ),
    "heads-and-vocabulary": Ask(
        "tensor = 10", TENSOR + '\nvocab = ["tensor"]', "", "12 heads over 10 devices (tensor)",
        {"nearest size that divides: 12": (("tensor = 10", "tensor = 12"),)},
    ),
    "two-axes": Ask(
        "x = 2\ny = 4", 'heads = ["x", "y"]', "", "12 heads over 8 devices (x x y)",
        {"nearest size that divides: x = 1": (("x = 2", "x = 1"),)},
    ),
    "mlp": Ask(
        "tensor = 5", 'mlp = ["tensor"]', "", "mlp of 3072 over 5 devices (tensor)",
        {"nearest size that divides: 4": (("tensor = 5", "tensor = 4"),)},
    ),
    "embed": Ask(
        "fsdp = 7", 'embed = ["fsdp"]', 'batch = ["fsdp"]', "embed of 768 over 7 devices (fsdp)",
        {"nearest size that divides: 6": (("fsdp = 7", "fsdp = 6"),)},
    ),
    "layers": Ask(
        "stack = 8", 'layers = ["stack"]', "", "12 layers over 8 devices (stack)",
        {"nearest size that divides: 6": (("stack = 8", "stack = 6"),)},
    ),
    "batch": Ask(
        "data = 8", "", 'batch = ["data"]', "12 sequences over 8 devices (data)",
        {"8 or": (("--batch", "8"),), "or 16": (("--batch", "16"),)}, numbers={"batch": 12},
    ),
    "sequence": Ask(
        "tensor = 4", TENSOR, 'norm_seq = ["tensor"]', "norm_seq of 126 over 4 devices (tensor)",
        {"124 or": (("--seq", "124"),), "or 128": (("--seq", "128"),)}, numbers={"seq": 126},
    ),
    "positions": Ask(
        "data = 2", "", 'batch = ["data"]', "2048 tokens with 1024 learned positions",
        {"seq at most 1024": (("--seq", "1024"),)}, numbers={"seq": 2048},
    ),
    "accumulate": Ask(
        "data = 4", "", 'batch = ["data"]', "16 sequences in 3 microbatches over 4 devices (data)",
        {"12 or": (("--batch", "12"),), "or 24": (("--batch", "24"),)}, "accumulate = 3",
        numbers={"batch": 16},
    ),
    "experts": Ask(
        "expert = 3", 'expert = ["expert"]', 'batch = ["expert"]', "8 experts over 3 devices (expert)",
        {"nearest size that divides: 2": (("expert = 3", "expert = 2"),)}, model="mixtral-8x7b",
    ),
    "capacity": Ask(
        "data = 2", "", 'batch = ["data"]', "a model without experts",
        {"leave experts out": (('experts = "capacity 1.25"', ""),)}, 'experts = "capacity 1.25"',
    ),
    "experts-2d": Ask(
        "expert = 2\ny = 2", 'expert = ["expert"]\nembed = ["y"]', 'batch = ["expert"]\nembed = ["y"]',
        "experts beside 2-D tensor parallelism (y)",
        {"take embed out of [activations]": (('\nembed = ["y"]\n[method]', "\n[method]"),)},
        model="mixtral-8x7b",
    ),
    "experts-decode": Ask(
        "expert = 8", 'expert = ["expert"]', 'seq = ["expert"]', "splits no tokens of a decode step",
        {"add 'expert' to batch": (('seq = ["expert"]', 'batch = ["expert"]'),)},
        model="mixtral-8x7b", workload="decode",
    ),
    "ulysses-heads": Ask(
        "context = 8", "", CONTEXT, "12 heads over 8 devices (context) by Ulysses",
        {"nearest size that divides: 4": (("context = 8", "context = 4"),)}, 'context = "ulysses"',
    ),
    "ring-length": Ask(
        "context = 4", "", CONTEXT, "20 tokens in 8 zig-zag chunks",
        {"16 or": (("--seq", "16"),), "or 24": (("--seq", "24"),)}, 'context = "ring"', numbers={"seq": 20},
    ),
    "context-decode": Ask(
        "context = 4", "", CONTEXT, "for decode, whose new tokens are not split",
        {
            "context = 'none', and cache = [\"context\"] in place of seq": (
                (CONTEXT, 'cache = ["context"]'), ('"ulysses"', '"none"'),
            )
        },
        'context = "ulysses"', workload="decode",
    ),
    "stages": Ask(
        **PIPE | {"axes": "stage = 16"}, reason="12 layers over 16 stages (stage)",
        nearest={"at most 12 stages": (("stage = 16", "stage = 12"),)},
        method='pipeline = "1f1b"\nmicrobatches = 16',
    ),
    "virtual-stages": Ask(
        **PIPE, reason="12 layers over 4 stages of 4 virtual stages",
        nearest={"virtual_stages at most 3": (("virtual_stages = 4", "virtual_stages = 3"),)},
        method='pipeline = "interleaved"\nmicrobatches = 8\nvirtual_stages = 4',
    ),
    "too-few-layers-for-chunks": Ask(
        **PIPE | {"axes": "stage = 8"}, reason="12 layers over 8 stages of 2 virtual stages",
        nearest={
            "pipeline = '1f1b', without virtual_stages": (("interleaved", "1f1b"), ("virtual_stages = 2", ""))
        },
        method='pipeline = "interleaved"\nmicrobatches = 8\nvirtual_stages = 2',
    ),
    "one-chunk": Ask(
        **PIPE, reason="an interleaved pipeline with one chunk per stage",
        nearest={"virtual_stages at most 3": (("microbatches = 8", "microbatches = 8\nvirtual_stages = 3"),)},
        method='pipeline = "interleaved"\nmicrobatches = 8',
    ),
    "no-microbatches": Ask(
        **PIPE, reason="a schedule (gpipe) without microbatches",
        nearest={"microbatches = 4 or more": (('"gpipe"', '"gpipe"\nmicrobatches = 4'),)},
        method='pipeline = "gpipe"',
    ),
    "uneven-groups": Ask(
        **PIPE, reason="6 microbatches interleaved over 4 stages",
        nearest={
            "4 or": (("microbatches = 6", "microbatches = 4"),),
            "or 8": (("microbatches = 6", "microbatches = 8"),),
        },
        method='pipeline = "interleaved"\nmicrobatches = 6\nvirtual_stages = 2',
    ),
    "pipeline-batch": Ask(
        **PIPE, reason="16 sequences in 3 microbatches",
        nearest={"15 or": (("--batch", "15"),), "or 18": (("--batch", "18"),)},
        method='pipeline = "1f1b"\nmicrobatches = 3', numbers={"batch": 16},
    ),
    "pipeline-decode": Ask(
        **PIPE, reason="a pipeline (zb-h1) for decode",
        nearest={
            "use pipeline = 'none'": (
                ('stage = ["stage"]', ""), ('pipeline = "zb-h1"\nmicrobatches = 8', 'pipeline = "none"'),
            )
        },
        method='pipeline = "zb-h1"\nmicrobatches = 8', workload="decode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKS)
def test_it_is_answered_with_a_reason_and_the_nearest(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ASKS[name]
    path = written(tmp_path / "plan.toml", ask.plan)
    devices = plan_from_text(ask.plan).num_devices
    given = [word for key, value in ask.numbers.items() for word in (f"--{key}", str(value))]
    argv = [
        "explain",
        path,
        "--model",
        ask.model,
        "--on",
        f"cpu:{devices}",
        "--workload",
        ask.workload,
        *given,
    ]
    assert run(*argv, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert ask.reason in document["infeasible"]
    assert "analysis" not in document
    for offered in ask.nearest:
        assert offered in document["infeasible"]


@pytest.mark.parametrize(
    ("name", "offered"), [(name, offered) for name in ASKS for offered in ASKS[name].nearest]
)
def test_what_is_offered_is_feasible(name: str, offered: str) -> None:
    ask = ASKS[name]
    text, numbers = ask.plan, dict(ask.numbers)
    for old, new in ask.nearest[offered]:
        if old.startswith("--"):
            numbers[old.removeprefix("--")] = int(new)
        else:
            assert old in text
            text = text.replace(old, new)
    assert isinstance(case_of(ask, text, numbers), Case)


def case_of(ask: Ask, text: str, numbers: dict[str, int]) -> Case:
    plan = plan_from_text(text)
    return make_case(plan, ask.model, f"cpu:{plan.num_devices}", workload=ask.workload, **numbers)
