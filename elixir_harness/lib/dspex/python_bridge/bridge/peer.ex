defmodule DSPex.PythonBridge.Bridge.Peer do
  @moduledoc false
  # One Python process behind one port, from its start to its end. It belongs to the process that opened it.
  #
  # With the option `:transport` a process of the BEAM takes the place of the port, and has no OS process. It gets what a port
  # gets, `{owner, {:command, frame}}` and `{owner, :close}`, and sends what a port sends,
  # `{process, {:data, frame}}` and `{process, {:exit_status, code}}`.

  alias DSPex.PythonBridge.{Options, OS}
  alias DSPex.PythonBridge.Calls.SendQueue
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Python.Interpreter

  @enforce_keys [:port, :os_pid, :opened_at]
  defstruct [:port, :os_pid, :opened_at, :ping_id, up?: false]

  @typedoc "`up?`: whether it has answered its first ping."
  @type t :: %__MODULE__{
          port: SendQueue.transport(),
          os_pid: pos_integer() | nil,
          opened_at: integer(),
          ping_id: pos_integer() | nil,
          up?: boolean()
        }

  @doc """
  Starts the interpreter with the script. The error says why it could not be started: there is no interpreter, or the
  system does not run it. Whether the script works shows later, by the peer's first reply or its death.
  """
  @spec open(Options.t()) :: {:ok, t()} | {:error, String.t()}
  def open(%Options{transport: start_link}) when start_link != nil,
    do: {:ok, %__MODULE__{port: start_link.(), os_pid: nil, opened_at: Deadline.now()}}

  def open(%Options{} = options) do
    with {:ok, python} <- Interpreter.find(options.python_executable) do
      port = Port.open({:spawn_executable, python}, port_options(options))
      # nil if the process has ended already: its death is then in the mailbox.
      {:os_pid, os_pid} = Port.info(port, :os_pid) || {:os_pid, nil}
      {:ok, %__MODULE__{port: port, os_pid: os_pid, opened_at: Deadline.now()}}
    end
  rescue
    error in [ErlangError, ArgumentError] ->
      {:error, "the interpreter cannot be started: #{OS.Command.start_failure(error)}"}
  end

  @doc """
  The options of the port. Standard error is the BEAM's. `-u` is for scripts that print through Python's buffers.

  A peer that closes its output and lives on is not noticed here: with `:exit_status`, the runtime reports the end of
  output only when the process ends, even with `:eof`. Its calls time out, and the monitor replaces it.
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
  Closes the port: end of input for the peer. No message about the port comes after it, except those already in
  the mailbox. It ends no process: see `DSPex.PythonBridge.OS.Reaper`.
  """
  @spec close(t()) :: :ok
  def close(%__MODULE__{port: process}) when is_pid(process) do
    Process.unlink(process)
    send(process, {self(), :close})
    :ok
  end

  def close(%__MODULE__{port: port}) do
    Process.unlink(port)
    Port.close(port)
    :ok
  rescue
    # It was closed already.
    ArgumentError -> :ok
  end

  @doc "Milliseconds since the peer was opened."
  @spec uptime_ms(t()) :: non_neg_integer()
  def uptime_ms(%__MODULE__{opened_at: opened_at}), do: Deadline.now() - opened_at
end
