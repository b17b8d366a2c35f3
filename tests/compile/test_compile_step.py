import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab import compile as stage
from shardlab.compile import compile_step
from shardlab.program import from_bytes, to_bytes


def doubled(x: jax.Array) -> jax.Array:
    return x * 2


@pytest.mark.parametrize(
    "fn", [pytest.param(doubled, id="plain"), pytest.param(jax.jit(doubled), id="jitted")]
)
def test_any_function_without_a_mesh(fn: object) -> None:
    program = compile_step(fn, jax.ShapeDtypeStruct((16,), jnp.float32), name="twice")
    assert program.name == "twice"
    assert program.hlo_text.startswith("HloModule jit_doubled")
    assert program.num_devices == 1
    assert program.mesh is None
    assert program.memory is not None
    assert (program.memory.argument_bytes, program.memory.output_bytes) == (64, 64)
    assert from_bytes(to_bytes(program)) == program


def test_the_mesh_is_that_of_the_arguments() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    program = compile_step(doubled, jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding))
    assert program.mesh == {"data": 1, "model": 1}
    assert program.device_ids == (0,)
    assert program.backend == "cpu"


def test_no_such_attribute() -> None:
    with pytest.raises(AttributeError, match="compile_nothing"):
        stage.compile_nothing  # noqa: B018
