"""DSPy for Elixir over a plain Erlang port: `python -m dspy_bridge` is the port program."""

__version__ = "0.1.0"
