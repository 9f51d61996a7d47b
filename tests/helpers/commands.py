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


def strict_json(text):
  """Parses JSON as its standard has it, without NaN and Infinity."""

  def refuse(constant):
    raise ValueError(constant)

  return json.loads(text, parse_constant=refuse)
