defmodule DSPex.PythonBridge.Program.Tools do
  @moduledoc false
  # The tools of a module's program: what the peer knows of each, and the functions for its runs.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Options
  alias DSPex.PythonBridge.Program.{Spec, Types, Wire}
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Tools.Runner

  @options [:description, :args, :function]

  @doc "The tools for `create_program`, and the functions by their names. Refuses what is wrong, by name."
  @spec read(term()) :: {[map()], %{String.t() => term()}}
  def read(tools) do
    if not Keyword.keyword?(tools),
      do: refuse("tools", "expected a keyword list such as [search: [args: [query: :string]]]")

    case Keyword.keys(tools) -- Enum.uniq(Keyword.keys(tools)) do
      [] -> :ok
      [twice | _] -> refuse("tools.#{twice}", "there twice; expected distinct names")
    end

    functions = for {name, opts} <- tools, fun = function(name, opts), into: %{}, do: fun
    with {:error, text} <- Runner.functions(functions), do: refuse("tools", text)
    {Enum.map(tools, fn {name, opts} -> tool(name, opts, "tools.#{name}") end), functions}
  end

  @doc "The program of a module with `use DSPex.PythonBridge.Program`; nil for any other."
  @spec spec(module()) :: Spec.t() | nil
  def spec(module) do
    behaviours = Keyword.get_values(module.__info__(:attributes), :behaviour)
    if Enum.any?(behaviours, &(DSPex.PythonBridge.Program in &1)), do: module.__dspex__(:spec)
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

  defp tool(name, opts, where) do
    if not Keyword.keyword?(opts),
      do: refuse(where, "expected a keyword list of #{listed(@options)}")

    for {key, _value} <- opts,
        key not in @options,
        do: refuse(where, "#{Options.unknown(key, @options)}; expected #{listed(@options)}")

    description = opts[:description]

    if description != nil and not is_binary(description),
      do: refuse("#{where}.description", "expected a string")

    args = opts |> Keyword.get(:args, []) |> Types.fields("#{where}.args")
    described = if description, do: %{description: description}, else: %{}
    Map.merge(%{name: Atom.to_string(name), args: Map.new(args, &arg(&1, where))}, described)
  end

  defp listed(names), do: Enum.map_join(names, ", ", &inspect/1)

  defp arg(field, where) do
    {field.key, Map.delete(Wire.field(field, :outputs, "#{where}.args.#{field.name}"), :name)}
  end

  defp function(name, opts) do
    function = if Keyword.keyword?(opts), do: opts[:function]

    case function do
      nil -> nil
      {fun, more} when is_list(more) -> check(fun, name)
      fun -> check(fun, name)
    end

    if function, do: {Atom.to_string(name), function}
  end

  # Other functions cannot be kept in a module.
  defp check(fun, name) do
    external? = is_function(fun) and Function.info(fun, :type) == {:type, :external}

    if not external?,
      do:
        refuse("tools.#{name}.function", "expected one of a module, such as &MyApp.Stock.find/1")
  end
end
