defmodule DSPex.PythonBridge.Top.Remote do
  @moduledoc """
  The way of `DSPex.PythonBridge.Top` to the node that it is to show. Errors are a line of text.
  """

  alias DSPex.PythonBridge.Top

  # A snapshot takes one second at most.
  @answer_ms 3_000
  @epmd_ms 2_000
  @second 1_000
  # What Erlang takes as an atom.
  @max_length 255

  @doc """
  Connects to a node, by its whole name; `cookie`: nil for that of `~/.erlang.cookie`, or of this node.

  If this node has no name yet, it takes one of the same kind, long or short. It is then hidden: the other
  node's cluster does not hear of it, and it listens to nobody.
  """
  @spec connect(String.t(), String.t() | nil) :: {:ok, node()} | {:error, String.t()}
  def connect(name, cookie) do
    with :ok <- check_name(name),
         :ok <- check_cookie(cookie),
         node = String.to_atom(name),
         :ok <- distribute(name) do
      if cookie, do: Node.set_cookie(node, String.to_atom(cookie))
      if Node.connect(node), do: {:ok, node}, else: {:error, out_of_reach(node)}
    end
  end

  defp check_name(name) do
    if name =~ ~r/\A[^@\s]+@[^@\s]+\z/ and String.length(name) <= @max_length,
      do: :ok,
      else: {:error, "node: expected name@host, got #{inspect(name)}"}
  end

  defp check_cookie(nil), do: :ok

  defp check_cookie(cookie) do
    if cookie != "" and String.valid?(cookie) and String.length(cookie) <= @max_length,
      do: :ok,
      else: {:error, "cookie: expected 1 to #{@max_length} characters"}
  end

  defp distribute(name) do
    if Node.alive?(), do: :ok, else: take_name(String.contains?(name, "."))
  end

  # Nobody connects to this node, so its host matters only for being of the right kind.
  defp take_name(long?) do
    name = "dspex_top_#{Base.encode16(:rand.bytes(6), case: :lower)}"
    {host, domain} = if long?, do: {"127.0.0.1", :longnames}, else: {"localhost", :shortnames}
    options = %{name_domain: domain, hidden: true, dist_listen: false}

    case :net_kernel.start(:"#{name}@#{host}", options) do
      {:ok, _pid} ->
        :ok

      {:error, _long} ->
        {:error,
         "cannot start Erlang's distribution here: is there a ~/.erlang.cookie, or a place for one? OTP wants it, " <>
           "whatever --cookie says"}
    end
  end

  @doc "How the bridges of a node are now."
  @spec snapshot(node()) :: {:ok, Top.snapshot()} | {:error, String.t()}
  def snapshot(node) do
    {:ok, :erpc.call(node, Top, :snapshot, [[]], @answer_ms)}
  catch
    :error, {:erpc, :noconnection} -> {:error, out_of_reach(node)}
    :error, {:erpc, :timeout} -> {:error, "#{node} does not answer within #{@answer_ms} ms"}
    :error, {:exception, :undef, [{Top, :snapshot, _args, _where} | _]} -> {:error, too_old(node)}
    _kind, _reason -> {:error, "#{node} failed to look at its bridges"}
  end

  @doc "The same with the calls per second of one second, which it takes."
  @spec observe(node()) :: {:ok, Top.snapshot()} | {:error, String.t()}
  def observe(node) do
    with {:ok, earlier} <- snapshot(node),
         :ok = Process.sleep(@second),
         {:ok, snapshot} <- snapshot(node),
         do: {:ok, Top.with_rates(snapshot, earlier)}
  end

  defp too_old(node), do: "#{node} has no :dspex, or one that is older than #{inspect(Top)}"

  ## Why a node cannot be reached

  defp out_of_reach(node) do
    [name, host] = node |> Atom.to_string() |> String.split("@")
    "#{node} cannot be reached: " <> why(name, host, names_at(host))
  end

  defp why(name, host, {:ok, names}) do
    if List.keymember?(names, to_charlist(name), 0),
      do:
        "epmd on #{host} knows it, but it takes no connection; " <>
          "is the cookie its own, and the host written as in its name?",
      else: "epmd on #{host} knows no #{name}" <> known(names)
  end

  defp why(_name, host, {:error, :nxdomain}), do: "there is no host #{host}"
  defp why(_name, host, {:error, _reason}), do: "no epmd answers on #{host}"

  defp known([]), do: ""
  defp known(names), do: ", but " <> Enum.map_join(names, ", ", fn {name, _port} -> name end)

  # It has no timeout of its own.
  defp names_at(host) do
    :erpc.call(node(), :net_adm, :names, [to_charlist(host)], @epmd_ms)
  catch
    _kind, _reason -> {:error, :timeout}
  end
end
