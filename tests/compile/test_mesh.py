"""How devices fill the grid. The devices are stand-ins: jax's mesh code reads only these attributes."""

import itertools
from dataclasses import dataclass

import pytest

from shardlab.compile.mesh import fill_mesh
from shardlab.compile.target import Target
from shardlab.errors import UserError


@dataclass(frozen=True)
class FakeDevice:
    id: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    process_index: int = 0
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    slice_index: int = 0


def gpus(count: int) -> Target:
    return Target(family="gpu", platform="cuda", devices=tuple(FakeDevice(id=i) for i in range(count)))


def tpus(kind: str, x: int, y: int, z: int = 1, slices: int = 1) -> Target:
    places = itertools.product(range(slices), range(z), range(y), range(x))
    devices = tuple(
        FakeDevice(i, platform="tpu", device_kind=kind, coords=(x_, y_, z_), slice_index=s)
        for i, (s, z_, y_, x_) in enumerate(places)
    )
    return Target(family="tpu", platform="tpu", devices=devices, slices=slices)


def test_row_major_is_the_machines_order() -> None:
    mesh, device_ids, notes = fill_mesh({"data": 2, "tensor": 4}, "row-major", tpus("TPU v5", 2, 2, 2))
    assert device_ids == tuple(range(8))
    assert dict(mesh.shape) == {"data": 2, "tensor": 4}
    assert notes == ()


def test_explicit_order_is_taken_as_written() -> None:
    order = (3, 1, 2, 0)
    mesh, device_ids, _ = fill_mesh({"data": 2, "tensor": 2}, order, gpus(4))
    assert device_ids == order
    assert [device.id for device in mesh.devices.flat] == [3, 1, 2, 0]


def test_make_mesh_counts_gpus_host_by_host() -> None:
    assert fill_mesh({"data": 4, "tensor": 2}, "make_mesh", gpus(8))[1] == tuple(range(8))


def test_make_mesh_puts_an_axis_on_a_whole_physical_axis() -> None:
    """On 4 x 4 x 4 chips the 4 devices of a group stand on a line that wraps around, not on a 2 x 2 block."""
    target = tpus("TPU v5", 4, 4, 4)
    device_ids = fill_mesh({"a": 16, "b": 4}, "make_mesh", target)[1]
    assert sorted(device_ids) == list(range(64))
    for start in range(0, 64, 4):
        coords = [target.devices[i].coords for i in device_ids[start : start + 4]]
        assert sum(len({c[axis] for c in coords}) > 1 for axis in range(3)) == 1


def test_a_shape_that_make_mesh_refuses_is_row_major_with_a_note() -> None:
    _, device_ids, notes = fill_mesh({"fsdp": 256, "tensor": 2}, "make_mesh", tpus("TPU v5", 8, 8, 8))
    assert device_ids == tuple(range(512))
    (note,) = notes
    assert note.startswith("make_mesh refuses 256x2 here, devices are in row-major order")


@pytest.mark.parametrize(
    ("axes", "slices"),
    [
        pytest.param({"replica": 2, "fsdp": 8}, 2, id="an axis of slices"),
        pytest.param({"fsdp": 16}, 2, id="a part of the first axis"),
        pytest.param({"a": 2, "b": 2, "c": 4}, 4, id="two axes"),
        pytest.param({"a": 2, "b": 6, "c": 2}, 4, id="one axis and a part of the next"),
    ],
)
def test_leading_axes_go_over_dcn(axes: dict[str, int], slices: int) -> None:
    count = 1
    for size in axes.values():
        count *= size
    per_slice = count // slices
    shape = {4: (2, 2), 6: (2, 3), 8: (2, 4)}[per_slice]
    _, device_ids, notes = fill_mesh(axes, "make_mesh", tpus("TPU v5 lite", *shape, slices=slices))
    assert notes == ()
    assert [i // per_slice for i in device_ids] == [s for s in range(slices) for _ in range(per_slice)]


def test_slices_that_no_leading_axis_holds() -> None:
    _, device_ids, notes = fill_mesh({"a": 6, "b": 4}, "make_mesh", tpus("TPU v5 lite", 2, 3, slices=4))
    assert device_ids == tuple(range(24))
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("axes", "order", "where", "what"),
    [
        pytest.param(
            {"a": 2, "b": 3}, "make_mesh", "axes", "2 x 3 = 6 positions for 8 devices", id="too few"
        ),
        pytest.param({"a": 8}, (0, 1, 2), "order", "not an order of the 8 devices", id="short list"),
        pytest.param(
            {"a": 8}, (0, 1, 2, 3, 4, 5, 6, 6), "order", "not an order of the 8 devices", id="one twice"
        ),
    ],
)
def test_mistakes(axes: dict[str, int], order: tuple[int, ...], where: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        fill_mesh(axes, order, gpus(8))
    (problem,) = caught.value.problems
    assert (problem.where, problem.what) == (where, what)
