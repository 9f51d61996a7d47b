"""Builds of sdist and wheel, without isolation, by the hatchling of the extra `dev`."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path
from types import SimpleNamespace

import pytest

import softmax_jax

ROOT = Path(__file__).parents[2]
if not (ROOT / "pyproject.toml").exists():
  pytest.skip("the repository is not around the tests", allow_module_level=True)
for tool in ("build", "hatchling", "twine"):
  try:
    importlib.metadata.version(tool)
  except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"{tool}, of the extra `dev`, is not installed", allow_module_level=True)

NAME = f"softmax_jax-{softmax_jax.__version__}"
DIST_INFO = f"{NAME}.dist-info"


def run(*command, **options):
  done = subprocess.run(command, capture_output=True, text=True, **options)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def build(source, *options, **environment):
  """Builds an sdist, and from that a wheel, or what the options say; returns them by suffix."""
  out = source.parent / "dist" / "-".join(["both", *options])
  command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, source]
  run(*command, **environment)
  return SimpleNamespace(**{path.suffix[1:]: path for path in out.iterdir()})


def clean_copy(names, folder, mode, time):
  """A copy of these files alone, with these permissions and time of the last change."""
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / name, path)
    path.chmod(mode)
    os.utime(path, (time, time))
  return folder


def contents(wheel, folder):
  """What the wheel holds, which is unpacked there: the names of its files and its metadata."""
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    archive.extractall(folder)
  assert len(names) == len(set(names))
  metadata = (folder / DIST_INFO / "METADATA").read_text(encoding="utf-8")
  return SimpleNamespace(
    names=set(names),
    metadata=message_from_string(metadata),
    distribution=importlib.metadata.Distribution.at(folder / DIST_INFO),
  )
