defmodule DSPex.Test.Loopback do
  @moduledoc "A server on loopback, for the LMs of the tests."

  @doc """
  Starts it for the calling process; gives its port. `serve` gets each connection's socket and that process.
  """
  def start(serve) do
    owner = self()

    {:ok, listener} =
      :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}, reuseaddr: true])

    {:ok, port} = :inet.port(listener)
    acceptor = spawn_link(fn -> accept(listener, &serve.(&1, owner)) end)
    :ok = :gen_tcp.controlling_process(listener, acceptor)
    port
  end

  defp accept(listener, serve) do
    {:ok, socket} = :gen_tcp.accept(listener)

    pid =
      spawn(fn ->
        receive do
          :go -> serve.(socket)
        end
      end)

    :ok = :gen_tcp.controlling_process(socket, pid)
    send(pid, :go)
    accept(listener, serve)
  end
end
