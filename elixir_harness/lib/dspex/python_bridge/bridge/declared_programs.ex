defmodule DSPex.PythonBridge.Bridge.DeclaredPrograms do
  @moduledoc false
  # Has a peer load the declared programs, so that the status tells which of them fail, and why: part of
  # `DSPex.PythonBridge.Bridge.PeerLifecycle`.
  #
  # Calls do not wait for it: the peer has the definitions of all programs, and loads one with the first run that needs
  # it. Each program is loaded like this once in a bridge's life, one after the other. If Python dies meanwhile, the program
  # is named, and loaded once more behind the others: something else may have killed it. Calls that were in flight are not
  # blamed for it.

  alias DSPex.PythonBridge.{Error, Programs, Protocol}
  alias DSPex.PythonBridge.Bridge.{Peer, State, Status}
  alias DSPex.PythonBridge.Calls.Dispatcher
  alias DSPex.PythonBridge.Programs.Declared

  @typedoc "The program that is being loaded: the port of the peer, the id of the request, the definition."
  @type loading :: {port(), pos_integer(), Programs.Store.definition()}

  @doc "Loads the next program, if a peer serves and loads none."
  @spec load(State.t()) :: State.t()
  def load(%{peer: %Peer{port: port}, loading: nil, to_load: [id | rest]} = state) do
    state = %{state | to_load: rest}

    with {stamp, body} <- Programs.Store.get(state.in_flight.programs, id),
         true <- Programs.Store.declared?(stamp) do
      {request_id, in_flight} = Dispatcher.own_request(state.in_flight, port, body)
      %{state | in_flight: in_flight, loading: {port, request_id, {id, stamp, body}}}
    else
      _removed_or_created -> load(state)
    end
  end

  def load(state), do: state

  @doc "Handles the reply of the peer."
  @spec loaded(State.t(), binary()) :: State.t()
  def loaded(%{loading: {_port, _request_id, definition}} = state, frame) do
    state = %{state | loading: nil}

    case Protocol.decode_reply(frame) do
      {:error, _id, %Error{} = error} -> state |> failed(definition, error) |> load()
      _loaded -> load(%{state | failed: Map.delete(state.failed, elem(definition, 1))})
    end
  end

  @doc "Handles the end of a peer, which may have died of the program."
  @spec lost(State.t(), port(), :died | :replaced) :: {loading? :: boolean(), State.t()}
  def lost(%{loading: {port, _request_id, {id, stamp, _} = definition}} = state, port, :died) do
    again = if is_map_key(state.failed, stamp), do: [], else: [id]
    state = %{state | loading: nil, to_load: state.to_load ++ again}
    {true, failed(state, definition, Error.new(:python_process_died))}
  end

  def lost(%{loading: {port, _request_id, {id, _stamp, _body}}} = state, port, :replaced),
    do: {true, %{state | loading: nil, to_load: [id | state.to_load]}}

  def lost(state, _port, _how), do: {false, state}

  defp failed(state, {id, stamp, _body}, error) do
    error = Declared.not_loaded(id, error)
    Status.log(state, state.peer, :warning, error.message)
    %{state | failed: Map.put(state.failed, stamp, error)}
  end
end
