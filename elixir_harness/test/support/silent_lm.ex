defmodule DSPex.Test.SilentLM do
  @moduledoc """
  A server on loopback that takes requests for an LM and never answers them: an LM call that takes
  for ever. It tells its owner of each: `{:lm_request, first_line}`, and of each connection that
  the other side closed: `:lm_closed`.
  """

  @doc "Starts it for the calling process; gives its port."
  def start do
    owner = self()

    {:ok, listener} =
      :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}, reuseaddr: true])

    {:ok, port} = :inet.port(listener)
    acceptor = spawn_link(fn -> accept(listener, owner) end)
    :ok = :gen_tcp.controlling_process(listener, acceptor)
    port
  end

  @doc "Bridge options that make it the LM."
  def lm_opts(port) do
    [
      lm: "openai/stub",
      lm_options: %{api_base: "http://127.0.0.1:#{port}/v1", api_key: "not-a-key", cache: false}
    ]
  end

  defp accept(listener, owner) do
    {:ok, socket} = :gen_tcp.accept(listener)
    pid = spawn(fn -> serve(socket, owner) end)
    :ok = :gen_tcp.controlling_process(socket, pid)
    accept(listener, owner)
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
