defmodule DSPex.PythonBridge.Durable.Run do
  @moduledoc """
  A durable run, as `DSPex.PythonBridge.Durable` lists it.

    * `:id`, `:program_id`
    * `:state` – `:running` (a process has it), `:suspended` (it waits for a decision), `:interrupted` (its process has ended, or it
      has failed: `:error`), `:done`, `:cancelled`, `:unreadable` (`:error` says why)
    * `:waiting` – what it waits for: maps with `:key`, `:tool`, `:args` and `:why`, which is `"approve"`, `"unknown_outcome"`, or what
      the tool has returned as `{:suspend, info}`. A spent budget has the key `"budget"`, no tool, and as `:why` what was spent
    * `:error` – the text of its last error, or nil
    * `:at` – when it got this state, in UTC; of runs without a summary, when they began

  An inspection shows neither arguments nor errors.
  """

  alias DSPex.PythonBridge.Durable.History
  alias DSPex.PythonBridge.Protocol.Payload

  @states ~w(suspended interrupted done cancelled)a
  @names Map.new(@states, &{Atom.to_string(&1), &1})

  @derive {Inspect, only: [:id, :program_id, :state, :at]}
  defstruct [:id, :program_id, :state, :error, :at, waiting: []]

  @type state :: :running | :suspended | :interrupted | :done | :cancelled | :unreadable
  @type call :: %{
          key: String.t(),
          tool: String.t() | nil,
          args: map() | nil,
          why: term()
        }
  @type t :: %__MODULE__{
          id: String.t(),
          program_id: String.t() | nil,
          state: state(),
          waiting: [call()],
          error: String.t() | nil,
          at: DateTime.t() | nil
        }

  # A run as its records have it.
  @doc false
  @spec of(String.t(), History.t(), String.t() | nil) :: t()
  def of(id, %History{} = history, error \\ nil) do
    state =
      case history.over do
        {:done, _result, _meta} -> :done
        :cancelled -> :cancelled
        nil when map_size(history.waiting) > 0 and error == nil -> :suspended
        nil -> :interrupted
      end

    program = if history.args, do: history.args["program_id"]
    waiting = if history.over, do: [], else: History.waiting(history)
    at = history.began_at && DateTime.from_unix!(history.began_at, :millisecond)
    %__MODULE__{id: id, program_id: program, state: state, waiting: waiting, error: error, at: at}
  end

  # What a store keeps of it to be listed.
  @doc false
  @spec summary(t()) :: binary()
  def summary(%__MODULE__{} = run) do
    run
    |> Map.take([:program_id, :state, :waiting, :error])
    |> Map.put(:at, System.os_time(:millisecond))
    |> JSON.encode!()
  end

  # The same from a summary; nil if that is none.
  @doc false
  @spec of_summary(String.t(), binary()) :: t() | nil
  def of_summary(id, summary) do
    with {:ok, %{"state" => name, "at" => ms, "waiting" => waiting} = summary} <-
           Payload.decode(summary),
         %{^name => state} <- @names,
         {:ok, at} <- is_integer(ms) && DateTime.from_unix(ms, :millisecond),
         true <- is_list(waiting) do
      calls =
        for %{} = call <- waiting,
            do: %{key: call["key"], tool: call["tool"], args: call["args"], why: call["why"]}

      %__MODULE__{
        id: id,
        program_id: summary["program_id"],
        state: state,
        waiting: calls,
        error: summary["error"],
        at: at
      }
    else
      _none -> nil
    end
  end
end
