defmodule DSPex.PythonBridge.Top.Remote do
  @moduledoc false
  # Snapshots of another node, for `mix dspex.top`. Errors are a line of text.

  alias DSPex.PythonBridge.Top

  # A snapshot takes one second at most.
  @answer_ms 3_000
  # Of an atom.
  @max_length 255

  @doc """
  The node of a name, as `name@host`. Starts distribution if this node has no name: hidden, and no other node connects
  to it.
  """
  @spec node(String.t()) :: {:ok, node()} | {:error, String.t()}
  def node(name) do
    if name =~ ~r/\A[^@\s]+@[^@\s]+\z/ and String.length(name) <= @max_length,
      do: distribute(String.to_atom(name), String.contains?(name, ".")),
      else: {:error, "node: expected name@host, got #{inspect(name)}"}
  end

  # The host of its own name only has to be of the right kind.
  defp distribute(node, long?) do
    {host, domain} = if long?, do: {"127.0.0.1", :longnames}, else: {"localhost", :shortnames}
    options = %{name_domain: domain, hidden: true, dist_listen: false}

    with false <- Node.alive?(),
         {:error, _long} <- :net_kernel.start(:"dspex_top_#{System.pid()}@#{host}", options),
         do:
           {:error,
            "cannot start Erlang's distribution here: OTP needs a place for ~/.erlang.cookie"},
         else: (_started -> {:ok, node})
  end

  @doc "The bridges of a node now."
  @spec snapshot(node()) :: {:ok, Top.snapshot()} | {:error, String.t()}
  def snapshot(node) do
    {:ok, :erpc.call(node, Top, :snapshot, [[]], @answer_ms)}
  catch
    :error, {:erpc, :noconnection} ->
      {:error,
       "#{node} cannot be reached: is it running, is that its whole name, and has this node its cookie?"}

    :error, {:erpc, :timeout} ->
      {:error, "#{node} does not answer within #{@answer_ms} ms"}

    :error, {:exception, :undef, [{Top, :snapshot, _args, _where} | _]} ->
      {:error, "#{node} has no :dspex"}

    _kind, _reason ->
      {:error, "#{node} failed to look at its bridges"}
  end
end
