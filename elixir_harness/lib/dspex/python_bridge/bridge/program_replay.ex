defmodule DSPex.PythonBridge.Bridge.ProgramReplay do
  @moduledoc """
  A peer that starts is given the programs that earlier ones acknowledged: part of
  `DSPex.PythonBridge.Bridge.PeerLifecycle`.

  A program that does not load fails alone: the bridge remembers why, for those who execute it. Which one
  a peer dies of shows only if they are loaded one by one, so after a first death they are. One of which
  `max_retries` further peers in a row die is left out. It is tried again by a restart, or when a minute has
  passed: by the next peer that starts anyway, or by one that is started for it beside the one that serves. If
  that dies of it, too, it is tried after twice the time. Order is kept, but those of which peers died come
  last.
  """

  alias DSPex.PythonBridge.{Error, Programs, Protocol}
  alias DSPex.PythonBridge.Bridge.{Peer, State, Status}
  alias DSPex.PythonBridge.Calls.Dispatcher

  @type state :: State.t()
  @typedoc "The peers in a row that died of a program, and when it may be given to one again, in monotonic ms."
  @type deaths :: {pos_integer(), again_at :: integer()}

  # How long a program is left out at first, and at most: each attempt may cost all others the start of
  # a peer.
  @again_ms 60_000
  @longest_ms 3_600_000
  # Past the longest; the exponent need not grow with the count.
  @max_doublings 6

  @doc "Gives the peer that starts the first of its programs, or all; whether it has all it needs."
  @spec begin(state()) :: {:loaded | :loading, state()}
  def begin(%{next: next} = state) do
    definitions = Programs.Store.definitions(state.programs)
    # Nothing is remembered of a program that was removed or defined anew.
    deaths = Map.take(state.load_deaths, for({_id, stamp, _body} <- definitions, do: stamp))
    now = now()

    {left_out, definitions} =
      Enum.split_with(definitions, fn {_id, stamp, _body} ->
        match?(%{^stamp => {_count, again_at}} when again_at > now, deaths)
      end)

    # Those that were blamed most come last: the first of all takes the import of DSPy along, and is blamed
    # for a peer that anything else kills meanwhile. What kills does so wherever it comes.
    count = fn {_id, stamp, _body} -> deaths |> Map.get(stamp, {0, now}) |> elem(0) end
    careful? = Enum.any?(definitions, &(count.(&1) > 0))
    died = Error.new(:python_process_died)

    failures = Map.new(left_out, fn {id, stamp, _body} -> {stamp, load_error(id, died)} end)

    next = %{
      next
      | loads: %{},
        to_load: Enum.sort_by(definitions, count),
        load_failures: failures
    }

    careful? = state.load_carefully? or careful?
    go_on(%{state | next: next, load_deaths: deaths, load_carefully?: careful?})
  end

  @doc "The reply to a load has come."
  @spec answered(state(), pos_integer(), binary()) :: {:loaded | :loading, state()}
  def answered(%{next: next} = state, request_id, frame) do
    {{id, stamp}, loads} = Map.pop!(next.loads, request_id)
    # The peer has outlived it.
    deaths = Map.delete(state.load_deaths, stamp)
    go_on(note(%{state | next: %{next | loads: loads}, load_deaths: deaths}, id, stamp, frame))
  end

  @doc "Gives the peer the rest at once: somebody does not wait any longer."
  @spec hurry(state()) :: state()
  def hurry(%{next: next} = state), do: load(state, next.to_load, [])

  @doc """
  A peer that started is gone. Gives whether it is known which program it died of, and that it is left out
  from now on. One that the present peer has is not.
  """
  @spec blame(state(), Peer.t()) :: {boolean(), state()}
  def blame(state, %Peer{loads: loads}) when loads in [nil, %{}], do: {false, put_off(state)}

  # One of many may even be loaded, and its answer be lost with the peer.
  def blame(%{load_carefully?: false} = state, _peer),
    do: {false, put_off(%{state | load_carefully?: true})}

  def blame(state, %Peer{loads: loads} = peer) do
    [{id, stamp}] = Map.values(loads)

    if state.peer == nil or is_map_key(state.load_failures, stamp),
      do: count_death(state, peer, id, stamp),
      else: {false, put_off(state)}
  end

  defp count_death(%{options: %{max_retries: most}} = state, peer, id, stamp) do
    {before, _again_at} = Map.get(state.load_deaths, stamp, {0, now()})
    count = before + 1
    wait = if count > most, do: wait_ms(count - most - 1), else: 0
    if wait > 0, do: report_left_out(state, peer, id, count, wait)
    deaths = Map.put(state.load_deaths, stamp, {count, now() + wait})
    {wait > 0, %{state | load_deaths: deaths}}
  end

  @doc """
  A peer beside the present one came to nothing, for whatever reason: those that it was to bring back wait
  longer for the next.
  """
  @spec put_off(state()) :: state()
  def put_off(%{peer: nil} = state), do: state

  def put_off(%{options: %{max_retries: most}} = state) do
    now = now()

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
  To be called when a peer serves, or goes on doing so: if programs were left out, `{:timeout, timer,
  :try_again}` comes to the calling process when one is to be tried again. Not more often than once a minute.
  """
  @spec plan(state()) :: state()
  def plan(%{again_timer: timer} = state) do
    if timer, do: :erlang.cancel_timer(timer, async: true, info: false)

    timer =
      case again_at(state) do
        nil -> nil
        time -> :erlang.start_timer(max(time - now(), @again_ms), self(), :try_again)
      end

    %{state | again_timer: timer}
  end

  @doc "Whether it is time to try one of them again; it may have been removed, or defined anew."
  @spec due?(state()) :: boolean()
  def due?(state) do
    time = again_at(state)
    time != nil and time <= now()
  end

  # One that is not noted was outlived by a peer that did not come to serve.
  defp again_at(state) do
    times =
      for stamp <- left_out(state) do
        {_count, time} = Map.get(state.load_deaths, stamp, {0, now()})
        time
      end

    Enum.min(times, fn -> nil end)
  end

  # Those that the present peer was not given.
  defp left_out(%{load_failures: failures}) when failures == %{}, do: []

  defp left_out(%{load_failures: failures, programs: programs}) do
    for {_id, stamp, _body} <- Programs.Store.definitions(programs),
        left_out?(failures[stamp]),
        do: stamp
  end

  defp left_out?(error), do: match?(%Error{type: :python_process_died}, error)

  @doc "Whether the peer that starts is loading already, and something was left out."
  @spec without_some?(state()) :: boolean()
  def without_some?(%{next: nil}), do: false

  def without_some?(%{next: next}),
    do: Enum.any?(next.load_failures, fn {_stamp, error} -> left_out?(error) end)

  @doc "Why the present peer does not have a program, as far as it is due to its loading."
  @spec failure(state(), Programs.Store.id()) :: Error.t() | nil
  def failure(state, id) do
    with {stamp, _body} <- Programs.Store.get(state.programs, id), do: state.load_failures[stamp]
  end

  defp wait_ms(attempts),
    do: min(@again_ms * 2 ** min(attempts, @max_doublings), @longest_ms)

  defp report_left_out(state, peer, id, count, wait) do
    text =
      "program #{shown(id)} is left out: #{count} Python processes in a row died while they " <>
        "loaded it; it is tried again in #{div(wait, 1_000)} s, by Bridge.restart, or when it is " <>
        "created anew"

    Status.log(state, peer, :error, text)
  end

  @doc "Somebody wants all programs tried again, those that were left out, too."
  @spec try_all(state()) :: state()
  def try_all(state) do
    now = now()
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
        error = load_error(id, error)
        Status.log(state, state.next, :warning, error.message)
        put_in(state.next.load_failures[stamp], error)

      _loaded ->
        state
    end
  end

  defp load_error(id, error),
    do: %{error | message: "program #{shown(id)} could not be loaded again: #{error.message}"}

  # A line, whatever the id is.
  defp shown(id), do: id |> inspect(printable_limit: 100) |> String.trim("\"")

  defp now, do: System.monotonic_time(:millisecond)
end
