defmodule DSPex.PythonBridge.Pool.Attempt do
  @moduledoc false
  # How a call is made at one bridge, in the caller's process. Which bridge that is, and whether another one follows, is
  # decided by `DSPex.PythonBridge.Pool.Router` and `DSPex.PythonBridge.Pool.LocalCall`.

  alias DSPex.PythonBridge.Calls
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.Pool.Request

  defstruct retry: true

  @typedoc "`retry`: whether the call may be sent again after a peer has died with it."
  @type t :: %__MODULE__{retry: boolean()}
  @typedoc "A slot of the bridge's pool, in which the call is counted."
  @type slot :: {LoadCounters.t(), LoadCounters.index()}

  @doc "From the options of the call."
  @spec new(keyword()) :: t()
  def new(opts), do: %__MODULE__{retry: Keyword.get(opts, :retry, true)}

  @doc """
  Sends the call to a bridge of this node, counts it, and waits for the reply. A failure that is not final is another
  bridge's chance.
  """
  @spec make(t(), pid(), slot(), Request.t()) :: Calls.Request.reply()
  def make(%__MODULE__{} = attempt, bridge, {counters, index}, request) do
    # The caller counts the call before it sends it. The bridge counts it out at its end; if the bridge never got it,
    # the caller does.
    life = LoadCounters.take(counters, index)
    sent = %Calls.Request{body: request.body, retry: :pool, deaths: request.deaths}
    reply = Caller.send_and_wait(bridge, Request.left(request), sent)

    if reply == {:error, :bridge_not_running},
      do: LoadCounters.give_back(counters, index, life)

    last(attempt, reply)
  end

  defp last(%__MODULE__{retry: false}, {:error, {:died, :sent}}),
    do: {:error, :python_process_died}

  defp last(_attempt, reply), do: reply
end
