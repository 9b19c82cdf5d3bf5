defmodule DSPex.Test.SilentLM do
  @moduledoc """
  A server on loopback that takes requests for an LM and never answers them: an LM call that takes
  for ever. It sends its owner, for each: `{:lm_request, first_line}`, and of each connection that
  the other side closed: `:lm_closed`.
  """

  @doc "Starts it for the calling process; gives its port."
  def start, do: DSPex.Test.Loopback.start(&serve/2)

  @doc "Bridge options that make it the LM."
  def lm_opts(port) do
    [
      lm: "openai/stub",
      lm_options: %{api_base: "http://127.0.0.1:#{port}/v1", api_key: "not-a-key", cache: false}
    ]
  end

  defp serve(socket, owner) do
    case :gen_tcp.recv(socket, 0) do
      {:ok, data} ->
        with [line, _rest] <- String.split(data, "\r\n", parts: 2),
             true <- line =~ "POST",
             do: send(owner, {:lm_request, line})

        serve(socket, owner)

      {:error, _closed} ->
        send(owner, :lm_closed)
    end
  end
end
