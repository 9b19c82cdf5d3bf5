defmodule DSPex.PythonBridge.Program.Tools do
  @moduledoc false
  # The tools of a module's program: what the peer knows of each, and the functions for its runs.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Durable.Options
  alias DSPex.PythonBridge.Program.{Dump, Spec, Types, Wire}
  alias DSPex.PythonBridge.Programs.Declared
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Tools.Runner

  @options [:description, :args, :parameters, :function]
  # Which an argument has, and a field has not.
  @of_args [:default, :optional]

  @doc "The tools for `create_program`, and the functions by their names. Refuses what is wrong, by name."
  @spec read(term()) :: {[map()], %{String.t() => term()}}
  def read(tools) do
    keyword!(tools, "tools", :any, "a keyword list such as [search: [args: [query: :string]]]")
    definitions = for {name, opts} <- tools, do: tool(name, opts, "tools.#{name}")

    functions =
      for {name, opts} <- tools,
          function = opts[:function],
          into: %{},
          do: {Atom.to_string(name), function}

    with {:ok, _approve, plain} <- Options.approvals(functions),
         {:ok, _functions} <- Runner.functions(plain),
         do: :ok,
         else: ({:error, text} -> refuse("tools", text))

    {definitions, functions}
  end

  @doc "The id of a program that is declared; of a module with `use DSPex.PythonBridge.Program` also its program, else nil."
  @spec declared(term()) :: {:ok, String.t(), Spec.t() | nil} | {:error, String.t()}
  def declared(entry) do
    with {:ok, {id, _args}} <- Declared.one(entry) do
      attributes = if is_atom(entry), do: entry.module_info(:attributes), else: []
      program? = {:behaviour, [DSPex.PythonBridge.Program]} in attributes
      {:ok, id, if(program?, do: entry.__dspex__(:spec))}
    end
  end

  @doc "Options of a run with these functions among its `:tools`. Those that it has itself replace them, by name."
  @spec add(keyword(), %{String.t() => term()}) :: keyword()
  def add(opts, none) when none == %{}, do: opts

  def add(opts, functions) do
    case Keyword.get(opts, :tools, %{}) do
      given when is_map(given) ->
        names = Enum.map(Map.keys(given), &Payload.string/1)
        Keyword.put(opts, :tools, Map.merge(Map.drop(functions, names), given))

      _wrong ->
        opts
    end
  end

  # The peer checks what these are.
  defp tool(name, opts, where) do
    keyword!(opts, where, @options)
    check_function(opts[:function], "#{where}.function")

    if Keyword.has_key?(opts, :args) and Keyword.has_key?(opts, :parameters),
      do: refuse(where, "has :args and :parameters; expected one of them")

    args = if Keyword.has_key?(opts, :parameters), do: %{}, else: %{args: args(opts, where)}

    opts
    |> Keyword.take([:description, :parameters])
    |> Enum.into(Map.put(args, :name, Atom.to_string(name)))
  end

  defp args(opts, where) do
    for field <- Types.fields(opts[:args] || [], "#{where}.args", [], @of_args), into: %{} do
      described = Wire.field(field, :outputs, "#{where}.args.#{field.name}")

      more =
        for {key, value} <- field.more,
            do: {key, if(key == :default, do: Dump.value(field.type, value), else: value)}

      {field.key, described |> Map.delete(:name) |> Map.merge(Map.new(more))}
    end
  end

  defp check_function(nil, _where), do: :ok

  defp check_function({function, opts}, where) when is_list(opts),
    do: check_function(function, where)

  # Other functions cannot be kept in a module.
  defp check_function(function, where) do
    if not is_function(function) or Function.info(function, :type) != {:type, :external},
      do: refuse(where, "expected one of a module, such as &MyApp.Stock.find/1")
  end
end
