defmodule DSPex.PythonBridge.Bridge.StartDiagnosis do
  @moduledoc """
  Why a peer does not start, in its own words: the last line that it writes to standard error.

  A port gives its owner no standard error, and a peer that works needs none of ours. So only one
  that has failed is started once more, without input and with its standard error in place of its
  output: one that fails again says why, another sees the end of its input and leaves. Should it hang,
  it is killed after 5 s, or when the bridge or the whole BEAM ends.
  """

  alias DSPex.PythonBridge.Options
  alias DSPex.PythonBridge.Bridge.Redaction
  alias DSPex.PythonBridge.Python.Interpreter

  @timeout_ms 5_000
  @max_chars 500
  # Of the output; the end is what counts.
  @tail_bytes 8_000
  # The shell waits for the peer; its child waits for the end of the port, of which all the rest knows
  # nothing. The peer may have made a process group of its own.
  @script """
  exec 3<&0
  "$0" "$@" </dev/null 2>&1 >/dev/null 3<&- & peer=$!
  (read -r _ <&3; kill -9 -$peer; kill -9 $peer -$$) >/dev/null 2>&1 & watch=$!
  wait $peer
  kill -9 $watch
  """

  @doc """
  The line, without secrets; nil if there is none. Takes at most 5 s, less if the process `owner` ends,
  and never raises.
  """
  @spec last_line(Options.t(), pid()) :: String.t() | nil
  def last_line(%Options{} = options, owner) do
    with {:ok, python} <- Interpreter.find(options.python_executable) do
      # Before it is cut: half a secret is not known as one.
      python |> run(options, owner) |> Redaction.redact(options) |> last()
    else
      {:error, _text} -> nil
    end
  rescue
    _no_port -> nil
  end

  defp last(output) do
    lines = for line <- String.split(output, ["\n", "\r"]), String.trim(line) != "", do: line
    if line = List.last(lines), do: String.slice(line, 0, @max_chars)
  end

  defp run(python, options, owner) do
    port =
      Port.open({:spawn_executable, "/bin/sh"}, [
        :binary,
        :exit_status,
        args: ["-c", @script, python, "-u", options.script_path],
        # Its frames are lost.
        env: options |> Options.log_to_stderr() |> Options.port_env()
      ])

    timer = Process.send_after(self(), {port, :too_long}, @timeout_ms)
    output = collect(port, Process.monitor(owner), "")
    Process.cancel_timer(timer)
    String.replace_invalid(output)
  end

  defp collect(port, monitor, output) do
    receive do
      {^port, {:data, data}} ->
        collect(port, monitor, tail(output <> data))

      {^port, {:exit_status, _status}} ->
        output

      {^port, :too_long} ->
        Port.close(port)
        output

      {:DOWN, ^monitor, :process, _owner, _reason} ->
        Port.close(port)
        output
    end
  end

  # Whole lines, but for one that is longer: of that nothing.
  defp tail(output) when byte_size(output) <= @tail_bytes, do: output

  defp tail(output) do
    tail = binary_part(output, byte_size(output), -@tail_bytes)
    tail |> String.split("\n", parts: 2) |> Enum.at(1, "")
  end
end
