defmodule Mix.DSPex.EvaluationFile do
  @moduledoc false
  # The file of `mix dspex.eval` and `mix dspex.optimize`: Elixir code, whose last value says what is measured on what. What
  # is wrong with it is raised as a text that names the file.

  alias DSPex.PythonBridge.{Bridge, EnvironmentCheck, Error, Pool}
  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Programs.Declared

  @table [options: {:keyword, []}, optimize: {:keyword, []}] ++
           for(key <- [:program, :dataset, :metric, :server, :trainset, :valset], do: {key, :any})
  # A peer that imports DSPy without its bytecode takes some 20 s.
  @create_ms 120_000

  @typedoc """
  What the file gives, by its keys, and `path`, the program's `id` and `args`, those of `create_program` with string keys;
  nil if the server has the program.
  """
  @type t :: %{atom() => term()}

  @doc "Evaluates the file and checks what it returns. `required`: keys that must be there besides `program`."
  @spec read(Path.t(), [atom()]) :: t()
  def read(path, required) do
    {value, _binding} = Code.eval_file(path)
    pairs = if is_map(value) and not is_struct(value), do: Map.to_list(value), else: value

    unless Keyword.keyword?(pairs),
      do: refuse(path, "its last value has to be a map or keyword list")

    file = path |> checked(Table.check(pairs, @table)) |> Map.new()
    missing = Enum.find([:program | required], &(file[&1] == nil))
    if missing, do: refuse(path, "#{inspect(missing)} is missing")
    Map.merge(file, program(path, file))
  end

  defp program(path, %{program: id} = file) when is_binary(id) do
    unless file[:server],
      do: refuse(path, ":program: an id needs :server, the bridge or pool that has it")

    %{path: path, id: id, args: nil}
  end

  defp program(path, %{program: program}) do
    {id, args} = checked(path, Declared.one(program), ":program: ")
    %{path: path, id: id, args: args}
  end

  @doc """
  Gives the value of a result, or ends the task with its text. `prefix`: the key of the file that it is about.
  """
  @spec checked(Path.t(), {:ok, value} | {:error, String.t() | Error.t()}, String.t()) :: value
        when value: term()
  def checked(path, result, prefix \\ "")
  def checked(_path, {:ok, value}, _prefix), do: value

  def checked(path, {:error, %Error{type: type, message: text}}, prefix),
    do: refuse(path, "#{prefix}#{type}: #{text}")

  def checked(path, {:error, text}, prefix), do: refuse(path, prefix <> text)

  @doc "Ends the task with a text about the file."
  @spec refuse(Path.t(), String.t()) :: no_return()
  def refuse(path, text), do: Mix.raise("#{path}: #{text}")

  ## The server

  @doc """
  Calls `fun` with the file's server. Without one it is a bridge with the application's configuration, which is stopped
  afterwards.
  """
  @spec with_server(t(), (Bridge.server() -> value)) :: value when value: term()
  def with_server(%{server: server}, fun) when server != nil, do: fun.(server)

  def with_server(_file, fun) do
    with {:error, text} <- EnvironmentCheck.validate_environment(),
         do: Mix.raise("#{text}; see mix dspex.doctor")

    {:ok, bridge} = Bridge.start_link(name: nil)

    try do
      fun.(bridge)
    after
      Bridge.stop(bridge)
    end
  end

  @doc "Creates the program, if the file defines it."
  @spec create(t(), Bridge.server()) :: :ok
  def create(%{args: nil}, _server), do: :ok

  def create(%{args: args, path: path}, server) do
    client = if Pool.Handle.fetch(server), do: Pool, else: Bridge

    with {:error, error} <- client.request(server, :create_program, args, timeout: @create_ms),
         do: checked(path, {:error, error}, ":program: ")

    :ok
  end
end
