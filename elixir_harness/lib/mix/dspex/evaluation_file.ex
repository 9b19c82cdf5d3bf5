defmodule Mix.DSPex.EvaluationFile do
  @moduledoc false
  # The file of `mix dspex.eval` and `mix dspex.optimize`: Elixir code, whose last value says what is measured on what. User
  # code from here on: whatever it does becomes a text that names the file.

  alias DSPex.PythonBridge.{Bridge, EnvironmentCheck, Pool}
  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Evaluate.Examples
  alias DSPex.PythonBridge.Programs.Declared

  @keys [:program, :dataset, :metric, :options, :server, :trainset, :valset, :optimize]
  @examples [:dataset, :trainset, :valset]
  # A peer that imports DSPy without its bytecode takes some 20 s.
  @create_ms 120_000

  # What has called the code of the file.
  @around [:elixir, :erl_eval, Code, __MODULE__]

  @enforce_keys [:path, :given, :program, :values]
  defstruct @enforce_keys

  @typedoc """
  `given`: the program as the file gives it. `program`: an id that the server has, or the arguments of `create_program`, with
  string keys. `values`: what else the file gives, by its keys; examples as lists.
  """
  @type t :: %__MODULE__{
          path: Path.t(),
          given: term(),
          program: {:id, String.t()} | {:definition, String.t(), map()},
          values: %{atom() => term()}
        }

  @doc """
  Evaluates the file and checks what it returns. `required`: keys that must be there besides `program`; `optional`: examples
  that are read, too.
  """
  @spec read(Path.t(), [atom()], [atom()]) :: {:ok, t()} | {:error, String.t()}
  def read(path, required, optional \\ []) do
    with {:ok, returned} <- evaluate(path),
         {:ok, values} <- values(returned),
         :ok <- present(values, [:program | required]),
         {:ok, program} <- program(values),
         {:ok, values} <- with_examples(values, required ++ optional) do
      {given, values} = Map.pop!(values, :program)
      {:ok, %__MODULE__{path: path, given: given, program: program, values: values}}
    else
      {:error, text} -> {:error, "#{path}: #{text}"}
    end
  end

  @doc "The file whose program has this state, in place of its own state and demos; nil: as it is."
  @spec with_state(t(), map() | nil) :: {:ok, t()} | {:error, String.t()}
  def with_state(file, nil), do: {:ok, file}

  def with_state(%__MODULE__{program: {:definition, id, args}} = file, state) do
    args = args |> Map.drop(["state_path", "demos"]) |> Map.put("state", state)
    {:ok, %{file | program: {:definition, id, args}}}
  end

  def with_state(%__MODULE__{path: path}, _state),
    do: {:error, "#{path}: :program: --state needs a definition or a module, not an id"}

  defp evaluate(path) do
    with {:ok, _source} <- File.read(path) do
      {value, _binding} = Code.eval_file(path)
      {:ok, value}
    else
      {:error, reason} -> {:error, List.to_string(:file.format_error(reason))}
    end
  catch
    kind, reason -> {:error, failure(kind, reason, __STACKTRACE__)}
  end

  # The compiler has printed where.
  defp failure(:error, %CompileError{} = error, _stack), do: Exception.message(error)

  defp failure(kind, reason, stack) do
    own = Enum.take_while(stack, fn {module, _, _, _} -> module not in @around end)
    String.trim_trailing(Exception.format(kind, reason, own))
  end

  defp values(returned) do
    pairs =
      cond do
        is_map(returned) and not is_struct(returned) -> Map.to_list(returned)
        Keyword.keyword?(returned) -> Enum.reverse(returned)
        true -> [:no]
      end

    if Keyword.keyword?(pairs) do
      case Enum.find(Keyword.keys(pairs), &(&1 not in @keys)) do
        nil -> {:ok, Map.new(pairs)}
        key -> {:error, Table.unknown(key, @keys)}
      end
    else
      {:error,
       "its last value has to be a map or keyword list with the keys #{Enum.map_join(@keys, ", ", &inspect/1)}"}
    end
  end

  defp present(values, keys) do
    case Enum.find(keys, &(values[&1] == nil)) do
      nil -> :ok
      key -> {:error, "#{inspect(key)} is missing; expected #{expected(key)}"}
    end
  end

  defp expected(:program), do: "a definition, a module with definition/0, or an id"
  defp expected(:metric), do: "a function of two or three arguments, or {:field, name, match}"
  defp expected(_examples), do: "an enumerable of {inputs, expected}"

  defp program(%{program: id} = values) when is_binary(id) do
    if values[:server],
      do: {:ok, {:id, id}},
      else: {:error, ":program: an id needs :server, the bridge or pool that has it"}
  end

  defp program(%{program: program}) do
    case Declared.one(program) do
      {:ok, {id, args}} -> {:ok, {:definition, id, args}}
      {:error, text} -> {:error, ":program: #{text}"}
    end
  end

  ## Examples

  defp with_examples(values, keys) do
    values
    |> Map.take(Enum.filter(keys, &(&1 in @examples)))
    |> Enum.reduce_while({:ok, values}, fn {key, given}, {:ok, values} ->
      case examples(key, given) do
        {:ok, list} -> {:cont, {:ok, Map.put(values, key, list)}}
        {:error, text} -> {:halt, {:error, text}}
      end
    end)
  end

  defp examples(key, given) do
    list = Enum.to_list(given)

    case Examples.columns(list) do
      {:ok, [], _expected} -> {:error, "#{inspect(key)}: it has no examples"}
      {:ok, _inputs, _expected} -> {:ok, list}
      {:error, index} -> {:error, Examples.refusal(inspect(key), index)}
    end
  catch
    :error, %Protocol.UndefinedError{protocol: Enumerable} ->
      {:error, "#{inspect(key)}: expected #{expected(key)}"}

    kind, reason ->
      {:error, "#{inspect(key)}: it cannot be read: #{failure(kind, reason, __STACKTRACE__)}"}
  end

  ## The server

  @doc """
  Calls `fun` with the file's server. Without one it is a bridge with the application's configuration, which is stopped
  afterwards.
  """
  @spec with_server(t(), (Bridge.server() -> value)) :: value | {:error, String.t()}
        when value: term()
  def with_server(%__MODULE__{values: %{server: server}}, fun) when server != nil,
    do: fun.(server)

  def with_server(_file, fun) do
    with {:ok, _report} <- EnvironmentCheck.validate_environment(),
         {:ok, bridge} <- Bridge.start_link(name: nil) do
      try do
        fun.(bridge)
      after
        Bridge.stop(bridge)
      end
    else
      {:error, %ArgumentError{message: text}} -> {:error, text}
      {:error, text} when is_binary(text) -> {:error, "#{text}; see mix dspex.doctor"}
    end
  end

  @doc "The id of the program, which is created if the file defines it."
  @spec create(t(), Bridge.server()) :: {:ok, String.t()} | {:error, String.t()}
  def create(%{program: {:id, id}}, _server), do: {:ok, id}

  def create(%{program: {:definition, id, args}, path: path}, server) do
    client = if Pool.Handle.fetch(server), do: Pool, else: Bridge

    case client.request(server, :create_program, args, timeout: @create_ms) do
      {:ok, _created, _meta} -> {:ok, id}
      {:error, error} -> {:error, "#{path}: :program: #{error.message}"}
    end
  end
end
