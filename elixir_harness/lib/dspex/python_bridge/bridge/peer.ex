defmodule DSPex.PythonBridge.Bridge.Peer do
  @moduledoc """
  One Python process behind one port, from its opening to its end. It belongs to the process that
  opened it.
  """

  alias DSPex.PythonBridge.{Error, OS, Options, Programs}
  alias DSPex.PythonBridge.Python.Interpreter

  # Peers that last for this long are started at most every two seconds: that is no storm.
  @lasting_ms 2_000

  @enforce_keys [:port, :os_pid, :opened_at]
  defstruct [:port, :os_pid, :opened_at, :ping_id, :up_at, :loads] ++
              [to_load: [], load_failures: %{}, answered?: false]

  # up_at: of its first reply; loads: the programs that it was given, by request id, and has not
  # acknowledged yet; nil: it was given none so far; to_load: those that it is still to be given;
  # load_failures: why those that it does not have could not be loaded, by their stamps.

  @type t :: %__MODULE__{
          port: port(),
          os_pid: pos_integer() | nil,
          opened_at: integer(),
          ping_id: pos_integer() | nil,
          up_at: integer() | nil,
          loads: %{pos_integer() => {Programs.Store.id(), Programs.Store.stamp()}} | nil,
          to_load: [Programs.Store.definition()],
          load_failures: %{Programs.Store.stamp() => Error.t()},
          answered?: boolean()
        }

  @doc """
  Starts the interpreter with the script. A text when that is impossible: no interpreter, or one
  that the system will not run. Whether the script works is another matter: the peer's first reply
  or its death tells.
  """
  @spec open(Options.t()) :: {:ok, t()} | {:error, String.t()}
  def open(%Options{} = options) do
    with {:ok, python} <- Interpreter.find(options.python_executable) do
      port = Port.open({:spawn_executable, python}, port_options(options))

      # nil if the process is already gone: its death is then in the mailbox.
      os_pid =
        case Port.info(port, :os_pid) do
          {:os_pid, os_pid} -> os_pid
          nil -> nil
        end

      {:ok, %__MODULE__{port: port, os_pid: os_pid, opened_at: now()}}
    end
  rescue
    error in [ErlangError, ArgumentError] ->
      {:error, "the interpreter cannot be started: #{OS.Command.start_failure(error)}"}
  end

  @doc """
  The options of the port. Standard error is left alone: what the peer writes there itself goes where
  that of the BEAM goes. `-u` is for scripts that print through Python's buffers.

  A peer that closes its output and lives on shows in nothing: with `:exit_status`, the runtime
  tells of the end of output only when the process ends, also if `:eof` is asked for. Its calls time
  out, and the monitor finds it.
  """
  @spec port_options(Options.t()) :: list()
  def port_options(%Options{} = options) do
    [
      {:packet, 4},
      :binary,
      :exit_status,
      :use_stdio,
      args: ["-u", options.script_path],
      env: Options.port_env(options)
    ]
  end

  @doc """
  Closes the port: end of input for the peer. No message about the port comes after it, bar what
  the mailbox already holds. It ends nobody: see `DSPex.PythonBridge.OS.Reaper`.
  """
  @spec close(t()) :: :ok
  def close(%__MODULE__{port: port}) do
    Process.unlink(port)
    Port.close(port)
    :ok
  rescue
    # The port was closed already.
    ArgumentError -> :ok
  end

  @doc """
  Whether something still waits to be read by the peer. Closing the port then closes nothing: the
  runtime keeps the pipe until all is written, and does not itself end before that.
  """
  @spec blocked?(t()) :: boolean()
  def blocked?(%__MODULE__{port: port}) do
    case Port.info(port, :queue_size) do
      {:queue_size, bytes} -> bytes > 0
      nil -> false
    end
  end

  @doc "The peer has answered its first ping."
  @spec up(t()) :: t()
  def up(%__MODULE__{} = peer), do: %{peer | up_at: now()}

  @doc """
  Whether the peer was of any use. One that only ever answered its first ping may be good for
  nothing, and die at once, again and again.
  """
  @spec of_use?(t()) :: boolean()
  def of_use?(%__MODULE__{up_at: nil}), do: false

  def of_use?(%__MODULE__{up_at: up_at, answered?: answered?}),
    do: answered? or now() - up_at >= @lasting_ms

  @doc "Milliseconds since the peer was opened."
  @spec uptime_ms(t()) :: non_neg_integer()
  def uptime_ms(%__MODULE__{opened_at: opened_at}), do: now() - opened_at

  defp now, do: System.monotonic_time(:millisecond)
end
