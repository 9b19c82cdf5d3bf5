defmodule DSPex.PythonBridge.Optimize.TemporaryProgram do
  @moduledoc false
  # The program of one optimization, under an id that no other has: only the peer that optimizes it has it, and no bridge
  # keeps its definition, so that no other peer is given it. A process of its own removes it, also when the caller dies.

  alias DSPex.PythonBridge.Calls
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.OTP.{Ask, Deadline, ServerGuard}
  alias DSPex.PythonBridge.Protocol

  # A peer that hangs is replaced, and has no programs then.
  @cleanup_ms 1_000

  @doc "An id for the program, which says what it is in `list_programs`."
  @spec id(String.t()) :: String.t()
  def id(of), do: "#{of}:optimize:#{Base.encode16(:crypto.strong_rand_bytes(6), case: :lower)}"

  @doc "Starts the process for the calling one."
  @spec open(String.t()) :: pid()
  def open(id) do
    caller = self()

    spawn(fn ->
      ServerGuard.run(fn ->
        Process.monitor(caller)
        loop(id, caller, [])
      end)
    end)
  end

  @doc "Notes a peer, before it is given the program."
  @spec at(pid(), Caller.dest()) :: :ok
  def at(pid, peer) do
    send(pid, {:at, peer})
    :ok
  end

  @doc "Removes the program from all peers that have it, and ends the process."
  @spec close(pid()) :: :ok
  def close(pid) do
    Ask.ask(pid, :infinity, &{:close, &1})
    :ok
  end

  defp loop(id, caller, peers) do
    receive do
      {:at, peer} ->
        loop(id, caller, [peer | List.delete(peers, peer)])

      {:close, ref} when is_reference(ref) ->
        remove(id, peers)
        send(ref, {ref, :ok})

      {:DOWN, _monitor, :process, ^caller, _reason} ->
        remove(id, peers)

      _stray ->
        loop(id, caller, peers)
    end
  end

  # A peer makes changes in the order in which it reads them, so this one comes after the creation.
  defp remove(id, peers) do
    {:ok, body} = Protocol.encode_body(:cleanup, %{program_ids: [id]})
    for peer <- peers, do: ask(peer, body, :never, Deadline.new(@cleanup_ms))
  end

  @doc """
  Sends a peer a request without a change that its bridge would keep. `resend`: of `DSPex.PythonBridge.Calls.Request`.
  """
  @spec ask(Caller.dest(), binary(), atom(), Deadline.t()) :: Calls.Request.reply()
  def ask(bridge, body, resend, deadline) do
    request = %Calls.Request{body: body, resend: resend}
    Caller.send_and_wait(bridge, Deadline.left(deadline), request)
  end
end
