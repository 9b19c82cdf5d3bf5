defmodule DSPex.PythonBridge.Program.Tools do
  @moduledoc false
  # The tools of a module's program: what the peer knows of each, and the functions for its runs.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Program.{Cast, Dump, Spec, Types, Wire}
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Tools.Runner

  @options [:description, :args, :function]
  # Which an argument has, and a field has not.
  @left_out [:default, :optional]

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
        do: refuse(where, "#{Table.unknown(key, @options)}; expected #{listed(@options)}")

    description = opts[:description]

    if description != nil and not is_binary(description),
      do: refuse("#{where}.description", "expected a string")

    args = args(Keyword.get(opts, :args, []), "#{where}.args")
    described = if description, do: %{description: description}, else: %{}
    Map.merge(%{name: Atom.to_string(name), args: args}, described)
  end

  defp listed(names), do: Enum.map_join(names, ", ", &inspect/1)

  defp args(args, where) do
    # What is not a keyword list is refused with the fields.
    split =
      if Keyword.keyword?(args),
        do: Enum.map(args, fn {key, arg} -> {key, split(arg)} end),
        else: []

    fields = if split == [], do: args, else: for({key, {arg, _more}} <- split, do: {key, arg})

    for field <- Types.fields(fields, where), into: %{} do
      here = "#{where}.#{field.name}"
      described = Map.delete(Wire.field(field, :outputs, here), :name)
      {_arg, left_out} = split[field.key]
      {field.key, Enum.into(left_out, described, &left_out(&1, field, here))}
    end
  end

  # The field in an argument, and whether it may be left out.
  defp split({type, [_ | _] = opts} = arg) do
    case Keyword.keyword?(opts) && Keyword.split(opts, @left_out) do
      {[_ | _] = left_out, []} -> {type, left_out}
      {[_ | _] = left_out, opts} -> {{type, opts}, left_out}
      _none -> {arg, []}
    end
  end

  defp split(arg), do: {arg, []}

  defp left_out({:optional, optional?}, _field, where) do
    if not is_boolean(optional?), do: refuse("#{where}.optional", "expected true or false")
    {:optional, optional?}
  end

  defp left_out({:default, default}, field, where) do
    default = Dump.value(field.type, default)

    # What has no JSON form is refused with the definition.
    with {:ok, json} <- Payload.encode(default, where),
         {:ok, decoded} <- Payload.decode(IO.iodata_to_binary(json)),
         {:error, text} <- Cast.cast(decoded, field.type, "default"),
         do: refuse(where, text)

    {:default, default}
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
