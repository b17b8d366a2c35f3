import pytest

from shardlab.cost.liveness import Peak
from shardlab.cost.owners import argument_owner, memory_band, memory_owners
from shardlab.program import Argument, Memory


def argument(path: str, size: int) -> Argument:
    return Argument(path=path, dtype="f32", shape=(), total_bytes=size, split_over=(), device_bytes=size)


@pytest.mark.parametrize(
    ("path", "workload", "owner"),
    [
        pytest.param("arguments[0].params['head/kernel']", "train", "parameters", id="parameters"),
        pytest.param("arguments[0].optimizer[1][0].mu['head/kernel']", "train", "optimizer", id="moments"),
        pytest.param("arguments[1].tokens", "train", "inputs", id="tokens"),
        pytest.param("arguments[0]['head/kernel']", "decode", "parameters", id="served-parameters"),
        pytest.param("arguments[1].keys", "decode", "cache", id="cache"),
        pytest.param("arguments[2]", "decode", "inputs", id="decoded-token"),
        pytest.param("arguments[1]", "prefill", "inputs", id="prompt"),
        pytest.param("arguments[0].something", "train", "arguments", id="unknown"),
    ],
)
def test_arguments_by_where_they_stand(path: str, workload: str, owner: str) -> None:
    assert argument_owner(path, workload) == owner


def test_owners_and_the_rest_are_what_is_reserved() -> None:
    arguments = (argument("arguments[0].params['w']", 40), argument("arguments[0].optimizer[0]", 80))
    memory = Memory(argument_bytes=128, output_bytes=130, alias_bytes=120, temp_bytes=60)
    owners = memory_owners(arguments, "train", Peak({"activations": 50, "gradients": 0}), memory)
    assert owners is not None
    # 128 + 130 - 120 + 60 = 198 reserved; 8 of the arguments and 10 of the temporaries are padding.
    assert owners.by_owner == {
        "optimizer": 80,
        "activations": 50,
        "parameters": 40,
        "results": 10,
        "arguments": 8,
    }
    assert list(owners.by_owner) == ["optimizer", "activations", "parameters", "results", "arguments"]
    assert owners.unexplained_bytes == 198 - 188


def test_unknown_memory_has_no_owners() -> None:
    assert memory_owners((), "train", Peak({}), None) is None
    assert memory_owners((), "train", None, Memory(argument_bytes=1, temp_bytes=1)) is None
    assert memory_owners((), "train", Peak({}), Memory(temp_bytes=1)) is None


@pytest.mark.parametrize(
    ("autotuned", "major", "band"),
    [
        pytest.param(False, 9, (90, 100 + 33_554_432), id="hopper"),
        pytest.param(False, 8, (90, 100 + 4_194_304), id="ampere"),
        pytest.param(False, None, (90, 100 + 33_554_432), id="unknown-capability"),
        pytest.param(True, 9, None, id="autotuned"),
        pytest.param(None, None, None, id="not-a-gpu"),
    ],
)
def test_band_of_programs_not_autotuned(autotuned: bool | None, major: int | None, band: object) -> None:
    memory = Memory(argument_bytes=60, output_bytes=0, alias_bytes=0, temp_bytes=40, peak_bytes=90)
    assert memory_band(memory, autotuned, major) == band
