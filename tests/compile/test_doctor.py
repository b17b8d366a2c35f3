import pytest

from shardlab.compile import doctor
from shardlab.errors import TargetMissing
from shardlab.hardware.catalog import load_machine

EVERYTHING = {
    "jax": "0.12.0.1", "jaxlib": "0.12.0.1", "flax": "0.12", "optax": "0.2", "libtpu": "0.0.50.1",
    "jax-cuda13-plugin": "0.12.0.1", "jax-cuda13-pjrt": "0.12.0.1", "nvidia-cuda-nvcc": "13.5",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What jax 0.12 says in its metadata, whichever jax runs the tests."""
    pins = ["jaxlib<=0.12.0.1,>=0.12.0.1", 'libtpu==0.0.50.*; extra == "tpu"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: pins)


def without(*packages: str, **versions: str) -> doctor.VersionOf:
    found = {name: v for name, v in EVERYTHING.items() if name not in packages} | versions
    return lambda package: found.get(package)


@pytest.mark.parametrize(
    ("machine", "version_of", "why", "install"),
    [
        pytest.param("cpu:8", without("jax"), "not installed: jax", "shardlab[jax]", id="no jax"),
        pytest.param("attached:1", without("flax"), "not installed: flax", "shardlab[jax]", id="no flax"),
        pytest.param("v5e:2x4", without("libtpu"), "not installed: libtpu", "shardlab[tpu]", id="no libtpu"),
        pytest.param(
            "h100:1x8", without("jax-cuda13-pjrt"), "not installed: jax-cuda13-pjrt",
            "shardlab[gpu]", id="no pjrt",
        ),
        pytest.param(
            "v5e:2x4", without(libtpu="0.0.42"), "libtpu 0.0.42 is not the 0.0.50 that jax 0.12.0.1 pins",
            "shardlab[tpu]", id="another libtpu",
        ),
        pytest.param(
            "h100:1x8", without(jaxlib="0.10.2"), "jax-cuda13-plugin 0.12.0.1 is not for jaxlib 0.10.2",
            "shardlab[gpu]", id="another plugin",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_and_how_to_get_it(
    machine: str, version_of: doctor.VersionOf, why: str, install: str
) -> None:
    with pytest.raises(TargetMissing) as caught:
        doctor.require_target(load_machine(machine), version_of)
    assert caught.value.why == why
    assert caught.value.install == f"pip install '{install}'"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("machine", ["cpu:8", "attached:1", "v5e:2x4", "h100:1x8"])
def test_nothing_is_missing(machine: str) -> None:
    doctor.require_target(load_machine(machine), without())


def test_every_target_is_listed_with_its_state() -> None:
    statuses = {status.target: status for status in doctor.targets(version_of=without("libtpu"))}
    assert {name for name, status in statuses.items() if status.works} == {"cpu", "gpu", "attached"}
    assert statuses["tpu"].install == "pip install 'shardlab[tpu]'"
    assert "jax-cuda13-plugin 0.12.0.1" in statuses["gpu"].detail
    for chip in ("MI300X", "H800 SXM"):
        assert not statuses[chip].works
        assert "no compiler here" in statuses[chip].detail
