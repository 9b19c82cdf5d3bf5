defmodule DSPex.PythonBridge.Bridge.Redaction do
  @moduledoc false
  # Removes secrets and contents from what crash reports, `:sys.get_status/1` and error messages show of a bridge and of
  # what is above it.
  # (Secrets among the options are sealed in the state: see `DSPex.PythonBridge.Options`.)

  alias DSPex.PythonBridge.Bridge.State
  alias DSPex.PythonBridge.Options

  # Shorter strings are not keys, and may be common words.
  @shortest 8

  @doc """
  Removes keys from a string of the peer: the strings in `:lm_options`, and the values of the environment, `:env` and
  the BEAM's own, whose names indicate a secret.
  """
  @spec redact(String.t(), Options.t()) :: String.t()
  def redact(text, %Options{} = options) do
    secrets =
      for {name, value} <- Map.merge(System.get_env(), options.env.()),
          name =~ ~r/KEY|TOKEN|SECRET|PASSW|AUTH|CREDENTIAL|OPTIONS/i,
          secret <- [value | strings(value)],
          String.length(secret) >= @shortest,
          do: secret

    if secrets == [], do: text, else: String.replace(text, secrets, "[redacted]")
  end

  defp strings(value) do
    case JSON.decode(value) do
      {:ok, options} -> leaves(options)
      {:error, _reason} -> []
    end
  end

  defp leaves(text) when is_binary(text), do: [text]
  defp leaves(%{} = options), do: options |> Map.values() |> leaves()
  defp leaves(list) when is_list(list), do: Enum.flat_map(list, &leaves/1)
  defp leaves(_other), do: []

  @doc "For `c:GenServer.format_status/1`. What it does not know is not shown."
  @spec format_status(map()) :: map()
  def format_status(status) do
    Map.new(status, fn
      {:state, %State{} = state} ->
        {:state, %{state | in_flight: :redacted, loading: :redacted, failed: :redacted}}

      {:state, _broken} ->
        {:state, :redacted}

      {:message, message} ->
        {:message, message(message)}

      {:log, log} when is_list(log) ->
        {:log, Enum.map(log, &log_event/1)}

      # The reason has no contents: see DSPex.PythonBridge.OTP.ServerGuard.
      other ->
        other
    end)
  end

  defp message({:request, %{ref: ref, pid: pid, timeout: timeout}}),
    do: {:request, plain(ref), plain(pid), plain(timeout), :redacted}

  defp message(message) when is_tuple(message),
    do: message |> Tuple.to_list() |> Enum.map(&plain/1) |> List.to_tuple()

  defp message(message), do: plain(message)

  # Terms that cannot have contents.
  defp plain(term)
       when is_atom(term) or is_pid(term) or is_reference(term) or is_port(term) or
              is_integer(term),
       do: term

  defp plain(_contents), do: :redacted

  # The events of :sys.log/2.
  defp log_event({:in, message}), do: {:in, message(message)}
  defp log_event({:in, message, state}), do: {:in, message(message), plain(state)}
  defp log_event(_event), do: :redacted
end
