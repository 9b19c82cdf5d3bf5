defmodule DSPex.PythonBridge.StartFailure do
  @moduledoc """
  Why a peer does not start, in its own words: the last line that it writes to standard error.

  A port gives its owner no standard error, and a peer that works needs none of ours. So only one
  that has failed is started once more, without input and with its standard error in place of its
  output: one that fails again says why, another sees the end of its input and leaves.
  """

  alias DSPex.PythonBridge.{Interpreter, Options, OsProcess, Redaction}

  @timeout_ms 5_000
  @max_chars 500
  # Of the output; the end is what counts.
  @tail_bytes 8_000

  @doc "The line, without secrets; nil if there is none. Takes at most 5 s and never raises."
  @spec last_line(Options.t()) :: String.t() | nil
  def last_line(%Options{} = options) do
    with {:ok, python} <- Interpreter.find(options.python_executable),
         lines when lines != [] <- run(python, options) do
      lines |> List.last() |> String.slice(0, @max_chars) |> Redaction.redact(options)
    else
      _nothing -> nil
    end
  rescue
    _no_port -> nil
  end

  defp run(python, options) do
    script = ~s(exec "$0" "$@" </dev/null 2>&1 >/dev/null)

    port =
      Port.open({:spawn_executable, "/bin/sh"}, [
        :binary,
        :exit_status,
        args: ["-c", script, python, "-u", options.script_path],
        env: for({name, value} <- options.env.(), do: {to_charlist(name), to_charlist(value)})
      ])

    os_pid = with {:os_pid, os_pid} <- Port.info(port, :os_pid), do: os_pid
    timer = Process.send_after(self(), {port, :too_long}, @timeout_ms)
    output = collect(port, os_pid && {os_pid, OsProcess.start_time(os_pid)}, "")
    Process.cancel_timer(timer)
    lines = output |> String.replace_invalid() |> String.split(["\n", "\r"])
    for line <- lines, String.trim(line) != "", do: line
  end

  defp collect(port, process, output) do
    receive do
      {^port, {:data, data}} ->
        collect(port, process, tail(output <> data))

      {^port, {:exit_status, _status}} ->
        output

      {^port, :too_long} ->
        with {os_pid, started} <- process, do: OsProcess.kill_group(os_pid, started)
        output
    end
  end

  defp tail(output) when byte_size(output) <= @tail_bytes, do: output
  defp tail(output), do: binary_part(output, byte_size(output), -@tail_bytes)
end
