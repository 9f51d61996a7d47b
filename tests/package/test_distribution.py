"""What is published: the files of sdist and wheel, their metadata, and that a build is repeatable.

They are built without isolation, by the hatchling of the extra `dev`, which needs no network.
"""

import os
import re
import shutil
import sys
import tarfile

import pytest
from builds import DIST_INFO, NAME, ROOT, build, clean_copy, contents, run

import softmax_jax

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
  """The names of the files of the repository: those of git, without git those of an sdist."""
  if (ROOT / ".git").exists():
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]
    return {name for name in names if (ROOT / name).exists()}
  copy = tmp_path_factory.mktemp("tracked") / "source"
  ignored = shutil.ignore_patterns(".*_cache", ".hypothesis", ".venv*", "build", "dist")
  shutil.copytree(ROOT, copy, ignore=ignored)
  with tarfile.open(build(copy, "--sdist").gz) as archive:
    return {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}


@pytest.fixture(scope="module")
def source(tracked, tmp_path_factory):
  return clean_copy(sorted(tracked), tmp_path_factory.mktemp("one") / "source", 0o644, 1e9)


@pytest.fixture(scope="module")
def built(source):
  return build(source, umask=0o022)


@pytest.fixture(scope="module")
def wheel(built, tmp_path_factory):
  return contents(built.whl, tmp_path_factory.mktemp("wheel"))


def test_a_second_build_gives_the_same_bytes(tracked, built, tmp_path):
  """Elsewhere, in another order, at another time, with other permissions."""
  names = sorted(tracked, reverse=True)
  again = build(clean_copy(names, tmp_path / "else" / "where", 0o600, 1.5e9), umask=0o077)
  assert built.gz.name == again.gz.name == f"{NAME}.tar.gz"
  assert built.whl.name == again.whl.name == f"{NAME}-py3-none-any.whl"
  assert built.gz.read_bytes() == again.gz.read_bytes()
  assert built.whl.read_bytes() == again.whl.read_bytes()


def test_the_wheel_of_the_tree_is_that_of_the_sdist(source, built):
  assert build(source, "--wheel").whl.read_bytes() == built.whl.read_bytes()


def test_twine_finds_no_fault(built):
  report = run(sys.executable, "-m", "twine", "check", "--strict", built.gz, built.whl)
  assert report.count("PASSED") == 2


def test_the_wheel_holds_the_package_and_nothing_else(tracked, wheel):
  package = {name for name in tracked if name.startswith("softmax_jax/")}
  assert {"softmax_jax/__init__.py", "softmax_jax/py.typed"} < package
  about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
  assert wheel.names == package | {f"{DIST_INFO}/{name}" for name in about}


def test_the_sdist_holds_the_repository(tracked, built):
  with tarfile.open(built.gz) as archive:
    members = archive.getmembers()
  assert all(member.isfile() for member in members)
  names = {member.name.removeprefix(f"{NAME}/") for member in members}
  assert names == {name for name in tracked if not name.startswith(".ci/")} | {"PKG-INFO"}
  folders = {name.partition("/")[0] for name in names}
  assert {"CHANGELOG.md", "LICENSE", "docs", "examples", "notebooks", "tests"} < folders


def test_the_metadata(wheel):
  one = {
    "Name": "softmax-jax",
    "Version": softmax_jax.__version__,
    "License-Expression": "Apache-2.0",
    "License-File": "LICENSE",
    "Requires-Python": ">=3.11",
    "Description-Content-Type": "text/markdown",
  }
  assert {key: wheel.metadata.get_all(key) for key in one} == {k: [v] for k, v in one.items()}
  required = wheel.metadata.get_all("Requires-Dist")
  assert {r for r in required if "extra ==" not in r} == {"jax>=0.10.2", "jaxlib"}
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  assert wheel.metadata.get_payload().strip() == readme.strip()
  assert [(e.group, e.name, e.value) for e in wheel.distribution.entry_points] == [
    ("console_scripts", "softmax-jax", "softmax_jax.__main__:main")
  ]


def test_tests_run_from_the_sdist(built, tmp_path):
  """Among them those that read the repository's texts."""
  with tarfile.open(built.gz) as archive:
    archive.extractall(tmp_path, filter="data")
  folder = tmp_path / NAME
  tests = (
    "tests/docs/test_links.py",
    "tests/docs/test_docstrings.py",
    "tests/package/test_public_api.py",
  )
  environment = {**os.environ, "PYTHONPATH": str(folder)}
  report = run(sys.executable, "-m", "pytest", "-n", "0", *tests, cwd=folder, env=environment)
  # Before JAX 0.12 one is skipped, of what only newer ones have.
  summary = report.strip().splitlines()[-1]
  assert re.fullmatch(r"=+ \d+ passed(, 1 skipped)? in .* =+", summary), report
