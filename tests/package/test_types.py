"""Types as a user's checker sees them, and that the library's own checkers find nothing."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typed_client
from type_misuse import MISUSE

ROOT = Path(__file__).parents[2]
# JAX leaves parameters of jnp.ones, jax.jit and others without a type.
STRICT = {"typeCheckingMode": "strict", "reportUnknownMemberType": False}

pytestmark = pytest.mark.long


def needs(tool):
  try:
    importlib.metadata.version(tool)
  except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"{tool}, of the extra `dev`, is not installed")


def needs_the_repository():
  if not (ROOT / "pyproject.toml").exists():
    pytest.skip("the repository is not around the tests")


def pyright(configuration):
  """The errors in the project that this file configures: file, line and name of each."""
  needs("pyright")
  options = "--outputjson", "--pythonpath", sys.executable, "--project", configuration
  done = subprocess.run([sys.executable, "-m", "pyright", *options], capture_output=True, text=True)
  assert done.returncode in (0, 1), done.stdout + done.stderr
  report = json.loads(done.stdout)
  assert report["summary"]["filesAnalyzed"]
  return sorted(
    (Path(found["file"]).name, found["range"]["start"]["line"] + 1, found.get("rule", ""))
    for found in report["generalDiagnostics"]
  )


@pytest.fixture
def user(tmp_path):
  """The configuration of a user's program, in a folder that has nothing else."""
  path = tmp_path / "pyrightconfig.json"
  path.write_text(json.dumps(STRICT))
  return path


def test_a_typed_program_has_no_errors(user):
  shutil.copy(typed_client.__file__, user.parent)
  assert pyright(user) == []


def test_the_typed_program_runs():
  typed_client.main()


def test_misuse_is_found_where_it_is(user):
  (user.parent / "misuse.py").write_text(MISUSE)
  expected = [
    ("misuse.py", number, rule)
    for number, line in enumerate(MISUSE.splitlines(), start=1)
    for rule in re.findall(r"\breport[A-Z]\w+", line.partition("#")[2])
  ]
  assert pyright(user) == expected


def test_pyright_finds_nothing_in_the_package():
  needs_the_repository()
  assert pyright(ROOT / "pyproject.toml") == []


@pytest.mark.parametrize(
  "command", ["check .", "format --check softmax_jax tests docs examples notebooks"]
)
def test_ruff_finds_nothing(command):
  needs_the_repository()
  needs("ruff")
  command = [sys.executable, "-m", "ruff", *command.split()]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
