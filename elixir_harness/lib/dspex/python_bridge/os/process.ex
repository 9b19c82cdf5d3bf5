defmodule DSPex.PythonBridge.OS.Process do
  @moduledoc false
  # Processes of the system, by OS pid: whether one is still there, and killing it.
  #
  # The system may have reused a pid: the start time in `/proc/PID/stat` tells two processes apart. Without `/proc`, as on
  # macOS, `kill -0` and `ps` are used, which takes some milliseconds; without `ps`, the pid alone has to do.

  # The line has 52 numbers and a name.
  @stat_bytes 4_096
  # The reason why a kill fails (no port left, no memory) may pass.
  @kill_attempts 20
  @kill_pause_ms 100

  # The shell's own kill: not every system has a program of that name. The peer's watchdog has a group of its own.
  @kill_script ~s(kill -9 "-$0" 2>/dev/null || kill -9 "$0" 2>/dev/null)

  @typedoc "`:ended`: the process had ended before. nil: unknown."
  @type start_time :: String.t() | :ended | nil

  @doc "Whether looking at a process is cheap: 20 µs, and no process is started for it."
  @spec cheap?() :: boolean()
  def cheap?, do: match?({:ok, _info}, :file.read_file_info(~c"#{proc()}/self", [:raw]))

  # Tests hide it.
  defp proc, do: Application.get_env(:dspex, :proc_root, "/proc")

  @doc "The start time of a process: in the kernel's ticks, or as `ps` writes it."
  @spec start_time(pos_integer()) :: start_time()
  def start_time(os_pid) do
    case stat(os_pid) do
      {:ok, _state, started} -> started
      :error -> if cheap?(), do: :ended, else: ask_ps(os_pid)
    end
  end

  # In UTC: a change of summer time must not change it.
  @ps """
  kill -0 "$0" 2>/dev/null || exit 3
  LC_ALL=C TZ=UTC ps -o lstart= -p "$0" 2>/dev/null
  """

  defp ask_ps(os_pid) do
    case shell(@ps, os_pid) do
      {_nothing, 3} -> :ended
      {line, 0} -> with "" <- String.trim(line), do: nil
      _no_ps -> nil
    end
  end

  @doc """
  Whether the process that started at `start_time` has ended. A zombie has, where that can be seen.
  """
  @spec gone?(pos_integer(), start_time()) :: boolean()
  def gone?(_os_pid, :ended), do: true

  def gone?(os_pid, start_time) do
    case stat(os_pid) do
      {:ok, state, ^start_time} ->
        state in ["Z", "X"]

      {:ok, _state, _another} ->
        start_time != nil

      :error ->
        cheap?() or match?({_nothing, 1}, shell(~s(kill -0 "$0" 2>/dev/null || exit 1), os_pid))
    end
  end

  # Without a port nothing is known.
  defp shell(script, os_pid) do
    System.cmd("/bin/sh", ["-c", script, Integer.to_string(os_pid)])
  rescue
    _no_port -> :error
  end

  @doc """
  Kills the process group of `os_pid`, or the process alone if it has no group of its own, if it is still the process that
  started at `start_time`. If that has ended, kills what is left in its group, whose number is not reused while it has
  members. Takes some milliseconds, and never raises.
  """
  @spec kill_group(pos_integer(), start_time()) :: :ok
  def kill_group(os_pid, start_time), do: kill_group(os_pid, start_time, @kill_attempts)

  defp kill_group(_os_pid, _start_time, 0), do: :ok

  defp kill_group(os_pid, start_time, attempts) do
    if start_time == nil or start_time(os_pid) in [start_time, :ended, nil] do
      System.cmd("/bin/sh", ["-c", @kill_script, Integer.to_string(os_pid)])
    end

    :ok
  rescue
    _no_port ->
      Process.sleep(@kill_pause_ms)
      kill_group(os_pid, start_time, attempts - 1)
  end

  # Raw: File.read/1 calls the file server, which may be busy or gone.
  defp stat(os_pid) do
    with {:ok, file} <- :file.open("#{proc()}/#{os_pid}/stat", [:read, :raw, :binary]) do
      line = :file.read(file, @stat_bytes)
      :file.close(file)
      fields(line)
    else
      {:error, _reason} -> :error
    end
  end

  # The second field is the program's name in parentheses and may hold anything. After it come the state and, as the
  # 20th, the start time.
  defp fields({:ok, line}) do
    case line |> String.split(")") |> List.last() |> String.split() do
      [state | _rest] = fields -> {:ok, state, Enum.at(fields, 19)}
      [] -> :error
    end
  end

  # The process ended meanwhile.
  defp fields(_eof_or_error), do: :error
end
