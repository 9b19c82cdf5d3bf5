defmodule DSPex.PythonBridge.Programs.Declared do
  @moduledoc false
  # Programs that are declared in the options (`:programs`), so that they are there whenever the tree is started. What
  # cannot be a declaration is refused with the options. What is wrong in one makes only its own runs fail: it is in the
  # table with the reason.
  #
  # They may hold keys (`lm`), so no text here shows a value of theirs.

  require Logger

  alias DSPex.PythonBridge.{Error, Protocol}
  alias DSPex.PythonBridge.Programs.Store
  alias DSPex.PythonBridge.Protocol.Payload

  # What a bridge puts before a body, at most.
  @head_bytes 64

  @typedoc "The arguments of `create_program`, with string keys, and their id as JSON writes it."
  @type t :: {Store.id(), %{String.t() => term()}}

  @doc """
  The declarations of a list of maps, keyword lists and modules with a `definition/0`, or the text that refuses it.

      iex> alias DSPex.PythonBridge.Programs.Declared
      iex> Declared.new([[id: :qa, signature: "question -> answer"]])
      {:ok, [{"qa", %{"id" => :qa, "signature" => "question -> answer"}}]}
      iex> Declared.new([%{id: "qa"}, %{id: :qa}])
      {:error, "entry 2: qa is declared twice"}
  """
  @spec new(term()) :: {:ok, [t()]} | {:error, String.t()}
  def new(list) do
    if is_list(list) and not List.improper?(list),
      do: all(Enum.with_index(list, 1), []),
      else: {:error, "expected a list of maps, keyword lists and modules"}
  end

  defp all([], declared), do: {:ok, Enum.reverse(declared)}

  defp all([{entry, n} | rest], declared) do
    with {:ok, {id, _args} = program} <- one(entry),
         false <- List.keymember?(declared, id, 0) && {:error, "#{shown(id)} is declared twice"} do
      all(rest, [program | declared])
    else
      {:error, text} ->
        name = if is_atom(entry), do: " (#{inspect(entry)})"
        {:error, "entry #{n}#{name}: #{text}"}
    end
  end

  @doc """
  One declaration, or the text that refuses it.

      iex> DSPex.PythonBridge.Programs.Declared.one(%{signature: "question -> answer"})
      {:error, "it has no id"}
  """
  @spec one(term()) :: {:ok, t()} | {:error, String.t()}
  def one(module) when is_atom(module) and module not in [nil, true, false] do
    with {:module, _} <- Code.ensure_loaded(module),
         true <- function_exported?(module, :definition, 0),
         {:ok, definition} <- definition(module) do
      with {:error, text} <- arguments(definition), do: {:error, "its definition/0: #{text}"}
    else
      {:error, text} when is_binary(text) -> {:error, text}
      _neither -> {:error, "there is no such module with a definition/0"}
    end
  end

  def one(entry), do: arguments(entry)

  ## One entry

  # User code; its exception may show what it was about.
  defp definition(module) do
    {:ok, module.definition()}
  catch
    :error, reason ->
      %kind{} = Exception.normalize(:error, reason, __STACKTRACE__)
      {:error, "its definition/0 raised #{inspect(kind)}"}

    kind, _reason ->
      {:error, "its definition/0 ended with #{kind}"}
  end

  defp arguments(entry) do
    if (is_map(entry) and not is_struct(entry)) or (entry != [] and Keyword.keyword?(entry)),
      do: with_id(Map.new(entry, fn {key, value} -> {Payload.string(key) || key, value} end)),
      else:
        {:error,
         "expected a map or keyword list of create_program's arguments, or a module with definition/0"}
  end

  defp with_id(%{"id" => id} = args) do
    name = Payload.string(id)

    if name && String.valid?(name),
      do: {:ok, {name, args}},
      else: {:error, "id: expected a string"}
  end

  defp with_id(_args), do: {:error, "it has no id"}

  @doc "A program's id as texts show it, on one line whatever it is."
  @spec shown(term()) :: String.t()
  def shown(id), do: id |> inspect(printable_limit: 100) |> String.trim("\"")

  ## Into a table

  @doc """
  A new table of the calling process with these declarations. Those that cannot be sent to a peer are logged, for the
  bridge or pool `whose`.
  """
  @spec store([t()], {:bridge | :pool, term()}, pos_integer()) :: Store.table()
  def store(declared, {kind, name}, max_frame_bytes) do
    table = Store.new()
    bodies = for {id, args} <- declared, do: {id, body(id, args, max_frame_bytes)}
    Store.declare(table, bodies)

    for {_id, {:error, error}} <- bodies,
        do: Logger.warning("#{kind} #{inspect(name)}: #{error.message}", [{kind, name}])

    table
  end

  defp body(id, args, max) do
    case Protocol.encode_body(:create_program, args) do
      {:ok, body} when byte_size(body) + @head_bytes <= max and is_map_key(args, "signature") ->
        {:ok, body}

      # The peer does not keep it, so that its runs would not know why.
      {:ok, body} when byte_size(body) + @head_bytes <= max ->
        text = "signature: missing; expected text or an object with inputs and outputs"
        {:error, not_loaded(id, Error.new(:invalid_args, text))}

      {:ok, body} ->
        text = "the request has #{byte_size(body)} bytes; max_frame_bytes is #{max}"
        {:error, not_loaded(id, Error.new(:frame_too_large, text))}

      {:error, error} ->
        {:error, not_loaded(id, error)}
    end
  end

  @doc "The error of a program's runs, from the reason why it could not be loaded."
  @spec not_loaded(Store.id(), Error.t()) :: Error.t()
  def not_loaded(id, %Error{} = error),
    do: %{error | message: "program #{shown(id)} could not be loaded: #{error.message}"}
end
