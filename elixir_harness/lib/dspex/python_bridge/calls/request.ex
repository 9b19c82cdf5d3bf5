defmodule DSPex.PythonBridge.Calls.Request do
  @moduledoc false
  # One request of a caller. The caller sends `{:request, request}` to the bridge, which fills in the fields from `watch` on,
  # keeps the struct until the reply, and sends the body to a peer.
  #
  #   * `ref`, `pid`: the caller's alias and process; both nil for a cast, which gets no reply
  #   * `timeout`: the caller's remaining ms
  #   * `body`: the frame without its head. It is kept for a retry, or for the change that it makes
  #   * `change`: the change that it makes to the programs, if any
  #   * `retry`: what happens when a peer dies with it: the bridge sends it again (`:bridge`), it fails (`:never`),
  #     or the caller, which knows other peers, gets the error (`:pool`)
  #   * `deaths`: how many peers have died with it; `spared`: how many more, which were blamed on others
  #   * `ticket`: of a pool's call, its number (`DSPex.PythonBridge.Calls.LoadCounters`)
  #   * `stream?`, `tools?`: whether the caller takes chunks, and whether it has given tools
  #   * `watch`: the monitor of the caller, or the timer of a cast; nil for a change of the programs that is under way
  #     and whose caller waits no longer
  #   * `deadline`: `timeout` in the bridge's time
  #   * `at`: the port of the peer that has it, or nil
  #   * `told?`: whether the caller has been sent a status or an item, which may come again
  #   * `streamed?`, `bound?`: whether the caller has been sent any other chunk, or has begun a tool that must not be
  #     called again; if so, there is no retry

  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Programs.Store

  # The longest timeout of `receive`.
  @max_timeout 4_294_967_295
  # What a word of `:atomics` takes.
  @max_ticket 9_223_372_036_854_775_807

  @enforce_keys [:body]
  defstruct [:ref, :pid, :body, :change, :ticket, :watch, :deadline, :at] ++
              [timeout: :infinity, retry: :bridge, deaths: 0, spared: 0] ++
              [stream?: false, tools?: false, told?: false, streamed?: false, bound?: false]

  @type t :: %__MODULE__{
          ref: reference() | nil,
          pid: pid() | nil,
          timeout: timeout(),
          body: binary(),
          change: Store.change() | repair() | nil,
          retry: retry(),
          deaths: non_neg_integer(),
          spared: non_neg_integer(),
          ticket: LoadCounters.ticket() | nil,
          stream?: boolean(),
          tools?: boolean(),
          watch: {:monitor, reference()} | {:timer, reference()} | nil,
          deadline: Deadline.t() | nil,
          at: port() | nil,
          told?: boolean(),
          streamed?: boolean(),
          bound?: boolean()
        }
  @type retry :: :bridge | :never | :pool
  @typedoc "Only for the coordinator of a pool: see `DSPex.PythonBridge.Pool.ProgramChanges.ask/2`."
  @type repair :: {:repair, pos_integer(), Store.id()}
  @typedoc """
  What the caller gets: `{ref, reply}`. `:served`: from `DSPex.PythonBridge.Pool.Cluster.Relay`. `:tools_begun`: from
  `DSPex.PythonBridge.Client.StreamProxy`, if a tool had begun that must not be called again.
  """
  @type reply ::
          {:frame, binary()}
          | {:error, :timeout | :proxy_died | failure()}
          | {:served, term()}
          | {:tools_begun, reply()}
  @type failure ::
          :python_process_died
          | :replaced
          | :tool_begun
          | :bridge_not_running
          | :overloaded
          | {:died, :sent | :spared | :unsent}
          | {:not_started, String.t()}
          | {:too_large, pos_integer(), pos_integer()}

  defguardp is_timeout(timeout) when timeout == :infinity or timeout in 0..@max_timeout

  defguardp is_caller(ref, pid, timeout)
            when (is_reference(ref) and is_pid(pid) and is_timeout(timeout)) or
                   (ref == nil and pid == nil and timeout in 0..@max_timeout)

  @doc "Whether a term is a request of a caller; its change is not checked. Any term may be sent to a process."
  @spec valid?(term()) :: boolean()
  def valid?(%__MODULE__{ref: ref, pid: pid, timeout: timeout, deaths: deaths} = request)
      when is_caller(ref, pid, timeout) and is_binary(request.body) and
             request.retry in [:bridge, :never, :pool] and is_integer(deaths) and deaths >= 0 and
             (request.ticket == nil or request.ticket in 1..@max_ticket) and
             is_boolean(request.stream?) and is_boolean(request.tools?),
      do: true

  def valid?(_other), do: false
end
