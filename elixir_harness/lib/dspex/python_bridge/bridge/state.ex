defmodule DSPex.PythonBridge.Bridge.State do
  @moduledoc false
  # The state of a bridge's process.
  #
  #   * `peer`: the one that serves; `next`: one that starts; `old`: those that finish their calls
  #   * `timer`: what `next`, or the next attempt to start one, waits for
  #   * `restarts_waiting`: callers of a restart; `restarts_later`: those who asked for one while a peer was loading
  #     without some programs
  #   * `load_deaths`: the peers that died while they loaded a program: see `DSPex.PythonBridge.Bridge.ProgramReplay`
  #   * `load_failures`: why the present peer could not load a program. Both are by the stamps of programs
  #   * `again_timer`: when another peer is started for programs that were left out
  #   * `big?`: whether a large request may still wait to be written

  alias DSPex.PythonBridge.{Error, Options, Programs}
  alias DSPex.PythonBridge.Bridge.{Backoff, LogForwarder, Peer}
  alias DSPex.PythonBridge.Calls.InFlight

  @enforce_keys [:options, :label, :reaper, :log_forwarder, :programs, :in_flight]
  defstruct @enforce_keys ++
              [:peer, :next, :timer, :again_timer, :last_error] ++
              [status: :starting, old: [], opened: 0, backoff: Backoff.new()] ++
              [restarts_waiting: [], restarts_later: []] ++
              [load_deaths: %{}, load_failures: %{}, load_carefully?: false] ++
              [big?: false, late_replies: 0, unreadable_frames: 0]

  @typedoc "The peers in a row that died of a program, and when it may be loaded again, in monotonic ms."
  @type load_deaths :: {pos_integer(), again_at :: integer()}

  @type t :: %__MODULE__{
          options: Options.t(),
          label: String.t(),
          reaper: pid(),
          log_forwarder: LogForwarder.t(),
          programs: Programs.Store.table(),
          in_flight: InFlight.t(),
          peer: Peer.t() | nil,
          next: Peer.t() | nil,
          timer: reference() | nil,
          again_timer: reference() | nil,
          last_error: String.t() | nil,
          status: :starting | :running | :restarting | :failed | :stopping,
          old: [Peer.t()],
          opened: non_neg_integer(),
          backoff: Backoff.t(),
          restarts_waiting: [GenServer.from()],
          restarts_later: [GenServer.from()],
          load_deaths: %{Programs.Store.stamp() => load_deaths()},
          load_failures: %{Programs.Store.stamp() => Error.t()},
          load_carefully?: boolean(),
          big?: boolean(),
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
