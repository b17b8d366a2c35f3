"""Mesh files that are right: what is filled in, what extends what; DESIGN's example is understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlab.errors import UserError
from shardlab.spec.case import make_case
from shardlab.spec.plan import Plan, load_plan, plan_from_text

EXAMPLE = """
description = "Llama 70B: FSDP across hosts, tensor parallel inside the NVLink domain"
on = "h100:64x8"            # default machine
order = "make_mesh"
[axes]                      # logical grid, major to minor
fsdp = 64
tensor = 8
[params]
embed = ["fsdp"]
heads = ["tensor"]
mlp   = ["tensor"]
vocab = ["tensor"]
[activations]
batch = ["fsdp"]
norm_seq = ["tensor"]       # Megatron sequence parallelism
[optimizer]                 # follows [params] unless said
[blocks.moe.params]         # one block family may differ
[method]
pipeline = "none"
accumulate = 1
context = "none"
experts = "dropless"
remat = "full"
attention = "auto"
[compiler]
flags = ["--xla_gpu_enable_latency_hiding_scheduler=true"]
[check]
model = "llama3-70b"
batch = 512
seq = 4096
"""


def test_the_whole_format() -> None:
    plan = plan_from_text(EXAMPLE, "example")
    assert plan.name == "example"
    assert plan.on == "h100:64x8"
    assert list(plan.axes.items()) == [("fsdp", 64), ("tensor", 8)]
    assert plan.num_devices == 512
    assert plan.flags == ("--xla_gpu_enable_latency_hiding_scheduler=true",)
    assert (plan.check.model, plan.check.batch, plan.check.seq) == ("llama3-70b", 512, 4096)
    assert (plan.method.remat, plan.method.accumulate) == ("full", 1)


def test_activations_follow_the_weights_and_the_optimizer_follows_them_too() -> None:
    plan = plan_from_text(EXAMPLE)
    tensor = ("tensor",)
    assert plan.activations == {
        "heads": tensor, "mlp": tensor, "vocab": tensor, "batch": ("fsdp",), "norm_seq": tensor,
    }  # fmt: skip
    assert (
        plan.optimizer == plan.params == {"embed": ("fsdp",), "heads": tensor, "mlp": tensor, "vocab": tensor}
    )


def test_what_is_said_does_not_follow() -> None:
    plan = plan_from_text(
        "[axes]\na = 2\nb = 2\n[params]\nmlp = ['a']\nembed = ['b']\n[activations]\nmlp = []\nseq = ['b']\n"
        "[optimizer]\nembed = ['b', 'a']\nmlp = []\n"
    )
    assert plan.activations == {"mlp": (), "seq": ("b",), "norm_seq": ("b",)}
    assert plan.optimizer == {"mlp": (), "embed": ("b", "a")}


def test_the_smallest_file() -> None:
    plan = plan_from_text("axes = {x = 1}")
    assert plan == Plan(name="plan", axes={"x": 1})


def test_an_explicit_order() -> None:
    assert plan_from_text("order = [1, 0]\n[axes]\nx = 2").order == (1, 0)


def test_a_plan_goes_to_json_and_back() -> None:
    plan = plan_from_text(EXAMPLE)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


BASE = """[axes]
data = 4
[params]
embed = ["data"]
[activations]
batch = ["data"]
[check]
batch = 4
model = "tiny"
"""
EXTENDS = """extends = "base.toml"
[axes]
fast = 2
data = 4
[activations]
norm_seq = ["fast"]
[check]
batch = 8
"""


def test_extends_takes_over_key_by_key_but_the_axes_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "plan.toml").write_text(EXTENDS)
    plan = load_plan(tmp_path / "plan.toml")
    assert plan.name == "plan"
    assert list(plan.axes.items()) == [("fast", 2), ("data", 4)]
    assert plan.activations == {"batch": ("data",), "norm_seq": ("fast",)}
    assert (plan.check.model, plan.check.batch) == ("tiny", 8)


def test_a_mistake_is_blamed_on_the_file_it_stands_in(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "plan.toml").write_text('extends = "base.toml"\n[axes]\nfsdp = 4\n')
    with pytest.raises(UserError) as caught:
        load_plan(tmp_path / "plan.toml")
    base = tmp_path / "base.toml"
    assert str(caught.value).splitlines() == [
        f"{base}:4: params.embed: names no mesh axis 'data'; mesh axes: fsdp",
        f"{base}:6: activations.batch: names no mesh axis 'data'; mesh axes: fsdp",
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param(
            {"plan": 'extends = "plan.toml"'},
            "plan.toml:1: extends: goes in circles; remove one extends",
            id="self",
        ),
        pytest.param(
            {"plan": 'extends = "b.toml"', "b": '\nextends = "plan.toml"'},
            "b.toml:2: extends: goes in circles; remove one extends",
            id="each other",
        ),
        pytest.param(
            {"plan": 'extends = "gone.toml"'},
            "gone.toml: No such file or directory; give the path of a TOML file",
            id="missing",
        ),
        pytest.param(
            {"plan": "extends = 3"},
            'plan.toml:1: extends: 3 is not a path; write extends = "other.toml"',
            id="type",
        ),
        pytest.param(
            {"plan": 'extends = "b.toml"', "b": "x = "},
            "b.toml:1: not TOML: invalid value",
            id="syntax of the base",
        ),
    ],
)
def test_bad_extends(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_plan(tmp_path / "plan.toml")
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_a_text_in_no_file_extends_nothing() -> None:
    with pytest.raises(UserError, match="a text that is in no file cannot extend one"):
        plan_from_text('extends = "base.toml"')


def test_flags_from_a_shared_file(tmp_path: Path) -> None:
    (tmp_path / "gpu.flags").write_text("# ours\n--xla_a=1 --xla_b=2  # two\n\n--xla_c\n")
    (tmp_path / "plan.toml").write_text('[axes]\nx = 1\n[compiler]\nflags = "gpu.flags"\n')
    assert load_plan(tmp_path / "plan.toml").flags == ("--xla_a=1", "--xla_b=2", "--xla_c")


def test_a_machine_file_is_looked_for_beside_the_plan(tmp_path: Path) -> None:
    domain = '[[domain]]\ntier = "pcie"\nsource = "desk"\n'
    (tmp_path / "desk.toml").write_text(f'chip = "rtx3090"\nmax_chips_per_host = 4\nhosts = 1\n{domain}')
    (tmp_path / "plan.toml").write_text('on = "desk.toml"\n[axes]\nx = 4\n[check]\nmodel = "tiny"\n')
    case = make_case(load_plan(tmp_path / "plan.toml"))
    assert case.load_machine().num_devices == 4
