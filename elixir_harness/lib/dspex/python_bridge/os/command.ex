defmodule DSPex.PythonBridge.OS.Command do
  @moduledoc false
  # Runs a program of the system to its end, and returns its output and exit status, with a limit in size and time.
  #
  # A process of its own has the port. When its time is over, its caller dies, or the BEAM ends, the program is killed with
  # all that it started.

  # Of the output's end, where errors are.
  @max_output_bytes 65_536

  # The shell waits for the program; its child waits for the port to close, which happens also when the BEAM ends. The
  # program itself would not notice. The child kills the shell first: else that would see the end of the program, and kill
  # the child before it has killed the rest.
  @guard """
  exec 3<&0
  "$0" "$@" </dev/null 2>&1 3<&- & work=$!
  (read -r _ <&3; kill -9 $$; kill -9 -$work; kill -9 $work -$$) >/dev/null 2>&1 & watch=$!
  wait $work; status=$?
  kill -9 $watch
  exit $status
  """

  @type result ::
          {:exit, status :: non_neg_integer(), output :: String.t()} | {:error, String.t()}

  @doc """
  Runs `executable`; its standard error is part of its output. One that cannot be run exits with 126 or 127, as in a
  shell. The error is a reason why no shell could be started, or that the program took too long.

    * `:limit_ms` – the time limit (default 15 000 ms)
    * `:env` – more environment, as a port takes it
    * `:cd` – the working directory (default: that of the BEAM)
    * `:owner` – another process whose end kills it (default: the caller)
  """
  @spec run(Path.t(), [String.t()], keyword()) :: result()
  def run(executable, args, opts \\ []) do
    owners = Enum.uniq([self(), Keyword.get(opts, :owner, self())])
    {_pid, ref} = spawn_monitor(fn -> exit({:ran, run(executable, args, opts, owners)}) end)

    receive do
      {:DOWN, ^ref, :process, _pid, {:ran, result}} -> result
      {:DOWN, ^ref, :process, _pid, _crash} -> {:error, "the check failed"}
    end
  end

  defp run(executable, args, opts, owners) do
    Enum.each(owners, &Process.monitor/1)
    limit_ms = Keyword.get(opts, :limit_ms, 15_000)
    Process.send_after(self(), :too_long, limit_ms)
    args = ["-c", @guard, executable | args]
    options = [:binary, :exit_status, :stderr_to_stdout, args: args]
    port = Port.open({:spawn_executable, "/bin/sh"}, options ++ Keyword.take(opts, [:env, :cd]))
    # The end of this process closes the port, by which the guard kills what still runs.
    with :killed <- collect(port, ""), do: {:error, "no answer within #{limit_ms} ms"}
  rescue
    error in [ErlangError, ArgumentError] -> {:error, start_failure(error)}
  end

  defp collect(port, output) do
    receive do
      {^port, {:data, data}} ->
        collect(port, tail(output <> data))

      {^port, {:exit_status, status}} ->
        {:exit, status, output |> whole_lines() |> String.replace_invalid()}

      :too_long ->
        :killed

      {:DOWN, _ref, :process, _caller, _reason} ->
        :killed
    end
  end

  defp tail(output) when byte_size(output) <= @max_output_bytes, do: output
  defp tail(output), do: binary_part(output, byte_size(output), -@max_output_bytes)

  # The start of an output that was cut may be a part of a secret, which is not recognised as one.
  defp whole_lines(output) when byte_size(output) < @max_output_bytes, do: output
  defp whole_lines(output), do: output |> String.split("\n", parts: 2) |> Enum.at(1, "")

  @doc """
  Why `Port.open/2` did not start a program, from the exception that it raised. Only its kind is reported: the
  exception may hold the environment of the program.
  """
  @spec start_failure(Exception.t()) :: String.t()
  def start_failure(%ErlangError{original: reason}) when is_atom(reason),
    do: reason |> :file.format_error() |> to_string()

  def start_failure(%SystemLimitError{}),
    do: "the runtime has no more ports (see +Q of erl), or the system no more processes"

  def start_failure(_error), do: "the system does not accept its path or environment"

  @doc "The last line of an output that is not blank, cut to `max` characters; nil if there is none."
  @spec last_line(String.t(), pos_integer()) :: String.t() | nil
  def last_line(output, max \\ 200) do
    lines = String.split(output, ["\n", "\r"])

    if line = Enum.find(Enum.reverse(lines), &(String.trim(&1) != "")),
      do: String.slice(line, 0, max)
  end
end
