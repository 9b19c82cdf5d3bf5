defmodule DSPex.PythonBridge.Telemetry.DefaultLogger do
  @moduledoc false
  # The handler of `DSPex.PythonBridge.Telemetry.attach_default_logger/1`: a line for each failed or slow call, and each
  # time that calls are sent again. Bridges and monitors log the ends of peers themselves.

  @compile {:no_warn_undefined, :telemetry}

  require Logger

  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Telemetry.Emitter

  @id DSPex.PythonBridge.Telemetry.DefaultLogger
  @events [
    [:dspex, :bridge, :call, :stop],
    [:dspex, :pool, :call, :stop],
    [:dspex, :bridge, :resend]
  ]

  @doc "As `DSPex.PythonBridge.Telemetry.attach_default_logger/1`."
  @spec attach(Logger.level() | keyword()) :: :ok | {:error, :already_exists}
  def attach(opts) do
    config = Map.new(checked!(opts))

    unless Emitter.look() do
      raise "DSPex.PythonBridge.Telemetry.attach_default_logger/1 needs :telemetry: " <>
              "add {:telemetry, \"~> 1.0\"} to the dependencies of your application"
    end

    :telemetry.attach_many(@id, @events, &__MODULE__.handle/4, config)
  end

  @doc "As `DSPex.PythonBridge.Telemetry.detach_default_logger/0`."
  @spec detach() :: :ok | {:error, :not_found}
  def detach, do: if(Emitter.there?(), do: :telemetry.detach(@id), else: {:error, :not_found})

  defp checked!(level) when is_atom(level), do: checked!(level: level)

  defp checked!(opts) do
    level = {:test, &(&1 in Logger.levels()), "a level of Logger, such as :info"}

    ms =
      {:test, &(&1 == :infinity or (is_integer(&1) and &1 >= 0)), "a number of ms, or :infinity"}

    table = [level: {level, :warning}, min_duration: {ms, 10_000}]

    case Table.check(opts, table, "attach_default_logger") do
      {:ok, opts} -> opts
      {:error, error} -> raise error
    end
  end

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
