defmodule DSPex.PythonBridge.Pool.Attempt do
  @moduledoc false
  # How a call is made at one bridge, in the caller's process. Which bridge that is, and whether another one follows, is
  # decided by `DSPex.PythonBridge.Pool.Router` and `DSPex.PythonBridge.Pool.LocalCall`.
  #
  # With chunks or tools each attempt has a `DSPex.PythonBridge.Client.StreamProxy` of its own; all have the functions of
  # the call in common. An attempt ends with its first chunk; another one follows then only if all chunks may come again.

  alias DSPex.PythonBridge.Calls
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Client.{Caller, StreamProxy}
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Pool.Request

  # For each call.
  @compile {:inline, ask: 4, sent: 3}

  defstruct [:holder, retry: true, stream?: false, again?: false, spread?: false]

  @typedoc """
  `retry`: whether the call may be sent again after a peer has died with it. `stream?`: whether the caller takes chunks.
  `holder`: of the caller's functions (`DSPex.PythonBridge.Tools.FunctionHolder`). `again?`: as in
  `t:DSPex.PythonBridge.Client.StreamProxy.call/0`. `spread?`: whether this node's peers come first no more than those of
  any other node.
  """
  @type t :: %__MODULE__{
          holder: pid() | nil,
          retry: boolean(),
          stream?: boolean(),
          again?: boolean(),
          spread?: boolean()
        }
  @typedoc "A slot of the bridge's pool, in which the call is counted."
  @type slot :: {LoadCounters.t(), LoadCounters.index()}
  @typedoc """
  A call that has given its first chunk. `follow`, of one that `DSPex.PythonBridge.Pool.Router` has made, says what a reply
  means: with chunks that may come again, perhaps another peer's.
  """
  @type begun ::
          {:begun,
           %{
             :proxy => pid(),
             :dest => pid(),
             :deadline => Deadline.t(),
             optional(:follow) => (Calls.Request.reply() -> {:again, term()} | {:done, term()})
           }, frame :: binary()}

  @doc "Whether the call has neither chunks nor tools, and may be sent again."
  @spec plain?(t()) :: boolean()
  def plain?(%__MODULE__{} = attempt), do: attempt == %__MODULE__{}

  @doc """
  Sends the call to a bridge of this node, and waits for the reply or the first chunk. A failure that is not
  final is another bridge's chance.
  """
  @spec make(t(), pid(), slot(), Request.t()) :: Calls.Request.reply() | begun()
  def make(%__MODULE__{} = attempt, bridge, {counters, index}, request) do
    last(attempt.retry, ask(attempt, bridge, request, LoadCounters.ticket(counters, index)))
  end

  @doc """
  Sends the call to the pool of another node, by a process there that is like a bridge
  (`DSPex.PythonBridge.Pool.Cluster.Relay`). It counts the call there.
  """
  @spec make_there(t(), pid(), Request.t()) :: Calls.Request.reply() | begun()
  def make_there(%__MODULE__{} = attempt, relay, request),
    do: last(attempt.retry, ask(attempt, relay, request, nil))

  defp ask(%__MODULE__{stream?: false, holder: nil} = attempt, bridge, request, ticket),
    do: Caller.send_and_wait(bridge, Request.left(request), sent(attempt, request, ticket))

  defp ask(attempt, bridge, %Request{deadline: deadline} = request, ticket) do
    request = sent(attempt, request, ticket)
    call = %{dest: bridge, deadline: deadline, request: request, again?: attempt.again?}
    proxy = StreamProxy.start(call, attempt.holder)

    case StreamProxy.next(proxy, deadline) do
      {:chunk, frame} -> {:begun, %{proxy: proxy, dest: bridge, deadline: deadline}, frame}
      {:over, reply} -> reply
    end
  end

  defp sent(%__MODULE__{stream?: stream?}, %Request{body: body, deaths: deaths}, ticket) do
    %Calls.Request{body: body, retry: :pool, deaths: deaths, stream?: stream?, ticket: ticket}
  end

  @doc """
  The reply as the last one, if the call must not be sent again and a peer may have made it: one that has died with it, or
  one of a bridge, or a node, that is gone.
  """
  @spec last(retry :: boolean(), reply) :: reply when reply: term()
  def last(false, {:error, gone})
      when gone in [{:died, :sent}, {:died, :spared}, :bridge_not_running],
      do: {:error, :python_process_died}

  def last(_retry, reply), do: reply
end
