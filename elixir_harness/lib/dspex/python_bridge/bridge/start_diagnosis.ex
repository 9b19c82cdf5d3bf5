defmodule DSPex.PythonBridge.Bridge.StartDiagnosis do
  @moduledoc false
  # Why a peer does not start: the last line that it writes to standard error.
  #
  # A port does not give its owner standard error. So a peer that has exited at its start is started once more,
  # without input and with its standard error in place of its output: if it fails again it writes the reason;
  # otherwise it sees the end of its input and leaves. If it hangs, it is killed after 5 s.

  alias DSPex.PythonBridge.{Options, OS}
  alias DSPex.PythonBridge.Bridge.Redaction
  alias DSPex.PythonBridge.Python.Interpreter

  @limit_ms 5_000
  @max_chars 500
  # Log frames would be lost. A value that the peer refuses stays, to be refused again.
  @script ~s([ "$DSPY_BRIDGE_LOG_FRAMES" != 1 ] || export DSPY_BRIDGE_LOG_FRAMES=0; exec "$0" "$@" 2>&1 >/dev/null)

  @doc """
  The line, without secrets; nil if there is none. It takes at most 5 s, and less if the process `owner` ends.
  """
  @spec last_line(Options.t(), pid()) :: String.t() | nil
  def last_line(%Options{transport: start}, _owner) when start != nil, do: nil

  def last_line(%Options{} = options, owner) do
    with {:ok, python} <- Interpreter.find(options.python_executable),
         args = ["-c", @script, python, "-u", options.script_path],
         opts = [env: Options.port_env(options), limit_ms: @limit_ms, owner: owner],
         {:exit, _status, output} <- OS.Command.run("/bin/sh", args, opts) do
      # Redacted before it is cut: part of a secret is not recognised.
      output |> Redaction.redact(options) |> OS.Command.last_line(@max_chars)
    else
      {:error, _text} -> nil
    end
  end
end
