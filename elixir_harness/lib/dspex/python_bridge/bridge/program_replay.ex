defmodule DSPex.PythonBridge.Bridge.ProgramReplay do
  @moduledoc false
  # Loads the programs that were declared, or that earlier peers acknowledged, into a peer that starts: part of
  # `DSPex.PythonBridge.Bridge.PeerLifecycle`.
  #
  # A program that does not load fails alone: the bridge keeps the reason for those who execute it. Which program a
  # peer dies of only shows if they are loaded one by one, so after a first death they are. A program of which
  # `max_retries` further peers in a row die is left out. It is tried again by a restart, or after a minute: by the next
  # peer that starts anyway, or by one that is started for it while another serves. If that one dies of it, too, the
  # wait doubles. The order of programs is kept, but those of which peers died come last.

  alias DSPex.PythonBridge.{Calls, Error, Programs, Protocol}
  alias DSPex.PythonBridge.Bridge.{Peer, State, Status}
  alias DSPex.PythonBridge.Calls.Dispatcher
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Programs.Declared

  # How long a program is left out at first, and at most: each attempt may cost all others a start of a peer.
  @again_ms 60_000
  @longest_ms 3_600_000
  # A minute doubled six times is past the maximum.
  @max_doublings 6

  @doc "Gives the peer that starts the first of its programs, or all; `:loaded` if it needs none."
  @spec begin(State.t()) :: {:loaded | :loading, State.t()}
  def begin(%{next: next} = state) do
    definitions = Programs.Store.definitions(state.programs)
    # Deaths of a program that was removed or defined again are forgotten.
    deaths = Map.take(state.load_deaths, for({_id, stamp, _body} <- definitions, do: stamp))
    now = Deadline.now()

    {left_out, definitions} =
      Enum.split_with(definitions, fn {_id, stamp, _body} ->
        match?(%{^stamp => {_count, again_at}} when again_at > now, deaths)
      end)

    # Those with the most deaths come last. The first program to load includes the import of DSPy, so it is blamed for
    # a peer that something else kills then; a program that kills does so in any place.
    count = fn {_id, stamp, _body} -> deaths |> Map.get(stamp, {0, now}) |> elem(0) end
    careful? = Enum.any?(definitions, &(count.(&1) > 0))
    died = Error.new(:python_process_died)

    failures =
      Map.new(left_out, fn {id, stamp, _body} -> {stamp, Declared.not_loaded(id, died)} end)

    to_load = Enum.sort_by(definitions, count)
    next = %{next | loads: %{}, to_load: to_load, load_failures: failures}
    careful? = state.load_carefully? or careful?
    go_on(%{state | next: next, load_deaths: deaths, load_carefully?: careful?})
  end

  @doc "Handles the reply to a load."
  @spec answered(State.t(), pos_integer(), binary()) :: {:loaded | :loading, State.t()}
  def answered(%{next: next} = state, request_id, frame) do
    {{id, stamp}, loads} = Map.pop!(next.loads, request_id)
    # The peer has survived it.
    deaths = Map.delete(state.load_deaths, stamp)
    go_on(note(%{state | next: %{next | loads: loads}, load_deaths: deaths}, id, stamp, frame))
  end

  @doc "Gives the peer the rest at once, since calls wait no longer."
  @spec hurry(State.t()) :: State.t()
  def hurry(%{next: next} = state), do: load(state, next.to_load, [])

  @doc """
  Blames a program for the end of a peer that was starting. Returns whether the program is known and left out from
  now on; one that the present peer has is never left out.
  """
  @spec blame(State.t(), Peer.t()) :: {boolean(), State.t()}
  def blame(state, %Peer{loads: loads}) when loads in [nil, %{}], do: {false, put_off(state)}

  # With many at once it is not known which: some may be loaded, and their replies lost with the peer.
  def blame(%{load_carefully?: false} = state, _peer),
    do: {false, put_off(%{state | load_carefully?: true})}

  def blame(state, %Peer{loads: loads} = peer) do
    [{id, stamp}] = Map.values(loads)

    if state.peer == nil or is_map_key(state.load_failures, stamp),
      do: count_death(state, peer, id, stamp),
      else: {false, put_off(state)}
  end

  defp count_death(%{options: %{max_retries: most}} = state, peer, id, stamp) do
    {before, _again_at} = Map.get(state.load_deaths, stamp, {0, Deadline.now()})
    count = before + 1
    wait = if count > most, do: wait_ms(count - most - 1), else: 0
    if wait > 0, do: report_left_out(state, peer, id, count, wait)
    deaths = Map.put(state.load_deaths, stamp, {count, Deadline.now() + wait})
    {wait > 0, %{state | load_deaths: deaths}}
  end

  @doc """
  To be called when a peer that was started while another serves has failed, for whatever reason: the programs that
  it was to load again wait longer for the next.
  """
  @spec put_off(State.t()) :: State.t()
  def put_off(%{peer: nil} = state), do: state

  def put_off(%{options: %{max_retries: most}} = state) do
    now = Deadline.now()

    deaths =
      for stamp <- left_out(state), reduce: state.load_deaths do
        deaths ->
          case Map.get(deaths, stamp, {most, now}) do
            {count, due} when due <= now ->
              Map.put(deaths, stamp, {count + 1, now + wait_ms(max(count - most, 0))})

            _not_tried ->
              deaths
          end
      end

    %{state | load_deaths: deaths}
  end

  ## Again, while the present peer serves

  @doc """
  Plans the next attempt to load programs that were left out, if there are any: `{:timeout, timer, :try_again}` comes
  to the calling process, at most once a minute. To be called when a peer serves, or goes on serving.
  """
  @spec plan(State.t()) :: State.t()
  def plan(%{again_timer: timer} = state) do
    if timer, do: :erlang.cancel_timer(timer, async: true, info: false)

    timer =
      case again_at(state) do
        nil -> nil
        time -> :erlang.start_timer(max(time - Deadline.now(), @again_ms), self(), :try_again)
      end

    %{state | again_timer: timer}
  end

  @doc "Whether it is time to try one of them again; it may have been removed, or defined again."
  @spec due?(State.t()) :: boolean()
  def due?(state) do
    time = again_at(state)
    time != nil and time <= Deadline.now()
  end

  # A program without deaths was survived by a peer that did not get to serve.
  defp again_at(state) do
    times =
      for stamp <- left_out(state) do
        {_count, time} = Map.get(state.load_deaths, stamp, {0, Deadline.now()})
        time
      end

    Enum.min(times, fn -> nil end)
  end

  # The stamps of those that the present peer was not given.
  defp left_out(%{load_failures: failures}) when failures == %{}, do: []

  defp left_out(%{load_failures: failures, programs: programs}) do
    for {_id, stamp, _body} <- Programs.Store.definitions(programs),
        left_out?(failures[stamp]),
        do: stamp
  end

  defp left_out?(error), do: match?(%Error{type: :python_process_died}, error)

  @doc "Whether a peer that starts is loading already, without some of the programs."
  @spec without_some?(State.t()) :: boolean()
  def without_some?(%{next: nil}), do: false

  def without_some?(%{next: next}),
    do: Enum.any?(next.load_failures, fn {_stamp, error} -> left_out?(error) end)

  @doc "Why the present peer does not have a program; nil if it did not fail."
  @spec failure(State.t(), Programs.Store.id()) :: Error.t() | nil
  def failure(state, id) do
    case Programs.Store.get(state.programs, id) do
      {stamp, _body} -> state.load_failures[stamp]
      nil -> Programs.Store.undeclared(state.programs)[id]
    end
  end

  @doc "To be called with each reply to a caller: a pool may have had a program created again."
  @spec created(State.t(), pos_integer(), binary()) :: State.t()
  def created(%{load_failures: failures} = state, _id, _frame) when failures == %{}, do: state

  def created(%{load_failures: failures} = state, id, frame) do
    with %{change: {:create, _id, stamp}} <- Calls.Table.get(state.in_flight.calls, id),
         true <- is_map_key(failures, stamp) and Protocol.success?(frame),
         do: %{state | load_failures: Map.delete(failures, stamp)},
         else: (_another -> state)
  end

  defp wait_ms(attempts),
    do: min(@again_ms * 2 ** min(attempts, @max_doublings), @longest_ms)

  defp report_left_out(state, peer, id, count, wait) do
    text =
      "program #{Declared.shown(id)} is left out: #{count} Python processes in a row died while they " <>
        "loaded it; it is tried again in #{div(wait, 1_000)} s, by Bridge.restart, or when it is " <>
        "created anew"

    Status.log(state, peer, :error, text)
  end

  @doc "Makes programs that were left out due at once."
  @spec try_all(State.t()) :: State.t()
  def try_all(state) do
    now = Deadline.now()
    deaths = Map.new(state.load_deaths, fn {stamp, {count, _later}} -> {stamp, {count, now}} end)
    %{state | load_deaths: deaths}
  end

  defp go_on(%{next: %Peer{loads: loads, to_load: to_load}} = state) do
    case {map_size(loads), to_load, state.load_carefully?} do
      {0, [], _} -> {:loaded, %{state | load_carefully?: false}}
      {0, [first | rest], true} -> {:loading, load(state, [first], rest)}
      {_, _, true} -> {:loading, state}
      {_, _, false} -> {:loading, load(state, to_load, [])}
    end
  end

  defp load(%{next: next} = state, definitions, rest) do
    {loads, in_flight} =
      Enum.map_reduce(definitions, state.in_flight, fn {id, stamp, body}, in_flight ->
        {request_id, in_flight} = Dispatcher.own_request(in_flight, next.port, body)
        {{request_id, {id, stamp}}, in_flight}
      end)

    next = %{next | loads: Map.merge(next.loads, Map.new(loads)), to_load: rest}
    %{state | next: next, in_flight: in_flight}
  end

  defp note(state, id, stamp, frame) do
    case Protocol.decode_reply(frame) do
      {:error, _id, %Error{} = error} ->
        error = Declared.not_loaded(id, error)
        Status.log(state, state.next, :warning, error.message)
        put_in(state.next.load_failures[stamp], error)

      _loaded ->
        state
    end
  end
end
