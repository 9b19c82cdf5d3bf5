defmodule DSPex.PythonBridge.Tools.EventsTest do
  @moduledoc "The events of tools: their names and outcomes, never what they are given or return."

  # Whether the application has :telemetry is global to the BEAM.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Pool}
  alias DSPex.Test.FakePeer
  alias DSPex.Test.Telemetry, as: Host

  @compile {:no_warn_undefined, :telemetry}

  @start [:tool, :start]
  @stop [:tool, :stop]
  @secret "the contents"

  setup do
    Host.install()
    on_exit(&Host.remove/0)
    Host.attach()
  end

  defp start do
    :plays |> FakePeer.opts() |> Keyword.put(:name, :observed_tools) |> start_and_wait()
    :observed_tools
  end

  defp request(server, play, tools) do
    args = %{program_id: "p", play: play}
    module = if server == :observed_tools, do: Bridge, else: Pool
    {:ok, results, _meta} = module.request(server, :execute_program, args, tools: tools)
    results
  end

  # Calls of tools, one after the other.
  defp calls(names) do
    for {name, n} <- Enum.with_index(names, 1),
        step <- [["tool", n, name, %{q: @secret}], ["result", n]],
        do: step
  end

  # Of tools alone.
  defp events do
    receive do
      {[:tool | _] = event, measured, metadata} -> [{event, measured, metadata} | events()]
      {[_ | _], _measured, _metadata} -> events()
    after
      0 -> []
    end
  end

  test "are a span around the function, in its process" do
    test = self()
    observe = fn [_ | event], _, _, _ -> send(test, {:in, event, self()}) end
    names = [[:dspex | @start], [:dspex | @stop]]
    :ok = :telemetry.attach_many(__MODULE__, names, observe, nil)
    on_exit(fn -> :telemetry.detach(__MODULE__) end)

    tool = fn args ->
      Process.sleep(20)
      send(test, {:tool, self()})
      args
    end

    request(start(), calls(["t"]) ++ [["reply"]], %{t: tool})
    assert_received {:tool, pid}
    for event <- [@start, @stop], do: assert_received({:in, ^event, ^pid})

    assert [
             {@start, %{monotonic_time: started, system_time: _}, start},
             {@stop, %{monotonic_time: ended, duration: duration}, stop}
           ] = found = events()

    assert ended - started == duration
    assert System.convert_time_unit(duration, :native, :millisecond) in 19..5_000
    assert %{bridge: :observed_tools, pool: nil, program_id: "p", tool: "t"} = start
    assert %{remembered?: false, telemetry_metadata: none} = start
    assert none == %{} and is_reference(start.telemetry_span_context)
    assert stop == Map.put(start, :result, :ok)
    refute inspect(found) =~ @secret
  end

  test "have the outcome that the LM gets, without its contents" do
    tools = %{
      error: fn args -> {:error, args["q"]} end,
      no_json: fn args -> {args} end,
      raises: fn args -> raise ArgumentError, args["q"] end,
      no_clause: fn %{"other" => _} -> 1 end,
      exits: fn args -> exit({:shutdown, args}) end,
      throws: fn args -> throw(args) end
    }

    names = for name <- ~w(error no_json raises no_clause exits throws), do: name
    request(start(), calls(names) ++ [["reply"]], tools)
    found = events()
    refute inspect(found) =~ @secret
    ends = for {[_, name], measured, what} <- found, name != :start, do: {name, measured, what}
    for {_name, measured, _} <- ends, do: assert(%{duration: _, monotonic_time: _} = measured)
    assert for({_name, _measured, metadata} <- ends, do: metadata.tool) == names
    assert [{:stop, _, %{result: :error}}, {:stop, _, %{result: :error}} | raised] = ends

    assert [
             %{kind: :error, reason: ArgumentError},
             %{kind: :error, reason: :function_clause, stacktrace: [{_, _, arity, _} | _]},
             %{kind: :exit, reason: :shutdown},
             %{kind: :throw, reason: :other}
           ] = for({:exception, _, metadata} <- raised, do: metadata)

    assert arity == 1
  end

  test "have the names of :tools alone: an LM may write any other" do
    request(start(), calls(["t", @secret]) ++ [["reply"]], %{t: & &1})

    assert [_, {@stop, _, %{tool: "t"}}, {@start, _, start}, {@stop, _, stop}] =
             found = events()

    assert %{tool: "unknown"} = start
    assert stop == Map.put(start, :result, :error)
    refute inspect(found) =~ @secret
  end

  test "tell what was called from what was remembered" do
    bridge = start()
    fails = fn _ -> {:error, "no"} end
    play = [["first", calls(["t", "f"]) ++ [["die"]], calls(["t", "f", "t"]) ++ [["reply"]]]]
    request(bridge, play, %{t: & &1, f: fails})
    ends = for {@stop, _, metadata} <- events(), do: metadata

    assert for(m <- ends, do: {m.tool, m.remembered?, m.result}) == [
             {"t", false, :ok},
             {"f", false, :error},
             {"t", true, :ok},
             {"f", true, :error},
             {"t", false, :ok}
           ]
  end
end
