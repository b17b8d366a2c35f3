"""NVIDIA GPUs, compiled ahead of time by the CUDA plugin's compiler: no GPU, no driver, no cuDNN, no NCCL."""

from __future__ import annotations

from jax.experimental import topologies

from shardlab.compile.target import Target
from shardlab.errors import CompileFailed
from shardlab.hardware.data_files import load_gpu_target
from shardlab.hardware.machine import GpuTarget, Machine

# Field of GpuDeviceInfoProto -> value, the same for every compute capability from 8.0 to 10.0
# (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
_COMMON_LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49_152,
    "block_dim_limit_x": 2_147_483_647,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
}
_THREADS_PER_CORE = {(8, 6): 1536, (8, 9): 1536, (12, 0): 1536}  # 2048 elsewhere; same source


def open_target(machine: Machine) -> Target:
    """Compile-only devices of a GPU machine, host by host. Raises CompileFailed when XLA refuses the
    description.

    The program depends on the chip and the number of devices only: XLA ignores how hosts are laid out.
    """
    name = str(machine.chip.compile_as)
    topology = f"1x{machine.hosts}x{machine.num_devices // machine.hosts}"
    config = target_config(load_gpu_target(name))
    try:
        described = topologies.get_topology_desc(
            name, "cuda", target_config=config, topology=topology
        ).devices
    except Exception as error:  # jaxlib raises its own types, which differ between versions
        raise CompileFailed(machine.spec, f"XLA refuses {topology} of {name}: {error}") from None
    devices = tuple(sorted(described, key=lambda device: int(device.id)))
    return Target(family="gpu", platform="cuda", devices=devices, autotuned=False)


def target_config(gpu: GpuTarget) -> str:
    """A GpuTargetConfigProto in text form: what XLA would have asked the driver."""
    numbers = {
        **_COMMON_LIMITS,
        "threads_per_core_limit": _THREADS_PER_CORE.get((gpu.compute_major, gpu.compute_minor), 2048),
        "core_count": gpu.core_count,
        "fpus_per_core": gpu.fpus_per_core,
        "shared_memory_per_core": gpu.shared_memory_per_core,
        "shared_memory_per_block_optin": gpu.shared_memory_per_block_optin,
        "l2_cache_size": gpu.l2_cache_size,
        "memory_bandwidth": gpu.memory_bandwidth,
        "device_memory_size": gpu.device_memory_size,
        "clock_rate_ghz": gpu.clock_rate_ghz,
    }
    fields = " ".join(f"{name}: {value}" for name, value in numbers.items())
    capability = f"cuda_compute_capability {{ major: {gpu.compute_major} minor: {gpu.compute_minor} }}"
    return (
        f"gpu_device_info {{ {fields} {capability} }}\n"
        f'platform_name: "CUDA"\ndevice_description_str: "{gpu.device_description_str}"\n'
    )
