defmodule DSPex.Test.RawPeer do
  @moduledoc "The real peer behind a bare port: any bytes in, decoded replies out."

  alias DSPex.PythonBridge.Options
  alias DSPex.PythonBridge.Bridge.Peer
  alias DSPex.Test.Helpers

  def open do
    # Log records would stand among the replies.
    env = %{"DSPY_BRIDGE_LOG_FRAMES" => "0"}
    {:ok, options} = Options.new(Helpers.real_opts(env: env))
    {:ok, peer} = Peer.open(options)
    peer
  end

  @doc "Sends one payload and waits for one frame."
  def exchange(peer, payload, timeout \\ 10_000) do
    write(peer, payload)
    frame(peer, timeout)
  end

  def write(%Peer{port: port}, payload), do: true = Port.command(port, payload)

  # The first program waits for DSPy's import.
  def frame(%Peer{port: port}, timeout \\ 60_000) do
    receive do
      {^port, {:data, frame}} -> JSON.decode!(frame)
      {^port, {:exit_status, status}} -> raise "the peer ended with status #{status}"
    after
      timeout -> raise "no reply within #{timeout} ms"
    end
  end
end
