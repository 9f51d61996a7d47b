"""Devices that are not there: XLA compiles for them all the same, given a description of them.

That of a TPU is part of libtpu. Those of GPUs are in the CUDA plugin, which uses them itself for
this, but has no function that returns one.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import mmap
import os
import pathlib
import re
from collections.abc import Callable, Generator
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, SingleDeviceSharding, use_abstract_mesh

# By our names of GPUs those of XLA.
GPUS = {
  "h100": "NVIDIA H100 80GB HBM3",
  "h200": "NVIDIA H200 141GB HBM3e",
  "a100": "NVIDIA A100-SXM4-80GB",
  "b200": "NVIDIA B200",
}
# By our names of TPUs topologies of eight devices.
TPUS = {
  "v4": "v4:2x2x1",
  "v5e": "v5e:2x4",
  "v5p": "v5p:2x2x2",
  "v6e": "v6e:2x4",
  "v7": "tpu7x:2x2x1",
}
NAMES = (*GPUS, *TPUS)
DEVICES = 8

# libtpu asks the machine that it is on for all of these, which needs none here.
_LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Nothing is run, so that processes need not take turns.
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}
_CUDA_PLUGINS = ("xla_cuda13", "xla_cuda12")


class MissingError(RuntimeError):
  """What compiles for a target is not installed; the message, one line, says how to install it."""


def platform(target: str) -> str:
  """The platform of a target, `gpu` or `tpu`."""
  return "gpu" if target in GPUS else "tpu"


def _cuda_plugin() -> pathlib.Path | None:
  """The library of the plugin, in a folder that has the name of its module."""
  for name in _CUDA_PLUGINS:
    with contextlib.suppress(ModuleNotFoundError):  # Of the package around it.
      found = importlib.util.find_spec(f"jax_plugins.{name}")
      for folder in found.submodule_search_locations or [] if found else []:
        library = pathlib.Path(folder, "xla_cuda_plugin.so")
        if library.exists():
          return library
  return None


@contextlib.contextmanager
def _setting(name: str, value: Any) -> Generator[None]:
  """A setting of JAX has this value, and then again the one before."""
  before = getattr(jax.config, name)
  jax.config.update(name, value)
  try:
    yield
  finally:
    jax.config.update(name, before)


def on_no_device() -> contextlib.AbstractContextManager[None]:
  """JAX looks for no accelerator, if it has not done so yet: none is needed to compile for one."""
  return _setting("jax_platforms", "cpu")


def require(target: str) -> None:
  """Raises a `MissingError` where what compiles for the target is not installed."""
  if target in TPUS and importlib.util.find_spec("libtpu") is None:
    raise MissingError('libtpu is not installed: pip install "jax[tpu]"')
  if target in GPUS and _cuda_plugin() is None:
    packages = (f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt"))
    raise MissingError(f"the CUDA plugin is not installed: pip install {' '.join(packages)}")


def _description(name: str) -> str:
  """XLA's description of a GPU, cut out of the CUDA plugin."""
  library = cast(pathlib.Path, _cuda_plugin())
  with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    found = re.search(rf'device_description_str: "{re.escape(name)}"\s'.encode(), data)
    start = data.rfind(b"gpu_device_info {", 0, found.start()) if found else -1
    text = data[start : found.end()] if found and start >= 0 else b"\0"
  if b"\0" in text:
    raise MissingError(f"the installed CUDA plugin does not describe the {name}")
  return text.decode()


def _gpu_topology(target: str) -> topologies.TopologyDescription:
  options = {"target_config": _description(GPUS[target]), "topology": f"1x1x{DEVICES}"}
  get = functools.partial(topologies.get_topology_desc, target, "cuda", **options)
  try:
    return get()
  except NotImplementedError:
    # JAX looked for devices before, and the plugin found no driver then.
    folder = cast(pathlib.Path, _cuda_plugin()).parent
    importlib.import_module(f"jax_plugins.{folder.name}").initialize()
    return get()


@functools.cache
def devices(target: str) -> tuple[Any, ...]:
  """The eight devices of a target, which programs are compiled for and nothing is run on."""
  require(target)
  with on_no_device():
    try:
      if target in GPUS:
        found = _gpu_topology(target)
      else:
        for name, value in _LIBTPU.items():
          os.environ.setdefault(name, value)
        found = topologies.get_topology_desc(TPUS[target], "tpu")
    except (NotImplementedError, RuntimeError) as error:  # JAX's own is a RuntimeError.
      package = " ".join(next(iter(compiler(target).items())))
      why = str(error).splitlines()[0]
      raise MissingError(f"{package} does not do for jax {jax.__version__}: {why}") from error
  return tuple(found.devices[:DEVICES])


def compiler(target: str) -> dict[str, str]:
  """The package that compiles for a target, with its version."""
  if target in TPUS:
    name = "libtpu"
  else:
    name = f"jax-{cast(pathlib.Path, _cuda_plugin()).parent.name.removeprefix('xla_')}-pjrt"
  try:
    return {name: importlib.metadata.version(name)}
  except importlib.metadata.PackageNotFoundError:
    return {name: "unknown"}


def mesh(target: str, count: int, axis: str) -> Mesh:
  """A mesh of the first `count` devices of a target with automatic axes."""
  return Mesh(np.array(devices(target)[:count]), (axis,), axis_types=(AxisType.Auto,))


@contextlib.contextmanager
def without_cache() -> Generator[None]:
  """JAX's persistent cache off: it cannot read back a program for a device that is not there."""
  try:
    with _setting("jax_enable_compilation_cache", False):
      compilation_cache.reset_cache()  # JAX looks only once whether it is on.
      yield
  finally:
    compilation_cache.reset_cache()


def compiled(target: str, f: Callable[..., Any], *shapes: Any) -> jax.stages.Compiled:
  """`jit(f)` for one device of a target, or for those that the shardings of the shapes name."""
  place = SingleDeviceSharding(devices(target)[0])

  def placed(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = shape.sharding or place
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

  lowered = jax.jit(f).lower(*jax.tree.map(placed, shapes))
  with without_cache():
    return lowered.compile()


def tracing(target: str) -> contextlib.AbstractContextManager[Any]:
  """Inside it, kernels of Pallas are made for the target."""
  return use_abstract_mesh(mesh(target, 1, "devices").abstract_mesh)
