defmodule DSPex.PythonBridge.Loading do
  @moduledoc """
  A peer that starts is given the programs that earlier ones acknowledged: part of
  `DSPex.PythonBridge.Succession`.

  A program that does not load fails alone: the bridge remembers why, for those who execute it. One of
  whose loading peers die is left out after `max_retries` further attempts. Which one that is shows
  only if they are loaded one by one, so after a first death they are.
  """

  alias DSPex.PythonBridge.{Dispatch, Error, Peer, Programs, Protocol, Report, Server}

  @type state :: %Server{}

  @doc "Gives the peer that starts the first of its programs, or all; whether it has all it needs."
  @spec begin(state()) :: {:loaded | :loading, state()}
  def begin(%{next: next} = state) do
    {deadly, definitions} =
      state.programs
      |> Programs.definitions()
      |> Enum.split_with(fn {_id, stamp, _body} -> deadly?(state, stamp) end)

    died = Error.new(:python_process_died)
    failures = Map.new(deadly, fn {id, _stamp, _body} -> {id, load_error(id, died)} end)
    next = %{next | loads: %{}, to_load: definitions}
    go_on(%{state | next: next, load_failures: failures})
  end

  @doc "The reply to a load has come."
  @spec answered(state(), pos_integer(), binary()) :: {:loaded | :loading, state()}
  def answered(%{next: next} = state, request_id, frame) do
    {{id, _stamp}, loads} = Map.pop!(next.loads, request_id)
    go_on(note(%{state | next: %{next | loads: loads}}, id, frame))
  end

  @doc "Gives the peer the rest at once: somebody does not wait any longer."
  @spec hurry(state()) :: state()
  def hurry(%{next: next} = state), do: load(state, next.to_load, [])

  @doc "A peer died while it was loading."
  @spec blame(state(), Peer.t()) :: state()
  def blame(state, %Peer{loads: loads}) when loads in [nil, %{}], do: state

  # One of many may even be loaded, and its answer be lost with the peer.
  def blame(%{load_carefully?: false} = state, _peer), do: %{state | load_carefully?: true}

  def blame(state, %Peer{loads: loads}) do
    [{_id, stamp}] = Map.values(loads)
    %{state | load_deaths: Map.update(state.load_deaths, stamp, 1, &(&1 + 1))}
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
    {loads, traffic} =
      Enum.map_reduce(definitions, state.traffic, fn {id, stamp, body}, traffic ->
        {request_id, traffic} = Dispatch.own_request(traffic, next.port, body)
        {{request_id, {id, stamp}}, traffic}
      end)

    next = %{next | loads: Map.merge(next.loads, Map.new(loads)), to_load: rest}
    %{state | next: next, traffic: traffic}
  end

  defp note(state, id, frame) do
    case Protocol.decode_reply(frame) do
      {:error, _id, %Error{} = error} ->
        error = load_error(id, error)
        Report.log(state, state.next, :warning, error.message)
        %{state | load_failures: Map.put(state.load_failures, id, error)}

      _loaded ->
        state
    end
  end

  defp load_error(id, error),
    do: %{error | message: "program #{id} could not be loaded again: #{error.message}"}

  defp deadly?(state, stamp),
    do: Map.get(state.load_deaths, stamp, 0) > state.options.max_retries
end
