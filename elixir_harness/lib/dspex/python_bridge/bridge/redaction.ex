defmodule DSPex.PythonBridge.Bridge.Redaction do
  @moduledoc false
  # Removes keys from texts of the peer. (Secrets among the options are sealed: see `DSPex.PythonBridge.Options`.)

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
end
