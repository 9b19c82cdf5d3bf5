defmodule DSPex.PythonBridge.Bridge.State do
  @moduledoc false
  # The state of a bridge's process.
  #
  #   * `peer`: the one that serves; `next`: one that starts; `old`: those that finish their calls
  #   * `timer`: what `next`, or the next attempt to start one, waits for
  #   * `failures`: peers in a row that were of no use
  #   * `restarts_waiting`: callers of a restart
  #   * `to_load`: the declared programs that are still to be loaded; `loading`: the one that is; `failed`: why others
  #     could not be, by their stamps (`DSPex.PythonBridge.Bridge.DeclaredPrograms`)

  alias DSPex.PythonBridge.{Error, Options, Programs}
  alias DSPex.PythonBridge.Bridge.{DeclaredPrograms, LogForwarder, Peer}
  alias DSPex.PythonBridge.Calls.InFlight

  @enforce_keys [:options, :reaper, :log_forwarder, :to_load, :in_flight]
  defstruct @enforce_keys ++
              [:peer, :next, :timer, :last_error, :loading] ++
              [status: :starting, old: [], opened: 0, failures: 0] ++
              [restarts_waiting: [], failed: %{}] ++
              [late_replies: 0, unreadable_frames: 0]

  @type t :: %__MODULE__{
          options: Options.t(),
          reaper: pid(),
          log_forwarder: LogForwarder.t(),
          in_flight: InFlight.t(),
          peer: Peer.t() | nil,
          next: Peer.t() | nil,
          timer: reference() | nil,
          last_error: String.t() | nil,
          status: :starting | :running | :restarting | :failed | :stopping,
          old: [Peer.t()],
          opened: non_neg_integer(),
          failures: non_neg_integer(),
          restarts_waiting: [GenServer.from()],
          to_load: [Programs.Store.id()],
          loading: DeclaredPrograms.loading() | nil,
          failed: %{Programs.Store.stamp() => Error.t()},
          late_replies: non_neg_integer(),
          unreadable_frames: non_neg_integer()
        }

  @doc "All peers that have not ended."
  @spec peers(t()) :: [Peer.t()]
  def peers(%__MODULE__{peer: peer, next: next, old: old}),
    do: Enum.reject([peer, next | old], &is_nil/1)

  @doc "A bridge's name, or its pid, in its own process, if it has none."
  @spec name(Options.t()) :: GenServer.name() | pid()
  def name(%Options{name: name}), do: name || self()
end
