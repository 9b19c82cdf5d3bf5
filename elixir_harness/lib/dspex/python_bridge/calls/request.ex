defmodule DSPex.PythonBridge.Calls.Request do
  @moduledoc false
  # One request of a caller. The caller sends `{:request, request}` to the bridge, which fills in the fields from `watch` on,
  # keeps the struct until the reply, and sends the body to a peer.
  #
  #   * `ref`, `pid`: the caller's alias and process; both nil for a cast, which gets no reply
  #   * `timeout`: the caller's remaining ms
  #   * `body`: the frame without its head. It is kept to be resent, or for the change that it makes
  #   * `change`: the change that it makes to the programs, if any
  #   * `resend`: who resends it when its peer dies: the bridge, the caller, who knows other bridges, or nobody; nor if a
  #     tool has begun that must not be called again
  #   * `deaths`: how many peers have died with it; `spared`: how many more, which were blamed on others
  #   * `stream?`, `tools?`: whether the caller takes chunks, and whether it has given tools
  #   * `journal`: the LM's answers so far, which are sent along; nil if the run has no journal
  #   * `watch`: the monitor of the caller, or the timer of a cast; nil for a change of the programs that is under way
  #     and whose caller waits no longer
  #   * `deadline`: `timeout` in the bridge's time
  #   * `at`: the port of the peer that has it, or nil

  alias DSPex.PythonBridge.Calls.Journal
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Programs.Store

  @enforce_keys [:body]
  defstruct [:ref, :pid, :body, :change, :journal, :watch, :deadline, :at] ++
              [timeout: :infinity, resend: :bridge, deaths: 0, spared: 0] ++
              [stream?: false, tools?: false]

  @type t :: %__MODULE__{
          ref: reference() | nil,
          pid: pid() | nil,
          timeout: timeout(),
          body: binary(),
          change: Store.change() | nil,
          resend: :bridge | :caller | :never | :tool_begun,
          deaths: non_neg_integer(),
          spared: non_neg_integer(),
          stream?: boolean(),
          tools?: boolean(),
          journal: Journal.t() | nil,
          watch: {:monitor, reference()} | {:timer, reference()} | nil,
          deadline: Deadline.t() | nil,
          at: port() | pid() | nil
        }
  @typedoc "What the caller gets: `{ref, reply}`."
  @type reply ::
          {:frame, binary()}
          | {:error, :timeout | :proxy_died | {:ended, why :: String.t()} | failure()}
  @type failure ::
          :python_process_died
          | :replaced
          | :tool_begun
          | :bridge_not_running
          | :overloaded
          | {:died, :sent | :spared | :unsent}
          | {:not_started, String.t()}
          | {:too_large, pos_integer(), pos_integer()}
end
