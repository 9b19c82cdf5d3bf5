defmodule :telemetry do
  @moduledoc """
  A stand-in for the module of the Hex package `telemetry` 1.x: what an application calls to attach handlers, and
  what this project calls. Not compiled with the project, whose tests run as in an application without it, but
  where a test asks for it: `DSPex.Test.Telemetry`.
  """

  require Logger

  def attach(id, event, function, config), do: attach_many(id, [event], function, config)

  def attach_many(id, events, function, config) when is_function(function, 4) do
    if List.keymember?(handlers(), id, 0) do
      {:error, :already_exists}
    else
      put(for(event <- events, do: {id, event, function, config}) ++ handlers())
    end
  end

  def detach(id) do
    if List.keymember?(handlers(), id, 0),
      do: put(Enum.reject(handlers(), &(elem(&1, 0) == id))),
      else: {:error, :not_found}
  end

  def list_handlers(prefix) do
    for {id, event, function, config} <- handlers(),
        List.starts_with?(event, prefix),
        do: %{id: id, event_name: event, function: function, config: config}
  end

  def execute(event, measurements, metadata \\ %{})
      when is_list(event) and is_map(measurements) and is_map(metadata) do
    for {id, ^event, function, config} <- handlers() do
      try do
        function.(event, measurements, metadata, config)
      catch
        kind, reason ->
          detach(id)
          what = %{handler_id: id, event_name: event, kind: kind, reason: reason}
          what = Map.merge(what, %{handler_config: config, stacktrace: __STACKTRACE__})
          now = %{monotonic_time: System.monotonic_time(), system_time: System.system_time()}
          execute([:telemetry, :handler, :failure], now, what)
          Logger.error("Handler #{inspect(id)} has failed and has been detached.")
      end
    end

    :ok
  end

  defp handlers, do: :persistent_term.get({__MODULE__, :handlers}, [])
  defp put(handlers), do: :persistent_term.put({__MODULE__, :handlers}, handlers)
end
