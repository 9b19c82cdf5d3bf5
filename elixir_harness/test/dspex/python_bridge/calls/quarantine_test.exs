defmodule DSPex.PythonBridge.Calls.QuarantineTest do
  @moduledoc "Calls that kill their peer are separated from the others: a simulation, without a peer."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Calls, Options, Programs}
  alias DSPex.PythonBridge.Calls.{Handover, InFlight, Quarantine, Request}

  doctest Quarantine

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

  test "a suspect that outlives the time of the last peer is acquitted, and the next are tried" do
    quarantine = Enum.reduce(1..4, Quarantine.new(2), &Quarantine.add(&2, &1, 2))
    {[1], quarantine} = Quarantine.take_group(quarantine)
    quarantine = Quarantine.try_out(quarantine, [1])
    assert Quarantine.trying?(quarantine)
    assert_receive {:timeout, timer, :acquit}, 5_000
    assert Quarantine.trying?(Quarantine.acquit(quarantine, make_ref()))
    refute Quarantine.trying?(Quarantine.acquit(quarantine, timer))
  end

  test "fresh calls wait while suspects are tried; a ping does not" do
    {:ok, options} = Options.new(max_retries: 1)
    in_flight = serve(InFlight.new(options, Programs.Store.new()))
    accept = &accept(&1, nil, &2, &3)
    in_flight = in_flight |> accept.("suspect", 1) |> accept.("fresh", 0)
    in_flight = accept.(in_flight, ~s(,"command":"ping"}), 0)

    at_peer = fn in_flight ->
      for {_id, call} <- Calls.Table.at(in_flight.calls, in_flight.to), do: call.body
    end

    assert at_peer.(in_flight) == ["suspect", ~s(,"command":"ping"})]
    {:ok, in_flight} = Calls.deliver(in_flight, 1, "reply")
    assert at_peer.(in_flight) == ["fresh", ~s(,"command":"ping"})]
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

  test "a call that ran long before its peer died does not hold all others as long" do
    assert Quarantine.learn(Quarantine.new(3), 100_000).acquit_ms == 5_000
    assert Quarantine.learn(Quarantine.new(3), 1).acquit_ms == 1_000
  end
end
