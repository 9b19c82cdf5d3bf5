defmodule DSPex.PythonBridge.Top.Finder do
  @moduledoc false
  # The bridges of this node: those of pools, of supervisors, and others, with a name or without; and its runs. No process
  # is asked.

  alias DSPex.PythonBridge.OTP.Registry
  alias DSPex.PythonBridge.Pool.{Handle, LoadCounters}
  alias DSPex.PythonBridge.Telemetry.RunSpan
  alias DSPex.PythonBridge.Top

  @typedoc "`server` is what the functions of `DSPex.PythonBridge.Bridge` take; the rest is text."
  @type found :: %{
          server: pid() | atom(),
          bridge: String.t(),
          pool: String.t() | nil,
          number: pos_integer() | nil
        }

  @doc "All bridges, in the order of their names, the members of a pool in that of their numbers."
  @spec bridges() :: [found()]
  def bridges do
    members = Enum.flat_map(pools(), &members/1)
    names = MapSet.new(members, & &1.server)

    others =
      for {pid, %{name: name}} <- Registry.list(:bridge),
          name not in names and Process.alive?(pid),
          do: %{server: pid, bridge: inspect(name), pool: nil, number: nil}

    Enum.sort_by(members ++ others, &{&1.pool || &1.bridge, &1.number})
  end

  # Each is in the list by its pid and by its name.
  defp pools,
    do:
      for(
        {pid, _handle} when is_pid(pid) <- Registry.list(:pool),
        handle = Handle.fetch(pid),
        do: handle
      )

  defp members(handle) do
    for index <- LoadCounters.indexes(handle.counters) do
      bridge = Handle.bridge(handle, index)
      %{server: bridge, bridge: inspect(bridge), pool: inspect(handle.name), number: index}
    end
  end

  @doc "The evaluations and optimizations that are under way, in the order of their starts."
  @spec runs() :: [Top.run()]
  def runs do
    for %{metadata: metadata, figures: figures} = run <- RunSpan.list() do
      %{
        kind: run.kind,
        program: metadata.program_id,
        server: inspect(metadata.pool || metadata.bridge),
        caller: inspect(run.caller),
        done: figures[:done],
        total: figures[:total],
        score: figures[:score],
        failed: figures[:failed],
        lm_calls: figures[:lm_calls],
        elapsed_ms: run.elapsed_ms
      }
    end
  end
end
