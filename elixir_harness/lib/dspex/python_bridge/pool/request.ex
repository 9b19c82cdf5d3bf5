defmodule DSPex.PythonBridge.Pool.Request do
  @moduledoc """
  One call on its way through a pool, in the caller's process: what is asked, how long there is,
  and what has been tried.
  """

  alias DSPex.PythonBridge.Calls.LoadCounters

  @enforce_keys [:body, :program, :deadline]
  defstruct [
    :body,
    :program,
    :deadline,
    deaths: 0,
    passed: [],
    passed_nodes: [],
    overloaded?: false,
    repaired: []
  ]

  @typedoc """
  `program`: the id of the program that is to be executed, if one is. `deaths`: peers that died with the
  call. `passed`: slots that could not serve it, with their readiness at that time; `passed_nodes`: rows
  of the table of other nodes that could not. `repaired`: slots where the program was missing, and was
  created.
  """
  @type t :: %__MODULE__{
          body: binary(),
          program: String.t() | nil,
          deadline: integer() | :infinity,
          deaths: non_neg_integer(),
          passed: [{LoadCounters.index(), since :: non_neg_integer()}],
          passed_nodes: [tuple()],
          overloaded?: boolean(),
          repaired: [LoadCounters.index()]
        }

  @doc "A new call; `started` and `timeout` in ms."
  @spec new(binary(), String.t() | nil, integer(), timeout()) :: t()
  def new(body, program, started, timeout),
    do: %__MODULE__{body: body, program: program, deadline: deadline(started, timeout)}

  @doc "What is left of the caller's timeout, in ms."
  @spec left(t()) :: timeout()
  def left(%__MODULE__{deadline: :infinity}), do: :infinity
  def left(%__MODULE__{deadline: deadline}), do: max(deadline - now(), 0)

  @doc "The same for another node, whose clock is another: with what is left in place of the deadline."
  @spec pack(t()) :: t()
  def pack(%__MODULE__{} = request),
    do: %{request | deadline: left(request), passed: [], passed_nodes: [], repaired: []}

  @doc "What `pack/1` has packed, on the other node."
  @spec unpack(t()) :: t()
  def unpack(%__MODULE__{} = request),
    do: %{request | deadline: deadline(now(), request.deadline)}

  @doc "Something has changed: all may be tried again."
  @spec renew(t()) :: t()
  def renew(%__MODULE__{} = request), do: %{request | passed: [], passed_nodes: []}

  defp deadline(_started, :infinity), do: :infinity
  defp deadline(started, timeout), do: started + timeout

  defp now, do: System.monotonic_time(:millisecond)
end
