defmodule DSPex.PythonBridge.Telemetry.DefaultLogger do
  @moduledoc false
  # The handler of `DSPex.PythonBridge.Telemetry.attach_default_logger/1`: a line for each failed or slow call, and each
  # time that calls are sent again. Bridges and monitors log the ends of peers themselves.

  require Logger

  @doc "The events that it handles."
  @spec events() :: [[atom()]]
  def events,
    do: [
      [:dspex, :bridge, :call, :stop],
      [:dspex, :pool, :call, :stop],
      [:dspex, :bridge, :resend]
    ]

  @doc "The handler."
  @spec handle([atom()], map(), map(), map()) :: :ok
  def handle([:dspex, kind, :call, :stop], %{duration: duration} = measured, call, config) do
    ms = System.convert_time_unit(duration, :native, :millisecond)
    failed? = call.result not in [:ok, :cancelled]

    if failed? or (config.min_duration != :infinity and ms >= config.min_duration) do
      text = [what(call), ": ", Atom.to_string(call.result), " after #{ms} ms", usage(measured)]
      log(config, kind, call[kind], text)
    else
      :ok
    end
  end

  def handle([:dspex, :bridge, :resend], %{count: count}, again, config) do
    text = ["calls sent again: #{count} (", Atom.to_string(again.reason), ?)]
    log(config, :bridge, again.bridge, text)
  end

  defp log(config, kind, name, text) do
    Logger.log(config.level, fn -> ["#{kind} #{inspect(name)}: ", text] end, [{kind, name}])
  end

  # Callers may pass anything.
  defp what(%{program_id: nil, command: command}), do: shown(command || "a call")
  defp what(%{program_id: id, command: command}), do: [shown(command), " of ", shown(id)]

  defp shown(text), do: text |> String.slice(0, 100) |> inspect() |> String.trim("\"")

  defp usage(%{lm_calls: calls, input_tokens: input, output_tokens: output}) when calls > 0,
    do: ", LM calls: #{calls}, tokens: #{input} + #{output}"

  defp usage(_none), do: []
end
