defmodule DSPex.PythonBridge.OS.Process do
  @moduledoc false
  # Processes of the system, by OS pid: whether one is still there, and killing it.
  #
  # The system may have reused a pid: the start time tells two processes apart. It is in `/proc/PID/stat`; where there is no
  # `/proc`, as on macOS, `ps` has it, which takes some milliseconds.

  # The line has 52 numbers and a name.
  @stat_bytes 4_096

  # In UTC: a change of summer time must not change it.
  @ps ~s(LC_ALL=C TZ=UTC ps -o state=,lstart= -p "$0")
  # The shell's own kill: not every system has a program of that name. The peer's watchdog has a group of its own.
  @kill ~s(kill -9 "-$0" 2>/dev/null || kill -9 "$0" 2>/dev/null)

  @typedoc "`:ended`: the process had ended before. nil: unknown."
  @type start_time :: String.t() | :ended | nil

  @doc "Whether looking at a process is cheap: 20 µs, and no process is started for it."
  @spec cheap?() :: boolean()
  def cheap?, do: File.exists?("#{proc()}/self", [:raw])

  # Tests hide it.
  defp proc, do: Application.get_env(:dspex, :proc_root, "/proc")

  @doc "The start time of a process: in the kernel's ticks, or as `ps` writes it."
  @spec start_time(pos_integer()) :: start_time()
  def start_time(os_pid), do: with({_state, started} <- look(os_pid), do: started)

  @doc "Whether the process that started at `start_time` has ended. A zombie has."
  @spec gone?(pos_integer(), start_time()) :: boolean()
  def gone?(_os_pid, :ended), do: true

  def gone?(os_pid, start_time) do
    case look(os_pid) do
      {state, ^start_time} -> state in ["Z", "X"]
      {_state, _another} -> start_time != nil
      ended_or_unknown -> ended_or_unknown == :ended
    end
  end

  @doc """
  Kills the process group of `os_pid`, or the process alone if it has no group of its own, if it is still the process that
  started at `start_time`. If that has ended, kills what is left in its group, whose number is not reused while it has
  members. Takes some milliseconds.
  """
  @spec kill_group(pos_integer(), start_time()) :: :ok
  def kill_group(os_pid, start_time) do
    if start_time == nil or start_time(os_pid) in [start_time, :ended, nil],
      do: shell(@kill, os_pid)

    :ok
  end

  defp look(os_pid), do: if(cheap?(), do: stat(os_pid), else: ps(os_pid))

  # Raw: File.read/1 calls the file server, which may be busy or gone.
  defp stat(os_pid) do
    with {:ok, file} <- :file.open("#{proc()}/#{os_pid}/stat", [:read, :raw, :binary]),
         line = :file.read(file, @stat_bytes),
         :file.close(file),
         {:ok, line} <- line do
      # The second field is the program's name in parentheses and may hold anything. After it come the state and, as the
      # 20th, the start time.
      [state | _rest] = fields = line |> String.split(")") |> List.last() |> String.split()
      {state, Enum.at(fields, 19)}
    else
      _ended -> :ended
    end
  end

  defp ps(os_pid) do
    case shell(@ps, os_pid) do
      {<<state::binary-size(1), started::binary>>, 0} -> {state, String.trim(started)}
      {_nothing, 1} -> :ended
      _no_ps -> nil
    end
  end

  defp shell(script, os_pid) do
    System.cmd("/bin/sh", ["-c", script, Integer.to_string(os_pid)])
  rescue
    # There is no port left.
    error in [ErlangError, SystemLimitError] -> {error, 127}
  end
end
