"""Set up compilers for accelerators that are not attached: what to install, how JAX finds them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.aot.devices import Device
from mquant_jax.errors import UserError

TESTED = "0.10.2"  # the jax version that produced the stored results
INSTALL = {
    "tpu": f'pip install "jax[tpu]=={TESTED}" (in this repository: pip install -e ".[aot-tpu]")',
    "gpu": f"pip install jax=={TESTED} jax-cuda13-plugin=={TESTED} nvidia-cuda-nvcc nvidia-nvvm "
    '(in this repository: pip install -e ".[aot-gpu]")',
}
# An H100 SXM as XLA describes it; otherwise read from the driver.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def missing(device: Device) -> str | None:
    """Return why this machine cannot compile for ``device`` and what to install, or ``None``."""
    if device.platform == "tpu":
        found = importlib.util.find_spec("libtpu") is not None
        name, wanted, have = "libtpu", _wanted_libtpu(), _version("libtpu")
    else:
        found = importlib.util.find_spec("jax_cuda13_plugin") is not None
        name, wanted, have = "jax-cuda13-plugin", jax.__version__, _version("jax-cuda13-plugin")
    if not found:
        return f"compiling for {device.name} needs {name}: {INSTALL[device.platform]}"
    if wanted and have and not re.fullmatch(re.escape(wanted).replace(r"\*", ".*"), have):
        return (
            f"{name} {have} is not the one that jax {jax.__version__} needs ({wanted}): "
            f"{INSTALL[device.platform]}"
        )
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wanted_libtpu() -> str | None:
    """Return the libtpu requirement of the installed jax, such as ``0.0.42.*``, from its extra
    ``tpu``."""
    for line in importlib.metadata.requires("jax") or []:
        found = re.match(r"libtpu\s*==\s*([\w.*]+)", line)
        if found:
            return found.group(1)
    return None


def prepare(device: Device) -> None:
    """Set the compilers' options; call this before JAX is used.

    Raises:
        UserError: what :func:`missing` found.
    """
    problem = missing(device)
    if problem:
        raise UserError(problem)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to query
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no process holds a chip
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if device.platform == "gpu":  # autotuning would run kernels on the device
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    jax.config.update("jax_platforms", "cpu")


def sharding(device: Device) -> NamedSharding:
    """One chip of the target, as the sharding that every argument must carry.

    Raises:
        UserError: the compiler does not start.
    """
    from jax.experimental import topologies

    how = {"platform": "tpu", "topology_name": device.topology}
    if device.platform == "gpu":
        how = {
            "platform": "cuda", "topology_name": "h100", "topology": device.topology,
            "target_config": _H100,
        }  # fmt: skip
    try:
        topology = topologies.get_topology_desc(**how)
    except Exception as e:  # whatever a foreign compiler says, the remedy is the same
        raise UserError(
            f"the compiler for {device.name} does not start ({e}): {INSTALL[device.platform]}"
        ) from e
    return NamedSharding(Mesh(topology.devices[:1], ("chip",)), PartitionSpec())
