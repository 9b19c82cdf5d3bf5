defmodule DSPex.PythonBridge.Pool.Request do
  @moduledoc false
  # A call on its way through a pool, in the caller's process: the request, its deadline, and what was tried.

  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.OTP.Deadline

  @enforce_keys [:body, :program, :deadline]
  defstruct [
    :body,
    :program,
    :deadline,
    deaths: 0,
    passed: [],
    passed_nodes: [],
    overloaded: nil,
    repaired: []
  ]

  @typedoc """
  `program`: the id of the program of an `execute_program`. `deaths`: peers that died with the call. `passed`: slots
  that could not serve it, with their readiness at that time; `passed_nodes`: rows of the table of other nodes
  that could not. `overloaded`: that of a peer or bridge which was. `repaired`: slots where the program was missing and was created.
  """
  @type t :: %__MODULE__{
          body: binary(),
          program: String.t() | nil,
          deadline: Deadline.t(),
          deaths: non_neg_integer(),
          passed: [{LoadCounters.index(), since :: non_neg_integer()}],
          passed_nodes: [tuple()],
          overloaded: Error.t() | nil,
          repaired: [LoadCounters.index()]
        }

  @doc "A new call; `started` and `timeout` in ms."
  @spec new(binary(), String.t() | nil, integer(), timeout()) :: t()
  def new(body, program, started, timeout),
    do: %__MODULE__{body: body, program: program, deadline: Deadline.new(timeout, started)}

  @doc "The ms that are left of the caller's timeout."
  @spec left(t()) :: timeout()
  def left(%__MODULE__{deadline: deadline}), do: Deadline.left(deadline)

  @doc "Something has changed: everything may be tried again."
  @spec renew(t()) :: t()
  def renew(%__MODULE__{} = request), do: %{request | passed: [], passed_nodes: []}
end
