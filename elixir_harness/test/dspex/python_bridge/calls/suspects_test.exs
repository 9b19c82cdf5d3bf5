defmodule DSPex.PythonBridge.Calls.SuspectsTest do
  @moduledoc "Calls that kill their peer are told from the others, without a peer; and nobody else waits for that."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Calls, Options, Programs}
  alias DSPex.PythonBridge.Calls.{Dispatcher, Handover, InFlight, Request, Suspects}
  alias DSPex.Test.Deaths

  @moduletag timeout: 30_000

  # Calls are known by their numbers; those in `deadly` kill the peer when it has them. Gives each
  # call's answer, and how often each was sent.
  defp play(count, deadly, max_retries) do
    {:ok, options} = Options.new(max_retries: max_retries)
    in_flight = InFlight.new(options, Programs.Store.new())
    refs = Map.new(1..count, fn n -> {:erlang.alias(), n} end)

    in_flight =
      Enum.reduce(refs, serve(in_flight), fn {ref, n}, in_flight ->
        accept(in_flight, ref, "#{n}")
      end)

    sent = rounds(in_flight, MapSet.new(deadly, &"#{&1}"), %{})

    answers =
      for {ref, n} <- refs, into: %{} do
        assert_received {^ref, answer}
        refute_received {^ref, _again}
        {n, answer}
      end

    {answers, sent}
  end

  defp accept(in_flight, ref, body, deaths \\ 0, change \\ nil) do
    request = %Request{ref: ref, pid: self(), body: body, deaths: deaths, change: change}
    Calls.accept(in_flight, request)
  end

  defp serve(in_flight) do
    # It takes all, and answers nothing by itself.
    args = ["-c", "while read -r line; do :; done"]
    port = Port.open({:spawn_executable, "/bin/sh"}, [{:packet, 4}, args: args])
    in_flight |> Handover.attach(port) |> Handover.serve(port)
  end

  defp rounds(in_flight, deadly, sent) do
    at_peer = for {id, call} <- Calls.Table.at(in_flight.calls, in_flight.to), do: {id, call.body}

    cond do
      at_peer == [] ->
        assert InFlight.pending(in_flight) == 0
        Port.close(in_flight.to)
        sent

      Enum.any?(at_peer, fn {_id, n} -> n in deadly end) ->
        port = in_flight.to

        sent =
          for {_id, n} <- at_peer, reduce: sent, do: (sent -> Map.update(sent, n, 1, &(&1 + 1)))

        in_flight = Handover.lost(in_flight, port, :died)
        Port.close(port)
        rounds(serve(in_flight), deadly, sent)

      true ->
        # One answer at a time: what else is in flight then is with what follows.
        {id, _n} = Enum.random(at_peer)
        {:ok, in_flight} = Calls.deliver(in_flight, id, "reply")
        rounds(in_flight, deadly, sent)
    end
  end

  for max_retries <- 0..5, count <- [1, 3, 21] do
    test "one among #{count} with #{max_retries} retries" do
      deadly = Enum.random(1..unquote(count))
      {answers, sent} = play(unquote(count), [deadly], unquote(max_retries))
      assert answers[deadly] == {:error, :python_process_died}
      assert sent["#{deadly}"] == 1 + unquote(max_retries)

      if unquote(max_retries) > 0 do
        for {n, answer} <- answers, n != deadly, do: assert(answer == {:frame, "reply"})
      end
    end
  end

  test "several: each is sent 1 + max_retries times, and no other call fails" do
    {answers, sent} = play(40, [3, 4, 17, 40], 3)

    for {n, answer} <- answers do
      if n in [3, 4, 17, 40],
        do: assert({answer, sent["#{n}"]} == {{:error, :python_process_died}, 4}),
        else: assert(answer == {:frame, "reply"})
    end
  end

  describe "in simulated time" do
    @slow_ms 6_000

    defp calls(count, answer_ms, killers, kills_ms) do
      deadly = MapSet.new(Enum.take_random(1..(count + killers), killers))

      Map.new(1..(count + killers), fn id ->
        {id, {0, if(id in deadly, do: {:kills, kills_ms}, else: {:answers, answer_ms})}}
      end)
    end

    # What both kinds of calls have come to.
    defp outcome(calls, most, kills \\ []) do
      played = Deaths.play(calls, most, kills)
      assert Enum.max(for {_id, call} <- played, do: call.waited) <= 5_000
      {deadly, good} = Enum.split_with(played, &match?({_at, {:kills, _ms}}, calls[elem(&1, 0)]))
      for {_id, call} <- deadly, do: assert(call.answer == :died)

      {Enum.count(good, &(elem(&1, 1).answer == :died)),
       for({_id, call} <- deadly, do: call.sent)}
    end

    for most <- [1, 2, 3, 5], count <- [1, 5, 20, 100, 256], answer_ms <- [20, @slow_ms] do
      test "a call that kills at once beside #{count} of #{answer_ms} ms, #{most} retries: it alone is lost" do
        # On a busy machine, the death of a process is seen later.
        for at_once <- [1..10, 60..90] do
          calls = calls(unquote(count), unquote(answer_ms), 1, fn -> Enum.random(at_once) end)
          {lost, [sent]} = outcome(calls, unquote(most))
          assert lost == 0
          # Beside so many the call sent before or after it may be the one.
          more = if unquote(count) > 20 and unquote(most) < 3, do: 1, else: 0
          assert sent in (1 + unquote(most))..(1 + unquote(most) + more)
        end
      end
    end

    for most <- [1, 3], killers <- [2, 4], answer_ms <- [20, @slow_ms] do
      test "#{killers} calls that kill at once beside 20 of #{answer_ms} ms, #{most} retries" do
        calls = calls(20, unquote(answer_ms), unquote(killers), fn -> 5 end)
        assert {0, _sent} = outcome(calls, unquote(most))
      end
    end

    for most <- [1, 3], kills_ms <- [500, 3_000] do
      test "a call that kills after #{kills_ms} ms beside 256 short ones, #{most} retries: it alone is lost" do
        kills_ms = fn -> unquote(kills_ms) + :rand.uniform(50) end
        assert outcome(calls(256, 20, 1, kills_ms), unquote(most)) == {0, [1 + unquote(most)]}
      end
    end

    test "a call that kills after 3 s beside a few slow ones: it alone is lost" do
      for count <- [1, 2, 4, 8] do
        assert {0, _sent} = outcome(calls(count, @slow_ms, 1, fn -> 3_000 end), 3)
      end
    end

    test "slow calls that come all the time lose nearly nothing by one that kills, at once or later" do
      for kills_ms <- [5, 500, 3_000] do
        deadly = Enum.random(100..300)
        kills = {:kills, fn -> kills_ms + :rand.uniform(50) end}
        answers = {:answers, @slow_ms}
        calls = Map.new(1..600, &{&1, {&1 * 50, if(&1 == deadly, do: kills, else: answers)}})
        {lost, _sent} = outcome(calls, 3)
        assert lost <= if(kills_ms == 5, do: 0, else: 60)
      end
    end

    test "one that kills after another time each time ends as well" do
      for most <- [1, 3], count <- [1, 20, 100] do
        calls = calls(count, @slow_ms, 1, fn -> :rand.uniform(5_000) end)
        {_lost, [sent]} = outcome(calls, most)
        assert sent <= 1 + most + 10
      end
    end

    test "two deaths that no call has caused lose nothing" do
      for most <- [2, 3], count <- [20, 100, 256] do
        assert {0, []} = outcome(calls(count, @slow_ms, 0, nil), most, [100, 900])
        assert {0, []} = outcome(calls(count, @slow_ms, 0, nil), most, [5_000, 6_000])
      end
    end
  end

  describe "no other call waits" do
    defp at_peer(in_flight),
      do: for({_id, call} <- Calls.Table.at(in_flight.calls, in_flight.to), do: call.body)

    test "for suspects: each is sent as it comes" do
      {:ok, options} = Options.new(max_retries: 1)
      in_flight = serve(InFlight.new(options, Programs.Store.new()))
      suspects = for n <- 1..256, do: "suspect #{n}"
      in_flight = Enum.reduce(suspects, in_flight, &accept(&2, nil, &1, 1))
      assert at_peer(in_flight) == ["suspect 1"]
      in_flight = accept(in_flight, nil, "fresh", 0)
      assert at_peer(in_flight) == ["suspect 1", "fresh"]
      # The others follow in their windows, or when the last one was answered.
      {:ok, in_flight} = Calls.deliver(in_flight, 1, "reply")
      assert at_peer(in_flight) == ["suspect 256", "fresh"]
      assert_receive {:timeout, timer, :window}, 5_000
      in_flight = Dispatcher.window_over(in_flight, timer)
      # The timer of the first one was cancelled, or comes too late.
      assert at_peer(Dispatcher.window_over(in_flight, make_ref())) == at_peer(in_flight)
      assert "suspect 255" in at_peer(in_flight)
    end

    test "after a death with a suspect: what comes then is sent at once, what was in flight one at a time" do
      {:ok, options} = Options.new(max_retries: 1)
      in_flight = serve(InFlight.new(options, Programs.Store.new()))
      in_flight = in_flight |> accept(nil, "suspect", 0) |> accept(nil, "other", 0)
      in_flight = serve(Handover.lost(in_flight, in_flight.to, :died))
      assert at_peer(in_flight) == ["other"]
      in_flight = accept(in_flight, nil, "fresh", 0)
      assert at_peer(in_flight) == ["other", "fresh"]
      # That one is blamed; the other two are sent.
      in_flight = Handover.lost(in_flight, in_flight.to, :died)
      assert InFlight.pending(in_flight) == 2
      in_flight = serve(accept(in_flight, nil, "late", 0))
      assert Enum.sort(at_peer(in_flight)) == ["fresh", "late"]
    end
  end

  test "a replacement is not a death: it is held against nobody" do
    {:ok, options} = Options.new(max_retries: 1)
    in_flight = serve(InFlight.new(options, Programs.Store.new()))
    in_flight = accept(in_flight, nil, "call", 0)

    in_flight =
      for _ <- 1..5, reduce: in_flight do
        in_flight -> serve(Handover.lost(in_flight, in_flight.to, :replaced))
      end

    assert [{1, %{deaths: 0}}] = Calls.Table.at(in_flight.calls, in_flight.to)
    assert in_flight.suspects == %Suspects{}
  end

  test "a suspect that was given up makes room for the next" do
    {:ok, options} = Options.new(max_retries: 1)
    in_flight = serve(InFlight.new(options, Programs.Store.new()))
    accept = &accept(&1, nil, &2, 1)
    in_flight = in_flight |> accept.("one") |> accept.("two") |> accept.("three")
    # One that waits, then the one on trial.
    in_flight = in_flight |> Calls.abandon(2) |> Calls.abandon(1)
    assert [{3, %{body: "three"}}] = Calls.Table.at(in_flight.calls, in_flight.to)
    assert InFlight.pending(in_flight) == 1
  end

  test "a suspect waits while the programs are being given to the next peer" do
    {:ok, options} = Options.new(max_retries: 1)
    in_flight = Handover.hold_changes(serve(InFlight.new(options, Programs.Store.new())))
    in_flight = accept(in_flight, nil, "create", 1, {:create, "p", nil})
    assert Calls.Table.at(in_flight.calls, in_flight.to) == []
    in_flight = Handover.serve(in_flight, in_flight.to)
    assert [{1, %{body: "create"}}] = Calls.Table.at(in_flight.calls, in_flight.to)
  end
end
