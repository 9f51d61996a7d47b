"""Several processes, as on several machines: the example script, on the loopback interface."""

import contextlib
import re
import socket
import subprocess
import sys
import time

import example_programs
import numpy as np
import pytest

SCRIPT = example_programs.script("train_on_several_machines")

SMALL = "--vocabulary=1000", "--batch-size=256", "--words=100000"


@contextlib.contextmanager
def started(processes, devices, steps):
  """The processes of the script, which are gone when this ends."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  options = [f"--processes={processes}", f"--devices={devices}", f"--steps={steps}", *SMALL]
  command = [sys.executable, str(SCRIPT), f"--coordinator={coordinator}", *options]
  running = [
    subprocess.Popen(
      [*command, f"--process={i}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for i in range(processes)
  ]
  try:
    yield running
  finally:
    for process in running:
      process.kill()
      process.wait()
      process.stdout.close()


def losses(process, timeout):
  out, _ = process.communicate(timeout=timeout)
  assert process.returncode == 0, out
  return np.array([float(loss) for loss in re.findall(r"loss ([\d.]+)", out)])


@pytest.mark.long
def test_two_processes_of_four_devices_learn_what_one_device_does():
  with started(1, 1, steps=20) as (one,), started(2, 4, steps=20) as two:
    expected = losses(one, timeout=120)
    assert len(expected) == 11
    assert expected[-1] < expected[0] - 1
    for process in two:
      np.testing.assert_allclose(losses(process, timeout=120), expected, rtol=2e-6)


@pytest.mark.long
def test_a_process_that_dies_ends_the_other_with_an_error():
  with started(2, 1, steps=10**6) as (first, second):
    for line in first.stdout:
      if line.startswith("step 1:"):
        break
    second.kill()
    start = time.monotonic()
    out, _ = first.communicate(timeout=60)
    assert first.returncode not in (0, None), out
    assert time.monotonic() - start < 60
