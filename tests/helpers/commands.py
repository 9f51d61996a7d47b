"""Running the command `softmax-jax` inside a test."""

import json

from softmax_jax.__main__ import main


def run(capsys, *argv):
  """The exit code, stdout and stderr of `softmax-jax ARGV`."""
  try:
    code = main(argv)
  except SystemExit as stop:
    code = stop.code
  return code, *capsys.readouterr()


def assert_error_of_one_line(result, command, message):
  """What `run` gives where a command says in one line what is wrong."""
  code, out, err = result
  assert (code, out) == (2, "")
  assert err.startswith(f"softmax-jax {command}: error: ") and err.count("\n") == 1
  assert message in err


def strict_json(text):
  """Parses JSON as its standard has it, without NaN and Infinity."""

  def refuse(constant):
    raise ValueError(constant)

  return json.loads(text, parse_constant=refuse)
