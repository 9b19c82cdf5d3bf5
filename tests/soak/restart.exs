# From the kill of a peer to the next answer, by how many programs there are: their number must not matter.
#
#     cd elixir_harness && MIX_ENV=prod mix run --no-start ../tests/soak/restart.exs

alias DSPex.PythonBridge.Bridge

python = System.fetch_env!("DSPY_BRIDGE_PYTHON")
rounds = 5

start = fn programs ->
  {:ok, bridge} = Bridge.start_link(name: nil, python_executable: python, lm: "offline/echo")
  qa = %{id: "qa", signature: "question -> answer"}
  {:ok, _} = Bridge.call(bridge, :create_program, qa, 60_000)
  for args <- programs, do: {:ok, _} = Bridge.call(bridge, :create_program, Map.put(args, :lazy, true), 60_000)
  bridge
end

run = fn bridge ->
  args = %{program_id: "qa", inputs: %{question: "?"}}
  {:ok, %{"answer" => _}} = Bridge.call(bridge, :execute_program, args, 60_000)
end

after_kill = fn bridge ->
  run.(bridge)
  os_pid = Bridge.get_status(bridge).os_pid

  {us, _answer} =
    :timer.tc(fn ->
      {_, 0} = System.cmd("/bin/sh", ["-c", "kill -9 #{os_pid}"])
      run.(bridge)
    end)

  us / 1_000_000
end

state = String.duplicate("x", 10_000_000)

cases = [
  {"1 program", []},
  {"10,000 programs", for(n <- 2..10_000, do: %{id: "p#{n}", signature: "question -> answer"})},
  {"10 programs of 10 MB more",
   for(n <- 1..10, do: %{id: "s#{n}", signature: "question -> answer", state: %{text: state}})}
]

bridges = for {name, programs} <- cases, do: {name, start.(programs)}

# In turn, so that the load of the machine is the same for all.
times =
  for _ <- 1..rounds, {name, bridge} <- bridges, reduce: %{} do
    times -> Map.update(times, name, [], & &1) |> Map.update!(name, &[after_kill.(bridge) | &1])
  end

for {name, _bridge} <- bridges do
  [low | _] = sorted = Enum.sort(times[name])
  median = Enum.at(sorted, div(rounds, 2))
  IO.puts("#{String.pad_trailing(name, 28)} median #{Float.round(median, 2)} s, least #{Float.round(low, 2)} s")
end
