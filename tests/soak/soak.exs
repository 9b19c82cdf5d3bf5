# A long run of everything at once, for `make soak`: many callers of all kinds, peers that are killed or hang at random,
# a pool's coordinator that is killed, restarts and deaths under thousands of calls, and at the end the counts are
# verified: what was sent was answered, nothing grew, nothing is left. Exit status 1
# if anything is amiss.
#
# A bridge that is never killed (:steady) is what memory is measured by; the others are killed, restarted, crashed.
# :crowded has thousands of calls at a time, and ends of its peer that are few enough for each of them to outlive.
# :twice has slow calls, each of which is in flight at two deaths of its peer in a row.

defmodule Soak do
  alias DSPex.PythonBridge.{Bridge, Pool}
  alias DSPex.PythonBridge.Pool.LoadCounters

  @workers 24
  @crowd 3_000
  # A peer that hangs takes 12 s of it, and may not be the last.
  @patience 120_000
  # A second is what is promised, on a machine that does nothing else.
  @bystander 5_000
  @growth 1.05
  @definitions [{{{:program, :_}, :_, :_}, [], [true]}]

  def run do
    Process.flag(:trap_exit, true)
    minutes = System.get_env("SOAK_MINUTES", "10") |> Float.parse() |> elem(0)
    seconds = minutes * 60
    start_bridges()
    for target <- [:crowded | targets()], {id, type} <- [{"qa", "predict"}, {"nap", "host:Nap"}, {"parent", "host:Parent"}],
        do: {:ok, _} = create(target, id, type)

    for target <- targets(), do: {:ok, _} = call(target, :create_program, agent(), @patience)
    for {id, type} <- [{"qa", "predict"}, {"sleep", "host:Sleep"}], do: {:ok, _} = create(:twice, id, type)

    tally = :ets.new(:tally, [:public, write_concurrency: true])
    stop = :atomics.new(1, [])
    workers = for n <- 1..@workers, do: spawn_monitor(fn -> work(n, tally, stop) end)
    killer = spawn_link(fn -> kill_now_and_then(tally) end)
    # What it has begun is to be over before the end.
    workers = [spawn_monitor(fn -> harm_the_pool(tally, stop) end) | workers]
    workers = [spawn_monitor(fn -> kill_twice(tally, stop) end) | workers]

    # What is filled once (caches, pools of threads) is full by then.
    crowds(tally, seconds / 3)
    before = measure()
    IO.puts("after #{round(seconds / 3)} s: #{calls(tally)} calls, #{inspect(before)}")
    crowds(tally, seconds * 2 / 3)

    :atomics.put(stop, 1, 1)
    Process.unlink(killer)
    Process.exit(killer, :kill)
    for {pid, ref} <- workers, do: receive(do: ({:DOWN, ^ref, :process, ^pid, reason} -> note_end(tally, reason)))
    settle()
    later = measure_at_rest(before)
    counted = counted()
    stop_bridges()
    report(tally, before, later, counted, orphans(1_000))
  end

  ## What runs

  defp env do
    %{
      "PYTHONPATH" => Path.expand("../tests/fakes"),
      "DSPY_BRIDGE_ALLOW_MODULES" => "host",
      "FAKE_LOG" => "/dev/null",
      "FAKE_FILE" => "/no/such/file",
      "DSPY_BRIDGE_LOG_LEVEL" => "error",
      # By which its processes are known at the end.
      "DSPY_BRIDGE_SOAK" => System.pid()
    }
  end

  defp start_bridges do
    Application.put_env(:dspex, :autostart, false)
    {:ok, _} = Application.ensure_all_started(:dspex)
    Logger.configure(level: :error)
    # Also those of the pool: what hangs is replaced within 12 s.
    Application.put_env(:dspex, :python_bridge_monitor, interval: 1_000, timeout: 3_000)
    # One that hangs while it starts is not the monitor's: within that time, too.
    opts = [lm: "offline/echo", start_timeout: 10_000, env: env(), python_executable: System.get_env("DSPY_BRIDGE_PYTHON")]

    # :restless is killed so often that one call may be in flight at four deaths: the next peer, too, dies while it imports DSPy.
    children = [
      {Bridge, [name: :steady] ++ opts},
      {Bridge, [name: :twice] ++ opts},
      {DSPex.PythonBridge.Supervisor, name: :tree, bridge: [name: :restless, max_retries: 10] ++ opts, monitor: [name: :monitor]},
      {DSPex.PythonBridge.Supervisor, name: :crowded_tree, bridge: [name: :crowded] ++ opts, monitor: [name: :crowded_monitor]},
      {Pool, [name: :pool, pool_size: 3] ++ opts}
    ]

    {:ok, _} = Supervisor.start_link(children, strategy: :one_for_one, name: :soak, max_restarts: 1_000)
  end

  defp stop_bridges, do: Supervisor.stop(:soak)

  # Of single callers.
  defp targets, do: [:steady, :restless, :pool]

  defp call(:pool, command, args, timeout), do: Pool.call(:pool, command, args, timeout)
  defp call(bridge, command, args, timeout), do: Bridge.call(bridge, command, args, timeout)

  # For requests and streams.
  defp module(:pool), do: Pool
  defp module(_bridge), do: Bridge

  defp create(target, id, type \\ "predict"),
    do: call(target, :create_program, %{id: id, signature: "question -> answer", program_type: type}, @patience)

  defp agent do
    %{
      id: "agent",
      signature: "question -> answer",
      program_type: "react",
      tools: [%{name: "look", args: %{what: "str"}}]
    }
  end

  defp execute(target, id, timeout \\ @patience),
    do: call(target, :execute_program, %{program_id: id, inputs: %{question: "#{System.unique_integer()}"}}, timeout)

  ## Callers

  defp work(n, tally, stop) do
    target = Enum.random(targets())
    # For the report of what is wrong.
    Process.put(:target, target)
    one(Enum.random(1..100), n, target, tally)
    if :atomics.get(stop, 1) == 0, do: work(n, tally, stop), else: :ok
  end

  defp one(dice, _n, target, tally) when dice <= 30, do: expect(tally, fn -> call(target, :ping, %{}, @patience) end)
  defp one(dice, _n, target, tally) when dice <= 60, do: expect(tally, fn -> execute(target, "qa") end)
  defp one(dice, _n, target, tally) when dice <= 65, do: expect(tally, fn -> execute(target, "nap") end)
  defp one(dice, _n, target, tally) when dice <= 67, do: expect(tally, fn -> execute(target, "parent") end)
  defp one(dice, _n, target, tally) when dice <= 69, do: expect(tally, fn -> call(target, :get_stats, %{}, @patience) end)

  # An agent whose tool is here, asked again by the next peer where the first dies.
  defp one(dice, _n, target, tally) when dice <= 73 do
    tool = fn %{"what" => what} -> Process.sleep(Enum.random(0..20)) && {:ok, "seen: #{what}"} end
    args = %{program_id: "agent", inputs: %{question: "#{System.unique_integer()}"}}

    expect(tally, fn ->
      case module(target).request(target, :execute_program, args, timeout: @patience, tools: %{look: tool}) do
        # The peers have taken all that earlier ones had been answered.
        {:ok, %{"trajectory" => %{"observation_0" => "seen: " <> _}} = result, %{"journal" => %{"unused" => 0}}} ->
          {:ok, result}

        other -> other
      end
    end)
  end

  # A stream, read to its end or not. It goes on at the next peer where its own dies.
  defp one(dice, _n, target, tally) when dice <= 77 do
    args = %{program_id: "qa", inputs: %{question: "one two three four five #{System.unique_integer()}"}}
    stream = module(target).stream(target, args, timeout: @patience)

    if Enum.random([true, false]) do
      Enum.take(stream, Enum.random(0..3))
      count(tally, :halted)
    else
      expect(tally, fn ->
        {chunks, [last]} = stream |> Enum.to_list() |> Enum.split(-1)
        text = for {:chunk, "answer", text} <- chunks, into: "", do: text

        case last do
          {:ok, %{"answer" => ^text} = result, _meta} -> {:ok, result}
          other -> {other, text}
        end
      end)
    end
  end

  defp one(dice, n, target, tally) when dice <= 84, do: own("own #{n}", target, tally)

  # Too late for most.
  defp one(dice, _n, target, tally) when dice <= 92 do
    timeout = Enum.random(0..20)
    started = now()
    expect(tally, fn -> execute(target, "nap", timeout) end, {:error, :timeout})
    if now() - started > timeout + 1_000, do: count(tally, {:late, target})
  end

  # One that dies while it waits.
  defp one(_dice, _n, target, tally) do
    {pid, ref} = spawn_monitor(fn -> execute(target, "nap") end)
    count(tally, :abandoned)

    receive do
      {:DOWN, ^ref, :process, ^pid, _reason} -> :ok
    after
      Enum.random(0..30) ->
        Process.exit(pid, :kill)
        receive(do: ({:DOWN, ^ref, :process, ^pid, _reason} -> :ok))
    end
  end

  # A program of the caller's own: there from its creation to its removal, whatever dies meanwhile.
  defp own(id, target, tally) do
    expect(tally, fn -> create(target, id) end)
    expect(tally, fn -> execute(target, id) end)
    expect(tally, fn -> call(target, :cleanup, %{program_ids: [id]}, @patience) end)
    expect(tally, fn -> execute(target, id) end, {:error, "Program not found: #{id}"})
    expect(tally, fn -> call(target, :list_programs, %{}, @patience) end)
  end

  ## Thousands of callers at once

  # One crowd after another, for so many seconds; none is left when it returns.
  defp crowds(tally, seconds) do
    until = now() + round(seconds * 1_000)
    Stream.repeatedly(fn -> crowd(tally) end) |> Enum.find(fn _ -> Process.sleep(1_000) && now() >= until end)
  end

  # While the peer has them all: a restart, its death, a hang, the deaths of a third of the callers.
  defp crowd(tally) do
    callers =
      for n <- 1..@crowd, into: %{} do
        {pid, ref} = spawn_monitor(fn -> in_crowd(rem(n, 3), tally) end)
        {ref, {rem(n, 3), pid}}
      end

    eventually(fn -> Bridge.get_status(:crowded).pending > div(@crowd, 4) end, 10_000)

    case Enum.random(1..6) do
      n when n <= 3 -> {:ok, _} = {Bridge.restart(:crowded), count(tally, :restarts_in_a_crowd)}
      4 -> kill_peer(:crowded)
      5 -> hang_peer(:crowded)
      6 -> :ok
    end

    for {_ref, {0, pid}} <- callers, do: Process.exit(pid, :kill)
    for {ref, {_kind, pid}} <- callers, do: receive(do: ({:DOWN, ^ref, :process, ^pid, reason} -> note_crowd_end(tally, reason)))
    count(tally, :crowds)
  end

  # Killed unless it was quicker; all its answer in time; too late for most.
  defp in_crowd(0, tally) do
    count(tally, :abandoned)
    execute(:crowded, "nap")
  end

  defp in_crowd(1, tally) do
    Process.put(:target, :crowded)
    expect(tally, fn -> execute(:crowded, "nap") end)
  end

  defp in_crowd(2, tally) do
    Process.put(:target, :crowded)

    expect(tally, fn ->
      case execute(:crowded, "nap", Enum.random(0..5_000)) do
        {:error, :timeout} -> {:ok, :too_late}
        other -> other
      end
    end)
  end

  defp note_crowd_end(_tally, :killed), do: :ok
  defp note_crowd_end(tally, reason), do: note_end(tally, reason)

  ## Counting

  defp expect(tally, fun, wanted \\ :ok) do
    count(tally, :sent)

    case fun.() do
      {:ok, _result} when wanted == :ok -> count(tally, :ok)
      ^wanted -> count(tally, :as_expected)
      other -> count(tally, {:wrong, Process.get(:target), wanted, other})
    end

    count(tally, :answered)
  end

  defp count(tally, key), do: :ets.update_counter(tally, key, 1, {key, 0})
  defp note_end(_tally, :normal), do: :ok
  defp note_end(tally, reason), do: count(tally, {:worker_ended, reason})
  defp calls(tally), do: :ets.lookup_element(tally, :answered, 2, 0)

  ## What goes wrong meanwhile

  defp kill_now_and_then(tally) do
    Process.sleep(Enum.random(300..2_000))

    case Enum.random(1..12) do
      n when n <= 4 -> kill_peer(:restless)
      n when n <= 8 -> kill_peer(Enum.random(Pool.status(:pool).peers).bridge)
      9 -> Bridge.restart(:restless)
      10 -> hang_peer(:restless)
      11 -> hang_peer(Enum.random(Pool.status(:pool).peers).bridge)
      12 -> Process.exit(Process.whereis(Enum.random(Pool.status(:pool).peers).bridge) || self(), :kill)
    end

    count(tally, :kills)
    kill_now_and_then(tally)
  end

  # What only a pool has. Its coordinator is killed under creations and cleanups, and is away for a moment (more than three
  # deaths in 5 s would end the pool). Peers of it hang: calls that time out there tell its monitor.
  defp harm_the_pool(tally, stop) do
    if Enum.random(1..4) == 1, do: hang_a_peer(tally), else: kill_the_coordinator(tally)
    Process.sleep(Enum.random(2_000..3_000))
    if :atomics.get(stop, 1) == 0, do: harm_the_pool(tally, stop)
  end

  defp kill_the_coordinator(tally) do
    tasks = for n <- 1..8, do: Task.async(fn -> own("kept #{n}", :pool, tally) end)
    Process.sleep(Enum.random(0..50))
    :sys.suspend(:pool)
    with coordinator when is_pid(coordinator) <- Process.whereis(Pool.Handle.coordinator(:pool)), do: Process.exit(coordinator, :kill)
    Process.sleep(Enum.random(0..50))
    :sys.resume(:pool)
    Task.await_many(tasks, :infinity)
    count(tally, :coordinator_kills)
  end

  defp hang_a_peer(tally) do
    with [_ | _] = running <- for(%{state: :running} = peer <- Pool.status(:pool).peers, do: peer) do
      %{os_pid: os_pid, bridge: bridge} = Enum.random(running)
      System.cmd("/bin/sh", ["-c", "kill -STOP #{os_pid}"], stderr_to_stdout: true)
      # One call that times out is enough.
      Bridge.call(bridge, :ping, %{}, 50)
      started = now()
      eventually(fn -> Bridge.get_status(bridge).os_pid != os_pid end)
      if now() - started > 10_000, do: count(tally, {:hung_for, now() - started})
      count(tally, :hangs)
    end
  end

  # Twenty slow calls are in flight at two deaths, and are all answered; who was not, waits for none of them.
  defp kill_twice(tally, stop) do
    args = %{program_id: "sleep", inputs: %{question: "6"}}
    slow = for _ <- 1..20, do: Task.async(fn -> expect(tally, fn -> call(:twice, :execute_program, args, @patience) end) end)
    for _ <- 1..2, do: kill_when_busy(tally, length(slow))
    started = now()
    expect(tally, fn -> execute(:twice, "qa") end)
    if now() - started > @bystander, do: count(tally, {:bystander_waited, now() - started})
    Task.await_many(slow, :infinity)
    if :atomics.get(stop, 1) == 0, do: kill_twice(tally, stop)
  end

  # Returns when the next peer is up.
  defp kill_when_busy(tally, calls) do
    eventually(fn -> match?(%{state: :running, pending: ^calls}, Bridge.get_status(:twice)) end)
    # The peer has what was sent before: it answers in order.
    {:ok, %{"pid" => os_pid}} = call(:twice, :get_stats, %{}, @patience)
    kill_peer(:twice)
    eventually(fn -> match?(%{state: :running, os_pid: next} when next != os_pid, Bridge.get_status(:twice)) end)
    count(tally, :deaths_in_a_row)
  end

  defp kill_peer(bridge), do: signal("-9", bridge)

  # It is replaced.
  defp hang_peer(bridge), do: signal("-STOP", bridge)

  defp signal(signal, bridge) do
    with os_pid when os_pid != nil <- Bridge.get_status(bridge).os_pid,
         do: System.cmd("/bin/sh", ["-c", "kill #{signal} #{os_pid}"], stderr_to_stdout: true)
  end

  ## The books

  defp settle do
    for target <- targets(), do: {:ok, _} = call(target, :ping, %{}, @patience)
    eventually(fn -> Enum.all?([:steady, :restless, :crowded], &(Bridge.get_status(&1).pending == 0)) end)
    eventually(fn -> counted() == [] end)
  end

  # The slots of the pool that count calls which are over.
  defp counted do
    %{counters: counters} = Pool.Handle.fetch(:pool)

    for index <- LoadCounters.indexes(counters),
        busy = LoadCounters.busy(counters, index),
        busy > 0,
        do: {index, busy}
  end

  defp measure do
    {:ok, stats} = Bridge.call(:steady, :get_stats, %{}, @patience)
    Enum.each(Process.list(), &:erlang.garbage_collect/1)
    peer = Bridge.get_status(:steady).os_pid

    %{
      peer_memory: stats["memory_usage"]["rss"],
      beam_memory: :erlang.memory(:total),
      peer_descriptors: entries("/proc/#{peer}/fd"),
      peer_threads: entries("/proc/#{peer}/task"),
      beam_descriptors: entries("/proc/self/fd"),
      ports: length(Port.list()),
      ets_tables: length(:ets.all()),
      # Stores keep 10,000 removed ids each, which is not growth.
      ets_words: Enum.sum(for(table <- :ets.all(), not store?(table), do: :ets.info(table, :memory) || 0)),
      definitions: Enum.sum(for(table <- :ets.all(), store?(table), do: :ets.select_count(table, @definitions))),
      processes: length(Process.list()),
      atoms: :erlang.system_info(:atom_count)
    }
  end

  defp store?(table), do: :ets.info(table, :name) == DSPex.PythonBridge.Programs.Store

  # What is on its way to be freed (peers that come up, on a busy machine) is not growth; what leaks is there at any time.
  defp measure_at_rest(before) do
    eventually(fn -> grown(before, measure()) == [] end)
    measure()
  end

  defp grown(before, later),
    do: for(key <- [:peer_memory, :beam_memory, :ets_words], later[key] > before[key] * @growth, do: key)

  defp entries(folder) do
    case File.ls(folder) do
      {:ok, entries} -> length(entries)
      {:error, _no_proc} -> 0
    end
  end

  # Processes of the soak that are left after so many ms; known by their environment, where /proc shows it.
  defp orphans(ms) do
    eventually(fn -> marked() == [] end, ms)
    marked()
  end

  defp marked do
    mark = "DSPY_BRIDGE_SOAK=#{System.pid()}"

    for file <- Path.wildcard("/proc/[0-9]*/environ"),
        {:ok, env} <- [File.read(file)],
        String.contains?(env, mark),
        do: file |> Path.dirname() |> Path.basename()
  end

  defp report(tally, before, later, counted, orphans) do
    counts = Map.new(:ets.tab2list(tally))
    IO.puts("\n| what | after a third | at the end |\n| --- | --- | --- |")
    for {key, value} <- later, do: IO.puts("| #{key} | #{before[key]} | #{value} |")
    IO.puts("\n#{inspect(Map.filter(counts, fn {key, _} -> is_atom(key) end))}")
    lost = counts[:sent] - counts[:answered]
    wrong = Map.reject(counts, fn {key, _} -> is_atom(key) end)

    # A peer of a pool may be coming up in the one moment and not in the other; code that is loaded late has atoms.
    leaked =
      for key <- [:peer_descriptors, :peer_threads, :beam_descriptors, :ports, :ets_tables, :definitions, :processes, :atoms],
          later[key] > before[key] + if(key == :atoms, do: 100, else: 10),
          do: key

    verdicts = [lost: lost, wrong: wrong, grown: grown(before, later), leaked: leaked, counted: counted, orphans: orphans]
    for {what, found} <- verdicts, do: IO.puts("#{what}: #{inspect(found)}")
    good? = Enum.all?(verdicts, fn {_what, found} -> found in [0, [], %{}] end)
    IO.puts(if good?, do: "nothing lost, nothing left", else: "AMISS")
    if not good?, do: System.halt(1)
  end

  defp eventually(fun, ms \\ 30_000, started \\ now()) do
    cond do
      fun.() -> true
      now() - started > ms -> false
      true -> Process.sleep(20) && eventually(fun, ms, started)
    end
  end

  defp now, do: System.monotonic_time(:millisecond)
end

Soak.run()
